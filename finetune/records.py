"""`Records`: a torch Dataset of films with their records, over features/, store/ and notes, for your own models.

Input: a features/ folder and, optionally, a store/ and a folder of notes. Output: an item for each film (or for each
prediction of a task): pixels, note, static vector, hourly series up to the film, labels. Films, series and notes are
memory-mapped; nothing is pickled, and an item depends on its row alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, get_args

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray

from configs import UserError
from ehr_features import series, static
from ehr_features import splits as by_subject
from ehr_features.config import TRAINING, Empty, Policy, Uncertain
from ehr_features.files import file_digest, new_file, read_table
from ehr_features.schema import SPLITS
from ehr_features.series import bins
from ehr_features.typed import read_json
from ehr_features.typed.shapes import Series
from finetune.fusion.samples import KEYS, complete_steps, one_hot, read_samples
from finetune.guard import refuse_discharge
from finetune.labelled import evaluation_labels, read_films, training_labels
from pretrain.store import Store
from pretrain.text.notes import check_notes

if TYPE_CHECKING:
    from collections.abc import Container

CHOICES = {"views": ("frontal", "all"), "uncertain": get_args(Uncertain), "empty": get_args(Empty)}
FRACTIONS = (0.7, 0.15, 0.15)
Item = dict[str, Any]


class Records(torch.utils.data.Dataset[Item]):
    """A film, its note, its static vector, its series when in an ICU stay, and its labels.

    `records[i]` is a dict; S pixels a side, E static columns, T hours (T differs from item to item), F columns of the
    series with the observed marks behind the values, L labels, W token ids:

        dicom_id, subject_id   str (empty where a prediction has no film), int
        film, has_film         (S, S) uint8, zeros where there is none; bool               with `store`
        note, has_note         str, empty where there is none; bool                        with `notes`
        note_ids               (W,) int64, in the place of `note`                          with `notes` and `tokenizer`
        static                 (E,) float32, what is missing has a column of its own
        series, has_series     (T, F) float32, normalised, T = 0 where there is none; bool
        labels                 (L,) float32: 1, 0, NaN (unknown)

    A series holds the complete hours before the film (for a task's samples: before the prediction), a note what was
    recorded before the film was taken.

    Args:
        features: a features/ folder.
        store: a store/ folder; films that it lacks are left out (of a task's samples: have no film). None: no pixels.
        notes: a folder that `ehr-msn notes` wrote. None: no notes.
        split: train, val, test; None: all.
        splits: `features`: the folder's own; `70/15/15`: by sha256(seed, subject_id) (official test subjects are then
            not kept apart, and an encoder pretrained on the folder's train split has seen some of the test subjects).
        labels: `findings`, a row for each labelled film; or a task of samples/ (mortality, phenotypes, radiology, ...),
            a row for each prediction.
        groups: EHR groups of the static vector (ehr_features.static); fitted on the train rows.
        views: of `findings`: frontal or all.
        uncertain, empty: what -1 and empty findings become: ignore (NaN), zeros, ones; ignore, zeros. Val and test
            rows always have `ignore` and `zeros`, as everywhere in finetune/.
        tokenizer: text -> token ids: a Hugging Face tokenizer, or any callable that gives a list.
        max_tokens: longer notes are cut.
        max_hours: keep only the last hours of the series.
        cache: a folder for the mapped copy of the notes; `cache/` beside the notes' folder if None.
    Attributes:
        table: a row an item: dicom_id, subject_id, split, stay_id, and sample_id of a task.
        names, columns, series_columns: of labels (L), static (E), series (F). left_out: reason -> number of films.
    Raises: UserError: a folder, task, label, group or split that is not there; a group known only at discharge.
    """

    def __init__(
        self,
        features: str | Path,
        store: str | Path | Store | None = None,
        notes: str | Path | None = None,
        *,
        split: str | None = None,
        splits: Literal["features", "70/15/15"] = "features",
        seed: int = 0,
        labels: str = "findings",
        groups: Sequence[str] = ("sex", "age"),
        views: Literal["frontal", "all"] = "frontal",
        uncertain: Uncertain = TRAINING.uncertain,
        empty: Empty = TRAINING.empty,
        tokenizer: Callable[..., Any] | None = None,
        max_tokens: int = 512,
        max_hours: int | None = None,
        cache: str | Path | None = None,
        missing: None = None,
    ) -> None:
        if missing is not None:
            raise UserError(f"missing={missing}: this argument is now called `empty`")
        if split not in (None, *SPLITS) or splits not in ("features", "70/15/15"):
            raise UserError(f"split={split}, splits={splits}: wanted {', '.join(SPLITS)} or None; features or 70/15/15")
        for name, value in {"views": views, "uncertain": uncertain, "empty": empty}.items():
            if value not in CHOICES[name]:
                raise UserError(f"{name}={value}: wanted {' or '.join(CHOICES[name])}")
        folder = Path(features)
        self.store = Store(store) if isinstance(store, (str, Path)) else store
        self.tokenizer, self.max_tokens = tokenizer, max_tokens
        table, values, self.names, self.left_out = _rows(folder, labels, views, self.store)
        subjects = None if splits == "features" else (lambda s: by_subject.by_hash(s, seed, FRACTIONS))
        images = _images(folder, groups, subjects)
        table["split"] = table["split"] if subjects is None else table["subject_id"].map(subjects)
        keep = np.ones(len(table), bool) if split is None else (table["split"] == split).to_numpy()
        if not keep.any():
            raise UserError(f"{folder}: none of {len(table)} rows is of split {split}")
        self.table, values = table[keep].reset_index(drop=True), values[keep].reset_index(drop=True)
        self.films: list[str | None] = self.table["dicom_id"].tolist()
        self.subjects = self.table["subject_id"].to_numpy(np.int64)
        self.labels = _labels(self.table, values, labels, Policy(uncertain, empty))
        self.static, self.columns = _static(folder, images, self.table, groups)
        taken = images.set_index("dicom_id")["taken_at"]
        self.series = MappedSeries.open(folder, self.table, max_hours, subjects)
        self.series_columns = [] if self.series is None else self.series.columns
        self.notes = None if notes is None else MappedNotes(notes, self.table["dicom_id"], taken, cache)

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, i: int) -> Item:
        film = self.films[i]
        item: Item = {
            "dicom_id": film or "",
            "subject_id": int(self.subjects[i]),
            "static": torch.from_numpy(self.static[i]),
            "labels": torch.from_numpy(self.labels[i]),
        }
        if self.store is not None:
            item["has_film"] = film is not None and film in self.store
            size = self.store.size
            pixels = self.store.read([film or ""])[0] if item["has_film"] else np.zeros((size, size), np.uint8)
            item["film"] = torch.from_numpy(pixels)
        if self.series is not None:
            item["series"] = torch.from_numpy(self.series[i])
            item["has_series"] = len(item["series"]) > 0
        if self.notes is not None:
            note = self.notes[i]
            item["has_note"] = bool(note)
            item |= {"note": note} if self.tokenizer is None else {"note_ids": self._ids(note)}
        return item

    def _ids(self, note: str) -> torch.Tensor:
        """The token ids of a note; none for no note."""
        assert self.tokenizer is not None
        if not note:
            return torch.zeros(0, dtype=torch.int64)
        most = getattr(self.tokenizer, "model_max_length", None)  # of a Hugging Face tokenizer
        more = {} if most is None else {"truncation": True, "max_length": min(self.max_tokens, most)}
        found = self.tokenizer(note, **more)
        ids = found["input_ids"] if isinstance(found, Mapping) else found
        return torch.as_tensor(ids, dtype=torch.int64).flatten()[: self.max_tokens]

    def collate(self, items: Sequence[Item]) -> Item:
        """`collate` with the tokenizer's padding token."""
        return collate(items, pad=getattr(self.tokenizer, "pad_token_id", None) or 0)


def collate(items: Sequence[Item], pad: int = 0) -> Item:
    """Items of `Records` -> a batch, for a DataLoader's `collate_fn`.

    Args:
        items: B of them. pad: the token id that fills up shorter notes.
    Returns: film (B, S, S), static (B, E), labels (B, L), series (B, T, F) zero after an item's end, lengths (B,) its
        hours, note_ids (B, W) and note_mask (B, W) bool; has_film, has_note, has_series (B,) bool; dicom_id and note
        lists of B; subject_id (B,). Only what the items have.
    """
    batch: Item = {}
    for key in items[0]:
        values = [item[key] for item in items]
        if key in ("dicom_id", "note"):
            batch[key] = values
        elif key == "series":
            batch["series"] = torch.nn.utils.rnn.pad_sequence(values, batch_first=True)
            batch["lengths"] = torch.tensor([len(v) for v in values])
        elif key == "note_ids":
            batch["note_ids"] = torch.nn.utils.rnn.pad_sequence(values, batch_first=True, padding_value=pad)
            lengths = torch.tensor([len(v) for v in values])
            batch["note_mask"] = torch.arange(batch["note_ids"].shape[1]) < lengths[:, None]
        else:
            batch[key] = torch.stack(values) if isinstance(values[0], torch.Tensor) else torch.tensor(values)
    return batch


def _rows(
    folder: Path, labels: str, views: str, store: Container[str] | None
) -> tuple[pd.DataFrame, pd.DataFrame, list[str], dict[str, int]]:
    """dicom_id, subject_id, split, stay_id, until (hours after intime that may be read), and the labels."""
    if labels == "findings":
        films = read_films(folder, views=views)
        films = films if store is None else films.in_store(store)
        table, left_out = films.table, films.left_out
        if "stay_id" not in table or not (folder / "stay_films.parquet").is_file():
            table = table.assign(stay_id=np.nan, until=np.nan)
        else:
            taken = read_table(folder, "stay_films", ["stay_id", "dicom_id", "hours_from_intime"])
            taken = taken.rename(columns={"hours_from_intime": "until"})
            table = table.merge(taken, "left", on=["stay_id", "dicom_id"], validate="m:1")
        columns = ["dicom_id", "subject_id", "split", "stay_id", "until"]
        return table[columns].reset_index(drop=True), films.labels, films.names, left_out
    samples = read_samples(folder, labels)
    samples = one_hot(samples) if "los_bin" in samples else samples
    names = [str(c) for c in samples if c not in KEYS and pd.api.types.is_numeric_dtype(samples[c])]
    table = samples[["sample_id", "dicom_id", "subject_id", "split", "stay_id"]].copy()
    table["dicom_id"] = table["dicom_id"].astype(object).where(table["dicom_id"].notna(), None)
    table["until"] = samples["predict_at_hours"].to_numpy(float, na_value=np.nan)
    return table, samples[names], names, {}


def _images(folder: Path, groups: Sequence[str], subjects: Callable[[int], str] | None) -> pd.DataFrame:
    """The columns of all films for the static groups and the notes, with the split in use."""
    names = static.resolve(groups)
    refuse_discharge(names, static.available_at(names))
    keys = ["dicom_id", "subject_id", "split", "taken_at"]
    images = read_table(folder, "images", lambda have: [*keys, *sorted(static.reads(names, "default", have))])
    return images if subjects is None else images.assign(split=images["subject_id"].map(subjects))


def _static(
    folder: Path, images: pd.DataFrame, table: pd.DataFrame, groups: Sequence[str]
) -> tuple[NDArray[np.float32], list[str]]:
    """(N, E) of the rows' films; a prediction without a film has the sex and age of its stay."""
    array, names, fitted = static.encode(images, groups)
    rows = pd.Index(images["dicom_id"]).get_indexer(pd.Index(table["dicom_id"]))
    out = array[rows]
    if (alone := rows < 0).any():
        stays = read_table(folder, "stays").set_index("stay_id").reindex(table["stay_id"][alone])
        blank = images.iloc[:0].reindex(range(int(alone.sum())))
        for column in ("sex", "age_years"):
            if column in blank and column in stays:
                blank[column] = stays[column].to_numpy()
        out[alone] = static.encode(blank, groups, fitted=fitted)[0]
    return out, names


def _labels(table: pd.DataFrame, values: pd.DataFrame, labels: str, policy: Policy) -> NDArray[np.float32]:
    """(N, L) 1, 0, NaN."""
    if labels not in ("findings", "radiology"):
        return values.to_numpy(np.float32, na_value=np.nan)
    train = (table["split"] == "train").to_numpy()[:, None]
    return np.where(train, training_labels(values, policy), evaluation_labels(values))


# ---- Memory-mapped series and notes, opened in each process


class MappedSeries:
    """The visible hours of each row's stay; `self[i]` is (T, F) float32, normalised.

    Args:
        start, length: (N,) rows of `hours`; length 0: no series.
    """

    def __init__(self, hours: series.Mapped, start: NDArray[np.int64], length: NDArray[np.int64]) -> None:
        self.hours, self.start, self.length = hours, start, length
        self.columns = hours.columns

    @classmethod
    def open(
        cls, folder: Path, table: pd.DataFrame, max_hours: int | None, subjects: Callable[[int], str] | None
    ) -> Self | None:
        """None where the features have no series.

        Args:
            table: stay_id and `until`, the hours after intime that may be read, of each row.
            subjects: the split of a subject, where it is not that of the folder: the normaliser is then fitted again.
        """
        if not (folder / "series.json").is_file():
            return None
        hours = series.Mapped(folder)
        stays = read_table(folder, "stays", ["stay_id", "subject_id", "los_hours"]).set_index("stay_id")
        stay, until = pd.Index(table["stay_id"]), table["until"].to_numpy(float)
        at = pd.Index(hours.stay_id).get_indexer(stay)
        size = np.where(at >= 0, np.diff(hours.offsets)[at], 0)
        los = stays["los_hours"].reindex(stay).to_numpy(float, na_value=np.nan)
        none = (at < 0) | ~(until >= 0)
        ends = np.nan_to_num(los, nan=np.inf)
        length = np.where(none, 0, complete_steps(np.where(none, 0, until), ends, hours.step_hours, size))
        cut = 0 if max_hours is None else np.maximum(length - round(max_hours / hours.step_hours), 0)
        if subjects is not None:
            train = stays["subject_id"].reindex(hours.stay_id).map(subjects).eq("train").to_numpy()
            hours.set_scale(series.fit(hours.path, _layout(read_json(folder / "series.json", Series)), train))
        return cls(hours, np.where(none, 0, hours.offsets[at] + cut), length - cut)

    def __getitem__(self, i: int) -> NDArray[np.float32]:
        return self.hours[int(self.start[i]) : int(self.start[i] + self.length[i])]


def _layout(about: dict[str, Any]) -> bins.Layout:
    """The columns as `series.fit` needs them, from series.json."""
    num = len(about["normaliser"]["mean"])
    names = about["columns"]
    return bins.Layout(
        values=tuple(names[:num]),
        units=tuple(about["units"][:num]),
        source=tuple(about["observed_of"]),
        category=(-1,) * num,
        normal=tuple(about["imputation"]["normal"]),
        observed=tuple(names[num:]),
        normalised=tuple(m is not None for m in about["normaliser"]["mean"]),
    )


class MappedNotes:
    """The note of each row, empty if there is none; `self[i]` is a text.

    Parquet cannot be memory-mapped: the texts are copied once into an Arrow file under the hash of notes.parquet.
    """

    def __init__(self, folder: str | Path, films: pd.Series, taken_at: pd.Series, cache: str | Path | None) -> None:
        known = check_notes(folder, taken_at)
        self.rows = pd.Index(known["dicom_id"]).get_indexer(pd.Index(films))
        path = Path(folder) / "notes.parquet"
        where = Path(folder).resolve().parent / "cache" if cache is None else Path(cache)
        self.path = where / f"notes_{file_digest(path)}.arrow"
        if not self.path.is_file():
            kind = pa.schema([("note", pa.large_string())])
            with new_file(self.path) as part, pa.OSFile(str(part), "wb") as sink, pa.ipc.new_file(sink, kind) as out:
                for batch in pq.ParquetFile(path).iter_batches(columns=["note"]):
                    out.write_batch(batch.cast(kind))
        self._column: Any = None

    def __getitem__(self, i: int) -> str:
        if self._column is None:
            self._column = pa.ipc.open_file(pa.memory_map(str(self.path))).read_all().column("note")
        if self.rows[i] < 0:
            return ""
        return (self._column[int(self.rows[i])].as_py() or "").strip()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_column": None}
