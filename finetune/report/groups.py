"""The report's further results: label fractions, subgroups, reduced inputs, shifts, other metrics.

Input: evaluated runs of one task. Output: figures; None where the runs do not have it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pandas as pd
from markupsafe import Markup

from finetune.names import counted
from finetune.report.figures import Frame, Series, legend, panel
from finetune.report.forest import Row, forest
from finetune.report.html import both_widths, figure, frame, interval, join, metric, number, render, table
from finetune.report.results import OWN, SIDE_BY_SIDE, key_of, lacking
from finetune.run_folders import Run, is_macro, plain

BANDS = 4  # most lines that are drawn with bands


def fraction_figure(task: str, runs: Sequence[Run]) -> Markup | None:
    """AUROC against the share of labelled training subjects."""
    lines, cells = [], []
    for i, run in enumerate(runs):
        rows = run.rows[(run.rows["split"] == "test") & (run.rows["subset"] == "all") & (run.rows["metric"] == "auroc")]
        rows = rows[(rows["label"] == run.main) & rows["value"].notna()].sort_values("fraction")
        if rows["fraction"].nunique() < 2:
            continue
        low, high = (list(rows[c]) if rows[c].notna().all() else None for c in ("low", "high"))
        lines.append(Series(run.called, list(100 * rows["fraction"]), list(rows["value"]), i, low, high, marks=True))
        cells += [
            [run.called, f"{100 * r['fraction']:g}%", interval(r["value"], r["low"], r["high"]), r["n"]]
            for r in rows.to_dict("records")
        ]
    if len(lines) > BANDS:
        lines = [replace(line, low=None, high=None) for line in lines]
    if not lines:
        return None
    shares = sorted({x for line in lines for x in line.x})
    drawing = both_widths(
        lambda width: panel(
            lines,
            Frame("% of training subjects with labels", "AUROC", log_x=True, ticks_x=shares),
            width=width,
            height=300,
        )
    )
    caption = (
        "What each encoder reaches with few labels: the higher on the left, the less it needs. Bands, where few "
        "runs are drawn, are 95% intervals over subjects."
    )
    names = legend([(line.index, line.name) for line in lines])
    numbers = frame(pd.DataFrame(cells, columns=["model", "labelled subjects", "AUROC", "n"]))
    return figure(key_of("fractions", task), "With few labels", join([names, drawing]), caption, numbers)


def subgroups_figure(task: str, runs: Sequence[Run]) -> Markup | None:
    """AUROC in each subgroup, runs side by side, and the largest gap of each run."""
    found = [s for s in _subsets(runs) if "=" in s]
    fields = list(dict.fromkeys(s.split("=")[0] for s in found))
    wanted = sorted(found, key=lambda s: (fields.index(s.split("=")[0]), not s.split("=", 1)[1].startswith("under")))
    caption = "AUROC within each group, with its 95% interval over subjects. Small groups differ by chance too."
    gaps = [[run.called, gap] for run in runs if (gap := largest_gap(run))]
    more = table(["model", "largest gap in AUROC (95% interval)"], gaps) if gaps else None
    return _groups_figure(key_of("subgroups", task), "Subgroups", runs, ["all", *wanted], caption, more=more)


def poorer_figure(task: str, runs: Sequence[Run]) -> Markup | None:
    """The same models and stays with reduced inputs: without films, or with a shortened series."""
    known = ("all", "paired")
    wanted = [s for s in _subsets(runs) if s not in known and not any(part in s for part in ("=", " -> ", ", less "))]
    caption = (
        "The same trained models on the same test stays, with less to see than they were trained with. A model that "
        "stays where it was did not use what was taken away."
    )
    return _groups_figure(key_of("poorer", task), "With and without", runs, ["all", *wanted], caption)


def shift_figure(task: str, runs: Sequence[Run]) -> Markup | None:
    """Trained on some groups, tested on others."""
    wanted = [s for s in _subsets(runs) if " -> " in s]
    caption = (
        "Trained on the group before the arrow, tested on that after it. A probe that falls where the group changes "
        "leans on something that only its own group has."
    )
    said = [(run.called, run.result.get("shift")) for run in runs]
    note = "; ".join(
        f"{name}: {shift['says']}" for name, shift in said if isinstance(shift, dict) and shift.get("says")
    )
    return _groups_figure(
        key_of("shift", task), "From one group to another", runs, ["", *wanted], caption, note=note or None
    )


def _subsets(runs: Sequence[Run]) -> list[str]:
    return list(dict.fromkeys(str(s) for run in runs for s in run.rows.loc[run.rows["split"] == "test", "subset"]))


def _groups_figure(
    key: str,
    heading: str,
    runs: Sequence[Run],
    subsets: Sequence[str],
    caption: str,
    *,
    note: str | None = None,
    more: Markup | None = None,
) -> Markup | None:
    """A block for each subset, in it a line for each run; None where there is none but the first."""
    if len(subsets) < 2:
        return None
    able = [(i, run) for i, run in enumerate(runs) if any(run.headline(subset=s) for s in subsets[1:])]
    shown = able[:SIDE_BY_SIDE]
    rows, cells = [], []
    for subset in filter(None, subsets):
        points, remarks = [], set()
        for i, run in shown:
            row = run.headline(subset=subset)
            if row is None:
                continue
            points.append((i, row["value"], row["low"], row["high"]))
            remarks.add(counted(run, row, subset))
            auroc = interval(row["value"], row["low"], row["high"])
            cells.append([subset, run.called, auroc, row["n"], row["positives"]])
        if points:
            remark = remarks.pop() if len(remarks) == 1 else OWN
            rows.append(Row(_group(subset), points, remark, strong=subset == "all"))
    if not rows:
        return None
    names = {i: run.called for i, run in shown}
    shared = legend(list(names.items())) if len(runs) > 1 else None
    drawing = join([shared, both_widths(lambda width: forest(rows, names, width))])
    numbers = frame(pd.DataFrame(cells, columns=["group", "model", "AUROC", "n", "positives"]))
    return figure(key, heading, drawing, caption + lacking(rows), join([more, numbers]), note=note)


def measures_figure(task: str, runs: Sequence[Run]) -> Markup | None:
    """What AUROC does not say: precision, calibration, thresholds; kappa and hours of a length of stay."""
    found: dict[str, dict[str, Markup]] = {}
    for run in runs:
        for row in plain(run.rows).to_dict("records"):
            if row["metric"] != "auroc" and row["label"] in (run.main, "los_hours") and pd.notna(row["value"]):
                spread = None if pd.isna(row["low"]) else f"{number(row['low'])} to {number(row['high'])}"
                cell = render("with_spread", number(row["value"]), spread)
                found.setdefault(str(row["metric"]), {})[run.called] = cell
    if not found:
        return None
    several = any(is_macro(run.main) for run in runs)
    caption = (
        f"{'Means over the labels' if several else 'Values'} on the test split with 95% intervals over subjects. Lower "
        "is better for Brier score and calibration error; a calibration slope under 1 means probabilities that are "
        "too extreme; read AUPRC against the prevalence. F1, sensitivity and specificity take the threshold of "
        "validation's largest F1."
    )
    shown = [run.called for run in runs if any(run.called in cells for cells in found.values())]
    rows = [[metric(name), *[cells.get(run, "–") for run in shown]] for name, cells in found.items()]
    body = table(["", *shown], rows, class_="measures")
    return figure(key_of("measures", task), "Other measures", body, caption)


def largest_gap(run: Run) -> str | None:
    """The largest difference between two groups, with its interval, where the run computed it."""
    gaps = [g for g in run.result.get("gaps") or [] if isinstance(g, dict) and g.get("difference") is not None]
    if not gaps:
        return None
    gap = max(gaps, key=lambda g: float(g["difference"]))
    value = interval(gap["difference"], gap.get("low"), gap.get("high"))
    return f"{value} between {gap['higher']} and {gap['lower']} ({_group(str(gap['field']))})"


def _group(subset: str) -> str:
    """`age=under 40` for a reader."""
    return subset.replace("_", " ").replace("=", ": ", 1).replace(" -> ", " → ")
