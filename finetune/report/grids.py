"""The report's section on a grid: its axes x results in one table, differences from one method, Holm over all.

Input: the folder that `grid` wrote. Output: one section; its numbers are those of `compare GRID --table`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from markupsafe import Markup

from configs import UserError
from configs.commands import command_line
from ehr_features.typed import read_json
from finetune.compare import Drawn, against
from finetune.config.shapes import GridJson
from finetune.names import unit
from finetune.report.forest import Row, forest
from finetune.report.html import both_widths, figure, fixed, interval, number, render, section, table
from finetune.report.results import key_of
from finetune.run_folders import Run, is_macro, part


def grid_folders(runs: Sequence[Run]) -> list[Path]:
    """The grids that these runs belong to, each once."""
    parents = dict.fromkeys(run.folder.parent.parent for run in runs)
    return [folder for folder in parents if (folder / "grid.json").is_file()]


def grids_section(runs: Sequence[Run], drawn: Drawn | None = None) -> Markup:
    """A table and a forest plot for each grid; why there is none where its runs cannot be compared."""
    parts: list[Any] = []
    for folder in grid_folders(runs):
        try:
            parts += grid_figures(folder, runs, against(folder, drawn=drawn))
        except UserError as error:
            parts.append(render("paragraph", "muted", f"The grid cannot be shown as one table: {error}"))
    lead = "Every combination of the grid in one table; runs that differ by their seed alone are trainings of one row."
    return section("grid", "The grid", parts, lead=lead)


def grid_figures(folder: Path, runs: Sequence[Run], found: pd.DataFrame) -> list[Markup]:
    """Differences from the grid's first method, and the table of axes x results."""
    about = read_json(folder / "grid.json", GridJson)
    last = about.get("steps", ["probe"])[-1]
    of = {str(run.folder.parent.name): run for run in runs if run.folder.parent.parent == folder}
    own = [run for run in runs if run.folder.parent.parent == folder and run.folder.name == last and run.headline()]
    head = own[0].headline() or {} if own else {}
    base, axes = str(found["method"].iloc[0]), axes_of(about, [name for name in about["methods"] if name in of])
    rows, cells = [], []
    for row in found.to_dict("records"):
        method, trainings = str(row["method"]), f"{row['runs']:.0f} training{'s' if row['runs'] > 1 else ''}"
        has = method != base and not pd.isna(row["difference"])
        gap = (float(row["difference"]), float(row["low"]), float(row["high"])) if has else None
        if gap:
            rows.append(Row(method, [(0, *gap)], f"AUROC {fixed(row['auroc'])}, {trainings}", says=_p(row["p_holm"])))
        said = interval(*gap) if gap else "baseline" if method == base else "–"
        p = [_p(row[key]).removeprefix("p ").removeprefix("= ") if gap else "–" for key in ("p", "p_holm")]
        cells.append([method, *axes.get(method, {}).values(), fixed(row["auroc"]), said, *p, number(int(row["runs"]))])
    on = f"{head['n']:,} test {unit(own[0])}" if head else "the test split"
    what = "Mean AUROC over labels" if own and is_macro(own[0].main) else "AUROC"
    caption = (
        f"{what} of {last} on {on}, mean over trainings, less that of {base} on the same rows. Intervals and p "
        f"(two-sided; Holm-adjusted over all {max(len(found) - 1, 1)} comparisons of the table) are Student's, over "
        "subjects and, where there are several, over trainings. "
    )
    words = command_line("compare", folder, "--table", "--with", "METHOD")
    few = any(claim == "one run" for claim in found["claim"].dropna())
    note = (
        "With fewer than three trainings each, a difference holds for these runs, not for the methods. " if few else ""
    )
    names = list(next(iter(axes.values()), {}))
    columns = ["", *names, "AUROC", f"minus {base}", "p", "p (Holm)", "trainings"]
    body = table(columns, cells, class_="measures")
    key = key_of("grid", folder.name)
    out = [figure(f"{key}-table", folder.resolve().name, body, caption, note=f"{note}Another baseline: {words}.")]
    if rows:
        label = f"difference in AUROC from {base}"
        drawing = both_widths(lambda w: forest(rows, {0: "difference"}, w, chance=0.0, x_label=label))
        caption = "An interval that crosses the dashed line shows no difference; p is Holm-adjusted."
        out.insert(0, figure(key, f"Differences from {base}", drawing, caption, body))
    return out


def axes_of(about: dict[str, Any], names: Sequence[str]) -> dict[str, dict[str, str]]:
    """Method -> axis -> choice, without axes in which its combinations differ (seeds); {} in older grids."""
    found: dict[str, dict[str, str]] = {}
    for name in names:
        choices = {str(k): str(v) for k, v in part(part(about, "axes"), name).items()}
        method = str(about["methods"][name])
        before = found.setdefault(method, choices)
        found[method] = {axis: choice for axis, choice in before.items() if choices.get(axis) == choice}
    kept = [axis for axis in next(iter(found.values()), {}) if all(axis in own for own in found.values())]
    return {method: {axis: own[axis] for axis in kept} for method, own in found.items()}


def _p(p: Any) -> str:
    return "" if p is None or np.isnan(p) else f"p = {fixed(p)}" if p >= 0.001 else "p < 0.001"
