"""The report's main results: the runs of each task side by side, with intervals and the possible values.

Input: evaluated runs. Output: a section for each task. Values and intervals are those of results.json.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import pandas as pd
from markupsafe import Markup

from finetune.names import counted, unit
from finetune.report.figures import legend
from finetune.report.forest import Row, forest
from finetune.report.html import both_widths, figure, frame, interval, join, table, told
from finetune.run_folders import Run, is_macro, plain

OWN = "counts differ"  # in place of counts, where the runs' differ
SIDE_BY_SIDE = 8  # runs in one block of a forest
CAUTION = (
    "Each run on its test split, with 95% intervals over subjects. One interval above another does not show that two "
    "runs differ, nor overlap that they are equal: the paired differences further down do."
)
COLUMNS = (
    *("model", "folder", "kind", "encoder", "AUROC", "AUPRC", "n", "positives", "possible"),
    *("parameters", "film size", "films seen"),
)
APART = ", outcome-supervised"
WHERE = {"paired": "test stays with a film", "test_radiologist": "the radiologists' own labels"}
TASKS = {
    "findings": "Linear evaluation: findings from the film",
    "mortality": "Death in hospital, from the first 48 hours",
    "radiology": "Findings, from the record and the film",
    "phenotypes": "Phenotypes of the whole stay (retrospective)",
    "phenotypes_early": "Phenotypes, from the first hours",
    "decompensation": "Decompensation: death within 24 hours, every hour",
    "length_of_stay": "Remaining length of stay",
}


def by_task(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Evaluated runs of each task, findings first; those of outcome-supervised encoders under a task of their own."""
    tasks: dict[str, list[Run]] = {}
    for run in runs:
        if run.kind == "evaluation":
            apart = APART if run.result.get("supervision") == "outcome-supervised" else ""
            tasks.setdefault(run.task + apart, []).append(run)
    known = [name + apart for name in TASKS for apart in ("", APART)]
    return dict(sorted(tasks.items(), key=lambda item: known.index(item[0]) if item[0] in known else len(known)))


def title(task: str) -> str:
    """A task's name for a heading."""
    name = task.removesuffix(APART)
    return TASKS.get(name, name.replace("_", " ").capitalize()) + (f" ({APART[2:]} encoders)" if name != task else "")


def labels(runs: Sequence[Run]) -> list[str]:
    """The labels of the runs in their order, without means."""
    return list(dict.fromkeys(label for run in runs for label in run.labels))


def _valued(runs: Sequence[Run], split: str) -> list[str]:
    """The labels of which an AUROC of the split is known: both classes are there."""
    of = {
        str(x)
        for run in runs
        for x in plain(run.rows, split=split).query("metric == 'auroc'").dropna(subset="value")["label"]
    }
    return [label for label in labels(runs) if label in of]


def possible(truth: dict[str, Any], task: str, label: str, run: Run | None = None, subset: str = "all") -> float | None:
    """The generator's Bayes-optimal AUROC of a label, for what the run's model sees."""
    task = task.removesuffix(APART)
    bayes = truth.get("bayes", {}).get(task)
    if not isinstance(bayes, dict):
        return None
    if task == "findings":
        values = [v for name in (run.labels if run else bayes) if isinstance(v := bayes.get(name), (int, float))]
        best = sum(values) / len(values) if label == "macro" and values else bayes.get(label)
        return float(best) if isinstance(best, (int, float)) else None
    groups = bayes.get("groups", {})
    found = groups.get(label.removeprefix("phenotype_"), bayes.get("macro" if label == "macro" else label, bayes))
    if subset == "all" and isinstance(found.get("all"), dict):  # over stays without a film too
        found = found | found["all"]
    model = str(run.result.get("model") if run else "")
    value = found.get("record" if model.startswith("record") else "film" if model.startswith("film") else "both")
    return float(value) if isinstance(value, (int, float)) else None


def overview_figure(
    task: str, runs: Sequence[Run], truth: dict[str, Any], subset: str = "all", split: str = "test"
) -> Markup | None:
    """A row for each run: the macro AUROC, or that of the only label; on all test rows or some of them."""
    rows, cells = [], []
    for i, run in enumerate(runs):
        head = run.headline("auroc", subset, split)
        precision = run.headline("auprc", subset, split) or {}
        if head is None:
            continue
        remark = counted(run, head, subset)
        best = possible(truth, task, str(head["label"]), run, subset)
        rows.append(Row(run.called, [(i, head["value"], head["low"], head["high"])], remark, best))
        auroc, auprc = (interval(h.get("value"), h.get("low"), h.get("high")) for h in (head, precision))
        about = run.result.get("compared_by") or {}
        size = [about.get(key) for key in ("parameters", "image_size", "films_seen")]
        cells.append(
            [
                run.called,
                run.name,
                model_of(run),
                encoder_of(run),
                auroc,
                auprc,
                head["n"],
                head["positives"],
                best,
                *size,
            ]
        )
    if not rows:
        return None
    names = {i: run.called for i, run in enumerate(runs)}
    drawing = both_widths(lambda width: forest(rows, names, width))
    part = WHERE.get(subset if split == "test" else split)
    several = len(labels(runs)) > 1
    what = f"Mean AUROC over {len(_valued(runs, split))} labels" if several else "AUROC"
    where = part or f"all test {unit(runs[0])}"
    caption = f"{what} on {where}{'' if several else ' (under each name, how many of them have the outcome)'}; "
    caption += "the dashed line is chance."
    if any(row.best for row in rows):
        caption += " Dotted: the best that is possible for what the model sees, known as the data is synthetic."
    if len({cell[6] for cell in cells}) > 1:
        caption += (
            " Not all runs were scored on the same rows: compare those with equal counts, or the figures further down."
        )
    caption += lacking(rows)
    given = [i for i in range(len(COLUMNS)) if any(cell[i] is not None for cell in cells)]
    numbers = table([COLUMNS[i] for i in given], [[cell[i] for i in given] for cell in cells])
    parted = part or any(run.headline(subset="paired") for run in runs)
    heading = f"{title(task)}: {where}" if parted else title(task)
    key = key_of("overview", f"{task} {part}" if part else task)
    return figure(key, heading, drawing, caption, numbers)


def lacking(rows: Sequence[Row]) -> str:
    """A sentence on points without an interval, where there are any."""
    missing = any(low is None or pd.isna(low) for row in rows for _, _, low, _ in row.points)
    return " A point without a bar has no interval: too few rows of one class." if missing else ""


def key_of(kind: str, task: str) -> str:
    return f"{kind}-{re.sub('[^a-z0-9]+', '-', task.lower())}"


def labels_figure(task: str, runs: Sequence[Run], truth: dict[str, Any]) -> Markup | None:
    """A block for each label, a line in it for each run."""
    names_of = labels(runs)
    if len(names_of) < 2:
        return None
    shown = list(runs)[:SIDE_BY_SIDE]
    rows, cells = [], []
    means = [label for label in dict.fromkeys(str(x) for run in runs for x in run.rows["label"]) if is_macro(label)]
    for label in [*means, *names_of]:
        points, remarks = [], set()
        for i, run in enumerate(runs):
            row = run.row(label)
            if row is None:
                cells.append([told(label), run.called, "–", _why_not(run, label), None, None])
                continue
            cells.append(
                [
                    told(label),
                    run.called,
                    interval(row["value"], row["low"], row["high"]),
                    "",
                    row["n"],
                    row["positives"],
                ]
            )
            if run in shown:
                points.append((i, row["value"], row["low"], row["high"]))
                remarks |= set() if is_macro(label) else {f"{row['positives']:,.0f} of {row['n']:,.0f}"}
        if points:
            remark = remarks.pop() if len(remarks) == 1 else OWN if remarks else ""
            rows.append(Row(told(label), points, remark, possible(truth, task, label, runs[0]), strong=is_macro(label)))
    if not rows:
        return None
    names = {i: run.called for i, run in enumerate(shown)}
    drawing = join(
        [legend(list(names.items())) if len(names) > 1 else None, both_widths(lambda width: forest(rows, names, width))]
    )
    lost = sum(1 for cell in cells if cell[2] == "–")
    note = f"{lost} values are not defined (one class only in the test split); the table says which." if lost else None
    if len(runs) > len(shown):
        note = f"{note or ''} The first {len(shown)} of {len(runs)} runs are drawn; the table has all.".strip()
    caption = (
        "AUROC of each label with its 95% interval over subjects; under each name, how many of the labelled test "
        f"{unit(runs[0])} have it."
    )
    caption += lacking(rows)
    numbers = frame(pd.DataFrame(cells, columns=["label", "model", "AUROC", "why not", "n", "positives"]))
    return figure(key_of("labels", task), "Label by label", drawing, caption, numbers, note=note)


def _why_not(run: Run, label: str) -> str:
    rows = plain(run.rows)
    rows = rows[(rows["label"] == label) & (rows["metric"] == "auroc")]
    return str(rows.iloc[0]["reason"] or "") if len(rows) else "not evaluated"


def encoder_of(run: Run) -> str:
    """Which encoder a run was given, in few words."""
    text = str(run.result.get("encoder") or "no film").removesuffix("/").removesuffix("/encoder")
    return text.split(":")[0] if text.startswith("random:") else text.rsplit("/", 1)[-1]


def model_of(run: Run) -> str:
    """The model, and its control or number of seeds."""
    control = {"context": "no pixels", "another": "another's film"}.get(str(run.result.get("control")))
    seeds = f"{run.result['seeds']} seeds" if run.result.get("seeds", 1) > 1 else None
    return ", ".join(str(part) for part in (run.result.get("model"), control, seeds) if part)
