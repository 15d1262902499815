"""Labelled films: their subjects, splits, and the policy for uncertain and empty findings.

Input: features/images.parquet. Output: `Films`, with labels as in the source: 1, 0, -1 (uncertain), empty.
The evaluation policy is fixed, so that runs are comparable: uncertain is left out; empty is negative if labels were
extracted from reports (MIMIC-CXR, CheXpert), which name what is present, and left out otherwise.
"""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Container, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from configs import UserError
from ehr_features.config import EVALUATION, TRAINING, Empty, Policy, Uncertain
from ehr_features.files import read_table
from ehr_features.labels import as_labels
from ehr_features.own_films.read import FilmsTable
from ehr_features.schema import FINDINGS, FRONTAL, SPLITS

KEYS = ["dicom_id", "study_id", "subject_id", "split", "view"]


@dataclass(frozen=True)
class Films:
    """N films.

    Attributes:
        table: dicom_id, study_id, subject_id, split, view, and the subgroup columns; index 0 .. N - 1.
        labels: (N, L) 1, 0, -1, NaN, columns named.
        left_out: reason -> number of films of the source that were left out.
        warnings: warnings for readers of the results.
        empty: the meaning of an empty label in evaluation, and by default in training: `zeros`, `ignore`.
        own: the table outside MIMIC that they were read from, whole; `table` has a column `row` of its rows.
    """

    table: pd.DataFrame
    labels: pd.DataFrame
    left_out: dict[str, int]
    warnings: tuple[str, ...] = ()
    empty: Empty = EVALUATION.empty
    own: FilmsTable | None = None

    def __len__(self) -> int:
        return len(self.table)

    @property
    def names(self) -> list[str]:
        return [str(name) for name in self.labels.columns]

    def rows(self, split: str) -> NDArray[np.intp]:
        return np.flatnonzero(self.table["split"].to_numpy() == split)

    def trained(self, rows: NDArray[np.intp], uncertain: Uncertain, empty: Empty | None) -> NDArray[np.float32]:
        """Labels (len(rows), L) for training; `empty` None: as in evaluation."""
        return training_labels(self.labels.iloc[rows], Policy(uncertain, empty or self.empty))

    def evaluated(self, rows: NDArray[np.intp]) -> NDArray[np.float32]:
        """Labels (len(rows), L) for evaluation: uncertain is left out, empty follows `empty`."""
        return training_labels(self.labels.iloc[rows], EVALUATION._replace(empty=self.empty))

    def keep(self, wanted: NDArray[np.bool_], why: str) -> Films:
        """Keep the wanted films; count the others under `why`."""
        if wanted.all():
            return self
        table, labels = (part[wanted].reset_index(drop=True) for part in (self.table, self.labels))
        return replace(self, table=table, labels=labels, left_out={**self.left_out, why: int((~wanted).sum())})

    def in_store(self, store: Container[str]) -> Films:
        """Keep the films in the store. Raises: UserError: none is."""
        found = self.keep(np.array([film in store for film in self.table["dicom_id"]], dtype=bool), "not in the store")
        if not len(found):
            raise UserError(f"none of {len(self)} films is in the store; pack the films that features/ was made from")
        return found


def read_films(features: str | Path, *, labels: Sequence[str] = (), views: str = "frontal") -> Films:
    """The labelled films of a features/ folder.

    Args:
        labels: finding columns; all if empty.
        views: `frontal` (AP and PA) or `all`.
    Raises: UserError: an unknown label, no film left, a split without films.
    """
    table = read_table(features, "images")
    known = [name for name in FINDINGS if name in table]
    if missing := [c for c in KEYS if c not in table]:
        raise UserError(f"{features}/images.parquet: columns missing: {', '.join(missing)}; build the features again")
    for name in labels:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean `{near[0]}`?" if near else f"there are {', '.join(known)}"
            raise UserError(f"{features}/images.parquet: no finding `{name}`; {hint}")
    names = list(labels) or known
    values = table[names].astype(np.float64)
    table = _with_groups(table, features)
    read = table[known].notna().any(axis=1).to_numpy()  # a film with one known finding has negatives
    films = Films(table.drop(columns=known).reset_index(drop=True), values.reset_index(drop=True), {})
    wanted = films.table["view"].isin(FRONTAL).to_numpy(dtype=bool) | (views != "frontal")
    return films.keep(wanted, "not frontal").keep(read[wanted], "no labels")


def _with_groups(table: pd.DataFrame, features: str | Path) -> pd.DataFrame:
    """Add derived subgroup columns: support_devices, and the care_unit of films in an ICU stay."""
    more = {"support_devices": table["Support Devices"] == 1} if "Support Devices" in table else {}
    if "in_icu" in table:
        more["care_unit"] = table["in_icu"].map({1: "ICU, unit unknown", 0: "not ICU"}).astype(object)
        stays = read_table(features, "stays") if (Path(features) / "stays.parquet").is_file() else pd.DataFrame()
        if "care_unit" in stays:
            unit = table["stay_id"].map(stays.set_index("stay_id")["care_unit"])
            more["care_unit"] = more["care_unit"].where(unit.isna(), unit)
    return table.assign(**more)


AGE_BANDS = {"under 40": 40.0, "40-59": 60.0, "60-79": 80.0, "80 and over": np.inf}  # name -> first age above it


def age_bands(age_years: pd.Series) -> pd.Series:
    """The band of each age, as an ordered category; missing where the age is."""
    edges = [-np.inf, *AGE_BANDS.values()]
    return pd.cut(age_years.astype(float), edges, right=False, labels=list(AGE_BANDS))


def check_splits(films: Films) -> None:
    """Each split has films and no subject is in two. Raises: UserError."""
    for split in SPLITS:
        if not len(films.rows(split)):
            raise UserError(f"no film of split {split} is left of {len(films)}; left out: {films.left_out or 'none'}")
    splits = films.table.groupby("subject_id")["split"].nunique()
    if (splits > 1).any():
        some = splits.index[splits > 1].tolist()
        raise UserError(f"{len(some)} subjects are in two splits, e.g. {some[:3]}; split by subject_id")


class Part(NamedTuple):
    """Rows to train on, to choose by and to score."""

    train: NDArray[np.intp]
    val: NDArray[np.intp]
    test: NDArray[np.intp]


def folded(films: Films, folds: int, seed: int) -> list[Part]:
    """Cross-validation over subjects: each fold is tested once, the next one validates, the others train.

    Stratified: for each class of each label, the rarest first, subjects go to the folds that have fewest of it.
    Raises: UserError: fewer subjects than folds.
    """
    subject, who = pd.factorize(films.table["subject_id"])
    if len(who) < folds:
        raise UserError(f"folds={folds}: {len(who)} subjects; wanted at least one for each fold")
    labels = films.evaluated(np.arange(len(films)))
    has = np.zeros((len(who), 2 * labels.shape[1]), bool)  # per subject: has a positive film, has a negative one
    np.logical_or.at(has, subject, np.concatenate([labels == 1, labels == 0], axis=1))
    rng = np.random.default_rng([seed, 3])
    fold, counts, sizes = np.full(len(who), -1), np.zeros((folds, has.shape[1])), np.zeros(folds)
    while (fold < 0).any():
        left = has[fold < 0].sum(0)
        column = int(np.where(left > 0, left, len(who) + 1).argmin())
        chosen = np.flatnonzero((fold < 0) & (has[:, column] | (left == 0).all()))
        for one in rng.permutation(chosen):
            fold[one] = np.lexsort([rng.random(folds), sizes, counts[:, column]])[0]
            counts[fold[one]] += has[one]
            sizes[fold[one]] += 1
    of = fold[subject]
    rows = [np.flatnonzero(of == k) for k in range(folds)]
    rest = [np.flatnonzero((of != k) & (of != (k + 1) % folds)) for k in range(folds)]
    return [Part(rest[k], rows[(k + 1) % folds], rows[k]) for k in range(folds)]


def fraction_rows(films: Films, rows: NDArray[np.intp], fraction: float, seed: int) -> NDArray[np.intp]:
    """Rows of a share of the subjects: whole subjects, and 1% is a subset of 5% with the same seed.

    Raises: UserError: less than one subject.
    """
    if fraction == 1:
        return rows
    subjects = films.table["subject_id"].to_numpy()[rows]
    drawn = {s: hashlib.sha256(f"{seed}:fraction:{s}".encode()).digest() for s in np.unique(subjects).tolist()}
    number = round(fraction * len(drawn))
    if number < 1:
        raise UserError(f"fraction {fraction} of {len(drawn)} train subjects is less than one; take a larger fraction")
    kept = sorted(drawn, key=lambda s: drawn[s])[:number]
    return rows[np.isin(subjects, kept)]


def training_labels(labels: pd.DataFrame, policy: Policy = TRAINING) -> NDArray[np.float32]:
    """(N, L) 1, 0, NaN (not counted in the loss)."""
    return as_labels(labels, policy).to_numpy(np.float32, copy=True)


def evaluation_labels(labels: pd.DataFrame) -> NDArray[np.float32]:
    """(N, L) 1, 0, NaN: uncertain is left out, empty is negative; the same for every run."""
    return training_labels(labels, EVALUATION)
