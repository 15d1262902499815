"""`ehr-msn report RUN [RUN ...] --out FILE`: one self-contained HTML page for any set of runs.

Input: run folders of pretraining, probes and fusion, and the features folder that their configs name. Output: a
file that loads nothing, needs no script, prints, and fits a phone. A part without data is left out, or says so.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from markupsafe import Markup

from ehr_features.demo.beside import truth_of
from ehr_features.files import check_new_file, new_file
from ehr_features.progress import Bar
from ehr_features.typed.shapes import Truth
from finetune.compare import Drawn
from finetune.names import counted, named
from finetune.report import checklist, cohort, curves, grids, groups, pairs, results, training
from finetune.report.alerts import alerts
from finetune.report.html import fixed, join, number, page, render, section, table
from finetune.report.verdict import Lead, lead, verdicts
from finetune.run_folders import Run, part, read_object, read_runs

EXPLAINED = (
    "AUROC: how often a model ranks a patient with the outcome above one without it; 0.5 is chance, 1 is always. "
    "In brackets 95% intervals, from resampling subjects."
)
SYNTHETIC = "Synthetic data: nothing here says anything about patients."


def report(
    runs: Sequence[str | Path], out: str | Path, *, with_films: bool = False, truth: str | Path | None = None
) -> Path:
    """Write the page.

    Args:
        runs: run folders, or folders that hold run folders.
        out: the .html file.
        with_films: also show films (never for a page that leaves the institution: MIMIC must not).
        truth: truth.json of a synthetic hospital; looked for beside the tables if None.
    Returns: out.
    Raises: UserError: a folder is no run, or a file in it is damaged.
    """
    check_new_file(out)
    read = named(read_runs(runs))
    known = _truth(read, truth)
    tasks = results.by_task(read)
    drawn = Drawn(next((run.folder.parent / "cache" for run in read if run.predicted), None))
    parts: list[tuple[str, str, Callable[[], Markup]]] = [
        ("summary", "At a glance", lambda: _summary(read, known)),
        ("grid", "The grid", lambda: grids.grids_section(read, drawn)),
        ("data", "Data", lambda: cohort.cohort_section(read)),
        ("pretraining", "Pretraining", lambda: training.curves_section(read)),
        *[(results.key_of("task", t), _short(t), partial(_task, t, own, known, drawn)) for t, own in tasks.items()],
        ("encoder", "What it sees", lambda: _encoder(read, with_films)),
        ("checklist", "Checklist", lambda: checklist.checklist_section(read)),
        ("provenance", "Provenance", lambda: _provenance(read)),
    ]
    sections = []
    with Bar("report", len(parts), "parts") as bar:
        for key, name, build in parts:
            sections.append((key, name, build()))
            bar.advance(note=name)
    made = datetime.datetime.now(datetime.UTC).strftime("%d %B %Y, %H:%M UTC").lstrip("0")
    foot = f"Made {made} by EHR-MSN from {len(read)} runs. Nothing in this file is loaded from elsewhere."
    said = verdicts(read, known, drawn)
    head = _head(read, known, with_films, said)
    text = page(f"{said[0]} EHR-MSN report" if said else "EHR-MSN report", head, sections, foot)
    with new_file(out) as file:
        file.write_text(text, encoding="utf-8")
    return Path(out)


def _truth(runs: Sequence[Run], given: str | Path | None) -> dict[str, Any]:
    """truth.json of a synthetic hospital; {} for real data."""
    if given is not None:
        return read_object(Path(given), Truth)
    return next((truth for folder in cohort.folders(runs) if (truth := truth_of(folder))), {})


def _head(runs: Sequence[Run], truth: dict[str, Any], with_films: bool, said: Sequence[str]) -> Markup:
    """The main results in sentences, the first as the title; without any, what the page holds."""
    counts = {
        "pretrained encoder": len(training.pretrained(runs)),
        "probe": sum(run.task == "findings" for run in runs),
        "fusion run": sum(run.kind == "evaluation" and run.task != "findings" for run in runs),
    }
    what = ", ".join(f"{n} {name}{'s' if n > 1 else ''}" for name, n in counts.items() if n) or "no finished run"
    what = what[0].upper() + what[1:]
    title, on = _split(said[0]) if said else (what, "")
    lines = [EXPLAINED] if any(run.kind == "evaluation" for run in runs) else []
    lines += [SYNTHETIC if truth else "Results are those of the test split, read once.", f"{what}." if said else ""]
    tasks = sorted(results.by_task(runs).items(), key=lambda item: item[0].startswith("findings"))  # as the sentences
    tiles = [tile for task, own in tasks if (tile := _tile(task, own, truth))]
    more = [_split(line) for line in said[1:]]
    warnings = alerts(runs, films=with_films and not truth)
    return render("header", title, on, more, " ".join(filter(None, lines)), warnings, tiles)


def _split(sentence: str) -> tuple[str, str]:
    """A sentence of `verdicts`, and its last brackets: the metric and the rows."""
    said, _, on = re.sub(r"-(?=\d\.)", "−", sentence).removesuffix(".").rpartition(" (")
    return said, on.removesuffix(")")


def _tile(task: str, runs: Sequence[Run], truth: dict[str, Any]) -> dict[str, Any] | None:
    """What the user trained for a task as one large number, with its baselines on the same rows."""
    found = lead(task, runs) or Lead(next((run for run in runs if run.headline()), runs[0]), [])
    head = found.run.headline(subset=found.subset)
    if head is None:
        return None
    best = results.possible(truth, task, str(head["label"]), found.run, found.subset)
    beside = [(run.called, run.headline(subset=found.subset)) for run in found.baselines]
    what = "AUROC" if found.run.main != "macro" else "mean AUROC"
    between = f"{number(head['low'])} to {number(head['high'])}" if number(head["low"]) != "–" else ""
    return {
        "task": results.title(task),
        "value": fixed(head["value"]),
        "of": between + (f" · possible {number(best)}" if best else ""),
        "name": found.run.called,
        "beside": [(name, fixed(h["value"])) for name, h in beside if h and h["n"] == head["n"]],
        "on": f"{what}, test split: {counted(found.run, head, found.subset)}",
    }


def _summary(runs: Sequence[Run], truth: dict[str, Any]) -> Markup:
    """Every evaluated run in one row, task by task; on the rows of the tiles and sentences above."""
    tasks = results.by_task(runs)
    figures = [results.overview_figure(task, chosen, truth, _subset(task, chosen)) for task, chosen in tasks.items()]
    return section("summary", "Results at a glance", figures, lead=results.CAUTION)


def _subset(task: str, runs: Sequence[Run]) -> str:
    """The test rows of the main result: `paired` where the film is one of the inputs."""
    found = lead(task, runs)
    return found.subset if found else "all"


def _task(task: str, runs: Sequence[Run], truth: dict[str, Any], drawn: Drawn) -> Markup:
    other = "all" if _subset(task, runs) == "paired" else "paired"  # the summary has the first
    parts = [
        results.overview_figure(task, runs, truth, subset=other),
        results.overview_figure(task, runs, truth, split="test_radiologist"),
        pairs.pairs_figure(task, runs, drawn=drawn),
        pairs.adds_figure(task, runs),
        results.labels_figure(task, runs, truth),
        curves.curves_figure(task, runs),
        groups.fraction_figure(task, runs),
        groups.subgroups_figure(task, runs),
        groups.poorer_figure(task, runs),
        groups.shift_figure(task, runs),
        groups.measures_figure(task, runs),
    ]
    return section(results.key_of("task", task), results.title(task), parts)


def _encoder(runs: Sequence[Run], with_films: bool) -> Markup:
    """The encoder section, if torch, the store and the weights are available."""
    if not any(run.kind == "pretraining" and run.encoder and run.store and run.features for run in runs):
        return Markup("")
    from finetune.report.films import films_section

    return films_section(runs, with_films=with_films)


def _provenance(runs: Sequence[Run]) -> Markup:
    """What made each run: when, with which versions and command, and its config."""
    blocks = []
    for run in runs:
        made = run.provenance
        versions = ", ".join(f"{name} {version}" for name, version in part(made, "versions").items())
        facts = {"folder": run.folder.as_posix(), "written": made.get("written_at"), "command": made.get("command")}
        facts |= {"finished": made.get("finished_at"), "versions": versions}
        rows = [[name, render("span", "mono", str(value))] for name, value in facts.items() if value]
        config = yaml.safe_dump(run.config, sort_keys=False)
        blocks.append(
            render("provenance", run.called, f"{run.name}, {run.task or run.kind}", table(["", ""], rows), config)
        )
    lead = "What made these runs. The same config and seed on the same versions give the same numbers."
    return section("provenance", "Provenance", render("div", "card", join(blocks)), lead=lead)


def _short(task: str) -> str:
    """A task's name for the list of contents."""
    name = task.removesuffix(results.APART)
    short = {"findings": "Linear evaluation"}.get(name, name.replace("_", " ").capitalize())
    return short + (" (outcome-supervised)" if name != task else "")
