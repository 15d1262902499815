"""The end of `features` in the terminal: stays, films and samples that were written, and what fell out and why."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pandas as pd

from ehr_features.files import read_table
from ehr_features.schema import SPLITS
from ehr_features.typed import read_json
from ehr_features.typed.shapes import AttritionJson

WIDTH = 80  # columns
RULES = 8  # rules that are named; the others are counted


def summary(folder: Path) -> list[str]:
    """Lines of at most WIDTH columns on a features folder."""
    stays = read_table(folder, "stays", ["stay_id", "subject_id", "split"])
    lines = [f"  {len(stays):,} stays of {stays['subject_id'].nunique():,} subjects ({_splits(stays)})"]
    if (folder / "images.parquet").is_file():
        films = read_table(folder, "images", ["subject_id", "stay_id", "split"])
        inside = f"{films['stay_id'].notna().sum():,} taken in a stay"
        lines.append(
            f"  {len(films):,} films of {films['subject_id'].nunique():,} subjects, {inside} ({_splits(films)})"
        )
    for path in sorted((folder / "samples").glob("*.parquet")):
        rows = read_table(folder, f"samples/{path.stem}", ["split", "dicom_id"])
        with_film = f", {rows['dicom_id'].notna().sum():,} with a film" if path.stem != "findings" else ""
        lines.append(f"  {len(rows):,} samples of {path.stem}{with_film} ({_splits(rows)})")
    lost = [r for r in read_json(folder / "attrition.json", AttritionJson)["exclusions"] if r["before"] > r["after"]]
    lost.sort(key=lambda r: r["after"] - r["before"])
    lines.append("  nothing fell out" if not lost else "  fell out:")
    for rule in lost[:RULES]:
        what = str(rule["table"]).replace("films with a link", "films, without a link")
        lines.append(f"    {rule['before'] - rule['after']:,} of {rule['before']:,} {what}: {rule['why']}")
    if len(lost) > RULES:
        lines.append(f"    and by {len(lost) - RULES} more rules: {folder / 'attrition.json'}")
    return [part for line in lines for part in _wrapped(line)]


def _splits(rows: pd.DataFrame) -> str:
    return ", ".join(f"{(rows['split'] == split).sum():,} {split}" for split in SPLITS)


def _wrapped(line: str) -> list[str]:
    indent = " " * (len(line) - len(line.lstrip()))
    return textwrap.wrap(
        line, WIDTH, initial_indent="", subsequent_indent=indent + "  ", break_long_words=False, break_on_hyphens=False
    )
