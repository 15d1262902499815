"""The loss compared with lightly's, and two processes compared with one."""

import math
import os
import socket
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
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


@given(
    views=st.integers(1, 5), films=st.integers(1, 9), width=st.integers(2, 20), prototypes=st.integers(2, 40),
    temperature=st.floats(0.05, 1), sharpen=st.floats(0.1, 1), iterations=st.integers(0, 6), seed=st.integers(0, 999),
    weight=st.floats(0, 3), prior=st.sampled_from(["uniform", "power_law"]),
)  # fmt: skip
@example(  # a prototype whose targets' probabilities sum to less than the smallest normal number
    views=1, films=8, width=2, prototypes=12, temperature=0.05078125, sharpen=0.1015625, iterations=1, seed=15,
    weight=0.0, prior="uniform",
)  # fmt: skip
@settings(max_examples=40, deadline=None)
@pytest.mark.filterwarnings("ignore:To copy construct:UserWarning")
def test_equals_lightly_on_any_shapes_and_options(
    views, films, width, prototypes, temperature, sharpen, iterations, seed, weight, prior
):
    ours, theirs = (batch(views, films, width, prototypes, seed) for _ in range(2))
    options = {"temperature": temperature, "sinkhorn_iterations": iterations}
    loss = msn_loss(*ours, target_temperature=sharpen, me_max_weight=weight, prior=prior, **options)["loss"]
    kind = MSNLoss if prior == "uniform" else PMSNLoss
    expected = kind(regularization_weight=weight, **options)(*theirs, target_sharpen_temperature=sharpen)
    assert torch.isfinite(loss)
    assume(torch.isfinite(expected))  # theirs is 0 / 0 where all of a target's probabilities underflow
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
    loss.backward()
    expected.backward()
    for mine, other in ((ours[0], theirs[0]), (ours[2], theirs[2])):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-3, atol=1e-5)


def test_targets_get_no_gradient():
    anchors, targets, prototypes = batch()
    msn_loss(anchors, targets, prototypes)["loss"].backward()
    assert targets.grad is None and anchors.grad.abs().sum() > 0 and prototypes.grad.abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_does_not_depend_on_the_autocast_outside(dtype):
    tensors, others = batch(), batch()
    plain = msn_loss(*tensors)["loss"]
    with torch.autocast("cpu", dtype=dtype):
        inside = msn_loss(*others)["loss"]
        half = msn_loss(*(t.to(dtype) for t in others))["loss"]
    assert inside.dtype == half.dtype == torch.float32
    torch.testing.assert_close(inside, plain, rtol=0, atol=0)
    torch.testing.assert_close(half, plain, rtol=1e-2, atol=1e-2)
    plain.backward()
    inside.backward()
    torch.testing.assert_close(tensors[2].grad, others[2].grad, rtol=0, atol=0)


def test_an_unknown_prior_is_refused():
    with pytest.raises(ValueError, match="prior 'powerlaw' is not one of uniform, power_law"):
        msn_loss(*batch(), prior="powerlaw")


def test_views_are_matched_view_major():
    """Anchors that repeat the targets view by view fit better than film by film."""
    _, targets, prototypes = batch()
    aligned = msn_loss(targets.repeat(3, 1), targets, prototypes)["cross_entropy"]
    crossed = msn_loss(targets.repeat_interleave(3, dim=0), targets, prototypes)["cross_entropy"]
    assert aligned < crossed


def test_stays_finite_where_probabilities_underflow():
    """Sharp temperatures and a prototype far from all targets: 0 / 0 in a plain Sinkhorn."""
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


def _one_of(rank: int, world: int, port: int, folder: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world)
    for prior in ("uniform", "power_law"):
        anchors, targets, prototypes = batch(films=12, prototypes=30)
        each = 12 // world
        mine = slice(each * rank, each * rank + each)
        local = anchors.view(3, 12, -1)[:, mine].reshape(3 * each, -1)
        parts = msn_loss(local, targets[mine], prototypes, prior=prior)
        parts["loss"].backward()
        sums = [torch.stack([*parts.values()]).detach(), prototypes.grad, anchors.grad]
        for value in sums:
            dist.all_reduce(value)
        if rank == 0:
            torch.save([value / world for value in sums], Path(folder) / f"{prior}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("world", [2, 3])
def test_several_processes_equal_one_on_the_whole_batch(tmp_path, world):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(_one_of, args=(world, port, str(tmp_path)), nprocs=world)
    for prior in ("uniform", "power_law"):
        anchors, targets, prototypes = batch(films=12, prototypes=30)
        parts = msn_loss(anchors, targets, prototypes, prior=prior)
        parts["loss"].backward()
        scalars, prototype_grad, anchor_grad = torch.load(tmp_path / f"{prior}.pt", weights_only=True)
        torch.testing.assert_close(scalars, torch.stack([*parts.values()]).detach(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(prototype_grad, prototypes.grad, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(anchor_grad, anchors.grad, rtol=1e-5, atol=1e-6)
