"""The part of the audit that holds the series against the raw events.

An observed value must be that of an event of this stay and hour which was known by then: charted in it, or, for a
laboratory, stored in it. A value that was not observed must be the one before it, or the normal value. Only units are
converted by the code that built the folder; what is known when is read from the raw tables again.

Differs for preset `medfuse`: it counts a laboratory value from its draw, so this claim is refuted there, with the
count.
"""

from __future__ import annotations

from itertools import zip_longest
from pathlib import Path
from typing import Any

import ibis
import ibis.expr.types as ir
import numpy as np
import pandas as pd
import pyarrow as pa
from ibis import _
from safetensors import safe_open

from configs import UserError
from ehr_features.audit.verdict import Verdict, cannot, decide
from ehr_features.config import FeaturesConfig
from ehr_features.files import read_json
from ehr_features.raw.engine import batches, hold
from ehr_features.raw.source import Source
from ehr_features.series import bins, channels, events, medfuse
from ehr_features.series.file import fit

KNOWN = "no vital sign or laboratory value is from after its hour"
FILLED = "values that were not observed are carried forward, never back"
DECLARED = "the series are of the declared variables, and of nothing else"
FITTED = "the normaliser is fitted on train only"
ODD = "series.safetensors has other columns than declared"
READ = ("chartevents", "labevents")


def check_series(features: Path, stays: pd.DataFrame, config: FeaturesConfig) -> list[Verdict]:
    """Verdicts on series.safetensors and series.json that need no raw table."""
    about, layout = read_json(features / "series.json"), _layout(config)
    wanted = [*layout.values, *layout.observed]
    other = sum(ours != theirs for ours, theirs in zip_longest(about["columns"], wanted))
    more = abs(sum(_widths(_file(features))) - len(wanted))
    bad = {"columns that are not the declared ones": other, "columns more or fewer in the file than declared": more}
    declared = decide(DECLARED, bad, f"{len(wanted)} columns")
    fitted = cannot(FITTED, ODD) if more else _fitted(_file(features), about, layout, stays)
    return [check_carried(features), declared, fitted]


def _file(features: Path) -> Path:
    path = features / "series.safetensors"
    if not path.is_file():
        raise UserError(f"{path}: no such file; build the features again")
    return path


def _widths(path: Path) -> tuple[int, int]:
    with safe_open(path, "numpy") as file:
        return tuple(file.get_slice(name).get_shape()[1] for name in ("values", "observed"))


def _layout(config: FeaturesConfig) -> bins.Layout:
    return (medfuse if config.preset == "medfuse" else bins).layout(channels.read_channels(config.channels))


def check_carried(features: Path, chunk: int = 2_000) -> Verdict:
    """What was not observed is the value before it, or the normal value."""
    path, about = _file(features), read_json(features / "series.json")
    normal, of = np.array(about["imputation"]["normal"], np.float32), np.array(about["observed_of"])
    if len(normal) != len(of) or _widths(path)[0] != len(of) or of.max() >= _widths(path)[1]:
        return cannot(FILLED, ODD)
    wrong = cells = 0
    with safe_open(path, "numpy") as file:
        offsets, values, observed = file.get_tensor("offsets"), file.get_slice("values"), file.get_slice("observed")
        for first in range(0, len(offsets) - 1, chunk):
            edges = offsets[first : first + chunk + 1]
            v, seen = values[int(edges[0]) : int(edges[-1])], observed[int(edges[0]) : int(edges[-1])][:, of] == 1
            before = np.vstack([normal[None], v[:-1]])[: len(v)]
            starts = edges[:-1][np.diff(edges) > 0] - edges[0]
            before[starts] = normal
            wrong += int(((v != before) & ~seen).sum())
            cells += int((~seen).sum())
    return decide(FILLED, {"values that stand before they were observed": wrong}, f"{cells} values not observed")


def _fitted(path: Path, about: dict[str, Any], layout: bins.Layout, stays: pd.DataFrame) -> Verdict:
    train = stays.sort_values("stay_id")["split"].eq("train").to_numpy()
    wanted, bad = fit(path, layout, train), 0
    for key in ("mean", "std"):
        for ours, theirs in zip(wanted[key], about["normaliser"][key], strict=True):
            same = ours is theirs if ours is None or theirs is None else bool(np.isclose(ours, theirs, rtol=1e-5))
            bad += not same
    return decide(FITTED, {"means or deviations that are not those of train": bad}, f"{int(train.sum())} train stays")


def check_known(features: Path, source: Source, config: FeaturesConfig) -> Verdict:
    """Every observed value has its event, known by the end of its hour."""
    path, layout, declared = _file(features), _layout(config), channels.read_channels(config.channels)
    if _widths(path) != (len(layout.values), len(layout.observed)):
        return cannot(KNOWN, ODD)
    with safe_open(path, "numpy") as file:
        stay_ids, offsets = file.get_tensor("stay_id"), file.get_tensor("offsets")
        values, observed = file.get_tensor("values"), file.get_tensor("observed") == 1
    number = {s: f for f, s in enumerate(layout.source) if layout.category[f] == -1}
    column = np.array([number.get(s, -1) for s in range(len(layout.observed))])
    explained = np.zeros_like(observed)
    for batch in batches(source.con, _ranges(source, config, declared, stay_ids)):
        stay, channel, at, low, high = (batch.column(n).to_numpy(zero_copy_only=False) for n in RANGE)
        place = np.searchsorted(stay_ids, stay)
        inside = (at >= 0) & (at < np.diff(offsets)[place])
        row, channel, low, high = (offsets[place] + at)[inside], channel[inside], low[inside], high[inside]
        v, slack = values[row, column[channel]], 1e-4 * np.maximum(np.abs(high), 1)
        fits = np.isnan(low) | (column[channel] < 0) | ((v >= low - slack) & (v <= high + slack))
        explained[row[fits], channel[fits]] = True
    bad = {"observed values without an event that was known by then": int((observed & ~explained).sum())}
    return decide(KNOWN, bad, f"{int(observed.sum())} observed values of {len(stay_ids)} stays")


RANGE = ("stay_id", "channel", "bin", "low", "high")


def _ranges(
    source: Source, config: FeaturesConfig, declared: tuple[channels.Channel, ...], stay_ids: np.ndarray
) -> ir.Table:
    """stay_id, channel, bin, low, high: the range of the values that became known in each hour."""
    mine = hold(source.con, "audited", pa.table({"stay_id": stay_ids}))
    stays = source.table("icustays").semi_join(mine, "stay_id").distinct()
    window = stays.select("stay_id", "subject_id", begins=_.intime.epoch_seconds(), ends=_.outtime.epoch_seconds())
    found = events.selected(source, declared, config.cache_folder)
    columns = ["stay_id", "itemid", "value", "valuenum", "seconds", "left", "stored", "unstored"]
    published = config.preset == "medfuse"
    both = [_timed(found[name][0], window, name == "labevents", by_clock=published).select(*columns) for name in READ]
    timed = both[0].union(both[1])
    step = 3600 * config.step_hours
    if published:
        rows = [(item, n) for n, p in enumerate(medfuse.published(declared)) for item in p.items]
        table = pa.Table.from_pandas(pd.DataFrame(rows, columns=["itemid", "channel"]), preserve_index=False)
        used = timed.join(hold(source.con, "audited_items", table), "itemid")
        closed = ibis.greatest(used.seconds - 1, 0)  # bins are closed on the right; values are not compared
        used = used.mutate(bin=closed // step, v=ibis.null("float64"))
    else:
        texts = channels.text_table(source.con, declared)
        read = bins.converted(timed, channels.item_table(source.con, declared), texts)
        used = read.filter(_.fate == "used").select("stay_id", "seconds", "stored", "v", "channel", "mark")
        for more in bins.sums(used, declared):
            used = used.union(more.select(*used.columns))
        used = used.mutate(bin=_.seconds // step)
    ranges = used.group_by("stay_id", "channel", bin=_.bin.cast("int64")).agg(low=_.v.min(), high=_.v.max())
    return ranges.select(*RANGE)


def _timed(table: ir.Table, window: ir.Table, lab: bool, *, by_clock: bool) -> ir.Table:
    """When each event of a stay was known, in seconds since intime: a laboratory value when it was stored."""
    known = _.storetime.coalesce(_.charttime) if lab else _.charttime
    read = table.mutate(at=known.epoch_seconds(), stored=_.storetime.epoch_seconds().coalesce(bins.NEVER))
    read = read.filter(_.at.notnull())
    if lab or by_clock:
        read = read.drop("stay_id") if "stay_id" in read.columns else read
        joined = read.join(window, [read.subject_id == window.subject_id, read.at <= window.ends + 3600])
    else:
        joined = read.drop("subject_id").join(window, "stay_id")
    return joined.mutate(seconds=_.at - _.begins, left=_.ends - _.at, unstored=ibis.literal(False))
