"""The main results as sentences, each from a paired difference on the same test rows with its interval.

Input: evaluated runs, with the pretrainings behind them. Output: sentences for the report's head and the terminal. The
interval decides the verb: `beats`, `is level with` (it holds 0), `stays behind`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from finetune.report.data import Run
from finetune.report.pairs import compare
from finetune.report.results import by_task, possible

OUTCOMES = {"mortality": "death in hospital", "phenotypes": "phenotypes", "phenotypes_early": "phenotypes"}
OUTCOMES |= {"decompensation": "death within 24 hours", "length_of_stay": "the remaining length of stay"}


Between = Callable[..., tuple[float, float, float] | None]


def verdicts(
    runs: Sequence[Run], truth: Mapping[str, Any] | None = None, drawn: dict[bytes, Any] | None = None
) -> list[str]:
    """A sentence for each main question that these runs answer: fusion first, then the encoder.

    Args:
        runs: as read by `read_runs`.
        truth: truth.json of a synthetic hospital: the possible AUROC of an encoder is then said too.
        drawn: resamples of runs, read and filled.
    """
    between = partial(difference, drawn={} if drawn is None else drawn)
    fused, films = [], []
    for task, own in by_task(runs).items():
        able = [run for run in own if run.predictions is not None and run.headline() is not None]
        if task == "findings":
            films += _films(able, dict(truth or {}), between)
        else:
            fused += _fusion(task, able, between)
    return fused + films


def _films(runs: Sequence[Run], truth: dict[str, Any], between: Between) -> list[str]:
    """Pretrained encoders against random weights and pixels, with all and with few labels; with and without record."""
    pretrained = [run for run in runs if _about(run, "weights").startswith("step")]
    if not pretrained:
        return []
    main = next((run for run in pretrained if _about(run, "record")), pretrained[0])
    others = {"random weights": _first(runs, "random:"), "raw 16x16 pixels": _first(runs, "pixels")}
    best = possible(truth, "findings", main.main, main)
    said = []
    for share in shares(main):
        found = [(name, d) for name, run in others.items() if run and (d := between([main], [run], share=share))]
        reached = main.rows[(main.rows["fraction"] == share) & (main.rows["label"] == main.main)]
        reached = reached[(reached["split"] == "test") & (reached["metric"] == "auroc") & (reached["subset"] == "all")]
        few = "" if share == max(shares(main)) else f" with {share:.0%} of the labelled subjects"
        limit = f", possible {best:.3f}" if best and not few else ""
        if found:
            said.append(f"Pretraining{few} {_against(found)} (AUROC {reached['value'].iloc[0]:.3f}{limit}).")
    plain = next((run for run in pretrained if not _about(run, "record")), None)
    if plain and plain is not main and (d := between([main], [plain])):
        said.append(_adds("The record", "pretraining on films alone", d))
    return said


def _fusion(task: str, runs: Sequence[Run], between: Between) -> list[str]:
    """The fused model against the record alone and the film alone, on test rows with a film."""
    by = {kind: [r for r in runs if str(r.result.get("model")).startswith(kind)] for kind in ("record", "film")}
    fused = [run for run in runs if not str(run.result.get("model")).startswith(("record", "film"))]
    record, film = (next(iter(by[kind]), None) for kind in ("record", "film"))
    said = []
    for run in fused[:1]:
        outcome = OUTCOMES.get(task, task.replace("_", " "))
        if record and (d := between([run], [record], [film] if film else [])):
            said.append(_adds("The film", f"the record for {outcome}", d))
        if film and (d := between([run], [film])):
            said.append(_adds("The record", f"the film for {outcome}", d))
    return said


def shares(run: Run) -> list[float]:
    """The shares of the train subjects that the run's heads were fitted on, the largest first."""
    return sorted({float(x) for x in run.rows.loc[run.rows["split"] == "test", "fraction"]}, reverse=True)


def difference(
    a: Sequence[Run],
    b: Sequence[Run],
    also: Sequence[Run] = (),
    *,
    share: float | None = None,
    drawn: dict[bytes, Any] | None = None,
) -> tuple[float, float, float] | None:
    """AUROC of `a` less that of `b` on the test rows that both, and `also`, scored: value, low, high.

    Args:
        a, b: the trainings of a method each.
        share: of the train subjects: then each draw of these subjects counts as a training; None: all.
    Returns: None where there are too few rows in common, or no predictions of this share.
    """
    if share is not None and share != max(shares(a[0])):
        a, b = ([draw for run in side for draw in _draws(run, share)] for side in (a, b))
    table = compare(a, b, drawn=drawn, also=also) if a and b else None
    if table is None:
        return None
    row = table[table["main"]].iloc[0]
    return float(row["difference"]), float(row["low"]), float(row["high"])


def _draws(run: Run, share: float) -> list[Run]:
    """The run's fits on each draw of a share of the train subjects."""
    folders = sorted((run.folder / f"fraction_{share:g}").glob("draw_*"))
    return [replace(run, folder=folder, result={**run.result, "seed": i}) for i, folder in enumerate(folders)]


def _against(found: Sequence[tuple[str, tuple[float, float, float]]]) -> str:
    """`beats x by .. and y by .., and is level with z (..)`: others with one verb together."""
    verbs: dict[str, list[str]] = {}
    for name, (value, low, high) in found:
        verb = "beats" if low > 0 else "stays behind" if high < 0 else "is level with"
        ends = sorted((abs(low), abs(high)))
        by = f"{name} by {abs(value):.3f} ({ends[0]:.3f} to {ends[1]:.3f})"
        by = f"{name} ({value:+.3f}, {low:+.3f} to {high:+.3f})" if verb == "is level with" else by
        verbs.setdefault(verb, []).append(by)
    return " and ".join(f"{verb} {' and '.join(names)}" for verb, names in verbs.items())


def _adds(what: str, base: str, gap: tuple[float, float, float]) -> str:
    """What a part adds to the rest, or that no gain shows, or that it takes away."""
    value, low, high = gap
    between = f"{value:+.3f}, {low:+.3f} to {high:+.3f}"
    if low > 0:
        return f"{what} adds {value:.3f} ({low:.3f} to {high:.3f}) to {base}."
    return f"{what} {'takes away from' if high < 0 else 'adds nothing that shows here to'} {base} ({between})."


def _first(runs: Sequence[Run], encoder: str) -> Run | None:
    return next((run for run in runs if str(run.result.get("encoder")).startswith(encoder)), None)


def _about(run: Run, key: str) -> str:
    """A fact of the run's encoder as text; empty where it is unknown or there is none."""
    value = (run.result.get("compared_by") or {}).get(key)
    return str(value) if value else ""
