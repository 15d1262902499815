"""The report's pretraining section: loss, collapse signals, probes during training, readability of the record.

Input: runs whose metrics.jsonl has a loss. Output: sections, and warnings derived from the curves.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from markupsafe import Markup

from finetune.report.data import Run, column, part
from finetune.report.figures import Frame, Row, Series, forest, legend, panels
from finetune.report.html import both_widths, figure, frame, join, metric, number, section, table
from pretrain.config import PROTOTYPES_FLOOR, RANK_FLOOR

POINTS = 240  # points of a drawn curve: more than its pixels
PANELS = (
    ("loss", ("loss",), "Loss"),
    ("rank", ("effective_rank",), "Effective rank of the features"),
    ("prototypes", ("prototypes_used",), "Prototypes in use"),
    ("target", ("target_max",), "Largest target probability"),
    ("entropy", ("target_entropy",), "Entropy of the targets"),
    ("grad", ("grad_norm",), "Gradient norm"),
    ("lr", ("lr",), "Learning rate"),
    ("films", ("films_per_second",), "Films per second"),
)
PROBES = {"linear/auroc": "Linear probe, AUROC on val", "knn/auroc": "kNN, AUROC on val"}


def pretrained(runs: Sequence[Run]) -> list[Run]:
    """The runs that are pretraining: a logged loss, no evaluation rows."""
    return [run for run in runs if run.kind == "pretraining" and column(run.metrics, "loss") is not None]


def curve(run: Run, names: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of one logged quantity; empty where it was not logged."""
    key = column(run.metrics, *names)
    if key is None or "step" not in run.metrics:
        return np.array([]), np.array([])
    data = run.metrics[["step", key]].apply(pd.to_numeric, errors="coerce").dropna()
    return data["step"].to_numpy(float), data[key].to_numpy(float)


def thin(x: np.ndarray, y: np.ndarray) -> tuple[list[float], list[float]]:
    """Downsample a long curve by means over neighbours."""
    if len(x) <= POINTS:
        return x.tolist(), y.tolist()
    parts = np.array_split(np.arange(len(x)), POINTS)
    return [float(x[p].mean()) for p in parts], [float(y[p].mean()) for p in parts]


def smooth(y: np.ndarray) -> np.ndarray:
    """A running median over a fiftieth of the curve, centred."""
    half = len(y) // 100
    return pd.Series(y).rolling(2 * half + 1, center=True, min_periods=1).median().to_numpy() if half else y


def collapse(run: Run) -> list[str]:
    """Signs of collapse in the last tenth of the curves, in words."""
    says = []
    _, loss = curve(run, ("loss",))
    if len(loss) and not np.isfinite(loss).all():
        says.append("the loss was not finite")
    _, rank = curve(run, dict((k, n) for k, n, _ in PANELS)["rank"])
    if len(rank) and (last := float(np.median(rank[-max(1, len(rank) // 10) :]))) < RANK_FLOOR:
        says.append(
            f"the features span {last:.1f} dimensions (effective rank under {RANK_FLOOR:g}): they have collapsed"
        )
    _, used = curve(run, dict((k, n) for k, n, _ in PANELS)["prototypes"])
    total = _total_prototypes(run) or (float(used.max()) if len(used) else 0.0)
    if (
        len(used)
        and total > 1
        and (last := float(np.median(used[-max(1, len(used) // 10) :]))) < PROTOTYPES_FLOOR * total
    ):
        says.append(f"{last:.0f} of {total:.0f} prototypes are in use: most films fall into the same few")
    return says


def _total_prototypes(run: Run) -> float | None:
    given = part(run.config, "loss").get("prototypes")
    return float(given) if isinstance(given, (int, float)) else None


def curves_section(runs: Sequence[Run]) -> Markup:
    """Loss and collapse signals of each pretraining."""
    chosen = pretrained(runs)
    if not chosen:
        return Markup("")
    drawn, last = [], []
    for _, names, title in PANELS:
        lines = []
        for i, run in enumerate(chosen):
            x, y = curve(run, names)
            if len(x):
                lines.append(Series(run.name, *thin(x, smooth(y)), i))
                last.append((title, run.name, float(y[0]), float(np.median(y[-max(1, len(y) // 10) :])), int(x[-1])))
        if lines:
            drawn.append((lines, Frame(x_label="optimizer step"), title))
    numbers = frame(pd.DataFrame(last, columns=["signal", "run", "first", "median of the last tenth", "last step"]))
    key = legend([(i, run.name) for i, run in enumerate(chosen)]) if len(chosen) > 1 else None
    verdict = "; ".join(f"{run.name}: {', '.join(says)}" for run in chosen if (says := collapse(run)))
    caption = (
        "A healthy run loses loss early and keeps its effective rank and its prototypes; a rank that falls to a few "
        "dimensions is a collapse, which the mean entropy does not show. Lines are running medians."
    )
    drawing = join([key, panels(drawn)])
    note = f"Signs of collapse. {verdict}." if verdict else "No sign of collapse in the last tenth of any run."
    return section(
        "pretraining",
        "Pretraining",
        figure("pretraining", "Loss and signs of collapse", drawing, caption, numbers, note=note),
        watch_figure(chosen),
        hidden_figure(chosen),
    )


def watch_figure(runs: Sequence[Run]) -> Markup | None:
    """Probes of the encoders that a run exported while it trained, beside its loss."""
    chosen = [(i, run) for i, run in enumerate(runs) if len(run.watched) and "step" in run.watched]
    if not chosen:
        return None
    probes = dict.fromkeys(k for _, run in chosen for k in run.watched.select_dtypes("number") if "auroc" in str(k))
    drawn, rows = [], []
    for probe in list(probes)[:5]:
        lines = []
        for i, run in chosen:
            if probe in run.watched:
                data = run.watched[["step", probe]].dropna().sort_values("step")
                lines.append(Series(run.name, list(data["step"]), list(data[probe]), i, marks=True))
                rows += [(run.name, str(probe), int(s), float(v)) for s, v in data.itertuples(index=False)]
        drawn.append(
            (lines, Frame(x_label="optimizer step", marks_y=[(0.5, "chance")]), PROBES.get(str(probe), str(probe)))
        )
    losses = [Series(run.name, *thin(*curve(run, ("loss",))), i) for i, run in chosen]
    drawn.append((losses, Frame(x_label="optimizer step"), "Loss"))
    names = legend([(i, run.name) for i, run in chosen]) if len(chosen) > 1 else None
    caption = (
        "Probes of train and validation films only; where the loss falls and they stay flat, it learned something else."
    )
    numbers = frame(pd.DataFrame(rows, columns=["run", "probe", "step", "value"]))
    return figure("watch", "Probing while it trained", join([names, panels(drawn)]), caption, numbers)


def hidden_figure(runs: Sequence[Run]) -> Markup | None:
    """How well each conditioned column is still linearly readable from the frozen features."""
    found = {i: rows for i, run in enumerate(runs) if (rows := readability(run))}
    if not found:
        return None
    columns = dict.fromkeys(row[0] for rows in found.values() for row in rows)
    names = {i: runs[i].name for i in found}
    drawn: dict[str, list[Row]] = {}  # one axis a metric
    cells = []
    for column_name in columns:
        same = [(i, row) for i, rows in found.items() for row in rows if row[0] == column_name]
        _, by, _, chance = same[0][1]
        points = [(i, row[2], None, None) for i, row in same]
        drawn.setdefault(by, []).append(Row(column_name.replace("_", " "), points, best=chance))
        cells += [[column_name, names[i], row[1], number(row[2]), number(row[3])] for i, row in same]
    caption = (
        "How well a linear model reads each conditioned column from the frozen features; dotted: chance. A conditioned "
        "anchor may take it from the record instead of the film, and near chance the encoder has become blind to it."
    )

    def draw(width: int) -> Markup:
        return join([forest(rows, names, width, chance=None, x_label=metric(by)) for by, rows in drawn.items()])

    drawing = join([legend(list(names.items())) if len(runs) > 1 else None, both_widths(draw)])
    numbers = table(["column", "run", "metric", "value", "chance"], cells)
    return figure("hidden", "What conditioning hid", drawing, caption, numbers)


def readability(run: Run) -> list[tuple[str, str, float, float | None]]:
    """(column, metric, value, chance) from encoder.json."""
    found = run.encoder.get("readability") or {}
    rows = []
    for name, given in found.items() if isinstance(found, dict) else []:
        detail = given if isinstance(given, dict) else {"value": given}
        value, chance = (
            float(v) if isinstance(v := detail.get(key), (int, float)) and np.isfinite(v) else None
            for key in ("value", "chance")
        )
        if value is not None:
            rows.append((str(name), str(detail.get("metric", "")), value, chance))
    return rows
