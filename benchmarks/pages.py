"""Write the generated tables of the pages: `python -m benchmarks.pages`.

A page marks the place of a table NAME with `<!-- NAME -->` and `<!-- end -->`.
"""

from __future__ import annotations

import re
from pathlib import Path

from ehr_features import schema
from ehr_features.static import READS

ROOT = Path(__file__).resolve().parents[1]


def features_table() -> str:
    """Every column of images.parquet that a group or a report reads, with the moment from which it is known."""
    groups = {column: [g for g, reads in READS.items() if column in reads] for column in schema.IMAGES}
    rows = ["| column | type | unit | known at | groups |", "|---" * 5 + "|"]
    for name, column in schema.IMAGES.items():
        used = ", ".join(groups[name]) or {"subgroup": "reporting only", "finding": "label"}.get(column.group, "")
        rows.append(f"| {name} | {column.type} | {column.unit} | {column.available_at} | {used} |")
    return "\n".join(rows)


def fill(text: str, name: str, table: str) -> str:
    """Put a table between a page's marks. Raises: ValueError: the page has no such marks."""
    pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end -->)", re.DOTALL)
    if not pattern.search(text):
        raise ValueError(f"no <!-- {name} --> ... <!-- end --> in the page")
    return pattern.sub(lambda found: found[1] + table + "\n" + found[2], text)


if __name__ == "__main__":
    page = ROOT / "docs/features.md"
    page.write_text(fill(page.read_text(encoding="utf-8"), "features", features_table()), encoding="utf-8")
    print(page)
