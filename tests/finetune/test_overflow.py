"""Weights that are finite but so large that features or logits overflow: each command names the encoder and the first
film."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from configs import UserError
from finetune.config import FuseConfig, ProbeConfig
from finetune.embed import embed
from finetune.fusion.train import fuse
from finetune.probe.main import probe
from pretrain import encoder as encoders

Make = Callable[..., Path]
NAMED = r"large.*: features that are not finite or above 1e19, of film .*film\d+.* and \d+ more of its \d+"
LARGE = (1e20, 3e38)  # squares overflow, features overflow
METHODS = ("linear", "logistic", "knn", "attentive", "finetune")


def large(folder: Path, last: float) -> Path:
    """An encoder whose last norm multiplies by `last`."""
    torch.manual_seed(0)
    args = {"patch_size": 16, "embed_dim": 16, "depth": 1, "num_heads": 2}
    made = encoders.create("vit_tiny_patch16_224", image_size=32, model_args=args)
    with torch.no_grad():
        made.net.norm.weight.fill_(last)
    return encoders.save(folder / "large/encoder", made, {"ehr_groups": {}}).parent


def probed(folder: Path, encoder: Path, method: str, **beyond: Any) -> Path:
    """`beyond`: values of `tune`, also outside its bounds, so that training diverges."""
    given = {"features": str(folder / "features"), "store": "memory", "encoder": str(encoder), "samples": 0}
    given |= {"out": str(folder / "run"), "method": method, "epochs": 1, "tune": {"epochs": 2, "batch_size": 32}}
    config = ProbeConfig.model_validate(given)
    return probe(config.model_copy(update={"tune": config.tune.model_copy(update=beyond)}))


def fused(folder: Path, encoder: Path, **beyond: Any) -> Path:
    """`beyond`: values, also outside their bounds."""
    small = {"hidden": 8, "layers": 1, "joint": 8, "epochs": 1, "samples": 0, "batch_size": 32, "pairing": "paired"}
    paths = {"features": str(folder / "features"), "store": "memory", "encoder": str(encoder), "out": str(folder / "r")}
    return fuse(FuseConfig(**(paths | small)).model_copy(update=beyond))


@pytest.mark.parametrize("last", LARGE)
@pytest.mark.parametrize("method", METHODS)
def test_probe_names_encoder_and_film_of_features_that_overflow(make_world: Make, method: str, last: float) -> None:
    folder = make_world(subjects=60)
    with pytest.raises(UserError, match=NAMED):
        probed(folder, large(folder, last), method)


@pytest.mark.parametrize("last", LARGE)
@pytest.mark.parametrize("freeze", [True, False])
def test_fuse_names_them_too(make_icu: Make, freeze: bool, last: float) -> None:
    folder = make_icu(stays=60)
    with pytest.raises(UserError, match=NAMED):
        fused(folder, large(folder, last), freeze=freeze)


def test_training_that_diverges_names_the_encoder_and_the_films(make_world: Make, make_icu: Make) -> None:
    said = r"large.*not finite.* begin with film\d+|" + NAMED
    folder = make_world(subjects=60)
    encoder = large(folder, 1.0)
    with pytest.raises(UserError, match=said):
        probed(folder, encoder, "finetune", lr=1e30, clip=1e30, epochs=3)
    with pytest.raises(UserError, match=said):
        fused(make_icu(stays=60), encoder, freeze=False, encoder_lr=1e30, clip=None, epochs=3)
    with pytest.raises(UserError, match=said):
        fused(folder, encoder, lr=1e30, clip=None, epochs=3)


@pytest.mark.parametrize("last", LARGE)
def test_embed_names_them_too(tmp_path: Path, last: float) -> None:
    (tmp_path / "films").mkdir()
    Image.radial_gradient("L").save(tmp_path / "films/film1.png")
    with pytest.raises(UserError, match=NAMED):
        embed(str(large(tmp_path, last)), str(tmp_path / "films"), str(tmp_path / "out.parquet"))
