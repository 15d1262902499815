"""Schedules: end values, torch's cosine, the original's learning rate."""

import math

import pytest
import torch
from lightly.utils.scheduler import CosineWarmupScheduler

from pretrain.config import PretrainConfig
from pretrain.options import OptimConfig
from pretrain.schedule import Schedule, cosine, linear, warmup_cosine


def test_warmup_then_cosine_to_the_end():
    at = [warmup_cosine(s, 100, warmup=10, start=0.2, peak=1.0, end=0.1) for s in (0, 5, 10, 55, 100)]
    assert at == pytest.approx([0.2, 0.6, 1.0, 0.55, 0.1])


def test_the_warmup_is_lightlys_without_the_skip_of_its_first_step():
    own = [warmup_cosine(s, 100, warmup=10, start=0.2, peak=1.0, end=0.1) for s in range(101)]
    theirs = CosineWarmupScheduler(torch.optim.SGD([torch.zeros(1)]), 10, 101, -1, 1.0, 0.1, None, 0.2).scale_lr
    assert own[0] == 0.2 and own[1:10] == pytest.approx([theirs(s) for s in range(9)])
    assert own[10:] == pytest.approx([theirs(s) for s in range(10, 101)])


@pytest.mark.parametrize("total", [1, 2, 49])
def test_cosine_is_torchs_and_stays_at_its_end(total):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.4)
    scheduler, theirs = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total, eta_min=0.04), []
    for _ in range(total + 1):
        theirs.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    assert [cosine(s, total, 0.4, 0.04) for s in range(total + 1)] == pytest.approx(theirs)
    assert cosine(total + 5, total, 0.4, 0.04) == 0.04


def test_stretch_ends_before_the_last_value():
    """The original's momentum, 0.996 -> 1 stretched by 1.25, ends at 0.9992."""
    assert linear(100, 100, 0.996, 1.0, 1.25) == pytest.approx(0.9992)


def test_lr_scales_with_the_batch_unless_told_not_to():
    assert Schedule(OptimConfig(batch_size=256, lr=1e-3), 10).peak == pytest.approx(2.5e-4)
    assert Schedule(OptimConfig(batch_size=256, lr=1e-3, lr_batch=None), 10).peak == pytest.approx(1e-3)


def test_by_epoch_moves_once_an_epoch():
    plan = Schedule(OptimConfig(by_epoch=True, warmup_epochs=0, epochs=5), 10)
    assert plan(10) == plan(19) != plan(20)
    assert plan.total == 50


def test_the_default_learning_rate_is_the_originals():
    """facebookresearch/msn: linear 2e-4 -> 1e-3, then cosine to 1e-6 over 1.25 times the steps less the warm-up."""
    plan = Schedule(OptimConfig(batch_size=1024, epochs=8, warmup_epochs=1.5), 10)

    def original(step: int) -> float:
        if step < 15:
            return 2e-4 + step / 15 * (1e-3 - 2e-4)
        progress = (step - 15) / (int(1.25 * 80) - 15)
        return max(1e-6, 1e-6 + (1e-3 - 1e-6) * 0.5 * (1 + math.cos(math.pi * progress)))

    assert [plan(s)[0] for s in range(80)] == pytest.approx([original(s) for s in range(80)])


@pytest.mark.parametrize(
    ("method", "peak", "last"),
    [
        ("msn", 1e-3, 1e-6),
        ("dino", 2e-3, 1e-6),
        ("ibot", 2e-3, 1e-6),
        ("mae", 2.4e-3, 0.0),
        ("simclr", 4.8, 0.0),
        ("vicreg", 1.6, 1.6e-3),
        ("byol", 3.2, 0.0),
        ("lejepa", 5e-4, 5e-7),
    ],
)
def test_each_methods_learning_rate_is_the_published_one_at_its_peak_and_end(method, peak, last):
    """Published as numbers; the configs have a rate for 256 films, and the end as a share of the peak."""
    config = PretrainConfig.model_validate({"features": "f", "store": "s", "out": "o", "method": method})
    schedule = Schedule(config.optim, steps_per_epoch=10)
    assert schedule(schedule.warmup)[0] == pytest.approx(peak)
    assert schedule(round(config.optim.stretch * schedule.total))[0] == pytest.approx(last, abs=1e-12)
