"""The report's pretraining section: loss, collapse signals, probes during training, readability of the record.

Input: runs whose metrics.jsonl has a loss. Output: sections, and warnings derived from the curves.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from markupsafe import Markup

from configs.commands import command_line
from finetune.report.figures import Frame, Series, legend, panels
from finetune.report.forest import Row, forest
from finetune.report.html import both_widths, figure, frame, join, metric, number, section, table
from finetune.run_folders import Run, column, part
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
MOST = 5  # probes that are drawn
READ = 12  # columns of the record that are drawn
PROBES = {"linear/auroc": "Quality: linear probe, val AUROC", "knn/auroc": "Quality: kNN, val AUROC"}


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
    """Quality over time where it was probed, loss and collapse signals of each pretraining."""
    chosen = pretrained(runs)
    if not chosen:
        return Markup("")
    drawn, probed = quality(chosen)
    last = []
    for _, names, title in PANELS:
        lines = []
        for i, run in enumerate(chosen):
            x, y = curve(run, names)
            if len(x):
                lines.append(Series(run.called, *thin(x, smooth(y)), i))
                last.append((title, run.called, float(y[0]), float(np.median(y[-max(1, len(y) // 10) :])), int(x[-1])))
        if lines:
            drawn.append((lines, Frame(x_label="optimizer step"), title))
    numbers = [
        frame(pd.DataFrame(probed, columns=["model", "probe", "step", "value"])) if probed else None,
        frame(pd.DataFrame(last, columns=["signal", "model", "first", "median of the last tenth", "last step"])),
    ]
    key = legend([(i, run.called) for i, run in enumerate(chosen)]) if len(chosen) > 1 else None
    verdict = "; ".join(f"{run.called}: {', '.join(says)}" for run in chosen if (says := collapse(run)))
    caption = (
        "A healthy run loses loss early and keeps its effective rank and its prototypes; a rank that falls to a few "
        "dimensions is a collapse, which the mean entropy does not show. Lines are running medians."
    )
    signs = [names for key, names, _ in PANELS if key in ("rank", "prototypes")]
    silent = [run.called for run in chosen if not any(len(curve(run, names)[0]) for names in signs)]
    note = f"Signs of collapse. {verdict}." if verdict else "No sign of collapse in the last tenth of any run."
    if silent:  # of these it cannot be said
        note = f"{note} " * (len(silent) < len(chosen) or bool(verdict))
        note += f"Rank and prototypes were not logged of {', '.join(silent)}: whether it collapsed is not known."
    if probed:
        caption = (
            "Quality: heads on train films, scored on validation films, of each encoder that the run exported; where "
            f"the loss falls and quality stays flat, it learned something else. {caption}"
        )
    else:
        config = chosen[0].config
        inputs = [f"{key}={value}" for key in ("features", "store") if (value := config.get(key))]
        if own := part(config, "films").get("table"):
            inputs.append(f"films.table={own}")
        probe = "probe_linear" if config.get("features") else "own_films/probe"
        watch = command_line("probe", probe, *inputs, "--watch", chosen[0].folder.as_posix())
        note += f" Quality over time was not probed; beside a training this does it: {watch}"
    drawing = join([key, panels(drawn)])
    heading = "Quality, loss and signs of collapse" if probed else "Loss and signs of collapse"
    return section(
        "pretraining",
        "Pretraining",
        figure("pretraining", heading, drawing, caption, join(numbers), note=note),
        hidden_figure(chosen),
    )


Drawn = list[tuple[list[Series], Frame, str]]


def quality(runs: Sequence[Run]) -> tuple[Drawn, list[tuple[str, str, int, float]]]:
    """Panels, and the numbers, of the probes that `probe --watch` made while the runs trained."""
    found = [(i, run) for i, run in enumerate(runs) if len(run.watched) and "step" in run.watched]
    probes = dict.fromkeys(k for _, run in found for k in run.watched.select_dtypes("number") if "auroc" in str(k))
    drawn: Drawn = []
    rows = []
    for probe in list(probes)[:MOST]:
        lines, title = [], PROBES.get(str(probe), str(probe))
        for i, run in found:
            if probe in run.watched and len(data := run.watched[["step", probe]].dropna().sort_values("step")):
                x, y = list(data["step"]), list(data[probe])
                lines.append(Series(run.called, x, y, i, marks=True))
                rows += [(run.called, title, int(step), float(value)) for step, value in zip(x, y, strict=True)]
        drawn.append((lines, Frame(x_label="optimizer step", marks_y=[(0.5, "chance")]), title))
    return drawn, rows


def hidden_figure(runs: Sequence[Run]) -> Markup | None:
    """How well each column of the record is linearly readable from the frozen features, the most readable first."""
    found = {i: rows for i, run in enumerate(runs) if (rows := readability(run))}
    if not found:
        return None
    columns: dict[str, list[tuple[int, Readable]]] = {}
    for i, rows in found.items():
        for row in rows:
            columns.setdefault(row.column, []).append((i, row))
    names = {i: runs[i].called for i in found}
    values = [name for name in columns if not name.endswith(("_missing", "_hours"))] or list(columns)
    most = sorted(values, key=lambda name: max(row.above for _, row in columns[name]), reverse=True)[:READ]
    drawn: dict[str, list[Row]] = {}  # one axis a metric
    for name in most:
        points = [(i, row.value, None, None) for i, row in columns[name]]
        first = columns[name][0][1]
        drawn.setdefault(first.metric, []).append(Row(name.replace("_", " "), points, best=first.chance))
    cells = [
        [name, names[i], row.metric, number(row.value), number(row.chance)]
        for name, same in columns.items()
        for i, row in same
    ]
    caption = "How well a linear model reads the record's columns from the frozen features; dotted: chance."
    if len(most) < len(columns):
        caption += f" The {len(most)} most readable values of {len(columns)} columns; all are in the numbers."
    uses = {part(runs[i].encoder, "ehr").get("use", "condition") for i in found}
    if "condition" in uses:
        caption += (
            " A conditioned anchor may take a column from the record instead of the film, and near chance the encoder "
            "has become blind to it."
        )
    heading = "What conditioning hid" if uses == {"condition"} else "What the features tell of the record"

    def draw(width: int) -> Markup:
        return join([forest(rows, names, width, chance=None, x_label=metric(by)) for by, rows in drawn.items()])

    drawing = join([legend(list(names.items())) if len(runs) > 1 else None, both_widths(draw)])
    return figure("hidden", heading, drawing, caption, table(["column", "model", "metric", "value", "chance"], cells))


class Readable(NamedTuple):
    """How well a column of the record is read from the features; the best value is 1."""

    column: str
    metric: str
    value: float
    chance: float | None

    @property
    def above(self) -> float:
        """0 at chance, 1 at best."""
        chance = self.chance or 0.0
        return (self.value - chance) / (1 - chance) if chance < 1 else 0.0


def readability(run: Run) -> list[Readable]:
    """From encoder.json."""
    found = run.encoder.get("readability") or {}
    rows = []
    for name, given in found.items() if isinstance(found, dict) else []:
        detail = given if isinstance(given, dict) else {"value": given}
        value, chance = (
            float(v) if isinstance(v := detail.get(key), (int, float)) and np.isfinite(v) else None
            for key in ("value", "chance")
        )
        if value is not None:
            rows.append(Readable(str(name), str(detail.get("metric", "")), value, chance))
    return rows
