"""The labels of a table of films: columns of 1, 0, -1 and empty, or a column of words."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import pandas as pd

from configs import UserError
from ehr_features.own_films.config import LabelsOf, Layout, TableConfig
from ehr_features.own_films.values import row_of, text
from ehr_features.schema import FINDINGS

BOOLEANS = {"true": 1, "false": 0}


def label_columns(config: TableConfig, layout: Layout) -> list[str]:
    """The columns of a table that hold labels."""
    of = layout.labels
    given = list(config.columns) or [*of.columns, *of.other_names]
    return given if of.words_in is None else [*config.columns, of.words_in]


def labels_of(raw: pd.DataFrame, roles: Collection[str], config: TableConfig, layout: Layout) -> pd.DataFrame:
    """A column a label: 1, 0, -1 (uncertain) or NaN.

    Args:
        roles: columns that are no label. Of a layout without labels all other columns of 1, 0 and -1 are.
    Raises: UserError: no label columns are known, one is missing, or a value is none of these.
    """
    of = layout.labels
    names = list(config.columns) or list(of.columns) or (_flags(raw, roles) if of.words_in is None else [])
    if of.words_in is not None and not config.columns:
        found = _from_words(raw, of, config)
    elif names:
        if missing := [name for name in names if name not in raw]:
            raise UserError(
                f"{config.table}: columns missing: {', '.join(missing)}; found {', '.join(map(str, raw.columns))}"
            )
        found = pd.DataFrame({name: _numbers(raw[name], config, of) for name in names}, index=raw.index)
    else:
        raise UserError(
            f"{config.table}: no column has labels (1, 0, -1 for uncertain, or empty); films.columns=[...] names them; "
            f"found {', '.join(map(str, raw.columns))}"
        )
    return to_chexpert(found, of) if config.names == "chexpert" else found


def _flags(raw: pd.DataFrame, roles: Collection[str]) -> list[str]:
    """The columns that hold 1 and 0, and beside them -1 and empty cells only."""
    found = []
    for name in raw.columns.difference([*roles], sort=False):
        given = text(raw[name]).str.lower().replace({word: str(value) for word, value in BOOLEANS.items()})
        numbers = pd.to_numeric(given, errors="coerce")
        if {0, 1} <= set(numbers.unique()) and numbers.isin([0, 1, -1]).sum() == given.notna().sum():
            found.append(str(name))
    return found


def to_chexpert(labels: pd.DataFrame, of: LabelsOf) -> pd.DataFrame:
    """The labels under CheXpert's names: positive if any of the labels that belong to it is."""
    means = {name: of.as_chexpert.get(name, name if not of.as_chexpert else "") for name in map(str, labels.columns)}
    own = {finding: [name for name, meant in means.items() if meant == finding] for finding in FINDINGS}
    return pd.DataFrame({name: labels[parts].max(axis=1) for name, parts in own.items() if parts})


def _from_words(raw: pd.DataFrame, of: LabelsOf, config: TableConfig) -> pd.DataFrame:
    if of.words_in not in raw:
        raise UserError(f"{config.table}: columns missing: {of.words_in}; found {', '.join(map(str, raw.columns))}")
    codes, distinct = pd.factorize(text(raw[of.words_in]))
    said = [{word.strip(of.around + " ") for word in each.split(of.separator)} for each in distinct]
    table = np.array([[float(any(w in each for w in words)) for words in of.words.values()] for each in said])
    table = np.concatenate([table.reshape(len(said), len(of.words)), np.full((1, len(of.words)), np.nan)])
    return pd.DataFrame(table[codes], columns=list(of.words), index=raw.index)  # code -1: an empty cell


def _numbers(column: pd.Series, config: TableConfig, of: LabelsOf) -> pd.Series:
    given = text(column)
    meant = {**BOOLEANS, **{str(word).lower(): value for word, value in of.values.items()}}
    lower = given.str.lower()
    mapped = lower.where(~lower.isin(list(meant)), lower.map(meant).astype("string"))
    numbers = pd.to_numeric(mapped, errors="coerce").astype(float)
    if (odd := mapped.notna() & ~numbers.isin([0, 1, -1])).any():
        raise UserError(
            f"{config.table}: {odd.sum()} values of `{column.name}` are not 1, 0, -1 (uncertain) or empty, the first "
            f"in line {row_of(odd)}"
        )
    return numbers


def of_all_readers(labels: pd.DataFrame, films: pd.Series, readers: str) -> pd.DataFrame:
    """One row a film, in the order of first appearance: positive if any of its rows, or their majority, is."""
    grouped = labels.groupby(films.to_numpy(), sort=False)
    if readers == "any":
        return grouped.max()
    mean = grouped.mean()
    return (mean > 0.5).astype(float).where(mean.notna())
