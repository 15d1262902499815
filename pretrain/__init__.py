"""Films + features/ -> an encoder, by an EHR-conditioned masked Siamese network. Never reads a label."""

from configs import __version__
from configs.face import lazy

__getattr__, __dir__ = lazy(__name__, {"encoder": "encoder", "loss": "loss", "store": "store", "train": "train"})
