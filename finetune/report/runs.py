"""`ehr-msn runs FOLDER`: the runs of a folder with their key numbers, in the terminal."""

from __future__ import annotations

from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from configs import UserError
from finetune.report.data import Run, find_runs, read_run
from finetune.report.html import interval, number
from finetune.report.results import encoder_of, model_of
from finetune.report.training import curve

PIPED = 160  # columns where there is no terminal


def show(folder: str | Path, console: Console | None = None) -> None:
    """Print a line for each run; colours are off when piped. Raises: UserError: no runs there."""
    console = console or Console(highlight=False)
    if not console.is_terminal:
        console.width = PIPED
    broad = console.width >= 120
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("run", "what", "encoder", "AUROC (95%)", *(("AUPRC (95%)", "finished") if broad else ()), "n"):
        table.add_column(name, justify="right" if name == "n" else "left", overflow="fold")
    for path in find_runs([folder]):
        name = path.relative_to(folder).as_posix() if path != Path(folder) else path.name
        try:
            table.add_row(*map(Text, cells(read_run(path, name), broad)))  # brackets in names are no markup
        except UserError as error:
            table.add_row(Text(name), Text(f"damaged: {error}", "yellow"))
    console.print(table)


def cells(run: Run, broad: bool) -> list[str]:
    """What the table says of a run."""
    head, precision = run.headline() or {}, run.headline("auprc") or {}
    steps, losses = curve(run, ("loss",))
    kind = f"{run.task} · {model_of(run)}" if run.kind == "evaluation" else run.kind
    numbers = interval(head.get("value"), head.get("low"), head.get("high"))
    if run.kind == "pretraining" and len(steps):
        numbers = f"loss {losses[-1]:.3f} at step {steps[-1]:,.0f}"
    more = [
        interval(precision.get("value"), precision.get("low"), precision.get("high")),
        str(run.provenance.get("finished_at") or "not yet")[:16].replace("T", " "),
    ]
    encoder = encoder_of(run) if run.kind == "evaluation" else str(run.encoder.get("arch") or "–")
    return [run.name, kind, encoder, numbers, *(more if broad else []), number(head.get("n"))]
