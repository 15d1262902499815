"""Linear heads on frozen features, a whole grid of them at once.

Comes in: `Data` of train and val. Goes out: logits of any rows by the head that validation chose, and what was chosen.
A head is one of (pool, ...); pool `cls` and `avg` are blocks of the features' columns, `both` is all of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import rankdata
from torch import Tensor

from configs import UserError
from finetune.frozen import Features

Head = Callable[[Features], NDArray[np.float64]]  # features of any films -> logits (N, L)
Say = Callable[[int, float], None]  # epoch, best validation AUROC so far


@dataclass(frozen=True)
class Data:
    """Features and labels (N, L; NaN is not counted) of one split."""

    features: Features
    labels: NDArray[np.float32]


def blocks(features: Features, pools: Sequence[str]) -> dict[str, list[str]]:
    """pool -> the blocks that it uses, for the pools that this encoder has. Raises: UserError: it has none of them."""
    have = list(features)
    found = {pool: [pool] for pool in pools if pool in have}
    if "both" in pools and len(have) > 1:
        found["both"] = have
    if not found:
        raise UserError(f"pools: this encoder has {', '.join(have)}, none of {', '.join(pools)}")
    return found


@dataclass(frozen=True)
class LinearHead:
    """logits = features of `names`, side by side, @ weights + bias; the standardisation is folded in."""

    names: list[str]
    weights: NDArray[np.float64]  # (D, L)
    bias: NDArray[np.float64]  # (L,)

    @classmethod
    def of(cls, scale: Scale, names: Sequence[str], weights: NDArray[Any]) -> LinearHead:
        """Fold `scale` into (D + 1, L) weights that were fitted on scaled features, the bias last."""
        mean, deviation = scale.columns(names)
        folded = np.asarray(weights[:-1], np.float64) / deviation[:, None]
        return cls(list(names), folded, np.asarray(weights[-1], np.float64) - mean @ folded)

    def __call__(self, features: Features) -> NDArray[np.float64]:
        x = np.concatenate([features[name] for name in self.names], axis=1)
        return x.astype(np.float64) @ self.weights + self.bias


class Scale:
    """Columns to mean 0 and deviation 1 on the films that it was fitted on; a constant column becomes 0."""

    def __init__(self, features: Features) -> None:
        self.names = list(features)
        self.mean = {k: v.mean(0, dtype=np.float64) for k, v in features.items()}
        self.deviation = {k: v.std(0, dtype=np.float64) for k, v in features.items()}

    def __call__(self, features: Features, names: Sequence[str] | None = None) -> NDArray[np.float32]:
        """(N, D of the blocks named, side by side)."""
        mean, deviation = self.columns(names or self.names)
        x = np.concatenate([features[name] for name in names or self.names], axis=1)
        return ((x - mean) / deviation).astype(np.float32)

    def columns(self, names: Sequence[str]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Mean and deviation (D,) of the blocks named; the deviation of a constant column is infinite."""
        mean, spread = (np.concatenate([of[name] for name in names]) for of in (self.mean, self.deviation))
        return mean, np.where(spread < 1e-6 * (1 + np.abs(mean)), np.inf, spread)


def linear(
    train: Data,
    val: Data,
    *,
    pools: Sequence[str],
    lrs: Sequence[float],
    weight_decays: Sequence[float],
    epochs: int,
    patience: int,
    batch_size: int,
    seed: int,
    device: str | torch.device = "cpu",
    say: Say = lambda epoch, value: None,
) -> tuple[LinearHead, dict[str, Any]]:
    """Linear heads over pool x lr x weight decay, trained as one tensor by AdamW, stopped by validation AUROC.

    The heads do not touch each other: the loss is their sum, and lr and decay are tensors over them.
    """
    scale, used = Scale(train.features), blocks(train.features, pools)
    widths = {name: train.features[name].shape[1] for name in scale.names}
    grid = [(pool, lr, decay) for pool in used for lr in lrs for decay in weight_decays]
    x, known, target = _tensors(scale(train.features), train.labels, device)
    x_val = _with_one(torch.from_numpy(scale(val.features)).to(device))
    mask = torch.stack([_mask(used[pool], widths) for pool, _, _ in grid], dim=1)[:, :, None].to(device)  # (D+1, H, 1)
    lr = torch.tensor([lr for _, lr, _ in grid], device=device)[None, :, None]
    decay = torch.tensor([decay for _, _, decay in grid], device=device)[None, :, None].repeat(x.shape[1], 1, 1)
    decay[-1] = 0  # the bias
    weights = torch.zeros(x.shape[1], len(grid), target.shape[1], device=device)  # (D+1, H, L)
    first, second = torch.zeros_like(weights), torch.zeros_like(weights)
    generator = torch.Generator().manual_seed(seed)
    best, best_at, step = (-math.inf, weights[:, 0].clone(), 0), 0, 0
    for epoch in range(1, epochs + 1):
        for rows in torch.randperm(len(x), generator=generator).to(device).split(batch_size):
            step += 1
            gradient = _gradient(x[rows], weights, target[rows], known[rows]) * mask
            first.lerp_(gradient, 0.1)
            second.lerp_(gradient.square(), 0.001)
            update = (first / (1 - 0.9**step)) / ((second / (1 - 0.999**step)).sqrt() + 1e-8)
            weights -= lr * (update + decay * weights)
        scores = (x_val @ weights.flatten(1)).unflatten(1, weights.shape[1:]).cpu().numpy()  # (N, H, L)
        reached = macro_auroc(val.labels, scores)  # (H,)
        h = int(np.argmax(reached))
        if reached[h] > best[0] + 1e-5:
            best, best_at = (float(reached[h]), weights[:, h].clone(), h), epoch
        say(epoch, best[0])
        if epoch - best_at >= patience:
            break
    pool, rate, decayed = grid[best[2]]
    wide = LinearHead.of(scale, scale.names, best[1].cpu().numpy())
    inside = _mask(used[pool], widths)[:-1].numpy() > 0
    head = LinearHead(used[pool], wide.weights[inside], wide.bias)
    chose = {
        "pool": pool,
        "lr": rate,
        "weight_decay": decayed,
        "epoch": best_at,
        "epochs_run": epoch,
        "heads": len(grid),
    }
    return head, chose | {"val_auroc": best[0]}


def macro_auroc(labels: NDArray[np.float32], scores: NDArray[Any]) -> NDArray[np.float64]:
    """Mean AUROC over the labels that have both classes, for each head: labels (N, L), scores (N, H, L) -> (H,)."""
    values = []
    for i in range(labels.shape[1]):
        known = ~np.isnan(labels[:, i])
        y = labels[known, i] > 0
        if 0 < y.sum() < len(y):
            ranks = rankdata(scores[known, :, i], axis=0)  # (n, H)
            p = y.sum()
            values.append((ranks[y].sum(0) - p * (p + 1) / 2) / (p * (len(y) - p)))
    if not values:
        raise UserError(
            "no label has both classes among the validation films, so nothing can be chosen; use more films"
        )
    return np.mean(values, axis=0)


def _gradient(x: Tensor, weights: Tensor, target: Tensor, known: Tensor) -> Tensor:
    """Of the mean cross-entropy over known labels, for each head: x (B, D), weights (D, H, L) -> (D, H, L)."""
    logits = (x @ weights.flatten(1)).unflatten(1, weights.shape[1:])  # (B, H, L)
    error = (logits.sigmoid() - target[:, None]) * (known / known.sum().clamp(min=1))[:, None]
    return (x.T @ error.flatten(1)).unflatten(1, weights.shape[1:])


def _tensors(x: NDArray[np.float32], labels: NDArray[np.float32], device: Any) -> tuple[Tensor, Tensor, Tensor]:
    known = torch.from_numpy(~np.isnan(labels)).float()
    target = torch.from_numpy(np.nan_to_num(labels))
    return _with_one(torch.from_numpy(x).to(device)), known.to(device), target.to(device)


def _with_one(x: Tensor) -> Tensor:
    return torch.cat([x, torch.ones_like(x[:, :1])], dim=1)


def _mask(names: Sequence[str], widths: dict[str, int]) -> Tensor:
    """(D + 1,): 1 for the columns of the blocks named, and for the bias."""
    return torch.cat([torch.full((width,), float(name in names)) for name, width in widths.items()] + [torch.ones(1)])
