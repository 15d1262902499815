"""Training through the encoder."""

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from accelerate import debug_launcher
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from configs.signals import Stopped
from ehr_features.typed import read_json
from finetune.config import ProbeConfig, TuneConfig
from finetune.probe import tune
from finetune.probe import tune as tune_net
from finetune.probe.main import probe
from finetune.results import read_predictions, read_results
from pretrain import encoder as encoders
from pretrain import run

World = Callable[..., Path]
TINY = {"depth": 2, "embed_dim": 24, "num_heads": 2, "patch_size": 8}


def config(folder: Path, method: str, **more: object) -> ProbeConfig:
    torch.manual_seed(0)
    if not (folder / "pretrain/encoder").exists():
        made = encoders.create("vit_tiny_patch16_224", image_size=32, model_args=TINY)
        encoders.save(folder / "pretrain/encoder", made, {"ehr_groups": {}})
    tuning = {"lr": 3e-3, "epochs": 6, "batch_size": 32, "warmup_epochs": 0.5, **more.pop("tune", {})}  # type: ignore[dict-item]
    given = {"features": str(folder / "features"), "store": "memory", "encoder": f"random:{folder / 'pretrain'}"}
    given |= {"out": str(folder / "runs/tuned"), "samples": 50, "method": method, "tune": tuning, **more}
    return ProbeConfig.model_validate(given)


def macro(folder: Path) -> float:
    rows = read_results(folder)[1]
    return rows[(rows["label"] == "macro") & (rows["metric"] == "auroc") & (rows["split"] == "test")]["value"].item()


def test_training_from_scratch_finds_planted_findings(make_world: World) -> None:
    folder = make_world(subjects=200)
    still = {"layer_decay": 1.0, "rotate": 0, "zoom": 0, "shift": 0}
    out = probe(config(folder, "finetune", tune={"epochs": 20, "patience": 20, **still}))
    assert macro(out) > 0.75
    about = read_results(out)[0]
    assert about["pretraining_films"] == "none" and about["compared_by"]["films_seen"] == 0
    assert read_json(out / "encoder/encoder.json")["supervised_by"] == "findings"
    images = pd.read_parquet(folder / "features/images.parquet")
    seen = set(pd.read_parquet(out / "seen_subjects.parquet")["subject_id"])
    assert seen and not seen & set(images.query("split != 'train'")["subject_id"])


def test_a_tuned_encoder_may_be_probed_again_and_is_named_supervised(make_world: World) -> None:
    folder = make_world()
    out = probe(config(folder, "finetune", tune={"epochs": 1}))
    more = {"encoder": str(out), "out": str(folder / "runs/again"), "epochs": 2}
    about = read_results(probe(config(folder, "linear", **more)))[0]
    assert about["pretraining_films"] == "train" and about["supervision"] == "supervised by findings"


def test_attentive_leaves_the_encoder_as_it_was(make_world: World) -> None:
    folder = make_world()
    given = config(folder, "attentive", encoder=str(folder / "pretrain"), tune={"epochs": 2})
    out = probe(given)
    checkpoint = run.load_checkpoint(out / "fits/0")
    assert checkpoint is not None
    kept = checkpoint["kept"]
    before = load_file(folder / "pretrain/encoder/encoder.safetensors")
    assert all(torch.equal(kept[f"encoder.net.{key}"], value) for key, value in before.items())
    assert kept["query"].abs().sum() > 0
    assert not (out / "encoder").exists()


@pytest.mark.parametrize("method", ["attentive", "finetune"])
def test_a_run_that_was_stopped_goes_on_to_the_same_weights(
    make_world: World, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    folder = make_world()
    whole = probe(config(folder, method, tune={"epochs": 3}, out=str(folder / "runs/whole")))
    steps = 0
    real = tune._Fit._step

    def stopping_step(self: tune._Fit, *args: object) -> float:
        nonlocal steps
        steps += 1
        if steps == 5:
            stops[-1].requested = True
        return real(self, *args)  # type: ignore[arg-type]

    stops: list[run.stopping] = []
    enter = run.stopping.__enter__

    def entered(self: run.stopping) -> run.stopping:
        stops.append(self)
        return enter(self)

    monkeypatch.setattr(tune._Fit, "_step", stopping_step)
    monkeypatch.setattr(run.stopping, "__enter__", entered)
    given = config(folder, method, tune={"epochs": 3}, out=str(folder / "runs/broken"))
    with pytest.raises(Stopped, match="stopped at step 5"):
        probe(given)
    broken = probe(given)
    pd.testing.assert_frame_equal(read_predictions(whole, "test")[2], read_predictions(broken, "test")[2])
    curves = [pd.read_json(of / "metrics.jsonl", lines=True).drop(columns="seconds") for of in (whole, broken)]
    pd.testing.assert_frame_equal(*curves)


def test_lower_layers_move_less_and_biases_do_not_decay() -> None:
    made = encoders.create("vit_tiny_patch16_224", image_size=32, model_args=TINY)
    net = tune_net.Tuned(made, 3, attentive=False, scratch=True)
    found = tune_net.groups(net, TuneConfig.model_validate({"layer_decay": 0.5, "weight_decay": 0.1}))
    scale = {id(p): (g["lr_scale"], g["weight_decay"]) for g in found for p in g["params"]}
    assert len(scale) == len(list(net.parameters()))
    blocks = [scale[id(net.encoder.net.blocks[i].mlp.fc1.weight)] for i in range(2)]
    patch = scale[id(net.encoder.net.patch_embed.proj.weight)]
    assert patch[0] < blocks[0][0] < blocks[1][0] <= scale[id(net.head.weight)][0] == 1.0
    assert blocks[0][0] == 0.5 * blocks[1][0]
    assert scale[id(net.encoder.net.blocks[0].mlp.fc1.bias)][1] == 0 and blocks[0][1] == 0.1


def test_layers_of_random_weights_have_one_learning_rate() -> None:
    for scratch, low in ((True, 1.0), (False, 0.75**2)):
        made = encoders.create("vit_tiny_patch16_224", image_size=32, model_args=TINY)
        net = tune_net.Tuned(made, 3, attentive=False, scratch=scratch)
        scales = {group["lr_scale"] for group in tune_net.groups(net, TuneConfig())}
        assert min(scales) == pytest.approx(low) and max(scales) == 1.0


def test_augmentation_of_strength_zero_changes_nothing_and_never_flips() -> None:
    films = torch.randint(0, 256, (4, 16, 16), dtype=torch.uint8)
    still = TuneConfig.model_validate({"rotate": 0, "zoom": 0, "shift": 0, "contrast": 0})
    same = tune_net.augment(films, still, torch.Generator().manual_seed(0))
    torch.testing.assert_close(same[:, 0], films.float() / 255, atol=1e-5, rtol=0)
    left = torch.zeros(64, 32, 32, dtype=torch.uint8)
    left[:, :, :10] = 200
    moved = tune_net.augment(left, TuneConfig.model_validate({}), torch.Generator().manual_seed(1))
    assert (moved[:, 0, :, :16].mean((1, 2)) > moved[:, 0, :, 16:].mean((1, 2))).all()
    assert moved.min() >= 0 and moved.max() <= 1 and (moved[0] != moved[1]).any()


def test_a_convolutional_encoder_is_tuned_too(make_world: World) -> None:
    folder = make_world()
    made = encoders.create("resnet10t", image_size=32)
    encoders.save(folder / "conv/encoder", made, {"ehr_groups": {}})
    for method in ("finetune", "attentive"):
        more = {"encoder": str(folder / "conv"), "out": str(folder / f"runs/{method}"), "tune": {"epochs": 1}}
        assert 0 <= macro(probe(config(folder, method, **more))) <= 1


@pytest.mark.slow
@pytest.mark.parametrize("method", ["attentive", "finetune"])
def test_two_processes_train_through_an_encoder_as_one_does(make_world: World, method: str) -> None:
    """Findings of some films are unknown, so that the processes' halves of a batch have other numbers of them."""
    folder = make_world()
    still = {"rotate": 0, "zoom": 0, "shift": 0, "contrast": 0}  # else each process draws its own
    given = config(folder, method, tune={"epochs": 2, **still})
    one = probe(given.model_copy(update={"out": str(folder / "runs/one")}))
    debug_launcher(_two, (given,), num_processes=2)
    tables = [read_predictions(run_folder, "test") for run_folder in (one, folder / "runs/tuned")]
    (ids, labels, logits), (ids_two, _, logits_two) = (
        [part.set_axis(table[0]["dicom_id"]).sort_index() for part in table] for table in tables
    )
    assert ids.index.tolist() == ids_two.index.tolist() and ids.index.is_unique
    assert labels.isna().to_numpy().any() and logits.std().min() > 0
    np.testing.assert_allclose(logits_two, logits, atol=1e-4)


def _two(given: ProbeConfig) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)  # the fork's parent had one process
    probe(given, argparse.Namespace(processes=2))
