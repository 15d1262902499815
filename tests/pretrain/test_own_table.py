"""Pretraining on a table of films outside MIMIC: the same films, record and steps as from a features/ folder."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from configs import UserError, load
from pretrain.config import FilmsConfig, ImagesConfig, PretrainConfig
from pretrain.data import select_films
from pretrain.store import Store, pack
from tests.pretrain.drawn import draw
from tests.pretrain.small import SMALL


@pytest.fixture
def table(data: Path, tmp_path: Path) -> Path:
    """The films of `data`, as a hospital would list them."""
    own = pd.read_parquet(data / "features/images.parquet").drop(columns="taken_at")
    own = own.assign(
        path=own.pop("dicom_id") + ".png", age=own.pop("age_years"), ward=np.resize(["icu", "er"], len(own))
    )
    own.assign(site="north", died=own["subject_id"] % 2).to_csv(tmp_path / "my.csv", index=False)
    return tmp_path / "my.csv"


def films(table: Path, **keys: Any) -> FilmsConfig:
    return FilmsConfig.model_validate({"table": str(table), "columns": ["Edema"], **keys})


def test_a_table_gives_the_films_split_and_record_that_a_features_folder_gives(data: Path, table: Path) -> None:
    store = Store(data / "store")
    theirs = select_films(data / "features", store, FilmsConfig(), ["sex", "age", "view"], "default", 0)
    ours = select_films(None, store, films(table), ["sex", "age", "view"], "default", 0)
    columns = ["dicom_id", "subject_id", "split"]
    pd.testing.assert_frame_equal(ours.table[columns], theirs.table[columns], check_dtype=False)
    np.testing.assert_allclose(ours.static, theirs.static, atol=1e-6)
    assert (ours.columns, ours.column_groups) == (theirs.columns, theirs.column_groups)
    assert ours.left_out == theirs.left_out and ours.available_at == dict.fromkeys(["sex", "age", "view"], "study")
    np.testing.assert_array_equal(ours.known, theirs.known)


def test_the_rows_of_the_record_are_those_of_the_films_whatever_the_order_of_the_table(data: Path, table: Path) -> None:
    store, groups = Store(data / "store"), ["ward", "died", "age"]
    first = select_films(None, store, films(table), groups, "default", 0)
    pd.read_csv(table).sample(frac=1, random_state=2).to_csv(table, index=False)
    again = select_films(None, store, films(table, outcomes=["died"]), groups, "default", 0)
    np.testing.assert_allclose(again.static, first.static, atol=1e-6)
    assert again.table["dicom_id"].tolist() == first.table["dicom_id"].tolist()
    assert again.source_hash == first.source_hash
    assert (first.available_at["died"], again.available_at["died"]) == ("study", "discharge")
    ward = pd.read_csv(table).set_index("path")["ward"]
    own = ward[[f"{film}.png" for film in again.table["dicom_id"]]] == "icu"
    np.testing.assert_array_equal(again.static[:, again.columns.index("ward_icu")], own)


@pytest.mark.parametrize(
    ("groups", "says"),
    [
        (["site"], "`site` is `north` for all"),
        (["Edema"], "`Edema` is a path, an id, the split or a label"),
        (["wards"], "no column `wards` .*did you mean `ward`"),
    ],
)
def test_groups_that_tell_nothing_or_are_none_are_refused(
    data: Path, table: Path, groups: list[str], says: str
) -> None:
    with pytest.raises(UserError, match=says):
        select_films(None, Store(data / "store"), films(table), groups, "default", 0)


def test_a_store_of_other_films_is_named(table: Path, tmp_path: Path) -> None:
    draw(tmp_path / "other/x.png", 0)
    pack(ImagesConfig(films=str(tmp_path / "other"), out=str(tmp_path / "other_store"), size=32, workers=1))
    with pytest.raises(UserError, match=r"of 24 in my\.csv, .* not in the store. Is this their store\?"):
        select_films(None, Store(tmp_path / "other_store"), films(table), [], "default", 0)


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"features": "features", "films": {"table": "my.csv"}}, "wanted one of `features`"),
        ({}, "wanted one of `features`"),
        ({"films": {"table": "my.csv"}, "ehr": {"groups": ["age"], "preset": "msn"}}, "published columns of MIMIC"),
        ({"films": {"tabel": "my.csv"}}, "did you mean `films.table`"),
    ],
)
def test_a_pretraining_has_one_source_of_films(keys: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        load(PretrainConfig, {**SMALL, "store": "store", "out": "runs/x", **keys})


def test_films_of_a_table_are_packed_from_its_root_and_absent_ones_are_listed(tmp_path: Path) -> None:
    for i in range(3):
        draw(tmp_path / f"films/a{i}/1.png", i)
    pd.DataFrame({"file": [f"a{i}/1.png" for i in range(4)]}).to_csv(tmp_path / "my.csv", index=False)
    given = {"films": str(tmp_path / "my.csv"), "out": str(tmp_path / "store"), "size": 32, "workers": 1}
    out = pack(ImagesConfig(**given, root=str(tmp_path / "films"), layout="csv"))
    assert sorted(Store(out).index["dicom_id"]) == ["a0/1", "a1/1", "a2/1"]
    rejected = pd.read_parquet(out / "rejected.parquet")
    assert rejected[["dicom_id", "reason"]].to_numpy().tolist() == [["a3/1", "absent"]]
    for root, says in (("films/a0", "no file below .*a0 for any of its 4 films"), ("nowhere", "no such folder")):
        (tmp_path / "films/a0/1.png").rename(tmp_path / "films/a0/0.png") if root == "films/a0" else None
        with pytest.raises(UserError, match=says):
            pack(ImagesConfig(**{**given, "out": str(tmp_path / "x")}, root=str(tmp_path / root), layout="csv"))
    with pytest.raises(ValueError, match="`root` goes with a table"):
        ImagesConfig(films="folder", root="x", out="store")
