"""A tiny MIMIC of eight patients, written in the layout of any release."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from ehr_features.audit import claims as audit_claims
from ehr_features.audit import events as audit_events
from ehr_features.audit import films as audit_films
from ehr_features.audit import last_values
from ehr_features.audit import people as audit_people
from ehr_features.audit import series as audit_series
from ehr_features.audit.verdict import decide
from ehr_features.config import FeaturesConfig

Frames = dict[str, pd.DataFrame]
START = pd.Timestamp("2150-03-01 08:00:00")
HOSP = ("patients", "admissions", "diagnoses_icd", "labevents", "d_labitems")
HOURS = (60, 50, 30, 100, 49, 20, 72, 48)  # of the eight stays
ORDER = {  # of 2.2
    "admissions": "subject_id hadm_id admittime dischtime deathtime admission_type admit_provider_id "
    "admission_location discharge_location insurance language marital_status race edregtime edouttime "
    "hospital_expire_flag",
    "chartevents": "subject_id hadm_id stay_id caregiver_id charttime storetime itemid value valuenum valueuom warning",
    "labevents": "labevent_id subject_id hadm_id specimen_id itemid order_provider_id charttime storetime value "
    "valuenum valueuom ref_range_lower ref_range_upper flag priority comments",
}


def tiny_frames() -> Frames:
    """Raw tables of eight patients with a stay each; the fourth dies in hospital at hour 90."""
    rng = np.random.default_rng(0)
    people = [(10_000_001 + i, 20_000_001 + i, 30_000_001 + i, h) for i, h in enumerate(HOURS)]
    patients = pd.DataFrame(
        [(s, "MF"[i % 2], 40 + 7 * i, 2150, "2011 - 2013", None) for i, (s, _, _, _) in enumerate(people)],
        columns=["subject_id", "gender", "anchor_age", "anchor_year", "anchor_year_group", "dod"],
    )
    begins = [START + pd.Timedelta(days=10 * i) for i in range(len(people))]
    stays = pd.DataFrame(
        [
            (s, h, k, "MICU", "MICU", begin, begin + pd.Timedelta(hours=los), los / 24)
            for (s, h, k, los), begin in zip(people, begins, strict=True)
        ],
        columns=["subject_id", "hadm_id", "stay_id", "first_careunit", "last_careunit", "intime", "outtime", "los"],
    )
    admissions = pd.DataFrame({"subject_id": stays.subject_id, "hadm_id": stays.hadm_id})
    admissions["admittime"] = stays.intime - pd.Timedelta(hours=3)
    admissions["dischtime"] = stays.outtime + pd.Timedelta(hours=5)
    admissions["deathtime"] = pd.NaT
    admissions.loc[3, "deathtime"] = begins[3] + pd.Timedelta(hours=90)
    admissions["race"], admissions["hospital_expire_flag"] = "WHITE", [0, 0, 0, 1, 0, 0, 0, 0]
    admissions["insurance"] = 'Other, "self"'
    chart, labs = [], []
    for (s, h, k, los), begin in zip(people, begins, strict=True):
        for at in range(0, los, 2):
            time = begin + pd.Timedelta(hours=at, minutes=int(rng.integers(0, 59)))
            rate = str(int(rng.integers(60, 120)))
            chart.append((s, h, k, time, time + pd.Timedelta(minutes=3), 220045, rate, float(rate), "bpm"))
            if at % 4 == 0:
                for item, text, number in (
                    (220739, "None", 1),
                    (223900, "No Response-ETT", 1),
                    (223901, "No response", 1),
                ):
                    chart.append((s, h, k, time, time, item, text, float(number), None))
        for at in range(-2, los, 8):
            time = begin + pd.Timedelta(hours=at)
            level = float(rng.integers(80, 200))
            hadm = h if at % 16 else None
            labs.append((s, hadm, 50931, time, time + pd.Timedelta(hours=1), str(level), level, "mg/dL", "seen, ok"))
    events = ["charttime", "storetime", "itemid", "value", "valuenum", "valueuom"]
    chartevents = pd.DataFrame(chart, columns=["subject_id", "hadm_id", "stay_id", *events])
    columns = ["subject_id", "hadm_id", "itemid", "charttime", "storetime", "value", "valuenum", "valueuom", "comments"]
    labevents = pd.DataFrame(labs, columns=columns).astype({"hadm_id": "Int64"})
    codes = [(s, h, 1, c, v) for (s, h, _, _), (c, v) in zip(people, [("I5020", 10), ("4280", 9)] * 4, strict=True)]
    return {
        "patients": patients,
        "admissions": admissions,
        "icustays": stays,
        "diagnoses_icd": pd.DataFrame(codes, columns=["subject_id", "hadm_id", "seq_num", "icd_code", "icd_version"]),
        "chartevents": chartevents,
        "labevents": labevents,
        "d_items": pd.DataFrame(
            {"itemid": [220045, 220739, 223900, 223901], "label": ["HR", "eye", "verbal", "motor"]}
        ),
        "d_labitems": pd.DataFrame({"itemid": [50931], "label": ["Glucose"], "fluid": ["Blood"]}),
    }


def write_tables(folder: Path, frames: Frames, layout: str = "2.2", suffix: str | dict[str, str] = ".csv.gz") -> Path:
    """Write raw tables in the layout of a release: 1.0, 2.0, 2.2."""
    for name, frame in frames.items():
        frame = frame.reindex(columns=ORDER[name].split()) if name in ORDER else frame
        if layout != "2.2":
            later = ("caregiver_id", "order_provider_id", "admit_provider_id")
            frame = frame.drop(columns=[c for c in later if c in frame])
        part = "hosp" if name in HOSP else "icu"
        if layout == "1.0":
            frame = frame.rename(columns={"race": "ethnicity"})
            part = "core" if name in ("patients", "admissions") else part
        form = suffix if isinstance(suffix, str) else suffix.get(name, ".csv.gz")
        path = folder / part / f"{name}{form}"
        path.parent.mkdir(parents=True, exist_ok=True)
        if form == ".parquet":
            frame.to_parquet(path, index=False)
        else:
            frame.to_csv(path, index=False, date_format="%Y-%m-%d %H:%M:%S")
    return folder


@pytest.fixture
def apart() -> Callable[..., dict[str, list[dict[str, Any]]]]:
    """Combine the tables of several cases, with the ids of each case shifted; the dicom_id is the name of the case."""

    def shifted(cases: dict[str, dict[str, list[dict[str, Any]] | None]]) -> dict[str, list[dict[str, Any]]]:
        together: dict[str, list[dict[str, Any]]] = {}
        for number, (case, tables) in enumerate(cases.items()):
            for table, rows in tables.items():
                for row in rows or ():
                    ids = {c: v + 1000 * number for c, v in row.items() if c.endswith("_id") and isinstance(v, int)}
                    named = {"dicom_id": case} if "dicom_id" in row else {}
                    together.setdefault(table, []).append(row | ids | named)
        return together

    return shifted


SLOW_CHECKS = {  # of the audit, each from the raw tables -> its claims
    "check_known": (audit_series.KNOWN,),
    "check_covered": (audit_events.COVERED,),
    "check_stays": (audit_films.STAYS,),
    "check_record": (audit_films.RECORD,),
    "check_people": (audit_people.PEOPLE, audit_people.LABELLED),
    "check_prior": (audit_people.PRIOR,),
    "check_last": (last_values.KNOWN_BEFORE, last_values.IS_LAST),
}


@pytest.fixture
def only(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """A function after which an audit makes, of its slow checks, those of the named claims only."""

    def keep(*claims: str) -> None:
        for check, of in SLOW_CHECKS.items():
            if not any(claim in whole for claim in claims for whole in of):
                nothing: Any = [] if check == "check_last" else decide(of[0], {}, "not looked at")
                monkeypatch.setattr(audit_claims, check, lambda *given, nothing=nothing: nothing)

    return keep


@pytest.fixture
def frames() -> Frames:
    return tiny_frames()


@pytest.fixture
def write() -> Callable[..., Path]:
    return write_tables


@pytest.fixture
def config(tmp_path: Path) -> Callable[..., FeaturesConfig]:
    """A config of the tiny MIMIC in tmp_path/mimic; keys may be replaced."""

    def make(**keys: Any) -> FeaturesConfig:
        keys = {"mimic_iv": str(tmp_path / "mimic"), "out": tmp_path / "features", "memory": "800MB"} | keys
        return FeaturesConfig(**keys)

    return make
