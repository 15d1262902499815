"""series.safetensors: the series of a cohort, computed once and cached; the file may be larger than memory."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import ibis.expr.types as ir
import numpy as np
import pandas as pd
import pyarrow as pa
from ibis import _

from configs import UserError
from ehr_features.config import FeaturesConfig, megabytes
from ehr_features.files import code_digest, digest, new_file, write_json
from ehr_features.raw.engine import batches
from ehr_features.raw.remote import fingerprint
from ehr_features.raw.source import EVENTS, Source
from ehr_features.series import bins, channels, coverage, events, medfuse
from ehr_features.series.bins import Layout
from ehr_features.series.mapped import CHUNK, Mapped, by_stays
from ehr_features.typed import read_json, shapes

BINS = ("stay_id", "channel", "bin", "v", "mark", "n", "unstored")
EVENTS_A_MB = 6_000  # events of the variables that are binned at a time, for each MB of the limit of memory


def cached(
    source: Source,
    found: Mapping[str, tuple[ir.Table, int]],
    stays: ir.Table,
    declared: tuple[channels.Channel, ...],
    config: FeaturesConfig,
) -> tuple[Path, list[dict[str, Any]]]:
    """The unnormalised series of a cohort, from the cache if its inputs have not changed.

    Args:
        found: the result of `events.cached`. stays: the result of `cohort.stays`.
    Returns: the file, and the counts of events: channel, fate, n.
    """
    frame = stays.select("stay_id", "subject_id", "hadm_id", "intime", "outtime", "los_hours", "death_at")
    frame = frame.order_by("stay_id").to_pandas()
    who = hashlib.sha256(pd.util.hash_pandas_object(frame, index=False).to_numpy().tobytes()).hexdigest()
    prints = [fingerprint(source.files[name]) for name in EVENTS if name in source.files]
    said = [channel.model_dump(mode="json") for channel in declared]
    preset = medfuse if config.preset == "medfuse" else bins
    key = digest([prints, who, said, config.preset, config.step_hours, config.engine, code_digest(preset, coverage)])
    path = config.cache_folder / f"series-{key}.safetensors"
    facts = path.with_suffix(".json")
    if not (path.is_file() and facts.is_file()):
        lengths = preset.lengths(frame["los_hours"].to_numpy(), config.step_hours)
        stay_ids, tables = frame["stay_id"].to_numpy(), (found["chartevents"][0], found["labevents"][0])
        num = 1 if preset is medfuse else shares(source, tables, megabytes(config.memory))
        parts = list(_of_stays(*tables, stays, stay_ids, num)) if num > 1 else [(*tables, stays)]
        filtered, stages = list(config.cache_folder.glob("*events-*.parquet")), events.Stages(3 * len(parts))
        with events.progress(source.con, "binning the series", stages):
            counted: list[pd.DataFrame] = []

            def ordered() -> Iterator[pa.RecordBatch]:
                for k, part in enumerate(parts):
                    stages.begin(3 * k, events.reading(*filtered))  # read to count fates, then to bin them
                    binned, counts = preset.extract(source, *part, declared, config.step_hours)
                    counted.append(counts)
                    stages.begin(3 * k + 1, events.reading(*filtered))
                    yield from batches(source.con, binned.select(*BINS).order_by("stay_id"))

            def told(percent: float) -> None:
                k = len(counted) - 1
                stages.begin(3 * k + 2, lambda: min(max(percent * len(parts) - 100 * k, 0), 100))

            standing = write(path, ordered(), stay_ids, lengths, preset.layout(declared), told=told)
            counts = pd.concat(counted).groupby(["channel", "fate"], as_index=False).sum()
        lost = coverage.without_stay(source, found["chartevents"][0], stays, declared, config.preset)
        counts = pd.concat([fates(counts, standing, exact=preset is bins), lost], ignore_index=True)
        names = [p.name for p in medfuse.published(declared)] if preset is medfuse else [c.name for c in declared]
        counts["channel"] = [names[i] for i in counts["channel"]]
        write_json(facts, counts.sort_values(["channel", "fate"]).to_dict("records"))
    return path, read_json(facts, list[shapes.Fate])


def shares(source: Source, tables: Sequence[ir.Table], memory: float) -> int:
    """In how many shares of the stays the events are binned; joins and groups of all at once exceed small limits (MB).

    The events of a stay depend on no other stay, but for preset `medfuse`.
    """
    if source.con.name != "duckdb":
        return 1
    return 1 + sum(int(table.count().execute()) for table in tables) // round(EVENTS_A_MB * memory)


def _of_stays(
    chart: ir.Table, labs: ir.Table, stays: ir.Table, stay_ids: np.ndarray, num: int
) -> Iterator[tuple[ir.Table, ir.Table, ir.Table]]:
    """The events of the stays, share by share in order of stay_id, with all laboratory rows of their subjects."""
    for ids in np.array_split(stay_ids, min(num, len(stay_ids))):
        low, high = int(ids[0]), int(ids[-1])
        mine, charted = (table.filter(_.stay_id.between(low, high)) for table in (stays, chart))
        subjects = mine.select("subject_id").union(charted.select("subject_id")).distinct()
        yield charted, labs.semi_join(subjects, "subject_id"), mine


def write(
    path: Path,
    bins: Iterable[pa.RecordBatch],
    stay_ids: np.ndarray,
    num_bins: np.ndarray,
    columns: Layout,
    chunk: int = CHUNK,
    told: Callable[[float], None] = lambda percent: None,
) -> np.ndarray:
    """Write series.safetensors from last values by bin.

    Args:
        bins: the columns of BINS, ordered by stay_id.
        stay_ids: (S,) sorted. num_bins: (S,) T of each. chunk: stays held in memory at a time.
        told: is called with the percent of stays that are written.
    Returns: (3, number of variables): observed bins, their events, observed bins whose value is `unstored`.
    """
    offsets = np.concatenate([[0], np.cumsum(num_bins)]).astype(np.int64)
    rows, num = int(offsets[-1]), len(columns.observed)
    standing = np.zeros((3, num), np.int64)
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
                stay, channel, at, v, mark, n, unstored = (
                    rest.slice(0, cut).column(n).to_numpy(zero_copy_only=False) for n in BINS
                )
                place = np.searchsorted(stay_ids, stay)
                inside = (at >= 0) & (at < num_bins[place])
                row, channel = (offsets[place] - begin + at)[inside], channel[inside]
                last[0, row, channel], last[1, row, channel] = v[inside], mark[inside]
                for to, amount in zip(standing, (np.ones(len(row)), n[inside], unstored[inside]), strict=True):
                    to += np.bincount(channel, amount, num).astype(np.int64)
                if cut < len(rest):
                    rest = rest.slice(cut)
                    break
                rest = next(batches_, None)
            values, observed = filled(last, offsets[mine] - begin, columns)
            file.write(values.tobytes())
            observed_file.write(observed.tobytes())
            told(100 * mine.stop / len(stay_ids))
    return standing


def fates(counts: pd.DataFrame, standing: np.ndarray, *, exact: bool) -> pd.DataFrame:
    """Split `used` into values in the series and values replaced by a later value of their bin.

    Args:
        counts: channel, fate, n, unstored; from `extract`. standing: from `write`.
        exact: each event that `extract` counts as used is in a bin of one stay (not so with preset `medfuse`).
    """
    used = counts[counts["fate"] == "used"].set_index("channel")
    rest = "replaced by a later value of its bin" if exact else "outside the stay, or not the last of its bin"
    rows = [counts[counts["fate"] != "used"]]
    for channel, (cells, placed, late) in enumerate(standing.T.tolist()):
        n, unstored = used.loc[channel, ["n", "unstored"]] if channel in used.index else (placed, late)
        assert not exact or n == placed, f"{n} used events of variable {channel}, {placed} in a bin"
        split = [(channel, "used", cells, late), (channel, rest, n - cells, unstored - late)]
        rows.append(pd.DataFrame([row for row in split if row[2] > 0], columns=counts.columns))
    return pd.concat(rows, ignore_index=True).astype({"channel": int, "n": int, "unstored": int})


def filled(last: np.ndarray, starts: np.ndarray, columns: Layout) -> tuple[np.ndarray, np.ndarray]:
    """Carry the last value forward within each stay; before the first value use the normal value.

    Args:
        last: (2, N, number of variables) value and mark of the concatenated bins of several stays; NaN: not observed.
        starts: the first row of each stay.
    Returns: (N, F) float32 values, (N, number of variables) uint8 observed.
    """
    observed = ~np.isnan(last[0])
    num = observed.shape[0]
    began = np.zeros(num, np.int64)
    starts = starts[starts < num]  # a last stay without hours has no first row
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
    """The content of series.json: the columns, and the normaliser, fitted on train."""
    train = stays.order_by("stay_id").select("stay_id", "split").to_pandas()["split"].eq("train").to_numpy()
    return {
        "preset": config.preset,
        "step_hours": config.step_hours,
        "columns": [*columns.values, *columns.observed],
        "num_values": len(columns.values),
        "units": [*columns.units, *["1 = observed"] * len(columns.observed)],
        "observed_of": list(columns.source),
        "imputation": {"rule": "previous value of the stay, then the normal value", "normal": list(columns.normal)},
        "normaliser": fit(path, columns, train) | {"fitted_on": "train", "num_stays": int(train.sum())},
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


def fit(path: Path, columns: Layout, train: np.ndarray, chunk: int = CHUNK) -> dict[str, list[float | None]]:
    """Mean and standard deviation of each number among the train stays' observed values.

    Args:
        train: (S,) bool. Returns: `mean` and `std`, (F,) each; null for columns that are not normalised.
    """
    total, square, count = (np.zeros(len(columns.values)) for _ in range(3))
    source = np.array(columns.source)
    for part in by_stays(path, chunk):
        rows = np.repeat(train[part.stays], np.diff(part.edges))
        v = part.values[rows].astype(np.float64)
        seen = part.observed[rows][:, source].astype(bool)
        total += np.where(seen, v, 0).sum(0)
        square += np.where(seen, v * v, 0).sum(0)
        count += seen.sum(0)
    n = np.maximum(count, 1)
    mean = total / n
    std = np.sqrt(np.maximum(square / n - mean**2, 0))
    use = np.array(columns.normalised) & (count > 0)
    return {
        "mean": [float(m) if u else None for m, u in zip(mean, use, strict=True)],
        "std": [(float(s) if s > 1e-6 else 1.0) if u else None for s, u in zip(std, use, strict=True)],
    }


def load(
    folder: str | Path, stay_ids: Sequence[int] | None = None, hours: int | None = None, normalise: bool = True
) -> dict[int, np.ndarray]:
    """Read the series of stays.

    Args:
        folder: of features.
        stay_ids: all if None.
        hours: only bins that end by then.
        normalise: (x - mean) / std of train.
    Returns: stay_id -> (min(T, hours / step), F + number of variables) float32: values, then 1 where observed.
    Raises: UserError: no features folder; a stay without series.
    """
    series = Mapped(folder)
    keep = None if hours is None else int(hours // series.step_hours)
    wanted = series.stay_id if stay_ids is None else np.asarray(stay_ids, np.int64)
    place = series.place(wanted)
    if (absent := wanted[place < 0]).size:
        raise UserError(f"{series.path}: {absent.size} stays have no series there, e.g. {absent[:3].tolist()}")
    out = {}
    for stay, at in zip(wanted.tolist(), place.tolist(), strict=True):
        begin, end = int(series.offsets[at]), int(series.offsets[at + 1])
        end = end if keep is None else min(end, begin + keep)
        out[stay] = series.read(slice(begin, end), normalise)
    return out
