"""Check that the event tables describe the cohort. A stay without events would get a series of normal values.

Input: events, stays, and the series file. Output: counts of events without a stay, a warning for each variable observed
in far fewer stays than in the MIMIC-IV demo, and an error if most stays have no observed value.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
from ehr_features.raw.engine import hold
from ehr_features.raw.source import Source
from ehr_features.series.channels import Channel
from ehr_features.series.mapped import by_stays, layout

FAR_UNDER = 0.6  # warn below this fraction of the demo's share of stays
BY_CHANCE = 1e-3  # and only if chance explains the difference with a smaller probability than this
STAYLESS = 0.05  # warn if more than this share of events has no stay
CHARTED = 220_000  # the first itemid of chartevents; those below are of labevents
SAMPLED = 200_000  # rows of an event table that `look` reads
NO_STAY = ("no stay_id", "stay_id of no row of icustays", "stay outside of the cohort")
CAUSES = (
    "Likely causes: chartevents is of another release or of other patients (its stay_ids are not in icustays), was "
    "filtered to other itemids, or was saved without valuenum. `check` counts its items, stays and values"
)


Variable = tuple[str, float | None, tuple[int, ...]]  # name, share of the demo's stays (None: not known), itemids


def variables(declared: Sequence[Channel], preset: str) -> list[Variable]:
    """The variables of a preset, in the order of the series."""
    if preset == "medfuse":  # published without items: constant
        published = [(c.medfuse, c.stays_observed) for c in declared if c.medfuse]
        return [(p.name, share if p.items else None, p.items) for p, share in published]
    return [(c.name, c.stays_observed, tuple(c.items)) for c in declared]


def without_stay(
    source: Source, chart: ir.Table, stays: ir.Table, declared: Sequence[Channel], preset: str
) -> pd.DataFrame:
    """Events of chartevents that belong to no stay of the cohort: channel, fate, n, unstored."""
    if preset == "medfuse":  # it places events without a stay_id by their admission and time
        chart = chart.filter(_.stay_id.notnull())
    events = _of_variables(source, chart, variables(declared, preset)).select("stay_id", "itemid", "channel")
    lost = events.anti_join(stays, "stay_id")
    known = source.table("icustays").select(known="stay_id").distinct()
    lost = lost.left_join(known, lost.stay_id == known.known)
    fate = ibis.cases((_.stay_id.isnull(), NO_STAY[0]), (_.known.isnull(), NO_STAY[1]), else_=NO_STAY[2])
    return lost.group_by("channel", fate=fate).agg(n=_.count()).to_pandas().assign(unstored=0)


def charted_stays(
    source: Source, chart: ir.Table, stays: ir.Table, declared: Sequence[Channel], preset: str
) -> np.ndarray:
    """stay_ids with a chartevents value of any variable (all stays, if no variable has items there)."""
    of = variables(declared, preset)
    if max((item for _name, _share, items in of for item in items), default=0) < CHARTED:
        return stays.stay_id.to_pyarrow().to_numpy()
    valued = _of_variables(source, chart, of).filter(_.valuenum.notnull() | _.value.notnull())
    if preset == "medfuse":  # by admission, as that preset places them
        valued = valued.drop("stay_id").join(stays.select("hadm_id", "stay_id"), "hadm_id")
    return valued.select("stay_id").distinct().to_pyarrow()["stay_id"].drop_null().to_numpy()


def _of_variables(source: Source, chart: ir.Table, of: Sequence[Variable]) -> ir.Table:
    rows = [(item, n) for n, (_name, _share, items) in enumerate(of) for item in items]
    table = pa.Table.from_pandas(pd.DataFrame(rows, columns=["itemid", "channel"]), preserve_index=False)
    return chart.join(hold(source.con, "covered_items", table), "itemid")


def observed_stays(path: Path) -> np.ndarray:
    """(S, number of variables) bool: whether the variable was observed at least once in the stay."""
    shapes = layout(path)[1]
    seen = np.zeros((*shapes["stay_id"], shapes["observed"][1]), dtype=bool)
    for part in by_stays(path):
        some = np.flatnonzero(np.diff(part.edges))  # a stay may have no bin
        if some.size:
            rows = np.maximum.reduceat(part.observed, part.edges[some])
            seen[part.stays.start + some] = rows.astype(bool)
    return seen


def bare(seen: np.ndarray, of: Sequence[Variable]) -> np.ndarray:
    """(S,) bool: stays without any observed variable that has items of chartevents."""
    charted = [n for n, (_name, _share, items) in enumerate(of) if max(items, default=0) >= CHARTED]
    return np.logical_not((seen[:, charted] if charted else seen).any(axis=1))


def is_charted(items: Sequence[int]) -> bool:
    """Whether all items are of chartevents, so that the variable's values are from there."""
    return bool(items) and min(items) >= CHARTED


def rare(seen: np.ndarray, of: Sequence[Variable]) -> dict[str, tuple[float, float]]:
    """Variables observed in far fewer stays than in the demo -> their share, the demo's."""
    found = {}
    for (name, share, _items), ours in zip(of, seen.mean(0).tolist(), strict=True):
        if share is None or ours >= FAR_UNDER * share:
            continue
        parts = ((ours, share), (1 - ours, max(1 - share, 0.01)))
        distance = sum(a * np.log(a / b) for a, b in parts if a)  # Chernoff bound: P(as few) <= exp(-n distance)
        if np.exp(-len(seen) * distance) < BY_CHANCE:
            found[name] = (ours, share)
    return found


def check(
    path: Path,
    declared: Sequence[Channel],
    preset: str,
    fates: Sequence[Mapping[str, Any]],
    charted_in: np.ndarray,
) -> list[str]:
    """Warnings about variables and events that are missing.

    Args:
        path: series.safetensors. fates: what became of the events: channel, fate, n. charted_in: as `charted_stays`.
    Raises: UserError: most stays have nothing observed.
    """
    of, seen = variables(declared, preset), observed_stays(path)
    with safe_open(path, "numpy") as file:  # a laboratory's values must not hide that chartevents is unusable
        silent = ~np.isin(file.get_tensor("stay_id"), charted_in)
    empty = int((bare(seen, of) | silent).sum())
    charted = [name for name, _share, items in of if is_charted(items)]
    events = pd.DataFrame(fates, columns=["channel", "fate", "n"])
    counts = events[events["channel"].isin(charted)].groupby("fate")["n"].sum()
    became = ", ".join(f"{n:,} `{fate}`" for fate, n in counts.items()) or "there are none"
    if 2 * empty > len(seen):
        raise UserError(
            f"{empty:,} of {len(seen):,} stays ({empty / len(seen):.0%}) have nothing observed of chartevents: their "
            f"series would hold normal values instead. Fates of the charted variables' events: {became}. {CAUSES}"
        )
    warnings = []
    lost = int(counts.reindex(NO_STAY[:2]).fillna(0).sum())
    if lost > STAYLESS * counts.sum():
        warnings.append(
            f"{lost:,} of {counts.sum():,} events of the charted variables have no stay of icustays ({became}); are "
            "chartevents and icustays of one release?"
        )
    for name, (ours, share) in rare(seen, of).items():
        warnings.append(
            f"{name} is observed in {ours:.0%} of the stays (in the MIMIC-IV demo in {share:.0%}); look for its "
            "itemids and their values in chartevents and labevents"
        )
    return warnings


@dataclass(frozen=True)
class Look:
    """What the first rows of chartevents hold; `faults`: reasons for which `build` would refuse them."""

    words: str
    faults: list[str]
    warnings: list[str]


def look(source: Source, declared: Sequence[Channel], preset: str) -> Look:
    """Count items, stays and values in the first rows of chartevents."""
    of = variables(declared, preset)
    number = {item: n for n, (_name, _share, items) in enumerate(of) for item in items}
    table = source.table("chartevents")
    valued = table.valuenum.notnull() | table.value.notnull()
    rows = table.select("stay_id", "itemid", valued=valued).limit(SAMPLED).to_pandas()
    whole, known = len(rows) < SAMPLED, source.table("icustays").stay_id.to_pandas().unique()
    asked = rows[rows["itemid"].isin(list(number))]
    placed = asked[asked["stay_id"].isin(known)]
    words = (
        f"chartevents: of {'' if whole else 'the first '}{len(rows):,} rows {len(asked):,} are of the variables' items"
    )
    words += f"; of these {len(placed):,} have a stay of icustays, {int(asked['valued'].sum()):,} a value"
    pairs = placed[placed["valued"]]
    whole = whole or pairs.empty  # that many rows of a usable table have a value
    stays = pd.Index(known if whole else rows.loc[rows["stay_id"].isin(known), "stay_id"].unique())
    seen = np.zeros((max(len(stays), 1), len(of)), dtype=bool)
    seen[stays.get_indexer(pairs["stay_id"]), pairs["itemid"].map(number).astype(int)] = True
    empty, warnings = int(bare(seen, of).sum()), list[str]()
    if 2 * empty > len(seen):
        faults = [f"chartevents: {empty:,} of {len(seen):,} stays have no value of the charted variables. {CAUSES}"]
        return Look(words, faults if whole else [], [] if whole else faults)
    if len(placed) < (1 - STAYLESS) * len(asked):
        warnings = [f"chartevents: {len(asked) - len(placed):,} events of the variables have no stay of icustays"]
    few = rare(seen, [(name, share if is_charted(items) else None, items) for name, share, items in of])
    said = "chartevents: {} in {:.0%} of the stays (in the MIMIC-IV demo in {:.0%})"
    return Look(words, [], warnings + [said.format(name, *shares) for name, shares in few.items()])
