"""Encoders from bare weights files."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torchvision.models import resnet18

from configs import UserError
from finetune.config import ProbeConfig, WeightsConfig
from finetune.encoders import open_encoder
from finetune.probe.main import probe
from finetune.results import read_results
from pretrain import encoder as encoders

ARGS = {"depth": 1, "embed_dim": 24, "num_heads": 2}


def given(**more: object) -> WeightsConfig:
    base = {"arch": "vit_small_patch14_dinov2", "image_size": 28, "in_chans": 3, "model_args": ARGS}
    return WeightsConfig.model_validate(base | more)


def state() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    made = encoders.create("vit_small_patch14_dinov2", image_size=28, in_chans=3, model_args=ARGS)
    return made.net.state_dict()


def test_a_weights_file_is_opened_by_what_the_config_says_of_it(tmp_path: Path) -> None:
    wanted, path = state(), tmp_path / "last.ckpt"
    torch.save({"state_dict": {f"backbone.{k}": v for k, v in wanted.items()} | {"queue": torch.zeros(3)}}, path)
    opened = open_encoder(str(path), weights=given())
    assert opened.encoder is not None and opened.folder == path and "left out: queue" in opened.said
    assert all(torch.equal(opened.encoder.net.state_dict()[key], value) for key, value in wanted.items())
    assert opened.about["arch"] == "vit_small_patch14_dinov2" and opened.about["films_seen"] is None
    features = opened.encode(torch.randint(0, 255, (2, 40, 40), dtype=torch.uint8).numpy())
    assert features["cls"].shape == features["avg"].shape == (2, 24)
    bigger = open_encoder(str(path), weights=given(image_size=42))
    assert bigger.encoder is not None and bigger.encoder.net.pos_embed.shape[1] == 1 + 9
    assert "resampled from 2 x 2 to 3 x 3" in bigger.said


def test_weights_of_another_architecture_or_none_are_refused(tmp_path: Path) -> None:
    save_file(state(), tmp_path / "w.safetensors")
    (tmp_path / "bad.pth").write_bytes(b"nothing")
    other = given(arch="resnet10t", model_args={})
    for name, weights, says in (
        ("w.safetensors", other, "do not fit weights.arch=resnet10t"),
        ("bad.pth", given(), "not a weights file"),
        ("w.safetensors", None, "say what it is"),
        ("none.pth", given(), "no such weights file"),
    ):
        with pytest.raises(UserError, match=says):
            open_encoder(str(tmp_path / name), weights=weights)


def test_torchvision_weights_are_probed_from_their_path(make_world: Callable[..., Path]) -> None:
    folder = make_world()
    torch.manual_seed(0)
    torch.save(resnet18(num_classes=1000).state_dict(), folder / "resnet18.pth")
    common = {"features": str(folder / "features"), "store": "memory", "samples": 40, "method": "logistic"}
    weights = {"arch": "resnet18", "image_size": 32, "in_chans": 3}
    more = {"encoder": str(folder / "resnet18.pth"), "weights": weights, "out": str(folder / "runs/probe")}
    about, rows = read_results(probe(ProbeConfig.model_validate(common | more)))
    assert about["pretraining_films"] == "unknown" and "unknown" in about["warnings"][0]
    carried = {key: about["compared_by"][key] for key in ("parameters", "image_size", "films_seen")}
    assert carried == {"parameters": 11_176_512, "image_size": 32, "films_seen": None}
    assert rows.query("label == 'macro' and metric == 'auroc' and split == 'test'")["low"].item() > 0.5


def test_random_weights_of_three_channels_are_seeded_and_need_one_architecture() -> None:
    """The published encoder from scratch: resnet34, three channels."""
    config = WeightsConfig(arch="resnet34", image_size=64)
    made = [open_encoder("random:resnet34", seed=seed, weights=config).encoder for seed in (3, 3, 4)]
    assert made[0] is not None and made[0].meta["in_chans"] == 3 and made[0].meta["image_size"] == 64
    first, again, other = (encoder.net.state_dict()["conv1.weight"] for encoder in made if encoder)
    assert torch.equal(first, again) and not torch.equal(first, other)
    with pytest.raises(UserError, match="give one architecture"):
        open_encoder("random:resnet18", weights=config)
