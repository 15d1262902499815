"""Linear evaluation and fine-tuning of encoders on film labels."""

from configs.face import callable_module
from finetune.probe.main import probe

callable_module(__name__)
