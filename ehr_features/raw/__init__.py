"""Find, open and read raw tables with DuckDB or Spark, from a folder or a URL."""

from ehr_features.raw.engine import connect, hold, interruptible
from ehr_features.raw.source import Source, open_source

__all__ = ["Source", "connect", "hold", "interruptible", "open_source"]
