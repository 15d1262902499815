"""The MSN loss: anchors predict the prototype assignment of the target.

Input: projected anchors and targets of this process's part of the batch, and the prototypes. Output: scalars.
With several processes, Sinkhorn and the mean over anchors are reduced over them, so that the mean over processes of the
loss, and of the prototypes' gradients (what DDP computes), equals one process on the whole batch.
Differs from lightly 1.6.0: the mean-entropy term is reduced over processes; everything is fp32 log-softmax, so the
value does not depend on the surrounding autocast; sharpening is a softmax at a lower temperature, which cannot
underflow a row.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

Prior = Literal["uniform", "power_law"]


def msn_loss(
    anchors: Tensor,
    targets: Tensor,
    prototypes: Tensor,
    *,
    temperature: float = 0.1,
    target_temperature: float = 0.25,
    sinkhorn_iterations: int = 3,
    me_max_weight: float = 1.0,
    prior: Prior = "uniform",
) -> dict[str, Tensor]:
    """Cross-entropy of anchors against sharpened, balanced targets, plus a pull of the mean prediction to a prior.

    Args:
        anchors: (V*B, D), view-major: all films of view 0, then of view 1.
        targets: (B, D); they get no gradient. B is equal on all processes.
        prototypes: (K, D), K >= 2.
        temperature: of the cosine softmax, > 0.
        target_temperature: sharpens the targets, in (0, 1].
        sinkhorn_iterations: 0 leaves the targets unbalanced.
        me_max_weight: of the regulariser.
        prior: `uniform`: log K - H(mean); `power_law`: KL(prior || mean), prior_k ~ k^-0.25.
    Returns: scalars: `loss`; detached parts `cross_entropy`, `me_max`, `target_entropy`, `target_max` (the largest
        probability, mean over targets), `anchor_entropy`.
    Raises: ValueError: shapes or temperatures that cannot be right.
    Source: MSN, arXiv:2204.07141, section 3; power law: PMSN, arXiv:2210.07277.
    """
    _check(anchors, targets, prototypes, temperature, target_temperature)
    num_views = len(anchors) // len(targets)
    with torch.autocast(anchors.device.type, enabled=False):
        unit_prototypes = F.normalize(prototypes.float(), dim=1)
        anchor_logits = F.normalize(anchors.float(), dim=1) @ unit_prototypes.T / temperature  # (V*B, K)
        log_probs = F.log_softmax(anchor_logits, dim=1)
        with torch.no_grad():
            target_logits = F.normalize(targets.float(), dim=1) @ unit_prototypes.T / temperature
            wanted = sinkhorn(F.softmax(target_logits / target_temperature, dim=1), sinkhorn_iterations)  # (B, K)
        cross_entropy = -(wanted.repeat(num_views, 1) * log_probs).sum(dim=1).mean()
        probs = log_probs.exp()
        me_max = prior_divergence(_mean_over_processes(probs.mean(dim=0)), prior)
        loss = cross_entropy + me_max_weight * me_max
    return {
        "loss": loss,
        "cross_entropy": cross_entropy.detach(),
        "me_max": me_max.detach(),
        "target_entropy": _entropy(wanted).mean(),
        "target_max": wanted.amax(dim=1).mean(),
        "anchor_entropy": _entropy(probs.detach()).mean(),
    }


@torch.no_grad()
def sinkhorn(probs: Tensor, iterations: int = 3) -> Tensor:
    """Balance prototypes over the whole batch, of all processes.

    Args:
        probs: (B, K), rows sum to 1; B is equal on all processes.
    Returns: (B, K), rows sum to 1; columns are nearly equal in sum over the whole batch.
    Source: Sinkhorn-Knopp as in SwAV, arXiv:2006.09882, and MSN.
    """
    if iterations <= 0:
        return probs

    def over(totals: Tensor) -> Tensor:
        return totals + (totals == 0)  # a prototype far from all targets stays at 0 instead of 0 / 0

    balanced = probs / _sum_over_processes(probs.sum())
    for _ in range(iterations):
        balanced = balanced / over(_sum_over_processes(balanced.sum(dim=0))) / probs.shape[1]
        balanced = balanced / over(balanced.sum(dim=1, keepdim=True)) / len(probs)
    return balanced * len(probs)


def prior_divergence(mean: Tensor, prior: Prior) -> Tensor:
    """Divergence of the mean prediction (K,) from the prior; 0 if they are equal."""
    mean = mean.clamp_min(torch.finfo(mean.dtype).tiny)
    if prior not in get_args(Prior):
        raise ValueError(f"prior {prior!r} is not one of {', '.join(get_args(Prior))}")
    if prior == "uniform":
        return math.log(len(mean)) + (mean * mean.log()).sum()
    wanted = torch.arange(1, len(mean) + 1, device=mean.device, dtype=mean.dtype) ** -0.25
    wanted = wanted / wanted.sum()
    return (wanted * (wanted.log() - mean.log())).sum()


def _entropy(probs: Tensor) -> Tensor:
    return torch.special.entr(probs).sum(dim=1)


def _num_processes() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _sum_over_processes(value: Tensor) -> Tensor:
    if _num_processes() > 1:
        dist.all_reduce(value)
    return value


def _mean_over_processes(value: Tensor) -> Tensor:
    """The mean over processes, with the gradient of the local value.

    The loss f(mean_r v_r) is the same on all processes, and DDP averages gradients afterwards: (1/n) sum_r f'(mean)
    dv_r is the exact gradient on the whole batch if each process passes f'(mean) back to its own v_r unscaled.
    """
    if _num_processes() == 1:
        return value
    mean = _sum_over_processes(value.detach().clone()) / _num_processes()
    return mean + (value - value.detach())


def share_of_batch(count: Tensor) -> Tensor:
    """What to divide a sum over this process's films by, for its mean over processes to be that of the whole batch.

    Args:
        count: how many entries of this process are summed. 0 everywhere counts as 1: a 0 is divided, and so is its
            gradient, which a number near 0 would make infinite.
    """
    whole = _sum_over_processes(count.detach().clone().float())
    return whole.clamp_min(1) / _num_processes()


def _check(anchors: Tensor, targets: Tensor, prototypes: Tensor, temperature: float, target_temperature: float) -> None:
    if any(x.ndim != 2 for x in (anchors, targets, prototypes)):
        raise ValueError(
            f"wanted (V*B, D), (B, D), (K, D); got {(*anchors.shape,)}, {(*targets.shape,)}, {(*prototypes.shape,)}"
        )
    if not anchors.shape[1] == targets.shape[1] == prototypes.shape[1]:
        raise ValueError(
            f"widths differ: anchors {anchors.shape[1]}, targets {targets.shape[1]}, prototypes {prototypes.shape[1]}"
        )
    if not len(targets) or not len(anchors) or len(anchors) % len(targets):
        raise ValueError(f"{len(anchors)} anchors are not a whole number of views of {len(targets)} targets")
    if len(prototypes) < 2:
        raise ValueError(f"{len(prototypes)} prototypes; the loss needs at least 2")
    if temperature <= 0 or not 0 < target_temperature <= 1:
        raise ValueError(f"temperature {temperature} must be > 0, target_temperature {target_temperature} in (0, 1]")
