"""The loop of the fusion models, on a small world with a planted signal."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from configs import UserError
from configs.cli import Stopped
from finetune.config import FuseConfig
from finetune.fusion import MODELS
from finetune.results import read_results
from finetune.train import fuse
from pretrain import encoder as encoders
from pretrain.run import stopping

Make = Callable[..., Path]


def config(folder: Path, **changes: Any) -> FuseConfig:
    small = {"hidden": 8, "layers": 1, "joint": 8, "epochs": 3, "samples": 20, "lr": 1e-2, "batch_size": 32}
    paths = {"features": str(folder / "features"), "store": "memory", "encoder": "pixels", "out": str(folder / "run")}
    return FuseConfig(**(paths | small | changes))


def test_a_run_leaves_results_and_every_sample_once(make_icu: Make) -> None:
    folder = make_icu()
    run = fuse(config(folder))
    about, rows = read_results(run)
    assert about["model"] == "medfuse" and set(rows["subset"]) == {"all", "paired"}
    samples = pd.read_parquet(folder / "features/samples/mortality.parquet")
    assert (run / "model.safetensors").is_file() and not (run / "encoder").exists()
    for split in ("val", "test"):
        wanted = samples.loc[samples["split"] == split, "sample_id"]
        assert sorted(pd.read_parquet(run / f"predictions/{split}.parquet")["sample_id"]) == sorted(wanted)


def curve(run: Path) -> list[tuple[float, float]]:
    table = pd.read_json(run / "metrics.jsonl", lines=True)
    return list(zip(table["train/loss"], table["val/loss"], strict=True))


def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(make_icu: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_icu()
    unbroken = fuse(config(folder, epochs=4, out=str(folder / "unbroken")))

    class StopAfterTwo(stopping):
        seen = 0

        def agreed(self) -> bool:
            self.seen += 1
            return self.seen == 2

    with monkeypatch.context() as patch, pytest.raises(Stopped, match="step 2"):
        patch.setattr("pretrain.run.stopping", StopAfterTwo)
        fuse(config(folder, epochs=4))
    broken = fuse(config(folder, epochs=4))
    assert curve(broken) == curve(unbroken)
    ours, theirs = (pd.read_parquet(run / "predictions/test.parquet") for run in (broken, unbroken))
    pd.testing.assert_frame_equal(ours, theirs)


@pytest.mark.parametrize("model", [*MODELS])
def test_every_model_trains_and_predicts(make_icu: Make, model: str) -> None:
    folder = make_icu(stays=60)
    run = fuse(config(folder, model=model, epochs=1, samples=0))
    table = pd.read_parquet(run / "predictions/test.parquet")
    assert table["logit_mortality"].notna().all()
    assert table["has_image"].all() or model != "film_only"
    assert ("weight_film" in table) == (model == "attention")


def test_fusion_learns_both_parts_of_the_planted_signal(make_icu: Make) -> None:
    folder = make_icu(stays=900)
    found = {}
    for model in ("record_lstm", "film_only", "medfuse"):
        run = fuse(config(folder, model=model, epochs=15, samples=0, hidden=16, joint=16, out=str(folder / model)))
        _, rows = read_results(run)
        auroc = rows[(rows["metric"] == "auroc") & (rows["split"] == "test") & (rows["label"] == "macro")]
        found[model] = auroc.set_index("subset")["value"]["paired"]
    print(found)
    assert found["record_lstm"] > 0.6 and found["film_only"] > 0.6
    assert found["medfuse"] > max(found["record_lstm"], found["film_only"]) + 0.03


def test_shuffled_labels_teach_nothing(make_icu: Make) -> None:
    run = fuse(config(make_icu(stays=900, shuffled=True), epochs=5, samples=200))
    _, rows = read_results(run)
    auroc = rows[(rows["metric"] == "auroc") & (rows["split"] == "test") & (rows["subset"] == "all")].iloc[0]
    assert auroc["low"] < 0.5 < auroc["high"]


@pytest.fixture
def tiny_encoder(tmp_path: Path) -> Path:
    args = {"patch_size": 16, "embed_dim": 16, "depth": 1, "num_heads": 2}
    torch.manual_seed(0)
    return encoders.save(
        tmp_path / "tiny" / "encoder", encoders.create("vit_tiny_patch16_224", image_size=32, model_args=args)
    )


@pytest.mark.parametrize("freeze", [True, False])
def test_the_film_encoder_learns_only_when_it_is_tuned(make_icu: Make, tiny_encoder: Path, freeze: bool) -> None:
    folder = make_icu(stays=60)
    run = fuse(config(folder, encoder=str(tiny_encoder.parent), freeze=freeze, encoder_lr=1e-3, epochs=2))
    assert (run / "encoder").is_dir() is not freeze
    if not freeze:
        before, after = (encoders.load(place).state_dict() for place in (tiny_encoder, run / "encoder"))
        moved = [name for name in before if not torch.equal(before[name], after[name])]
        assert len(moved) > len(before) / 2
        train = pd.read_parquet(folder / "features/samples/mortality.parquet").query("split == 'train'")["subject_id"]
        assert set(pd.read_parquet(run / "seen_subjects.parquet")["subject_id"]) == set(train)


def test_a_missing_film_never_reaches_the_encoder(
    make_icu: Make, tiny_encoder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    real = encoders.Encoder.features
    monkeypatch.setattr(
        encoders.Encoder, "features", lambda self, x, keep=None: seen.append(len(x)) or real(self, x, keep)
    )
    folder = make_icu(stays=60)
    fuse(config(folder, encoder=str(tiny_encoder), freeze=False, film="features", epochs=1))
    films = {
        split: pd.read_parquet(folder / f"run/predictions/{split}.parquet")["has_image"].sum()
        for split in ("val", "test")
    }
    assert min(seen) > 0
    assert sum(seen[1:]) == seen[0] + films["val"]  # all films frozen; then train, val, and at the end val, test


def test_an_encoder_that_saw_test_subjects_is_refused(make_icu: Make, tiny_encoder: Path) -> None:
    folder = make_icu(stays=60)
    table = pd.read_parquet(folder / "features/samples/mortality.parquet")
    table[["subject_id"]].drop_duplicates().to_parquet(tiny_encoder.parent / "seen_subjects.parquet")
    with pytest.raises(UserError, match="saw"):
        fuse(config(folder, encoder=str(tiny_encoder)))
    assert not (folder / "run").exists()
    about, _ = read_results(fuse(config(folder, encoder=str(tiny_encoder), allow_leak=True, epochs=1)))
    assert about["films_seen"] == "leak" and "LEAK" in about["warnings"][0]


def test_a_batch_of_one_works(make_icu: Make) -> None:
    folder = make_icu(stays=24)
    fuse(config(folder, batch_size=1, epochs=1))


def test_mistakes_are_named(make_icu: Make) -> None:
    folder = make_icu(stays=24)
    with pytest.raises(UserError, match="no such model; there are"):
        fuse(config(folder, model="medfus"))
    with pytest.raises(ValueError, match="looks at films"):
        config(folder, encoder=None)
    fuse(config(folder, model="record_lstm", encoder=None, store=None, epochs=1))
