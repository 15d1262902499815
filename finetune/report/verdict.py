"""The main results as sentences, each from a paired difference on the same test rows with its interval.

Input: evaluated runs, with the pretrainings behind them. Output: sentences for the report's head and the terminal. The
interval decides the verb: `beats`, `is level with` (it holds 0), `stays behind`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import pandas as pd

from finetune.compare import Drawn
from finetune.names import unit
from finetune.report.pairs import compare
from finetune.report.results import by_task, possible
from finetune.run_folders import Run

OUTCOMES = {"mortality": "death in hospital", "phenotypes": "phenotypes", "phenotypes_early": "phenotypes"}
OUTCOMES |= {"decompensation": "death within 24 hours", "length_of_stay": "the remaining length of stay"}


class Gap(NamedTuple):
    """A paired difference of AUROC with its interval, and the number of test rows."""

    value: float
    low: float
    high: float
    n: int


class Lead(NamedTuple):
    """What a user trained for a task, and what it is to be compared with."""

    run: Run
    baselines: list[Run]
    subset: str = "all"  # of the test rows: `paired` where the film is one of the inputs


Between = Callable[..., Gap | None]


def lead(task: str, runs: Sequence[Run]) -> Lead | None:
    """The trained model of a task, the best on validation if there are several, and its baselines."""
    able = [run for run in runs if run.headline() is not None and not _control(run)]
    if task.startswith("findings"):
        pretrained = [run for run in able if _about(run, "weights").startswith("step")]
        plain = [run for run in pretrained if not _about(run, "record")]
        found = best_on_validation([run for run in pretrained if run not in plain] or plain)
        if found is None:
            return None
        alike = [run for run in able if run.result.get("model") == found.result.get("model")]  # heads of one kind
        network = [run for run in alike if _about(run, "arch") == _about(found, "arch")]
        others = [
            r for r in network if r in plain and r is not found and _about(r, "method") == _about(found, "method")
        ]
        return Lead(found, [*others[:1], *filter(None, (_first(network, "random:"), _first(alike, "pixels")))])
    record, film = (
        best_on_validation([run for run in able if str(run.result.get("model")).startswith(kind)])
        for kind in ("record", "film")
    )
    alone = ("record", "film", "note")
    found = best_on_validation([run for run in able if not str(run.result.get("model")).startswith(alone)])
    if found is None:
        return None
    paired, every = found.headline(subset="paired"), found.headline()
    few = paired is None or (pd.isna(paired["low"]) and every is not None and pd.notna(every["low"]))
    return Lead(found, [run for run in (record, film) if run], "all" if few else "paired")


def best_on_validation(runs: Sequence[Run]) -> Run | None:
    """The run with the highest AUROC on validation, the first of equal ones; None of none."""

    def value(run: Run) -> float:
        head = run.row(run.main, split="val")
        return float(head["value"]) if head else 0.0

    return max(runs, key=value, default=None)


def verdicts(runs: Sequence[Run], truth: Mapping[str, Any] | None = None, drawn: Drawn | None = None) -> list[str]:
    """A sentence for each main question that these runs answer: fusion first, then the encoder.

    Args:
        runs: as read by `read_runs`.
        truth: truth.json of a synthetic hospital: the possible AUROC of an encoder is then said too.
        drawn: resamples of runs, read and filled.
    """
    between = partial(difference, drawn=Drawn() if drawn is None else drawn)
    fused, films = [], []
    for task, own in by_task(runs).items():
        able = [run for run in own if run.predicted and run.headline() is not None]
        if task == "findings":
            films += _films(able, dict(truth or {}), between)
        else:
            fused += _fusion(task, able, dict(truth or {}), between)
    return fused + films


def _films(runs: Sequence[Run], truth: dict[str, Any], between: Between) -> list[str]:
    """Pretrained encoders against random weights and pixels, with all and with few labels; with and without record."""
    found = lead("findings", runs)
    if found is None:
        return []
    main = found.run
    plain = [run for run in found.baselines if _about(run, "weights").startswith("step")]
    tuned = main.result.get("model") == "finetune"
    others = {
        "training from scratch" if tuned else "random weights": _first(found.baselines, "random:"),
        "raw 16x16 pixels": _first(found.baselines, "pixels"),
    }
    best = possible(truth, "findings", main.main, main)
    said = []
    for share in shares(main):
        gaps = [(name, d) for name, run in others.items() if run and (d := between([main], [run], share=share))]
        reached = main.rows[(main.rows["fraction"] == share) & (main.rows["label"] == main.main)]
        reached = reached[(reached["split"] == "test") & (reached["metric"] == "auroc") & (reached["subset"] == "all")]
        few = "" if share == 1 else f" with {share:.0%} of the labelled subjects"
        limit = f", possible {best:.3f}" if best and not few else ""
        if gaps:
            reads = f"AUROC {reached['value'].iloc[0]:.3f}{limit}; {gaps[0][1].n:,} {unit(main)}"
            said.append(f"Pretraining{few} {_against(gaps)} ({reads}).")
    if plain and (d := between([main], plain, share=max(shares(main)))):
        said.append(_adds("The record", "pretraining on films alone", d, unit(main)))
    return said


def _fusion(task: str, runs: Sequence[Run], truth: dict[str, Any], between: Between) -> list[str]:
    """The fused model against the record alone and the film alone, on test rows with a film if there are enough."""
    found = lead(task, runs)
    if found is None:
        return []
    main, outcome = found.run, OUTCOMES.get(task, task.replace("_", " "))
    kinds = {str(run.result.get("model")).partition("_")[0]: run for run in found.baselines}
    record, film = kinds.get("record"), kinds.get("film")
    head, best = main.headline(subset=found.subset), possible(truth, task, main.main, main, found.subset)
    reached = f"AUROC {head['value']:.3f}" + (f", possible {best:.3f}" if best else "") if head else "AUROC"
    said, rows = [], unit(main)
    within, table = None, main.by_row
    if found.subset == "paired" and table is not None and "has_image" in table:
        within, rows = table.index[table["has_image"].astype(bool)], f"{rows} with a film"
    for what, base, other in (("The film", "the record", record), ("The record", "the film", film)):
        if other and (d := between([main], [other], within=within)):
            whole = head is not None and head["n"] == d.n  # the AUROC is that of the rows compared
            said.append(_adds(what, f"{base} for {outcome}", d, rows, reached if whole else "AUROC"))
    return said


def shares(run: Run) -> list[float]:
    """The shares of the train subjects that the run's heads were fitted on, the largest first."""
    return sorted({float(x) for x in run.rows.loc[run.rows["split"] == "test", "fraction"]}, reverse=True)


def difference(
    a: Sequence[Run],
    b: Sequence[Run],
    *,
    share: float | None = None,
    within: pd.Index | None = None,
    drawn: Drawn | None = None,
) -> Gap | None:
    """AUROC of `a` less that of `b` on the test rows that both scored, `within` these.

    Args:
        a, b: the trainings of a method each.
        share: of the train subjects: then each draw of these subjects counts as a training; None: all.
    Returns: None where there are too few rows in common, or no predictions of this share.
    """
    if share is not None:
        a, b = ([fit for run in side for fit in _fits(run, share)] for side in (a, b))
    table = compare(a, b, drawn=drawn, within=within) if a and b else None
    if table is None:
        return None
    row = table[table["main"]].iloc[0]
    return Gap(float(row["difference"]), float(row["low"]), float(row["high"]), int(row["n"]))


def _fits(run: Run, share: float) -> list[Run]:
    """The run's fits on a share of the train subjects, one a draw; none if it has no such fit."""
    folders = sorted((run.folder / f"fraction_{share:g}").glob("draw_*"))
    if folders:
        return [replace(run, folder=folder, result={**run.result, "seed": i}) for i, folder in enumerate(folders)]
    return [run] if share == max(shares(run), default=None) else []


def _against(found: Sequence[tuple[str, Gap]]) -> str:
    """`beats x by .. and y by .., and is level with z (..)`: others with one verb together."""
    verbs: dict[str, list[str]] = {}
    for name, (value, low, high, _) in found:
        verb = "beats" if low > 0 else "stays behind" if high < 0 else "is level with"
        ends = sorted((abs(low), abs(high)))
        by = f"{name} by {abs(value):.3f} ({ends[0]:.3f} to {ends[1]:.3f})"
        by = f"{name} ({value:+.3f}, {low:+.3f} to {high:+.3f})" if verb == "is level with" else by
        if math.isnan(low):
            verb, by = "has too few test subjects to be compared with", f"{name} ({value:+.3f})"
        verbs.setdefault(verb, []).append(by)
    return " and ".join(f"{verb} {' and '.join(names)}" for verb, names in verbs.items())


def _adds(what: str, base: str, gap: Gap, rows: str, reached: str = "AUROC") -> str:
    """What a part adds to the rest, or that no gain shows, or that it takes away. `reached`: the AUROC of both."""
    value, low, high, n = gap
    on = f"{reached}{';' if ' ' in reached else ','} {n:,} {rows}"
    if math.isnan(low):
        return f"{what} and {base}: {value:+.3f}, with too few test subjects for an interval ({on})."
    if low > 0:
        return f"{what} adds {value:.3f} ({low:.3f} to {high:.3f}) to {base} ({on})."
    verb = "takes away from" if high < 0 else "adds nothing that shows here to"
    return f"{what} {verb} {base}: {value:+.3f}, {low:+.3f} to {high:+.3f} ({on})."


def _control(run: Run) -> bool:
    """Whether it is a control: another film's record in pretraining; no pixels, or another's film, in a fusion."""
    about = run.result.get("compared_by") or {}
    return bool(about.get("permuted")) or run.result.get("control") not in (None, "none")


def _first(runs: Sequence[Run], encoder: str) -> Run | None:
    return next((run for run in runs if str(run.result.get("encoder")).startswith(encoder)), None)


def _about(run: Run, key: str) -> str:
    """A fact of the run's encoder as text; empty where it is unknown or there is none."""
    value = (run.result.get("compared_by") or {}).get(key)
    return str(value) if value else ""
