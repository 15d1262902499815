"""series.safetensors as one memory-mapped table of hours.

The pages belong to the file: all processes of a machine share them, and the system drops them when it needs memory.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import safe_open

from configs import UserError
from ehr_features.typed import read_json, undamaged
from ehr_features.typed.shapes import Series

CHUNK = 500  # stays
AGAIN = "build the features again"
KINDS = {"stay_id": "I64", "offsets": "I64", "values": "F32", "observed": "U8"}


class Hours(NamedTuple):
    """The hours of some stays: which stays, edges (S + 1,) of each in what follows, values (N, F), observed (N, V)."""

    stays: slice
    edges: np.ndarray
    values: np.ndarray
    observed: np.ndarray


def by_stays(path: Path, chunk: int = CHUNK) -> Iterator[Hours]:
    """Read series.safetensors some stays at a time; memory holds one part, and no page of the file stays mapped."""
    with safe_open(path, "numpy") as file:
        offsets = file.get_tensor("offsets")
    starts, shapes = layout(path)
    with path.open("rb") as file:
        for first in range(0, len(offsets) - 1, chunk):
            edges = offsets[first : first + chunk + 1]
            begin, rows = int(edges[0]), int(edges[-1] - edges[0])
            found = []
            for name, kind in (("values", "<f4"), ("observed", "u1")):
                width = shapes[name][1]
                file.seek(starts[name] + begin * width * np.dtype(kind).itemsize)
                found.append(np.fromfile(file, kind, rows * width).reshape(rows, width))
            yield Hours(slice(first, first + len(edges) - 1), edges - begin, *found)


def layout(path: Path) -> tuple[dict[str, int], dict[str, tuple[int, ...]]]:
    """Where each tensor of a safetensors file begins, and its shape."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = {name: about for name, about in json.loads(file.read(size)).items() if name != "__metadata__"}
    starts = {name: 8 + size + about["data_offsets"][0] for name, about in header.items()}
    return starts, {name: tuple(about["shape"]) for name, about in header.items()}


class Mapped:
    """The hours of all stays, one after the other; `series[rows]` reads them as `series.load` does.

    Cheap to pickle and to fork: each process maps the file itself.

    Attributes:
        stay_id: (S,) sorted. offsets: (S + 1,) first hour of each stay.
        columns: the F + number of variables names: values, then 1 where observed. step_hours: of a row.
        mean, std: (F,) of the train stays; 0 and 1 for what is not normalised.
        shape: hours, columns.
    Raises: UserError: no such file, or a damaged one.
    """

    def __init__(self, folder: str | Path) -> None:
        about = read_json(Path(folder) / "series.json", Series)
        self.path = Path(folder) / "series.safetensors"
        if not self.path.is_file():
            raise UserError(f"{self.path}: no such file; {AGAIN}")
        with undamaged(self.path, AGAIN), safe_open(self.path, "numpy") as file:
            self.stay_id, self.offsets = file.get_tensor("stay_id"), file.get_tensor("offsets")
            found = {name: [file.get_slice(name).get_dtype(), *file.get_slice(name).get_shape()] for name in KINDS}
        self.columns: list[str] = about["columns"]
        self._check(found, about["num_values"])
        self.step_hours = float(about["step_hours"])
        self.set_scale(about["normaliser"])
        self._arrays: tuple[np.ndarray, np.ndarray] | None = None

    def _check(self, found: dict[str, list[Any]], num: int) -> None:
        """Refuse a file that does not fit series.json, or whose stays are not in order. Raises: UserError."""
        stays, rows = self.stay_id.size, int(self.offsets[-1]) if self.offsets.ndim == 1 and len(self.offsets) else 0
        sizes = {"stay_id": [stays], "offsets": [stays + 1], "values": [rows, num]}
        sizes["observed"] = [rows, len(self.columns) - num]
        for name, size in sizes.items():
            if found[name] != (wanted := [KINDS[name], *size]):
                raise UserError(f"{self.path}: `{name}`: got {found[name]}, wanted {wanted} by series.json; {AGAIN}")
        if (np.diff(self.stay_id) <= 0).any() or (np.diff(self.offsets) < 0).any() or self.offsets[0] != 0:
            raise UserError(f"{self.path}: its stays are not in order; {AGAIN}")

    def set_scale(self, normaliser: dict[str, Any]) -> None:
        """Normalise by the `mean` and `std` of `series.fit`."""
        self.mean = np.array([0.0 if m is None else m for m in normaliser["mean"]], np.float32)
        self.std = np.array([1.0 if s is None else s for s in normaliser["std"]], np.float32)

    @property
    def shape(self) -> tuple[int, int]:
        return int(self.offsets[-1]), len(self.columns)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: Any) -> np.ndarray:
        """Hours by a slice or an array of row numbers: (..., columns) float32, normalised."""
        return self.read(rows)

    def read(self, rows: Any, normalise: bool = True) -> np.ndarray:
        """As `self[rows]`; `normalise=False` gives the values in their units."""
        values, observed = self._map()
        found = values[rows]
        if not np.isfinite(found).all():
            raise UserError(f"{self.path}: `values` holds numbers that are not finite; {AGAIN}")
        out = np.empty((*found.shape[:-1], len(self.columns)), np.float32)
        known = out[..., : len(self.mean)]
        if normalise:
            np.subtract(found, self.mean, out=known)
            known /= self.std
        else:
            known[...] = found
        out[..., len(self.mean) :] = observed[rows]
        return out

    def place(self, stay_ids: np.ndarray) -> np.ndarray:
        """The number of each stay here, -1 where it has no series."""
        at = np.minimum(np.searchsorted(self.stay_id, stay_ids), max(len(self.stay_id) - 1, 0))
        return np.where(self.stay_id[at] == stay_ids, at, -1) if len(self.stay_id) else np.full(len(stay_ids), -1)

    def _map(self) -> tuple[np.ndarray, np.ndarray]:
        """Values (hours, F) float32 and observed (hours, number of variables) uint8, over the mapped file."""
        if self._arrays is None:
            if not self.path.is_file():
                raise UserError(f"{self.path}: no longer there; was it moved or deleted while this runs? {AGAIN}")
            starts, shapes = layout(self.path)
            values = np.memmap(self.path, "<f4", "r", starts["values"], shapes["values"])
            observed = np.memmap(self.path, "u1", "r", starts["observed"], shapes["observed"])
            self._arrays = values.view(np.ndarray), observed.view(np.ndarray)
        return self._arrays

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_arrays": None}  # memory maps cannot be pickled
