"""Bin events into hourly series.

Input: events of the cohort's subjects, the stays, the variables. Output: for each stay (T, F) unnormalised values,
carried forward, with the variable's normal value before the first; and (T, number of variables) observed. Bin h is
[h, h + step) hours after intime, T = ceil(los_hours / step). A value counts from the time at which it was known
(`known_events`); a value without such a time is left out and counted. A bin has its latest value; of values at one
time the one with the latest storetime, then the larger one.
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
from ehr_features.series.channels import SPECIMEN_TYPE, Channel, copy_table, item_table, specimen_table, text_table

NEVER = -(2**62)  # a missing storetime is older than any other
PLAIN_NUMBER = r"^[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)$"


@dataclass(frozen=True)
class Layout:
    """The columns of a series.

    values: names, in order. source: for each, the index of its variable. category: for each, the code for which it is
    one-hot, or -1: the number itself; -2: the variable's mark. normal: the value before the first measurement.
    """

    values: tuple[str, ...]
    units: tuple[str, ...]
    source: tuple[int, ...]
    category: tuple[int, ...]
    normal: tuple[float, ...]
    observed: tuple[str, ...]
    normalised: tuple[bool, ...]


def layout(channels: Sequence[Channel]) -> Layout:
    """The columns of preset `default`: each variable, followed by its mark if it has one."""
    rows: list[tuple[str, str, int, int, float, bool]] = []
    for number, channel in enumerate(channels):
        rows.append(
            (channel.name, channel.unit, number, -1, channel.normal, channel.range != (0, 1) or not channel.text)
        )
        rows += [(name, "1 = yes", number, -2, 0.0, False) for name in channel.mark]
    names, units, source, category, normal, normalised = zip(*rows, strict=True)
    return Layout(names, units, source, category, normal, tuple(f"mask->{c.name}" for c in channels), normalised)


def read_values(table: ir.Table, items: ir.Table, texts: ir.Table) -> ir.Table:
    """Read the number of each event in the unit of its variable.

    Args:
        table: chartevents or labevents. items, texts: the results of `item_table` and `text_table`.
    Returns: the table's rows of the variables' items, with v, marked (0 or 1), drawn and stored (epoch seconds).
    """
    events = table.join(items, "itemid")
    events = events.mutate(plain=_.value.strip(), text=ibis.cases((_.textual, _.value.strip().lower())))
    read = events.left_join(texts, [events.channel == texts.channel, events.text == texts.text])
    is_plain = ~_.coded & _.plain.re_search(PLAIN_NUMBER)
    charted = ibis.cases((_.valuenum.notnull(), _.valuenum), (is_plain, _.plain.try_cast("float64")))
    read = read.mutate(charted=charted)
    number = _.number.coalesce((_.charted > _.above).ifelse(_.charted * _.factor + _["add"], _.charted))
    return read.mutate(
        v=number.nullif(float("nan")),
        marked=(_.text == _["mark"].strip().lower()).fill_null(False).cast("int64"),
        drawn=_.charttime.epoch_seconds().cast("int64"),
        stored=_.storetime.epoch_seconds().cast("int64"),
    )


def with_specimen(results: ir.Table, labs: ir.Table, allowed: ir.Table) -> ir.Table:
    """Add `specimen`: null if the kind of specimen is allowed, else the reason for leaving the result out."""
    kinds = labs.filter(_.itemid == SPECIMEN_TYPE).mutate(kind=_.value.strip().re_replace(r"[ .]+$", "").upper())
    kinds = kinds.group_by("subject_id", "specimen_id").agg(kind=_.kind.max(), n=_.kind.nunique())
    results = results.left_join(kinds.filter(_.n == 1), ["subject_id", "specimen_id"])
    results = results.mutate(kind=_.kind.coalesce("UNKNOWN"))
    allowed = allowed.select(of="channel", which="kind")
    results = results.left_join(allowed, [results.channel == allowed.of, results.kind == allowed.which])
    why = (_.kind == "UNKNOWN").ifelse("unknown specimen", "other specimen")
    return results.mutate(specimen=ibis.cases((_.restricted & _.which.isnull(), why)))


def reports(results: ir.Table, copies: ir.Table) -> ir.Table:
    """Report times of the results that a chart item copies: subject_id, itemid (of the copy), drawn, v, reported_at
    (null: never), elsewhere (all rows have known kinds of specimen, none of them allowed)."""
    rows = results.filter(_.v.notnull()).rename(lab="itemid")
    rows = rows.join(copies, rows.lab == copies.copied)
    other = (_.specimen == "other specimen").fill_null(False).cast("int64")
    at = ibis.cases((_.stored.notnull(), ibis.greatest(_.drawn, _.stored)))  # greatest() skips nulls
    return rows.group_by("subject_id", "itemid", "drawn", "v").agg(reported_at=at.min(), elsewhere=other.min())


def known_events(con: object, chart: ir.Table, labs: ir.Table, channels: Sequence[Channel]) -> ir.Table:
    """Every event of the variables with its value and the time from which it counts.

    Bedside measurements count from charttime. Laboratory results count from the later of charttime and storetime; a
    copy in chartevents without a storetime counts from the report of the laboratory row that it copies.

    Returns: stay_id (null: of labevents), subject_id, channel, drawn, at (null: no time known), stored, v, marked, low,
        high, specimen (why it is left out, or null), unstored (a reported value without a storetime of its own).
    """
    channels = tuple(channels)
    items, texts = item_table(con, channels), text_table(con, channels)
    results = with_specimen(read_values(labs, items, texts), labs, specimen_table(con, channels))
    copied = reports(results, copy_table(con, channels))
    charted = read_values(chart, items, texts).left_join(copied, ["subject_id", "itemid", "drawn", "v"])
    other = ibis.cases((_.restricted & (_.elsewhere == 1), "other specimen"))
    columns = ["stay_id", "subject_id", "channel", "drawn", "stored", "v", "marked", "low", "high", "reported"]
    columns += ["specimen", "reported_at"]
    results = results.mutate(stay_id=ibis.null("int64"), reported_at=ibis.null("int64"))
    both = charted.mutate(specimen=other).select(*columns).union(results.select(*columns))
    first = _.drawn.coalesce(_.stored)
    report = ibis.greatest(first, _.stored.coalesce(_.reported_at))
    unknown = _.stored.isnull() & _.reported_at.isnull()
    both = both.mutate(
        at=ibis.cases((~_.reported, _.drawn), (unknown, ibis.null("int64")), else_=report),
        drawn=first,
        unstored=_.reported & _.stored.isnull(),
    )
    return both.mutate(stored=_.stored.coalesce(_.reported.ifelse(_.at, NEVER), NEVER))


def of_stays(events: ir.Table, stays: ir.Table) -> ir.Table:
    """Give each event its stay: that of its row, or for laboratory rows the subject's stay at that time, whatever their
    hadm_id. Adds seconds (since intime; null: no time known), left (until outtime), lived (until death)."""
    death = _.death_at.epoch_seconds() if "death_at" in stays.columns else ibis.null("int64")
    window = stays.select(
        "stay_id", "subject_id", begins=_.intime.epoch_seconds(), ends=_.outtime.epoch_seconds(), dies=death
    )
    own = events.filter(_.stay_id.notnull()).join(window.drop("subject_id"), "stay_id")
    others = events.filter(_.stay_id.isnull()).drop("stay_id")
    during = [others.drawn <= window.ends, others.at.coalesce(others.drawn) >= window.begins]
    others = others.join(window, [others.subject_id == window.subject_id, *during])
    both = own.union(others.select(*own.columns))
    return both.mutate(seconds=_.at - _.begins, left=_.ends - _.at, lived=_.dies - _.at)


def with_fate(events: ir.Table, step_hours: int) -> ir.Table:
    """Add `fate` to each event: `used`, or why it is left out."""
    width = 3600 * step_hours
    fate = ibis.cases(
        (_.drawn.isnull() | (_.seconds.isnull() & ~_.reported), "no charttime"),
        (_.v.isnull(), "no number"),
        (~_.v.between(_.low, _.high), "out of range"),
        (_.specimen.notnull(), _.specimen),
        (_.seconds.isnull(), "no report time"),
        (_.seconds < 0, "before intime"),
        (_.left < 0, "after outtime"),
        ((_.left == 0) & (_.seconds % width == 0), "at outtime"),  # a bin would begin there
        (_.lived < 0, "after death"),
        else_="used",
    )
    return events.mutate(fate=fate)


def sums(used: ir.Table, channels: Sequence[Channel], of: Sequence[str] = ("stay_id",)) -> list[ir.Table]:
    """Variables that are sums of others, at times when all parts are present.

    Args:
        used: `of`, channel, seconds, stored, v. of: the columns that name a stay or film.
    """
    out = []
    for number, channel in enumerate(channels):
        if not channel.sum_of:
            continue
        parts = [n for n, c in enumerate(channels) if c.name in channel.sum_of]
        last = ibis.struct({"stored": _.stored, "v": _.v}).max()
        each = used.filter(_.channel.isin(parts)).group_by(*of, "seconds", "channel").agg(last=last)
        each = each.select(*of, "seconds", stored=_["last"]["stored"], v=_["last"]["v"])
        whole = each.group_by(*of, "seconds").agg(stored=_.stored.max(), v=_.v.sum(), parts=_.count())
        whole = whole.filter((_.parts == len(parts)) & _.v.between(*channel.range))
        out.append(
            whole.select(
                *of,
                "seconds",
                "stored",
                "v",
                channel=ibis.literal(number, "int64"),
                marked=ibis.literal(0, "int64"),
                unstored=ibis.literal(False),
            )
        )
    return out


def binned(used: ir.Table, step_hours: int) -> ir.Table:
    """The last value of each variable in each bin: stay_id, channel, bin, n (events), v, mark, unstored."""
    names = ("seconds", "stored", "v", "marked", "unstored")
    bins = used.mutate(bin=(_.seconds // (3600 * step_hours)).cast("int64"))
    bins = bins.group_by("stay_id", "channel", "bin").agg(
        last=ibis.struct({name: used[name] for name in names}).max(), n=_.count()
    )
    last = {"v": _["last"]["v"], "mark": _["last"]["marked"].cast("float64")}
    return bins.select("stay_id", "channel", "bin", "n", **last, unstored=_["last"]["unstored"].cast("int64"))


def extract(
    source: Source, chart: ir.Table, labs: ir.Table, stays: ir.Table, channels: Sequence[Channel], step_hours: int
) -> tuple[ir.Table, pd.DataFrame]:
    """Preset `default`: last values by bin, and the number of events by fate.

    Returns: stay_id, channel, bin, v, mark, n, unstored; and a small table of counts: channel, fate, n, unstored.
    """
    chart = chart.filter(_.stay_id.notnull())  # the others are counted by `coverage.without_stay`
    events = with_fate(of_stays(known_events(source.con, chart, labs, channels), stays), step_hours)
    counts = events.group_by("channel", "fate").agg(n=_.count(), unstored=_.unstored.cast("int64").sum()).to_pandas()
    used = events.filter(_.fate == "used")
    used = used.select("stay_id", "seconds", "stored", "v", "channel", "marked", "unstored")
    for more in sums(used, channels):
        used = used.union(more.select(*used.columns))
    return binned(used, step_hours), counts


def lengths(los_hours: np.ndarray, step_hours: int) -> np.ndarray:
    """T of each stay: ceil(los_hours / step_hours), to the second."""
    seconds = np.round(np.asarray(los_hours) * 3600).astype(np.int64)
    return -(-seconds // (3600 * step_hours))
