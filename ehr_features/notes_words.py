"""Free text of the record as plain words: chief complaints with their abbreviations expanded, names, titles.

The abbreviations stand in abbreviations.csv (abbreviation, expansion), or in a table of one's own.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ibis.expr.types as ir
import pandas as pd

from configs import UserError
from ehr_features.films import where

SHIPPED = Path(__file__).with_name("abbreviations.csv")
NOTHING = (
    "",
    "nan",
    "nat",
    "none",
    "null",
    "n/a",
    "na",
    "unknown",
    "unknown-cc",
    "unknown/na",
    "unk",
    "other",
    "___",
    "?",
    "-",
    ".",
)  # says nothing


def read_abbreviations(path: Path | None) -> dict[str, str]:
    """abbreviation (lower case) -> expansion.

    Raises: UserError: no such table, a column or a value missing, one abbreviation with two expansions.
    """
    path = path or SHIPPED
    try:
        table = pd.read_csv(path, dtype=str, keep_default_na=False, comment="#")
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as a table of abbreviations ({str(error).splitlines()[0]})") from None
    if missing := {"abbreviation", "expansion"} - set(table):
        raise UserError(f"{path}: column {sorted(missing)} missing; found {list(table)}")
    table = table.assign(abbreviation=table["abbreviation"].str.strip().str.lower())
    empty = table.index[(table["abbreviation"] == "") | (table["expansion"].str.strip() == "")]
    if len(empty):
        raise UserError(f"{path}, line {empty[0] + 2}: an abbreviation and its expansion are both needed")
    if len(twice := table.loc[table["abbreviation"].duplicated(), "abbreviation"]):
        raise UserError(f"{path}: `{twice.iloc[0]}` has two rows; keep one")
    return dict(zip(table["abbreviation"], table["expansion"].str.strip(), strict=True))


def expander(abbreviations: Mapping[str, str]) -> re.Pattern[str]:
    """The abbreviations as one pattern, longer ones first; a single letter stands alone, also without - / & '."""
    names = sorted(abbreviations, key=lambda name: (-len(name), name))
    ways = []
    for name in names:
        text = r"\s+".join(map(re.escape, name.split()))
        edge = r"[\w\-/&'.]" if len(name) == 1 else r"\w"
        ways.append(f"(?<!{edge}){text}" + ("" if name.endswith("/") else f"(?!{edge})"))
    return re.compile("|".join(ways) or r"(?!)", re.IGNORECASE)


def complaint(text: str, abbreviations: Mapping[str, str], pattern: re.Pattern[str]) -> str | None:
    """A chief complaint in lower case with its abbreviations expanded; None if it says nothing.

    Parts that say nothing (`unknown`, de-identified `___`) are left out, and of equal parts one is kept.
    """

    def full(found: re.Match[str]) -> str:
        name = re.sub(r"\s+", " ", found[0].lower())
        return abbreviations[name] + (" " if name.endswith("/") else "")

    parts = []
    for part in re.split(r"\s*[,;\n]\s*", text.replace("___", " ").lower()):
        part = re.sub(r"\s+", " ", pattern.sub(full, part)).strip(" .:")
        part = re.sub(r"^-+\s+|[\s\-]+$", "", part)  # but for the minus of `-LOC`
        if part not in NOTHING:
            parts.append(part)
    return ", ".join(dict.fromkeys(parts)) or None


def plain(text: Any) -> ir.StringValue:
    """A name or title (an expression) on one line, without the semicolons that separate items; null if it says
    nothing."""
    text = text.re_replace(r"\s+", " ").replace(";", ",").strip()
    return where(~text.lower().isin(NOTHING), text)
