"""The typed reader of JSON, YAML and tables (read.py), and the shapes of the files of this room (shapes.py)."""

from ehr_features.typed.read import Shape, read_json, read_lines, read_parquet, read_yaml, undamaged

__all__ = ["Shape", "read_json", "read_lines", "read_parquet", "read_yaml", "undamaged"]
