"""series.safetensors, filled from last values by bin; it may be larger than memory."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from ehr_features.files import new_file
from ehr_features.series import Layout

Shapes = dict[str, tuple[np.dtype, tuple[int, ...]]]


def write(
    path: Path, bins: Iterable[Any], stay_ids: np.ndarray, num_bins: np.ndarray, columns: Layout, chunk: int = 2_000
) -> None:
    """Write series.safetensors from last values by bin.

    Args:
        bins: record batches of stay_id, channel, bin, v, mark, in any order.
        stay_ids: (S,) sorted. num_bins: (S,) T of each. chunk: stays that are filled at a time.
    """
    offsets = np.concatenate([[0], np.cumsum(num_bins)]).astype(np.int64)
    rows, num = int(offsets[-1]), len(columns.observed)
    shapes: Shapes = {
        "stay_id": (np.dtype(np.int64), (len(stay_ids),)),
        "offsets": (np.dtype(np.int64), offsets.shape),
        "values": (np.dtype(np.float32), (rows, len(columns.values))),
        "observed": (np.dtype(np.uint8), (rows, num)),
    }
    with new_file(path) as part, new_file(path.with_suffix(".raw")) as scratch:
        arrays = _safetensors(part, shapes)
        arrays["stay_id"][:], arrays["offsets"][:] = stay_ids, offsets
        last = np.memmap(scratch, np.float32, "w+", shape=(2, rows, num))  # value and mark
        last[:] = np.nan
        for batch in bins:
            stay, channel, at, v, mark = (batch.column(n).to_numpy(zero_copy_only=False) for n in BINS)
            place = np.searchsorted(stay_ids, stay)
            inside = (at >= 0) & (at < num_bins[place])
            row, channel = (offsets[place] + at)[inside], channel[inside]
            last[0, row, channel], last[1, row, channel] = v[inside], mark[inside]
        for first in range(0, len(stay_ids), chunk):
            span = slice(offsets[first], offsets[min(first + chunk, len(stay_ids))])
            starts = offsets[:-1][first : first + chunk] - offsets[first]
            arrays["values"][span], arrays["observed"][span] = filled(last[:, span], starts, columns)
        for array in arrays.values():
            array.flush()
        del last, arrays
    path.with_suffix(".raw").unlink()


BINS = ("stay_id", "channel", "bin", "v", "mark")


def filled(last: np.ndarray, starts: np.ndarray, columns: Layout) -> tuple[np.ndarray, np.ndarray]:
    """Carry the last value forward within each stay, then the normal value.

    Args:
        last: (2, N, number of variables) value and mark of the bins of several stays on end; NaN: not observed.
        starts: the first row of each stay.
    Returns: (N, F) float32 values, (N, number of variables) uint8 observed.
    """
    observed = ~np.isnan(last[0])
    num = observed.shape[0]
    began = np.zeros(num, np.int64)
    began[starts] = starts
    began = np.maximum.accumulate(began)[:, None]
    at = np.maximum.accumulate(np.where(observed, np.arange(num)[:, None], -1), axis=0)
    known, at = at >= began, np.maximum(at, 0)
    value, mark = np.take_along_axis(last[0], at, 0), np.take_along_axis(last[1], at, 0)
    out = np.empty((num, len(columns.values)), np.float32)
    for f, (source, category, normal) in enumerate(zip(columns.source, columns.category, columns.normal, strict=True)):
        now = mark[:, source] if category == -2 else value[:, source]
        now = (now == category).astype(np.float32) if category >= 0 else now
        out[:, f] = np.where(known[:, source], now, normal)
    return out, observed.astype(np.uint8)


def _safetensors(path: Path, shapes: Shapes) -> dict[str, np.memmap]:
    """A safetensors file of the given shapes, as arrays that are mapped into it (it may be larger than memory)."""
    names = {"int64": "I64", "float32": "F32", "uint8": "U8"}
    meta: dict[str, Any] = {}
    end = 0
    for name, (dtype, shape) in shapes.items():
        begin, end = end, end + int(np.prod(shape)) * dtype.itemsize
        meta[name] = {"dtype": names[dtype.name], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(meta).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    at = {n: 8 + len(text) + m["data_offsets"][0] for n, m in meta.items()}
    return {n: np.memmap(path, d, "r+", at[n], s) for n, (d, s) in shapes.items()}
