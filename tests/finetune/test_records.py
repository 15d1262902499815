"""`Records`: content of an item, no information from the future, use in DataLoader workers."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.numpy import load_file, save_file

from configs import UserError
from ehr_features.files import write_json
from ehr_features.splits import by_hash
from ehr_features.typed import read_json
from finetune.records import Records, collate

Make = Callable[..., Path]
START = pd.Timestamp("2150-01-01")


class Store:
    """All films but one; a film is gray by its name."""

    size = 8

    def __init__(self, films: set[str]) -> None:
        self.films = films

    def __contains__(self, film: object) -> bool:
        return film in self.films

    def read(self, films: list[str]) -> np.ndarray:
        return np.stack([np.full((8, 8), sum(film.encode()) % 256, np.uint8) for film in films])


@pytest.fixture
def world(make_icu: Make, write_notes: Make) -> tuple[Path, Store, Path]:
    """Features with the columns of a real folder, a store, and notes of half of the films."""
    folder = make_icu(stays=60) / "features"
    images = pd.read_parquet(folder / "images.parquet")
    rng = np.random.default_rng(0)
    images["taken_at"] = START + pd.to_timedelta(images["hours_from_intime"], unit="h")
    images["sex"], images["age_years"] = rng.choice(["F", "M"], len(images)), rng.uniform(20, 90, len(images))
    outside = images.iloc[:5].assign(dicom_id=[f"outside{i}" for i in range(5)], stay_id=np.nan, subject_id=5)
    outside["split"] = "train"
    images = pd.concat([images, outside], ignore_index=True)
    images.loc[0, "Edema"] = -1
    images.to_parquet(folder / "images.parquet")
    stays = pd.read_parquet(folder / "stays.parquet").assign(sex="F")
    stays.to_parquet(folder / "stays.parquet")
    about = read_json(folder / "series.json")
    write_json(folder / "series.json", about | {"observed_of": list(range(5))})
    noted = images["dicom_id"].iloc[::2]
    notes = write_notes({film: f"note of {film}" for film in noted}, images["taken_at"].iloc[::2].to_list())
    return folder, Store(set(images["dicom_id"]) - {images["dicom_id"].iat[1]}), notes


def test_an_item_has_its_film_note_record_series_and_labels(world: tuple[Path, Any, Path]) -> None:
    features, store, notes = world
    images = pd.read_parquet(features / "images.parquet").set_index("dicom_id")
    records = Records(features, store, notes)
    assert len(records) == len(images) - 1 and records.left_out == {"not in the store": 1}
    assert records.names == ["Edema"] and records.columns[:2] == ["sex_m", "sex_f"]
    series = load_file(features / "series.safetensors")
    for item in (records[i] for i in range(len(records))):
        row = images.loc[item["dicom_id"]]
        assert (item["film"] == sum(item["dicom_id"].encode()) % 256).all() and item["has_film"]
        assert item["note"] == (f"note of {item['dicom_id']}" if item["has_note"] else "")
        assert item["static"][0] == (row["sex"] == "M") and item["subject_id"] == row["subject_id"]
        label = {-1: np.nan}.get(row["Edema"], row["Edema"])
        np.testing.assert_equal(item["labels"].numpy(), np.array([label], np.float32))
        if np.isnan(row["stay_id"]):
            assert not item["has_series"] and item["series"].shape == (0, 22)
            continue
        at = list(series["stay_id"]).index(row["stay_id"])
        begin, end = series["offsets"][at : at + 2]
        hours = min(int(row["hours_from_intime"]), end - begin)
        assert item["series"].shape == (hours, 22) and item["has_series"] == (hours > 0)
        np.testing.assert_array_equal(item["series"][:, :5], series["values"][begin : begin + hours])
        np.testing.assert_array_equal(item["series"][:, 5:], series["observed"][begin : begin + hours])
    assert 0 < sum(records[i]["has_note"] for i in range(len(records))) < len(records)


def test_what_comes_after_a_film_changes_nothing(world: tuple[Path, Any, Path]) -> None:
    """Every hour that is not complete when the film is taken gets another value."""
    features, store, notes = world
    before = Records(features, store, notes)
    kept = [before[i]["series"].clone() for i in range(len(before))]
    arrays = load_file(features / "series.safetensors")
    last = before.table.dropna(subset="stay_id").groupby("stay_id")["until"].max()
    for stay, offset, end in zip(arrays["stay_id"], arrays["offsets"], arrays["offsets"][1:], strict=False):
        seen = int(last.get(stay, 0))
        arrays["values"][offset + seen : end] = 1e6
        arrays["observed"][offset + seen : end] = 7
    save_file(arrays, features / "series.safetensors")
    after = Records(features, store, notes)
    assert all(torch.equal(after[i]["series"], x) for i, x in enumerate(kept))


@pytest.mark.parametrize("given", [("store",), ("notes",), ()])
def test_a_store_and_notes_may_be_absent(world: tuple[Path, Any, Path], given: tuple[str, ...]) -> None:
    features, store, notes = world
    records = Records(features, **{k: v for k, v in (("store", store), ("notes", notes)) if k in given})
    item = records[0]
    assert ("film" in item) == ("store" in given) and ("note" in item) == ("notes" in given)
    assert len(collate([records[i] for i in range(4)])["labels"]) == 4


def test_features_without_a_series_give_none(world: tuple[Path, Any, Path]) -> None:
    features, store, _ = world
    for name in ("series.json", "series.safetensors", "stay_films.parquet"):
        (features / name).unlink()
    assert "series" not in Records(features, store)[0]


def test_a_tasks_samples_end_at_their_prediction(world: tuple[Path, Any, Path]) -> None:
    features, store, notes = world
    records = Records(features, store, notes, labels="mortality", split="test", max_hours=30)
    table = pd.read_parquet(features / "samples/mortality.parquet").query("split == 'test'")
    assert set(records.table["sample_id"]) == set(table["sample_id"]) and records.names == ["mortality"]
    items = [records[i] for i in range(len(records))]
    assert {len(item["series"]) for item in items} == {30}
    without = [item for item in items if not item["has_film"]]
    assert without and len(without) < len(items) and not any(item["film"].any() for item in without)
    assert all(item["static"][1] == 1 for item in without)  # the stay says that she is a woman


def test_workers_read_the_same_items(world: tuple[Path, Any, Path]) -> None:
    features, store, notes = world
    records = Records(features, store, notes, split="train")
    first = records[0]  # maps are open before the workers start
    again = pickle.loads(pickle.dumps(records))[0]
    assert first["note"] == again["note"] and torch.equal(first["series"], again["series"])
    options: dict[str, Any] = {"batch_size": 7, "collate_fn": records.collate}
    alone = list(torch.utils.data.DataLoader(records, **options))
    with_workers = list(torch.utils.data.DataLoader(records, num_workers=2, **options))
    assert sum(len(batch["lengths"]) for batch in alone) == len(records)
    for a, b in zip(alone, with_workers, strict=True):
        assert a["note"] == b["note"] and all(torch.equal(a[k], b[k]) for k in ("film", "series", "static", "lengths"))


def test_a_batch_is_padded_behind_what_counts(world: tuple[Path, Any, Path]) -> None:
    features, store, notes = world
    records = Records(features, store, notes, tokenizer=lambda text: [ord(c) for c in text], max_tokens=9)
    items = [records[i] for i in range(20)]
    batch = collate(items, pad=-7)
    for i, item in enumerate(items):
        hours, ids = len(item["series"]), item["note_ids"]
        assert batch["lengths"][i] == hours and torch.equal(batch["series"][i, :hours], item["series"])
        assert not batch["series"][i, hours:].any() and batch["has_note"][i] == item["has_note"]
        assert torch.equal(batch["note_ids"][i][batch["note_mask"][i]], ids) and len(ids) in (0, 9)
        assert (batch["note_ids"][i][~batch["note_mask"][i]] == -7).all()


def test_a_hugging_face_tokenizer_truncates_and_pads(world: tuple[Path, Any, Path], make_text_model: Make) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(make_text_model(), local_files_only=True)
    records = Records(world[0], notes=world[2], tokenizer=tokenizer, max_tokens=4)
    batch = records.collate([records[i] for i in range(8)])
    assert batch["note_ids"].shape == (8, 4)
    ends = batch["note_ids"][batch["has_note"]]
    assert (ends[:, 0] == tokenizer.cls_token_id).all() and (ends[:, -1] == tokenizer.sep_token_id).all()


def test_the_shares_of_the_preset_are_by_subject_and_all_is_fitted_on_its_train(world: tuple[Path, Any, Path]) -> None:
    features = world[0]
    parts = {s: Records(features, splits="70/15/15", split=s, seed=3) for s in ("train", "val", "test")}
    whole = Records(features)
    assert sum(map(len, parts.values())) == len(whole)
    for split, records in parts.items():
        assert {by_hash(s, 3, (0.7, 0.15, 0.15)) for s in records.table["subject_id"]} == {split}
    arrays, stays = load_file(features / "series.safetensors"), pd.read_parquet(features / "stays.parquet")
    train = [by_hash(s, 3, (0.7, 0.15, 0.15)) == "train" for s in stays["subject_id"]]
    rows = np.repeat(train, np.diff(arrays["offsets"]))
    seen = arrays["observed"][:, :5].astype(bool) & rows[:, None]
    mean = [arrays["values"][seen[:, f], f].mean() for f in range(4)]
    assert parts["test"].series is not None
    np.testing.assert_allclose(parts["test"].series.hours.mean[:4], mean, rtol=1e-4)
    assert parts["test"].series.hours.mean[4] == 0  # a column that is not normalised stays as it is
    ages = pd.read_parquet(features / "images.parquet")
    ages = ages[[by_hash(s, 3, (0.7, 0.15, 0.15)) == "train" for s in ages["subject_id"]]]
    at = parts["train"].columns.index("age_years")
    age = pd.read_parquet(features / "images.parquet").set_index("dicom_id")["age_years"]
    wanted = (age[parts["test"].table["dicom_id"]] - ages["age_years"].mean()) / ages["age_years"].std(ddof=0)
    np.testing.assert_allclose(parts["test"].static[:, at], wanted, rtol=1e-4)


def test_seventy_fifteen_fifteen_are_the_shares() -> None:
    drawn = pd.Series([by_hash(s, 0, (0.7, 0.15, 0.15)) for s in range(20_000)]).value_counts(normalize=True)
    assert drawn["train"] == pytest.approx(0.7, abs=0.01) and drawn["test"] == pytest.approx(0.15, abs=0.01)


def test_outcomes_are_no_inputs_and_late_notes_are_refused(world: tuple[Path, Any, Path], write_notes: Make) -> None:
    features = world[0]
    with pytest.raises(UserError, match="known only at discharge"):
        Records(features, groups=["mortality"])
    with pytest.raises(UserError, match="wanted train, val, test"):
        Records(features, split="validate")
    for wrong in ({"views": "side"}, {"uncertain": "maybe"}, {"empty": "ones"}):
        with pytest.raises(UserError, match=r"=\w+: wanted \w+ or"):
            Records(features, **wrong)
    with pytest.raises(UserError, match=r"missing=zeros: .* now called `empty`"):
        Records(features, missing="zeros")  # type: ignore[arg-type]
    film = pd.read_parquet(features / "images.parquet")["dicom_id"].iat[0]
    late = write_notes({film: "later"}, START + pd.Timedelta(days=9), name="late")
    with pytest.raises(UserError, match="known only after their film"):
        Records(features, notes=late)
