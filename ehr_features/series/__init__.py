"""Bin events into hourly series of the 17 variables, and read them."""

from ehr_features.series.file import fit, load

__all__ = ["fit", "load"]
