"""Pretrain an encoder on films and features/ with an EHR-conditioned masked Siamese network. No label is read."""

from configs import __version__
from configs.face import lazy

__getattr__, __dir__ = lazy(__name__, {"encoder": "encoder", "loss": "loss", "store": "store", "train": "train"})
