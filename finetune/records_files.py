"""The files of `Records`: series and notes, mapped in each process that reads them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from safetensors import safe_open

from ehr_features import series
from ehr_features.files import file_digest, new_file, read_json, read_table, undamaged
from ehr_features.series import bins
from finetune.samples import complete_steps
from pretrain.text.notes import check_notes


class MappedSeries:
    """The hours that may be read of each row's stay; `self[i]` is (T, F) float32, normalised.

    Args:
        start, length: (N,) rows of series.safetensors; length 0: no series. mean, std: (values,) of the train stays.
    """

    def __init__(self, folder: Path, start: NDArray[np.int64], length: NDArray[np.int64], mean: Any, std: Any) -> None:
        self.path, self.start, self.length, self.mean, self.std = (
            folder / "series.safetensors", start, length, mean, std,
        )  # fmt: skip
        self.columns: list[str] = read_json(folder / "series.json")["columns"]
        self._file: Any = None

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
        about = read_json(folder / "series.json")
        step = float(about.get("step_hours", 1))
        path = folder / "series.safetensors"
        with undamaged(path, "build the features again"), safe_open(path, "numpy") as file:
            known, offsets = file.get_tensor("stay_id"), file.get_tensor("offsets")
        stays = read_table(folder, "stays", ["stay_id", "subject_id", "los_hours"]).set_index("stay_id")
        stay, until = pd.Index(table["stay_id"]), table["until"].to_numpy(float)
        at = pd.Index(known).get_indexer(stay)
        size = np.where(at >= 0, np.diff(offsets)[at], 0)
        los = stays["los_hours"].reindex(stay).to_numpy(float, na_value=np.nan)
        none = (at < 0) | ~(until >= 0)
        length = np.where(none, 0, complete_steps(np.where(none, 0, until), np.nan_to_num(los, nan=np.inf), step, size))
        cut = np.zeros_like(length) if max_hours is None else np.maximum(length - round(max_hours / step), 0)
        normaliser = about["normaliser"]
        if subjects is not None:
            train = stays["subject_id"].reindex(known).map(subjects).eq("train").to_numpy()
            normaliser = series.fit(folder / "series.safetensors", _layout(about), train)
        mean = np.array([0.0 if m is None else m for m in normaliser["mean"]], np.float32)
        std = np.array([1.0 if s is None else s for s in normaliser["std"]], np.float32)
        return cls(folder, np.where(none, 0, offsets[at] + cut), length - cut, mean, std)

    def __getitem__(self, i: int) -> NDArray[np.float32]:
        if self._file is None:
            self._file = safe_open(self.path, "numpy").__enter__()
        begin, end = int(self.start[i]), int(self.start[i] + self.length[i])
        values = self._file.get_slice("values")[begin:end]
        observed = self._file.get_slice("observed")[begin:end]
        return np.concatenate([(values - self.mean) / self.std, observed.astype(np.float32)], axis=1)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_file": None}  # maps do not travel between processes


def _layout(about: dict[str, Any]) -> bins.Layout:
    """What `series.fit` needs to know of the columns, from series.json."""
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
    """The note of each row, empty where there is none; `self[i]` is a text.

    Parquet cannot be mapped: the texts are copied once into an Arrow file under the hash of notes.parquet.
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
