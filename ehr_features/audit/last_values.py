"""The audit of each film's last vital signs and laboratory values: compare them with the raw events.

chartevents, labevents and vitalsign are read again, by queries of this package, and joined with the films by the
subject and the window alone. channels.yaml gives units, ranges, texts and specimens; what is a laboratory result, and
when it was reported, is derived from the raw tables and d_items, as for the series (series.py).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import ibis
import ibis.expr.types as ir
from ibis import _

from ehr_features.audit.events import raw_events
from ehr_features.audit.series import dated
from ehr_features.audit.verdict import Verdict, decide
from ehr_features.audit.written import Written, quoted
from ehr_features.config import FeaturesConfig
from ehr_features.raw.engine import read
from ehr_features.raw.source import Source
from ehr_features.series import channels
from ehr_features.series.channels import SPECIMEN_TYPE, Channel

KNOWN_BEFORE = "vital signs and laboratory values of films were stored before the film and charted within its window"
BEFORE = (
    "values that were stored after their film",
    "values charted before their window, or after their film",
    "values that no event of their hour explains",
)
LAST = ("values with a later one that was known", "films without a value that was known")
VALUES, OF_FILMS = "values", "films"
FILMS = """
SELECT dicom_id, row_number() OVER (ORDER BY dicom_id) AS film, subject_id::BIGINT AS subject_id,
epoch(taken_at::TIMESTAMP)::BIGINT AS taken FROM images
"""
SHARE = 2_000_000  # events that are compared at a time: joins and groups of all at once exceed a limit of memory
IS_LAST = "each vital sign and laboratory value of a film is the last one that was known"


def check_last(source: Source, written: Written, config: FeaturesConfig) -> list[Verdict]:
    """Each value stands in the raw tables at its hour and was stored before the film; none that was known is later.

    The raw tables are read once, and the events of some subjects compared after the other.
    """
    variables, window = channels.read_variables(config.channels), round(config.record_window_hours * 3600)
    each = " UNION ALL ".join(map(_of_variable, range(len(variables)), variables))
    ours = written.table(source, "audited_values", f"SELECT * FROM ({each}) JOIN ({FILMS}) USING (dicom_id)")
    films = written.table(
        source, "audited_films", f"SELECT film, subject_id, taken FROM ({FILMS}) WHERE taken IS NOT NULL"
    )
    events = [
        table if source.con.name != "duckdb" else written.table(source, f"audited_{name}", ibis.to_sql(table, "duckdb"))
        for name, table in _events(source, films, variables).items()
    ]
    shares = 1 + sum(int(table.count().execute()) for table in events) // SHARE if source.con.name == "duckdb" else 1
    found: Counter[str] = Counter()
    for share in range(shares):
        mine, *of = (table.filter(_.subject_id % shares == share) for table in (ours, films, *events))
        pairs = _pairs(source, *of, variables=variables, window=window)
        if source.con.name == "duckdb":
            pairs = written.table(source, "audited_pairs", ibis.to_sql(pairs, "duckdb"))
        found.update(_faults(mine, _with_sums(pairs, variables), config.record_window_hours))
    proof = f"{found.pop(VALUES)} values of {found.pop(OF_FILMS)} films"
    before, is_last = ({name: found[name] for name in names} for names in (BEFORE, LAST))
    return [decide(KNOWN_BEFORE, before, proof), decide(IS_LAST, is_last, f"{proof}, {len(variables)} variables")]


def _faults(ours: ir.Table, seen: ir.Table, hours: float) -> dict[str, int]:
    """How many of the values of some films break which rule; and how many values and films there are.

    Args:
        ours: film, channel, value, hours, own. seen: film, channel, drawn, low, high, is_known.
    """
    at = ours.join(seen, ["film", "channel"]).filter(_.own == _.drawn)
    at = at.group_by("film", "channel").agg(
        low=_.low.min(where=_.is_known),
        high=_.high.max(where=_.is_known),
        low_late=_.low.min(where=~_.is_known),
        high_late=_.high.max(where=~_.is_known),
    )
    last = seen.filter(_.is_known).group_by("film", "channel").agg(latest=_.drawn.max())
    both = ours.left_join(at, ["film", "channel"]).drop("film_right", "channel_right")
    both = both.mutate(slack=1e-6 * ibis.greatest(_.value.abs(), 1.0))

    def within(low: ir.Value, high: ir.Value) -> ir.Value:
        return ((both.value >= low - both.slack) & (both.value <= high + both.slack)).fill_null(False)

    proved, late = within(both.low, both.high), within(both.low_late, both.high_late)
    outside = ~both.hours.between(0, hours).fill_null(False)
    wrong = (late & ~proved & ~outside, outside, ~proved & ~late & ~outside)
    found = _counted(both, dict(zip((VALUES, *BEFORE), (both.value.notnull(), *wrong), strict=True)))
    known = ours.outer_join(last, ["film", "channel"])
    found |= _counted(
        known, dict(zip(LAST, ((known.latest > known.own).fill_null(False), known.own.isnull()), strict=True))
    )
    return found | {OF_FILMS: int(ours.select("film").distinct().count().execute())}


def _counted(table: ir.Table, of: Mapping[str, ir.Value]) -> dict[str, int]:
    """How many rows fulfil each condition."""
    sums = {f"n{k}": condition.sum() for k, condition in enumerate(of.values())}
    found = table.agg(**sums).to_pyarrow().to_pylist()[0]
    return {name: int(found[f"n{k}"] or 0) for k, name in enumerate(of)}


def _of_variable(n: int, variable: Channel) -> str:
    """The values of a variable in images.parquet: dicom_id, channel, value, hours, own (charttime in epoch seconds)."""
    value, hours = (f"nullif({quoted(variable.column + end)}::DOUBLE, 'nan'::DOUBLE)" for end in ("", "_hours"))
    taken = "coalesce(epoch(taken_at::TIMESTAMP), 0)::BIGINT"
    own = f"{taken} - round(coalesce({hours}, 0) * 3600)::BIGINT"
    columns = f"dicom_id, {n}::BIGINT AS channel, {value} AS value, {hours} AS hours, {own} AS own"
    return f"SELECT {columns} FROM images WHERE {value} IS NOT NULL"


def _events(source: Source, films: ir.Table, variables: tuple[Channel, ...]) -> dict[str, ir.Table]:
    """The raw events of the variables, of subjects with a film: chart, labs, and signs in the emergency department."""
    wanted = [item for variable in variables for item in variable.items] + [SPECIMEN_TYPE]
    found = {
        name: raw_events(source, table).filter(_.itemid.isin(wanted)).semi_join(films, "subject_id")
        for name, table in (("chart", "chartevents"), ("labs", "labevents"))
    }
    if signs := _emergency(source, variables):
        found["signs"] = ibis.union(*signs).semi_join(films, "subject_id")
    return found


def _pairs(
    source: Source,
    films: ir.Table,
    chart: ir.Table,
    labs: ir.Table,
    signs: ir.Table | None = None,
    *,
    variables: tuple[Channel, ...],
    window: int,
) -> ir.Table:
    """Valid events in the window before each film: film, channel, drawn, low, high, is_known (before the film)."""
    events = dated(source, chart, labs, channels.item_table(source.con, variables), variables)
    events = events.filter(_.counts & _.v.between(_.low, _.high) & _.known.notnull())
    known = ibis.greatest(_.known, _.report.coalesce(_.known))
    events = events.select("subject_id", "channel", "drawn", known=known, v=_.v)
    if signs is not None:
        signs = signs.mutate(channel=_.channel.cast("int64"))  # DuckDB keeps it narrower
        events = events.union(signs.select(*events.columns))
    pairs = films.join(events, "subject_id").filter(_.drawn.between(_.taken - window, _.taken))
    return pairs.select("film", "channel", "drawn", is_known=_.known < _.taken, low="v", high="v")


def _with_sums(seen: ir.Table, variables: tuple[Channel, ...]) -> ir.Table:
    """Add the variables that are sums of others, where all of them were known at one time."""
    for n, variable in enumerate(variables):
        if variable.sum_of:
            parts = [m for m, other in enumerate(variables) if other.name in variable.sum_of]
            each = seen.filter(_.is_known & _.channel.isin(parts)).group_by("film", "drawn", "channel")
            each = each.agg(low=_.low.min(), high=_.high.max()).group_by("film", "drawn")
            whole = each.agg(low=_.low.sum(), high=_.high.sum(), n=_.count()).filter(_.n == len(parts))
            whole = whole.mutate(channel=ibis.literal(n, "int64"), is_known=ibis.literal(True))
            seen = seen.union(whole.select(*seen.columns))
    return seen


def _emergency(source: Source, variables: tuple[Channel, ...]) -> list[ir.Table]:
    """subject_id, channel, drawn, known, v of vitalsign as it lies on the disk."""
    if "vitalsign" not in source.files:
        return []
    raw, out = read(source.con, source.files["vitalsign"], source.columns["vitalsign"]), []
    for n, variable in enumerate(variables):
        for name, conversion in variable.emergency.items():
            c = channels.CONVERSIONS[conversion] if isinstance(conversion, str) else conversion
            number = raw[name].cast("string").nullif("").try_cast("float64")
            at = raw["charttime"].cast("string").nullif("").try_cast("timestamp").epoch_seconds().cast("int64")
            stay, subject = (
                raw[key].cast("string").try_cast("float64").try_cast("int64") for key in ("stay_id", "subject_id")
            )
            rows = raw.select(
                stay=stay, subject_id=subject, channel=ibis.literal(n, "int64"), drawn=at, known=at, v=number
            )
            rows = rows.mutate(v=(_.v > c.above).ifelse(_.v * c.factor + c.add, _.v))
            out.append(rows.filter(_.stay.notnull() & _.drawn.notnull() & _.v.between(*variable.range)))
    return out
