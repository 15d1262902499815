"""The audit of each film's last vital signs and laboratory values: compare them with the raw events.

chartevents, labevents and vitalsign are read again, by queries of this package, and joined with the films by the
subject and the window alone. channels.yaml gives units, ranges, texts and specimens; what is a laboratory result, and
when it was reported, is derived from the raw tables and d_items, as for the series (series.py).
"""

from __future__ import annotations

import ibis
import ibis.expr.types as ir
import numpy as np
import pandas as pd
import pyarrow as pa
from ibis import _

from ehr_features.audit.events import raw_events
from ehr_features.audit.series import dated
from ehr_features.audit.verdict import Verdict, decide
from ehr_features.config import FeaturesConfig
from ehr_features.raw.engine import hold, read
from ehr_features.raw.source import Source
from ehr_features.series import channels
from ehr_features.series.channels import SPECIMEN_TYPE, Channel

KNOWN_BEFORE = "vital signs and laboratory values of films were stored before the film and charted within its window"
IS_LAST = "each vital sign and laboratory value of a film is the last one that was known"


def check_last(source: Source, images: pd.DataFrame, config: FeaturesConfig) -> list[Verdict]:
    """Each value stands in the raw tables at its hour and was stored before the film; none that was known is later."""
    variables, window = channels.read_variables(config.channels), round(config.record_window_hours * 3600)
    ours = _ours(images, variables)
    seen = _seen(source, images, variables, window)
    held = ours[["dicom_id", "channel", "own"]].astype({"dicom_id": "str"})
    own = hold(source.con, "audited_values", pa.Table.from_pandas(held, preserve_index=False))
    at = own.join(seen, ["dicom_id", "channel"]).filter(_.own == _.drawn)
    at = at.group_by("dicom_id", "channel").agg(
        low=_.low.min(where=_.is_known),
        high=_.high.max(where=_.is_known),
        low_late=_.low.min(where=~_.is_known),
        high_late=_.high.max(where=~_.is_known),
    )
    last = seen.filter(_.is_known).group_by("dicom_id", "channel").agg(latest=_.drawn.max())
    both = ours.merge(at.to_pandas(), "left", ["dicom_id", "channel"])
    both = both.merge(last.to_pandas(), "outer", ["dicom_id", "channel"])
    has, slack = both["value"].notna(), 1e-6 * both["value"].abs().clip(lower=1)

    def within(low: str, high: str) -> pd.Series:
        return has & (both["value"] >= both[low] - slack) & (both["value"] <= both[high] + slack)

    proved, late = within("low", "high"), within("low_late", "high_late")
    outside = has & ~both["hours"].between(0, config.record_window_hours)
    proof = f"{int(has.sum())} values of {ours['dicom_id'].nunique()} films"
    before = {
        "values that were stored after their film": int((late & ~proved & ~outside).sum()),
        "values charted before their window, or after their film": int(outside.sum()),
        "values that no event of their hour explains": int((has & ~proved & ~late & ~outside).sum()),
    }
    is_last = {
        "values with a later one that was known": int((has & (both["latest"] > both["own"])).sum()),
        "films without a value that was known": int((~has).sum()),
    }
    return [decide(KNOWN_BEFORE, before, proof), decide(IS_LAST, is_last, f"{proof}, {len(variables)} variables")]


def _ours(images: pd.DataFrame, variables: tuple[Channel, ...]) -> pd.DataFrame:
    """The values in images.parquet: dicom_id, channel, value, hours, own (charttime in epoch seconds)."""
    seconds = pd.to_datetime(images["taken_at"]).astype("datetime64[s]").to_numpy()
    taken = np.where(np.isnat(seconds), 0, seconds.astype("int64"))
    parts = []
    for n, variable in enumerate(variables):
        value, hours = (pd.to_numeric(images[variable.column + end]).to_numpy(float) for end in ("", "_hours"))
        own = taken - np.round(np.nan_to_num(hours) * 3600).astype("int64")
        part = pd.DataFrame({"dicom_id": images["dicom_id"], "channel": n, "value": value, "hours": hours, "own": own})
        parts.append(part[~np.isnan(value)])
    return pd.concat(parts, ignore_index=True)


def _seen(source: Source, images: pd.DataFrame, variables: tuple[Channel, ...], window: int) -> ir.Table:
    """Valid events in the window before each film: dicom_id, channel, drawn, low, high, is_known (before the film)."""
    timed = images.loc[images["taken_at"].notna(), ["dicom_id", "subject_id", "taken_at"]].astype({"dicom_id": "str"})
    seconds = pd.to_datetime(timed.pop("taken_at")).astype("datetime64[s]").astype("int64")
    frame = timed.assign(subject_id=timed["subject_id"].astype("int64"), taken=seconds)
    films = hold(source.con, "audited_films", pa.Table.from_pandas(frame, preserve_index=False))
    items = channels.item_table(source.con, variables)
    wanted = [item for variable in variables for item in variable.items] + [SPECIMEN_TYPE]
    chart, labs = (
        raw_events(source, name).filter(_.itemid.isin(wanted)).semi_join(films, "subject_id")
        for name in ("chartevents", "labevents")
    )
    events = dated(source, chart, labs, items, variables)
    events = events.filter(_.counts & _.v.between(_.low, _.high) & _.known.notnull())
    events = events.select(
        "subject_id", "channel", "drawn", known=ibis.greatest(_.known, _.report.coalesce(_.known)), v=_.v
    )
    for signs in _emergency(source, variables):
        events = events.union(signs.select(*events.columns))
    pairs = films.join(events, "subject_id").filter(_.drawn.between(_.taken - window, _.taken))
    seen = pairs.select("dicom_id", "channel", "drawn", is_known=_.known < _.taken, low="v", high="v")
    for n, variable in enumerate(variables):
        if variable.sum_of:
            parts = [m for m, other in enumerate(variables) if other.name in variable.sum_of]
            each = seen.filter(_.is_known & _.channel.isin(parts)).group_by("dicom_id", "drawn", "channel")
            each = each.agg(low=_.low.min(), high=_.high.max()).group_by("dicom_id", "drawn")
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
