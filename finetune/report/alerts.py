"""Warnings above the numbers: leaks, outcome-supervised or unknown encoders, collapse, few positives.

Input: runs. Output: a list for the top of the page.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from markupsafe import Markup

from finetune.report.html import render, told
from finetune.report.results import by_task, title
from finetune.report.training import collapse
from finetune.run_folders import Run, plain

FEW = 20  # positives (or negatives) under which an AUROC says little
FILMS = "shows films: under MIMIC's data use agreement it must not be passed on."
NAMED = 6  # labels with few positives that a warning names
CALM = (
    "No warnings: no leak override, no encoder of unknown films, no sign of collapse, enough of both classes for all "
    "labels."
)


def alerts(runs: Sequence[Run], *, films: bool = False) -> Markup:
    """The warnings as a list, the grave ones first; equal ones of several runs in one line.

    Args:
        films: whether the page shows films of patients.
    """
    merged: dict[tuple[bool, str], list[str]] = {(True, FILMS): ["This page"]} if films else {}
    for grave, says, name in [*_of_runs(runs), *_few(runs)]:
        merged.setdefault((grave, says), []).append(name)
    if not merged:
        return render("paragraph", "fine", CALM)
    items = [
        (grave, ", ".join(names), f" {says}" if says == FILMS else f": {says}")
        for (grave, says), names in sorted(merged.items(), key=lambda item: not item[0][0])
    ]
    return render("alerts", items)


def _of_runs(runs: Sequence[Run]) -> Iterator[tuple[bool, str, str]]:
    """(grave, text, run) of each warning in results.json or derived from the curves."""
    for run in runs:
        if run.result.get("allow_leak"):
            yield (
                True,
                "the guard against leaks was switched off (allow_leak); its numbers may be too good.",
                run.called,
            )
        for warning in run.result.get("warnings", []):
            yield "leak" in str(warning).lower(), str(warning), run.called
        for sign in collapse(run):
            yield True, f"{sign}.", run.called
        if (below := _below_random(run, runs)) is not None:
            yield True, below, run.called
        if run.kind == "unfinished":
            yield False, "holds no results yet.", run.called


def _below_random(run: Run, runs: Sequence[Run]) -> str | None:
    """A warning if a pretrained encoder's interval lies wholly below that of random weights on the same task."""
    own = run.headline() if run.result.get("supervision") in ("self-supervised", "outcome-supervised") else None
    for other in runs:
        if own and other.task == run.task == "findings" and str(other.result.get("encoder")).startswith("random:"):
            floor = other.headline()
            if floor and own["high"] is not None and own["high"] < floor["low"]:
                return f"reads findings worse than random weights ({other.called}): its pretraining has not worked."
    return None


def _few(runs: Sequence[Run]) -> Iterator[tuple[bool, str, str]]:
    """A warning for each task that has labels with few rows of one class in the test split."""
    for task, chosen in by_task(runs).items():
        least: dict[str, int] = {}
        for run in chosen:
            rows = plain(run.rows)
            rows = rows[(rows["metric"] == "auroc") & rows["label"].isin(run.labels)]
            for label, n, positives in zip(rows["label"], rows["n"], rows["positives"], strict=True):
                rare = int(min(positives, n - positives))
                least[label] = min(rare, least.get(label, rare))
        few = sorted((label for label, count in least.items() if count < FEW), key=lambda label: least[label])
        if few:
            named = ", ".join(f"{told(label)} ({least[label]})" for label in few[:NAMED])
            more = f" and {len(few) - NAMED} more of {len(least)} labels" if len(few) > NAMED else ""
            yield False, f"fewer than {FEW} rows of one class in the test split: {named}{more}.", title(task)
