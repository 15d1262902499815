"""`python -m finetune runs FOLDER`: the runs of a folder with their key numbers, in the terminal."""

from __future__ import annotations

from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from finetune.report_data import Run, column, read_runs
from finetune.report_html import interval, number
from finetune.report_results import encoder_of


def show(folder: str | Path, console: Console | None = None) -> None:
    """Print a line for each run; colours are off when piped. Raises: UserError: no runs there."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("run", "task", "model", "encoder", "AUROC (95%)", "AUPRC (95%)", "n", "last step", "written"):
        table.add_column(name, justify="right" if name in ("n", "last step") else "left", overflow="fold")
    for run in read_runs([folder]):
        table.add_row(*cells(run))
    console = console or Console(highlight=False)
    if not console.is_terminal:
        console.width = 160
    console.print(table)


def cells(run: Run) -> list[str]:
    """What a table says of a run."""
    head, precision = run.headline() or {}, run.headline("auprc") or {}
    steps = run.metrics["step"].max() if "step" in run.metrics else None
    loss = column(run.metrics, "loss")
    state = f"loss {run.metrics[loss].dropna().iloc[-1]:.3f}" if loss and run.kind == "pretraining" else None
    return [
        run.name,
        run.task or run.kind,
        str(run.result.get("model") or run.encoder.get("arch") or "–"),
        encoder_of(run) if run.kind == "evaluation" else "–",
        state or interval(head.get("value"), head.get("low"), head.get("high")),
        interval(precision.get("value"), precision.get("low"), precision.get("high")),
        number(head.get("n")),
        number(None if steps is None else int(steps)),
        str(run.provenance.get("finished_at") or run.provenance.get("written_at") or "–")[:16],
    ]
