"""Encoders from bare weights files."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torchvision.models import resnet18

from configs import UserError
from finetune.config import ProbeConfig, WeightsConfig
from finetune.encoders import open_any, open_frozen, open_weights
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


@pytest.mark.parametrize("kind", ["safetensors", "pth"])
def test_patch_14_weights_with_a_head_and_a_wrapper_are_loaded_whole(tmp_path: Path, kind: str) -> None:
    wanted, path = state(), tmp_path / f"weights.{kind}"
    extra = wanted | {"head.weight": torch.zeros(5, 24), "head.bias": torch.zeros(5)}
    if kind == "safetensors":
        save_file(extra, path)
    else:
        torch.save({"state_dict": {f"module.{k}": v for k, v in (wanted).items()}, "epoch": 3}, path)
    found = open_weights(path, given()).net.state_dict()
    assert all(torch.equal(found[key], value) for key, value in wanted.items())
    frozen = open_frozen(str(path), weights=given())
    assert frozen.about["arch"] == "vit_small_patch14_dinov2" and frozen.about["films_seen"] is None
    features = frozen.encode(torch.randint(0, 255, (2, 40, 40), dtype=torch.uint8).numpy())
    assert features["cls"].shape == features["avg"].shape == (2, 24)


def test_positions_are_resized_to_another_input_size(tmp_path: Path) -> None:
    save_file(state(), tmp_path / "w.safetensors")
    bigger = open_weights(tmp_path / "w.safetensors", given(image_size=42))
    assert bigger.net.pos_embed.shape[1] == 1 + 9
    assert bigger(torch.zeros(1, 3, 42, 42)).shape == (1, 24)


def test_weights_of_another_architecture_are_refused(tmp_path: Path) -> None:
    save_file(state(), tmp_path / "w.safetensors")
    with pytest.raises(UserError, match=r"not of weights.arch=resnet10t"):
        open_weights(tmp_path / "w.safetensors", given(arch="resnet10t", model_args={}))
    (tmp_path / "bad.pth").write_bytes(b"nothing")
    with pytest.raises(UserError, match="not a weights file"):
        open_weights(tmp_path / "bad.pth", given())
    with pytest.raises(UserError, match="say what it is"):
        open_frozen(str(tmp_path / "w.safetensors"))


def test_hugging_face_dinov2_weights_give_the_same_features(tmp_path: Path) -> None:
    names = {"cls_token": "embeddings.cls_token", "pos_embed": "embeddings.position_embeddings"}
    names |= {f"patch_embed.proj.{k}": f"embeddings.patch_embeddings.projection.{k}" for k in ("weight", "bias")}
    names |= {f"norm.{k}": f"layernorm.{k}" for k in ("weight", "bias")}
    names |= {f"blocks.0.ls{i}.gamma": f"encoder.layer.0.layer_scale{i}.lambda1" for i in (1, 2)}
    for inside in ("norm1", "norm2", "mlp.fc1", "mlp.fc2"):
        names |= {f"blocks.0.{inside}.{k}": f"encoder.layer.0.{inside}.{k}" for k in ("weight", "bias")}
    names |= {f"blocks.0.attn.proj.{k}": f"encoder.layer.0.attention.output.dense.{k}" for k in ("weight", "bias")}
    wanted, theirs = state(), {"embeddings.mask_token": torch.zeros(1, 24)}
    for key, value in wanted.items():
        if ".qkv." in key:
            for name, part in zip(("query", "key", "value"), value.chunk(3), strict=True):
                theirs[f"encoder.layer.0.attention.attention.{name}.{key.split('.')[-1]}"] = part.clone()
        else:
            theirs[names[key]] = value
    save_file(theirs, tmp_path / "model.safetensors")
    found = open_weights(tmp_path / "model.safetensors", given()).net.state_dict()
    assert all(torch.equal(found[key], value) for key, value in wanted.items())


def test_a_backbone_beside_its_projection_head_is_taken(tmp_path: Path) -> None:
    wrapped = {f"module.backbone.{k}": v for k, v in state().items()} | {"module.head.mlp.0.weight": torch.zeros(3, 24)}
    torch.save({"student": {}, "teacher": wrapped, "epoch": 3}, tmp_path / "checkpoint.pth")
    found = open_weights(tmp_path / "checkpoint.pth", given()).net.state_dict()
    assert all(torch.equal(found[key], value) for key, value in state().items())


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
    made = [open_any("random:resnet34", seed, config)[0] for seed in (3, 3, 4)]
    assert made[0].meta["in_chans"] == 3 and made[0].meta["image_size"] == 64
    first, again, other = (encoder.net.state_dict()["conv1.weight"] for encoder in made)
    assert torch.equal(first, again) and not torch.equal(first, other)
    with pytest.raises(UserError, match="give one architecture"):
        open_any("random:resnet18", 0, config)
