"""The ICU stays that count, and what fell out and why.

Comes in: icustays, admissions, patients. Goes out: a row per stay of the cohort, and an `Attrition`.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from typing import Any

import ibis.expr.types as ir
import numpy as np
import pandas as pd
import pyarrow as pa

from configs import UserError
from ehr_features.raw.engine import hold
from ehr_features.raw.source import Source

LISTED = 1000  # ids listed for one reason


class Attrition:
    """Counts of what was excluded, in order, with ids and never values."""

    def __init__(self) -> None:
        self.exclusions: list[dict[str, Any]] = []
        self.counts: dict[str, Any] = {}

    def add(self, table: str, why: str, before: int, after: int, ids: Iterable[Any] = ()) -> None:
        """Record that rows of a table were left out.

        Args:
            table: what the rows are of. why: the reason, for a reader. ids: of the rows that fell out.
        """
        gone = {i.item() if isinstance(i, np.generic) else i for i in ids}
        entry = {"table": table, "why": why, "before": int(before), "after": int(after), "num_ids": len(gone)}
        self.exclusions.append(entry | {"ids": heapq.nsmallest(LISTED, gone)})

    def note(self, what: str, value: Any) -> None:
        """Record a number that excludes nothing."""
        self.counts[what] = value.item() if isinstance(value, np.generic) else value

    def extend(self, found: dict[str, Any]) -> None:
        """Add what another one counted, as its `as_json` gives it."""
        self.exclusions += found["exclusions"]
        self.counts |= found["counts"]

    def as_json(self) -> dict[str, Any]:
        return {"exclusions": self.exclusions, "counts": self.counts}


def stays(source: Source, preset: str, attrition: Attrition) -> ir.Table:
    """The ICU cohort.

    Args:
        preset: `default`: every adult stay that can be true; `medfuse`: the published cohort.
    Returns: stay_id, hadm_id, subject_id, intime, outtime, los_hours, age_years, age_capped, sex, race,
        anchor_year_group, care_unit (the first);
        and for the labels admittime, dischtime, death_at (null: left the hospital alive), died.
    Raises: UserError: nobody is left; an admission or a patient is listed twice.
    """
    frame = _joined(source, attrition)
    frame = (_published(frame, attrition) if preset == "medfuse" else _adults(frame, attrition)).sort_values("stay_id")
    if frame.empty:
        rows = attrition.counts["rows of icustays"]
        why = next((f"`{e['why']}` took the last" for e in attrition.exclusions if not e["after"]), "") if rows else ""
        raise UserError(f"the cohort is empty: of {rows} rows of icustays {why or 'none is there'}; check mimic_iv")
    columns = ["stay_id", "hadm_id", "subject_id", "intime", "outtime", "los_hours", "age_years", "age_capped"]
    columns += ["gender", "race", "anchor_year_group", "first_careunit", "admittime", "dischtime", "death_at", "died"]
    frame = frame[columns].rename(columns={"gender": "sex", "first_careunit": "care_unit"}).reset_index(drop=True)
    texts = dict.fromkeys(["sex", "race", "anchor_year_group", "care_unit"], "string") | {"age_years": "Int64"}
    table = pa.Table.from_pandas(frame.astype(texts), preserve_index=False)
    return hold(source.con, f"cohort_{preset}", table)


def _joined(source: Source, attrition: Attrition) -> pd.DataFrame:
    """icustays with their admission and patient; a row each."""
    icu = source.table("icustays").to_pandas()
    attrition.note("rows of icustays", len(icu))
    same = icu.duplicated()
    icu = _drop(icu, same, "the same row of icustays twice; one kept", attrition)
    icu = _drop(icu, icu["stay_id"].isna() | icu["subject_id"].isna(), "no stay_id or subject_id", attrition)
    icu = _drop(icu, icu["stay_id"].duplicated(keep=False), "one stay_id in different rows; none kept", attrition)
    admissions = source.table("admissions").select(
        "subject_id", "hadm_id", "admittime", "dischtime", "deathtime", "race", "hospital_expire_flag"
    )
    held = hold(source.con, "icu_admissions", pa.table({"hadm_id": pa.array(icu["hadm_id"].dropna().astype("int64"))}))
    admissions = admissions.semi_join(held, "hadm_id").to_pandas().drop_duplicates()
    patients = source.table("patients").to_pandas().drop_duplicates()
    for frame, key in ((admissions, ["hadm_id"]), (patients, ["subject_id"])):
        if twice := frame.loc[frame.duplicated(key), key[0]].tolist():
            raise UserError(f"{len(twice)} {key[0]} have two different rows, e.g. {twice[:3]}; one row each is needed")
    joined = icu.merge(admissions, on=["subject_id", "hadm_id"], how="left", validate="m:1", indicator="admitted")
    joined = joined.merge(patients, on="subject_id", how="left", validate="m:1", indicator="known")
    joined = _drop(joined, joined["admitted"] != "both", "no such admission of this subject in admissions", attrition)
    joined = _drop(joined, joined["known"] != "both", "no such subject in patients", attrition)
    joined["age_capped"] = (joined["anchor_age"] >= 91).astype("boolean")
    return joined


def _adults(frame: pd.DataFrame, attrition: Attrition) -> pd.DataFrame:
    frame = _drop(frame, frame["intime"].isna() | frame["outtime"].isna(), "no intime or no outtime", attrition)
    frame = _drop(frame, frame["outtime"] <= frame["intime"], "outtime not after intime", attrition)
    frame = _drop(frame, frame["intime"] >= frame["deathtime"], "intime not before deathtime", attrition)
    age = frame["anchor_age"] + (frame["intime"].dt.year - frame["anchor_year"])
    frame = frame.assign(age_years=age, los_hours=(frame["outtime"] - frame["intime"]).dt.total_seconds() / 3600)
    frame = _drop(frame, age.isna() | (age < 18), "younger than 18 at intime, or of unknown age", attrition)
    died = (frame["hospital_expire_flag"] == 1) | frame["deathtime"].notna()
    death_at = frame["deathtime"].fillna(frame["dischtime"]).where(died)
    return frame.assign(died=died.astype(bool), death_at=death_at)


def _published(frame: pd.DataFrame, attrition: Attrition) -> pd.DataFrame:
    """The cohort of MedFuse's extraction, in its order. Source: nyuad-cai/MedFuse, mimic4extract."""
    moved = frame["first_careunit"].fillna("") != frame["last_careunit"].fillna("")
    frame = _drop(frame, moved, "first and last care unit differ", attrition)
    several = frame["hadm_id"].duplicated(keep=False)
    frame = _drop(frame, several, "the admission has another such stay", attrition)
    age = frame["anchor_age"].where(frame["anchor_age"] >= 0, 90)
    frame = frame.assign(age_years=age, los_hours=frame["los"] * 24)
    frame = _drop(frame, ~(age >= 18), "anchor_age under 18", attrition)
    frame = _drop(frame, frame[["intime", "outtime", "los"]].isna().any(axis=1), "no intime, outtime or los", attrition)
    frame = _drop(frame, frame["outtime"] <= frame["intime"], "outtime not after intime", attrition)
    inside = [
        (frame[name] >= frame["admittime"]) & (frame[name] <= frame["dischtime"]) for name in ("deathtime", "dod")
    ]
    death_at = frame["deathtime"].where(inside[0]).fillna(frame["dod"].where(inside[1]))
    return frame.assign(died=inside[0] | inside[1], death_at=death_at)


def _drop(frame: pd.DataFrame, gone: pd.Series, why: str, attrition: Attrition) -> pd.DataFrame:
    gone = gone.fillna(False).astype(bool)
    ids = frame.loc[gone, "stay_id"].dropna().astype("int64")
    attrition.add("stays", why, len(frame), int((~gone).sum()), ids)
    return frame[~gone]
