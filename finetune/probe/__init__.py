"""Linear evaluation and fine-tuning of encoders on film labels."""

from finetune.probe.main import probe
