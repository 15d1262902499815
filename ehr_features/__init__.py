"""Raw MIMIC tables -> features/. Imports no torch."""

from configs import __version__
from configs.face import lazy

__getattr__, __dir__ = lazy(__name__, {"build": "build", "series": "series", "static": "static"})
