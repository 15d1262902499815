"""The record's columns of each film: hand-worked tables, and nothing from after the film."""

import shutil
from typing import Any

import ibis
import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ibis.util import gen_name

from ehr_features import schema
from ehr_features.cohort import Attrition
from ehr_features.films import linking
from ehr_features.films.metadata import held
from ehr_features.films.record import add_record, earlier_studies
from ehr_features.notes.facts import facts
from ehr_features.raw.engine import connect, hold
from ehr_features.raw.source import Source

CON = connect("duckdb")
FILM = {"dicom_id": "a", "subject_id": 10, "study_id": 50, "StudyDate": 21500102, "StudyTime": 120000.0}
FILM |= {"ViewPosition": "AP", "PatientOrientationCodeSequence_CodeMeaning": "Erect"}
TABLES: dict[str, list[dict[str, Any]]] = {
    "patients": [{"subject_id": 10, "gender": "F", "anchor_age": 60, "anchor_year": 2148}],
    "admissions": [
        {"subject_id": 10, "hadm_id": 20, "admittime": "2150-01-01 12:00:00", "dischtime": "2150-01-09 10:00:00"}
        | {"hospital_expire_flag": 1, "race": "WHITE", "insurance": "Other", "language": "ENGLISH"},
        {"subject_id": 10, "hadm_id": 19, "admittime": "2149-01-01", "dischtime": "2149-01-04"}
        | {"hospital_expire_flag": 0},
    ],
    "icustays": [
        {"subject_id": 10, "stay_id": 30, "intime": "2150-01-02", "outtime": "2150-01-05", "los": 3.0},
    ],
    "edstays": [
        {"subject_id": 10, "stay_id": 40, "intime": "2150-01-01 06:00:00", "outtime": "2150-01-01 11:00:00"},
    ],
    "triage": [
        {"subject_id": 10, "stay_id": 40, "temperature": 98.6, "heartrate": 90.0, "o2sat": 980.0, "acuity": 2.0},
    ],
    "diagnoses_icd": [
        {"hadm_id": 19, "subject_id": 10, "icd_code": "4280", "icd_version": 9},  # heart failure, a year before
        {"hadm_id": 20, "subject_id": 10, "icd_code": "J189", "icd_version": 10},  # pneumonia, coded after the film
    ],
    "cxr_chexpert": [{"subject_id": 10, "study_id": 50, "Edema": 1.0, "Pneumonia": -1.0, "Fracture": None}],
}


def images(
    films: list[dict[str, Any]], ed_tolerance_hours: float = 48.0, engine: str = "duckdb", **tables: Any
) -> pd.DataFrame:
    frames = TABLES | tables | {"cxr_metadata": [FILM | film for film in films]}
    source = Source.from_frames({name: pd.DataFrame(rows) for name, rows in frames.items() if rows}, engine)
    linked = linking.link_films(source, Attrition(), ed_tolerance_hours=ed_tolerance_hours)
    frame = add_record(source, linked).to_pandas().set_index("dicom_id").sort_index()
    return frame.astype({"taken_at": "datetime64[us]"})  # engines differ in the unit


def test_record_of_a_film_in_an_icu_stay() -> None:
    film = images([{}]).loc["a"]
    assert (film.sex, film.age_years, film.age_capped) == ("F", 62, False)
    assert (film.in_icu, film.icu_los_days, film.died_in_hospital) == (1, 3.0, 1)
    assert (film.race, film.insurance, film.language) == ("WHITE", "Other", "ENGLISH")
    assert (film.hours_since_hospital_arrival, film.hours_since_icu_arrival) == (24, 12)
    assert (film.hours_since_ed_arrival, film.ed_acuity, film.ed_heart_rate) == (30, 2, 90)
    assert film.ed_temperature_c == pytest.approx(37) and pd.isna(film.ed_o2sat)  # 980 % is no saturation
    assert (film.Edema, film.Pneumonia) == (1, -1) and pd.isna(film.Fracture)
    assert (film.num_prior_admissions, film.prior_phenotypes) == (1, "108")


@pytest.mark.parametrize(
    ("charted", "celsius"), [(98.6, 37), (37, 37), (39.5, 39.5), (50, None), (104, 40), (3.7, None), (986, None)]
)
def test_emergency_temperatures_charted_in_celsius_are_kept(charted: float, celsius: float | None) -> None:
    got = images([{}], triage=[TABLES["triage"][0] | {"temperature": charted}]).loc["a", "ed_temperature_c"]
    assert pd.isna(got) if celsius is None else got == pytest.approx(celsius)


OWN, BEFORE = TABLES["admissions"]
STAY = TABLES["icustays"][0] | {"hadm_id": 20}
ENDED = OWN | {"dischtime": "2150-01-02 08:00:00"}  # four hours before the film
J189 = {"subject_id": 10, "icd_code": "J189", "icd_version": 10}
HISTORY: dict[str, tuple[dict[str, Any], tuple[int, str]]] = {  # tables -> earlier admissions, their groups
    "a row listed twice": ({"admissions": [OWN, BEFORE, BEFORE]}, (1, "108")),
    "one hadm_id in different rows": ({"admissions": [OWN, BEFORE, BEFORE | {"race": "OTHER"}]}, (1, "108")),
    "the own admission ends before it begins": (
        {"admissions": [ENDED | {"admittime": "2150-01-02 10:00:00"}, BEFORE], "icustays": [STAY]},
        (1, "108"),
    ),
    "another admission ends before it begins": (
        {
            "admissions": [OWN, BEFORE, BEFORE | {"hadm_id": 18, "admittime": "2149-06-05", "dischtime": "2149-06-01"}],
            "diagnoses_icd": [*TABLES["diagnoses_icd"], J189 | {"hadm_id": 18}],
        },
        (1, "108"),
    ),
    "one of the two rows of an admission ends before it begins": (
        {"admissions": [OWN, BEFORE, BEFORE | {"admittime": "2149-02-01"}]},
        (0, ""),
    ),
    "an admission without its begin": ({"admissions": [OWN, BEFORE | {"admittime": None}]}, (0, "")),
    "an admission without its end": ({"admissions": [OWN, BEFORE | {"dischtime": None}]}, (0, "")),
    "the own stay outlasts its admission": ({"admissions": [ENDED, BEFORE], "icustays": [STAY]}, (1, "108")),
    "two stays of one admission, the film in none": (
        {
            "admissions": [ENDED, BEFORE],
            "icustays": [
                STAY | {"outtime": "2150-01-02 03:00:00"},
                STAY | {"stay_id": 31, "intime": "2150-01-02 20:00:00"},
            ],
        },
        (1, "108"),
    ),
    "the own emergency visit outlasts its admission": (
        {"admissions": [ENDED, BEFORE], "edstays": [TABLES["edstays"][0] | {"hadm_id": 20, "outtime": "2150-01-03"}]},
        (1, "108"),
    ),
    "discharged on the date of death, at midnight": (
        {
            "admissions": [OWN | {"dischtime": "2150-01-02", "deathtime": "2150-01-02 22:00:00"}, BEFORE],
            "icustays": None,
        },
        (1, "108"),
    ),
    "an admission that was over a second before": (
        {"admissions": [ENDED | {"dischtime": "2150-01-02 11:59:59"}, BEFORE], "icustays": None},
        (2, "108 122"),
    ),
    "an admission that ends with the film": (
        {"admissions": [ENDED | {"dischtime": "2150-01-02 12:00:00"}, BEFORE], "icustays": None},
        (1, "108"),
    ),
    "the stay of another person": (
        {"admissions": [ENDED, BEFORE], "icustays": [STAY | {"subject_id": 11}]},
        (2, "108 122"),
    ),
}


def test_history_is_what_was_over_before_the_film_in_its_row_and_in_its_note(apart: Any) -> None:
    tables = apart({name: TABLES | {"cxr_metadata": [FILM]} | tables for name, (tables, _) in HISTORY.items()})
    codes = [{"icd_code": code, "icd_version": v, "long_title": code} for code, v in (("4280", 9), ("J189", 10))]
    source = Source.from_frames(
        {n: pd.DataFrame(rows) for n, rows in tables.items()} | {"d_icd_diagnoses": pd.DataFrame(codes)}
    )
    films = held(
        source, add_record(source, linking.link_films(source, Attrition())).mutate(split=ibis.literal("train"))
    )
    said = films.to_pandas().set_index("dicom_id")[["num_prior_admissions", "prior_phenotypes"]]
    assert dict(zip(said.index, said.itertuples(index=False, name=None), strict=True)) == {
        name: wanted for name, (_, wanted) in HISTORY.items()
    }
    notes = facts(source, films, None).to_pandas().fillna({"num_prior_admissions": "0", "prior_diagnoses": ""})
    titles = {"": "", "108": "4280", "108 122": "J189; 4280"}  # the latest admission's first
    told = notes.set_index("dicom_id")[["num_prior_admissions", "prior_diagnoses"]].T.to_dict("list")
    assert told == {name: [str(n), titles[listed]] for name, (_, (n, listed)) in HISTORY.items()}


DEATHS: dict[str, tuple[dict[str, Any], str | None, int | None]] = {  # admission, dod -> died_in_hospital
    "alive": ({}, None, 0),
    "flag": ({"hospital_expire_flag": 1}, None, 1),
    "deathtime": ({"deathtime": "2150-01-08 10:00:00"}, None, 1),
    "dod within the admission": ({}, "2150-01-05", 1),
    "dod on the day of discharge": ({}, "2150-01-09", 0),
    "dod later": ({}, "2150-06-01", 0),
    "dod before the admission": ({}, "2149-06-01", 1),
    "nothing is said": ({"hospital_expire_flag": None}, None, None),
}


def test_death_in_hospital_is_told_by_flag_deathtime_and_dod_together(apart: Any) -> None:
    alive = OWN | {"hospital_expire_flag": 0, "deathtime": None}
    tables = apart(
        {
            name: TABLES
            | {"admissions": [alive | own], "patients": [TABLES["patients"][0] | {"dod": dod}], "cxr_metadata": [FILM]}
            for name, (own, dod, _) in DEATHS.items()
        }
    )
    source = Source.from_frames({name: pd.DataFrame(rows) for name, rows in tables.items()})
    told = (
        add_record(source, linking.link_films(source, Attrition())).to_pandas().set_index("dicom_id").died_in_hospital
    )
    assert {n: None if pd.isna(v) else int(v) for n, v in told.items()} == {n: died for n, (*_, died) in DEATHS.items()}


def test_arrival_in_hospital_is_that_at_the_emergency_visit_of_the_admission() -> None:
    visit = TABLES["edstays"][0] | {"hadm_id": 20}
    assert images([{}], edstays=[visit]).loc["a"].hours_since_hospital_arrival == 30  # admitted six hours after
    assert images([{}], edstays=[visit | {"hadm_id": 19}]).loc["a"].hours_since_hospital_arrival == 24


def test_triage_of_a_visit_that_has_not_begun_is_not_known() -> None:
    later = [{"subject_id": 10, "stay_id": 40, "intime": "2150-01-02 14:00:00", "outtime": "2150-01-02 20:00:00"}]
    film = images([{}], edstays=later).loc["a"]
    assert (film.ed_stay_id, film.ed_stay_id_link, film.ed_stay_id_gap_hours) == (40, "before", 2)
    assert film[["ed_acuity", "ed_heart_rate", "hours_since_ed_arrival", "arrival_transport"]].isna().all()


def test_death_is_of_the_admission_that_holds_the_film() -> None:
    films = [
        {"dicom_id": "b", "study_id": 51, "StudyDate": 21490102},
        {"dicom_id": "c", "study_id": 52, "StudyDate": 21490601},
    ]
    frame = images([{}, *films])
    assert frame["died_in_hospital"].fillna(-1).tolist() == [1, 0, -1]
    assert frame["in_icu"].tolist() == [1, 0, 0]


def test_film_of_a_subject_without_a_record_knows_nothing() -> None:
    film = images([{"subject_id": 99}]).loc["a"]
    record = [
        c for c, s in schema.IMAGES.items() if s.group not in ("id", "time", "view", "position", "split", "finding")
    ]
    assert film[[c for c in record if c not in ("view_source", "num_prior_studies")]].isna().all()


def test_age_above_89_is_marked_as_capped() -> None:
    old = [TABLES["patients"][0] | {"anchor_age": 91}]
    assert bool(images([{}], patients=old).loc["a"].age_capped) is True


def test_flags_by_calendar_date_see_the_whole_day() -> None:
    stays = [TABLES["icustays"][0] | {"intime": "2150-01-02 20:00:00"}]
    film = images([{}], icustays=stays).loc["a"]
    assert (film.in_icu, film.msn_in_icu) == (0, 1)


def test_emergency_columns_are_empty_without_its_tables() -> None:
    film = images([{}], edstays=None, triage=None).loc["a"]
    assert film[[c for c, s in schema.IMAGES.items() if s.group == "ed_triage"]].isna().all()


def test_every_column_of_the_schema_is_made() -> None:
    assert set(images([{}]).reset_index()) == set(schema.IMAGES) - {"split"}


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 23)), min_size=1, max_size=8))
def test_earlier_studies_are_those_that_began_before(films: list[tuple[int, int]]) -> None:
    frame = pd.DataFrame(films, columns=["study_id", "hour"]).assign(subject_id=10)
    frame["dicom_id"] = frame.index.astype(str)
    frame["taken_at"] = pd.Timestamp("2150-01-01") + pd.to_timedelta(frame.pop("hour"), unit="h")
    table = hold(CON, gen_name("films"), pa.Table.from_pandas(frame, preserve_index=False))
    got = earlier_studies(table).to_pandas().set_index("dicom_id")
    began = {study: min(h for s, h in films if s == study) for study, _ in films}
    for i, (study, hour) in enumerate(films):
        earlier = [h for h in began.values() if h < began[study]]
        film = got.loc[str(i)]
        assert film.num_prior_studies == len(earlier)
        since = film.hours_since_prior_study
        assert since == hour - max(earlier) if earlier else pd.isna(since)


@pytest.mark.slow
@pytest.mark.spark
@pytest.mark.filterwarnings("ignore")  # py4j leaves its sockets to the end
def test_spark_equals_duckdb_on_every_column() -> None:
    pytest.importorskip("pyspark", reason="pyspark is not installed (extra `spark`)")
    if shutil.which("java") is None:
        pytest.skip("Java is not on this machine")
    films = [
        {},
        {"dicom_id": "b", "study_id": 51, "StudyDate": 21490102},
        {"dicom_id": "c", "study_id": 52, "StudyDate": 19000101},
        {"dicom_id": "d", "study_id": 53, "subject_id": 99, "StudyTime": 500.0, "ViewPosition": None},
        {"dicom_id": "e", "study_id": 54},
        {"dicom_id": "f", "study_id": 54, "subject_id": 99},
    ]
    ours = images(films)
    pd.testing.assert_frame_equal(ours, images(films, engine="pyspark").astype(ours.dtypes))
