"""The report's differences: each pair of methods on the same test rows, with the interval of the difference.

Comes in: evaluated runs of one task; runs whose names differ by a seed alone (`x_seed1`, `x_seed2`) are one method.
Goes out: one figure. All pairs of up to FEW methods, else each against the first; p is Holm-adjusted over the pairs.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd

from configs import UserError
from finetune.compare import compare_runs, holm
from finetune.report_data import Run
from finetune.report_forest import Row, forest
from finetune.report_html import Html, both_widths, figure, frame, interval, number

FEW = 5
SEED = re.compile(r"[-_/]?s(eed)?[-_=]?\d+$")


def methods(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Runs by what is left of their name without a seed, where their seeds differ; else each run by itself."""
    found: dict[str, list[Run]] = {}
    for run in runs:
        found.setdefault(SEED.sub("", run.name) or run.name, []).append(run)
    alone: dict[str, list[Run]] = {}
    for name, group in found.items():
        seeds = {run.result.get("seed") for run in group}
        same = len({(run.result.get("model"), run.task) for run in group}) == 1
        alone |= {name: group} if len(group) > 1 and len(seeds) == len(group) and same else {r.name: [r] for r in group}
    return alone


def pairs_figure(task: str, runs: Sequence[Run], samples: int = 1000) -> Html | None:
    """Differences of the main AUROC between methods."""
    able = methods([run for run in runs if run.predictions() is not None and run.headline() is not None])
    names = list(able)
    chosen = combinations(names, 2) if len(names) <= FEW else ((names[0], name) for name in names[1:])
    found, apart = [], []
    for first, second in chosen:
        if (row := _compare(able[second], able[first], samples)) is None:
            apart.append(f"{second} and {first}")
        else:
            found.append((f"{second} − {first}", row))
    if not found:
        return None
    adjusted = holm(np.array([row["p"] for _, row in found], dtype=float))
    rows, cells = [], []
    for (name, row), p in zip(found, adjusted, strict=True):
        value = float(row["difference"]), float(row["low"]), float(row["high"])
        seeds = min(row["runs_a"], row["runs_b"])
        remark = f"p {number(float(p))}" if p >= 0.001 else "p < 0.001"
        rows.append(Row(name, [(0, *value)], f"{remark} · {seeds} seed{'s' if seeds > 1 else ''}"))
        means = [number(float(row[side])) for side in ("a", "b")]
        cells.append(
            [name, *means, interval(*value), number(float(row["p"])), number(float(p)), row["n"], row["claim"]]
        )
    drawing = both_widths(lambda w: forest(rows, {0: "difference"}, w, chance=0.0, x_label="difference in AUROC"))
    label = "macro AUROC" if len(next(iter(able.values()))[0].labels) > 1 else "AUROC"
    caption = (
        f"The first run's {label} less the second's, on the same test rows and the same resamples of subjects. An "
        "interval that crosses the dashed line shows no difference. p is two-sided, Holm-adjusted over these pairs."
    )
    columns = ["pair", "first", "second", "difference", "p", "p (Holm)", "n", "claim holds for"]
    return figure(
        f"pairs-{task}",
        "Differences between runs",
        drawing,
        caption,
        frame(pd.DataFrame(cells, columns=columns)),
        note=_note(found, apart),
    )


def _compare(a: Sequence[Run], b: Sequence[Run], samples: int) -> dict[Any, Any] | None:
    """The main label's row of `compare_runs`; None where the two were not tested on the same rows."""
    try:
        table = compare_runs([run.folder for run in a], [run.folder for run in b], samples=samples)
    except UserError:
        return None
    row = table[table["label"] == a[0].main].iloc[0].to_dict()
    return row if np.isfinite(row["difference"]) else None


def _note(found: Sequence[tuple[str, dict[Any, Any]]], apart: Sequence[str]) -> str:
    says = []
    if any(row["claim"] != "method" for _, row in found):
        says.append(
            "With fewer than three training seeds each, a difference holds for these runs, not for the methods."
        )
    if apart:
        says.append(f"Not tested on the same rows, so not compared: {', '.join(apart)}.")
    return " ".join(says)
