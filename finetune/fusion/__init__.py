"""ICU fusion models: the record and the films before the prediction, to logits."""

from finetune.fusion.models import MODELS
from finetune.fusion.train import fuse
