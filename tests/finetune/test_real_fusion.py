"""All fusion models on the open MIMIC-IV demo, from raw tables to predictions; with 12 deaths, only a smoke test."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from configs import load
from finetune.config import FuseConfig
from finetune.fusion.models import MODELS
from finetune.fusion.train import fuse
from finetune.results import read_results
from pretrain import encoder as encoders
from tests import forked

pytestmark = [pytest.mark.real, pytest.mark.slow]
CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "demo"
TASKS = ("mortality", "phenotypes", "phenotypes_early", "decompensation", "length_of_stay", "findings")
SHORT = ["hidden=8", "joint=8", "epochs=1", "samples=0", "batch_size=256", "film=both"]


@pytest.fixture(scope="module")
def house(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """features/ of all tasks, store/, and an untrained encoder/."""
    house = tmp_path_factory.mktemp("real")
    films = f"mimic_cxr={shared / 'data/mimic-cxr-linked'}"
    tables = [f"mimic_iv={shared / 'data/mimic-iv-demo-2.2'}", films, f"tasks=[{','.join(TASKS)}]"]
    for words in (
        ["ehr_features", "build", str(CONFIGS / "features.yaml"), *tables, f"out={house / 'features'}"],
        ["pretrain", "images", str(CONFIGS / "images.yaml"), films, f"out={house / 'store'}"],
    ):
        done = forked.run(list(words))
        assert done.returncode == 0, done.stderr
    torch.manual_seed(0)
    args = {"patch_size": 16, "embed_dim": 24, "depth": 1, "num_heads": 2}
    encoders.save(house / "encoder", encoders.create("vit_tiny_patch16_224", image_size=48, model_args=args))
    return house


def run(house: Path, task: str, model: str, *more: str) -> Path:
    words = [f"{key}={house / key}" for key in ("features", "store", "encoder")]
    words += [f"out={house / 'runs' / task / model}", f"task={task}", f"model={model}", *SHORT, *more]
    return fuse(load(FuseConfig, CONFIGS / "fuse_mortality.yaml", words))


@pytest.mark.parametrize("task", ["mortality", "phenotypes"])
def test_every_model_predicts_each_stay_once(house: Path, task: str) -> None:
    samples = pd.read_parquet(house / f"features/samples/{task}.parquet").query("split == 'test'")
    assert len(samples) > 10
    for model in (*MODELS, "record_gbm"):
        found = pd.read_parquet(run(house, task, model) / "predictions/test.parquet")
        wanted = samples if model != "film_only" else samples[samples["sample_id"].isin(found["sample_id"])]
        assert sorted(found["sample_id"]) == sorted(wanted["sample_id"]) and len(found) > 0
        logits = found[[column for column in found if column.startswith("logit_")]]
        assert logits.shape[1] == (1 if task == "mortality" else 25)
        trained = pd.read_parquet(house / f"features/samples/{task}.parquet").query("split == 'train'")
        if model == "film_only":
            trained = trained[trained["dicom_id"].notna()]
        for name in logits:  # without both classes among its train rows a label is not learned, and has no logit
            learned = trained[name.removeprefix("logit_")].nunique() == 2
            assert np.isfinite(logits[name]).all() if learned else logits[name].isna().all(), (model, name)


@pytest.mark.parametrize("task", ["phenotypes_early", "decompensation", "length_of_stay", "radiology"])
def test_the_other_tasks_run(house: Path, task: str) -> None:
    _, rows = read_results(run(house, task, "medfuse"))
    test = rows[(rows["split"] == "test") & (rows["subset"] == "all")]
    assert len(test) > 0 and (task != "length_of_stay" or {"kappa", "mae_hours"} <= set(test["metric"]))
