"""Parts of a run: combinations that do not fit are refused, and synchronised batch norm changes no output."""

import importlib.util

import pytest
import torch
from torch import nn

from configs import UserError, load
from pretrain import build
from pretrain import encoder as enc
from pretrain.config import PretrainConfig
from pretrain.methods import Setup
from pretrain.methods.msn import MSN
from pretrain.options import LossConfig

WHERE = {"features": "f", "store": "s", "out": "o"}


@pytest.mark.parametrize("arch", ["densenet121", "resnet34"])
def test_synchronised_batch_norm_is_everywhere_and_changes_no_output(arch):
    """DenseNet's batch norm holds its ReLU, which torch's own conversion would drop."""
    torch.manual_seed(0)
    msn = MSN(enc.create(arch, image_size=32), Setup(8, 4, options=LossConfig(prototypes=4))).eval()
    x, keys = torch.randn(2, 1, 64, 64), set(msn.state_dict())
    with torch.inference_mode():
        before = msn.target_head(msn.target(x))
        build.synchronise(msn)
        torch.testing.assert_close(msn.target_head(msn.target(x)), before)
    kinds = [type(m) for m in msn.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert kinds and all(issubclass(kind, nn.SyncBatchNorm) for kind in kinds) and set(msn.state_dict()) == keys


def test_moments_follow_the_memory_order_of_their_parameters():
    """The fused AdamW steps through memory: moments in another order would belong to other weights."""

    def three_steps(reload: bool) -> torch.Tensor:
        random = torch.Generator().manual_seed(0)
        weight = nn.Parameter(torch.randn(4, 3, 2, 2, generator=random).to(memory_format=torch.channels_last))
        optimizer = torch.optim.AdamW([weight], lr=0.1, fused=True)
        for step in range(3):
            weight.grad = torch.randn(weight.shape, generator=random).to(memory_format=torch.channels_last)
            optimizer.step()
            if step == 0 and reload:
                state = optimizer.state_dict()
                state["state"][0] = {key: value.contiguous() for key, value in state["state"][0].items()}
                optimizer.load_state_dict(state)
                build._as_laid_out(optimizer)
        return weight.detach()

    torch.testing.assert_close(three_steps(reload=True), three_steps(reload=False), rtol=0, atol=0)


def test_a_tracker_that_is_not_installed_is_named_before_the_run_begins(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None)
    config = PretrainConfig(**WHERE, trackers=["wandb"])
    with pytest.raises(UserError, match="pip install wandb"):
        build.accelerator(config, None)


def made(*words: str, method: str, arch: str = "resnet18", **encoder) -> object:
    given = {**WHERE, "method": method, "encoder": {"arch": arch, "image_size": 64, **encoder}}
    small = ["head.hidden=8", "head.out=4", "optim.batch_size=4"] + ["loss.prototypes=4"] * (method == "msn")
    return build.method(load(PretrainConfig, given, [*small, *words]))


@pytest.mark.parametrize("name", ["dino", "byol", "simclr", "vicreg", "lejepa"])
def test_only_msn_masks_the_input_of_a_convolutional_network(name):
    """Elsewhere a teacher would see the masks, or one batch norm would hold masked and unmasked views."""
    with pytest.raises(UserError, match=r"mask\.ratio.*method=msn"):
        made("mask.ratio=0.5", method=name)
    made("mask.ratio=0", method=name)
    made("mask.ratio=0.5", method="msn")


def test_what_a_pool_does_not_use_is_not_trained():
    """Without a gradient, several processes fail at the second step."""
    for pool, trained in (("max", False), ("avg", True)):
        encoder = made("mask.ratio=0", method="msn", arch="convnext_atto", pool=pool).anchor
        assert {p.requires_grad for p in encoder.net.head.norm.parameters()} == {trained}, pool
        x = torch.randn(2, 1, 64, 64)
        encoder(x).square().sum().backward()
        assert all((p.grad is not None) == p.requires_grad for p in encoder.parameters())


def test_a_masked_autoencoder_trains_what_its_loss_sees():
    given = {"mae.decoder_width": 16, "mae.decoder_heads": 2, "mae.decoder_depth": 1}
    words = [f"{key}={value}" for key, value in given.items()]
    small = {"embed_dim": 24, "depth": 1, "num_heads": 2, "global_pool": "avg"}
    net = made(*words, method="mae", arch="vit_tiny_patch16_224", model_args=small).anchor.net
    assert not any(p.requires_grad for p in net.fc_norm.parameters()) and net.norm is not None
    for arch, more, says in (
        ("vit_base_patch16_siglip_224", [], "trains no pooling"),
        ("vit_tiny_patch16_224", ["mask.ratio=0.01"], "masks none"),
    ):
        with pytest.raises(UserError, match=says):
            tiny = {"embed_dim": 24, "depth": 1, "num_heads": 2}
            made(*words, *more, method="mae", arch=arch, model_args=tiny)


def test_lars_adapts_a_matrix_without_decay():
    """lr 4.8 as SimCLR's preset: without adaptation a step is many times the weights."""
    msn = made("mask.ratio=0", method="msn")
    config = load(PretrainConfig, WHERE, ["optim.optimizer=lars", "optim.weight_decay=0"])
    optimizer = build.optimizer(config.optim, msn)
    for group in optimizer.param_groups:
        group["lr"], group["weight_decay"] = 4.8, 0.0
    weight = msn.anchor.net.layer1[0].conv1.weight
    before = weight.detach().clone()
    weight.grad = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    optimizer.step()
    assert 0 < (weight.detach() - before).norm() / before.norm() < 0.01


def test_a_batch_in_parts_moves_dinos_centre_as_far_as_a_whole_one():
    words = ["optim.accumulate=4", "optim.accumulate_mode=approximate", "mask.ratio=0"]
    momentum = made(*words, method="dino").class_loss.center_momentum
    assert momentum**4 == pytest.approx(made("mask.ratio=0", method="dino").class_loss.center_momentum)


def test_preset_paper_keeps_the_prior_of_pmsn():
    priors = {
        (method, preset): load(PretrainConfig, {**WHERE, "method": method, "preset": preset}).loss.prior
        for method in ("msn", "pmsn")
        for preset in ("default", "paper")
    }
    assert priors == {("msn", "default"): "uniform", ("msn", "paper"): "uniform"} | {
        ("pmsn", "default"): "power_law",
        ("pmsn", "paper"): "power_law",
    }


@pytest.mark.parametrize("name", ["dino", "ibot"])
def test_a_norm_that_the_head_does_not_have_is_refused(name):
    with pytest.raises(UserError, match=r"head\.norm=none"):
        load(PretrainConfig, {**WHERE, "method": name}, ["head.norm=layer"])
