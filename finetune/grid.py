"""`grid CONFIG`: run the same commands for every combination of the choices.

Input: a YAML file with `axes` (the choices) and `steps` (the commands). Output: OUT/NAME/STEP, a run folder for each
combination and step, made by the commands that a user would type. Complete runs are skipped, so the same command
resumes; several machines share a grid with `--shard i/n`.
"""

from __future__ import annotations

import fnmatch
import itertools
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from configs import Settings, UserError, load
from configs.commands import command_line
from configs.launch import end_with_me
from configs.signals import held
from ehr_features.files import digest, lock, write_json, write_seal
from ehr_features.typed import read_json
from ehr_features.typed.shapes import Provenance
from finetune.config import FuseConfig, GridConfig, ProbeConfig
from pretrain.config import PretrainConfig

COMMANDS: dict[str, tuple[str, str, type[Settings]]] = {
    "pretrain": ("pretrain", "train", PretrainConfig),
    "probe": ("finetune", "probe", ProbeConfig),
    "fuse": ("finetune", "fuse", FuseConfig),
}


@dataclass(frozen=True)
class Command:
    """One step of one combination."""

    name: str  # of the combination
    folder: Path
    words: tuple[str, ...]  # pretrain | probe | fuse, CONFIG, key=value ...

    @property
    def done(self) -> bool:
        path = self.folder / "provenance.json"
        return path.is_file() and bool(read_json(path, Provenance).get("finished_at"))

    def typed(self, processes: int) -> str:
        """The command as a user would type it."""
        return command_line(*self.words, *(["--processes", str(processes)] if processes > 1 else []))


def plan(config: GridConfig) -> list[list[Command]]:
    """The commands of each combination, in order; {step} in a word stands for that step's folder."""
    out = []
    for choices in itertools.product(*(axis.items() for axis in config.axes.values())):
        name = "-".join(choice for choice, _ in choices)
        folders = {step: Path(config.out) / name / step for step in config.steps}
        out.append([_command(config, name, step, folders, [own for _, own in choices]) for step in config.steps])
    return out


def methods(config: GridConfig) -> dict[str, str]:
    """Map each combination's name to its name without axes that only set seeds, so that a table can average over
    seeds."""

    def seeds(axis: Mapping[str, Mapping[str, list[str]]]) -> bool:
        return all(word.startswith("seed=") for own in axis.values() for words in own.values() for word in words)

    kept = [not seeds(axis) for axis in config.axes.values()]
    return {
        "-".join(choices): "-".join(itertools.compress(choices, kept)) or "all"
        for choices in itertools.product(*config.axes.values())
    }


def choices(config: GridConfig) -> dict[str, dict[str, str]]:
    """Each combination's name -> axis -> choice, for tables."""
    combinations = itertools.product(*config.axes.values())
    return {"-".join(own): dict(zip(config.axes, own, strict=True)) for own in combinations}


def _command(
    config: GridConfig, name: str, step: str, folders: Mapping[str, Path], choices: list[dict[str, list[str]]]
) -> Command:
    given = [*config.steps[step], *itertools.chain.from_iterable(own.get(step, []) for own in choices)]
    words = []
    for word in given:
        for other, folder in folders.items():
            word = word.replace("{" + other + "}", folder.as_posix())
        words.append(word)
    return Command(name, folders[step], (*words, f"out={folders[step].as_posix()}"))


def grid(config: GridConfig, *, shard: str = "1/1", only: str = "*", dry_run: bool = False, processes: int = 1) -> int:
    """Run the steps that are not complete.

    Args:
        shard: `i/n`: every n-th combination, beginning with the i-th (from 1).
        only: a pattern for the names of combinations, e.g. `tiny-*`.
        dry_run: print the unfinished commands, and stop.
        processes: of each run, one per GPU.
    Returns: 0, or the highest exit code of the failed steps; the others are still run.
    Raises: UserError: a fault in any combination, before anything starts; Stopped: SIGTERM, passed on.
    """
    combinations = plan(config)
    for commands in combinations:
        for command in commands:
            load(COMMANDS[command.words[0]][2], command.words[1], command.words[2:])
    chosen = [c for c in _shard(combinations, shard) if fnmatch.fnmatch(c[0].name, only)]
    if not chosen:
        raise UserError(f"no combination is called {only!r}; there are {', '.join(c[0].name for c in combinations)}")
    waiting = [command for commands in chosen for command in commands if not command.done]
    total = sum(map(len, chosen))
    print(f"{len(chosen)} of {len(combinations)} combinations, {total} runs, {total - len(waiting)} complete")
    if dry_run:
        print("\n".join(command.typed(processes) for command in waiting))
        return 0
    lock(Path(config.out), f".lock-{digest([shard, only])}")  # other machines may run other shards
    about = {"methods": methods(config), "axes": choices(config), "steps": list(config.steps)}
    write_json(Path(config.out) / "grid.json", about)
    write_seal(config.out, "grid.json")
    failed: dict[str, int] = {}
    for i, command in enumerate(waiting):
        if command.name in failed:
            continue  # later steps need the failed one
        print(f"\n[{i + 1}/{len(waiting)}] {command.typed(processes)}", flush=True)
        code = _run(command, processes)
        if code in (75, 130):
            return code
        if code:
            failed[command.name] = code
    for name, code in failed.items():
        print(f"failed: {name} (exit code {code}; its message stands above)", file=sys.stderr)
    print(f"\nnext: {command_line('runs', config.out)}\n      {command_line('report', config.out)}")
    return max(failed.values(), default=0)


def _run(command: Command, processes: int) -> int:
    module, subcommand, _ = COMMANDS[command.words[0]]
    words = [module, subcommand, *command.words[1:]]
    if processes > 1:
        words = ["configs.launch", "--processes", str(processes), "--", *words, "--processes", str(processes)]
    with held():
        child = subprocess.Popen([sys.executable, "-m", *words], preexec_fn=end_with_me(os.getpid()))
    try:
        return child.wait()
    finally:
        if child.poll() is None:  # this process received the signal
            child.send_signal(signal.SIGTERM)
            child.wait()


def _shard(combinations: list[list[Command]], shard: str) -> list[list[Command]]:
    part, _, of = shard.partition("/")
    if not (part.isdigit() and of.isdigit() and 1 <= int(part) <= int(of)):
        raise UserError(f"--shard {shard}: wanted i/n with 1 <= i <= n, e.g. 1/4")
    return combinations[int(part) - 1 :: int(of)]
