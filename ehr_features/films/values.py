"""The last values of vital signs and laboratory before each film: the groups `vitals` and `labs` of images.parquet.

Input: linked films, and the filtered events of every variable of channels.yaml. Output: for each film and variable the
last value and the hours since it was charted. A value counts if it was charted in the window before the film and stored
before the film: by its storetime, or without one by the rules of the series (bedside values from charttime, laboratory
results from the report of the row that they copy; else never). Vital signs of the emergency department have a charttime
only. Units, valid ranges and specimens are those of the series. Of values charted at one time the one stored last
counts, then the larger one.

Films and events are joined on the subject and on spans of the window's length, so that each film meets only the events
of two spans.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import ibis
import ibis.expr.types as ir
from ibis import _

from ehr_features.films.metadata import held
from ehr_features.schema import REAL, Column
from ehr_features.series import bins
from ehr_features.series.channels import CONVERSIONS, Channel

if TYPE_CHECKING:
    from ehr_features.raw.source import Source

BEFORE = 10**10  # seconds added to times, so that they are positive


def columns(variables: Sequence[Channel]) -> dict[str, Column]:
    """The columns of the groups, as schema.json has them: GROUP_VARIABLE and GROUP_VARIABLE_hours."""
    out = {}
    for variable in variables:
        out[variable.column] = Column(REAL, variable.unit, variable.group)
        out[f"{variable.column}_hours"] = Column(REAL, "hours since it was charted", variable.group)
    return out


def last_values(
    source: Source,
    films: ir.Table,
    found: Mapping[str, tuple[ir.Table, int]],
    variables: Sequence[Channel],
    window_hours: float,
) -> ir.Table:
    """The last known values of each film.

    Args:
        films: dicom_id, subject_id, taken_at, ... found: the result of `events.selected`.
    Returns: dicom_id and `columns(variables)`; films with at least one value only.
    """
    seen = _in_window(films, _known(source, found, variables), round(window_hours * 3600))
    for more in _sums(seen, variables):
        seen = seen.union(more.select(*seen.columns))
    names = ("drawn", "stored", "v")
    last = seen.group_by("dicom_id", "channel").agg(
        last=ibis.struct({name: seen[name] for name in names}).max(), taken=_.taken.max()
    )
    last = last.select(
        "dicom_id", "channel", v=_["last"]["v"], since=(_.taken - _["last"]["drawn"]).cast("float64") / 3600
    )
    wide = {}
    for n, variable in enumerate(variables):
        wide[variable.column] = last.v.max(where=last.channel == n)
        wide[f"{variable.column}_hours"] = last.since.max(where=last.channel == n)
    return held(source, last.group_by("dicom_id").agg(**wide))


def _known(source: Source, found: Mapping[str, tuple[ir.Table, int]], variables: Sequence[Channel]) -> ir.Table:
    """Every valid value: subject_id, channel, drawn, known (from when it counts), stored, v."""
    chart, labs = (found[name][0].filter(_.charttime.notnull()) for name in ("chartevents", "labevents"))
    events = bins.known_events(source.con, chart, labs, variables)
    events = events.filter(_.at.notnull() & _.v.between(_.low, _.high) & _.specimen.isnull())
    columns = ["subject_id", "channel", "drawn", "known", "stored", "v"]
    events = events.mutate(known=ibis.greatest(_.at, _.stored)).select(*columns)
    for more in _emergency(source, variables):
        events = events.union(more.select(*columns))
    return events


def _emergency(source: Source, variables: Sequence[Channel]) -> list[ir.Table]:
    """Values of MIMIC-IV-ED's vitalsign, a table for each of its columns."""
    if not source.has("vitalsign"):
        return []
    signs, out = source.table("vitalsign"), []
    for n, variable in enumerate(variables):
        for name, conversion in variable.emergency.items():
            c = CONVERSIONS[conversion] if isinstance(conversion, str) else conversion
            raw, drawn = signs[name], signs.charttime.epoch_seconds().cast("int64")
            rows = signs.select(
                "subject_id",
                channel=ibis.literal(n, "int64"),
                drawn=drawn,
                known=drawn,
                stored=drawn,
                v=(raw > c.above).ifelse(raw * c.factor + c.add, raw),
            )
            out.append(rows.filter(_.drawn.notnull() & _.v.between(*variable.range)))
    return out


def _in_window(films: ir.Table, events: ir.Table, window: int) -> ir.Table:
    """Events charted in the window before a film and known before it: dicom_id, taken, channel, drawn, stored, v."""
    timed = films.filter(_.taken_at.notnull()).select(
        "dicom_id", "subject_id", taken=_.taken_at.epoch_seconds().cast("int64")
    )
    span = ((timed.taken + BEFORE) // window).cast("int64")
    timed = timed.mutate(span=span).union(timed.mutate(span=span - 1))
    events = events.mutate(span=((_.drawn + BEFORE) // window).cast("int64"))
    pairs = timed.join(
        events,
        [
            timed.subject_id == events.subject_id,
            timed.span == events.span,
            events.drawn >= timed.taken - window,
            events.known < timed.taken,
        ],
    )
    return pairs.select("dicom_id", "taken", "channel", "drawn", "stored", "v")


def _sums(seen: ir.Table, variables: Sequence[Channel]) -> list[ir.Table]:
    """Variables that are sums of others, at times when all parts are present."""
    keyed = seen.rename(seconds="drawn")
    return [
        more.rename(drawn="seconds").mutate(taken=_.taken)
        for more in bins.sums(keyed, variables, ("dicom_id", "taken"))
    ]
