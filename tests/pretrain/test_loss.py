"""The loss against lightly's, and two processes against one."""

import math
import os
import socket
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from lightly.loss import MSNLoss, PMSNLoss

from pretrain.loss import msn_loss, prior_divergence, sinkhorn


def batch(views: int = 3, films: int = 8, width: int = 10, prototypes: int = 6, seed: int = 0) -> list[torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    return [torch.randn(n, width, generator=random).requires_grad_() for n in (views * films, films, prototypes)]


@pytest.mark.parametrize("prior, reference", [("uniform", MSNLoss), ("power_law", PMSNLoss)])
@pytest.mark.parametrize("iterations, sharpen, weight", [(3, 0.25, 1.0), (0, 0.1, 0.5), (5, 1.0, 2.0)])
@pytest.mark.filterwarnings("ignore:To copy construct:UserWarning")
def test_equals_lightly_in_value_and_gradients(prior, reference, iterations, sharpen, weight):
    ours, theirs = batch(), batch()
    loss = msn_loss(
        *ours, target_temperature=sharpen, sinkhorn_iterations=iterations, me_max_weight=weight, prior=prior
    )["loss"]
    expected = reference(sinkhorn_iterations=iterations, regularization_weight=weight)(
        *theirs, target_sharpen_temperature=sharpen
    )
    torch.testing.assert_close(loss, expected)
    loss.backward()
    expected.backward()
    for mine, other in ((ours[0], theirs[0]), (ours[2], theirs[2])):
        torch.testing.assert_close(mine.grad, other.grad)


def test_targets_get_no_gradient():
    anchors, targets, prototypes = batch()
    msn_loss(anchors, targets, prototypes)["loss"].backward()
    assert targets.grad is None and anchors.grad.abs().sum() > 0 and prototypes.grad.abs().sum() > 0


def test_does_not_depend_on_the_autocast_outside():
    tensors = batch()
    plain = msn_loss(*tensors)["loss"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = msn_loss(*tensors)["loss"]
    assert inside.dtype == torch.float32
    torch.testing.assert_close(inside, plain, rtol=0, atol=0)


def test_views_are_matched_view_major():
    """Anchors that repeat the targets view by view fit better than film by film."""
    _, targets, prototypes = batch()
    aligned = msn_loss(targets.repeat(3, 1), targets, prototypes)["cross_entropy"]
    crossed = msn_loss(targets.repeat_interleave(3, dim=0), targets, prototypes)["cross_entropy"]
    assert aligned < crossed


def test_stays_finite_where_probabilities_underflow():
    """Sharp temperatures and a prototype that no target is near: 0 / 0 in a plain Sinkhorn."""
    anchors, targets, prototypes = batch()
    targets = prototypes[:1].detach().repeat(8, 1)
    parts = msn_loss(anchors, targets, prototypes, temperature=0.02, target_temperature=0.05)
    assert all(torch.isfinite(value) for value in parts.values())


def test_sinkhorn_balances_prototypes_and_keeps_rows():
    probs = torch.rand(64, 4, generator=torch.Generator().manual_seed(1)).softmax(dim=1)
    balanced = sinkhorn(probs, 20)
    torch.testing.assert_close(balanced.sum(dim=1), torch.ones(64))
    torch.testing.assert_close(balanced.sum(dim=0), torch.full((4,), 16.0), rtol=1e-3, atol=1e-3)


def test_uniform_prior_is_zero_at_uniform_and_log_k_at_one_prototype():
    assert prior_divergence(torch.full((7,), 1 / 7), "uniform").abs() < 1e-6
    one = torch.nn.functional.one_hot(torch.tensor(2), 7).float()
    assert abs(float(prior_divergence(one, "uniform")) - math.log(7)) < 1e-5


@pytest.mark.parametrize(
    "shapes, says",
    [
        (((9, 4), (4, 4), (3, 4)), "whole number of views"),
        (((8, 4), (4, 4), (1, 4)), "at least 2"),
        (((8, 4), (4, 5), (3, 4)), "widths differ"),
    ],
)
def test_refuses_shapes_that_cannot_be_right(shapes, says):
    with pytest.raises(ValueError, match=says):
        msn_loss(*(torch.randn(shape) for shape in shapes))


def _one_of_two(rank: int, port: int, folder: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    for prior in ("uniform", "power_law"):
        anchors, targets, prototypes = batch()
        mine = slice(4 * rank, 4 * rank + 4)
        local = anchors.view(3, 8, -1)[:, mine].reshape(12, -1)
        parts = msn_loss(local, targets[mine], prototypes, prior=prior)
        parts["loss"].backward()
        mean = torch.stack([*parts.values()]).detach()
        dist.all_reduce(mean)
        dist.all_reduce(prototypes.grad)
        dist.all_reduce(anchors.grad)
        if rank == 0:
            torch.save([mean / 2, prototypes.grad / 2, anchors.grad / 2], Path(folder) / f"{prior}.pt")
    dist.destroy_process_group()


def test_two_processes_equal_one_on_the_whole_batch(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(_one_of_two, args=(port, str(tmp_path)), nprocs=2)
    for prior in ("uniform", "power_law"):
        anchors, targets, prototypes = batch()
        parts = msn_loss(anchors, targets, prototypes, prior=prior)
        parts["loss"].backward()
        scalars, prototype_grad, anchor_grad = torch.load(tmp_path / f"{prior}.pt", weights_only=True)
        torch.testing.assert_close(scalars, torch.stack([*parts.values()]).detach(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(prototype_grad, prototypes.grad, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(anchor_grad, anchors.grad, rtol=1e-5, atol=1e-6)
