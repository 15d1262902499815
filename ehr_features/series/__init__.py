"""Events -> hourly series of the 17 variables, and their reader."""

from ehr_features.series.file import fit, load

__all__ = ["fit", "load"]
