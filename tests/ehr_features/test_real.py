"""The open MIMIC-IV demo: known counts, and the published extraction sample by sample."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest

from ehr_features import series
from ehr_features.build import build
from ehr_features.config import FeaturesConfig
from ehr_features.files import read_table

pytestmark = pytest.mark.real
TASKS = ("mortality", "phenotypes")


@pytest.fixture(scope="module")
def tables(shared):
    return {"mimic_iv": str(shared / "data/mimic-iv-demo-2.2"), "mimic_cxr": str(shared / "data/mimic-cxr-linked")}


@pytest.fixture(scope="module")
def default(tables, tmp_path_factory):
    return build(FeaturesConfig(**tables, out=tmp_path_factory.mktemp("d") / "features", memory="1GB", tasks=TASKS))


@pytest.fixture(scope="module")
def published(tables, tmp_path_factory):
    out = tmp_path_factory.mktemp("m") / "features"
    return build(FeaturesConfig(**tables, out=out, memory="1GB", preset="medfuse", tasks=TASKS))


def test_known_counts_of_the_demo(default):
    record = json.loads((default / "provenance.json").read_text())
    rows = record["rows_read"]
    assert (rows["patients"], rows["admissions"], rows["icustays"]) == (100, 275, 140)
    assert (rows["chartevents"], rows["labevents"]) == (668_862, 107_727)
    assert record["release"] == "demo" and record["warnings"] == []
    films, stays = read_table(default, "images"), read_table(default, "stays")
    assert len(films) == 538 and films.subject_id.nunique() == 351
    assert films.subject_id.isin(stays.subject_id).sum() == 191
    assert len(stays) == 140 and stays.subject_id.nunique() == 100
    mortality = read_table(default, "samples/mortality")
    assert (len(mortality), mortality.mortality.sum()) == (74, 12)
    assert len(read_table(default, "samples/phenotypes")) == 140


def test_one_split_for_films_and_stays(default):
    films, stays = read_table(default, "images"), read_table(default, "stays")
    both = pd.concat([t[["subject_id", "split"]] for t in (films, stays)]).drop_duplicates()
    assert both.subject_id.is_unique


def test_no_film_of_a_sample_is_later_than_its_prediction(default):
    films = read_table(default, "stay_films")
    for task in TASKS:
        samples = read_table(default, f"samples/{task}").dropna(subset="dicom_id")
        taken = samples.merge(films, on=["stay_id", "dicom_id"], validate="1:1")
        assert len(taken) == len(samples) > 0
        assert (taken.hours_from_intime <= taken.predict_at_hours).all() and set(taken["view"]) == {"AP"}


@pytest.mark.parametrize(("name", "hours"), [("in-hospital-mortality", 48), ("phenotyping", None)])
def test_medfuse_series_equal_the_published_ones(published, shared, name, hours):
    with np.load(shared / f"golden/{name}.npz") as file:
        golden = {stay: file[stay] for stay in file.files}
    columns = (shared / "golden/header.txt").read_text().split("\n")
    assert json.loads((published / "series.json").read_text())["columns"] == [c for c in columns if c]
    got = series.load(published, [int(stay) for stay in golden], hours=hours, normalise=False)
    for stay in golden:
        np.testing.assert_allclose(got[int(stay)], golden[stay], rtol=1e-6, atol=1e-5, err_msg=stay)


def test_medfuse_cohort_and_mortality_equal_the_published_ones(published, shared):
    stays = read_table(published, "stays")
    assert len(stays) == 112
    assert set(pd.read_csv(shared / "golden/all_stays.csv").stay_id) <= set(stays.stay_id)
    mine = read_table(published, "samples/mortality")
    assert (len(mine), mine.mortality.sum()) == (54, 9)
    golden = pd.read_csv(shared / "golden/in-hospital-mortality_labels.csv")
    both = golden.merge(mine, on="stay_id", validate="1:1")
    assert len(both) == len(golden) and (both.y_true == both.mortality).all()


def test_medfuse_phenotypes_equal_the_published_ones(published, shared):
    mine = read_table(published, "samples/phenotypes").set_index("stay_id")
    labels = [c for c in mine if c.startswith("phenotype_")]
    assert len(mine) == 112 and int(mine[labels].to_numpy().sum()) == 532
    golden = pd.read_csv(shared / "golden/phenotyping_labels.csv").set_index("stay_id").drop(columns="period_length")
    mine = mine.loc[golden.index, labels]
    by_total = golden.sum().sort_values(kind="stable")
    assert sorted(mine.sum()) == sorted(by_total)
    columns = {tuple(mine[c]) for c in labels}  # a label is known by its column of 57 answers
    assert columns == {tuple(golden[c]) for c in golden}


def test_default_series_equal_a_naive_pandas_version(default, tables):
    """Every stay, five variables: the last value of each hour, from the raw files, with pandas alone."""
    root = tables["mimic_iv"]
    times = ["charttime", "storetime"]
    chart = pd.read_csv(f"{root}/icu/chartevents.csv.gz", parse_dates=times, low_memory=False)
    labs = pd.read_csv(f"{root}/hosp/labevents.csv.gz", parse_dates=times, low_memory=False)
    stays = pd.read_csv(f"{root}/icu/icustays.csv.gz", parse_dates=["intime", "outtime"])
    labs = labs.drop(columns="hadm_id").merge(stays[["subject_id", "stay_id"]], on="subject_id")
    labs["at"], chart["at"] = labs[times].max(axis=1, skipna=False), chart["charttime"]  # labels of d_items: Labs
    copies = {220621: 50931, 226537: 50809, 223830: 50820, 220274: 50820}  # no chart row has a storetime here
    rows = labs.drop_duplicates(["subject_id", "itemid", "charttime", "valuenum", "at"])
    rows = rows.groupby(["subject_id", "itemid", "charttime", "valuenum"])["at"].min()
    keys = chart.assign(itemid=chart["itemid"].map(copies))[rows.index.names]
    found = rows.reindex(pd.MultiIndex.from_frame(keys)).to_numpy()
    chart["at"] = chart["at"].mask(chart["itemid"].isin(copies), pd.Series(found, chart.index))
    ranges = {
        "heart_rate": (1, 350),
        "glucose": (10, 2000),
        "ph": (6.3, 8.4),
        "temperature": (26, 45),
        "gcs_motor": (1, 6),
    }
    items = {220045: "heart_rate", 50931: "glucose", 50809: "glucose", 225664: "glucose", 220621: "glucose"}
    items |= {226537: "glucose", 50820: "ph", 223830: "ph", 220274: "ph", 223901: "gcs_motor"}
    items |= dict.fromkeys((223761, 223762, 226329, 227632, 227634), "temperature")
    columns = ["stay_id", "itemid", "at", "storetime", "valuenum"]
    events = pd.concat([chart[columns], labs[columns]]).merge(stays[["stay_id", "intime", "outtime"]], on="stay_id")
    events["name"] = events["itemid"].map(items)
    events = events.dropna(subset=["name", "valuenum"])
    fahrenheit = (events.itemid == 223761) | ((events.itemid == 223762) & (events.valuenum > 50))
    events.loc[fahrenheit, "valuenum"] = (events.loc[fahrenheit, "valuenum"] - 32) * 5 / 9
    low, high = (events["name"].map({name: edge[side] for name, edge in ranges.items()}) for side in (0, 1))
    inside = (events["at"] >= events.intime) & (events["at"] <= events.outtime)
    events = events[inside & events.valuenum.between(low, high)]
    events["bin"] = ((events["at"] - events.intime).dt.total_seconds() // 3600).astype(int)
    reported = events["name"].isin(["glucose", "ph"]) & (events["itemid"] != 225664)
    events["storetime"] = events["storetime"].fillna(events["at"].where(reported)).fillna(pd.Timestamp("1900-01-01"))
    events = events.sort_values(["stay_id", "name", "at", "storetime", "valuenum"])
    last = events.groupby(["stay_id", "name", "bin"])["valuenum"].last()
    about = json.loads((default / "series.json").read_text())
    values = {name: about["columns"].index(name) for name in ranges}
    masks = {name: about["columns"].index(f"mask->{name}") for name in ranges}
    for stay, got in series.load(default, normalise=False).items():
        for name in ranges:
            want = last.loc[stay, name] if (stay, name) in last.index.droplevel("bin") else pd.Series(dtype=float)
            want = want[want.index < len(got)]
            assert np.flatnonzero(got[:, masks[name]]).tolist() == want.index.tolist(), (stay, name)
            np.testing.assert_allclose(got[want.index, values[name]], want, rtol=1e-6)
