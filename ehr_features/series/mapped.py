"""series.safetensors as one memory-mapped table of hours.

The pages belong to the file: all processes of a machine share them, and the system drops them when it needs memory.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open

from configs import UserError
from ehr_features.typed import read_json, undamaged
from ehr_features.typed.shapes import Series

AGAIN = "build the features again"
KINDS = {"stay_id": "I64", "offsets": "I64", "values": "F32", "observed": "U8"}


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
            with self.path.open("rb") as file:
                size = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(size))
            found = []
            for name, kind in (("values", "<f4"), ("observed", "u1")):
                begin, shape = 8 + size + header[name]["data_offsets"][0], tuple(header[name]["shape"])
                found.append(np.memmap(self.path, kind, "r", begin, shape).view(np.ndarray))
            self._arrays = found[0], found[1]
        return self._arrays

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_arrays": None}  # memory maps cannot be pickled
