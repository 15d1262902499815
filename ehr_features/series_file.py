"""series.safetensors: the series of a cohort, made once and kept in the cache; it may be larger than memory."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import ibis.expr.types as ir
import numpy as np
import pandas as pd
import pyarrow as pa

from ehr_features import channels, events, medfuse, series
from ehr_features.config import FeaturesConfig
from ehr_features.engine import batches
from ehr_features.files import code_digest, digest, new_file, read_json, write_json
from ehr_features.remote import fingerprint
from ehr_features.series import Layout
from ehr_features.source import EVENTS, Source

BINS = ("stay_id", "channel", "bin", "v", "mark")


def cached(
    source: Source,
    found: Mapping[str, tuple[ir.Table, int]],
    stays: ir.Table,
    declared: tuple[channels.Channel, ...],
    config: FeaturesConfig,
) -> tuple[Path, list[dict[str, Any]]]:
    """The unnormalised series of a cohort, from the cache if what they depend on has not changed.

    Args:
        found: as `events.cached` gives. stays: as `cohort.stays` gives.
    Returns: the file, and what became of the events: channel, fate, n.
    """
    frame = stays.select("stay_id", "subject_id", "hadm_id", "intime", "outtime", "los_hours")
    frame = frame.order_by("stay_id").to_pandas()
    who = hashlib.sha256(pd.util.hash_pandas_object(frame, index=False).to_numpy().tobytes()).hexdigest()
    prints = [fingerprint(source.files[name]) for name in EVENTS if name in source.files]
    said = [channel.model_dump(mode="json") for channel in declared]
    code = code_digest("series*.py", "medfuse.py", "channels.py", "events.py", "source.py", "engine.py")
    key = digest([prints, who, said, config.preset, config.step_hours, config.engine, code])
    path = config.cache_folder / f"series-{key}.safetensors"
    facts = path.with_suffix(".json")
    if not (path.is_file() and facts.is_file()):
        preset = medfuse if config.preset == "medfuse" else series
        bins, counts = preset.extract(
            source, found["chartevents"][0], found["labevents"][0], stays, declared, config.step_hours
        )
        lengths = preset.lengths(frame["los_hours"].to_numpy(), config.step_hours)
        with events.progress(source.con, "binning the series"):
            ordered = batches(source.con, bins.select(*BINS).order_by("stay_id"))
            write(path, ordered, frame["stay_id"].to_numpy(), lengths, preset.layout(declared))
        names = [p.name for p in medfuse.published(declared)] if preset is medfuse else [c.name for c in declared]
        counts["channel"] = [names[i] for i in counts["channel"]]
        write_json(facts, counts.sort_values(["channel", "fate"]).to_dict("records"))
    return path, read_json(facts)


def write(
    path: Path,
    bins: Iterable[pa.RecordBatch],
    stay_ids: np.ndarray,
    num_bins: np.ndarray,
    columns: Layout,
    chunk: int = 2_000,
) -> None:
    """Write series.safetensors from last values by bin.

    Args:
        bins: stay_id, channel, bin, v, mark; ordered by stay_id.
        stay_ids: (S,) sorted. num_bins: (S,) T of each. chunk: stays that are held at a time.
    """
    offsets = np.concatenate([[0], np.cumsum(num_bins)]).astype(np.int64)
    rows, num = int(offsets[-1]), len(columns.observed)
    shapes = {
        "stay_id": ("I64", (len(stay_ids),)),
        "offsets": ("I64", offsets.shape),
        "values": ("F32", (rows, len(columns.values))),
        "observed": ("U8", (rows, num)),
    }
    batches_ = iter(bins)
    rest = next(batches_, None)
    with new_file(path) as part, part.open("wb") as file, part.open("r+b") as observed_file:
        starts = _header(file, shapes)
        file.write(stay_ids.astype("<i8").tobytes() + offsets.astype("<i8").tobytes())
        observed_file.seek(starts["observed"])
        for first in range(0, len(stay_ids), chunk):
            mine = slice(first, min(first + chunk, len(stay_ids)))
            begin, end = offsets[mine.start], offsets[mine.stop]
            last = np.full((2, end - begin, num), np.nan, np.float32)  # value and mark
            while rest is not None:
                cut = int(np.searchsorted(rest.column("stay_id").to_numpy(), stay_ids[mine.stop - 1], "right"))
                stay, channel, at, v, mark = (rest.slice(0, cut).column(n).to_numpy(zero_copy_only=False) for n in BINS)
                place = np.searchsorted(stay_ids, stay)
                inside = (at >= 0) & (at < num_bins[place])
                row, channel = (offsets[place] - begin + at)[inside], channel[inside]
                last[0, row, channel], last[1, row, channel] = v[inside], mark[inside]
                if cut < len(rest):
                    rest = rest.slice(cut)
                    break
                rest = next(batches_, None)
            values, observed = filled(last, offsets[mine] - begin, columns)
            file.write(values.tobytes())
            observed_file.write(observed.tobytes())


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
    starts = starts[starts < num]  # a stay of no hours at the end has no first row
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


def about(
    path: Path, stays: ir.Table, columns: Layout, config: FeaturesConfig, fates: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """series.json: what the columns are, and the normaliser, fitted on train."""
    train = stays.order_by("stay_id").select("stay_id", "split").to_pandas()["split"].eq("train").to_numpy()
    return {
        "preset": config.preset,
        "step_hours": config.step_hours,
        "columns": [*columns.values, *columns.observed],
        "num_values": len(columns.values),
        "units": [*columns.units, *["1 = observed"] * len(columns.observed)],
        "observed_of": list(columns.source),
        "imputation": {"rule": "previous value of the stay, then the normal value", "normal": list(columns.normal)},
        "normaliser": series.fit(path, columns, train) | {"fitted_on": "train", "num_stays": int(train.sum())},
        "events": fates,
    }


def _header(file: BinaryIO, shapes: Mapping[str, tuple[str, tuple[int, ...]]]) -> dict[str, int]:
    """Write a safetensors header; returns where each tensor begins in the file."""
    meta: dict[str, Any] = {}
    end = 0
    for name, (dtype, shape) in shapes.items():
        begin, end = end, end + int(np.prod(shape)) * {"I64": 8, "F32": 4, "U8": 1}[dtype]
        meta[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(meta).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    file.truncate(8 + len(text) + end)
    file.flush()
    return {name: 8 + len(text) + about["data_offsets"][0] for name, about in meta.items()}
