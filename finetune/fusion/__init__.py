"""ICU fusion models: logits from the record and the films before the prediction."""

from finetune.fusion.models import MODELS
from finetune.fusion.train import fuse
