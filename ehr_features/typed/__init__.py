"""The typed reader of JSON, YAML and tables (read.py), the shapes of our files (shapes.py), their seals (seal.py)."""

from ehr_features.typed.read import Shape, read_arrow, read_json, read_lines, read_parquet, read_yaml, undamaged

__all__ = ["Shape", "read_arrow", "read_json", "read_lines", "read_parquet", "read_yaml", "undamaged"]
