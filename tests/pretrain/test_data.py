"""The films of a run, their pairs, records and batches."""

import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from torch.utils.data import DataLoader

from configs import UserError
from pretrain import build, train
from pretrain import data as bt
from pretrain import data as loader
from pretrain.data import Partners, own_errors
from pretrain.store import Store
from tests.pretrain.small import SMALL, config

pytestmark = pytest.mark.usefixtures("fresh_accelerator")


def test_films_of_other_splits_and_views_are_left_out_and_counted(data):
    settings = config(data, data / "y").films
    films = bt.select_films(data / "features", Store(data / "store"), settings, ["sex"], "default", 0)
    assert set(films.table["subject_id"]) <= set(range(5)) and len(films) == 15
    assert films.left_out["not of split train"] == 9
    capped = settings.model_copy(update={"per_subject_cap": 1})
    films = bt.select_films(data / "features", Store(data / "store"), capped, [], "default", 0)
    assert films.table["subject_id"].is_unique and films.left_out["over per_subject_cap"] == 10


def test_partners_are_of_the_same_study_or_subject_in_time():
    table = pd.DataFrame(
        {
            "split": "train",
            "study_id": [1, 1, 2, 3, 4],
            "subject_id": [1, 1, 1, 1, 2],
            "taken_at": pd.to_datetime(["2150-01-01", "2150-01-01", "2150-01-03", "2151-01-01", "2150-01-01"]),
        }
    )
    rows = np.arange(5)
    for u in np.linspace(0, 0.999, 7):
        draws = np.full(5, u)
        assert Partners(table, "study", None)(rows, draws).tolist() == [1, 0, 2, 3, 4]
        near = Partners(table, "patient", 7)(rows, draws)
        assert near[0] in (1, 2) and near[2] in (0, 1) and near[3] == 3 and near[4] == 4
        assert Partners(table, "patient", None)(rows, draws)[3] in (0, 1, 2)


@pytest.mark.parametrize("positives", ["study", "patient"])
def test_other_positives_train(data, tmp_path, positives):
    train.train(config(data, tmp_path / "x", "optim.steps=2", f"films.positives={positives}"))


@pytest.mark.parametrize("arch", ["vit_tiny_patch16_224", "resnet34"])
@pytest.mark.parametrize("workers", [0, 1])
def test_films_cut_on_the_device_give_the_same_batches(data, tmp_path, arch, workers):
    """As on a GPU: workers read films and plans, the views are cut where the model is."""
    network = {"arch": arch, "image_size": 32, "model_args": SMALL["encoder"]["model_args"] if "vit" in arch else {}}
    settings = config(data, tmp_path / "x", "mask.ratio=0.5", "mask.cell=16", encoder=network)
    store = Store(data / "store")
    films = bt.select_films(data / "features", store, settings.films, ["sex"], "default", 0)
    accelerator = type("A", (), {"num_processes": 1, "process_index": 0, "device": torch.device("cpu")})
    steps = build.steps(settings, films, store, build.method(settings, films), accelerator)
    here = [steps[i] for i in range(2)]
    steps.cut_here = False
    for mine, other in zip(here, loader.batches(steps, 0, 2, workers, torch.device("cpu")), strict=True):
        for a, b in zip(
            [mine.target, mine.static, *mine.anchors], [other.target, other.static, *other.anchors], strict=True
        ):
            torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_blanked_groups_are_zero_as_a_whole(data, tmp_path):
    store = Store(data / "store")
    films = bt.select_films(data / "features", store, config(data, tmp_path / "x").films, ["sex", "age"], "default", 0)
    accelerator = type("A", (), {"num_processes": 1, "process_index": 0, "device": torch.device("cpu")})
    settings = config(data, tmp_path / "x", "ehr.dropout=0.5")
    steps = build.steps(settings, films, store, build.method(settings, films), accelerator)
    drawn = torch.cat([steps[i].static for i in range(40)])
    sex = drawn[:, :3].abs().sum(dim=1)
    assert set(sex.tolist()) == {0.0, 1.0} and 0.35 < sex.mean() < 0.65


def test_the_permuted_record_is_somebody_elses(data, tmp_path, monkeypatch):
    seen = {}
    make = build.steps

    def keep(config, films, *rest):
        seen[config.ehr.permuted] = films.static.copy()
        return make(config, films, *rest)

    monkeypatch.setattr(build, "steps", keep)
    for permuted in ("false", "true"):
        settings = config(data, tmp_path / permuted, "ehr.groups=[age]", "optim.steps=1", f"ehr.permuted={permuted}")
        train.train(settings)
    assert (seen[True][:, 0] != seen[False][:, 0]).mean() > 0.7
    assert sorted(seen[True][:, 0]) == sorted(seen[False][:, 0])


def test_no_permuted_record_is_of_the_films_own_subject(data, tmp_path):
    settings = config(data, tmp_path / "x").films
    for seed in range(20):
        films = bt.select_films(data / "features", Store(data / "store"), settings, ["age"], "default", seed)
        films.static = films.subjects[:, None].astype(np.float32)
        films.permute_record(seed)
        assert (films.static[:, 0] != films.subjects).all()
        assert sorted(films.static[:, 0]) == sorted(films.subjects)


def test_the_target_view_of_another_film_brings_that_films_record(data, tmp_path):
    settings = config(data, tmp_path / "x", "films.positives=patient", "ehr.groups=[age]", "ehr.use=predict")
    store = Store(data / "store")
    films = bt.select_films(data / "features", store, settings.films, ["age"], "default", 0)
    films.static = np.arange(len(films), dtype=np.float32)[:, None]  # which film it is
    accelerator = type("A", (), {"num_processes": 1, "process_index": 0, "device": torch.device("cpu")})
    steps = build.steps(settings, films, store, build.method(settings, films), accelerator)
    read, made = [], steps._read
    steps._read = lambda rows: (read.append(rows), made(rows))[1]
    batch = steps[0]
    anchors, targets = read
    assert batch.static[:, 0].tolist() == anchors.tolist() and batch.target_static[:, 0].tolist() == targets.tolist()
    assert (films.subjects[anchors] == films.subjects[targets]).all() and (anchors != targets).any()


def test_pairs_never_cross_splits_and_are_counted(data, tmp_path):
    table = pd.DataFrame({"split": ["train", "val", "train"], "study_id": 1, "subject_id": 1, "taken_at": "2150-01-01"})
    for by in ("study", "patient"):
        partners = Partners(table, by, None)
        assert partners(np.arange(3), np.full(3, 0.5)).tolist() == [2, 1, 0] and partners.count() == 2
    folder = train.train(config(data, tmp_path / "x", "optim.steps=1", "films.positives=patient", "films.max_days=8"))
    assert "pairs: 15 of 15 films have another of their patient" in (folder / "log.txt").read_text()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: t.assign(age_years="old"), "column `age_years`: got .*, wanted numbers"),
        (lambda t: pd.concat([t, t.head(3)]), "column `dicom_id`, 3 rows, the first row 25: wanted each value once"),
        (lambda t: t.drop(columns="age_years"), "columns missing: age_years"),
        (
            lambda t: t.assign(subject_id=None),
            "column `subject_id`, 24 rows, the first row 1: wanted a value",
        ),
        (lambda t: t.assign(age_years=np.nan), None),
    ],
)
def test_odd_tables_are_named(data, tmp_path, change, says):
    shutil.copytree(data / "features", tmp_path / "features")
    change(pd.read_parquet(data / "features/images.parquet")).to_parquet(tmp_path / "features/images.parquet")
    settings = config(data, tmp_path / "x", "ehr.groups=[sex,age]", "optim.steps=1", f"features={tmp_path}/features")
    if says is None:
        assert "warning: EHR group age is equal for all films" in (train.train(settings) / "log.txt").read_text()
    else:
        with pytest.raises(UserError, match=says):
            train.train(settings)


class Gone:
    """A dataset whose store is no longer there."""

    def __getitem__(self, i: int) -> int:
        raise UserError("store/shard-00001.arrow: cannot be checked; was the store copied whole?")


@pytest.mark.parametrize("workers", [0, 1])
def test_what_a_worker_cannot_read_is_said_in_its_sentence(workers):
    items = iter(DataLoader(Gone(), batch_size=None, sampler=range(2), num_workers=workers))
    with pytest.raises(UserError) as caught:
        list(own_errors(items))
    assert not [worker for worker in getattr(items, "_workers", []) if worker.is_alive()]
    assert str(caught.value) == "store/shard-00001.arrow: cannot be checked; was the store copied whole?"
