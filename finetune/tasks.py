"""What is particular to a task: which rows it has, groups of its labels, scores beyond AUROC.

Comes in: the tables of features/. Goes out: rows with `samples.KEYS` and labels.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from configs import UserError
from ehr_features.files import read_table
from finetune.metrics import COLUMNS

if TYPE_CHECKING:
    from finetune.samples import Samples

KEYS = ("sample_id", "stay_id", "subject_id", "split", "predict_at_hours", "dicom_id")
FILM_TASKS = (
    "findings",
    "radiology",
)  # findings: films alone; radiology: those of ICU stays, with the record before them

RETROSPECTIVE = ("phenotypes",)  # read to the stay's end: an account of it, no forecast; `phenotypes_early` is one
# Source of the groups: MIMIC-III benchmark (arXiv:1703.07771), table 4: 13 acute, 5 mixed, 7 chronic.
MIXED, CHRONIC = (50, 105, 106, 108, 151), (49, 53, 98, 99, 101, 127, 158)


def macros(names: list[str]) -> dict[str, list[str]]:
    """Groups of labels whose means are reported too: acute, mixed and chronic phenotypes."""
    numbers = {name: int(name.removeprefix("phenotype_")) for name in names if name.startswith("phenotype_")}
    groups = {
        "macro acute": [n for n, i in numbers.items() if i not in MIXED + CHRONIC],
        "macro mixed": [n for n, i in numbers.items() if i in MIXED],
        "macro chronic": [n for n, i in numbers.items() if i in CHRONIC],
    }
    return {name: members for name, members in groups.items() if members}


def read_samples(folder: str | Path, task: str) -> pd.DataFrame:
    """samples/TASK.parquet, sorted by sample_id; `radiology` makes its rows from samples/findings and stay_films.

    Raises: UserError: no such task, no rows, a column that is missing.
    """
    name = "findings" if task in FILM_TASKS else task
    table = read_table(folder, f"samples/{name}").sort_values("sample_id", ignore_index=True)
    if missing := [c for c in KEYS if c not in table]:
        found = ", ".join(map(str, table))
        raise UserError(f"{folder}/samples/{name}.parquet: no column {', '.join(missing)}; found {found}")
    if task == "radiology":
        taken = read_table(folder, "stay_films", ["stay_id", "dicom_id", "hours_from_intime"]).drop_duplicates()
        table = table.merge(taken, on=["stay_id", "dicom_id"], validate="m:1")
        table["predict_at_hours"] = table.pop("hours_from_intime")
        table = table[table["predict_at_hours"] >= 0].reset_index(drop=True)
    if table.empty:
        raise UserError(
            f"{folder}/samples/{name}.parquet: no samples of {task}; attrition.json says what fell out, why"
        )
    return table


def one_hot(table: pd.DataFrame) -> pd.DataFrame:
    """The ten bins of the length of stay as ten labels of which one is 1."""
    bins = table.pop("los_bin").to_numpy(np.int64)
    hot = pd.DataFrame(np.eye(10, dtype=np.float32)[bins], columns=[f"los_bin_{i}" for i in range(10)])
    return pd.concat([table.drop(columns="los_remaining_hours").reset_index(drop=True), hot], axis=1)


def length_of_stay(
    samples: Samples,
    train: NDArray[np.int64],
    at: NDArray[np.int64],
    chances: NDArray[np.float64],
    subjects: NDArray[np.int64],
    resamples: int,
    seed: int,
) -> pd.DataFrame:
    """Cohen's kappa (linear weights) of the likeliest bin, and the error in hours of the expected train median.

    Args:
        train, at: row numbers of the train samples, and of those predicted. chances: (trainings, N, 10), rows sum to 1.
    Returns: rows like `metrics.evaluate`'s, label `los_hours`, metrics `kappa` and `mae_hours`; subjects are resampled.
    """
    assert samples.hours_left is not None
    bins, hours = samples.labels.argmax(1), samples.hours_left
    medians = np.array(
        [np.median(hours[train][bins[train] == b]) if (bins[train] == b).any() else 0 for b in range(10)]
    )
    group = pd.factorize(subjects)[0]
    num = group.max() + 1
    tables = np.zeros((num, len(chances), 10, 10))  # counts of (true, predicted) by subject and training
    misses, sizes = np.zeros((num, len(chances))), np.bincount(group, minlength=num)
    for t, chance in enumerate(chances):
        np.add.at(tables[:, t], (group, bins[at], chance.argmax(1)), 1)
        np.add.at(misses[:, t], group, np.abs(chance @ medians - hours[at]))
    draws = np.random.default_rng(seed).multinomial(num, np.full(num, 1 / num), size=resamples)
    rows = []
    for name, of in (
        ("kappa", lambda w: _kappa(np.tensordot(w, tables, 1))),
        ("mae_hours", lambda w: (w @ misses) / (w @ sizes)),
    ):
        value = float(np.mean(of(np.ones(num))))
        drawn = np.array([np.mean(of(w.astype(float))) for w in draws])
        low, high = np.quantile(drawn, [0.025, 0.975]) if len(drawn) else (np.nan, np.nan)
        rows.append(["los_hours", name, value, low, high, len(at), 0, None])
    return pd.DataFrame(rows, columns=COLUMNS)


def _kappa(counts: NDArray[np.float64]) -> NDArray[np.float64]:
    """Linear-weighted kappa of tables of counts (T, 10, 10) -> (T,)."""
    cost = np.abs(np.subtract.outer(np.arange(10), np.arange(10)))
    expected = counts.sum(2)[:, :, None] * counts.sum(1)[:, None] / counts.sum((1, 2))[:, None, None]
    return 1 - (cost * counts).sum((1, 2)) / np.maximum((cost * expected).sum((1, 2)), 1e-12)
