"""ROC, precision and recall, calibration and net benefit, from predictions/test.parquet.

Input: evaluated runs of one task. Output: one figure, with a block for each label and a line for each run. Curves
have no bands; the forest plots show the intervals of results.json.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from markupsafe import Markup
from numpy.typing import NDArray
from scipy.special import expit

from finetune.report.figures import Frame, Series, legend, panels
from finetune.report.html import figure, join, number, render, table, told
from finetune.report.results import key_of
from finetune.run_folders import Run, common_rows

Floats = NDArray[np.float64]
POINTS = 80  # of a drawn curve
GRID = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
RUNS = 8
FEWEST = 20  # rows in common


@dataclass(frozen=True)
class Scored:
    """One run's rows of one label: outcome and probability."""

    index: int
    name: str
    y: Floats
    p: Floats


def curves_figure(task: str, runs: Sequence[Run]) -> Markup | None:
    """Four curves of each label, the label with the most positives open; on the rows that all runs scored."""
    by_label: dict[str, list[Scored]] = {}
    able = [(i, run) for i, run in enumerate(runs[:RUNS]) if run.predicted]
    common = common_rows([run for _, run in able])
    shared = common is not None and len(common) >= FEWEST
    for i, run in able:
        predictions = run.by_row.loc[common] if shared and run.by_row is not None else run.predictions
        assert predictions is not None
        for column in predictions.columns:
            label = str(column).removeprefix("label_")
            if column == f"label_{label}" and f"logit_{label}" in predictions:
                y, logit = predictions[column].to_numpy(float), predictions[f"logit_{label}"].to_numpy(float)
                known = np.isfinite(y) & np.isfinite(logit)
                if 0 < y[known].sum() < known.sum():
                    by_label.setdefault(label, []).append(Scored(i, run.called, y[known], expit(logit[known])))
    if not by_label:
        return None
    order = sorted(by_label, key=lambda label: -by_label[label][0].y.sum())
    blocks = [_block(label, by_label[label], i == 0) for i, label in enumerate(order)]
    shown = {s.index: s.name for scored in by_label.values() for s in scored}
    names = legend(sorted(shown.items())) if len(shown) > 1 else None
    caption = (
        "Up and left is better in ROC, up and right in precision and recall. Calibration: on the diagonal, of ten "
        "patients given 30% three have the outcome; each point is a tenth of the rows (of fewer than 200: a fifth), "
        "with its Wilson interval where one or two runs are drawn. Net benefit: worth using where it lies above "
        "treating all (dashed) and treating none (0)."
    )
    note = _whose(able, common)
    drawing = join([names, *blocks])
    return figure(key_of("curves", task), "Discrimination, calibration, net benefit", drawing, caption, note=note)


def _whose(able: Sequence[tuple[int, Run]], common: pd.Index | None) -> str | None:
    """A note if the runs scored different rows than the common ones that are drawn."""
    if len(able) < 2:
        return None
    if common is None or len(common) < FEWEST:
        return "These runs share too few rows, so each is drawn on its own: no line is comparable with another."
    more = {len(run.predictions) for _, run in able if run.predictions is not None} - {len(common)}
    return f"Drawn on the {len(common):,} rows that all of these runs scored." if more else None


def _block(label: str, scored: Sequence[Scored], opened: bool) -> Markup:
    first = scored[0]
    prevalence = float(first.y.mean())
    thresholds = np.linspace(0.01, min(0.9, max(0.3, 3 * prevalence)), 60)
    gains = [net_benefit(s, thresholds) for s in scored]
    most, least = max(prevalence, *(float(g.max()) for g in gains)), min(float(g.min()) for g in gains)
    treat_all = prevalence - (1 - prevalence) * thresholds / (1 - thresholds)
    everyone = Series("treat all", thresholds.tolist(), treat_all.tolist(), -1)
    unit = (0.0, 1.0)
    specs = [
        (
            [Series(s.name, *_thin(*roc(s)), s.index) for s in scored],
            Frame("1 − specificity", "sensitivity", unit, unit, diagonal=True),
            "ROC",
        ),
        (
            [Series(s.name, *_thin(*precision_recall(s)), s.index) for s in scored],
            Frame("sensitivity (recall)", "precision", unit, unit, marks_y=[(prevalence, "prevalence")]),
            "Precision and recall",
        ),
        (
            [_calibration(s, len(scored) < 3) for s in scored],
            Frame("predicted probability", "observed share", unit, unit, diagonal=True),
            "Calibration",
        ),
        (
            [
                everyone,
                *[Series(s.name, thresholds.tolist(), g.tolist(), s.index) for s, g in zip(scored, gains, strict=True)],
            ],
            Frame(
                "threshold probability",
                "net benefit",
                y_range=(max(min(1.1 * least, -0.15 * most), -most), 1.1 * most),
            ),
            "Net benefit",
        ),
    ]
    about = f"{told(label)}: {int(first.y.sum()):,} of {len(first.y):,} positive"
    return render("curves", about, panels(specs, columns=2), _numbers(scored), opened)


def roc(s: Scored) -> tuple[Floats, Floats]:
    """1 - specificity and sensitivity at each distinct score, from (0, 0) to (1, 1)."""
    from sklearn.metrics import roc_curve

    false, true, _ = roc_curve(s.y, s.p, drop_intermediate=False)
    return false, true


def precision_recall(s: Scored) -> tuple[Floats, Floats]:
    """Recall and precision at each distinct score, from the highest."""
    from sklearn.metrics import precision_recall_curve

    precision, recall, _ = precision_recall_curve(s.y, s.p)
    return recall[-2::-1], precision[-2::-1]


def net_benefit(s: Scored, thresholds: Floats) -> Floats:
    """True positives less false positives at the threshold's odds, per row. Source: Vickers and Elkin 2006."""
    called = s.p[:, None] >= thresholds
    true, false = (called & (s.y[:, None] == 1)).mean(0), (called & (s.y[:, None] == 0)).mean(0)
    return true - false * thresholds / (1 - thresholds)


def bins(s: Scored) -> pd.DataFrame:
    """Rows in tenths (fifths under 200 rows) of the prediction: mean prediction, share observed, Wilson interval."""
    parts = np.array_split(np.argsort(s.p, kind="stable"), 10 if len(s.p) >= 200 else 5)
    rows = []
    for part in parts:
        if len(part):
            n, observed, z = len(part), float(s.y[part].mean()), 1.96
            middle = (observed + z * z / (2 * n)) / (1 + z * z / n)
            half = z * np.sqrt(observed * (1 - observed) / n + z * z / (4 * n * n)) / (1 + z * z / n)
            rows.append((float(s.p[part].mean()), observed, max(middle - half, 0.0), min(middle + half, 1.0), n))
    return pd.DataFrame(rows, columns=["predicted", "observed", "low", "high", "n"])


def _calibration(s: Scored, whiskers: bool) -> Series:
    """The points of `bins`; their intervals where few runs stand side by side, else a line through them."""
    data = bins(s)
    x, y = data["predicted"].tolist(), data["observed"].tolist()
    if not whiskers:
        return Series(s.name, x, y, s.index, marks=True)
    return Series(s.name, x, y, s.index, data["low"].tolist(), data["high"].tolist(), marks=True, whiskers=True)


def _thin(x: Floats, y: Floats) -> tuple[list[float], list[float]]:
    keep = np.unique(np.linspace(0, len(x) - 1, min(len(x), POINTS)).astype(int))
    return x[keep].tolist(), y[keep].tolist()


def _numbers(scored: Sequence[Scored]) -> Markup:
    rows, tenths = [], []
    for s in scored:
        (false, true), (recall, precision) = roc(s), precision_recall(s)
        gain = net_benefit(s, np.array(GRID))
        for i, at in enumerate(GRID):
            sensitivity = float(true[false <= at + 1e-12].max())
            exact = float(precision[recall >= at - 1e-12].max())
            rows.append([s.name, number(at, 2), number(sensitivity), number(exact), number(float(gain[i]))])
        for row in bins(s).to_dict("records"):
            tenths.append([s.name, *[number(row[k]) for k in ("predicted", "observed", "low", "high", "n")]])
    columns = [
        "run",
        "at",
        "sensitivity at this 1 − specificity",
        "best precision at this recall",
        "net benefit at this threshold",
    ]
    return join([table(columns, rows), table(["run", "predicted", "observed", "low", "high", "n"], tenths)])
