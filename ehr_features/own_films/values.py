"""The values of a table's columns: sex, age, date, view and split, as this toolkit writes them.

Input: a column as text. Output: a column of our values. Words that are not understood are named, with what to do.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from configs import UserError
from ehr_features.own_films.config import Layout, TableConfig
from ehr_features.schema import SPLITS, view_names

SEXES = {"m": "M", "male": "M", "f": "F", "female": "F"}
SPLIT_WORDS = {"valid": "val", "validate": "val", "validation": "val", "dev": "val", "training": "train"}
AGE = r"^(?P<number>[-+]?\d+(?:\.\d+)?)\s*(?P<unit>[YMWDymwd]?)$"
PER_YEAR = {"M": 12.0, "W": 365.25 / 7, "D": 365.25}  # of DICOM's units
OLDEST = 120


def text(column: pd.Series) -> pd.Series:
    """A column as text without blanks around it; NA where it is empty. 1.0 of a number column is 1."""
    if pd.api.types.is_float_dtype(column):
        column = column.replace([np.inf, -np.inf], np.nan)
        known = column.dropna()
        if (known == known.round()).all() and (known.abs() < 2**53).all():
            column = column.astype("Int64")
    found = column.astype("string").str.strip()
    return found.mask(found == "")


def words(column: pd.Series, limit: int = 5) -> str:
    """The distinct values of a column, for a message."""
    distinct = sorted(column.dropna().unique().tolist(), key=str)
    more = f" and {len(distinct) - limit} more" if len(distinct) > limit else ""
    return ", ".join(f"`{word}`" for word in distinct[:limit]) + more


def row_of(wanted: pd.Series) -> int:
    """The number of the first row that is wanted, as the lines of a CSV count: its header is line 1."""
    return int(wanted.index[wanted.to_numpy(dtype=bool)][0]) + 2


def sexes(column: pd.Series, config: TableConfig, layout: Layout) -> pd.Series:
    """M, F or None. Raises: UserError: a word that is not understood."""
    known: dict[str, str | None] = {**SEXES, **_lower(layout.sex_words), **_lower(config.sex_words)}
    given = text(column).str.lower().str.removesuffix(".0")
    if (odd := given.notna() & ~given.isin(list(known))).any():
        named = given[odd]
        example = ", ".join(f"{word}: ?" for word in sorted(named.unique())[:5])
        raise UserError(
            f"{config.table}: `{column.name}` holds {words(named)} in {odd.sum()} rows, the first in line "
            f"{row_of(odd)}, which are no words for sex; understood are M, F, male and female. Give their meaning, "
            f"'films.sex_words={{{example}}}', with M, F or null (unknown) in place of each ?, or films.sex=none"
        )
    return given.map(known).astype(object)


def ages(column: pd.Series, config: TableConfig, layout: Layout) -> tuple[pd.Series, list[str]]:
    """Years, and what is to be said of them. Raises: UserError: an age that is no number, or is out of range."""
    given = text(column)
    special = given.str.lower().map(_lower(layout.age_words)).astype("Float64").astype(float)
    parts = given.str.extract(AGE)
    unit = parts["unit"].str.upper()
    years = pd.to_numeric(parts["number"]).astype(float) / unit.map(PER_YEAR).astype(float).fillna(1.0)
    years = special.fillna(years)
    said = []
    if (odd := given.notna() & years.isna()).any():
        if layout.odd_ages == "missing":
            said.append(f"{odd.sum()} values of `{column.name}` are no age: taken as unknown")
        else:
            raise UserError(
                f"{config.table}: {odd.sum()} values of `{column.name}` are no age, the first in line {row_of(odd)}; "
                "an age is a number of years, or DICOM's 058Y, 011M, 003W or 020D; leave a cell empty "
                "where it is unknown, or take films.age=none"
            )
    units = int((unit.fillna("") != "").sum())
    said += [f"{units} ages of `{column.name}` are DICOM's (058Y) and are read as years"] if units else []
    return _in_range(years, str(column.name), config, layout, said)


def ages_at(birth_year: pd.Series, taken_at: pd.Series, config: TableConfig, layout: Layout) -> pd.Series:
    """Years from the year of birth to the film's."""
    born = pd.to_numeric(text(birth_year), errors="coerce").astype(float)
    return _in_range(taken_at.dt.year - born, str(birth_year.name), config, layout, [])[0]


def _in_range(
    years: pd.Series, name: str, config: TableConfig, layout: Layout, said: list[str]
) -> tuple[pd.Series, list[str]]:
    far = (years < 0) | (years > OLDEST)
    if not far.any():
        return years, said
    if layout.odd_ages == "refuse":
        raise UserError(
            f"{config.table}: {far.sum()} ages in `{name}` are not from 0 to {OLDEST} years, the first in line "
            f"{row_of(far)}; mend them, or leave the cell empty where the age is unknown"
        )
    return years.mask(far), [*said, f"{far.sum()} ages in `{name}` are not from 0 to {OLDEST} years: taken as unknown"]


def times(column: pd.Series, config: TableConfig) -> tuple[pd.Series, list[str]]:
    """Dates or times, and what is to be said. Raises: UserError: unreadable ones in a column that the user named."""
    if pd.api.types.is_datetime64_any_dtype(column):
        return column, []
    given = text(column)
    found = pd.to_datetime(given, format="ISO8601", errors="coerce", utc=True).dt.tz_localize(None)
    if not (odd := given.notna() & found.isna()).any():
        return found, []
    says = (
        f"{odd.sum()} values of `{column.name}` are no date, the first in line {row_of(odd)}; a date is written "
        "2024-05-31 or 20240531, a time 2024-05-31 14:05"
    )
    if config.taken_at is not None:
        raise UserError(f"{config.table}: {says}")
    return found, [f"{says}: taken as unknown"]


def views(column: pd.Series, layout: Layout) -> pd.Series:
    """AP, PA, LATERAL, ...; None where the table does not say."""
    given = text(column).astype(object)
    known = _lower(layout.view_words)
    return view_names(given.map(lambda word: known.get(str(word).lower(), word), na_action="ignore"))


def splits(column: pd.Series, config: TableConfig) -> pd.Series:
    """train, val or test. Raises: UserError: another word."""
    given = text(column).str.lower()
    meant = given.replace(SPLIT_WORDS)
    if (odd := ~meant.isin(SPLITS)).any():
        empty = int(given.isna().sum())
        says = words(given[odd]) + (f"{' and ' if empty < odd.sum() else ''}{empty} empty cells" if empty else "")
        raise UserError(
            f"{config.table}: `{column.name}` holds {says}, the first in line {row_of(odd)}; wanted train, "
            "val, test; films.split=none if that column is no split"
        )
    return meant.astype(object)


def _lower(given: Mapping[str, Any]) -> dict[str, Any]:
    return {str(word).strip().lower(): meaning for word, meaning in given.items()}
