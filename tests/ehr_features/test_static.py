"""EHR columns of a film as a vector: fitted on train, missing values marked, the published sets reproduced."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs import UserError
from ehr_features import schema, static
from ehr_features.cohort import Attrition
from ehr_features.config import FeaturesConfig
from ehr_features.films import linking
from ehr_features.films import record as film_record
from ehr_features.raw.source import open_source
from ehr_features.static import POSITIONS, VIEWS


def images(**columns: list) -> pd.DataFrame:
    n = len(next(iter(columns.values())))
    empty = {c: [None] * n for c in schema.IMAGES}
    return pd.DataFrame(empty | {"split": ["train"] * n} | columns)


def rows(frame: pd.DataFrame, groups: list[str], preset: str = "default") -> dict[str, list[float]]:
    array, names, _ = static.encode(frame, groups, preset=preset)
    assert array.dtype == np.float32 and array.shape == (len(frame), len(names)) and np.isfinite(array).all()
    return {name: array[:, i].tolist() for i, name in enumerate(names)}


def test_missing_is_a_category() -> None:
    frame = images(sex=["M", "F", None], view=["AP", "XTABLE", None], position=["Erect", "Recumbent", None])
    got = rows(frame, ["sex", "view", "position"])
    assert list(got) == [
        *("sex_m", "sex_f", "sex_missing", "view_pa", "view_lateral", "view_ap", "view_ll", "view_other"),
        *("view_missing", "position_erect", "position_recumbent", "position_other", "position_missing"),
    ]
    assert got["sex_missing"] == got["view_missing"] == got["position_missing"] == [0, 0, 1]
    assert got["view_other"] == [0, 1, 0] and got["sex_f"] == [0, 1, 0]


def test_unknown_outcome_is_neither_alive_nor_dead() -> None:
    got = rows(images(died_in_hospital=[1, 0, None], in_icu=[0, 1, None]), ["mortality", "icu"])
    assert (got["died"], got["alive"], got["died_in_hospital_missing"]) == ([1, 0, 0], [0, 1, 0], [0, 0, 1])
    assert (got["icu"], got["not_icu"], got["in_icu_missing"]) == ([0, 1, 0], [1, 0, 0], [0, 0, 1])


def test_age_is_scaled_by_train_and_masked_where_missing() -> None:
    frame = images(age_years=[40.0, 60.0, None, 1000.0], split=["train", "train", "train", "test"])
    got = rows(frame, ["age"])
    assert got == {"age_years": [-1, 1, 0, 95], "age_years_missing": [0, 0, 1, 0]}


@settings(deadline=None)
@given(st.lists(st.floats(18, 105), min_size=1, max_size=20), st.lists(st.floats(18, 1e6), min_size=1, max_size=20))
def test_nothing_is_fitted_on_val_or_test(train: list[float], rest: list[float]) -> None:
    splits = ["train"] * len(train) + ["val" if i % 2 else "test" for i in range(len(rest))]
    frame = images(age_years=train + rest, split=splits)
    _, _, fitted = static.encode(frame, ["age"])
    assert fitted == static.encode(frame[frame["split"] == "train"], ["age"])[2]


def test_earlier_diagnoses_are_a_column_each() -> None:
    got = rows(images(num_prior_admissions=[2.0, 0.0, None], prior_phenotypes=["2 108", "", None]), ["prior_diagnoses"])
    assert len(got) == 2 + 25
    assert (got["prior_phenotype_108"], got["prior_phenotype_2"]) == ([1, 0, 0], [1, 0, 0])
    assert sum(map(sum, list(got.values())[2:])) == 2 and got["log_num_prior_admissions_missing"] == [0, 0, 1]


def test_fitted_survives_json_and_gives_the_same_vector() -> None:
    frame = images(age_years=[40.0, 60.0, 70.0], ed_acuity=[1.0, None, 3.0], num_prior_studies=[0.0, 3.0, 1.0])
    groups = ["age", "ed_triage", "prior_films"]
    array, names, fitted = static.encode(frame, groups)
    again, same, _ = static.encode(frame[1:], groups, fitted=json.loads(json.dumps(fitted)))
    assert same == names and np.array_equal(again, array[1:])


@pytest.mark.parametrize(
    ("group", "edges", "preset"), [("age5", 5, "default"), ("age10", 10, "msn"), ("age5", 5, "msn")]
)
def test_age_bins_hold_each_age_once(group: str, edges: int, preset: str) -> None:
    ages = [16.0, 20.0, 21.0, 25.0, 30.0, 89.0, 90.0, 91.0, 100.0]
    got = {k: v for k, v in rows(images(age_years=ages, sex=["F"] * 9), [group], preset).items() if "missing" not in k}
    assert len(got) == {5: 16, 10: 9}[edges]
    assert np.sum(list(got.values()), axis=0).tolist() == [1] * 9
    first = next(iter(got.values()))
    assert first == ([1, 1] if preset == "msn" else [1, 0]) + [0] * 7  # published: 20 falls into `<20`
    assert list(got.values())[-1] == [0] * (7 if preset == "msn" else 6) + [1] * (2 if preset == "msn" else 3)


@pytest.mark.parametrize("name", [*static.REPORTING_ONLY])
def test_subgroup_columns_cannot_be_inputs(name: str) -> None:
    with pytest.raises(UserError, match="subgroup reporting only"):
        static.encode(images(age_years=[1.0]), [name])


@pytest.mark.parametrize("name", ["Pneumonia", "icu_los_days", "phenotype_2", "split", "subject_id"])
def test_labels_and_ids_are_no_groups(name: str) -> None:
    with pytest.raises(UserError, match=f"unknown EHR group `{name}`"):
        static.encode(images(age_years=[1.0]), [name])


def test_mistakes_are_named() -> None:
    frame = images(age_years=[1.0], split=["test"])
    for groups, says in (
        (["agee"], "did you mean `age`"),
        ("age", "wanted a list"),
        (["age"], "none of 1 films is of split"),
    ):
        with pytest.raises(UserError, match=says):
            static.encode(frame, groups)
    with pytest.raises(UserError, match="does not exist in ehr preset msn"):
        static.encode(frame, ["arrival"], preset="msn")
    with pytest.raises(UserError, match="columns \\['age_years'\\] are missing"):
        static.encode(frame.drop(columns="age_years"), ["age"])
    with pytest.raises(UserError, match="fitted for"):
        static.encode(frame, ["age"], fitted=static.encode(images(sex=["M"]), ["sex"])[2])


def test_outcome_groups_are_known_at_discharge_and_no_others() -> None:
    when = static.available_at(list(static.READS))
    assert {g for g, t in when.items() if t == "discharge"} == {"mortality"}
    assert set(when.values()) == {"study", "discharge"}
    when = static.available_at(list(static.MSN_READS), "msn")
    assert {g for g, t in when.items() if t == "discharge"} == {"mortality", "icu"}


WIDTHS = {
    "meta-gender-only": 2, "meta-age-norm-only": 1, "meta-age5-only": 16, "meta-age10-only": 9, "meta-view-only": 4,
    "meta-orientation-only": 2, "meta-mortality-only": 2, "meta-icu-only": 2, "socio-norm": 3, "socio-age5": 18,
    "socio-age10": 11, "image_meta": 6, "clinical": 4, "socio-age-norm-image-meta": 9, "socio-age-norm-clinical": 7,
    "socio-age-5-image-meta": 24, "socio-age-5-clinical": 22, "socio-age-10-image-meta": 17,
    "socio-age-10-clinical": 15, "image-meta-clinical": 10, "all-age-norm": 13, "all-age-5": 28, "all-age-10": 21,
}  # fmt: skip


def test_published_sets_have_their_widths() -> None:
    frame = images(age_years=[50.0, None], sex=["M", None])
    assert {name: static.encode(frame, [name], preset="msn")[0].shape[1] for name in static.msn_sets()} == WIDTHS


@pytest.fixture(scope="module")
def real_images(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> pd.DataFrame:
    data = shared / "data"
    out = tmp_path_factory.mktemp("features") / "out"
    config = FeaturesConfig(mimic_iv=str(data / "mimic-iv-demo-2.2"), mimic_cxr=str(data / "mimic-cxr-linked"), out=out)
    source = open_source(config)
    return film_record.add_record(source, linking.link_films(source, Attrition())).to_pandas()


@pytest.mark.real
def test_real_films_are_all_there(real_images: pd.DataFrame) -> None:
    assert len(real_images) == 538 and real_images["subject_id"].nunique() == 351
    assert real_images["sex"].notna().sum() == 191  # films of subjects of the MIMIC-IV demo


@pytest.mark.real
@pytest.mark.parametrize("name", list(WIDTHS))
def test_published_sets_equal_what_the_notebooks_give(shared: Path, real_images: pd.DataFrame, name: str) -> None:
    golden = pd.read_csv(shared / "golden" / "msn" / "static.csv")
    films = golden[["dicom_id"]].merge(real_images, on="dicom_id", how="left", validate="1:1")
    array, names, _ = static.encode(films, [name], preset="msn")
    in_order = [column for column in golden if column in names]
    assert names == in_order  # the published order
    same = np.isclose(array, golden[names].to_numpy(), rtol=0, atol=1e-6)
    for field, columns in (("view", VIEWS), ("position", POSITIONS)):
        imputed = golden[f"{field}_missing"].to_numpy() == 1  # filled in by the notebook's forest: not comparable
        same |= np.outer(imputed, [c in columns for c in names])
    assert same.all(), {n: int((~same[:, i]).sum()) for i, n in enumerate(names) if not same[:, i].all()}


def test_what_a_record_tells_is_known_and_masks_never_are():
    table = images(
        sex=["M", None, "F"],
        age_years=[50.0, 60.0, None],
        num_prior_admissions=[0, None, 2],
        prior_phenotypes=["", None, "2 122"],
        split=["train"] * 3,
    )
    groups = ["sex", "age", "prior_diagnoses"]
    array, names, _ = static.encode(table, groups)
    of = [group for group in groups for _ in static.encode(table, [group])[1]]
    known = pd.DataFrame(static.known(array, names, of), columns=names)
    assert known["sex_m"].tolist() == known["sex_f"].tolist() == [True, False, True]
    assert known["age_years"].tolist() == [True, True, False]
    assert known["prior_phenotype_122"].tolist() == known["log_num_prior_admissions"].tolist() == [True, False, True]
    assert not known[[name for name in names if name.endswith("_missing")]].any(axis=None)
    assert static.known(np.array([[0, 0], [0, 1]]), ["male", "female"], ["sex", "sex"]).tolist() == [
        [False] * 2,
        [True] * 2,
    ]
