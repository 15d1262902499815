"""Events -> hourly series, and the reader of what was written.

Comes in: events of the cohort's subjects, the stays, the variables. Goes out: for each stay (T, F) values, forward
filled, then the variable's normal value, not normalised; and (T, number of variables) observed. Bin h is [h, h +
step) hours after intime, T = ceil(los_hours / step). A chart event counts from its charttime, a laboratory value from
its storetime (from its charttime where that is empty; counted). Of several values at one time the latest storetime
wins, then the larger value; of several times in a bin the last.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import ibis
import ibis.expr.types as ir
import numpy as np
import pandas as pd
from ibis import _

from ehr_features.raw.source import Source
from ehr_features.series.channels import Channel, item_table, text_table

NEVER = -(2**62)  # a storetime that is missing is older than any other


@dataclass(frozen=True)
class Layout:
    """The columns of a series.

    values: names, in order. source: for each, the variable whose last value it shows. category: for each, the code
    that it is one-hot for, or -1: the number itself; -2: the variable's mark. normal: what stands before the first
    value.
    """

    values: tuple[str, ...]
    units: tuple[str, ...]
    source: tuple[int, ...]
    category: tuple[int, ...]
    normal: tuple[float, ...]
    observed: tuple[str, ...]
    normalised: tuple[bool, ...]


def layout(channels: Sequence[Channel]) -> Layout:
    """The columns of preset `default`: each variable, with its mark behind it where it has one."""
    rows: list[tuple[str, str, int, int, float, bool]] = []
    for number, channel in enumerate(channels):
        rows.append(
            (channel.name, channel.unit, number, -1, channel.normal, channel.range != (0, 1) or not channel.text)
        )
        rows += [(name, "1 = yes", number, -2, 0.0, False) for name in channel.mark]
    names, units, source, category, normal, normalised = zip(*rows, strict=True)
    return Layout(names, units, source, category, normal, tuple(f"mask->{c.name}" for c in channels), normalised)


def timed(chart: ir.Table, labs: ir.Table, stays: ir.Table) -> ir.Table:
    """Give each event its stay and the time from which it counts.

    Args:
        chart: chartevents. labs: labevents (no stay_id; linked by subject and time, whatever their hadm_id).
        stays: stay_id, subject_id, intime, outtime.
    Returns: stay_id, itemid, value, valuenum, seconds (since intime), stored (epoch seconds), unstored (a laboratory
        value
        without storetime).
    """
    window = stays.select("stay_id", "subject_id", begins=_.intime.epoch_seconds(), ends=_.outtime.epoch_seconds())
    chart = chart.select(
        "stay_id", "itemid", "value", "valuenum", at=_.charttime.epoch_seconds(), stored=_.storetime.epoch_seconds()
    )
    chart = chart.join(window, "stay_id")
    known = labs.select(
        "subject_id",
        "itemid",
        "value",
        "valuenum",
        at=_.storetime.coalesce(_.charttime).epoch_seconds(),
        stored=_.storetime.epoch_seconds(),
    ).filter(_.at.notnull())
    known = known.join(
        window, [known.subject_id == window.subject_id, known.at >= window.begins, known.at <= window.ends]
    )
    columns = ["stay_id", "itemid", "value", "valuenum", "at", "begins", "ends", "stored"]
    both = chart.select(*columns, lab=ibis.literal(False)).union(known.select(*columns, lab=ibis.literal(True)))
    return both.select(
        "stay_id",
        "itemid",
        "value",
        "valuenum",
        seconds=_.at - _.begins,
        left=_.ends - _.at,
        stored=_.stored.coalesce(NEVER),
        unstored=_.lab & _.stored.isnull(),
    )


def converted(events: ir.Table, items: ir.Table, texts: ir.Table) -> ir.Table:
    """Convert units, read texts, and say what becomes of each event.

    Returns: stay_id, channel, seconds, stored, v (in the variable's unit), mark (0 or 1), fate (`used`, or why not),
        unstored.
    """
    events = events.join(items, "itemid")
    events = events.mutate(text=ibis.cases((_.textual, _.value.strip().lower())))
    read = events.left_join(texts, [events.channel == texts.channel, events.text == texts.text])
    number = _.number.coalesce((_.valuenum > _.above).ifelse(_.valuenum * _.factor + _["add"], _.valuenum))
    read = read.mutate(v=number, marked=(_.text == _["mark"].strip().lower()).fill_null(False).cast("int64"))
    fate = ibis.cases(
        (_.seconds.isnull(), "no charttime"),
        (_.v.isnull() | _.v.isnan(), "no number"),
        (~_.v.between(_.low, _.high), "out of range"),
        (_.seconds < 0, "before intime"),
        (_.left < 0, "after outtime"),
        else_="used",
    )
    read = read.mutate(fate=fate)
    return read.select("stay_id", "channel", "seconds", "stored", "v", "fate", "unstored", mark=_.marked)


def sums(used: ir.Table, channels: Sequence[Channel]) -> list[ir.Table]:
    """The variables that are sums of others, where all parts share a time."""
    out = []
    for number, channel in enumerate(channels):
        if not channel.sum_of:
            continue
        parts = [n for n, c in enumerate(channels) if c.name in channel.sum_of]
        last = ibis.struct({"stored": _.stored, "v": _.v}).max()
        each = used.filter(_.channel.isin(parts)).group_by("stay_id", "seconds", "channel").agg(last=last)
        each = each.select("stay_id", "seconds", stored=_["last"]["stored"], v=_["last"]["v"])
        whole = each.group_by("stay_id", "seconds").agg(stored=_.stored.max(), v=_.v.sum(), parts=_.count())
        whole = whole.filter((_.parts == len(parts)) & _.v.between(*channel.range))
        out.append(
            whole.select(
                "stay_id",
                "seconds",
                "stored",
                "v",
                channel=ibis.literal(number, "int64"),
                mark=ibis.literal(0, "int64"),
            )
        )
    return out


def binned(used: ir.Table, step_hours: int) -> ir.Table:
    """The last value of each variable in each bin: stay_id, channel, bin, v, mark."""
    last = ibis.struct({"seconds": _.seconds, "stored": _.stored, "v": _.v, "mark": _["mark"]}).max()
    bins = used.mutate(bin=(_.seconds // (3600 * step_hours)).cast("int64"))
    bins = bins.group_by("stay_id", "channel", "bin").agg(last=last)
    return bins.select("stay_id", "channel", "bin", v=_["last"]["v"], mark=_["last"]["mark"].cast("float64"))


def extract(
    source: Source, chart: ir.Table, labs: ir.Table, stays: ir.Table, channels: Sequence[Channel], step_hours: int
) -> tuple[ir.Table, pd.DataFrame]:
    """Preset `default`: last values by bin, and how many events met which fate.

    Returns: stay_id, channel, bin, v, mark; and a small table of counts: channel, fate, n, unstored.
    """
    items, texts = item_table(source.con, tuple(channels)), text_table(source.con, tuple(channels))
    events = converted(timed(chart, labs, stays), items, texts)
    counts = events.group_by("channel", "fate").agg(n=_.count(), unstored=_.unstored.cast("int64").sum()).to_pandas()
    used = events.filter(_.fate == "used").select("stay_id", "seconds", "stored", "v", "channel", "mark")
    for more in sums(used, channels):
        used = used.union(more.select(*used.columns))
    return binned(used, step_hours), counts


def lengths(los_hours: np.ndarray, step_hours: int) -> np.ndarray:
    """T of each stay: ceil(los_hours / step_hours), to the second."""
    seconds = np.round(np.asarray(los_hours) * 3600).astype(np.int64)
    return -(-seconds // (3600 * step_hours))
