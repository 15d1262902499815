"""The record of films outside MIMIC: columns of their table as EHR groups, each encoded by its type.

Input: a table of films, names of groups. Output: per group (N, S) float32 and S names; fitted on the train films.

sex, age, age5, age10 and view are the groups of ehr_features/static.py. Any other name is a column of the table:
numbers are scaled by mean and deviation, with a mask for what is missing; words, 0 / 1 and true / false are one-hot
over the words of the train films, with a column `other` for a word that they lack and `missing` for an empty cell.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Sequence

import numpy as np
import pandas as pd

from configs import UserError
from ehr_features import static
from ehr_features.own_films.read import FilmsTable
from ehr_features.own_films.values import row_of, text, words

PERSON = ("sex", "age", "age5", "age10", "view")  # groups of ehr_features/static.py that a table can give
MOST_WORDS = 100  # of a category; more are ids or free text
FLAGS = {"0", "1", "true", "false"}

Encoded = tuple[np.ndarray, list[str]]


def check_groups(table: FilmsTable, groups: Sequence[str], name: str) -> None:
    """Refuse a group that is no column, or none of a record. Raises: UserError."""
    for group in groups:
        if group in PERSON:
            if lacking := [c for c in static.READS[group] if c not in table.films]:
                role = {"sex": "sex", "view": "view"}.get(group, "age")
                raise UserError(
                    f"{name}: group `{group}` needs a column of the {role} ({', '.join(lacking)}); name it with "
                    f"films.{role}=COLUMN; found {', '.join(map(str, table.columns))}"
                )
        elif group in table.held_back:
            raise UserError(
                f"{name}: `{group}` is a path, an id, the split or a label of these films, and no group of a record; "
                "leave it out"
            )
        elif group not in table.columns:
            people = [g for g in PERSON if all(c in table.films for c in static.READS[g])]
            known = dict.fromkeys([*people, *(str(c) for c in table.columns if c not in table.held_back)])
            near = difflib.get_close_matches(group, known, n=1)
            hint = f"did you mean `{near[0]}`?" if near else f"there are {', '.join(known)}"
            raise UserError(f"{name}: no column `{group}` for an EHR group; {hint}")


def encode_group(table: FilmsTable, group: str, train: np.ndarray, categories: Collection[str], name: str) -> Encoded:
    """One group of all films, fitted on the rows of `train` (N,) bool.

    Raises: UserError: nothing is known of the train films, a column of ids or free text, numbers among words.
    """
    if group in PERSON:
        split = np.where(train, "train", "test")
        return static.encode(table.films.assign(split=split), [group])[:2]
    given = text(table.columns[group])
    if not given[train].notna().any():
        raise UserError(f"{name}: column `{group}` is empty for all {int(train.sum())} train films; leave it out")
    numbers = pd.to_numeric(given, errors="coerce").astype(float)
    no_number = given.notna() & numbers.isna()
    flags = set(given.dropna().str.lower().unique()) <= FLAGS
    if group in categories or flags or no_number.all() or no_number.sum() > 0.5 * given.notna().sum():
        return _one_hot(given.str.lower() if flags else given, group, train, name)
    if no_number.any():
        raise UserError(
            f"{name}: {no_number.sum()} of {given.notna().sum()} values of `{group}` are no number, the first in line "
            f"{row_of(no_number)}; mend them, or set 'films.categories=[{group}]' if its numbers are codes"
        )
    columns = static.Scale({}, train)(group, numbers.to_numpy())
    return np.column_stack(list(columns.values())).astype(np.float32), list(columns)


def _one_hot(given: pd.Series, group: str, train: np.ndarray, name: str) -> Encoded:
    vocabulary = sorted(given[train].dropna().unique().tolist())
    if len(vocabulary) > MOST_WORDS:
        raise UserError(
            f"{name}: column `{group}` has {len(vocabulary)} different words in {int(train.sum())} train films, more "
            f"than {MOST_WORDS}: ids or free text are no EHR group; leave it out"
        )
    place = given.map({word: i for i, word in enumerate(vocabulary)}).fillna(len(vocabulary)).astype(int).to_numpy()
    place = np.where(given.isna(), len(vocabulary) + 1, place)
    hot = np.eye(len(vocabulary) + 2, dtype=np.float32)[place]
    return hot, [f"{group}_{word}" for word in (*vocabulary, "other", "missing")]


def refuse_constant(table: FilmsTable, group: str, encoded: Encoded, kept: np.ndarray, name: str) -> None:
    """Refuse a group that is the same for all films that are trained on. Raises: UserError, with the values seen."""
    values = encoded[0][kept]
    if len(values) and (values == values[0]).all():
        column = {"sex": "sex", "view": "view"}.get(group, "age_years") if group in PERSON else group
        of = table.films if group in PERSON else table.columns
        seen = words(text(of[column][kept]))
        is_so = f"is {seen}" if seen else "is empty"
        raise UserError(
            f"{name}: EHR group `{group}` {is_so} for all {len(values)} films that are trained on, so it tells "
            "nothing; leave it out of the groups"
        )
