"""The last vital signs and laboratory values known before a film: hand-worked rows, windows, and the audit of them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import duckdb
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs import UserError
from ehr_features import schema, static
from ehr_features.audit import last_values as checks
from ehr_features.audit.claims import audit
from ehr_features.audit.last_values import IS_LAST, KNOWN_BEFORE
from ehr_features.build import build
from ehr_features.config import FeaturesConfig
from ehr_features.demo import generate as demo
from ehr_features.demo.record_link import VALUES
from ehr_features.files import read_table
from ehr_features.films.values import columns, last_values
from ehr_features.raw.engine import hold
from ehr_features.raw.source import Source
from ehr_features.series import events
from ehr_features.series.channels import Channel, read_channels, read_variables
from ehr_features.typed import read_json

VARIABLES = read_variables()
TAKEN = pd.Timestamp("2150-01-02 12:00:00")
FILMS = [
    {"dicom_id": "a", "subject_id": 10, "taken_at": TAKEN},
    {"dicom_id": "b", "subject_id": 10, "taken_at": TAKEN + pd.Timedelta(hours=20)},
    {"dicom_id": "other", "subject_id": 11, "taken_at": TAKEN},
    {"dicom_id": "timeless", "subject_id": 10, "taken_at": None},
]
HR, SODIUM, CREATININE, GLUCOSE = 220045, 50983, 50912, 50931


def at(hours: float | None) -> pd.Timestamp | None:
    """A time so many hours before film `a`."""
    return None if hours is None else TAKEN - pd.Timedelta(hours=hours)


def lab(item: int, charted: float | None, stored: float | None, number: float | None, **more: Any) -> dict[str, Any]:
    row = {"subject_id": 10, "itemid": item, "charttime": at(charted), "storetime": at(stored), "valuenum": number}
    return row | {"value": None if number is None else str(number), "hadm_id": None, "specimen_id": None} | more


def chart(item: int, charted: float | None, stored: float | None, number: float | None, **more: Any) -> dict[str, Any]:
    return lab(item, charted, stored, number) | {"stay_id": 30, "hadm_id": 20} | more


def signs(charted: float, **values: float) -> dict[str, Any]:
    return {"subject_id": 10, "stay_id": 40, "charttime": at(charted)} | values


def found(
    labs: list[dict[str, Any]] = [], charts: list[dict[str, Any]] = [], emergency: list[dict[str, Any]] = [],  # noqa: B006
    *, window: float = 24, variables: tuple[Channel, ...] = VARIABLES, folder: Path = Path("unused"),
) -> pd.DataFrame:  # fmt: skip
    """The films that have a value, by dicom_id."""
    frames = {
        "icustays": pd.DataFrame([{"subject_id": 10, "stay_id": 30, "hadm_id": 20}]),
        "cxr_metadata": pd.DataFrame([{"subject_id": 10}, {"subject_id": 11}]),
        "labevents": pd.DataFrame([*labs, lab(1, 1, 1, 0.0)]),
        "chartevents": pd.DataFrame([*charts, chart(1, 1, 1, 0.0)]),
    }
    if emergency:
        frames["vitalsign"] = pd.DataFrame(emergency)
    source = Source.from_frames(frames)
    table = pa.Table.from_pandas(pd.DataFrame(FILMS).astype({"taken_at": "datetime64[us]"}), preserve_index=False)
    told = last_values(
        source, hold(source.con, "the_films", table), events.selected(source, variables, folder), variables, window
    )
    return told.to_pandas().set_index("dicom_id").sort_index()


def test_a_value_counts_from_its_storetime_and_within_the_window() -> None:
    rows = [
        lab(SODIUM, 30, 29, 130),  # before the window
        lab(SODIUM, 24, 23, 131),  # on its edge
        lab(SODIUM, 5, 4, 132),  # the last one known
        lab(SODIUM, 3, -1, 133),  # stored after the film
        lab(SODIUM, 2, None, 134),  # never stored
        lab(SODIUM, 1, 0, 135),  # stored at the film's second
        lab(SODIUM, -1, -1, 136),  # after the film
        lab(CREATININE, 25, 1, 9.0),  # charted before the window, stored in it
    ]
    told = found(rows)
    assert told.loc["a", "labs_sodium"] == 132 and told.loc["a", "labs_sodium_hours"] == 5
    assert np.isnan(told.loc["a", "labs_creatinine"]) and np.isnan(told.loc["a", "labs_creatinine_hours"])
    assert told.loc["b", "labs_sodium"] == 136 and told.loc["b", "labs_sodium_hours"] == 19
    assert list(told.index) == ["a", "b"] and set(told) == set(columns(VARIABLES))
    assert found(rows, window=48).loc["a", "labs_creatinine"] == 9.0
    assert found(rows[1:2]).loc["a", "labs_sodium"] == 131 and found(rows[:1], window=29.9).empty


def test_of_values_at_one_time_the_one_stored_last_counts_then_the_larger() -> None:
    rows = [lab(SODIUM, 5, 2, 131), lab(SODIUM, 5, 1, 130), lab(SODIUM, 5, -1, 150), lab(CREATININE, 5, 2, 1.0)]
    told = found([*rows, lab(CREATININE, 5, 2, 1.5)]).loc["a"]
    assert told["labs_sodium"] == 130 and told["labs_creatinine"] == 1.5


def test_bedside_values_without_a_storetime_count_from_charttime_and_results_never() -> None:
    charts = [chart(HR, 2, None, 90), chart(HR, 3, 2.9, 80), chart(220621, 1, None, 150)]
    assert found(charts=charts).loc["a", "vitals_heart_rate"] == 90
    assert np.isnan(found(charts=charts).loc["a", "labs_glucose"])
    copied = found([lab(50931, 1, 0.5, 150)], charts).loc["a"]  # the report of the row that it copies
    assert copied["labs_glucose"] == 150 and copied["labs_glucose_hours"] == 1
    assert np.isnan(found([lab(50931, 1, -0.5, 150)], charts).loc["a", "labs_glucose"])
    late = [chart(HR, 2, -1, 90), chart(HR, 3, 2.9, 80)]
    assert found(charts=late).loc["a", "vitals_heart_rate"] == 80


def test_units_ranges_and_specimens_are_those_of_the_series() -> None:
    told = found(
        [
            lab(50820, 2, 1, 7.1, specimen_id=1),
            lab(52033, 2, 1, None, specimen_id=1, value="VEN."),
            lab(50817, 2, 1, 60, specimen_id=2),
            lab(52033, 2, 1, None, specimen_id=2, value="VEN."),  # venous saturation is no oxygen saturation
            lab(SODIUM, 2, 1, 999),  # out of range
            lab(SODIUM, 3, 1, None, value="141"),  # text that is a number
        ],
        [
            chart(223761, 1, 1, 98.6),
            chart(223762, 2, 2, 37.5),
            chart(226531, 4, 4, 200),  # pounds
            chart(223835, 4, 4, 40),  # percent
            chart(223951, 4, 4, None, value=" delayed "),
            chart(226732, 4, 4, None, value="Endotracheal tube"),
            chart(HR, 4, 4, 9000),
        ],
    ).loc["a"]
    assert told["labs_ph"] == 7.1 and np.isnan(told["vitals_oxygen_saturation"]) and told["labs_sodium"] == 141
    assert told["vitals_temperature"] == pytest.approx(37.0) and told["vitals_weight"] == pytest.approx(90.718474)
    assert told["vitals_fio2"] == pytest.approx(0.4) and told["vitals_capillary_refill"] == 1
    assert told["vitals_airway_tube"] == 1 and np.isnan(told["vitals_heart_rate"])


def test_a_sum_needs_its_parts_at_one_time_known_before_the_film() -> None:
    parts = [chart(item, 3, 2, value) for item, value in ((220739, 4), (223900, 4), (223901, 6))]
    late = [chart(220739, 1, 0.5, 1), chart(223900, 1, 0.5, 1), chart(223901, 1, -1, 1)]
    told = found(charts=[*parts, *late]).loc["a"]
    assert told["vitals_gcs_total"] == 14 and told["vitals_gcs_total_hours"] == 3
    assert told["vitals_gcs_eye"] == 1 and told["vitals_gcs_motor"] == 6


def test_emergency_signs_and_outpatient_results_need_no_admission() -> None:
    told = found(
        [lab(SODIUM, 1, 0.5, 140)], emergency=[signs(2, heartrate=90, temperature=98.6, o2sat=9999), signs(3, o2sat=97)]
    )
    assert told.loc["a", "vitals_heart_rate"] == 90 and told.loc["a", "vitals_temperature"] == pytest.approx(37)
    assert told.loc["a", "vitals_oxygen_saturation"] == 97 and told.loc["a", "labs_sodium"] == 140
    both = found(charts=[chart(HR, 1, 0.9, 70), chart(HR, 4, 4, 71)], emergency=[signs(2, heartrate=90)])
    assert both.loc["a", "vitals_heart_rate"] == 70  # the last of both tables


def test_a_user_s_variable_has_its_columns_and_group() -> None:
    about = {"unit": "mmol/L", "range": (0, 3), "normal": 1}
    mine = (
        Channel(name="calcium", items={50808: {"factor": 2.0}}, **about),
        Channel(name="pain", items={223791: "as_is"}, **(about | {"range": (0, 10)})),
        Channel(name="mixed", items={50893: "as_is", 225625: "as_is"}, group="vitals", **about),
    )
    told = found([lab(50808, 2, 1, 1.2)], [chart(223791, 2, 1, 7)], variables=mine)
    assert told.loc["a"].to_dict() == pytest.approx(
        {"labs_calcium": 2.4, "labs_calcium_hours": 2, "vitals_pain": 7, "vitals_pain_hours": 2}
        | {"vitals_mixed": np.nan, "vitals_mixed_hours": np.nan},
        nan_ok=True,
    )
    assert {c.group for c in columns(mine).values()} == {"labs", "vitals"}
    assert {c.available_at for c in columns(mine).values()} == {"study"}


def test_variables_of_the_record_only_are_not_in_the_series(tmp_path: Path) -> None:
    assert len(read_channels()) == 17 and len(VARIABLES) == 30
    assert not {c.column for c in VARIABLES} & set(schema.IMAGES)
    text = "channels:\n- {name: a, unit: x, range: [0, 1], normal: 0, items: {50983: as_is}, series: false}\n"
    (tmp_path / "none.yaml").write_text(text)
    with pytest.raises(UserError, match="no variable is in the series"):
        read_channels(tmp_path / "none.yaml")
    more = "- {name: b, unit: x, range: [0, 1], normal: 0, sum_of: [a]}\n"
    (tmp_path / "torn.yaml").write_text(text + more)
    with pytest.raises(UserError, match="b: sum_of names a variable with `series: false`"):
        read_channels(tmp_path / "torn.yaml")
    pair = "- {name: c, unit: x, range: [0, 1], normal: 0, items: {1: as_is}}\n"
    (tmp_path / "twins.yaml").write_text("channels:\n" + pair + pair.replace("c,", "c_hours,").replace("1:", "2:"))
    with pytest.raises(UserError, match="two variables have the column labs_c_hours"):
        read_channels(tmp_path / "twins.yaml")


hours = st.integers(-60, 120).map(lambda n: n / 4)
row = st.tuples(hours, st.none() | st.integers(0, 60).map(lambda n: n / 4), st.integers(120, 150))


@settings(max_examples=10, deadline=None)
@given(rows=st.lists(row, max_size=8), window=st.sampled_from([1, 6, 24, 72]))
def test_any_rows_give_what_a_plain_search_gives(rows: list[tuple[float, float | None, int]], window: int) -> None:
    labs = [lab(SODIUM, charted, None if wait is None else charted - wait, value) for charted, wait, value in rows]
    sodium = tuple(v for v in VARIABLES if v.name == "sodium")
    told = found(labs, window=window, variables=sodium)
    for film in FILMS[:2]:
        ago = [(film["taken_at"] - TAKEN).total_seconds() / 3600 + charted for charted, _, _ in rows]
        best = [
            (-a, w, value)
            for a, (_, w, value) in zip(ago, rows, strict=True)
            if w is not None and a <= window and a - w > 0
        ]
        if not best:
            assert film["dicom_id"] not in told.index or np.isnan(told.loc[film["dicom_id"], "labs_sodium"])
        else:
            last = max(best)
            assert told.loc[film["dicom_id"], "labs_sodium"] == last[2]
            assert told.loc[film["dicom_id"], "labs_sodium_hours"] == -last[0]


# ---- Groups of ehr_features/static.py


def images(**more: Any) -> pd.DataFrame:
    rng = np.random.default_rng(0)
    skewed = np.exp(rng.normal(6, 1.2, 60))
    frame = pd.DataFrame({"split": ["train"] * 50 + ["val"] * 10, "labs_b": skewed, "labs_b_hours": 2.0})
    frame["labs_a"], frame["labs_a_hours"] = rng.normal(140, 3, 60), rng.uniform(0, 24, 60)
    frame["vitals_tube"], frame["vitals_tube_hours"] = (np.arange(60) % 3 == 0) * 1.0, 1.0
    frame.loc[::4, ["labs_a", "labs_a_hours"]] = np.nan
    return frame.assign(**more)


def test_values_are_scaled_on_train_and_share_a_mask_with_their_hours() -> None:
    table = images()
    array, names, fitted = static.encode(table, ["labs", "vitals"])
    assert names == [
        f"{name}{end}" for name in ("labs_a", "labs_b", "vitals_tube") for end in ("", "_hours", "_missing")
    ]
    one = pd.DataFrame(array, columns=names)
    train = table["labs_a"][:50].dropna()
    np.testing.assert_allclose(one["labs_a"][1], (table["labs_a"][1] - train.mean()) / train.std(ddof=0), rtol=1e-5)
    assert (one.loc[::4, ["labs_a", "labs_a_hours"]] == 0).all(axis=None) and one["labs_a_missing"].sum() == 15
    logs = np.log(table["labs_b"])
    np.testing.assert_allclose(one["labs_b"], (logs - logs[:50].mean()) / logs[:50].std(ddof=0), rtol=1e-4)
    np.testing.assert_array_equal(one["vitals_tube"], table["vitals_tube"])
    again, *_ = static.encode(table.assign(labs_b=-5.0).iloc[50:], ["labs", "vitals"], fitted=fitted)
    assert np.isfinite(again).all()
    shuffled, other, _ = static.encode(table[sorted(table, reverse=True)], ["labs", "vitals"])
    assert other == names and (shuffled == array).all()


def test_hours_and_masks_are_inputs_and_no_targets() -> None:
    array, names, _ = static.encode(images(), ["labs"])
    known = pd.DataFrame(static.known(array, names, ["labs"] * len(names)), columns=names)
    assert not known[[n for n in names if n.endswith(("_hours", "_missing"))]].any(axis=None)
    assert known["labs_b"].all() and known["labs_a"].sum() == 45
    assert static.available_at(["labs", "vitals", "sex"]) == {"labs": "study", "vitals": "study", "sex": "study"}


def test_a_users_group_without_masks_is_known_everywhere() -> None:
    """A flag of 0 is a value: of a group whose columns are given for every film."""
    flags, names = np.array([[1.0], [0.0], [1.0], [0.0]]), ["high"]
    assert static.known(flags, names, ["my_group.py:Pressure"]).all()
    assert static.known(flags, names, ["text"])[:, 0].tolist() == [True, False, True, False]


@pytest.mark.parametrize("group", ["labs", "vitals"])
def test_a_group_without_columns_or_values_is_a_sentence(group: str) -> None:
    table = images()
    with pytest.raises(
        UserError, match=rf"no column of EHR group `{group}`; build the features again with record_window"
    ):
        static.encode(table[["split"]], [group])
    empty = table.assign(**{c: np.nan for c in table if c.startswith(group)})
    table_ = {"labs": "hosp/labevents", "vitals": "icu/chartevents"}[group]
    with pytest.raises(UserError, match=f"`{group}`: none of 50 films of split train has a value; {table_}"):
        static.encode(empty, [group])


# ---- The whole pipeline on a synthetic hospital, and its audit


@pytest.fixture(scope="module")
def hospital(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("hospital")
    demo.generate(root / "raw", subjects=60, seed=4, film_size=32)
    build(_config(root, root / "features"))
    return root


def _config(root: Path, out: Path, **more: Any) -> FeaturesConfig:
    raw = {
        f"mimic_{key}": str(root / "raw" / f"mimic-{name}")
        for key, name in (("iv", "iv"), ("ed", "iv-ed"), ("cxr", "cxr"))
    }
    return FeaturesConfig(**raw, out=out, memory="1GB", tasks=("mortality",), **more)


def test_the_planted_values_are_the_last_values(hospital: Path) -> None:
    films = read_table(hospital / "features", "images").set_index("dicom_id")
    told = pd.read_parquet(hospital / "raw/truth_films.parquet").set_index("dicom_id").loc[films.index]
    of = {item: variable.column for variable in VARIABLES for item in variable.items}
    for name, value in VALUES.items():
        np.testing.assert_array_equal(films[of[value.item]], told[f"value_{name}"])
    described = read_json(hospital / "features/schema.json")["images"]
    assert described["labs_nt_probnp"] == {"type": "float64", "unit": "pg/mL", "group": "labs", "available_at": "study"}


def test_no_window_no_columns_and_the_window_changes_the_values(hospital: Path, tmp_path: Path) -> None:
    without = read_table(build(_config(hospital, tmp_path / "none", record_window_hours=0)), "images")
    films = read_table(hospital / "features", "images")
    assert list(without) == list(schema.IMAGES)
    pd.testing.assert_frame_equal(without, films[list(schema.IMAGES)])
    short = read_table(build(_config(hospital, tmp_path / "short", record_window_hours=1)), "images")
    assert short["labs_sodium"].notna().sum() < films["labs_sodium"].notna().sum()
    assert short["labs_sodium_hours"].max() <= 1 < films["labs_sodium_hours"].max() <= 24


def _later(films: pd.DataFrame, raw: Path) -> pd.DataFrame:
    """Values stored after their film: those of the raw table reported too late."""
    labs = pd.read_csv(raw / "mimic-iv/hosp/labevents.csv.gz", parse_dates=["charttime", "storetime"])
    labs = labs[(labs["itemid"] == GLUCOSE) & labs["valuenum"].notna()]
    both = films[["dicom_id", "subject_id", "taken_at"]].merge(labs, on="subject_id")
    late = both[(both["charttime"] < both["taken_at"]) & (both["storetime"] > both["taken_at"])]
    late = late[late["taken_at"] - late["charttime"] < pd.Timedelta(hours=23)].drop_duplicates("dicom_id")
    assert len(late)
    late = late.set_index("dicom_id")
    rows = films["dicom_id"].isin(late.index)
    ids = films.loc[rows, "dicom_id"]
    films.loc[rows, "labs_glucose"] = ids.map(late["valuenum"])
    since = (late["taken_at"] - late["charttime"]).dt.total_seconds() / 3600
    films.loc[rows, "labs_glucose_hours"] = ids.map(since)
    return films


def _set(column: str, change: Any) -> Any:
    def of(films: pd.DataFrame, raw: Path) -> pd.DataFrame:
        row = films[column].first_valid_index()
        films.loc[row, column] = change(films.loc[row, column])
        return films

    return of


def _gone(films: pd.DataFrame, raw: Path) -> pd.DataFrame:
    row = films["labs_sodium"].first_valid_index()
    films.loc[row, ["labs_sodium", "labs_sodium_hours"]] = np.nan
    return films


def _older(films: pd.DataFrame, raw: Path) -> pd.DataFrame:
    """The heart rate before the last one."""
    chart_ = pd.read_csv(raw / "mimic-iv/icu/chartevents.csv.gz", parse_dates=["charttime", "storetime"])
    chart_ = chart_[(chart_["itemid"] == HR) & chart_["valuenum"].between(1, 350)]
    both = films[["dicom_id", "subject_id", "taken_at"]].merge(chart_, on="subject_id")
    both = both[
        (both["storetime"] < both["taken_at"]) & (both["taken_at"] - both["charttime"] < pd.Timedelta(hours=20))
    ]
    both = both.drop_duplicates(["dicom_id", "charttime"]).sort_values("charttime")
    second = both[both.groupby("dicom_id").cumcount(ascending=False) == 1].iloc[0]
    row = films.index[films["dicom_id"] == second["dicom_id"]][0]
    since = (second["taken_at"] - second["charttime"]).total_seconds() / 3600
    films.loc[row, ["vitals_heart_rate", "vitals_heart_rate_hours"]] = second["valuenum"], since
    return films


FAULTS: dict[str, tuple[Any, str, str]] = {
    "a value stored after its film": (_later, KNOWN_BEFORE, "stored after their film"),
    "a value that no one charted": (
        _set("labs_sodium", lambda v: v + 1),
        KNOWN_BEFORE,
        "no event of their hour explains",
    ),
    "another hour": (_set("labs_sodium_hours", lambda v: v + 0.5), KNOWN_BEFORE, "no event of their hour explains"),
    "before the window": (_set("labs_sodium_hours", lambda v: v + 30), KNOWN_BEFORE, "charted before their window"),
    "after the film": (_set("vitals_heart_rate_hours", lambda v: -v - 0.1), KNOWN_BEFORE, "or after their film"),
    "not the last": (_older, IS_LAST, "a later one that was known"),
    "a value left out": (_gone, IS_LAST, "films without a value that was known"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_audit_refutes(hospital: Path, tmp_path: Path, fault: str) -> None:
    change, claim, said = FAULTS[fault]
    shutil.copytree(hospital / "features", tmp_path / "features")
    path = tmp_path / "features/images.parquet"
    change(pd.read_parquet(path), hospital / "raw").to_parquet(path)
    verdicts = {v.claim: v for v in audit(tmp_path / "features", [])}
    assert verdicts[claim].outcome == "refuted" and said in verdicts[claim].counts


def test_the_audit_proves_both_claims(hospital: Path) -> None:
    verdicts = {v.claim: v for v in audit(hospital / "features", [])}
    assert verdicts[KNOWN_BEFORE].outcome == verdicts[IS_LAST].outcome == "proved", verdicts
    assert "films, 30 variables" in verdicts[IS_LAST].counts


def test_subjects_compared_one_after_the_other_give_the_same_counts(
    hospital: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    change, *_ = FAULTS["a value stored after its film"]
    shutil.copytree(hospital / "features", tmp_path / "features")
    path = tmp_path / "features/images.parquet"
    change(pd.read_parquet(path), hospital / "raw").to_parquet(path)
    whole = audit(tmp_path / "features", [])
    monkeypatch.setattr(checks, "SHARE", 2_000)
    monkeypatch.setattr(checks, "_pairs", counted := Mock(wraps=checks._pairs))
    assert audit(tmp_path / "features", []) == whole and counted.call_count > 5


@pytest.mark.real
@pytest.mark.parametrize("window", [6, 24, 72])
def test_films_with_a_laboratory_value_on_the_open_demo(shared: Path, tmp_path: Path, window: int) -> None:
    """Of the items that only labevents has, against one SQL query of the raw files."""
    root = shared / "data/mimic-iv-demo-2.2"
    cxr = shared / "data/mimic-cxr-linked"
    config = {"mimic_iv": str(root), "mimic_cxr": str(cxr), "memory": "1GB", "tasks": ("mortality",)}
    films = read_table(build(FeaturesConfig(**config, out=tmp_path / "f", record_window_hours=window)), "images")
    own = [v for v in VARIABLES if v.group == "labs" and not v.series]
    ranges = ",".join(f"({item},'{v.name}',{v.range[0]},{v.range[1]})" for v in own for item in v.items)
    query = f"""
        with film as (
            select dicom_id, subject_id,
            strptime(StudyDate || lpad(split_part(StudyTime, '.', 1), 6, '0'), '%Y%m%d%H%M%S') as taken
            from read_csv('{cxr}/mimic-cxr-2.0.0-metadata.csv.gz', all_varchar=true)
        ), items(itemid, variable, low, high) as (values {ranges})
        select count(distinct dicom_id), count(distinct (dicom_id, variable)) from film
        join read_csv('{root}/hosp/labevents.csv.gz', all_varchar=true) e on film.subject_id = e.subject_id
        join items on items.itemid = e.itemid::int
        where e.storetime::timestamp < taken and e.charttime::timestamp >= taken - interval {window} hour
        and e.valuenum::double between low and high"""
    counts = duckdb.sql(query).fetchall()[0]
    has = films[[v.column for v in own]].notna()
    assert (has.any(axis=1).sum(), has.sum().sum()) == counts and counts[0] > 50
