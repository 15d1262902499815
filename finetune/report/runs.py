"""`ehr-msn runs FOLDER`: the runs of a folder with their key numbers, in the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text
from scipy.special import expit

from configs import UserError
from finetune.metrics import evaluate
from finetune.names import named, without_seed
from finetune.report.html import interval, number
from finetune.report.results import encoder_of, model_of
from finetune.report.training import curve
from finetune.results import check_table, write_table
from finetune.run_folders import Run, common_rows, find_runs, methods, read_run

PIPED = 160  # columns where there is no terminal


def show(folder: str | Path, console: Console | None = None, *, out: str | None = None) -> None:
    """Print a line for each run, and for the mean over seeds of runs that differ by them alone.

    Args:
        out: also write the numbers there: .csv, .md or .tex.
    Raises: UserError: no runs there.
    """
    if out is not None:
        check_table(out)
    console = console or Console(highlight=False)
    if not console.is_terminal:  # piped: no colours
        console.width = PIPED
    broad = console.width >= 120
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("run", "model", "AUROC (95%)", *(("AUPRC (95%)", "finished") if broad else ()), "n"):
        table.add_column(name, justify="right" if name == "n" else "left", overflow="fold")
    runs, damaged = _read(Path(folder))
    for run in runs:
        table.add_row(*map(Text, cells(run, broad)))  # brackets in names are no markup
    for name, error in damaged.items():
        table.add_row(Text(name), Text(f"damaged: {error}", "yellow"))
    rows = [_numbers(run, run.name, 1, run.headline(), run.headline("auprc")) for run in runs]
    for name, group in methods(runs).items():
        if len(group) > 1 and group[0].kind == "evaluation":
            means = averaged(group)
            rows.append(_numbers(group[0], name, len(group), means.get("auroc"), means.get("auprc")))
            table.add_row(*map(Text, _mean_cells(group, name, means, broad)))
    if out is not None:
        write_table(out, pd.DataFrame(rows))
    console.print(table)
    if out is not None:
        console.print(f"wrote {out}")


def _read(folder: Path) -> tuple[list[Run], dict[str, UserError]]:
    """The runs there under their models' names; what is wrong with the others."""
    runs, damaged = [], {}
    for path in find_runs([folder]):
        name = path.relative_to(folder).as_posix() if path != folder else path.name
        try:
            runs.append(read_run(path, name))
        except UserError as error:
            damaged[name] = error
    return named(runs), damaged


def model_and_task(run: Run) -> str:
    """The model and what it was trained or scored on, in one cell."""
    if run.kind == "unfinished":
        return "not finished"
    return f"{run.called} · {'pretraining' if run.kind == 'pretraining' else run.task.replace('_', ' ')}"


def _mean_cells(group: Sequence[Run], name: str, means: Mapping[str, Mapping[str, Any]], broad: bool) -> list[str]:
    auroc, auprc = means.get("auroc", {}), means.get("auprc", {})
    values = [interval(of.get("value"), of.get("low"), of.get("high")) for of in (auroc, auprc)]
    more = [values[1], ""] if broad else []
    model = without_seed(model_and_task(group[0]))
    said = [f"{name}, mean of {len(group)} seeds", model, values[0]]
    return [*said, *more, number(auroc.get("n"))]


def averaged(runs: Sequence[Run]) -> dict[str, dict[str, Any]]:
    """metric -> value, low, high, n of the main label, mean over runs, with the interval over seeds and subjects.

    Where the runs did not score the same rows there is the mean of their values alone.
    """
    common, names = common_rows(runs), runs[0].labels
    columns = [[f"{kind}_{name}" for name in names] for kind in ("label", "logit")]
    tables = [run.by_row for run in runs if run.by_row is not None and {*columns[0], *columns[1]} <= set(run.by_row)]
    if common is None or [len(one) for one in tables] != [len(common)] * len(runs):
        heads = {metric: [run.headline(metric) or {} for run in runs] for metric in ("auroc", "auprc")}
        return {
            metric: {"value": float(np.mean([of.get("value", np.nan) for of in each])), "n": each[0].get("n")}
            for metric, each in heads.items()
        }
    tables = [one.loc[common] for one in tables]
    scores = expit(np.stack([one[columns[1]].to_numpy(float) for one in tables]))
    table = evaluate(tables[0][columns[0]].to_numpy(float), scores, names=names, groups=tables[0]["subject_id"])
    rows = table[table["label"] == runs[0].main].to_dict("records")
    return {str(row["metric"]): {str(key): value for key, value in row.items()} for row in rows}


def _numbers(
    run: Run, name: str, seeds: int, auroc: Mapping[str, Any] | None, auprc: Mapping[str, Any] | None
) -> dict[str, Any]:
    """A row of the written table."""
    row: dict[str, Any] = {
        "run": name,
        "model": run.called if seeds == 1 else without_seed(run.called),
        "what": f"{run.task} · {model_of(run)}" if run.kind == "evaluation" else run.kind,
        "encoder": encoder_of(run) if run.kind == "evaluation" else str(run.encoder.get("arch") or ""),
        "seeds": max(seeds, int(run.result.get("seeds") or 1)),
    }
    for metric, of in (("auroc", auroc or {}), ("auprc", auprc or {})):
        row |= {metric: of.get("value"), f"{metric}_low": of.get("low"), f"{metric}_high": of.get("high")}
    return row | {"n": (auroc or {}).get("n"), "finished": run.provenance.get("finished_at")}


def cells(run: Run, broad: bool) -> list[str]:
    """What the table says of a run."""
    head, precision = run.headline() or {}, run.headline("auprc") or {}
    steps, losses = curve(run, ("loss",))
    numbers = interval(head.get("value"), head.get("low"), head.get("high"))
    if run.kind == "pretraining" and len(steps):
        numbers = f"loss {losses[-1]:.3f} at step {steps[-1]:,.0f}"
    more = [
        interval(precision.get("value"), precision.get("low"), precision.get("high")),
        str(run.provenance.get("finished_at") or "not yet")[:16].replace("T", " "),
    ]
    return [run.name, model_and_task(run), numbers, *(more if broad else []), number(head.get("n"))]
