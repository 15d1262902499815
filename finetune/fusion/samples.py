"""Load features/ as batches: the hourly series, the films before the prediction, the labels.

Input: samples/TASK.parquet, series.safetensors, stay_films.parquet, and the ids of the readable films.
Output: `Samples`, the rows of a task in memory and its series mapped from their file, which gathers a batch with one
index operation; and the order of batches, by length, to reduce padding.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pyarrow as pa
import torch
from numpy.typing import NDArray

from configs import UserError
from configs.signals import held
from ehr_features import series
from ehr_features.files import read_table
from ehr_features.schema import FRONTAL, SAMPLES, Column
from ehr_features.typed import read_json
from ehr_features.typed.read import check_values
from ehr_features.typed.shapes import Series
from finetune.metrics import COLUMNS
from finetune.resample import DIFFERENCE, spread
from pretrain.data import begin_worker, own_errors

if TYPE_CHECKING:
    from pretrain.store import Store
    from pretrain.text.encoder import Tokens

VIEWS = ("AP", "PA", "LATERAL", "LL")  # one column each; all zero for other or unknown views
CONTEXT = len(VIEWS) + 1  # columns of `Samples.context`


@dataclass(frozen=True)
class Samples:
    """The samples of a task; the rows of `table` and of every array of length N correspond."""

    table: pd.DataFrame  # N rows: KEYS; its words as categories: hourly tasks have millions of rows
    labels: NDArray[np.float32]  # (N, L), NaN where unknown
    names: list[str]  # (L,)
    values: NDArray[np.float32] | series.Mapped  # (all stays' hours, F), normalised; mapped: one copy a machine
    start: NDArray[np.int64]  # (N,) first row of the sample's stay in `values`
    length: NDArray[np.int32]  # (N,) visible hours, 0 if none is complete
    film_ids: list[str]  # M films
    films: NDArray[np.int32]  # (N, K) rows of `film_ids`, oldest first, padded with -1 on the right
    hours: NDArray[np.float32]  # (N, K) between film and prediction
    views: NDArray[np.float32]  # (M, len(VIEWS)) one-hot
    features: NDArray[np.float32] | None = None  # (M, D) of a frozen encoder
    store: Store | None = None  # the films, for an encoder that is tuned
    hours_left: NDArray[np.float64] | None = None  # (N,) of length_of_stay, whose labels exclude each other
    step_hours: float = 1.0  # of the series
    note: NDArray[np.int64] | None = None  # (N,) row of `text` or `note_tokens`, -1 where there is no note
    text: NDArray[np.float32] | None = None  # (U, E) of a frozen text encoder, a row a note
    note_tokens: Tokens | None = None  # U notes, and M films, on disk: for the models over tokens
    film_tokens: Tokens | None = None

    def __len__(self) -> int:
        return len(self.table)

    @property
    def has_image(self) -> NDArray[np.bool_]:
        return self.films[:, 0] >= 0

    def film_subjects(self) -> NDArray[np.int64]:
        """(M,) the subject of each of `film_ids`."""
        subjects = np.zeros(len(self.film_ids), np.int64)
        rows, places = np.nonzero(self.films >= 0)
        subjects[self.films[rows, places]] = self.table["subject_id"].to_numpy(np.int64)[rows]
        return subjects

    @property
    def num_inputs(self) -> int:
        return self.values.shape[1]

    def rows(self, split: str, pairing: str = "partial") -> NDArray[np.int64]:
        """Row numbers of a split: all (`partial`) or those with a film (`paired`), each once."""
        keep = (self.table["split"] == split).to_numpy()
        return np.flatnonzero(keep & self.has_image if pairing == "paired" else keep)

    def batch(self, rows: NDArray[np.int64], images: bool = False) -> dict[str, torch.Tensor]:
        """Gather rows.

        Returns: series (B, T, F), lengths (B,), has_image and hours (B, K), context (B, K, CONTEXT), labels (B, L),
            rows (B,); and film (B, K, D) features, or with `images` the films present, row by row, uint8 (P, S, S).
        """
        lengths = np.maximum(self.length[rows].astype(np.int64), 1)  # without a complete hour: one hour of zeros
        steps = np.arange(lengths.max())
        inside = steps < self.length[rows][:, None]  # (B, T)
        values = np.zeros((*inside.shape, self.num_inputs), np.float32)
        values[inside] = self.values[(self.start[rows][:, None] + steps)[inside]]
        films, hours = self.films[rows], self.hours[rows]
        present = films >= 0
        context = np.concatenate([self.views[films], np.log1p(np.maximum(hours, 0))[..., None] / 4], axis=2)
        batch = {
            "series": values,
            "lengths": lengths,
            "has_image": present,
            "hours": hours,
            "context": np.where(present[..., None], context, 0).astype(np.float32),
            "labels": self.labels[rows],
            "rows": rows,
        }
        if images:
            assert self.store is not None, "films are read from a store"
            batch["images"] = self.store.read([self.film_ids[i] for i in films[present]])
        elif self.features is not None and len(self.features):
            batch["film"] = np.where(present[..., None], self.features[films], np.float32(0))
        batch |= self._notes(rows)
        return {key: torch.from_numpy(np.ascontiguousarray(value)) for key, value in batch.items()}

    def _notes(self, rows: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
        """text (B, E), has_text, has_record (B,); for models over tokens film_tokens, note_tokens, note_lengths."""
        note = np.full(len(rows), -1) if self.note is None else self.note[rows]
        if self.text is not None:
            has = note >= 0
            text = np.where(has[:, None], self.text[note], np.float32(0))
            return {"text": text, "has_text": has, "has_record": self.length[rows] > 0}
        if self.note_tokens is None and self.film_tokens is None:
            return {}
        nothing = np.zeros((len(rows), 1, 1), np.float32), np.zeros(len(rows), np.int64)
        words, lengths = nothing if self.note_tokens is None else self.note_tokens.read(note)
        film, _ = nothing
        if self.film_tokens is not None:
            film, _ = self.film_tokens.read(self.films[rows, 0], least=int(self.film_tokens.length[0]))
        return {"film_tokens": film, "note_tokens": words, "note_lengths": lengths}


def load(
    folder: str | Path,
    task: str,
    *,
    readable: Container[str] | None = None,
    films: int = 1,
    max_hours: int | None = None,
) -> Samples:
    """Read all samples of a task.

    Args:
        folder: a features/ folder.
        task: a table of its samples/.
        readable: the store, or any container of dicom_id; other films count as absent; None: all are readable.
        films: K, the number of last films before the prediction; the last of them is the sample's own film.
        max_hours: largest number of hours before the prediction to read; None: all.
    Raises: UserError: no such task, a stay without a series.
    """
    table = read_samples(folder, task)
    hours_left = table["los_remaining_hours"].to_numpy(float) if "los_bin" in table else None
    table = one_hot(table) if hours_left is not None else table
    names = [str(c) for c in table if c not in KEYS and pd.api.types.is_numeric_dtype(table[c])]
    step = 1.0 if task == "findings" else float(read_json(Path(folder) / "series.json", Series)["step_hours"])
    values, start, length = _record(folder, table, task, step)
    if max_hours is not None:
        cut = np.maximum(length - round(max_hours / step), 0)
        start, length = start + cut, length - cut
    linked, film_hours, film_ids, views = _place(_film_rows(folder, table, task, readable, films), len(table), films)
    labels = table[names].to_numpy(np.float32, na_value=np.nan)
    kept = [*KEYS, *[c for c in ("code_status",) if c in table]]
    table = table[kept].astype({name: "category" for name in kept if name in CATEGORIES})
    pa.default_memory_pool().release_unused()  # of reading: a third of what hourly tasks would hold
    return Samples(
        table=table,
        labels=labels,
        names=names,
        values=values,
        start=start,
        length=length,
        film_ids=film_ids,
        films=linked,
        hours=film_hours,
        views=views,
        hours_left=hours_left,
        step_hours=step,
    )


def _record(
    folder: str | Path, table: pd.DataFrame, task: str, step: float
) -> tuple[NDArray[np.float32] | series.Mapped, NDArray[np.int64], NDArray[np.int32]]:
    """The hours of all stays (hours, F), and each sample's first row and number of hours in them."""
    if task == "findings":  # no record
        return np.zeros((1, 1), np.float32), np.zeros(len(table), np.int64), np.zeros(len(table), np.int32)
    hours = series.Mapped(folder)
    at = hours.place(table["stay_id"].to_numpy(np.int64))
    if (at < 0).any():
        absent = np.unique(table["stay_id"].to_numpy()[at < 0])
        raise UserError(f"{hours.path}: {absent.size} stays have no series there, e.g. {absent[:3].tolist()}")
    los = read_table(folder, "stays", ["stay_id", "los_hours"]).set_index("stay_id")["los_hours"]
    los_hours = table["stay_id"].map(los).to_numpy(float)
    size = np.diff(hours.offsets)[at]
    length = complete_steps(table["predict_at_hours"].to_numpy(float), los_hours, step, size)
    return hours, hours.offsets[at], length.astype(np.int32)


def complete_steps(
    predict_at_hours: NDArray[np.float64], los_hours: NDArray[np.float64], step: float, size: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Steps of a series that end at or before the prediction; all `size` of them if it is made at the stay's end."""
    steps = np.floor(predict_at_hours / step + 1e-6).astype(np.int64)
    return np.where(predict_at_hours >= los_hours - 1e-6, size, np.clip(steps, 0, size))


def batches(
    lengths: NDArray[np.int32], batch_size: int, rng: np.random.Generator | None = None
) -> list[NDArray[np.int64]]:
    """Group rows of similar length.

    Args:
        lengths: (N,).
        rng: shuffles rows of similar length, and the batches; None: in order of length.
    Returns: arrays of row numbers, each row once; at most one batch is short.
    """
    jitter = 1.0 if rng is None else rng.uniform(0.95, 1.05, len(lengths))
    order = np.argsort(lengths * jitter, kind="stable")
    cut = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    return cut if rng is None else [cut[i] for i in rng.permutation(len(cut))]


def padding(lengths: NDArray[np.int32], parts: Sequence[NDArray[np.int64]]) -> float:
    """The share of padded steps over all batches."""
    steps = sum(len(rows) * int(lengths[rows].max()) for rows in parts)
    return 1 - int(lengths.sum()) / steps if steps else 0.0


def another_film(samples: Samples, seed: int = 0) -> Samples:
    """Give each sample with a film the film of another subject, of the same view and split: a control.

    Age and view stay those of the sample's own film, so only the pixels change.
    """
    rng = np.random.default_rng(seed)
    films = samples.films.copy()
    view = samples.views[films[:, 0]].argmax(1) + samples.views[films[:, 0]].any(1)
    last = (films >= 0).sum(1) - 1
    groups = samples.table.assign(view=view, row=np.arange(len(samples)))[samples.has_image].groupby(["split", "view"])
    for _, group in groups:
        rows = group["row"].to_numpy()
        own = samples.films[rows, last[rows]]
        drawn = _of_others(group["subject_id"].to_numpy(), rng)
        given = np.where(drawn < 0, -1, own[drawn])
        films[rows] = np.where(films[rows] >= 0, given[:, None], films[rows])
    return replace(samples, films=films)


def _of_others(subject: NDArray[np.int64], rng: np.random.Generator) -> NDArray[np.int64]:
    """For each row (n,) the number of a row of another subject, drawn evenly; -1 where there is none."""
    codes, each = np.unique(subject, return_inverse=True)
    num, size = len(subject), np.bincount(each)
    if len(codes) < 2:
        return np.full(num, -1)
    drawn = rng.integers(0, num - size[each])  # among the rows of the others, which keep their order
    order, begin = np.argsort(each, kind="stable"), np.cumsum(size) - size
    before = order - (np.arange(num) - begin[each[order]])  # rows of others before each own row
    passed = np.searchsorted(each[order] * (num + 1) + before, each * (num + 1) + drawn, side="right")
    return drawn + passed - begin[each]


def _film_rows(
    folder: str | Path, table: pd.DataFrame, task: str, readable: Container[str] | None, count: int
) -> pd.DataFrame:
    """The last `count` readable films up to each sample's own, in order: row, dicom_id, hours (ago), view.

    Raises: UserError: a film that stay_films.parquet lacks, or from after the prediction.
    """
    own = table.loc[table["dicom_id"].notna(), ["stay_id", "dicom_id", "predict_at_hours"]]
    own = own if readable is None else own[[film in readable for film in own["dicom_id"]]]
    own = own.reset_index(names="row")
    if task == "findings":
        views = read_table(folder, "images", ["dicom_id", "view"])
        return own.merge(views, on="dicom_id", validate="m:1").assign(hours=0.0)[["row", "dicom_id", "hours", "view"]]
    if own.empty:  # of tables without films there is no stay_films.parquet
        return own.assign(hours=0.0, view="")[["row", "dicom_id", "hours", "view"]]
    taken = read_table(folder, "stay_films", ["stay_id", "dicom_id", "hours_from_intime", "view"])
    taken = taken.sort_values("hours_from_intime", kind="stable")
    taken = taken if readable is None else taken[[film in readable for film in taken["dicom_id"]]]
    pairs = own.merge(taken, on=["stay_id", "dicom_id"], how="left", validate="m:1")
    lost, late = pairs["hours_from_intime"].isna(), pairs["hours_from_intime"] > pairs["predict_at_hours"] + 1e-6
    for bad, why in ((lost, "are of no stay"), (late, "were taken after the prediction")):
        if bad.any():
            path = f"{folder}/samples/{task}.parquet"
            raise UserError(f"{path}: {bad.sum()} films {why}, by stay_films.parquet; {AGAIN}")
    if count > 1:
        earlier = pairs.merge(taken, on="stay_id", suffixes=("_own", ""))
        keep = (earlier["hours_from_intime"] < earlier["hours_from_intime_own"]) & (earlier["hours_from_intime"] >= 0)
        keep &= earlier["view"].isin(FRONTAL) | ~earlier["view_own"].isin(FRONTAL)  # frontal only with frontal
        columns = ["row", "dicom_id", "predict_at_hours", "hours_from_intime", "view"]
        pairs = pd.concat([earlier.loc[keep, columns], pairs[columns]])
        pairs = pairs.sort_values(["row", "hours_from_intime"], kind="stable").groupby("row").tail(count)
    return pairs.assign(hours=pairs["predict_at_hours"] - pairs["hours_from_intime"])


def _place(
    pairs: pd.DataFrame, num: int, count: int
) -> tuple[NDArray[np.int32], NDArray[np.float32], list[str], NDArray[np.float32]]:
    """Films as arrays: rows of the ids (num, count), hours (num, count), ids (M,), views (M, 4)."""
    rows, hours = np.full((num, count), -1, np.int32), np.zeros((num, count), np.float32)
    ids = pd.Index(pairs["dicom_id"].unique())
    place = pairs.groupby("row").cumcount()
    rows[pairs["row"], place] = ids.get_indexer(pairs["dicom_id"])
    hours[pairs["row"], place] = pairs["hours"]
    view = pairs.drop_duplicates("dicom_id").set_index("dicom_id")["view"].reindex(ids)
    one_hot = (view.to_numpy(object)[:, None] == np.array(VIEWS, object)).astype(np.float32)
    return rows, hours, [str(i) for i in ids], one_hot if len(ids) else np.zeros((1, len(VIEWS)), np.float32)


class Gather(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Batches as a dataset, so that a DataLoader's workers can read films ahead."""

    def __init__(self, samples: Samples, parts: Sequence[NDArray[np.int64]], images: bool) -> None:
        self.samples, self.parts, self.images = samples, parts, images

    def __len__(self) -> int:
        return len(self.parts)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return self.samples.batch(self.parts[i], self.images)


def stream(
    samples: Samples, parts: Sequence[NDArray[np.int64]], workers: int = 0, images: bool = False
) -> Iterator[dict[str, Any]]:
    """The batches one after another; `workers` processes read ahead."""
    if not workers:
        return (samples.batch(rows, images) for rows in parts)
    data = Gather(samples, parts, images)
    with held():  # while the workers start
        loader = torch.utils.data.DataLoader(data, batch_size=None, num_workers=workers, worker_init_fn=begin_worker)
        return own_errors(iter(loader))


# ---- Specific to tasks: their rows, groups of their labels, metrics other than AUROC.

KEYS = ("sample_id", "stay_id", "subject_id", "split", "predict_at_hours", "dicom_id")
CATEGORIES = ("split", "dicom_id", "code_status")
FILM_TASKS = (
    "findings",
    "radiology",
)  # findings: films alone; radiology: those of ICU stays, with the record before them

LABEL, FINDING = (Column("float64", among=among) for among in ((0, 1), (0, 1, -1)))
LABELS = {
    "los_remaining_hours": Column("float64", null=False, low=0),
    "los_bin": Column("int64", null=False, low=0, high=9),
}
AGAIN = "build the features again"
RETROSPECTIVE = ("phenotypes",)  # read to the stay's end, so not a forecast; `phenotypes_early` is one
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
    path = f"{folder}/samples/{name}.parquet"
    table = read_table(folder, f"samples/{name}").sort_values("sample_id", ignore_index=True)
    if missing := [c for c in KEYS if c not in table]:
        raise UserError(f"{path}: columns missing: {', '.join(missing)}; found {', '.join(map(str, table))}")
    numbers = [str(c) for c in table if c not in SAMPLES and pd.api.types.is_numeric_dtype(table[c])]
    check_values(table, {c: LABELS.get(c, FINDING if task in FILM_TASKS else LABEL) for c in numbers}, path, AGAIN)
    if task not in FILM_TASKS:
        _check_stays(folder, table, path)
    if task == "radiology":
        taken = read_table(folder, "stay_films", ["stay_id", "dicom_id", "hours_from_intime"])
        table = table.merge(taken, on=["stay_id", "dicom_id"], validate="m:1")
        table["predict_at_hours"] = table.pop("hours_from_intime")
        table = table[table["predict_at_hours"] >= 0].reset_index(drop=True)
    if table.empty:
        raise UserError(
            f"{folder}/samples/{name}.parquet: no samples of {task}; attrition.json says what fell out, why"
        )
    return table


def _check_stays(folder: str | Path, table: pd.DataFrame, path: str) -> None:
    """Refuse samples of stays that the features do not have, or of another subject or split than their stay."""
    check_values(table, {c: Column("float64", null=False) for c in ("stay_id", "predict_at_hours")}, path, AGAIN)
    stays = read_table(folder, "stays", ["stay_id", "subject_id", "split"])
    at = pd.Index(stays["stay_id"]).get_indexer(pd.Index(table["stay_id"]))
    for column, wanted in (
        ("subject_id", "a stay of stays.parquet and its subject"),
        ("split", "the split of its stay in stays.parquet"),
    ):
        codes, _ = pd.factorize(pd.concat([stays[column], table[column]], ignore_index=True))
        own, found = codes[: len(stays)][at], codes[len(stays) :]
        if (odd := np.flatnonzero((at < 0) | (own != found))).size:
            raise UserError(
                f"{path}: column `{column}`, {len(odd)} rows, the first row {odd[0] + 1}: wanted {wanted}; {AGAIN}"
            )


def one_hot(table: pd.DataFrame) -> pd.DataFrame:
    """The ten bins of the length of stay as ten one-hot labels."""
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
        train, at: row numbers of the train samples, and of the predicted ones. chances: (trainings, N, 10), rows sum to
        1.
    Returns: rows like those of `metrics.evaluate`, label `los_hours`, metrics `kappa` and `mae_hours`; subjects are
        resampled.
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
    draws = np.random.default_rng(seed).multinomial(num, np.full(num, 1 / num), size=resamples).astype(float)
    rows = []
    for name, within, of in (
        ("kappa", DIFFERENCE, lambda w: _kappa(np.tensordot(w, tables, 1))),
        ("mae_hours", (0.0, np.inf), lambda w: (w @ misses) / (w @ sizes)),
    ):
        values = of(np.ones(num))  # (trainings,)
        drawn = np.array([of(w) for w in draws]).reshape(len(draws), len(values)).T
        low, high = spread([(values, drawn)], num - 1.0).around(float(values.mean()), within=within)
        rows.append(["los_hours", name, float(values.mean()), low, high, len(at), 0, None])
    return pd.DataFrame(rows, columns=COLUMNS)


def _kappa(counts: NDArray[np.float64]) -> NDArray[np.float64]:
    """Linear-weighted kappa of tables of counts (T, 10, 10) -> (T,)."""
    cost = np.abs(np.subtract.outer(np.arange(10), np.arange(10)))
    expected = counts.sum(2)[:, :, None] * counts.sum(1)[:, None] / counts.sum((1, 2))[:, None, None]
    return 1 - (cost * counts).sum((1, 2)) / np.maximum((cost * expected).sum((1, 2)), 1e-12)
