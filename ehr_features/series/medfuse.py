"""Preset `medfuse`: the series of the published extraction with all its rules, for comparison.

Input: events, the published cohort. Output: as `bins.extract`, with 59 value columns.
Source: nyuad-cai/MedFuse, mimic4extract (from mimic3-benchmarks), reimplemented from its rules; no code is copied.

Known errors that are kept: urine and other body fluids among glucose and pH; 226707 in inches; FiO2 always / 100; of
values at one time the largest, compared as text if the variable is not cleaned ("87" beats "108"); bins closed on the
right; no valid ranges; laboratory rows without hadm_id are lost; capillary refill and the GCS total are constant.
"""

from __future__ import annotations

from collections.abc import Sequence

import ibis
import ibis.expr.types as ir
import numpy as np
import pandas as pd
import pyarrow as pa
from ibis import _

from ehr_features.raw.engine import hold
from ehr_features.raw.source import Source
from ehr_features.series.bins import Layout
from ehr_features.series.channels import Channel, Published

EPSILON = 1e-6  # hours
POUNDS, FAHRENHEIT = (226531,), (223761,)  # items whose label says so
UNITS = {"text": "", "number": "", "hundredth": "fraction", "saturation": "%", "temperature": "Celsius", "weight": "kg"}


def published(channels: Sequence[Channel]) -> list[Published]:
    """The published variables, in the published order (that of their names, as text)."""
    return [c.medfuse for c in channels if c.medfuse]


def layout(channels: Sequence[Channel]) -> Layout:
    """59 columns: one for a number, one per category for a text."""
    names: list[str] = []
    source: list[int] = []
    category: list[int] = []
    normal: list[float] = []
    for number, p in enumerate(published(channels)):
        for code, text in enumerate(p.categories):
            names.append(f"{p.name}->{text}")
            category.append(code)
            normal.append(float(text == p.normal))
        if not p.categories:
            names.append(p.name)
            category.append(-1)
            normal.append(float(p.normal))
        source += [number] * (len(names) - len(source))
    masks = tuple(f"mask->{p.name}" for p in published(channels))
    units = tuple("" if c >= 0 else UNITS[published(channels)[s].clean] for s, c in zip(source, category, strict=True))
    continuous = tuple(c < 0 for c in category)
    return Layout(tuple(names), units, tuple(source), tuple(category), tuple(normal), masks, continuous)


def lengths(los_hours: np.ndarray, step_hours: int) -> np.ndarray:
    """T of each stay, as published."""
    return np.maximum(np.asarray(los_hours) / step_hours + 1 - EPSILON, 0).astype(np.int64)


def extract(
    source: Source, chart: ir.Table, labs: ir.Table, stays: ir.Table, channels: Sequence[Channel], step_hours: int
) -> tuple[ir.Table, pd.DataFrame]:
    """Last values by bin (stay_id, channel, bin, v, mark, n, unstored), and the number of events by fate."""
    items, codes = _items(source, published(channels)), _codes(source, published(channels))
    events = _validated(chart, labs, stays).join(items, "itemid")
    events = _cleaned(events)
    counts = events.group_by("channel", fate=_.why.coalesce("used")).agg(n=_.count()).to_pandas().assign(unstored=0)
    largest = (
        events.filter(_.why.isnull())
        .group_by("subject_id", "charttime", "channel")
        .agg(text=_.text.max(), number=_.number.max())
    )
    values = largest.left_join(codes, ["channel", "text"])
    number = _.code.coalesce(_.number).coalesce(_.text.try_cast("float64"))
    values = values.select("subject_id", "charttime", "channel", v=number).filter(_.v.notnull())
    placed = _placed(events.filter(_.why.isnull()), stays).join(values, ["subject_id", "charttime"])
    placed = placed.filter((_.seconds >= 0) & (_.seconds < (_.los_hours + EPSILON) * 3600))
    last = ibis.struct({"seconds": _.seconds, "v": _.v}).max()
    width = 3600 * step_hours
    closed = ibis.greatest(_.seconds - 1, 0)  # second 3600 belongs to bin 0
    bins = placed.mutate(bin=(closed // width).cast("int64")).group_by("stay_id", "channel", "bin").agg(last=last)
    one = {"n": ibis.literal(1, "int64"), "unstored": ibis.literal(0, "int64")}
    mark = ibis.literal(0.0, "float64")
    return bins.select("stay_id", "channel", "bin", v=_["last"]["v"], mark=mark, **one), counts


def _items(source: Source, variables: Sequence[Published]) -> ir.Table:
    rows = [(item, number, p.clean) for number, p in enumerate(variables) for item in p.items]
    frame = pd.DataFrame(rows, columns=["itemid", "channel", "clean"])
    return hold(source.con, "medfuse_items", pa.Table.from_pandas(frame, preserve_index=False))


def _codes(source: Source, variables: Sequence[Published]) -> ir.Table:
    rows = [(number, text, float(code)) for number, p in enumerate(variables) for code, text in enumerate(p.categories)]
    frame = pd.DataFrame(rows, columns=["channel", "text", "code"])
    return hold(source.con, "medfuse_codes", pa.Table.from_pandas(frame, preserve_index=False))


def _validated(chart: ir.Table, labs: ir.Table, stays: ir.Table) -> ir.Table:
    """Events with a text, of an admission in the cohort, and of its stay (filled in for laboratory rows)."""
    columns = ["subject_id", "hadm_id", "stay_id", "charttime", "itemid", "value"]
    both = chart.select(*columns).union(labs.mutate(stay_id=ibis.null("int64")).select(*columns))
    both = both.filter(_.value.notnull(), _.hadm_id.notnull(), _.charttime.notnull())
    own = stays.select("hadm_id", own_stay="stay_id")
    both = both.join(own, "hadm_id")
    return both.filter(_.stay_id.isnull() | (_.stay_id == _.own_stay))


def _cleaned(events: ir.Table) -> ir.Table:
    """`text` of variables that stay text, `number` of the others; `why` says why a value is dropped."""
    x = events.value.try_cast("float64").nullif(float("nan"))
    fahrenheit = events.itemid.isin(FAHRENHEIT) | (x >= 79)
    number = ibis.cases(
        (events.clean == "text", ibis.null("float64")),
        (events.clean == "hundredth", x / 100),
        ((events.clean == "saturation") & (x <= 1), x * 100),
        ((events.clean == "temperature") & fahrenheit, (x - 32) * 5 / 9),
        ((events.clean == "weight") & events.itemid.isin(POUNDS), x * 0.453592),
        else_=x,
    )
    text = (events.clean == "text").ifelse(events.value, ibis.null("string"))
    events = events.mutate(number=number, text=text)
    unread = _.text.isnull() & _.number.isnull()
    return events.mutate(why=unread.ifelse("no number", ibis.null("string")))


def _placed(events: ir.Table, stays: ir.Table) -> ir.Table:
    """A subject's charted times, each with every stay that it belongs to: the rows' own, or by the clock."""
    times = events.select("subject_id", "charttime", stay_id="own_stay").distinct()
    window = stays.select("stay_id", "subject_id", "intime", "outtime")
    clock = times.select("subject_id", "charttime").distinct()
    inside = clock.join(
        window,
        [clock.subject_id == window.subject_id, clock.charttime >= window.intime, clock.charttime <= window.outtime],
    ).select("subject_id", "charttime", "stay_id")
    belongs = times.select("subject_id", "charttime", "stay_id").union(inside, distinct=True)
    start = stays.select("stay_id", "los_hours", begins=_.intime.epoch_seconds())
    belongs = belongs.join(start, "stay_id")
    return belongs.mutate(seconds=_.charttime.epoch_seconds() - _.begins)
