"""The report's results: runs side by side on each task, with intervals; what is possible; differences; subgroups.

Comes in: evaluated runs. Goes out: a section for each task. Values and intervals are those of results.json.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd

from finetune.report_data import Run, plain
from finetune.report_figures import Frame, Series, legend, panel
from finetune.report_forest import Row, forest
from finetune.report_html import Html, both_widths, figure, frame, interval, join, number, tag

FEW = 20  # positives (or negatives) under which an AUROC says little
SIDE_BY_SIDE = 8  # runs in one block of a forest
CAUTION = (
    "One interval above another does not show that two runs differ, nor overlap that they are equal; only a paired "
    "difference on the same rows, with its own interval, does."
)
TASKS = {
    "findings": "Linear evaluation: findings from the film",
    "mortality": "Death in hospital, from the first 48 hours",
    "phenotypes": "Phenotypes of the stay",
    "decompensation": "Decompensation",
    "length_of_stay": "Remaining length of stay",
}


def by_task(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Evaluated runs of each task, findings first."""
    tasks: dict[str, list[Run]] = {}
    for run in runs:
        if run.kind == "evaluation":
            tasks.setdefault(run.task, []).append(run)
    known = list(TASKS)
    return dict(sorted(tasks.items(), key=lambda item: known.index(item[0]) if item[0] in known else len(known)))


def title(task: str) -> str:
    return TASKS.get(task, task.replace("_", " ").capitalize())


def told(label: str) -> str:
    """A label for a reader."""
    return "All labels (macro)" if label == "macro" else label.replace("_", " ")


def labels(runs: Sequence[Run]) -> list[str]:
    """The labels of the runs in their order, without macro."""
    seen: dict[str, None] = {}
    for run in runs:
        seen |= dict.fromkeys(str(label) for label in plain(run.rows, "test")["label"])
    return [label for label in seen if label != "macro"]


def possible(truth: dict[str, Any], task: str, label: str, run: Run | None = None) -> float | None:
    """The generator's Bayes-optimal AUROC of a label, for what the run's model sees."""
    bayes = truth.get("bayes", {}).get(task)
    if not isinstance(bayes, dict):
        return None
    if task == "findings":
        values = [v for v in bayes.values() if isinstance(v, (int, float))]
        return bayes.get(label) if label != "macro" else (sum(values) / len(values) if values else None)
    model = (run.result.get("model") if run else "") or ""
    part = "record" if model.startswith("record") else "film" if model.startswith("film") else "both"
    found = bayes.get(label, bayes) if isinstance(bayes.get(label), dict) else bayes
    value = found.get(part)
    return float(value) if isinstance(value, (int, float)) else None


def overview_figure(task: str, runs: Sequence[Run], truth: dict[str, Any]) -> Html | None:
    """A row for each run: the macro AUROC, or that of the only label."""
    rows, cells = [], []
    for i, run in enumerate(runs):
        head = run.headline()
        if head is None:
            continue
        best = possible(truth, task, str(head["label"]), run)
        points = [(i % SIDE_BY_SIDE, head["value"], head["low"], head["high"])]
        rows.append(
            Row(
                run.name,
                points,
                f"{head['positives']:,.0f} of {head['n']:,.0f} positive"
                if head["label"] != "macro"
                else f"{head['n']:,.0f} rows",
                best,
            )
        )
        precision = run.headline("auprc") or {}
        cells.append(
            [
                run.name,
                run.result.get("model"),
                interval(head["value"], head["low"], head["high"]),
                interval(precision.get("value"), precision.get("low"), precision.get("high")),
                head["n"],
                head["positives"],
                best,
            ]
        )
    if not rows:
        return None
    names = {i % SIDE_BY_SIDE: run.name for i, run in enumerate(runs)}
    drawing = both_widths(lambda width: forest(rows, names, width))
    dotted = (
        " The dotted mark is the best that is possible for what the model sees, known since the data is synthetic."
        if any(r.best for r in rows)
        else ""
    )
    what = "macro AUROC over the labels" if len(labels(runs)) > 1 else "AUROC"
    caption = (
        f"Each run's {what} on the test split with its 95% interval over subjects; the dashed line is chance.{dotted}"
    )
    numbers = frame(pd.DataFrame(cells, columns=["run", "model", "AUROC", "AUPRC", "n", "positives", "possible"]))
    return figure(
        f"overview-{task}", "Runs side by side", drawing, caption, numbers, note=CAUTION if len(rows) > 1 else None
    )


def labels_figure(task: str, runs: Sequence[Run], truth: dict[str, Any]) -> Html | None:
    """A block for each label, a line in it for each run."""
    names_of = labels(runs)
    if len(names_of) < 2:
        return None
    shown = list(runs)[:SIDE_BY_SIDE]
    rows, cells = [], []
    for label in [*(["macro"] if any(run.row("macro") for run in runs) else []), *names_of]:
        points, remark = [], ""
        for i, run in enumerate(runs):
            row = run.row(label)
            if row is None:
                cells.append([told(label), run.name, "–", _why_not(run, label), None, None])
                continue
            cells.append(
                [told(label), run.name, interval(row["value"], row["low"], row["high"]), "", row["n"], row["positives"]]
            )
            if run in shown:
                points.append((i, row["value"], row["low"], row["high"]))
                remark = f"{row['positives']:,.0f} of {row['n']:,.0f}" if label != "macro" else remark
        if points:
            rows.append(Row(told(label), points, remark, possible(truth, task, label), strong=label == "macro"))
    if not rows:
        return None
    names = {i: run.name for i, run in enumerate(shown)}
    drawing = join(
        [legend(list(names.items())) if len(names) > 1 else None, both_widths(lambda width: forest(rows, names, width))]
    )
    lost = sum(1 for cell in cells if cell[2] == "–")
    note = f"{lost} values are not defined (one class only in the test split); the table says which." if lost else None
    if len(runs) > len(shown):
        note = f"{note or ''} The first {len(shown)} of {len(runs)} runs are drawn; the table has all.".strip()
    caption = (
        "AUROC of each label with its 95% interval over subjects; under each name, positives of labelled test rows."
    )
    numbers = frame(pd.DataFrame(cells, columns=["label", "run", "AUROC", "why not", "n", "positives"]))
    return figure(f"labels-{task}", "Label by label", drawing, caption, numbers, note=note)


def _why_not(run: Run, label: str) -> str:
    rows = plain(run.rows, "test")
    rows = rows[(rows["label"] == label) & (rows["metric"] == "auroc")]
    return str(rows.iloc[0]["reason"] or "") if len(rows) else "not evaluated"


def few_positives(run: Run) -> list[str]:
    """Labels of the test split with under FEW positives or negatives."""
    rows = plain(run.rows, "test")
    rows = rows[(rows["metric"] == "auroc") & (rows["label"] != "macro")]
    few = rows[(rows["positives"] < FEW) | (rows["n"] - rows["positives"] < FEW)]
    return [f"{told(str(r['label']))} ({min(r['positives'], r['n'] - r['positives'])})" for r in few.to_dict("records")]


def fraction_figure(task: str, runs: Sequence[Run]) -> Html | None:
    """AUROC against the share of labelled training subjects."""
    lines, cells = [], []
    for i, run in enumerate(runs):
        rows = run.rows[(run.rows["split"] == "test") & (run.rows["subset"] == "all") & (run.rows["metric"] == "auroc")]
        label = "macro" if (rows["label"] == "macro").any() else next(iter(rows["label"]), None)
        rows = rows[(rows["label"] == label) & rows["value"].notna()].sort_values("fraction")
        if rows["fraction"].nunique() < 2:
            continue
        low, high = (list(rows[c]) if rows[c].notna().all() else None for c in ("low", "high"))
        lines.append(Series(run.name, list(100 * rows["fraction"]), list(rows["value"]), i, low, high, marks=True))
        cells += [
            [run.name, f"{100 * r['fraction']:g}%", interval(r["value"], r["low"], r["high"]), r["n"]]
            for r in rows.to_dict("records")
        ]
    if not lines:
        return None
    drawing = both_widths(
        lambda width: panel(
            lines,
            Frame("% of training subjects with labels", "AUROC", log_x=True, labels=width > 500),
            width=width,
            height=300,
        )
    )
    caption = (
        "What each encoder reaches with few labels: the higher on the left, the less it needs. Bands are 95% intervals."
    )
    names = tag("div", legend([(line.index, line.name) for line in lines]), class_="narrow")
    numbers = frame(pd.DataFrame(cells, columns=["run", "labelled subjects", "AUROC", "n"]))
    return figure(f"fractions-{task}", "With few labels", join([names, drawing]), caption, numbers)


def subgroup_figure(task: str, run: Run) -> Html | None:
    """One run's AUROC in each subgroup, and the largest gap."""
    rows = run.rows[(run.rows["split"] == "test") & (run.rows["metric"] == "auroc") & run.rows["value"].notna()]
    label = "macro" if (rows["label"] == "macro").any() else next(iter(rows["label"]), None)
    rows = rows[(rows["label"] == label) & (rows["fraction"] == rows["fraction"].max())]
    parts = rows[rows["subset"] != "all"].to_dict("records")
    if not parts:
        return None
    whole = rows[rows["subset"] == "all"].to_dict("records")
    listed = [
        Row(
            "all" if r["subset"] == "all" else r["subset"].replace("=", ": "),
            [(0, r["value"], r["low"], r["high"])],
            f"{r['positives']:,} of {r['n']:,}",
            strong=r["subset"] == "all",
        )
        for r in [*whole, *parts]
    ]
    gaps = []
    for field in dict.fromkeys(str(r["subset"]).partition("=")[0] for r in parts):
        values = sorted((r["value"], r["subset"]) for r in parts if r["subset"].startswith(field + "="))
        if len(values) > 1:
            gaps.append((values[-1][0] - values[0][0], values[0][1], values[-1][1]))
    note = None
    if gaps:
        gap, worst, best = max(gaps)
        note = f"The largest gap is {number(gap)}, between {worst} and {best}. Small groups also differ by chance."
    cells = [[r["subset"], interval(r["value"], r["low"], r["high"]), r["n"], r["positives"]] for r in [*whole, *parts]]
    numbers = frame(pd.DataFrame(cells, columns=["subset", "AUROC", "n", "positives"]))
    caption = f"{told(str(label))}: AUROC of {run.name} within each group, with its 95% interval over subjects."
    return figure(
        f"subgroups-{task}-{run.name}",
        f"Subgroups: {run.name}",
        both_widths(lambda w: forest(listed, {0: run.name}, w)),
        caption,
        numbers,
        note=note,
    )


def encoder_of(run: Run) -> str:
    """Which encoder a run was given, in few words."""
    given = run.result.get("encoder") or run.config.get("encoder") or "none"
    text = str(given).removesuffix("/").removesuffix("/encoder")
    return text.rsplit("/", 1)[-1] if not text.startswith(("random:", "pixels")) else text.split(":")[0]
