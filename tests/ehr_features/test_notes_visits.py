"""Notes of hand-worked visits: their text, and the effect of unusual rows."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from ehr_features.notes import facts as notes_words
from ehr_features.notes.facts import FIELDS, complaints
from ehr_features.notes.template import read_template
from ehr_features.notes.write import rendered
from ehr_features.raw.engine import hold
from ehr_features.raw.source import Source

# ---- a hand-worked visit --------------------------------------------------------------------------------------------
AT = pd.Timestamp("2150-05-01 12:00:00")


def hour(h: float) -> pd.Timestamp:
    return AT + pd.Timedelta(hours=h)


def frames() -> dict[str, pd.DataFrame]:
    """One subject: an earlier admission, a visit that began two hours before the film, and things from after it."""
    vitals = pd.DataFrame(
        [(-1.5, 98.6, 80, 18, 97, 120, 70), (-0.5, 212.0, 90, None, 97, 118, None), (0.1, 100.4, 140, 30, 80, 80, 40)],
        columns=["charttime", "temperature", "heartrate", "resprate", "o2sat", "sbp", "dbp"],
    )
    vitals = vitals.assign(charttime=vitals["charttime"].map(hour), stay_id=31, subject_id=1)
    drug = {"stay_id": 31, "subject_id": 1}
    return {
        "patients": pd.DataFrame({"subject_id": [1], "gender": ["F"], "anchor_age": [60], "anchor_year": [2150]}),
        "admissions": pd.DataFrame(
            {
                "subject_id": 1,
                "hadm_id": [20, 21, 22],
                "admittime": [hour(-900), hour(-20), hour(1)],
                "dischtime": [hour(-800), AT, hour(90)],
                "edregtime": [pd.NaT, pd.NaT, hour(-2)],
            }
        ),
        "diagnoses_icd": pd.DataFrame(
            [(1, 20, 2, "I10 ", 10), (1, 20, 1, "4019", 9), (1, 20, 3, "I10", 9), (1, 21, 1, "J189", 10)],
            columns=["subject_id", "hadm_id", "seq_num", "icd_code", "icd_version"],
        ),
        "d_icd_diagnoses": pd.DataFrame(
            [
                ("I10", 10, "Essential (primary) hypertension"),
                ("4019", 9, "Hypertension; unspecified"),
                ("J189", 10, "X"),
            ],
            columns=["icd_code", "icd_version", "long_title"],
        ),
        "edstays": pd.DataFrame(
            {"subject_id": 1, "hadm_id": [22], "stay_id": [31], "intime": [hour(-2)], "arrival_transport": ["UNKNOWN"]}
        ),
        "triage": pd.DataFrame(
            {"subject_id": [1], "stay_id": [31], "temperature": [98.6], "heartrate": [999.0], "resprate": [None]}
            | {"o2sat": [96.0], "sbp": [130.0], "dbp": [None], "pain": ["ua"], "acuity": [2.0]}
            | {"chiefcomplaint": ["SOB, N/V, unknown, ___"]}
        ),
        "vitalsign": vitals,
        "pyxis": pd.DataFrame(
            [(hour(-1), "Morphine"), (hour(-0.5), "morphine"), (hour(0.5), "Heparin"), (hour(-1), "nan")],
            columns=["charttime", "name"],
        ).assign(**drug),
        "medrecon": pd.DataFrame(
            [
                (hour(-1), "metoprolol  tartrate"),
                (hour(-1), "metoprolol tartrate"),
                (hour(-1), "Aspirin"),
                (hour(3), "late"),
            ],
            columns=["charttime", "name"],
        ).assign(**drug),
    }


def note_of(tables: dict[str, pd.DataFrame], **film: Any) -> pd.Series:
    row = {"dicom_id": "f", "subject_id": 1, "split": "train", "taken_at": AT, "hadm_id": None, "ed_stay_id": 31}
    row |= {"age_years": 60.0, "age_capped": False, "sex": "F"} | film
    source = Source.from_frames(tables)
    columns = {"hadm_id": pa.int64(), "ed_stay_id": pa.int64(), "sex": pa.string(), "age_years": pa.float64()}
    columns |= {"dicom_id": pa.string(), "subject_id": pa.int64(), "split": pa.string(), "taken_at": pa.timestamp("us")}
    columns |= {"age_capped": pa.bool_()}
    films = hold(source.con, "films", pa.table({n: pa.array([row[n]], t) for n, t in columns.items()}))
    words = complaints(source, notes_words.read_abbreviations(None))
    return (
        rendered(source, films, read_template(None, FIELDS), words)
        .to_pandas()
        .astype(object)
        .iloc[0]
        .replace({np.nan: None})
    )


def test_a_visit_worked_by_hand() -> None:
    note = note_of(frames())
    assert note["section_person"] == "Patient: 60 years old, female."
    assert note["section_arrival"] == "Emergency department arrival: 2.0 hours ago."  # UNKNOWN transport is left out
    assert note["section_complaint"] == "Chief complaint: shortness of breath, nausea and vomiting."
    assert note["section_triage"] == (
        "Triage: acuity 2 of 5, temperature 37.0 C, oxygen saturation 96%, blood pressure systolic 130 mmHg."
    )
    assert note["section_vitals"] == (
        "Latest vital signs, 0.5 hours ago: temperature 37.0 C, heart rate 90 per minute, respiratory rate 18 per "
        "minute, oxygen saturation 97%, blood pressure 118/70 mmHg."
    )
    assert note["section_given"] == "Given in the emergency department: Morphine."
    assert note["section_home"] == "Home medication: Aspirin; metoprolol tartrate."
    assert note["section_history"] == (  # an admission that ends as the film is taken has not ended before it
        "Earlier admissions: 1. Diagnoses of earlier admissions: Hypertension, unspecified; Essential (primary) "
        "hypertension."
    )
    assert note["available_at"] == hour(-0.5)
    assert note["sources"] == "patients,admissions,diagnoses_icd,edstays,triage,vitalsign,medrecon,pyxis"


def test_a_film_before_its_visit_knows_nothing_of_it() -> None:
    note = note_of(frames(), taken_at=hour(-3))
    assert note["ed_stay_id"] is None
    assert [c for c in note.index if c.startswith("section_") and note[c] is not None] == [
        "section_person",
        "section_history",
    ]
    assert note["section_person"] == "Patient: 60 years old, female." and note["available_at"] == hour(-3)


def test_the_visit_that_led_to_the_admission_is_told_of_a_film_on_the_ward() -> None:
    note = note_of(frames(), hadm_id=22, ed_stay_id=None, taken_at=hour(30))
    assert note["ed_stay_id"] == 31 and "Hospital admission: 29.0 hours ago." in note["section_arrival"]
    assert "Heparin; Morphine" in note["section_given"] and "late" in note["section_home"]
    assert "heart rate 140" in note["section_vitals"] and "X" in note["section_history"]


def test_ages_above_89_are_given_as_the_bound_that_is_known() -> None:
    assert "over 89 years old" in note_of(frames(), age_years=91.0, age_capped=True)["section_person"]
    assert "over 79 years old" in note_of(frames(), age_years=81.0, age_capped=True)["section_person"]
    assert note_of(frames(), age_years=None, sex=None)["section_person"] is None


def test_without_emergency_tables_the_admission_is_told_of() -> None:
    tables = {n: t for n, t in frames().items() if n in ("patients", "admissions", "diagnoses_icd", "d_icd_diagnoses")}
    note = note_of(tables, hadm_id=22, ed_stay_id=None, taken_at=hour(2))
    assert note["section_arrival"] == "Emergency department arrival: 4.0 hours ago. Hospital admission: 1.0 hours ago."
    assert note["section_complaint"] is None and note["sources"] == "patients,admissions,diagnoses_icd"


def test_odd_rows_change_no_word_of_a_note() -> None:
    """Repeated rows, further classes of a drug, unusual spelling, no time, NaN as text, and rows from after the
    film."""
    plain, odd = frames(), frames()
    late = dict(charttime=hour(0.5))
    odd["vitalsign"] = pd.concat(
        [
            plain["vitalsign"].assign(charttime=pd.NaT, heartrate=55),
            plain["vitalsign"],
            plain["vitalsign"].assign(**late, heartrate=222, temperature=104.0),
            plain["vitalsign"].assign(charttime=hour(-0.1), **dict.fromkeys(["temperature", "heartrate"], np.nan))
            .assign(resprate=-4, o2sat=250, sbp=np.inf, dbp=np.nan),
        ]
    )  # fmt: skip
    for name in ("pyxis", "medrecon"):
        each = plain[name]
        more = [each.assign(name=text) for text in ("", "  ", "NaN", "None", "___")]
        upper = each.assign(name=" " + each["name"].str.lower() + " \t") if name == "medrecon" else each
        odd[name] = pd.concat([each, *more, each.assign(name="LATE", **late), upper, each.assign(charttime=pd.NaT)])
    odd["edstays"] = pd.concat([plain["edstays"]] * 2)
    odd["diagnoses_icd"] = pd.concat([plain["diagnoses_icd"], plain["diagnoses_icd"].assign(seq_num=40)])
    odd["d_icd_diagnoses"] = pd.concat([plain["d_icd_diagnoses"]] * 2)
    odd["admissions"] = pd.concat([plain["admissions"]] * 2)
    odd["triage"] = plain["triage"].assign(chiefcomplaint=" sOb ,  N/v;NaN,\nsob,none, ___ .", pain="NaN")
    a, b = note_of(plain).drop("section_home"), note_of(odd).drop("section_home")
    assert a.to_dict() == b.to_dict()
    assert note_of(odd)["section_home"].lower() == note_of(plain)["section_home"].lower()


def test_of_two_triage_rows_one_is_taken_whatever_their_order() -> None:
    tables = frames()
    two = pd.concat([tables["triage"], tables["triage"].assign(heartrate=70.0, chiefcomplaint="Cough")])
    notes = [note_of(tables | {"triage": rows}).to_dict() for rows in (two, two[::-1])]
    assert notes[0] == notes[1] and notes[0]["section_complaint"] is not None


def test_of_two_visits_at_once_the_films_own_is_told() -> None:
    tables = frames()
    other = tables["edstays"].assign(stay_id=32, hadm_id=None, intime=hour(-1), arrival_transport="HELICOPTER")
    tables["edstays"] = pd.concat([tables["edstays"], other])
    assert note_of(tables)["ed_stay_id"] == 31 and note_of(tables, ed_stay_id=32)["ed_stay_id"] == 32
    note = note_of(tables, ed_stay_id=32)
    assert note["section_arrival"] == "Emergency department arrival: helicopter, 1.0 hours ago."
    assert note["section_triage"] is None and note["section_given"] is None


# ---- abbreviations --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("SOB/CP", "shortness of breath/chest pain"),
        ("s/p Fall, R leg pain", "after fall, right leg pain"),
        ("ABD PAIN, N/V/D", "abdominal pain, nausea, vomiting and diarrhea"),
        ("Dyspnea, Dyspnea", "dyspnea"),
        ("w/u for PNA", "workup for pneumonia"),
        ("Robber, soba, T-L spine", "robber, soba, t-l spine"),
        ("unknown", None),
        ("UNKNOWN-CC, --", None),
        ("-LOC, - fever -", "-loss of consciousness, fever"),
        ("ALTERED  MS, Rt arm N&V", "altered mental status, right arm nausea and vomiting"),
        ("___; NaN", None),
        ("temp 99.5 w/cough", "temp 99.5 with cough"),
    ],
)
def test_abbreviations_are_expanded_as_words(text: str, plain: str | None) -> None:
    table = notes_words.read_abbreviations(None)
    assert notes_words.complaint(text, table, notes_words.expander(table)) == plain
