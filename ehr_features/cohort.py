"""The cohort of ICU stays, the excluded rows with their reasons, and each subject's time of death.

Input: icustays, admissions, patients. Output: one row per stay of the cohort, and an `Attrition`. `deaths` has the one
rule that reconciles deathtime, hospital_expire_flag and dod.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from typing import Any

import ibis
import ibis.expr.types as ir
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from ibis import _

from configs import UserError
from ehr_features.raw.engine import hold
from ehr_features.raw.source import Source, without_ids
from ehr_features.schema import DEATHS

LISTED = 1000  # ids listed per reason


class Attrition:
    """Counts of excluded rows, in order, with ids but no other values."""

    def __init__(self) -> None:
        self.exclusions: list[dict[str, Any]] = []
        self.counts: dict[str, Any] = {}

    def add(
        self, table: str, why: str, before: int, after: int, ids: Iterable[Any] = (), num_ids: int | None = None
    ) -> None:
        """Record that rows of a table were left out.

        Args:
            table: the table of the rows. why: the reason, for a reader. ids: of the excluded rows.
            num_ids: how many they are, if `ids` holds only the smallest.
        """
        gone = {i.item() if isinstance(i, np.generic) else i for i in ids}
        entry: dict[str, Any] = {"table": table, "why": why, "before": int(before), "after": int(after)}
        entry["num_ids"] = len(gone) if num_ids is None else num_ids
        self.exclusions.append(entry | {"ids": heapq.nsmallest(LISTED, gone)})

    def note(self, what: str, value: Any) -> None:
        """Record a number that excludes nothing."""
        self.counts[what] = value.item() if isinstance(value, np.generic) else value

    def extend(self, found: dict[str, Any]) -> None:
        """Add the counts of another one, in the form of its `as_json`."""
        self.exclusions += found["exclusions"]
        self.counts |= found["counts"]

    def as_json(self) -> dict[str, Any]:
        return {"exclusions": self.exclusions, "counts": self.counts}


def smallest(ids: pa.ChunkedArray) -> list[Any]:
    """Of ids the smallest, as many as an attrition lists."""
    return ids.take(pc.bottom_k_unstable(ids, LISTED)).to_pylist()


def deaths(source: Source) -> ir.Table:
    """The time of death of each subject with a recorded death: subject_id, death_at.

    The earliest deathtime of any admission. An admission with hospital_expire_flag but no deathtime contributes its
    discharge, or the end of the day `dod` if that is earlier. If no admission records a death, the end of the day
    `dod`:
    dod is a date, and the subject may have lived until midnight.
    """
    persons = source.table("patients").group_by("subject_id").agg(day_over=_.dod.min().cast("timestamp"))
    persons = persons.mutate(day_over=_.day_over + ibis.interval(days=1))
    told = source.table("admissions").left_join(persons, "subject_id").drop("subject_id_right")
    in_time = ibis.cases((_.day_over > _.admittime, _.day_over))
    flagged = ibis.cases((_.hospital_expire_flag == 1, ibis.least(_.dischtime, in_time)))
    told = told.group_by("subject_id").agg(death_at=_.deathtime.coalesce(flagged).min())
    both = told.union(persons.select("subject_id", death_at=ibis.null("timestamp")))
    both = both.group_by("subject_id").agg(death_at=_.death_at.min()).left_join(persons, "subject_id")
    dead = both.select("subject_id", death_at=_.death_at.coalesce(_.day_over))
    return dead.filter(_.subject_id.notnull() & _.death_at.notnull())


def outcomes(source: Source) -> ir.Table:
    """The end of each admission: subject_id, hadm_id, admittime, dischtime, deathtime, death_at (of the subject), died.

    died is 1 with a flag, a deathtime, or a death of the subject by the end of the admission; else the flag (0 or
    null).
    """
    admissions = source.table("admissions").left_join(deaths(source), "subject_id").drop("subject_id_right")
    dead = (
        (_.hospital_expire_flag == 1) | _.deathtime.notnull() | (_.death_at <= ibis.greatest(_.admittime, _.dischtime))
    )
    died = ibis.cases((dead, 1), (_.hospital_expire_flag.notnull(), 0)).cast("int64")
    return admissions.mutate(died=died)


def stays(source: Source, preset: str, attrition: Attrition) -> ir.Table:
    """The ICU cohort.

    Args:
        preset: `default`: every adult stay with possible times; `medfuse`: the published cohort.
    Returns: stay_id, hadm_id, subject_id, intime, outtime, los_hours, age_years, age_capped, sex, race,
        anchor_year_group, care_unit (the first); and for the labels admittime, dischtime, death_at (of the subject,
        also after the stay), died
        (in hospital).
    Raises: UserError: no stay is left; an admission or a patient has two different rows.
    """
    frame = _joined(source, attrition)
    _note_disagreements(source, attrition)
    frame = (_published(frame, attrition) if preset == "medfuse" else _adults(frame, attrition)).sort_values("stay_id")
    if frame.empty:
        rows = attrition.counts["rows of icustays"]
        why = next((f"`{e['why']}` took the last" for e in attrition.exclusions if not e["after"]), "") if rows else ""
        raise UserError(f"the cohort is empty: of {rows} rows of icustays {why or 'none is there'}; check mimic_iv")
    columns = ["stay_id", "hadm_id", "subject_id", "intime", "outtime", "los_hours", "age_years", "age_capped"]
    columns += ["gender", "race", "anchor_year_group", "first_careunit", "admittime", "dischtime", "death_at", "died"]
    frame = frame[columns].rename(columns={"gender": "sex", "first_careunit": "care_unit"}).reset_index(drop=True)
    texts = dict.fromkeys(["sex", "race", "anchor_year_group", "care_unit"], "string") | {"age_years": "Int64"}
    texts |= dict.fromkeys(["stay_id", "hadm_id", "subject_id"], "int64")  # floats where a row that is gone had none
    table = pa.Table.from_pandas(frame.astype(texts), preserve_index=False)
    return hold(source.con, f"cohort_{preset}", table)


def _joined(source: Source, attrition: Attrition) -> pd.DataFrame:
    """icustays joined with admission and patient; one row per stay."""
    icu = source.table("icustays").to_pandas()
    rows = source.rows("icustays")
    attrition.note("rows of icustays", rows)
    attrition.add("stays", without_ids("icustays"), rows, len(icu))
    same = icu.duplicated()
    icu = _drop(icu, same, "the same row of icustays twice; one kept", attrition)
    icu = _drop(icu, icu["stay_id"].duplicated(keep=False), "one stay_id in different rows; none kept", attrition)
    columns = ["subject_id", "hadm_id", "admittime", "dischtime", "deathtime", "race", "hospital_expire_flag"]
    admissions = outcomes(source).select(*columns, person_died_at="death_at", told_died="died")
    held = hold(source.con, "icu_admissions", pa.table({"hadm_id": pa.array(icu["hadm_id"].dropna().astype("int64"))}))
    admissions = admissions.semi_join(held, "hadm_id").to_pandas().drop_duplicates()
    patients = source.table("patients").to_pandas().drop_duplicates()
    for table, frame, key in (("admissions", admissions, "hadm_id"), ("patients", patients, "subject_id")):
        if twice := frame.loc[frame.duplicated(key), key].tolist():
            path, of = source.files.get(table, table), f"{len(twice)} {key}, e.g. {twice[:3]}"
            raise UserError(f"{path}: two different rows of {of}; one row each is needed")
    joined = icu.merge(admissions, on=["subject_id", "hadm_id"], how="left", validate="m:1", indicator="admitted")
    joined = joined.merge(patients, on="subject_id", how="left", validate="m:1", indicator="known")
    joined = _drop(joined, joined["admitted"] != "both", "no such admission of this subject in admissions", attrition)
    joined = _drop(joined, joined["known"] != "both", "no such subject in patients", attrition)
    joined["age_capped"] = (joined["anchor_age"] >= 91).astype("boolean")
    return joined


def _note_disagreements(source: Source, attrition: Attrition) -> None:
    """Count where dod, deathtime and hospital_expire_flag disagree; `deaths` has the rule that decides."""
    dod = source.table("patients").group_by("subject_id").agg(dod=_.dod.min())
    rows = outcomes(source).mutate(flag=(_.hospital_expire_flag == 1).fill_null(False))
    rows = rows.select("subject_id", "hadm_id", "admittime", "dischtime", "deathtime", "death_at", "flag").distinct()
    rows = rows.left_join(dod, "subject_id")
    first, last, died = rows.admittime.date(), rows.dischtime.date(), rows.deathtime.date()
    alive = rows.deathtime.isnull() & ~rows.flag
    found = {
        "deathtime without hospital_expire_flag": died.notnull() & ~rows.flag,
        "hospital_expire_flag without deathtime": died.isnull() & rows.flag,
        "deathtime on a day outside the admission": (died < first) | (died > last),
        "deathtime later than the person's death by another admission": rows.deathtime > rows.death_at,
        "deathtime on another day than dod": died != rows.dod,
        "dod before the day of discharge, alive by flag and deathtime": alive & (rows.dod >= first) & (rows.dod < last),
        "dod on the day of discharge, alive by flag and deathtime (counts as alive)": alive & (rows.dod == last),
        "admission that begins after the person's death": rows.admittime >= rows.death_at,
    }
    sums = rows.agg(**{f"n{k}": rule.fill_null(False).sum() for k, rule in enumerate(found.values())})
    counts = [int(n or 0) for n in sums.to_pyarrow().to_pylist()[0].values()]
    attrition.note(DEATHS, dict(zip(found, counts, strict=True)))


def _adults(frame: pd.DataFrame, attrition: Attrition) -> pd.DataFrame:
    frame = _drop(frame, frame["intime"].isna() | frame["outtime"].isna(), "no intime or no outtime", attrition)
    frame = _drop(frame, frame["outtime"] <= frame["intime"], "outtime not after intime", attrition)
    gone = frame["intime"] >= frame["person_died_at"]
    frame = _drop(frame, gone, "not after death: the person had died by intime", attrition)
    age = frame["anchor_age"] + (frame["intime"].dt.year - frame["anchor_year"])
    frame = frame.assign(age_years=age, los_hours=(frame["outtime"] - frame["intime"]).dt.total_seconds() / 3600)
    frame = _drop(frame, age.isna() | (age < 18), "younger than 18 at intime, or of unknown age", attrition)
    died = (frame["told_died"] == 1) | (frame["person_died_at"] <= frame["outtime"])
    return frame.assign(died=died.astype(bool), death_at=frame["person_died_at"])


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
