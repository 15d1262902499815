"""Logistic regression, nearest neighbours and boosted trees on frozen features. Comes in, goes out: as in `heads`."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.linear_model import LogisticRegression

from finetune.frozen import Features
from finetune.heads import Data, Head, LinearHead, Scale, blocks, macro_auroc


def logistic(
    train: Data, val: Data, *, pools: Sequence[str], strengths: Sequence[float]
) -> tuple[LinearHead, dict[str, Any]]:
    """L2-regularised logistic regression, a label at a time; validation chooses pool and strength for all labels.

    Args:
        strengths: inverse regularisation, scikit-learn's C.
    """
    scale = Scale(train.features)
    best: tuple[float, NDArray[np.float64], str, float] = (-math.inf, np.empty(0), "", 0.0)
    for pool, names in blocks(train.features, pools).items():
        x, x_val = scale(train.features, names), scale(val.features, names)
        for c in strengths:
            weights = np.stack([_logistic(x, train.labels[:, i], c) for i in range(train.labels.shape[1])], axis=1)
            reached = float(macro_auroc(val.labels, (x_val @ weights[:-1] + weights[-1])[:, None])[0])
            if reached > best[0]:
                best = (reached, weights, pool, c)
    reached, weights, pool, c = best
    head = LinearHead.of(scale, blocks(train.features, pools)[pool], weights)
    return head, {"pool": pool, "c": c, "val_auroc": reached}


def boosting(train: Data, val: Data, *, iterations: int = 200, seed: int = 0) -> tuple[Head, dict[str, Any]]:
    """Gradient-boosted trees, a label at a time; validation chooses the number of trees for all labels.

    NaN features are fine. Few leaves and a small rate: the inputs are a handful of columns of the record.
    """

    def x(features: Features) -> NDArray[np.float32]:
        return np.concatenate(list(features.values()), axis=1)

    trees: list[Any] = []
    staged = []  # (iterations, N) a label
    for i in range(train.labels.shape[1]):
        y = train.labels[:, i]
        known = ~np.isnan(y)
        if not 0 < y[known].sum() < known.sum():
            trees.append(_log_odds(y[known]))
            staged.append(np.full((iterations, len(val.labels)), trees[-1]))
            continue
        model = HistGradientBoostingClassifier(
            learning_rate=0.05, max_iter=iterations, max_leaf_nodes=8, early_stopping=False, random_state=seed
        ).fit(x(train.features)[known], y[known])
        trees.append(model)
        staged.append(np.stack([s.ravel() for s in model.staged_decision_function(x(val.features))]))
    scores = np.stack(staged, axis=2).transpose(1, 0, 2)  # (N, iterations, L)
    reached = macro_auroc(val.labels, scores)
    best = int(np.argmax(reached)) + 1

    def predict(features: Features) -> NDArray[np.float64]:
        columns = []
        for model in trees:
            if isinstance(model, float):
                columns.append(np.full(len(x(features)), model))
            else:
                columns.append(
                    next(itertools.islice(model.staged_decision_function(x(features)), best - 1, None)).ravel()
                )
        return np.stack(columns, axis=1)

    return predict, {"trees": best, "val_auroc": float(reached.max())}


def knn(
    train: Data, val: Data, *, pools: Sequence[str], neighbours: Sequence[int], temperature: float = 0.07
) -> tuple[Head, dict[str, Any]]:
    """Weighted mean of the labels of the nearest train films by cosine; validation chooses pool and number.

    A neighbour weighs exp(cosine / temperature); one without the label is left out; without any, the train mean.
    """
    scale = Scale(train.features)
    numbers = sorted({min(k, len(train.labels)) for k in neighbours})
    known = ~np.isnan(train.labels)
    mean = np.nansum(train.labels, axis=0) / np.maximum(known.sum(0), 1)
    best = (-math.inf, "", 0)
    banks = {}
    for pool, names in blocks(train.features, pools).items():
        banks[pool] = _unit(scale(train.features, names))
        similar = _unit(scale(val.features, names)) @ banks[pool].T
        for k in numbers:
            p = _vote(similar, train.labels, k, temperature, mean)
            reached = float(macro_auroc(val.labels, p[:, None])[0])
            if reached > best[0]:
                best = (reached, pool, k)
    reached, pool, k = best

    def predict(features: Features) -> NDArray[np.float64]:
        x = _unit(scale(features, blocks(train.features, pools)[pool]))
        parts = [_vote(part @ banks[pool].T, train.labels, k, temperature, mean) for part in _chunks(x, 512)]
        p = np.clip(np.concatenate(parts), 1e-6, 1 - 1e-6)
        return np.log(p / (1 - p))

    return predict, {"pool": pool, "neighbours": k, "val_auroc": reached}


def _logistic(x: NDArray[np.float32], y: NDArray[np.float32], c: float) -> NDArray[np.float64]:
    """(D + 1,) weights and bias; with one class only, the smoothed log odds."""
    known = ~np.isnan(y)
    x, y = x[known], y[known]
    if not 0 < y.sum() < len(y):
        return np.append(np.zeros(x.shape[1]), _log_odds(y))
    fit = LogisticRegression(C=c, max_iter=2000).fit(x, y)
    return np.append(fit.coef_[0], fit.intercept_[0]).astype(np.float64)


def _log_odds(y: NDArray[np.float32]) -> float:
    """Of a label with one class only, smoothed so that it is finite."""
    return math.log((float(y.sum()) + 0.5) / (len(y) - float(y.sum()) + 0.5))


def _unit(x: NDArray[np.float32]) -> NDArray[np.float32]:
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)


def _chunks(x: NDArray[Any], size: int) -> list[NDArray[Any]]:
    return [x[start : start + size] for start in range(0, len(x), size)]


def _vote(similar: NDArray[Any], labels: NDArray[Any], k: int, temperature: float, mean: NDArray[Any]) -> NDArray[Any]:
    """Similarities (B, N) -> probabilities (B, L)."""
    nearest = np.argpartition(-similar, k - 1, axis=1)[:, :k]  # (B, k)
    near = np.take_along_axis(similar, nearest, axis=1)
    weight = np.exp((near - near.max(1, keepdims=True)) / temperature)[:, :, None]
    votes = labels[nearest]  # (B, k, L)
    known = ~np.isnan(votes)
    total = (weight * known).sum(1)
    return np.where(total > 0, (weight * np.nan_to_num(votes)).sum(1) / np.maximum(total, 1e-30), mean)
