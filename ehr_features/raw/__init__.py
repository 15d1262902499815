"""Find, open and read raw tables with DuckDB or Spark, from a folder or a URL."""

from configs.face import lazy

NAMES = {name: f"engine:{name}" for name in ("connect", "hold", "interruptible")}
NAMES |= {name: f"source:{name}" for name in ("Source", "open_source")}
__getattr__, __dir__ = lazy(__name__, NAMES)  # packing films reads files at a URL, and no table
