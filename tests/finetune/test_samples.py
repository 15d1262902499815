"""Content of a batch: visible hours, available films, each sample once."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs import UserError
from ehr_features import series
from finetune.fusion.samples import _of_others, another_film, batches, complete_steps, load, padding

Make = Callable[..., Path]


def test_only_complete_hours_count_but_at_the_stays_end() -> None:
    """A stay of 10.5 hours has 11 bins; at 10.2 hours the last one is not complete."""
    at = np.array([48.0, 10.2, 10.5, 0.4, 7.0])
    los = np.array([90.0, 10.5, 10.5, 10.5, 7.0])
    assert complete_steps(at, los, 1, np.array([90, 11, 11, 11, 7])).tolist() == [48, 10, 11, 0, 7]
    assert complete_steps(at, los, 2, np.array([45, 6, 6, 6, 4])).tolist() == [24, 5, 6, 0, 4]


def test_a_batch_is_what_the_features_hold(make_icu: Make) -> None:
    folder = make_icu() / "features"
    samples = load(folder, "phenotypes")
    wanted = series.load(folder)
    rows = np.array([3, 0, 17])
    batch = samples.batch(rows)
    assert batch["series"].shape[1] == batch["lengths"].max()
    for i, row in enumerate(rows):
        own = wanted[int(samples.table["stay_id"].iloc[row])]
        assert batch["lengths"][i] == len(own)
        assert np.array_equal(batch["series"][i, : len(own)], own)
        assert not batch["series"][i, len(own) :].any()


def test_a_sample_reads_nothing_after_its_prediction(make_icu: Make) -> None:
    samples = load(make_icu() / "features", "mortality")
    assert samples.length.max() == 48
    films = pd.read_parquet(make_icu() / "features" / "stay_films.parquet").set_index("dicom_id")["hours_from_intime"]
    used = samples.films[samples.has_image, 0]
    assert films[np.array(samples.film_ids)[used]].max() <= 48
    assert (samples.hours[samples.has_image] >= 0).all()


def test_a_film_from_after_the_prediction_is_refused(make_icu: Make) -> None:
    folder = make_icu() / "features"
    table = pd.read_parquet(folder / "samples/mortality.parquet")
    table["predict_at_hours"] = 1.0
    table.to_parquet(folder / "samples/mortality.parquet")
    with pytest.raises(UserError, match="after the prediction"):
        load(folder, "mortality")


def test_a_film_that_the_store_lacks_counts_as_absent(make_icu: Make) -> None:
    folder = make_icu() / "features"
    own = pd.read_parquet(folder / "samples/mortality.parquet")["dicom_id"].dropna()
    samples = load(folder, "mortality", readable=set(own[:5]))
    assert samples.has_image.sum() == 5 and sorted(samples.film_ids) == sorted(own[:5])


def test_features_without_films_need_no_table_of_them(make_icu: Make) -> None:
    folder = make_icu() / "features"
    table = pd.read_parquet(folder / "samples/mortality.parquet")
    table.assign(dicom_id=pd.Series(pd.NA, table.index, "string")).to_parquet(folder / "samples/mortality.parquet")
    (folder / "stay_films.parquet").unlink()
    samples = load(folder, "mortality")
    assert len(samples) == len(table) and not samples.has_image.any() and not samples.film_ids


def test_several_films_stand_in_time_order_and_end_with_the_samples_own(make_icu: Make) -> None:
    folder = make_icu(films=4) / "features"
    samples = load(folder, "mortality", films=3)
    single = load(folder, "mortality")
    count = (samples.films >= 0).sum(1)
    assert set(count) == {0, 1, 2, 3}
    for row in np.flatnonzero(count):
        ids = [samples.film_ids[i] for i in samples.films[row, : count[row]]]
        assert ids[-1] == single.film_ids[single.films[row, 0]]
        assert (np.diff(samples.hours[row, : count[row]]) < 0).all()
    assert (samples.films[np.arange(3) >= count[:, None]] == -1).all()


def test_a_missing_film_brings_zeros(make_icu: Make) -> None:
    samples = load(make_icu() / "features", "mortality")
    batch = samples.batch(np.flatnonzero(~samples.has_image)[:4])
    assert not batch["context"].any() and not batch["hours"].any() and not batch["has_image"].any()


def test_paired_is_part_of_partial_and_splits_do_not_meet(make_icu: Make) -> None:
    samples = load(make_icu() / "features", "mortality")
    rows = {s: samples.rows(s) for s in ("train", "val", "test")}
    assert sum(map(len, rows.values())) == len(np.unique(np.concatenate(list(rows.values())))) == len(samples)
    for split, own in rows.items():
        paired = samples.rows(split, "paired")
        assert set(paired) < set(own) and samples.has_image[paired].all()


@given(st.lists(st.integers(0, 300), min_size=1, max_size=60), st.integers(1, 20), st.none() | st.integers(0, 9))
def test_batches_hold_each_row_once(lengths: list[int], size: int, seed: int | None) -> None:
    found = batches(np.array(lengths), size, None if seed is None else np.random.default_rng(seed))
    assert sorted(np.concatenate(found)) == list(range(len(lengths)))
    assert max(map(len, found)) <= size and len(found) == -(-len(lengths) // size)


def test_bucketing_keeps_padding_under_15_percent() -> None:
    rng = np.random.default_rng(0)
    lengths = np.ceil(np.exp(rng.normal(4, 0.9, 4000))).astype(int)  # like lengths of ICU stays: median 55 h, long tail
    assert padding(lengths, batches(lengths, 64, rng)) < 0.15
    assert padding(lengths, [np.arange(len(lengths))[i : i + 64] for i in range(0, 4000, 64)]) > 0.5


def test_another_film_is_of_another_subject_with_the_same_view_and_split(make_icu: Make) -> None:
    samples = load(make_icu() / "features", "mortality")
    other = another_film(samples, seed=3)
    owner = {}
    for row in np.flatnonzero(samples.has_image):
        owner[samples.films[row, 0]] = samples.table.iloc[row][["subject_id", "split"]].tolist()
    changed = np.flatnonzero(other.has_image)
    assert len(changed) == samples.has_image.sum()
    for row in changed:
        subject, split = owner[other.films[row, 0]]
        assert subject != samples.table["subject_id"].iloc[row] and split == samples.table["split"].iloc[row]
        assert np.array_equal(samples.views[other.films[row, 0]], samples.views[samples.films[row, 0]])
    assert np.array_equal(other.hours, samples.hours)


def test_another_film_is_drawn_as_row_by_row_from_the_rows_of_others() -> None:
    """The plain loop, which looks at all rows for each row, draws the same films."""
    rng = np.random.default_rng(5)
    subject = rng.integers(0, 12, 60)
    drawn = _of_others(subject, np.random.default_rng(1))
    plain = np.random.default_rng(1)
    wanted = [plain.choice(np.flatnonzero(subject != own)) for own in subject]
    assert drawn.tolist() == wanted
    assert _of_others(np.full(3, 7), rng).tolist() == [-1, -1, -1]


def test_an_unknown_task_names_those_there_are(make_icu: Make) -> None:
    with pytest.raises(UserError, match="samples/mortality"):
        load(make_icu() / "features", "mortalty")


def test_the_series_stay_in_their_file_and_batches_hold_the_same_hours(make_icu: Make) -> None:
    """One copy a machine: the hours of all stays are mapped, normalised batch by batch, bit by bit as loaded."""
    folder = make_icu() / "features"
    samples = load(folder, "mortality")
    assert isinstance(samples.values, series.Mapped)
    again = pickle.loads(pickle.dumps(samples.values))  # as a worker that is spawned gets it
    assert all(isinstance(of.base, np.memmap) for of in again._map()), "values and observed are views of the file"
    loaded = series.load(folder)
    for row in (0, 5):
        begin, length = samples.start[row], samples.length[row]
        own = loaded[int(samples.table["stay_id"].iloc[row])][:length]
        assert np.array_equal(again[begin : begin + length], own)
        assert np.array_equal(samples.batch(np.array([row]))["series"][0].numpy()[:length], own)


def test_samples_of_stays_without_a_series_are_refused(make_icu: Make) -> None:
    folder = make_icu() / "features"
    table = pd.read_parquet(folder / "samples/mortality.parquet")
    table.assign(stay_id=table["stay_id"] + 10**9).to_parquet(folder / "samples/mortality.parquet")
    with pytest.raises(UserError, match="wanted a stay of stays"):
        load(folder, "mortality")
