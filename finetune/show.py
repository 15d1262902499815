"""What `probe` prints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from finetune.films import Films

if TYPE_CHECKING:
    from finetune.config import ProbeConfig


def plan(config: ProbeConfig, films: Films, name: str) -> str:
    """What will be done, in a line."""
    counts = ", ".join(f"{len(films.rows(split)):,} {split}" for split in ("train", "val", "test"))
    left = "".join(f"; {number:,} left out ({why})" for why, number in films.left_out.items())
    return f"{config.method} probe of {name} on {len(films.names)} labels: {counts} films{left}"


def table(rows: pd.DataFrame, title: str) -> None:
    """The test split, all subjects, the largest fraction; then the macros of the other subsets and fractions."""
    grid = Table(title=Text(title), box=box.SIMPLE_HEAD, title_justify="left", pad_edge=False)
    for name in ("label", "AUROC", "95% interval", "AUPRC", "prevalence", "n", "positive"):
        grid.add_column(name, justify="left" if name == "label" else "right", no_wrap=name != "label")
    largest = rows["fraction"].max()
    whole: pd.DataFrame = rows[(rows["split"] == "test") & (rows["subset"] == "all") & (rows["fraction"] == largest)]
    for label in dict.fromkeys(whole["label"]):
        _row(grid, label, whole[whole["label"] == label])
    others = rows[(rows["label"] == "macro") & ~rows.index.isin(whole.index) & (rows["split"] != "val")]
    if len(others):
        grid.add_section()
    for (split, subset, fraction), part in others.groupby(["split", "subset", "fraction"], sort=False):
        words = ["macro"]
        words += [str(subset)] if subset != "all" else []
        words += [f"{fraction!s} of train subjects"] if fraction != largest else []
        words += [str(split)] if split != "test" else []
        _row(grid, ", ".join(words), part)
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 110  # a log file
    console.print(grid)


def _row(grid: Table, name: str, part: pd.DataFrame) -> None:
    by: dict[str, Any] = {str(row["metric"]): row for row in part.astype(object).to_dict("records")}
    auroc = by["auroc"]
    counts = (f"{auroc['n']:,}", f"{auroc['positives']:,}")
    if np.isnan(auroc["value"]):
        grid.add_row(Text(name), "-", str(auroc["reason"]).partition(":")[0], "", "", *counts)
        return
    interval = f"{auroc['low']:.3f} - {auroc['high']:.3f}" if not np.isnan(auroc["low"]) else "-"
    numbers = [f"{by[m]['value']:.3f}" for m in ("auprc", "prevalence")]
    grid.add_row(Text(name), f"{auroc['value']:.3f}", interval, *numbers, *counts)


def notes(more: Mapping[str, Any]) -> list[str]:
    """What else is worth a line: the head that was chosen, the largest gap between groups, the shift."""
    lines = []
    for fit in more.get("fractions", [])[-1:]:
        known = {k: v for k, v in fit.items() if k not in ("fraction", "draw", "films", "subjects")}
        lines.append("chosen on validation: " + ", ".join(f"{k} {_short(v)}" for k, v in known.items()))
    for gap in more.get("gaps", [])[:1]:
        lines.append(
            f"largest gap: {gap['field']} {gap['higher']} over {gap['lower']}, macro AUROC {gap['difference']:+.3f} "
            f"({gap['low']:+.3f} to {gap['high']:+.3f}; {gap['labels']} labels)"
        )
    if "shift" in more:
        lines.append("shift: " + more["shift"]["says"])
    return lines


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
