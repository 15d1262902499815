"""One split for films and stays, by subject."""

import hashlib
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs import UserError
from ehr_features import splits

IDS = st.lists(st.integers(10_000_000, 10_000_400), min_size=1, max_size=60)


def naive(ids: list[int], official: dict[int, str], seed: int) -> dict[int, str]:
    """A slow implementation of the same rule."""
    out = {}
    for subject in set(ids):
        share = int(hashlib.sha256(f"{seed}:{subject}".encode()).hexdigest()[:16], 16) / 16**16
        by_hash = "train" if share < 0.7 else "val" if share < 0.8 else "test"
        out[subject] = {"validate": "val", "test": "test"}.get(official.get(subject, ""), by_hash)
    return out


@settings(deadline=None)
@given(
    IDS, st.dictionaries(st.integers(10_000_000, 10_000_400), st.sampled_from(list(splits.OFFICIAL))), st.integers(0)
)
def test_split_follows_the_rule_whatever_the_subjects(ids: list[int], official: dict[int, str], seed: int) -> None:
    frame = pd.DataFrame({"subject_id": list(official), "split": list(official.values())})
    got = splits.assign(pd.DataFrame({"subject_id": ids}), frame, seed=seed)
    assert got["subject_id"].is_unique and got["split"].isin(splits.SPLITS).all()
    assert dict(zip(got["subject_id"], got["split"], strict=True)) == naive(ids, official, seed)


@settings(deadline=None)
@given(IDS, IDS, st.integers(0, 5))
def test_nobody_moves_when_others_join(ids: list[int], more: list[int], seed: int) -> None:
    few = splits.assign(pd.DataFrame({"subject_id": ids}), seed=seed)
    many = splits.assign(pd.DataFrame({"subject_id": ids + more}), seed=seed)
    both = few.merge(many, on="subject_id", validate="1:1")
    assert len(both) == len(few) and (both["split_x"] == both["split_y"]).all()


def test_fractions_are_70_10_20() -> None:
    share = splits.assign(pd.DataFrame({"subject_id": range(20_000)}))["split"].value_counts(normalize=True)
    assert share.to_dict() == pytest.approx({"train": 0.7, "val": 0.1, "test": 0.2}, abs=0.01)


def test_another_seed_gives_another_split() -> None:
    ids = pd.DataFrame({"subject_id": range(100)})
    assert (splits.assign(ids, seed=0)["split"] != splits.assign(ids, seed=1)["split"]).any()


def test_official_split_keeps_official_train_subjects_and_hashes_the_rest() -> None:
    official = pd.DataFrame({"subject_id": [1, 1, 2, 3], "split": ["train", "train", "validate", "test"]})
    got = splits.assign(pd.DataFrame({"subject_id": [1, 2, 3, 4]}), official, method="official", seed=5)
    assert got["split"].tolist() == ["train", "val", "test", splits.by_hash(4, 5)]


def test_temporal_split_tests_on_the_latest_years() -> None:
    groups = ["2008 - 2010", "2011 - 2013", "2014 - 2016", "2017 - 2019", None]
    subjects = pd.DataFrame({"subject_id": range(5), "anchor_year_group": groups})
    assert splits.assign(subjects, method="temporal")["split"].tolist() == ["train", "train", "val", "test", "train"]


@pytest.mark.parametrize("ids", [["7", "8"], ["7.0", " 8 "], ["007", "8.00"]])
def test_a_split_file_with_ids_in_any_form_and_rows_without_one(tmp_path, ids, capsys):
    rows = [(ids[0], "train"), ("", ""), ("subject_id", "split"), (ids[1], "test")]
    pd.DataFrame(rows, columns=["subject_id", "split"]).to_csv(tmp_path / "mine.csv", index=False)
    got = splits.assign(pd.DataFrame({"subject_id": [7, 8]}), method=str(tmp_path / "mine.csv"))
    assert got["split"].tolist() == ["train", "test"]
    assert "mine.csv: 2 rows without subject_id were dropped" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["split.csv", "split.csv.gz", "split.parquet"])
def test_users_file_is_followed(tmp_path: Path, name: str) -> None:
    frame = pd.DataFrame({"subject_id": [7, 8, 9, 99], "split": ["test", "validate", "train", "val"]})
    frame.to_parquet(tmp_path / name) if name.endswith("parquet") else frame.to_csv(tmp_path / name, index=False)
    got = splits.assign(pd.DataFrame({"subject_id": [9, 8, 7]}), method=str(tmp_path / name))
    assert got.to_dict("list") == {"subject_id": [7, 8, 9], "split": ["test", "val", "train"]}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("subject_id,split\n7,train\n7,test\n8,val\n", "1 subjects are in two splits"),
        ("subject_id,split\n7,train\n", "1 of 2 subjects have no row"),
        ("subject_id,split\n7,train\n8,tset\n", "'tset'] is not a split"),
        ("subject,split\n7,train\n", "columns missing: subject_id"),
        ("subject_id,split\nseven,train\n", "whole numbers"),
        ("", "cannot be read"),
    ],
)
def test_bad_split_files_are_refused(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "mine.csv").write_text(text)
    with pytest.raises(UserError, match=r"mine\.csv") as error:
        splits.assign(pd.DataFrame({"subject_id": [7, 8]}), method=str(tmp_path / "mine.csv"))
    assert says in str(error.value)


def test_what_cannot_be_split_is_refused() -> None:
    subjects = pd.DataFrame({"subject_id": [1, 2], "anchor_year_group": ["2008 - 2010", None]})
    two = pd.DataFrame({"subject_id": [1, 1], "split": ["train", "test"]})
    with pytest.raises(UserError, match="official split: 1 subjects are in two splits"):
        splits.assign(subjects, two)
    with pytest.raises(UserError, match="no official film split"):
        splits.assign(subjects, method="official")
    with pytest.raises(UserError, match="wanted three or more anchor_year_groups, found 1"):
        splits.assign(subjects, method="temporal")
    with pytest.raises(UserError, match="no method either; methods: hash"):
        splits.assign(subjects, method="ofical")
