"""The part of the audit that looks for what the series lack: charted values of the raw table that stand in no hour.

chartevents is read again, by a query that reads its ids in its own way, and each row is placed by its stay_id or, where
icustays has no such stay, by its subject and time. Variables that a laboratory reports are left to `check_known`.
"""

from __future__ import annotations

from pathlib import Path

import ibis
import ibis.expr.types as ir
import numpy as np
from ibis import _
from safetensors import safe_open

from ehr_features import cohort
from ehr_features.audit.series import of_stays, read_numbers
from ehr_features.audit.verdict import Verdict, decide
from ehr_features.config import FeaturesConfig
from ehr_features.raw.engine import batches, kept, read, release
from ehr_features.raw.source import Source
from ehr_features.series import channels, coverage
from ehr_features.series.mapped import by_stays

COVERED = "charted values of the stays are in the series"


def check_covered(features: Path, source: Source, config: FeaturesConfig) -> Verdict:
    """Each hour with a charted value is observed; no more than a few values have no stay; most stays have one."""
    declared = channels.read_channels(config.channels)
    of = coverage.variables(declared, config.preset)
    path = features / "series.safetensors"
    charted = [n for n, (_name, _share, items) in enumerate(of) if coverage.is_charted(items)]
    seen = coverage.observed_stays(path)
    empty = int(coverage.bare(seen, of).sum())
    charts = kept(source.con, _charted(source, declared))  # read once
    rows = _placed(source, config, charts)
    total, lost = (int(n or 0) for n in rows.agg(n=_.count(), lost=_.lost.sum()).to_pyarrow().to_pylist()[0].values())
    bad = {
        "stays of which nothing charted is observed": empty if 2 * empty > len(seen) else 0,
        "charted values without a stay of icustays": lost if lost > coverage.STAYLESS * total else 0,
    }
    if config.preset == "default":
        bad["hours with a charted value that the series do not have"] = _unseen(path, rows, charted, config.step_hours)
    release(source.con, charts)
    few = [f"{name} {ours:.0%} ({share:.0%})" for name, (ours, share) in coverage.rare(seen, of).items()]
    said = f"; in far fewer stays than in the MIMIC-IV demo: {', '.join(few)}" if few else ""
    return decide(COVERED, bad, f"{total:,} charted values of {len(seen)} stays, {lost:,} without a stay{said}")


def _charted(source: Source, declared: tuple[channels.Channel, ...]) -> ir.Table:
    """Charted values in their range: channel, stay_id, subject_id, drawn, lost (no such stay in icustays)."""
    items, texts = channels.item_table(source.con, declared), channels.text_table(source.con, declared)
    charted = [item for c in declared if coverage.is_charted(tuple(c.items)) for item in c.items]
    rows = read_numbers(raw_events(source, "chartevents").filter(_.itemid.isin(charted)), items, texts)
    rows = rows.filter(_.v.between(_.low, _.high)).select("channel", "stay_id", "subject_id", "drawn")
    known = source.table("icustays").select(known="stay_id").distinct()
    rows = rows.left_join(known, rows.stay_id == known.known)
    return rows.mutate(lost=_.known.isnull()).drop("known")


def _placed(source: Source, config: FeaturesConfig, rows: ir.Table) -> ir.Table:
    """Charted values of the cohort, and those of no stay: channel, stay_id, seconds (since intime), lost."""
    stays = cohort.stays(source, config.preset, cohort.Attrition())
    times = {"begins": _.intime.epoch_seconds(), "ends": _.outtime.epoch_seconds(), "dies": _.death_at.epoch_seconds()}
    window = stays.select("stay_id", "subject_id", **times)
    own = rows.join(window.drop("subject_id"), "stay_id")
    strays = rows.filter(_.lost).drop("stay_id")
    strays = strays.left_join(
        window,
        [strays.subject_id == window.subject_id, strays.drawn >= window.begins, strays.drawn <= window.ends],
    ).drop("subject_id_right")
    both = own.union(strays.select(*own.columns))
    alive = (_.drawn <= _.dies).fill_null(True)
    inside = (_.drawn >= _.begins) & (_.drawn <= _.ends) & alive
    return both.filter(_.lost | inside).select("channel", "stay_id", "lost", seconds=_.drawn - _.begins)


def raw_events(source: Source, name: str) -> ir.Table:
    """chartevents or labevents as it lies on the disk."""
    raw = read(source.con, source.files[name], source.columns[name])

    def number(name: str) -> ir.Value:
        written = raw[name].cast("string").strip().try_cast("float64")
        return ibis.cases((written % 1 == 0, written)).try_cast("int64")

    times = {key: raw[key].try_cast("timestamp") for key in ("charttime", "storetime")}
    own = "stay_id" if name == "chartevents" else "specimen_id"
    ids = {key: number(key) for key in ("subject_id", "itemid")}
    ids[own] = number(own) if own in raw.columns else ibis.null("int64")
    value = raw["value"].cast("string").nullif("")
    return raw.select(**ids, **times, value=value, valuenum=raw["valuenum"].try_cast("float64"))


def _unseen(path: Path, rows: ir.Table, charted: list[int], step_hours: int) -> int:
    """How many hours with a charted value are not observed."""
    cells = rows.filter(_.stay_id.notnull() & _.channel.isin(charted))
    cells = cells.select("stay_id", "channel", bin=(_.seconds // (3600 * step_hours)).cast("int64")).distinct()
    found = of_stays(batches(cells.get_backend(), cells.order_by("stay_id")), ("stay_id", "channel", "bin"))
    with safe_open(path, "numpy") as file:
        stay_ids = file.get_tensor("stay_id")
    unseen = 0
    for part in by_stays(path):
        for stay, channel, at in found(stay_ids[part.stays]):
            place = np.searchsorted(stay_ids[part.stays], stay)
            inside = at < np.diff(part.edges)[place]
            row = (part.edges[place] + at)[inside]
            unseen += int((part.observed[row, channel[inside]] == 0).sum())
    return unseen
