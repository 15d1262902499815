"""record_gbm: gradient boosting on statistics of windows of the series; a rival without a network.

Comes in: samples. Goes out: predictions. Each label has its own boosted trees, small ones: 200 of 8 leaves.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from sklearn.ensemble import HistGradientBoostingClassifier

from finetune.outputs import Predictions
from finetune.samples import Samples

WINDOWS = (1.0, 0.5, 0.1)  # the last parts of the hours that may be read


def statistics(samples: Samples, rows: NDArray[np.int64]) -> NDArray[np.float32]:
    """Mean, least, most, last and last minus first of each column in each window, and the hours: (N, 15 F + 1)."""
    out = np.zeros((len(rows), 5 * len(WINDOWS) * samples.num_inputs + 1), np.float32)
    for i, row in enumerate(rows):
        begin, length = samples.start[row], samples.length[row]
        if not length:
            continue
        values = samples.values[begin : begin + length]
        found = []
        for window in WINDOWS:
            part = values[-max(1, round(window * length)) :]
            found += [part.mean(0), part.min(0), part.max(0), part[-1], part[-1] - part[0]]
        out[i, :-1], out[i, -1] = np.concatenate(found), length
    return out


def train(samples: Samples, rows: dict[str, NDArray[np.int64]], seed: int) -> dict[str, Predictions]:
    """Fit on rows["train"]; log-odds of val and test."""
    tables = {split: statistics(samples, own) for split, own in rows.items()}
    logits = {split: np.zeros((len(rows[split]), len(samples.names))) for split in ("val", "test")}
    for label in range(len(samples.names)):
        y = samples.labels[rows["train"], label]
        known = ~np.isnan(y)
        if len(np.unique(y[known])) < 2:
            continue
        trees = HistGradientBoostingClassifier(
            learning_rate=0.05,
            max_iter=200,
            max_leaf_nodes=8,
            l2_regularization=1.0,
            early_stopping=False,
            random_state=seed,
        ).fit(tables["train"][known], y[known])
        for split, column in logits.items():
            column[:, label] = trees.decision_function(tables[split])
    return {split: Predictions(rows[split], values, None) for split, values in logits.items()}
