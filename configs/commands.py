"""The commands: one table, from which the help is printed and every command is started.

`ehr-msn NAME`, `./launch.sh NAME` and `python -m configs NAME` start `python -m MODULE SUBCOMMAND`. Imports only the
standard library: the help is shown before anything is installed.
"""

from __future__ import annotations

import os
import shlex
import shutil
import sys
import textwrap
from pathlib import Path
from typing import NamedTuple

PROGRAM = "EHR_MSN_PROGRAM"  # environment variable: the program as typed, for its child processes
CHECKOUT = Path(__file__).resolve().parents[1]


class Command(NamedTuple):
    """What a command starts, its arguments, what it does, and an example of its arguments."""

    module: str
    subcommand: str
    takes: str
    does: str
    example: str


CONFIG = "CONFIG [key=value ...]"
# fmt: off
COMMANDS = {
    "demo": Command("finetune", "demo", "[OUT]", "from raw synthetic tables to report.html, on two CPU cores",
        "demo --seed 1"),
    "hospital": Command("ehr_features", "demo", "OUT", "write a synthetic MIMIC with a planted signal",
        "demo/data --subjects 1600 --seed 1"),
    "check": Command("ehr_features", "check", CONFIG, "open every table and list what can be done with them",
        "features mimic_iv=/data/mimic-iv/3.1"),
    "features": Command("ehr_features", "build", CONFIG, "raw tables -> features/",
        "features mimic_iv=/data/mimic-iv/3.1 out=features/mimic"),
    "notes": Command("ehr_features", "notes", CONFIG, "the record at the time of each film, as a text",
        "notes features=features mimic_ed=/data/mimic-iv-ed/2.2"),
    "audit": Command("ehr_features", "audit", "FEATURES [RUN ...]", "prove, with counts, that nothing leaks",
        "features runs/msn notes"),
    "images": Command("pretrain", "images", CONFIG, "films (JPEG, PNG, DICOM) -> store/",
        "images mimic_cxr=/data/mimic-cxr-jpg out=store"),
    "pretrain": Command("pretrain", "train", CONFIG, "features/ + store/ -> runs/X/ with encoder/",
        "pretrain_vit_tiny features=features store=store out=runs/msn"),
    "export": Command("pretrain", "export", "RUN OUT", "runs/X/ -> an encoder for use elsewhere",
        "runs/msn exported --probe runs/probe"),
    "knowledge": Command("pretrain", "knowledge", "NOTES PASSAGES", "the passages nearest to each film's note",
        "notes docs/knowledge --text-encoder MiniLM --top 3"),
    "probe": Command("finetune", "probe", CONFIG, "score an encoder on the findings of its films",
        "probe_linear encoder=runs/vit/encoder out=runs/probe"),
    "fuse": Command("finetune", "fuse", CONFIG, "train and evaluate a model of record and film on an ICU task",
        "fuse_mortality encoder=runs/vit/encoder out=runs/medfuse"),
    "grid": Command("finetune", "grid", CONFIG, "every combination of some choices, by pretrain, probe, fuse",
        "grid_cxr_ehr_msn --only 'tiny-*' --dry-run"),
    "report": Command("finetune", "report", "RUN [RUN ...]", "one HTML page for any set of runs",
        "runs/pretrain runs/probe runs/fuse --out report.html"),
    "runs": Command("finetune", "runs", "[FOLDER]", "list the runs in a folder with their key numbers", "runs"),
    "score": Command("finetune", "score", "LABELS SCORES", "metrics with intervals for any two arrays, ours or not",
        "labels.csv scores.csv --groups subjects.csv --out metrics.csv"),
    "compare": Command("finetune", "compare", "RUN ... --with RUN ...",
        "paired difference between two methods on the same test subjects", "runs/a_seed* --with runs/b_seed*"),
    "embed": Command("finetune", "embed", "ENCODER FILMS OUT", "features of any films, by an exported encoder alone",
        "runs/msn/encoder my-films embeddings.parquet"),
    "nearest": Command("finetune", "nearest", "EMBEDDINGS [FILM]", "the films most alike to one",
        "embeddings.parquet my-films/one.png"),
    "config": Command("configs", "config", "[NAME]", "list the shipped configs, or print one to standard output",
        "probe_linear"),
}
# fmt: on
DISTRIBUTED = ("pretrain", "probe", "fuse")  # these can run in several processes
OF_LAUNCH_SH = {"test": "lint, types and all tests", "python": "the Python of this environment"}
TITLE = "EHR-MSN: raw MIMIC tables and films -> features -> pretrained encoder -> probe, ICU fusion -> report"
NOTES = (
    "{program} COMMAND --help shows the options of a command, and an example.",
    "{program} --completion bash | zsh | fish prints a script for tab completion.",
    "CONFIG is a YAML file, or the name of a shipped one: `{program} config` lists them.",
    "pretrain, probe and fuse take --processes N (on each machine) --machines M --machine-rank I --main-address "
    "HOST[:PORT], or --accelerate-config FILE. Under SLURM (one task a machine) all are derived.",
)
WIDTH = 100  # of a help that goes to no terminal
NAMES = {(command.module, command.subcommand): name for name, command in COMMANDS.items()}


def program() -> str | None:
    """What a user types before a command's name here; None: `python -m` started this process."""
    if typed := os.environ.get(PROGRAM):
        return typed
    module = sys.orig_argv[sys.orig_argv.index("-m") + 1] if "-m" in sys.orig_argv else ""
    if module.partition(".")[0] in {command.module for command in COMMANDS.values()}:
        return None
    ours, here = CHECKOUT / "launch.sh", Path("launch.sh")
    return "./launch.sh" if ours.is_file() and here.is_file() and here.samefile(ours) else "ehr-msn"


def command_line(name: str, *words: object) -> str:
    """A command as a user types it here, for a `next:` line or an error."""
    start = program()
    if start is not None:
        return shlex.join([start, name, *map(str, words)])
    python = sys.orig_argv[: sys.orig_argv.index("-m") + 1]
    return shlex.join([*python, *COMMANDS[name][:2], *map(str, words)])


def usage() -> str:
    """The list of commands."""
    start = program() or "ehr-msn"
    rows = {f"{name} {command.takes}": command.does for name, command in COMMANDS.items()}
    rows |= {f"{name} ...": does for name, does in OF_LAUNCH_SH.items() if start.endswith("launch.sh")}
    width = max(shutil.get_terminal_size((WIDTH, 24)).columns, 60)

    def wrapped(text: str, before: str) -> str:
        indent = " " * len(before)
        return textwrap.fill(text, width, initial_indent=before, subsequent_indent=indent, break_on_hyphens=False)

    lines = [wrapped(does, f"    {row:32} ") for row, does in rows.items()]
    notes = [wrapped(note.format(program=start), "  ") for note in NOTES]
    return "\n".join([wrapped(TITLE, ""), "", f"  {start} COMMAND ...", *lines, "", *notes])
