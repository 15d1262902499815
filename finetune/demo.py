"""`demo [OUT]`: from raw synthetic tables and films to report.html, on two CPU cores.

Input: a folder. Output: the folder, filled by the same commands that a user types, each with its log in OUT/logs, and a
table of the measured and the best possible AUROCs. Finished steps are skipped, so the same command resumes.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.padding import Padding
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from configs import UserError
from configs.commands import command_line
from configs.launch import end_with_me
from configs.signals import Stopped, held
from ehr_features.files import check_ours, digest, lock, make_folder, write_json
from ehr_features.typed import read_json
from ehr_features.typed.shapes import Truth
from finetune.config.shapes import DemoJson
from finetune.names import named, unit
from finetune.report.html import fixed
from finetune.report.results import by_task, possible
from finetune.report.verdict import verdicts
from finetune.results import Results
from finetune.run_folders import Run, read_runs

CORES = 2
FEW = 0.1  # share of the labelled train subjects
CONFIGS = Path(__file__).resolve().parents[1] / "configs" / "demo"


@dataclass
class Step:
    """One command of the demo. `words` follow `python -m`; it starts when all of `after` are done and a core is free.

    A step that `follows` another's file starts as soon as that file exists, beside the others: it mostly waits.
    """

    name: str
    says: str
    words: list[str]
    after: tuple[str, ...] = ()
    follows: Path | None = None
    state: str = "waiting"
    seconds: float = 0.0
    process: subprocess.Popen[bytes] | None = field(default=None, repr=False)


def plan(out: Path, subjects: int, seed: int, shuffled: bool) -> list[Step]:
    """The steps, in the order of display."""
    data, features, store, runs = out / "data", out / "features", out / "store", out / "runs"
    inputs = [f"features={features}", f"store={store}"]

    def config(name: str) -> str:
        return _short(CONFIGS / f"{name}.yaml")

    def pretrain(name: str, *keys: str) -> list[str]:
        return ["pretrain", "train", config("pretrain_resnet"), *inputs, f"out={runs / name}", f"seed={seed}", *keys]

    def probe(*keys: str) -> list[str]:
        return ["finetune", "probe", config("probe_linear"), *inputs, "method=logistic", f"seed={seed}", *keys]

    def probed(name: str, encoder: object) -> list[str]:
        return probe(f"encoder={encoder}", "fraction=[0.1,1]", f"out={runs / name}")

    def fuse(model: str, *keys: str) -> list[str]:
        words = ["finetune", "fuse", config("fuse_mortality"), *inputs, f"model={model}", *keys]
        return [*words, f"out={runs / ('mortality_' + model)}", f"seed={seed}"]

    tables = [f"mimic_iv={data / 'mimic-iv'}", f"mimic_ed={data / 'mimic-iv-ed'}", f"mimic_cxr={data / 'mimic-cxr'}"]
    generate = ["ehr_features", "demo", str(data), "--subjects", str(subjects), "--seed", str(seed)]
    encoder = f"encoder={runs / 'pretrain_ehr'}"
    both = ("features", "store")
    return [
        Step("data", "raw tables and films of a synthetic hospital", generate + ["--shuffled"] * shuffled),
        Step(
            "features",
            "tables to cohort, linked films, hourly series",
            ["ehr_features", "build", config("features"), *tables, f"out={features}"],
            ("data",),
        ),
        Step(
            "store",
            "films to memory-mapped shards",
            ["pretrain", "images", config("images"), tables[2], f"out={store}"],
            ("data",),
        ),
        Step("films", "pretraining on the films alone", pretrain("pretrain_films", "ehr.groups=[]"), both),
        Step("ehr", "pretraining on the films and their records", pretrain("pretrain_ehr"), both),
        Step(
            "watch",
            "linear evaluation of each encoder on the way",
            [*probe(), "--watch", str(runs / "pretrain_ehr")],
            both,
            follows=runs / "pretrain_ehr" / "config.yaml",
        ),
        Step("probe_pixels", "linear evaluation: raw pixels", probed("probe_pixels", "pixels"), both),
        Step("fuse_record", "mortality from the record alone", fuse("record_lstm"), both),
        Step(
            "probe_random",
            "linear evaluation: random weights",
            probed("probe_random", f"random:{runs / 'pretrain_films'}"),
            ("films",),
        ),
        Step(
            "probe_films",
            "linear evaluation: pretrained on films",
            probed("probe_films", runs / "pretrain_films"),
            ("films",),
        ),
        Step(
            "probe_ehr",
            "linear evaluation: pretrained on films and records",
            probed("probe_ehr", runs / "pretrain_ehr"),
            ("ehr",),
        ),
        Step("fuse_film", "mortality from the film alone", fuse("film_only", encoder), ("ehr",)),
        Step("fuse_both", "mortality from record and film (MedFuse)", fuse("medfuse", encoder), ("ehr",)),
        Step(
            "report",
            "one HTML page",
            ["finetune", "report", *(str(runs / name) for name in RUNS), "--out", str(out / "report.html")],
            (
                *("watch", "probe_pixels", "probe_random", "probe_films", "probe_ehr"),
                *("fuse_record", "fuse_film", "fuse_both"),
            ),
        ),
    ]


RUNS = (
    "pretrain_films",
    "pretrain_ehr",
    "probe_pixels",
    "probe_random",
    "probe_films",
    "probe_ehr",
    "mortality_record_lstm",
    "mortality_film_only",
    "mortality_medfuse",
)
TABLE = {
    "findings": ("findings, frozen encoder", "all"),
    "mortality": ("death in hospital, from 48 h", "paired"),
}  # task: heading, subset of the test rows


def demo(out: Path, *, subjects: int, seed: int, shuffled: bool = False) -> Path:
    """Run the unfinished steps, then print the table.

    Returns: the path of report.html.
    Raises: UserError: the folder holds something else, or a step failed (its log is named).
    """
    console = Console(highlight=False)
    settings = {"subjects": subjects, "seed": seed, "shuffled": shuffled}
    done = _open(out, settings)
    lock(out)
    steps = plan(out, subjects, seed, shuffled)
    for step in steps:
        if digest(step.words) == done.get(step.name, {}).get("words"):
            step.state, step.seconds = "done", done[step.name]["seconds"]
        else:
            break  # later steps depend on an unfinished one
    kept = {s.name: done[s.name] for s in steps if s.state == "done"}
    hospital = "findings, codes and deaths shuffled: nothing can be learned" if shuffled else f"seed {seed}"
    console.print(f"[bold]EHR-MSN demo[/]  a synthetic hospital of {subjects} subjects ({hospital})")
    console.print("raw tables and films -> features -> pretraining -> linear evaluation, ICU fusion -> report.html\n")
    start = time.monotonic()
    try:
        _run(steps, out, kept, settings, console)
    finally:
        for step in steps:
            if step.process and step.process.poll() is None:
                step.process.send_signal(signal.SIGTERM)
                step.process.wait()
    console.print()
    runs = named(read_runs([out / "runs" / name for name in RUNS]))
    truth = read_json(out / "data" / "truth.json", Truth)
    console.print(table(runs, truth))
    for sentence in verdicts(runs, truth):
        console.print(Padding(sentence, (0, 0, 0, 2)))
    console.print(f"\n[bold]{out / 'report.html'}[/]   open it in a browser   ({time.monotonic() - start:.0f} s)")
    console.print("\nYou have MIMIC? Say where it lies; the other steps follow in the README:")
    console.print(
        "  " + command_line("features", "features", "mimic_iv=/path/to/mimic-iv", "mimic_cxr=/path/to/mimic-cxr-jpg"),
        soft_wrap=True,
    )
    return out / "report.html"


def table(runs: Sequence[Run], truth: dict[str, Any]) -> Table:
    """Measured AUROC on the test split with 95% intervals over subjects, beside the best possible one.

    Args:
        runs: with `called`, the names of their models. Fusions are scored on the stays with a film, the same for all.
        truth: truth.json of the synthetic hospital.
    """
    result = Table(box=box.SIMPLE_HEAD, pad_edge=False, caption_justify="left")
    for name in ("", "AUROC", "95% interval", "10% labels", "possible"):
        result.add_column(name, justify="right" if name else "left", no_wrap=bool(name))
    tasks, counts = by_task(runs), []
    for task, (heading, subset) in TABLE.items():
        result.add_row(f"[bold]{heading}[/]")
        heads = [run.headline(subset=subset) or {} for run in tasks[task]]
        counts.append(f"{max(head.get('n', 0) for head in heads):,} {unit(tasks[task][0])}")
        for run, head in zip(tasks[task], heads, strict=True):
            best = possible(truth, task, run.main, run, subset)
            result.add_row(Padding(run.called, (0, 0, 0, 2)), *_cells(run, head, subset), fixed(best))
    result.caption = (
        f"Test split: {' (mean over findings), '.join(counts)} with a film. Intervals from resampling subjects. "
        "10% labels: heads fitted on a tenth of the train subjects. Possible: the generator's Bayes-optimal AUROC."
    )
    return result


def _cells(run: Run, head: Mapping[str, Any], subset: str) -> tuple[str, str, str]:
    """AUROC, its interval or why there is no AUROC, and the AUROC of the heads fitted on a tenth of the subjects."""
    rows = run.rows[(run.rows["label"] == run.main) & (run.rows["metric"] == "auroc") & (run.rows["split"] == "test")]
    rows = rows[rows["subset"] == subset]
    few = rows.loc[rows["fraction"] == FEW, "value"]
    tenth = fixed(few.iloc[0]) if few.notna().any() else ""
    if not head:
        return "-", next((str(why) for why in rows["reason"] if why), "-"), tenth
    ends = [fixed(head[end]) for end in ("low", "high")]
    return fixed(head["value"]), "-" if "–" in ends else " - ".join(ends), tenth


def auroc_rows(run: Path, subset: str, fraction: float = 1.0) -> list[dict[str, Any]]:
    """The AUROCs of the test split, from heads fitted on a share of the train subjects."""
    rows = read_json(run / "results.json", Results)["rows"]
    wanted = ("test", "auroc", subset, fraction)
    return [r for r in rows if (r["split"], r["metric"], r["subset"], r["fraction"]) == wanted]


def _open(out: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """The steps done by an earlier call in this folder."""
    check_ours(out, "a folder of the demo", ["demo.json"])
    if not (out / "demo.json").is_file():
        return {}
    before = read_json(out / "demo.json", DemoJson)
    if before["settings"] != settings:
        raise UserError(
            f"{out}: holds a demo with {before['settings']} (demo.json), asked for {settings}; give another folder"
        )
    return dict(before["steps"])


def _run(steps: list[Step], out: Path, kept: dict[str, Any], settings: dict[str, Any], console: Console) -> None:
    """Start each step once its inputs exist and a core is free."""
    write_json(out / "demo.json", {"settings": settings, "steps": kept})  # first: it marks the folder as a demo
    make_folder(out / "logs")
    with Live(console=console, refresh_per_second=8, transient=False) as live:
        while any(step.state != "done" for step in steps):
            ready = {step.name for step in steps if step.state == "done"}
            for step in steps:
                if step.follows is None:
                    free = sum(s.state == "running" and s.follows is None for s in steps) < CORES
                else:
                    free = step.follows.exists()
                if step.state == "waiting" and free and ready.issuperset(step.after):
                    _start(step, out, alone=len(step.after) == 0)
            for step in steps:
                if step.state == "running":
                    _look(step, out)
                    if step.state == "done":
                        kept[step.name] = {"words": digest(step.words), "seconds": round(step.seconds, 1)}
                        write_json(out / "demo.json", {"settings": settings, "steps": kept})
                        if not console.is_terminal:
                            console.print(f"  {step.name:14} {step.says:52} {step.seconds:6.1f} s")
            live.update(_show(steps, out) if console.is_terminal else Text())
            time.sleep(0.1)


def _start(step: Step, out: Path, *, alone: bool) -> None:
    threads = str(CORES if alone else 1)
    env = os.environ | {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
    with (out / "logs" / f"{step.name}.txt").open("wb") as log:
        log.write(f"$ python -m {shlex.join(step.words)}\n".encode())
        log.flush()
        words = [sys.executable, "-m", *step.words]
        with held():
            step.process = subprocess.Popen(words, stdout=log, stderr=log, env=env, preexec_fn=end_with_me(os.getpid()))
    step.state, step.seconds = "running", -time.monotonic()


def _look(step: Step, out: Path) -> None:
    assert step.process is not None
    code = step.process.poll()
    if code is None:
        return
    step.seconds += time.monotonic()
    step.state = "done"
    if code == 75:
        raise Stopped
    if code:
        log = out / "logs" / f"{step.name}.txt"
        tail = "\n".join("  " + line for line in log.read_text(errors="replace").splitlines()[-4:])
        raise UserError(f"the step `{step.name}` failed with exit code {code}; its log is {log}, which ends:\n{tail}")


def _left(step: Step, out: Path) -> str:
    """`780 of 3000 steps, 240 s left`, from the last line of a step's log that says so."""
    log = out / "logs" / f"{step.name}.txt"
    tail = log.read_bytes()[-2000:].decode(errors="replace") if log.is_file() else ""
    found = re.findall(r": (\d+ of \d+ \w+), .*?(\d+ s left)", tail)
    return ", ".join(found[-1]) if found else ""


def _show(steps: list[Step], out: Path) -> Group:
    grid = Table.grid(padding=(0, 1))
    for step in steps:
        if step.state == "done":
            grid.add_row(Text("✓", "green"), step.says, f"{step.seconds:.1f} s", "")
        elif step.state == "running":
            spent = f"{step.seconds + time.monotonic():.0f} s"
            grid.add_row(Spinner("dots", style="cyan"), step.says, spent, Text(_left(step, out), "dim"))
        else:
            grid.add_row(" ", Text(step.says, "dim"), "", "")
    return Group(grid)


def _short(path: Path) -> str:
    """Relative to the working directory if that is shorter."""
    try:
        return path.relative_to(Path.cwd()).as_posix()
    except ValueError:
        return path.as_posix()
