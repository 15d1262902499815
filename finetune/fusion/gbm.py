"""record_gbm: gradient boosting on window statistics of the series, a baseline without a network.

Input: samples. Output: a prediction function. Each label has its own 200 trees of 8 leaves.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit, logit

from finetune.fusion.outputs import Predictions
from finetune.fusion.samples import Samples
from finetune.probe.heads import trees

WINDOWS = (1.0, 0.5, 0.1)  # windows: the last shares of the visible hours


def statistics(samples: Samples, rows: NDArray[np.int64]) -> NDArray[np.float32]:
    """Mean, minimum, maximum, last, last minus first of each column by window, and the hours: (N, 15 F + 1)."""
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


class RecordGBM:
    """Boosted trees for each label, fitted on the rows.

    A label with one class gets the clipped log-odds of its prevalence.
    """

    uses_film = False

    def __init__(self, samples: Samples, rows: NDArray[np.int64], seed: int) -> None:
        more = {"max_iter": 200, "l2_regularization": 1.0, "random_state": seed}
        self.fitted = trees(statistics(samples, rows), samples.labels[rows], **more)

    def __call__(self, samples: Samples, rows: NDArray[np.int64]) -> Predictions:
        """Log-odds of other rows."""
        table = statistics(samples, rows)
        columns = [np.full(len(rows), f) if isinstance(f, float) else f.decision_function(table) for f in self.fitted]
        logits = np.stack(columns, axis=1).astype(np.float64)
        if samples.hours_left is not None:  # exactly one of the ten bins is true
            chances = expit(logits)
            logits = logit(np.clip(chances / chances.sum(1, keepdims=True), 1e-9, 1 - 1e-9))
        return Predictions(rows, logits, None)
