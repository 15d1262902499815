"""The audit of the series: compare them with the raw events.

An observed value must be that of an event in this stay and hour, charted or, for a laboratory result, reported by the
end of the hour, and of a specimen that the variable allows. A value that was not observed must equal the one before it,
or the normal value. channels.yaml gives units, ranges and specimens. Queries in this file derive from the raw tables
and d_items what is a laboratory result and when it was known.

Differs for preset `medfuse`: its published rule counts a laboratory value from its draw. The audit checks that rule and
counts the values from before their report.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
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

from ehr_features.audit.verdict import Verdict, cannot, decide
from ehr_features.config import FeaturesConfig
from ehr_features.raw.engine import batches, hold
from ehr_features.raw.source import Source
from ehr_features.series import bins, channels, events, medfuse
from ehr_features.series.channels import SPECIMEN_TYPE
from ehr_features.series.file import fit
from ehr_features.series.mapped import Mapped, by_stays
from ehr_features.typed import read_json
from ehr_features.typed.shapes import Series

KNOWN = "no vital sign or laboratory value is from after its hour"
FILLED = "values that were not observed are carried forward, never back"
DECLARED = "the series has the declared variables only"
FITTED = "the normaliser is fitted on train only"
ODD = "series.safetensors has other columns than declared"
READ = ("chartevents", "labevents")


def check_series(features: Path, stays: pd.DataFrame, config: FeaturesConfig) -> list[Verdict]:
    """Verdicts on series.safetensors and series.json that need no raw table."""
    about, layout = read_json(features / "series.json", Series), _layout(config)
    wanted = [*layout.values, *layout.observed]
    other = sum(ours != theirs for ours, theirs in zip_longest(about["columns"], wanted))
    more = abs(sum(_widths(_file(features))) - len(wanted))
    bad = {"columns that are not the declared ones": other, "columns more or fewer in the file than declared": more}
    declared = decide(DECLARED, bad, f"{len(wanted)} columns")
    fitted = cannot(FITTED, ODD) if more else _fitted(_file(features), about, layout, stays)
    return [check_carried(features), declared, fitted]


def _file(features: Path) -> Path:
    return Mapped(features).path


def _widths(path: Path) -> tuple[int, int]:
    with safe_open(path, "numpy") as file:
        return tuple(file.get_slice(name).get_shape()[1] for name in ("values", "observed"))


def _layout(config: FeaturesConfig) -> bins.Layout:
    return (medfuse if config.preset == "medfuse" else bins).layout(channels.read_channels(config.channels))


def check_carried(features: Path) -> Verdict:
    """A value that was not observed equals the value before it, or the normal value."""
    path, about = _file(features), read_json(features / "series.json", Series)
    normal, of = np.array(about["imputation"]["normal"], np.float32), np.array(about["observed_of"])
    if len(normal) != len(of) or _widths(path)[0] != len(of) or of.max() >= _widths(path)[1]:
        return cannot(FILLED, ODD)
    wrong = cells = 0
    for part in by_stays(path):
        v, seen = part.values, part.observed[:, of] == 1
        before = np.vstack([normal[None], v[:-1]])[: len(v)]
        before[part.edges[:-1][np.diff(part.edges) > 0]] = normal
        wrong += int(((v != before) & ~seen).sum())
        cells += int((~seen).sum())
    return decide(FILLED, {"values used before they were observed": wrong}, f"{cells} values not observed")


def _fitted(path: Path, about: dict[str, Any], layout: bins.Layout, stays: pd.DataFrame) -> Verdict:
    train = stays.sort_values("stay_id")["split"].eq("train").to_numpy()
    wanted, bad = fit(path, layout, train), 0
    for key in ("mean", "std"):
        for ours, theirs in zip(wanted[key], about["normaliser"][key], strict=True):
            same = ours is theirs if ours is None or theirs is None else bool(np.isclose(ours, theirs, rtol=1e-5))
            bad += not same
    return decide(
        FITTED, {"means or deviations that differ from those of train": bad}, f"{int(train.sum())} train stays"
    )


def check_known(features: Path, source: Source, config: FeaturesConfig) -> Verdict:
    """Every observed value has an event that was known by the end of its hour and has an allowed specimen."""
    path, layout, declared = _file(features), _layout(config), channels.read_channels(config.channels)
    if _widths(path) != (len(layout.values), len(layout.observed)):
        return cannot(KNOWN, ODD)
    with safe_open(path, "numpy") as file:
        stay_ids = file.get_tensor("stay_id")
    number = {s: f for f, s in enumerate(layout.source) if layout.category[f] == -1}
    column = np.array([number.get(s, -1) for s in range(len(layout.observed))])
    bad, total = dict.fromkeys(WHY, 0), 0
    ranges = of_stays(batches(source.con, _ranges(source, config, declared, stay_ids).order_by("stay_id")), RANGE)
    for part in by_stays(path):
        mine, observed = stay_ids[part.stays], part.observed == 1
        explained = {why: np.zeros_like(observed) for why in WHY}
        for stay, channel, at, low, high, why in ranges(mine):
            place = np.searchsorted(mine, stay)
            inside = (at >= 0) & (at < np.diff(part.edges)[place])
            row = part.edges[place] + at
            row, channel, low, high, why = (x[inside] for x in (row, channel, low, high, why))
            v, slack = part.values[row, column[channel]], 1e-4 * np.maximum(np.abs(high), 1)
            fits = np.isnan(low) | (column[channel] < 0) | ((v >= low - slack) & (v <= high + slack))
            for name, cells in explained.items():
                cells[row[fits & (why == name)], channel[fits & (why == name)]] = True
        rest, total = observed & ~explained.pop("known"), total + int(observed.sum())
        for name, cells in explained.items():
            bad[name] += int((rest & cells).sum())
            rest &= ~cells
        bad["known"] += int(rest.sum())
    bad = {WHY[name]: bad[name] for name in ("specimen", "early", "known")}
    counts = f"{total} observed values of {len(stay_ids)} stays"
    if config.preset == "medfuse":
        counts += f"; laboratory values from their draw, as published: {bad.pop(WHY['early'])} from before their report"
    return decide(KNOWN, bad, counts)


def of_stays(
    found: Iterator[pa.RecordBatch], names: Sequence[str]
) -> Callable[[np.ndarray], Iterator[list[np.ndarray]]]:
    """Read a table in order of `stay_id` along with its stays: call the result with the next stays (sorted)."""
    rest: list[pa.RecordBatch] = []

    def upto(stays: np.ndarray) -> Iterator[list[np.ndarray]]:
        while (batch := rest.pop() if rest else next(found, None)) is not None:
            cut = int(np.searchsorted(batch.column("stay_id").to_numpy(), stays[-1], "right"))
            if cut:
                yield [batch.slice(0, cut).column(name).to_numpy(zero_copy_only=False) for name in names]
            if cut < len(batch):
                rest.append(batch.slice(cut))
                return

    return upto


RANGE = ("stay_id", "channel", "bin", "low", "high", "why")
WHY = {  # what an observed value is, if no other event explains it
    "known": "observed values without an event that was known by then",
    "specimen": "observed values of a specimen that the variable does not allow",
    "early": "observed values from before their source was reported",
}


def _ranges(
    source: Source, config: FeaturesConfig, declared: tuple[channels.Channel, ...], stay_ids: np.ndarray
) -> ir.Table:
    """stay_id, channel, bin, low, high, why: the range of the values of each hour, by their kind (`WHY`)."""
    mine = hold(source.con, "audited", pa.table({"stay_id": stay_ids}))
    stays = source.table("icustays").semi_join(mine, "stay_id").distinct()
    window = stays.select("stay_id", "subject_id", begins=_.intime.epoch_seconds(), ends=_.outtime.epoch_seconds())
    found = events.selected(source, channels.read_variables(config.channels), config.cache_folder)
    published = config.preset == "medfuse"
    items = _published_items(source.con, declared) if published else channels.item_table(source.con, declared)
    timed = dated(source, found["chartevents"][0], found["labevents"][0], items, declared)
    own = timed.filter(_.stay_id.notnull() & ~ibis.literal(published)).join(window.drop("subject_id"), "stay_id")
    others = timed.filter(_.stay_id.isnull() | ibis.literal(published)).drop("stay_id")
    others = others.join(window, [others.subject_id == window.subject_id, others.drawn <= window.ends + 3600])
    timed = own.union(others.select(*own.columns))
    known = timed.mutate(at=_.known, why=_.counts.ifelse("known", "specimen"))
    early = timed.filter(_.known.isnull() | (_.known > _.drawn)).mutate(at=_.drawn, why=ibis.literal("early"))
    used = known.union(early).filter(_.at.between(_.begins, _.ends) & _.v.between(_.low, _.high))
    used = used.mutate(seconds=_.at - _.begins)
    cells = used.select("stay_id", "channel", "seconds", "why", low="v", high="v")
    for channel in (n for n, c in enumerate(declared) if c.sum_of and not published):
        cells = cells.union(_sums(cells, declared, channel))
    step = 3600 * config.step_hours
    if published:  # bins are closed on the right; values are not compared
        cells = cells.mutate(seconds=ibis.greatest(_.seconds - 1, 0), low=ibis.null("float64"))
    ranges = cells.group_by("stay_id", "channel", "why", bin=(_.seconds // step).cast("int64"))
    return ranges.agg(low=_.low.min(), high=_.high.max()).select(*RANGE)


def _published_items(con: object, declared: tuple[channels.Channel, ...]) -> ir.Table:
    rows = [(item, n) for n, p in enumerate(medfuse.published(declared)) for item in p.items]
    frame = pd.DataFrame(rows, columns=["itemid", "channel"])
    frame = frame.assign(factor=1.0, add=0.0, above=-1e300, low=-1e300, high=1e300, restricted=False, coded=False)
    return hold(con, "audited_items", pa.Table.from_pandas(frame, preserve_index=False))


def dated(
    source: Source, chart: ir.Table, labs: ir.Table, items: ir.Table, declared: tuple[channels.Channel, ...]
) -> ir.Table:
    """Every event with v, drawn, known (null: never), report (of its storetime) and counts (whether its specimen is
    allowed).

    Chart items are laboratory results if their category in d_items is Labs (except finger sticks). A chart value
    without storetime is matched to the variable's laboratory rows. channels.yaml is used for neither.
    """
    texts = channels.text_table(source.con, declared)
    labels = source.table("d_items").distinct()
    labs_, chart_ = read_numbers(labs, items, texts), read_numbers(chart, items, texts)
    types = labs.filter(_.itemid == SPECIMEN_TYPE).select("specimen_id", kind=_.value.upper().replace(".", "").strip())
    allowed = channels.specimen_table(source.con, declared).rename(of="channel", which="kind")
    labs_ = labs_.left_join(types.distinct(), "specimen_id").mutate(kind=_.kind.coalesce("UNKNOWN"))
    labs_ = labs_.left_join(allowed, [labs_.channel == allowed.of, labs_.kind == allowed.which])
    labs_ = labs_.mutate(counts=~_.restricted | _.which.notnull(), known=_.report)
    same = ["subject_id", "channel", "drawn", "v"]
    vague = (_.counts | (_.kind == "UNKNOWN")).cast("int64")
    copied = labs_.filter(_.v.notnull()).group_by(*same).agg(known=_.known.min(), any_counts=vague.max())
    results = labels.filter((_.category == "Labs") & ~_.label.lower().contains("finger")).select(result="itemid")
    chart_ = chart_.left_join(results.distinct(), chart_.itemid == results.result).left_join(copied, same)
    chart_ = chart_.mutate(
        counts=~_.restricted | _["result"].isnull() | (_.any_counts.fill_null(1) == 1),
        known=ibis.cases((_["result"].isnull(), _.drawn), else_=_.report.coalesce(_.known)),
    )
    columns = ["stay_id", "subject_id", "channel", "drawn", "known", "report", "counts", "v", "low", "high"]
    return chart_.select(*columns).union(labs_.mutate(stay_id=ibis.null("int64")).select(*columns))


def read_numbers(table: ir.Table, items: ir.Table, texts: ir.Table) -> ir.Table:
    """The events of the items with v (in the declared unit), drawn, and report (the storetime, at least drawn)."""
    rows = table.join(items, "itemid").mutate(word=_.value.lower().strip())
    texts = texts.rename(text_of="channel")
    rows = rows.left_join(texts, [rows.channel == texts.text_of, rows.word == texts.text])
    digits = _.word.re_search("^[-+.0-9]+$") & ~_.coded
    raw = _.number.coalesce(_.valuenum, digits.ifelse(_.word.try_cast("float64"), ibis.null("float64")))
    rows = rows.mutate(raw=raw, drawn=_.charttime.epoch_seconds().cast("int64"))
    stored = _.storetime.epoch_seconds().cast("int64")
    return rows.filter(_.drawn.notnull()).mutate(
        v=(_.number.isnull() & (_.raw > _.above)).ifelse(_.raw * _.factor + _["add"], _.raw),
        report=ibis.cases((stored.notnull(), (stored > _.drawn).ifelse(stored, _.drawn))),
    )


def _sums(cells: ir.Table, declared: tuple[channels.Channel, ...], channel: int) -> ir.Table:
    """The sums of a variable's parts at times when all of them were charted."""
    parts = [n for n, c in enumerate(declared) if c.name in declared[channel].sum_of]
    each = cells.filter(_.channel.isin(parts) & (_.why == "known")).group_by("stay_id", "seconds", "channel")
    each = each.agg(low=_.low.min(), high=_.high.max()).group_by("stay_id", "seconds")
    sums = each.agg(low=_.low.sum(), high=_.high.sum(), n=_.count()).filter(_.n == len(parts))
    return sums.mutate(channel=ibis.literal(channel, "int64"), why=ibis.literal("known")).select(*cells.columns)
