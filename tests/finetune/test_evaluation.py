"""Fractions, subgroups, shifts, transfer, and methods without films."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import roc_auc_score

from configs import UserError
from ehr_features.schema import FINDINGS
from finetune.config import ProbeConfig
from finetune.labelled import fraction_rows, read_films
from finetune.probe.evaluation import Scored, check_fields, subgroups
from finetune.probe.main import probe
from finetune.results import read_predictions, read_results

World = Callable[..., Path]


def config(folder: Path, **more: object) -> ProbeConfig:
    given = {"features": str(folder / "features"), "store": "memory", "encoder": "pixels", "pixels": 4}
    given |= {"out": str(folder / "runs/probe"), "epochs": 15, "samples": 60, **more}
    return ProbeConfig.model_validate(given)


def macros(folder: Path, **where: object) -> pd.DataFrame:
    rows = read_results(folder)[1]
    rows = rows[(rows["label"] == "macro") & (rows["metric"] == "auroc") & (rows["split"] == "test")]
    for column, value in where.items():
        rows = rows[rows[column] == value]
    return rows.reset_index(drop=True)


def test_a_fraction_never_splits_a_subject_and_smaller_ones_lie_inside(make_world: World) -> None:
    films = read_films(make_world(subjects=300) / "features")
    subject = films.table["subject_id"].to_numpy()
    inside: set[int] = set()
    for fraction in (0.05, 0.1, 0.5, 1.0):
        rows = fraction_rows(films, films.rows("train"), fraction, 3)
        kept = set(subject[rows])
        assert set(films.table["split"].iloc[rows]) == {"train"}
        assert len(rows) == np.isin(subject[films.rows("train")], list(kept)).sum()  # all films of each
        assert inside <= kept
        assert len(kept) == round(fraction * len(set(subject[films.rows("train")])))
        inside = kept
    assert set(fraction_rows(films, films.rows("train"), 0.1, 3)) != set(
        fraction_rows(films, films.rows("train"), 0.1, 4)
    )
    with pytest.raises(UserError, match="less than one"):
        fraction_rows(films, films.rows("train"), 0.001, 0)


def test_fractions_are_repeated_and_averaged(make_world: World) -> None:
    out = probe(config(make_world(), fraction=[0.1, 1.0], repeats=3, method="logistic"))
    rows = macros(out)
    assert rows["fraction"].tolist() == [0.1, 1.0]
    fits = read_results(out)[0]["fractions"]
    assert [(f["fraction"], f["draw"]) for f in fits] == [(0.1, 0), (0.1, 1), (0.1, 2), (1.0, 0)]
    assert len({f["val_auroc"] for f in fits[:3]}) > 1
    wide, narrow = (rows["high"] - rows["low"])[0], (rows["high"] - rows["low"])[1]
    assert rows["value"][0] < rows["value"][1] and wide > narrow
    draws = [read_predictions(out / "fraction_0.1" / f"draw_{i}", "test") for i in range(3)]
    each = [roc_auc_score(y[n][known], p[n][known]) for _, y, p in draws for n in y for known in [y[n].notna()]]
    assert rows["value"][0] == pytest.approx(np.mean(each)) and draws[0][0].equals(read_predictions(out, "test")[0])
    assert not (out / "fraction_1").exists()


def test_subgroups_and_the_largest_gap_of_a_planted_one() -> None:
    rng = np.random.default_rng(0)
    n = 400
    y = (rng.random((n, 2)) < 0.4).astype(np.float32)
    sex = np.array(["F", "M"])[rng.integers(2, size=n)]
    worse = np.where(sex == "F", 0.0, 3.0)[:, None]  # nothing is learned of F
    p = 1 / (1 + np.exp(-(rng.normal(size=(n, 2)) + worse * (y - 0.5))))
    table = pd.DataFrame({"subject_id": np.arange(n), "by_sex": sex, "by_view": ["AP", "PA"] * (n // 2)})
    rows, gaps = subgroups(Scored(table, y, p, ["a", "b"]), ["view", "sex"], samples=100, seed=0)
    assert set(rows["subset"]) == {"sex=F", "sex=M", "view=AP", "view=PA"}
    assert (gaps[0]["field"], gaps[0]["higher"], gaps[0]["lower"]) == ("sex", "M", "F")
    assert gaps[0]["low"] > 0.2 and gaps[0]["labels"] == 2 and gaps[0]["difference"] > gaps[1]["difference"]
    each = rows[(rows["subset"] == "sex=F") & (rows["label"] == "macro") & (rows["metric"] == "auroc")].iloc[0]
    assert each["n"] == (sex == "F").sum()
    with pytest.raises(UserError, match="no field `race` here; there are sex, view"):
        check_fields(["sex", "race"], table.assign(sex=sex, view="AP"))


def test_a_view_shortcut_is_caught_by_the_shift(make_world: World) -> None:
    folder = make_world(subjects=300)
    store = __import__("finetune.layouts").layouts.Store("memory")
    images = pd.read_parquet(folder / "features/images.parquet")
    for film, view, edema in images[["dicom_id", "view", "Edema"]].itertuples(index=False):
        pixels = store.films[film]
        pixels[:] = np.random.default_rng(len(film)).integers(90, 110, pixels.shape)
        marked = edema == 1 if view == "AP" else int(film[-1]) % 2  # on PA films the marker says nothing
        pixels[24:, 24:] = 220 if marked else 20
    out = probe(config(folder, labels=["Edema"], shift={"field": "view"}))
    rows = macros(out).set_index("subset")["value"]
    assert rows["view: AP -> AP"] > 0.95 and rows["view: AP -> PA"] < 0.65
    says = read_results(out)[0]["shift"]
    assert says["source"] == ["AP"] and says["target"] == ["PA"]
    assert {"a", "b", "difference", "low", "high", "p"} <= set(says["comparison"][0])


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"subgroups": ["sex", "hair"]}, "no field `hair`"),
        ({"shift": {"field": "view", "target": ["LL"]}}, "no film has view LL"),
        ({"shift": {}}, "shift.field is missing"),
        ({"radiologists": "none.csv"}, "none.csv: no such table"),
    ],
)
def test_what_cannot_be_given_at_the_end_is_refused_at_the_start(make_world: World, more: dict, says: str) -> None:
    folder = make_world()
    with pytest.raises(UserError, match=says):
        probe(config(folder, **more))
    assert not (folder / "runs").exists()


def test_a_finding_that_is_there_in_both_views_survives_the_shift(make_world: World) -> None:
    out = probe(config(make_world(subjects=300), shift={"field": "view"}, method="logistic"))
    assert macros(out, subset="view: AP -> PA")["value"].item() > 0.8
    assert abs(read_results(out)[0]["shift"]["comparison"][0]["difference"]) < 0.1


def test_a_head_is_scored_elsewhere_without_being_fitted(make_world: World) -> None:
    folder = make_world()
    first = probe(config(folder, labels=["Edema", "Pneumonia"]))
    again = probe(config(folder, method="transfer", head=str(first), out=str(folder / "runs/transfer"), views="all"))
    about, rows = read_results(again)
    assert about["transfer"]["labels"] == ["Edema", "Pneumonia"] and set(rows["split"]) == {"test"}
    ids, _, logits = read_predictions(first, "test")
    other_ids, _, other = read_predictions(again, "test")
    merged = pd.concat([ids, logits], axis=1).merge(pd.concat([other_ids, other], axis=1), on="dicom_id")
    single = merged[(merged["num_films_x"] == 1) & (merged["num_films_y"] == 1)]
    assert len(single) > 20
    np.testing.assert_allclose(single["Edema_x"], single["Edema_y"], atol=1e-9)


@pytest.mark.parametrize(("method", "store"), [("logistic", None), ("boosting", "nowhere")])
def test_metadata_alone_finds_what_the_record_says_and_no_more(
    make_world: World, method: str, store: str | None
) -> None:
    folder = make_world(subjects=300)
    path = folder / "features/images.parquet"
    images = pd.read_parquet(path)
    images["Edema"] = ((images["sex"] == "F") ^ (np.random.default_rng(0).random(len(images)) < 0.1)).astype(float)
    images.to_parquet(path)
    more = {"encoder": "metadata", "groups": ["sex", "age"], "method": method, "store": store}
    out = probe(config(folder, **more))
    rows = read_results(out)[1].query("metric == 'auroc' and split == 'test'").set_index("label")
    assert rows.loc["Edema", "low"] > 0.75
    assert rows.loc["Pneumonia", "low"] < 0.55
    about = read_results(out)[0]
    assert about["encoder"] == "metadata (sex, age)" and about["pretraining_films"] == "none"
    assert any("no store there" in warning for warning in about["warnings"]) == (store is not None)


def test_metadata_needs_no_features_folder_where_a_table_says_enough(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    sex = rng.choice(["M", "F"], size=200)
    table = pd.DataFrame({"path": [f"{i}.png" for i in range(200)], "sick": (sex == "F").astype(int), "sex": sex})
    table.to_csv(tmp_path / "my.csv", index=False)
    for name in table["path"]:
        (tmp_path / name).touch()  # looked for, not opened
    given = {"layout": "csv", "table": str(tmp_path / "my.csv"), "images": str(tmp_path), "columns": ["sick"]}
    more = {"films": given | {"sex": "sex"}, "encoder": "metadata", "samples": 20, "out": str(tmp_path / "runs/probe")}
    with pytest.raises(UserError, match=r"group `age` needs a column of the age .*; found path, sick, sex"):
        probe(ProbeConfig.model_validate(more | {"method": "boosting"}))
    for method in ("logistic", "boosting"):
        asked = {"groups": ["sex"], "method": method, "out": str(tmp_path / "runs" / method)}
        assert macros(probe(ProbeConfig.model_validate(more | asked)))["value"].item() == 1


def test_metadata_refuses_outcomes(make_world: World) -> None:
    with pytest.raises(UserError, match="mortality: known only at discharge"):
        probe(config(make_world(), encoder="metadata", groups=["sex", "mortality"], method="logistic"))


def test_radiologists_labels_are_a_second_test_set(make_world: World) -> None:
    folder = make_world()
    images = pd.read_parquet(folder / "features/images.parquet")
    images["Lung Opacity"] = images.pop("Pneumothorax")
    images.to_parquet(folder / "features/images.parquet")
    studies = images.query("split == 'test' and view != 'LATERAL'")["study_id"].unique()[:40]
    rng = np.random.default_rng(0)  # the published columns: study_id and the findings, one of them by another name
    names = ["Airspace Opacity" if name == "Lung Opacity" else name for name in FINDINGS if name != "Pneumonia"]
    theirs = pd.DataFrame(rng.choice([1.0, 0.0, np.nan], size=(40, len(names))), columns=names)
    theirs.insert(0, "study_id", studies)
    theirs.to_csv(folder / "labeled.csv", index=False)
    out = probe(config(folder, radiologists=str(folder / "labeled.csv")))
    about, rows = read_results(out)
    mine = rows[(rows["split"] == "test_radiologist") & (rows["metric"] == "auroc")].set_index("label")
    for ours, name in (("Edema", "Edema"), ("Lung Opacity", "Airspace Opacity")):
        assert mine.loc[ours, ["n", "positives"]].tolist() == [40, (theirs[name] == 1).sum()]
    assert about["radiologists"] == {"studies": 40, "without": ["Pneumonia"]} and "Pneumonia" not in mine.index
    theirs["study_id"] += 10**6
    theirs.to_csv(folder / "labeled.csv", index=False)
    with pytest.raises(UserError, match="none of its 40 studies"):
        probe(config(folder, radiologists=str(folder / "labeled.csv"), out=str(folder / "runs/other")))


def test_films_are_split_by_devices_and_care_unit_whatever_labels_are_probed(make_world: World) -> None:
    folder = make_world(subjects=300)
    images = pd.read_parquet(folder / "features/images.parquet")
    rng = np.random.default_rng(0)
    images["Support Devices"] = rng.choice([1.0, -1.0, np.nan], size=len(images))
    images["in_icu"] = (images["subject_id"] % 2).astype(float)
    images["stay_id"] = images["subject_id"].where(images["in_icu"] == 1)
    images["anchor_year_group"] = np.where(images["subject_id"] % 3, "2008 - 2010", "2017 - 2019")
    images["race"] = np.where(images["subject_id"] % 4, "WHITE - RUSSIAN", "BLACK/CAPE VERDEAN")
    images.to_parquet(folder / "features/images.parquet")
    stays = images.loc[images["in_icu"] == 1, ["subject_id", "split"]].drop_duplicates()
    stays = stays.assign(stay_id=stays["subject_id"], care_unit=np.where(stays["subject_id"] % 5 == 0, "CCU", "MICU"))
    stays.to_parquet(folder / "features/stays.parquet")
    wanted = ["sex", "age", "race", "view", "support_devices", "care_unit", "year_group"]
    about, rows = read_results(probe(config(folder, labels=["Edema"], subgroups=wanted, method="logistic")))
    test = rows[(rows["split"] == "test") & (rows["metric"] == "auroc") & (rows["label"] == "macro")]
    sizes = test.set_index("subset")["n"]
    units = {"care_unit=MICU", "care_unit=CCU", "care_unit=not ICU", "support_devices=yes", "support_devices=no"}
    assert units | {"race=white", "race=black", "year_group=2008 - 2010"} < set(sizes.index)
    for field in wanted:
        assert sizes[[name for name in sizes.index if name.startswith(f"{field}=")]].sum() == sizes["all"], field
    assert rows.loc[rows["subset"] == "sex=F", "metric"].isin(["f1"]).any()
    assert about["gaps"][0]["field"] in wanted and about["gaps"][0]["higher"] != about["gaps"][0]["lower"]
    assert about["gaps"][0]["low"] <= about["gaps"][0]["difference"] <= about["gaps"][0]["high"]


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"features": None}, "one of `features`"),
        ({"store": None}, "`store` is missing"),
        ({"method": "transfer"}, "go together"),
        ({"method": "finetune"}, "needs an encoder"),
        ({"encoder": "metadata", "method": "attentive"}, "needs films"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(tmp_path: Path, more: dict, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        config(tmp_path, **more)
