"""Each method in the training loop: training, resuming, collapse warnings, and export to plain timm."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import timm
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from configs import UserError
from configs.signals import Stopped
from pretrain import build, estimate, run, train
from pretrain import encoder as enc
from pretrain.data import select_films
from pretrain.options import METHODS
from pretrain.store import Store
from tests.pretrain.small import config, losses

pytestmark = pytest.mark.usefixtures("fresh_accelerator")

SMALL = {
    "dino": ("head.out=16", "dino.bottleneck=12"),
    "ibot": ("head.out=16", "dino.bottleneck=12"),
    "mae": ("mae.decoder_width=16", "mae.decoder_depth=1", "mae.decoder_heads=2", "views.num_focal=0"),
    "lejepa": ("lejepa.directions=16",),
}


def settings(data, out, name, *words):
    """Published values of the method, on small networks and batches; with the method's own views."""
    less = ("optim.epochs=1", "optim.lr=1e-3", *SMALL.get(name, ()), *words)
    return config(data, out, f"method={name}", *less)


@pytest.mark.parametrize("name", METHODS)
def test_it_trains_goes_on_and_opens_in_plain_timm(data, tmp_path, monkeypatch, name):
    words = ("ehr.groups=[sex,age]", "ehr.use=predict")
    whole = losses(train.train(settings(data, tmp_path / "whole", name, *words)))
    assert len(whole) == 6 and np.isfinite(whole).all()
    calls = iter([False, False, True])
    with monkeypatch.context() as patch:
        patch.setattr(run.stopping, "agreed", lambda self, step: next(calls))
        with pytest.raises(Stopped, match="step 3"):
            train.train(settings(data, tmp_path / "broken", name, *words))
    folder = train.train(settings(data, tmp_path / "broken", name, *words))
    assert losses(folder) == whole
    ends = [load_file(tmp_path / name / "encoder/encoder.safetensors") for name in ("whole", "broken")]
    assert ends[0].keys() == ends[1].keys() and all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0])
    meta = enc.read_meta(folder / "encoder")
    line = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    assert meta["method"] == name and ("train/prototypes_used" in line) == (name in ("msn", "pmsn"))
    assert {"train/record_error", "train/effective_rank"} <= set(line)
    args = {**meta["model_args"], "img_size": 32, "dynamic_img_size": True, "num_classes": 0, "in_chans": 1}
    plain = timm.create_model(meta["arch"], **args).eval()
    plain.load_state_dict(load_file(folder / "encoder/encoder.safetensors"), strict=True)
    x = torch.randn(2, 1, 32, 32)
    torch.testing.assert_close(plain(x), enc.load(folder)(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", METHODS)
def test_collapse_is_watched_whatever_the_method(data, tmp_path, monkeypatch, name):
    monkeypatch.setattr("pretrain.monitor.PATIENCE", 1)
    monkeypatch.setattr("pretrain.monitor.RANK_FLOOR", 1000.0)
    folder = train.train(settings(data, tmp_path / "x", name, "optim.steps=2"))
    said = (folder / "log.txt").read_text()
    assert "effective rank of the features" in said
    if name not in ("msn", "pmsn"):
        assert "prototypes in use" not in said and f"the sections loss do nothing with method {name}" in said


def test_a_record_that_tells_nothing_is_refused(data, tmp_path):
    folder = tmp_path / "features"
    folder.mkdir()
    table = pd.read_parquet(data / "features/images.parquet")
    table.assign(sex=None).to_parquet(folder / "images.parquet")
    (folder / "provenance.json").write_text("{}")
    with pytest.raises(UserError, match="no film has a known value, so there is nothing to contrast"):
        train.train(settings(data, tmp_path / "x", "msn", "ehr.groups=[sex]", "ehr.use=contrast", f"features={folder}"))


def test_the_method_of_the_page_trains_as_it_stands_there(data, tmp_path):
    page = (Path(__file__).resolve().parents[2] / "docs/methods.md").read_text()
    code = page.split("```python\n")[1].split("```")[0]
    assert len(code.splitlines()) < 80
    (tmp_path / "my_method.py").write_text(code)
    words = (
        f"method={tmp_path / 'my_method.py'}:SimSiam",
        "method_args={predictor: 8}",
        "mask.ratio=0",
        "optim.steps=2",
    )
    folder = train.train(config(data, tmp_path / "x", *words, "ehr.groups=[sex]", "ehr.use=contrast"))
    assert np.isfinite(losses(folder)).all() and enc.read_meta(folder / "encoder")["branch"] == "anchor"
    with pytest.raises(UserError, match="did you mean `predictor`"):
        train.train(config(data, tmp_path / "y", *words, "method_args={predictors: 8}"))


def test_a_budget_of_processor_seconds_is_decided_once_and_kept(data, tmp_path, monkeypatch):
    words = ("optim.steps=null", "optim.processor_seconds=3")
    monkeypatch.setattr(estimate, "step_cost", lambda *_: estimate.Cost(wall=1.0, processor=0.5))
    folder = train.train(config(data, tmp_path / "x", *words))
    assert len(losses(folder)) == 6 and json.loads((folder / "budget.json").read_text())["steps"] == 6
    meta = enc.read_meta(folder / "encoder")
    assert meta["films_trained"] == 48 and meta["processor_seconds"] > 0
    with pytest.raises(UserError, match="both say how long"):
        config(data, tmp_path / "y", "optim.processor_seconds=3")


def test_a_gpu_counts_the_seconds_for_which_it_is_held(monkeypatch):
    monkeypatch.setattr(estimate.time, "monotonic", lambda: 1234.5)
    assert estimate.processor_seconds(torch.device("cuda")) == 1234.5
    assert estimate.processor_seconds(torch.device("cpu")) < 1234.5


def test_a_step_is_timed_without_changing_the_run(data, tmp_path):
    settings = config(data, tmp_path / "x")
    films = select_films(data / "features", Store(data / "store"), settings.films, [], "default", 0)
    accelerator = Accelerator(cpu=True)
    method = build.method(settings, films)
    steps = build.steps(settings, films, Store(data / "store"), method, accelerator)
    before, weights = torch.get_rng_state(), {key: value.clone() for key, value in method.state_dict().items()}
    cost = estimate.step_cost(settings, steps, accelerator)
    assert cost.wall > 0 and cost.processor > 0 and torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(value, weights[key]) for key, value in method.state_dict().items())


def test_an_estimate_on_a_cpu_times_few_films_a_step_and_not_for_long(data, tmp_path, monkeypatch):
    """A step of 12 films is three of 4; steps that last end after a time, not after their number."""
    timed = []

    def cost(settings, steps, accelerator, most_seconds):
        timed.append((steps.batch_size, most_seconds))
        return estimate.Cost(wall=3.0, processor=6.0, steps=2)

    whole = estimate.step_cost
    monkeypatch.setattr(estimate, "FEW", 4)
    monkeypatch.setattr(estimate, "PIXELS", 1)
    monkeypatch.setattr(estimate, "step_cost", cost)
    said = estimate.estimate(config(data, tmp_path / "x", "optim.steps=400", "optim.batch_size=12"))
    assert timed == [(4, estimate.MOST_SECONDS)] and "2 steps of 4 films" in said and "9 s a step of 12" in said
    settings = config(data, tmp_path / "x")
    films = select_films(data / "features", Store(data / "store"), settings.films, [], "default", 0)
    accelerator = Accelerator(cpu=True)
    steps = build.steps(settings, films, Store(data / "store"), build.method(settings, films), accelerator)
    assert whole(settings, steps, accelerator, 0.0).steps == 1


def test_an_estimate_says_how_long_and_writes_nothing(data, tmp_path, monkeypatch):
    monkeypatch.setattr(estimate, "step_cost", lambda *_: estimate.Cost(wall=9.0, processor=18.0))
    said = estimate.estimate(config(data, tmp_path / "x", "optim.steps=400"))
    assert "1 films/s, 9 s a step of 8" in said and "400 steps" in said and "about 1 h, 2 processor hours" in said
    assert not (tmp_path / "x").exists()
