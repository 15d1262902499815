"""Bin events into hourly series of the 17 variables, and read them."""

from ehr_features.series.file import fit, load
from ehr_features.series.mapped import Mapped

__all__ = ["Mapped", "fit", "load"]
