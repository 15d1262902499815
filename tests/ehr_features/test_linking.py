"""Links from films to admissions, ICU stays and emergency stays, compared with loops over rows."""

from pathlib import Path
from typing import Any

import ibis
import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ibis.util import gen_name

from configs import UserError
from ehr_features.cohort import Attrition
from ehr_features.films import linking
from ehr_features.films.metadata import held
from ehr_features.raw.engine import connect, hold
from ehr_features.raw.source import Source

CON = connect("duckdb")
START = pd.Timestamp("2150-01-01")
HOURS = st.integers(0, 60)
SUBJECTS = st.integers(1, 2)
INTERVALS = st.lists(st.tuples(SUBJECTS, HOURS, st.integers(-3, 30)), max_size=8)
FILMS = st.lists(st.tuples(SUBJECTS, st.none() | HOURS), min_size=1, max_size=8)


def table(frame: pd.DataFrame, times: list[str]) -> ibis.Table:
    fields = {"subject_id": pa.int64(), "stay_id": pa.int64(), "predict_at_hours": pa.float64()}
    fields |= dict.fromkeys(times, pa.timestamp("us"))
    schema = pa.schema([(c, fields.get(c, pa.string())) for c in frame])
    return hold(CON, gen_name("t"), pa.Table.from_pandas(frame, schema=schema, preserve_index=False))


def films_frame(films: list[tuple[int, int | None]], views: str = "AP") -> pd.DataFrame:
    frame = pd.DataFrame(films, columns=["subject_id", "hour"])
    frame["dicom_id"] = [f"film{i}" for i in range(len(films))]
    frame["taken_at"] = pd.to_datetime([None if h is None else START + pd.Timedelta(hours=h) for _, h in films])
    return frame.drop(columns="hour").assign(view=views)


def intervals_frame(intervals: list[tuple[int, int, int]], start: str = "start", end: str = "end") -> pd.DataFrame:
    frame = pd.DataFrame(intervals, columns=["subject_id", "begin", "long"], dtype="int64")
    frame["stay_id"] = range(100, 100 + len(intervals))
    frame[start] = START + pd.to_timedelta(frame["begin"], unit="h")
    frame[end] = frame[start] + pd.to_timedelta(frame["long"], unit="h")
    return frame.drop(columns=["begin", "long"])


def naive_nearest(films: pd.DataFrame, intervals: pd.DataFrame, tolerance: float) -> dict[str, tuple[int, str, float]]:
    """Look at every interval of every film."""
    found = {}
    for film in films.itertuples():
        choices = []
        for one in intervals.itertuples():
            if one.subject_id != film.subject_id or pd.isna(film.taken_at) or one.end < one.start:
                continue
            if one.start <= film.taken_at <= one.end:
                gap, link = 0.0, "inside"
            elif film.taken_at < one.start:
                gap, link = (one.start - film.taken_at).total_seconds() / 3600, "before"
            else:
                gap, link = (film.taken_at - one.end).total_seconds() / 3600, "after"
            if gap <= tolerance:
                later = one.start > film.taken_at
                choices.append((gap, later, -one.start.value, -one.stay_id, one.stay_id, link))
        if choices:
            gap, _, _, _, stay, link = min(choices)
            found[film.dicom_id] = (stay, link, gap)
    return found


@settings(max_examples=60, deadline=None)
@given(FILMS, INTERVALS, st.sampled_from([0.0, 6.0, 24.0]))
def test_nearest_interval_equals_a_loop_over_all(
    films: list[tuple[int, int | None]], intervals: list[tuple[int, int, int]], tolerance: float
) -> None:
    film, stay = films_frame(films), intervals_frame(intervals)
    tables = table(film, ["taken_at"]), table(stay, ["start", "end"])
    got = linking.nearest(*tables, "stay_id", tolerance_hours=tolerance).to_pandas()
    rows = zip(got.dicom_id, got.stay_id, got.stay_id_link, got.stay_id_gap_hours, strict=True)
    assert got["dicom_id"].is_unique
    assert {d: (s, link, gap) for d, s, link, gap in rows} == naive_nearest(film, stay, tolerance)


@settings(max_examples=60, deadline=None)
@given(FILMS, INTERVALS, st.lists(HOURS, min_size=1, max_size=4), st.data())
def test_last_film_is_eligible_and_never_later_than_the_prediction(
    films: list[tuple[int, int | None]], intervals: list[tuple[int, int, int]], hours: list[int], data: st.DataObject
) -> None:
    film, stay = films_frame(films), intervals_frame(intervals, "intime", "outtime")
    film["view"] = [data.draw(st.sampled_from(["AP", "PA", "LATERAL"])) for _ in film.index]
    samples = pd.DataFrame(
        [(s, float(h)) for s in stay["stay_id"] for h in hours], columns=["stay_id", "predict_at_hours"]
    )
    samples.insert(0, "sample_id", [str(i) for i in samples.index])
    pairs = linking.stay_films(table(film, ["taken_at"]), table(stay, ["intime", "outtime"]))
    last = linking.last_film(table(samples, []), pairs).to_pandas()
    expected = {}
    for one in samples.itertuples():
        own = stay.set_index("stay_id").loc[one.stay_id]
        inside = film[
            film["taken_at"].between(own["intime"], own["outtime"]) & (film["subject_id"] == own["subject_id"])
        ]
        until = own["intime"] + pd.Timedelta(hours=one.predict_at_hours)
        eligible = inside[(inside["view"] == "AP") & (inside["taken_at"] <= until)].sort_values(
            ["taken_at", "dicom_id"]
        )
        if len(eligible):
            expected[one.sample_id] = eligible["dicom_id"].iloc[-1]
    assert dict(zip(last["sample_id"], last["dicom_id"], strict=True)) == expected


# --- worked tables ---------------------------------------------------------------------------------------------------

FILM = {"dicom_id": "a", "subject_id": 10, "study_id": 50, "StudyDate": 21500101, "StudyTime": "120000.0"}
FILM |= {"ViewPosition": "AP", "ViewCodeSequence_CodeMeaning": "antero-posterior"}
FILM |= {"PatientOrientationCodeSequence_CodeMeaning": "Erect"}


def source(films: list[dict[str, Any]], **tables: list[dict[str, Any]]) -> Source:
    frames: dict[str, list[dict[str, Any]]] = {
        "patients": [{"subject_id": 10, "gender": "F", "anchor_age": 60, "anchor_year": 2149}],
        "admissions": [
            {"subject_id": 10, "hadm_id": 20, "admittime": "2149-12-31 10:00:00", "dischtime": "2150-01-09"}
        ],
        "icustays": [{"subject_id": 10, "stay_id": 30, "intime": "2150-01-01", "outtime": "2150-01-05", "los": 4.0}],
    }
    frames |= {"cxr_metadata": [FILM | film for film in films], **tables}
    return Source.from_frames({name: pd.DataFrame(rows) for name, rows in frames.items()})


def link(films: list[dict[str, Any]], **kwargs: Any) -> tuple[pd.DataFrame, Attrition]:
    attrition = Attrition()
    options = {k: kwargs.pop(k) for k in ("preset", "ed_tolerance_hours") if k in kwargs}
    linked = linking.link_films(source(films, **kwargs), attrition, **options).to_pandas()
    return linked.set_index("dicom_id").sort_index(), attrition


def excluded(attrition: Attrition, why: str) -> dict[str, Any]:
    (one,) = [e for e in attrition.exclusions if why in e["why"]]
    return one


def test_film_finds_study_admission_and_stay() -> None:
    linked, _ = link([{}])
    film = linked.loc["a"]
    assert (film.hadm_id, film.stay_id) == (20, 30) and pd.isna(film.ed_stay_id)
    assert (film.hadm_id_link, film.stay_id_link, film.stay_id_gap_hours) == ("inside", "inside", 0)
    assert film.path == "files/p10/p10/s50/a.jpg"


def test_admission_reaches_back_to_the_registration_in_the_emergency_department() -> None:
    admission = {"subject_id": 10, "hadm_id": 20, "admittime": "2150-01-02", "dischtime": "2150-01-09"}
    assert link([{}], admissions=[admission])[0]["hadm_id"].isna().all()
    admission["edregtime"] = "2150-01-01 11:59:59"
    assert link([{}], admissions=[admission])[0]["hadm_id"].tolist() == [20]


def test_study_time_without_leading_zeros_is_read_from_the_right() -> None:
    linked, _ = link([{"StudyTime": "500.0"}, {"dicom_id": "b", "StudyTime": "235959.875"}])
    assert linked["taken_at"].tolist() == [pd.Timestamp("2150-01-01 00:05"), pd.Timestamp("2150-01-01 23:59:59")]


@pytest.mark.parametrize(
    "bad",
    [
        {"StudyDate": 19000101},
        {"StudyDate": 21500231},
        {"StudyDate": 0},
        {"StudyTime": "250000"},
        {"StudyTime": "-1"},
        {"StudyTime": "noon"},
        {"StudyTime": "nan"},
        {"StudyTime": None},
        {"StudyDate": 20400101},  # before the subject was born
    ],
    ids=str,
)
def test_film_with_an_impossible_date_is_kept_without_time_and_counted(bad: dict[str, Any]) -> None:
    linked, attrition = link([{}, {"dicom_id": "b"} | bad])
    assert pd.isna(linked.loc["b", "taken_at"]) and pd.isna(linked.loc["b", "stay_id"])
    assert linked.loc["a", "stay_id"] == 30
    assert excluded(attrition, "impossible StudyDate") | {"table": 0, "why": 0} == {
        "table": 0, "why": 0, "before": 2, "after": 1, "num_ids": 1, "ids": ["b"]
    }  # fmt: skip


def test_study_of_two_subjects_is_left_out_and_listed() -> None:
    films = [{}, {"dicom_id": "b", "study_id": 51}, {"dicom_id": "c", "study_id": 51, "subject_id": 11}]
    linked, attrition = link(films)
    assert linked.index.tolist() == ["a"]
    assert excluded(attrition, "two subjects")["ids"] == [51]
    assert excluded(attrition, "two subjects")["after"] == 1


def test_film_listed_twice_is_kept_once() -> None:
    linked, attrition = link([{}, {}])
    assert linked.index.tolist() == ["a"] and excluded(attrition, "listed twice")["ids"] == ["a"]


@pytest.mark.parametrize("order", [1, -1])
def test_of_a_film_listed_twice_one_row_is_kept_whatever_the_order(order: int) -> None:
    rows = [{"StudyDate": 21500102}, {"StudyDate": 21500101}, {"StudyDate": None, "ViewPosition": "LL"}]
    linked, _ = link(rows[::order])
    assert str(linked["taken_at"].iloc[0])[:10] == "2150-01-01"


def test_a_table_without_a_film_is_refused() -> None:
    with pytest.raises(UserError, match="1 rows, none a film that can be used; mimic_cxr=null"):
        link([{"dicom_id": None}])


def test_films_without_ids_are_left_out_and_counted() -> None:
    linked, attrition = link([{}, {"dicom_id": None}, {"dicom_id": "b", "subject_id": None, "study_id": 51}])
    assert linked.index.tolist() == ["a"]
    assert excluded(attrition, "no dicom_id")["ids"] == [50, 51] and excluded(attrition, "no dicom_id")["after"] == 1


def test_intervals_that_end_before_they_begin_hold_no_film_and_are_listed() -> None:
    backwards = {"subject_id": 10, "intime": "2150-01-02", "outtime": "2150-01-01"}
    linked, attrition = link(
        [{"StudyDate": 21500102}],
        icustays=[backwards | {"stay_id": 31}, backwards | {"stay_id": 32, "outtime": None}],
        edstays=[backwards | {"stay_id": 41}],
        admissions=[{"subject_id": 10, "hadm_id": 21, "admittime": "2150-01-03", "dischtime": "2150-01-01"}],
    )
    assert linked.loc["a", ["hadm_id", "stay_id", "ed_stay_id"]].isna().all()
    listed = {e["table"]: e["ids"] for e in attrition.exclusions if "ends before it begins" in e["why"]}
    assert listed == {"admissions": [21], "icustays": [31, 32], "edstays": [41]}


def test_empty_view_is_resolved_from_its_code_where_it_can_be() -> None:
    codes = {"a": "postero-anterior", "b": "Lateral", "c": "oblique", "d": None}
    films = [{"dicom_id": d, "ViewPosition": None, "ViewCodeSequence_CodeMeaning": c} for d, c in codes.items()]
    films.append({"dicom_id": "e", "ViewPosition": " ll", "ViewCodeSequence_CodeMeaning": "lateral"})
    linked, attrition = link(films)
    assert linked["view"].fillna("").to_dict() == {"a": "PA", "b": "LATERAL", "c": "", "d": "", "e": "LL"}
    assert linked["view_source"].fillna("").tolist() == ["ViewCodeSequence"] * 2 + ["", "", "ViewPosition"]
    assert (
        attrition.counts["linking"] | {"view_from_ViewCodeSequence": 2, "without_view": 2}
        == attrition.counts["linking"]
    )
    assert link(films, preset="medfuse")[0]["view"].fillna("").tolist() == ["", "", "", "", "LL"]


def test_two_stays_at_once_are_counted_and_the_later_one_taken() -> None:
    stay = {"subject_id": 10, "intime": "2150-01-01", "outtime": "2150-01-05", "los": 4.0}
    later = stay | {"stay_id": 31, "intime": "2150-01-01 12:00:00"}
    linked, attrition = link([{}], icustays=[stay | {"stay_id": 32}, later])
    assert linked["stay_id"].tolist() == [31]
    assert attrition.counts["linking"]["stay_id_ambiguous"] == 1


@pytest.mark.parametrize(("tolerance", "link_"), [(6.0, None), (24.0, "after")])
def test_emergency_stay_is_found_within_the_tolerance(tolerance: float, link_: str | None) -> None:
    visit = {"subject_id": 10, "stay_id": 40, "intime": "2150-01-01 00:00:00", "outtime": "2150-01-01 04:00:00"}
    linked, _ = link([{}], edstays=[visit], ed_tolerance_hours=tolerance)  # 8 hours after the visit
    film = linked.loc["a"]
    if link_ is None:
        assert pd.isna(film.ed_stay_id) and pd.isna(film.ed_stay_id_link)
    else:
        assert (film.ed_stay_id, film.ed_stay_id_link, film.ed_stay_id_gap_hours) == (40, link_, 8.0)


VISIT = {
    "subject_id": 10,
    "stay_id": 40,
    "hadm_id": 20,
    "intime": "2150-01-01 10:00:00",
    "outtime": "2150-01-01 14:00:00",
}


def test_visits_fit_equally_only_with_the_same_gap(apart: Any) -> None:
    """Hours from the film to the end of a visit before it (or, below 0, to the begin of one after it)."""
    noon, hour = pd.Timestamp("2150-01-01 12:00"), pd.Timedelta(hours=1)
    cases = {}
    for gaps in ((1, 2), (2, 2), (0, 0), (0, 1), (-1, 1), (-1, 2)):
        begins = [noon - gap * hour - (2 * hour if gap >= 0 else 0 * hour) for gap in gaps]
        visits = [VISIT | {"stay_id": 40 + n, "intime": b, "outtime": b + 2 * hour} for n, b in enumerate(begins)]
        cases[str(gaps)] = {"cxr_metadata": [FILM], "edstays": [*visits, visits[0]]}  # the first is listed twice
    linked, attrition = link([], **apart(cases))
    assert excluded(attrition, "several emergency visits fit equally")["ids"] == ["(-1, 1)", "(0, 0)", "(2, 2)"]
    gaps_of = linked["ed_stay_id_gap_hours"].to_dict()
    assert gaps_of == {"(1, 2)": 1, "(2, 2)": 2, "(0, 0)": 0, "(0, 1)": 0, "(-1, 1)": 1, "(-1, 2)": 1}


NAMED: dict[str, tuple[dict[str, Any], dict[str, Any], tuple[str, float] | None]] = {  # visit, admission -> link, gap
    "inside the visit": ({}, {}, ("edstays", 2.0)),  # admitted at 14:00, no edregtime
    "between visit and ward": ({"outtime": "2150-01-01 11:00:00"}, {}, ("edstays", 2.0)),
    "impossible admission": ({}, {"admittime": "2150-01-09", "dischtime": "2150-01-02"}, ("edstays", -1.0)),
    "before the visit": ({"intime": "2150-01-01 13:00:00"}, {}, None),
    "visit without admission": ({"hadm_id": None}, {}, None),
    "visit of an admission that is not there": ({"hadm_id": 99}, {}, None),
    "visit of another person": ({"subject_id": 11}, {}, None),
    "edregtime": ({}, {"edregtime": "2150-01-01 10:00:00"}, ("inside", 0.0)),
    "times before names": ({"hadm_id": 21}, {"edregtime": "2150-01-01 10:00:00"}, ("inside", 0.0)),
}


def test_emergency_film_finds_the_admission_that_its_visit_names(apart: Any) -> None:
    cases = {}
    for name, (visit, admission, _) in NAMED.items():
        own = {"subject_id": 10, "hadm_id": 20, "admittime": "2150-01-01 14:00:00", "dischtime": "2150-01-09"}
        both = [own | {"edregtime": None} | admission, own | {"hadm_id": 21}]
        cases[name] = {"cxr_metadata": [FILM], "edstays": [VISIT | visit], "admissions": both}
    linked, attrition = link([], **apart(cases))
    wanted = {name: found for name, (*_, found) in NAMED.items()}
    told = linked[linked["hadm_id"].notna()].fillna({"hadm_id_gap_hours": -1.0})
    assert (told["hadm_id"] % 1000 == 20).all() and attrition.counts["linking"]["hadm_id_by_edstays"] == 3
    links = zip(told.index, zip(told["hadm_id_link"], told["hadm_id_gap_hours"], strict=True), strict=True)
    assert {name: None for name in NAMED} | dict(links) == wanted
    outside = [e["ids"] for e in attrition.exclusions if "outside of every hospital admission" in e["why"]]
    assert outside == [sorted(name for name, found in wanted.items() if not found)]


def test_film_in_an_icu_stay_outside_its_admissions_times_finds_it_all_the_same() -> None:
    stay = {"subject_id": 10, "stay_id": 30, "hadm_id": 20, "intime": "2150-01-01", "outtime": "2150-01-05"}
    own = {"subject_id": 10, "hadm_id": 20, "admittime": "2149-12-31", "dischtime": "2150-01-01 09:00:00"}
    film = link([{}], icustays=[stay], admissions=[own])[0].loc["a"]
    assert (film.hadm_id, film.hadm_id_link, film.hadm_id_gap_hours) == (20, "icustays", 3.0)


@pytest.mark.parametrize("preset", ["default", "medfuse"])
def test_views_and_positions_are_known_in_any_case(preset: str) -> None:
    said = ["ap", " Pa ", "Lateral", "ll"]
    films = [{"dicom_id": str(n), "ViewPosition": v} for n, v in enumerate(said)]
    films[0]["PatientOrientationCodeSequence_CodeMeaning"] = "RECUMBENT"
    linked, _ = link(films, preset=preset)
    assert linked["view"].tolist() == ["AP", "PA", "LATERAL", "LL"]
    assert linked["position"].tolist() == ["Recumbent", "Erect", "Erect", "Erect"]


def test_films_after_death_are_counted() -> None:
    own = {"subject_id": 10, "hadm_id": 20, "admittime": "2149-12-31", "dischtime": "2150-01-09"}
    for death, n in (("2150-01-01 11:00:00", 1), ("2150-01-01 13:00:00", 0)):
        assert link([{}], admissions=[own | {"deathtime": death}])[1].counts["linking"]["taken_after_death"] == n


def test_patient_listed_twice_links_once_and_is_counted() -> None:
    patient = {"subject_id": 10, "gender": "F", "anchor_age": 60, "anchor_year": 2149}
    linked, attrition = link([{}], patients=[patient, patient])
    assert linked.index.tolist() == ["a"]
    assert excluded(attrition, "subject_id in several rows")["ids"] == [10]


def test_each_film_without_a_link_is_counted_with_the_reason() -> None:
    films = [
        {},  # in the admission and the stay
        {"dicom_id": "b", "StudyDate": 21510101},  # a year later
        {"dicom_id": "c", "subject_id": 11, "study_id": 51},  # somebody without a record
        {"dicom_id": "d", "StudyTime": "990000"},  # no time
    ]
    stay = {"subject_id": 10, "stay_id": 30, "intime": "2150-01-01", "outtime": "2150-01-05", "los": 4.0}
    visit = {"subject_id": 10, "stay_id": 40, "intime": "2150-01-01 11:00:00", "outtime": "2150-01-01 13:00:00"}
    _, attrition = link(films, icustays=[stay, stay | {"stay_id": 31}], edstays=[visit])

    def reasons(table: str) -> dict[str, list[str]]:
        return {e["why"].split(" ")[0]: e["ids"] for e in attrition.exclusions if e["table"] == table}

    for name, ambiguous in (("a hospital admission", []), ("an ICU stay", ["a"]), ("an emergency visit", [])):
        found = reasons(f"films with a link to {name}")
        assert found == {"no": ["d"], "the": ["c"], "taken": ["b"], "ambiguous:": ambiguous}, name
    steps = [e for e in attrition.exclusions if e["table"].startswith("films with a link to an ICU")]
    assert [(e["before"], e["after"]) for e in steps] == [(4, 3), (3, 2), (2, 1), (1, 1)]
    assert attrition.counts["linking"]["stay_id_linked"] == 1


def test_without_emergency_tables_no_film_is_said_to_miss_its_visit() -> None:
    _, attrition = link([{}])
    assert not [e for e in attrition.exclusions if "emergency" in e["table"]]


def test_films_without_their_file_are_counted(tmp_path: Path) -> None:
    def noted(folder: str) -> Attrition:
        attrition = Attrition()
        linked = linking.link_films(source([{}, {"dicom_id": "b"}]), attrition)
        linking.note_files(linked, folder, attrition)
        return attrition

    assert "not looked for" in noted(str(tmp_path)).counts["image files"]
    assert "not looked for" in noted("memory://films").counts["image files"]
    (tmp_path / "files/p10/p10/s50").mkdir(parents=True)
    (tmp_path / "files/p10/p10/s50/b.jpg").touch()
    gone = excluded(noted(str(tmp_path)), "missing file")
    assert (gone["before"], gone["after"], gone["ids"]) == (2, 1, ["a"])


def test_films_are_kept_by_the_engine_which_may_spill_them() -> None:
    raw = source([{}, {"dicom_id": "b"}])
    kept = held(raw, raw.table("cxr_metadata"))
    again = held(raw, kept.select("dicom_id"), instead_of=kept)
    rows = raw.con.con.execute("SELECT table_name, temporary FROM duckdb_tables()").fetchall()
    assert (again.get_name(), True) in rows and kept.get_name() not in dict(rows)
