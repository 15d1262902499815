"""Fit a grid of linear heads on frozen features at once.

Input: `Data` of train and val. Output: logits of any rows by the head chosen on validation, and its settings.
A head is one of (pool, ...); pool `cls`, `avg`, `stages` are blocks of the features' columns, `both` is cls and avg.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from configs import UserError
from configs.amounts import check_memory
from ehr_features.progress import Bar
from ehr_features.static import fit_scale
from finetune.encoders import Features
from finetune.metrics import macro_auroc
from pretrain.encoder.model import STAGES

Head = Callable[[Features], NDArray[np.float64]]  # features of any films -> logits (N, L)
Say = Callable[[int, float], None]  # epoch, best validation AUROC so far
ROWS = 8192  # films that are scaled at a time


@dataclass(frozen=True)
class Data:
    """Features and labels (N, L; NaN is ignored) of one split."""

    features: Features
    labels: NDArray[np.float32]


def blocks(features: Features, pools: Sequence[str]) -> dict[str, list[str]]:
    """pool -> its feature blocks, for the pools of this encoder. Raises: UserError: it has none of them."""
    have = list(features)
    found = {pool: [pool] for pool in pools if pool in have}
    if "both" in pools and len(tokens := [pool for pool in have if pool != STAGES]) > 1:
        found["both"] = tokens
    if not found:
        raise UserError(f"pools: this encoder has {', '.join(have)}, none of {', '.join(pools)}")
    return found


@dataclass(frozen=True)
class LinearHead:
    """logits = concatenated features of `names` @ weights + bias; the standardisation is folded in."""

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
        used = [features[name] for name in self.names]
        out = np.empty((len(used[0]), len(self.bias)))
        for start in range(0, len(out), ROWS):
            x = np.concatenate([values[start : start + ROWS] for values in used], axis=1)
            out[start : start + ROWS] = x.astype(np.float64) @ self.weights + self.bias
        return out


class Scale:
    """Standardise columns to mean 0 and deviation 1 on the films it was fitted on; a constant column becomes 0."""

    def __init__(self, features: Features) -> None:
        self.names = list(features)
        self.fitted = {name: self._fit(values) for name, values in features.items()}

    def __call__(self, features: Features, names: Sequence[str] | None = None) -> NDArray[np.float32]:
        """(N, D), the named blocks concatenated."""
        mean, deviation = self.columns(names or self.names)
        used = [features[name] for name in names or self.names]
        out = np.empty((len(used[0]), len(mean)), np.float32)
        for start in range(0, len(out), ROWS):  # by rows: the arithmetic is in float64
            x = np.concatenate([values[start : start + ROWS] for values in used], axis=1)
            out[start : start + ROWS] = (x - mean) / deviation
        return out

    @staticmethod
    def _fit(values: NDArray[Any]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Mean and deviation, by 64 columns: numpy's deviation makes a float64 copy."""
        parts = [values[:, start : start + 64] for start in range(0, values.shape[1], 64)]
        mean, deviation = zip(*(fit_scale(part, dtype=np.float64) for part in parts), strict=True)
        return np.concatenate(mean), np.concatenate(deviation)

    def columns(self, names: Sequence[str]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Mean and deviation (D,) of the blocks named; the deviation of a constant column is infinite."""
        mean, deviation = (np.concatenate([self.fitted[name][i] for name in names]) for i in (0, 1))
        return mean, deviation


COPIES = 6  # of the weights of linear heads in a step: themselves, two moments, gradient, update, decay


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
    balanced: bool = False,
    device: str | torch.device = "cpu",
    say: Say = lambda epoch, value: None,
) -> tuple[LinearHead, dict[str, Any]]:
    """Linear heads over pool x lr x weight decay, trained as one tensor by AdamW, each stopped by validation AUROC.

    The heads are independent: the loss is their sum, and lr and decay are tensors over them.
    """
    scale, used = Scale(train.features), blocks(train.features, pools)
    widths = {name: train.features[name].shape[1] for name in scale.names}
    grid = [(pool, lr, decay) for pool in used for lr in lrs for decay in weight_decays]
    check_memory(
        4 * len(grid) * train.labels.shape[1] * (COPIES * (1 + sum(widths.values())) + len(val.labels)),
        f"lrs, weight_decays, pools: {len(grid):,} linear heads of {train.labels.shape[1]} labels",
        "give fewer of them",
    )
    x, known, target = _tensors(scale(train.features), train.labels, device)
    if balanced:
        known *= torch.from_numpy(balance(train.labels)).to(device)
    x_val = _with_one(torch.from_numpy(scale(val.features)).to(device))
    mask = torch.stack([_mask(used[pool], widths) for pool, _, _ in grid], dim=1)[:, :, None].to(device)  # (D+1, H, 1)
    lr = torch.tensor([lr for _, lr, _ in grid], device=device)[None, :, None]
    decay = torch.tensor([decay for _, _, decay in grid], device=device)[None, :, None].repeat(x.shape[1], 1, 1)
    decay[-1] = 0  # no decay of the bias
    weights = torch.zeros(x.shape[1], len(grid), target.shape[1], device=device)  # (D+1, H, L)
    first, second = torch.zeros_like(weights), torch.zeros_like(weights)
    generator = torch.Generator().manual_seed(seed)
    best, best_at, step = (-math.inf, weights[:, 0].clone(), 0), 0, 0
    with Bar("linear heads", epochs, "epochs", after=5) as bar:
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
            bar.advance(note=f"val AUROC {best[0]:.3f}")
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


def balance(labels: NDArray[np.float32]) -> NDArray[np.float32]:
    """Weights (N, L) that give both classes of a label equal weight with an unchanged total; 1 for a single class."""
    n, positives = (~np.isnan(labels)).sum(0), np.nansum(labels, axis=0)
    both = (positives > 0) & (positives < n)
    weight = np.where(labels > 0, n / np.maximum(2 * positives, 1), n / np.maximum(2 * (n - positives), 1))
    return np.where(both, weight, 1.0).astype(np.float32)


def _gradient(x: Tensor, weights: Tensor, target: Tensor, known: Tensor) -> Tensor:
    """Gradient of the mean cross-entropy over known labels, per head: x (B, D), weights (D, H, L) -> (D, H, L)."""
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
    """(D + 1,): 1 for the columns of the named blocks, and for the bias."""
    return torch.cat([torch.full((width,), float(name in names)) for name, width in widths.items()] + [torch.ones(1)])


# ---- Logistic regression, nearest neighbours and boosted trees on frozen features, with the interface of `linear`.


def logistic(
    train: Data, val: Data, *, pools: Sequence[str], strengths: Sequence[float], balanced: bool = False
) -> tuple[LinearHead, dict[str, Any]]:
    """L2-regularised logistic regression, one label at a time; validation chooses pool and strength for all labels.

    Args:
        strengths: inverse regularisation, scikit-learn's C.
    """
    scale = Scale(train.features)
    best: tuple[float, NDArray[np.float64], str, float] = (-math.inf, np.empty(0), "", 0.0)
    used = blocks(train.features, pools)
    with Bar("logistic heads", len(used) * len(strengths) * train.labels.shape[1], "heads", after=5) as bar:
        for pool, names in used.items():
            x, x_val = scale(train.features, names), scale(val.features, names)
            for c in strengths:
                heads = []
                for y in train.labels.T:
                    heads.append(_logistic(x, y, c, balanced))
                    bar.advance(note=f"{pool}, C {c:g}")
                weights = np.stack(heads, axis=1)
                reached = float(macro_auroc(val.labels, (x_val @ weights[:-1] + weights[-1])[:, None])[0])
                if reached > best[0]:
                    best = (reached, weights, pool, c)
    reached, weights, pool, c = best
    head = LinearHead.of(scale, blocks(train.features, pools)[pool], weights)
    return head, {"pool": pool, "c": c, "val_auroc": reached}


def boosting(
    train: Data, val: Data, *, iterations: int = 200, seed: int = 0, balanced: bool = False
) -> tuple[Head, dict[str, Any]]:
    """Gradient-boosted trees, one label at a time; validation chooses the number of trees for all labels.

    NaN features are allowed. Few leaves and a small rate, because the inputs are a handful of columns of the record.
    """

    def x(features: Features) -> NDArray[np.float32]:
        return np.concatenate(list(features.values()), axis=1)

    weight = "balanced" if balanced else None
    fitted = trees(x(train.features), train.labels, max_iter=iterations, random_state=seed, class_weight=weight)

    def staged(features: Features, end: int = iterations) -> NDArray[np.float64]:
        """(N, end, L): scores after each tree."""
        found = []
        for model in fitted:
            if isinstance(model, float):
                found.append(np.full((end, len(x(features))), model))
            else:
                stages = itertools.islice(model.staged_decision_function(x(features)), end)
                found.append(np.stack([stage.ravel() for stage in stages]))
        return np.stack(found, axis=2).transpose(1, 0, 2)

    reached = macro_auroc(val.labels, staged(val.features))
    best = int(np.argmax(reached)) + 1
    return lambda features: staged(features, best)[:, -1], {"trees": best, "val_auroc": float(reached.max())}


def trees(x: NDArray[np.float32], labels: NDArray[np.float32], **more: Any) -> list[Any]:
    """Boosted trees of 8 leaves, one label (column) at a time; the log odds for a label with one class."""
    from sklearn.ensemble import HistGradientBoostingClassifier

    found: list[Any] = []
    for y in labels.T:
        known = ~np.isnan(y)
        if 0 < y[known].sum() < known.sum():
            model = HistGradientBoostingClassifier(learning_rate=0.05, max_leaf_nodes=8, early_stopping=False, **more)
            found.append(model.fit(x[known], y[known]))
        else:
            found.append(_log_odds(y[known]))
    return found


def knn(
    train: Data,
    val: Data,
    *,
    pools: Sequence[str],
    neighbours: Sequence[int],
    temperature: float = 0.07,
    device: str | torch.device = "cpu",
) -> tuple[Head, dict[str, Any]]:
    """Weighted mean of the labels of the nearest train films by cosine; validation chooses pool and number.

    A neighbour has weight exp(cosine / temperature); unlabelled neighbours are skipped; without any, the train mean.
    """
    scale = Scale(train.features)
    numbers = sorted({min(k, len(train.labels)) for k in neighbours})
    known = ~np.isnan(train.labels)
    mean = np.nansum(train.labels, axis=0) / np.maximum(known.sum(0), 1)
    used = blocks(train.features, pools)

    def votes(features: Features, pool: str, numbers: Sequence[int]) -> NDArray[np.float64]:
        """(N, numbers, L) probabilities."""
        x, bank = (_unit(scale(of, used[pool]), device) for of in (features, train.features))
        found = []
        with Bar(f"neighbours, {pool}", len(x), "films", after=5) as bar:
            for similar, rows in nearest(x, bank, max(numbers)):
                own = [_vote(similar[:, :k], train.labels[rows[:, :k]], temperature, mean) for k in numbers]
                found.append(np.stack(own, axis=1))
                bar.advance(len(rows))
        return np.concatenate(found)

    best = (-math.inf, "", 0)
    for pool in used:
        reached = macro_auroc(val.labels, votes(val.features, pool, numbers))  # (numbers,)
        i = int(np.argmax(reached))
        best = max(best, (float(reached[i]), pool, numbers[i]), key=lambda of: of[0])
    value, pool, k = best

    def predict(features: Features) -> NDArray[np.float64]:
        p = np.clip(votes(features, pool, [k])[:, 0], 1e-6, 1 - 1e-6)
        return np.log(p / (1 - p))

    return predict, {"pool": pool, "neighbours": k, "val_auroc": value}


def nearest(
    x: Tensor, bank: Tensor, k: int, queries: int = 512, banked: int = 16_384
) -> Iterator[tuple[NDArray[np.float32], NDArray[np.int64]]]:
    """The k rows of a bank with the largest inner products, the largest first, by blocks of both tables.

    Args:
        x: (N, D). bank: (M, D). queries, banked: rows of a block; no array is larger than one block by the other.
    Yields: the products (B, k) and the rows of `bank` (B, k), B <= `queries`, in the order of `x`.
    """
    for part in x.split(queries):
        best = part.new_empty(len(part), 0)
        rows = torch.empty(len(part), 0, dtype=torch.int64, device=part.device)
        for start in range(0, len(bank), banked):
            values, at = (part @ bank[start : start + banked].T).topk(min(k, len(bank) - start, banked), dim=1)
            best, rows = torch.cat([best, values], dim=1), torch.cat([rows, at + start], dim=1)
            best, order = best.topk(min(k, best.shape[1]), dim=1)
            rows = rows.gather(1, order)
        yield best.cpu().numpy(), rows.cpu().numpy()


def _logistic(x: NDArray[np.float32], y: NDArray[np.float32], c: float, balanced: bool) -> NDArray[np.float64]:
    """(D + 1,) weights and bias; with one class only, the smoothed log odds."""
    from sklearn.linear_model import LogisticRegression

    known = ~np.isnan(y)
    x, y = x[known], y[known]
    if not 0 < y.sum() < len(y):
        return np.append(np.zeros(x.shape[1]), _log_odds(y))
    fit = LogisticRegression(C=c, max_iter=2000, class_weight="balanced" if balanced else None).fit(x, y)
    return np.append(fit.coef_[0], fit.intercept_[0]).astype(np.float64)


def _log_odds(y: NDArray[np.float32]) -> float:
    """Log odds of a label with one class only, smoothed to be finite."""
    return math.log((float(y.sum()) + 0.5) / (len(y) - float(y.sum()) + 0.5))


def _unit(x: NDArray[np.float32], device: str | torch.device) -> Tensor:
    x /= np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
    return torch.from_numpy(x).to(device)


def _vote(near: NDArray[Any], votes: NDArray[Any], temperature: float, mean: NDArray[Any]) -> NDArray[Any]:
    """Similarities (B, k) and labels (B, k, L) of the neighbours -> probabilities (B, L)."""
    weight = np.exp((near - near.max(1, keepdims=True)) / temperature)[:, :, None]
    known = ~np.isnan(votes)
    total = (weight * known).sum(1)
    return np.where(total > 0, (weight * np.nan_to_num(votes)).sum(1) / np.maximum(total, 1e-30), mean)
