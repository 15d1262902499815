"""Evaluate an encoder: linear evaluation, ICU fusion, metrics, report."""

from configs import __version__
from configs.face import lazy

__getattr__, __dir__ = lazy(
    __name__,
    {
        "fuse": "fusion.train:fuse",
        "fusion": "fusion",
        "metrics": "metrics",
        "probe": "probe",
        "report": "report",
        "results": "results",
    },
)
