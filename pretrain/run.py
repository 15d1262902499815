"""A run folder and what every training loop needs around it; used by pretraining and by fine-tuning.

runs/X/: config.yaml, provenance.json, metrics.jsonl, log.txt, checkpoints/step_*.pt. Only process 0 writes; what it
decides or refuses, all processes do. A loop reads as

    accelerator = run.accelerator(args, mixed_precision="no")
    folder = run.open_run(config.out, config, sources=[...])
    if run.complete(folder): return folder
    log, state = run.Log(folder, accelerator), run.load_checkpoint(folder)
    log.cut(state["step"] if state else 0)
    with run.stopping() as stop:
        for step in ...:
            ...; log.log({"train/loss": loss}, step)
            if stop.agreed():
                run.save_checkpoint(folder, state, step); raise Stopped(run.go_on(folder, step))
    run.finish(folder)
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeVar

import torch
import torch.distributed as dist
import yaml

from configs import Settings, UserError
from ehr_features.files import PARTIAL, file_digest, new_file, provenance, read_json, write_json
from pretrain.lock import lock

if TYPE_CHECKING:
    from accelerate import Accelerator

T = TypeVar("T")
OURS = ("config.yaml", "provenance.json", "metrics.jsonl", "log.txt", "checkpoints", "encoder", "seen_subjects.parquet")


def is_main() -> bool:
    """Whether this is process 0 of the run."""
    return int(os.environ.get("RANK", "0")) == 0


# ---- processes ------------------------------------------------------------------------------------------------------
def accelerator(args: argparse.Namespace | None = None, **options: Any) -> Accelerator:
    """Make the Accelerator of a run, once the number of processes is known to be what was asked for.

    Args:
        args: the command line's, with `processes` (on each machine) and `machines`; None: nothing was asked for.
        options: passed on to accelerate.Accelerator, e.g. mixed_precision, log_with, project_dir.
    Raises: UserError: another world size than --processes x --machines, or more processes than GPUs.
    """
    world = check_world(args)
    from accelerate import Accelerator

    cpu = options.pop("cpu", False) or not torch.accelerator.is_available()
    made = Accelerator(cpu=cpu, **options)
    if made.num_processes != world:
        raise UserError(
            f"{world} processes were started but accelerate joined {made.num_processes}; start the run with "
            f"./launch.sh ... --processes N (accelerate launch --cpu, for one, starts a single process)"
        )
    return made


def check_world(args: argparse.Namespace | None) -> int:
    """Compare the processes that run with those asked for. Returns: the world size. Raises: UserError: they differ."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    processes, machines = getattr(args, "processes", None), getattr(args, "machines", None)
    for flag, number in (("--processes", processes), ("--machines", machines)):
        if number is not None and number < 1:
            raise UserError(f"{flag} {number}: wanted at least 1")
    steps = int(os.environ.get("SLURM_STEP_NUM_TASKS", "1"))
    if world == 1 and steps > 1 and processes is None:
        raise UserError(
            f"SLURM started {steps} tasks, and each of them is a run of its own: start one task a machine "
            f"(--ntasks-per-node=1) with `srun ./launch.sh ...`, or say --processes 1 if that is meant"
        )
    local = int(os.environ.get("LOCAL_WORLD_SIZE", world))
    wanted = (processes or local) * (machines or max(1, world // local))
    if world != wanted:
        asked = " ".join(f"{f} {n}" for f, n in (("--processes", processes), ("--machines", machines)) if n is not None)
        raise UserError(
            f"asked for {wanted} processes ({asked}; --processes counts those of each machine), found {world}; "
            f"start the run with ./launch.sh, on every machine with the same flags and its own --machine-rank"
        )
    gpus = torch.cuda.device_count()
    if gpus and local > gpus and os.environ.get("ACCELERATE_USE_CPU", "").lower() not in ("1", "true", "yes"):
        raise UserError(f"{local} processes on a machine with {gpus} GPUs; start at most {gpus} (--processes {gpus})")
    return world


def _distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _on_main(action: Callable[[], T]) -> T | None:
    """Do `action` in process 0; the others wait, and raise if it raised there. Returns: its value; elsewhere None."""
    if not _distributed():
        return action() if is_main() else None
    value, failure = None, None
    if dist.get_rank() == 0:
        try:
            value = action()
        except BaseException as error:
            failure = error
    told = [None if failure is None else f"process 0: {failure}"]
    dist.broadcast_object_list(told, src=0)
    if failure is not None:
        raise failure
    if told[0] is not None:
        raise UserError(told[0])
    return value


# ---- the folder -----------------------------------------------------------------------------------------------------
def open_run(
    out: str | Path, config: Settings, *, sources: Sequence[str | Path] = (), may_differ: Sequence[str] = ()
) -> Path:
    """Make runs/X, or go on with it if it is of the same config and the same sources.

    Args:
        out: the folder.
        config: what the run is of; saved as config.yaml.
        sources: files that it reads; by their content a run knows its input again.
        may_differ: keys (with dots) that may change between calls, e.g. `workers`; `out` always may.
    Returns: the folder; the lock on it is held until the process ends.
    Raises: UserError: another command works in it, it holds another config, or it is no run folder.
    """
    folder = Path(out)

    def open_it() -> None:
        _no_stranger(folder)
        lock(folder)
        for stale in [*folder.glob(f".*{PARTIAL}-*"), *folder.glob(f"checkpoints/.*{PARTIAL}-*")]:
            if stale.is_file():
                stale.unlink()  # left by a process that was killed: the lock is ours
        given = config.model_dump(mode="json")
        digests = {Path(s).as_posix(): file_digest(s) for s in sources if Path(s).is_file()}
        if (folder / "config.yaml").exists():
            _same_config(folder, given, {"out", *may_differ})
            _same_sources(folder, digests)
        else:
            (folder / "checkpoints").mkdir(exist_ok=True)
            write_json(folder / "provenance.json", provenance(given, sources, digests=digests, command=command()))
            with new_file(folder / "config.yaml") as part:  # last: a folder with a config is whole
                part.write_text(yaml.safe_dump(given, sort_keys=False), encoding="utf-8")

    _on_main(open_it)
    return folder


def _no_stranger(folder: Path) -> None:
    if folder.is_dir() and not (folder / "config.yaml").exists():
        foreign = sorted(p.name for p in folder.iterdir() if p.name not in OURS and not p.name.startswith("."))
        if foreign:
            raise UserError(
                f"{folder}: not a run folder; it holds {', '.join(foreign[:5])}. Choose another with out=..."
            )


def _same_config(folder: Path, given: dict[str, Any], free: set[str]) -> None:
    path = folder / "config.yaml"
    try:
        held = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError):
        held = None
    if not isinstance(held, dict):
        raise UserError(f"{path}: damaged; remove {folder} to start again, or choose another folder with out=...")
    old, new = dict(_flat(held)), dict(_flat(given))
    keys = [k for k in {**old, **new} if k not in free and old.get(k, "absent") != new.get(k, "absent")]
    if keys:
        lines = [f"  {k}: {old.get(k, 'absent')!r} there, {new.get(k, 'absent')!r} now" for k in keys[:12]]
        more = [f"  and {len(keys) - 12} more"] if len(keys) > 12 else []
        raise UserError(
            "\n".join([f"{folder}: holds a run of another config:", *lines, *more])
            + f"\nchoose another folder with out=..., or remove {folder} to start again"
        )


def _same_sources(folder: Path, digests: dict[str, str]) -> None:
    held = read_json(folder / "provenance.json").get("digests", {})
    changed = [path for path, digest in digests.items() if held.get(path, digest) != digest]
    if changed:
        raise UserError(
            f"{folder}: its input has changed since it began: {', '.join(changed[:5])}; "
            f"choose another folder with out=..., or remove {folder} to start again"
        )


def _flat(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, item in value.items():
        if isinstance(item, Mapping) and item:
            yield from _flat(item, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", item


def complete(folder: Path) -> bool:
    """Whether the run in the folder has finished; if so, say how to redo it. The same answer in all processes."""

    def ask() -> bool:
        at = read_json(folder / "provenance.json").get("finished_at")
        if at:
            print(
                f"{folder}: complete since {at}, nothing to do; to redo it, remove the folder or choose another out=..."
            )
        return bool(at)

    answer = [_on_main(ask)]
    if _distributed():
        dist.broadcast_object_list(answer, src=0)
    return bool(answer[0])


def finish(folder: Path, **more: Any) -> None:
    """Mark the run as complete; `more` is added to provenance.json."""

    def mark() -> None:
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        write_json(folder / "provenance.json", read_json(folder / "provenance.json") | more | {"finished_at": now})

    _on_main(mark)


# ---- metrics and messages -------------------------------------------------------------------------------------------
class Log:
    """metrics.jsonl, log.txt, the terminal, and accelerate's trackers if there are any. Silent but in process 0."""

    def __init__(self, folder: Path, accelerator: Accelerator | None = None) -> None:
        self.folder, self.accelerator = Path(folder), accelerator
        self._began = time.monotonic()  # a clock that is put back does not matter

    def log(self, values: Mapping[str, Any], step: int) -> None:
        """Append one line of metrics, {"step", "seconds", **values}; what is not finite is written as null."""
        if self.accelerator is not None and self.accelerator.trackers:
            self.accelerator.log(dict(values), step=step)
        if is_main():
            plain = {key: _number(value) for key, value in values.items()}
            line = {"step": step, "seconds": round(time.monotonic() - self._began, 3), **plain}
            with (self.folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(line, allow_nan=False) + "\n")

    def say(self, text: str) -> None:
        """Print, and append to log.txt with the time."""
        if is_main():
            print(text, flush=True)
            with (self.folder / "log.txt").open("a", encoding="utf-8") as file:
                file.write(f"{datetime.datetime.now():%Y-%m-%d %H:%M:%S} {text}\n")

    def cut(self, step: int) -> None:
        """Drop the metrics after `step`: a run that goes on from there writes them again."""

        def cut_it() -> None:
            path = self.folder / "metrics.jsonl"
            if path.exists():
                lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
                with new_file(path) as part:
                    part.write_text("".join(line for line in lines if _step(line) <= step), encoding="utf-8")

        _on_main(cut_it)


def _number(value: Any) -> Any:
    value = value.item() if hasattr(value, "item") else value
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _step(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf  # half a line: the process was killed while it wrote


# ---- checkpoints ----------------------------------------------------------------------------------------------------
def save_checkpoint(
    folder: Path, state: Mapping[str, Any], step: int, *, keep: int = 2, every_hours: float | None = None
) -> None:
    """Write checkpoints/step_N.pt beside its place, rename it, then remove old ones. All processes call this.

    Args:
        state: tensors and plain values in dicts, lists and tuples; `step` is added to it.
        keep: how many of the newest stay.
        every_hours: of the older ones, one stays for each such span of time; None: none stays.
    Raises: UserError: the disk is full; the checkpoints before this one are untouched.
    """

    def save() -> None:
        _plain({**state}, "state")
        path = folder / "checkpoints" / f"step_{step:09d}.pt"
        try:
            with new_file(path) as part, part.open("wb") as file:
                torch.save({**state, "step": step}, file)
        except (OSError, RuntimeError) as error:  # torch turns a failed write into a RuntimeError
            if isinstance(error, RuntimeError) and not isinstance(error.__context__, OSError):
                raise
            raise UserError(
                f"{path}: could not be written ({_why(error)}); nothing is lost: the checkpoints before it are whole. "
                f"Free some space and run the same command again"
            ) from None
        _prune(path, keep, every_hours)

    _on_main(save)


def _why(error: BaseException) -> str:
    cause = error if isinstance(error, OSError) else error.__context__
    return (cause.strerror if isinstance(cause, OSError) else None) or str(error).splitlines()[0]


def _plain(value: Any, where: str) -> None:
    """Refuse now what weights_only=True would refuse when the run goes on."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            _plain(item, f"{where}[{key!r}]")
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            _plain(item, f"{where}[{index}]")
    elif not (value is None or isinstance(value, torch.Tensor) or type(value) in (bool, int, float, str, bytes)):
        raise TypeError(f"{where} is a {type(value).__name__}; a checkpoint holds tensors and plain values only")


def _prune(newest: Path, keep: int, every_hours: float | None) -> None:
    """By step, never by clock; what lies after the newest step is of a future that was given up."""
    paths = sorted(newest.parent.glob("step_*.pt"), reverse=True)
    for path in [p for p in paths if p.name > newest.name]:
        path.unlink(missing_ok=True)
    kept_at: float | None = None
    for path in reversed([p for p in paths if p.name <= newest.name][keep:]):  # the oldest first
        at = path.stat().st_mtime
        if every_hours is not None and (kept_at is None or abs(at - kept_at) >= every_hours * 3600):
            kept_at = at
        else:
            path.unlink(missing_ok=True)


def load_checkpoint(folder: Path) -> dict[str, Any] | None:
    """Read the newest checkpoint that is whole, on the CPU; None if there is none. All processes call this.

    Raises: UserError: there are some and none can be read, or the processes do not see the same ones.
    """
    paths = sorted((Path(folder) / "checkpoints").glob("step_*.pt"), reverse=True)
    state: dict[str, Any] | None = None
    for path in paths:
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            break
        except Exception as error:  # damaged bytes make torch raise almost anything
            Log(folder).say(f"{path}: damaged ({str(error).splitlines()[0][:120]}); the one before it is tried")
    if _distributed():
        steps: list[int] = [0] * dist.get_world_size()
        dist.all_gather_object(steps, -1 if state is None else state["step"])
        if len(set(steps)) > 1:
            raise UserError(
                f"{folder}: the processes see checkpoints of steps {sorted(set(steps))} (-1: none); "
                f"all machines need the same {folder}, on a shared file system"
            )
    if paths and state is None:
        raise UserError(f"{folder}/checkpoints: none of {len(paths)} can be read; remove them to start from step 0")
    return state


# ---- stopping -------------------------------------------------------------------------------------------------------
class stopping:
    """A flag that SIGTERM sets (preemption), in place of an exception in the middle of a step.

    `with stopping() as stop:` in every process, `stop.agreed()` at the same steps in all of them.
    """

    def __init__(self) -> None:
        self.requested = False

    def __enter__(self) -> Self:
        self._before = signal.signal(signal.SIGTERM, self._set)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGTERM, self._before)

    def _set(self, *_: object) -> None:
        self.requested = True

    def agreed(self) -> bool:
        """Whether any process was asked to stop; a small all-reduce, so the answer is the same in all of them."""
        if not _distributed():
            return self.requested
        device = "cuda" if dist.get_backend() == "nccl" else "cpu"
        flag = torch.tensor(int(self.requested), device=device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag.item())


def command() -> str:
    """The command that started this process, as a user would type it."""
    start, words = Path(sys.argv[0]), sys.argv[1:]
    names = {("pretrain", "train"): "pretrain", ("finetune", "probe"): "probe", ("finetune", "fuse"): "fuse"}
    key = (start.parent.name, words[0] if words else "")
    if start.name == "__main__.py" and key in names:
        return shlex.join(["./launch.sh", names[key], *words[1:]])
    module = ["python", "-m", start.parent.name] if start.name == "__main__.py" else [start.as_posix()]
    return shlex.join([*module, *words])


def go_on(folder: Path, step: int) -> str:
    """What to say when a run stops early: `raise Stopped(go_on(folder, step))`."""
    return f"{folder}: stopped at step {step} and saved; go on with\n  {command()}"
