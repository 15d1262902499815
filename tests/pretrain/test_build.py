"""Parts of a run: combinations that do not fit are refused, and synchronised batch norm changes no output."""

import importlib.util

import pytest
import torch
from torch import nn

from configs import UserError
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
