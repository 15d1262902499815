"""Encoders from bare weights files."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from configs import UserError
from finetune.config import WeightsConfig
from finetune.frozen import open_frozen
from finetune.weights import open_weights
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
