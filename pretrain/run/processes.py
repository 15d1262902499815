"""The processes of a run: check of the world size, work in process 0, and a stop signal agreed by all."""

from __future__ import annotations

import argparse
import atexit
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeVar, cast

import torch
import torch.distributed as dist

from configs import UserError
from configs.launch import from_accelerate, refuse_unused
from configs.signals import INTERRUPTED, STOPPED, Stopped, hung_up, stops
from ehr_features.progress import Bar
from pretrain.run.heartbeat import COLLECTIVE, Heartbeat, connect

if TYPE_CHECKING:
    from accelerate import Accelerator

T = TypeVar("T")
PROCESSOR = Path("/proc/cpuinfo")  # of Linux
PATIENCE_SECONDS = 300.0  # for process 0 to answer
LIMIT_SECONDS = 600.0  # without a sign of life; the configs' `process_timeout`
PATIENCE_HOURS = 6.0  # for the next file of another process; the launcher ends a run whose process has failed
LOOK_SECONDS = 2.0  # between two looks at what a run needs
CODES = {UserError: 2, OSError: 2, Stopped: STOPPED, KeyboardInterrupt: INTERRUPTED}  # as configs.cli exits
_heartbeats: list[Heartbeat] = []  # this process's, once it has joined the others
_needed: list[Path] = []  # files that must stay where they are while it trains


def is_main() -> bool:
    """Whether this is process 0 of the run."""
    return (dist.get_rank() if distributed() else int(os.environ.get("RANK", "0"))) == 0


def accelerator(args: argparse.Namespace | None = None, *, limit: float = LIMIT_SECONDS, **options: Any) -> Accelerator:
    """Make the Accelerator of a run after checking the number of processes.

    Args:
        args: the command line's, with `processes` (on each machine) and `machines`; None: nothing was asked for.
        limit: seconds without a sign of life after which a process counts as lost, and the others leave.
        options: passed on to accelerate.Accelerator, e.g. mixed_precision, log_with, project_dir.
    Raises: UserError: another world size than --processes x --machines, more processes than GPUs, fp16 on a CPU,
        or FSDP, DeepSpeed or fp8 by accelerate's variables.
    """
    cpu = options.pop("cpu", False) or not torch.accelerator.is_available() or _truth("ACCELERATE_USE_CPU")
    precision = options.pop("mixed_precision", None) or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    refuse_unused("accelerate: ")
    check_precision(precision, cpu)
    precision = precision_here(precision, cpu)
    world = check_world(args)
    if world > 1 and not _heartbeats:
        atexit.register(_leave)
        _join(world, limit)
    from accelerate import Accelerator, InitProcessGroupKwargs

    waits = InitProcessGroupKwargs(timeout=timedelta(seconds=COLLECTIVE * limit))
    options["kwargs_handlers"] = [*options.get("kwargs_handlers", []), waits]
    made = Accelerator(cpu=cpu, mixed_precision=precision, **options)
    if made.num_processes != world:
        raise UserError(
            f"{world} processes were started but accelerate joined {made.num_processes}; start the run with "
            f"ehr-msn or ./launch.sh and --processes N (accelerate launch --cpu, for one, starts a single process)"
        )
    return made


def _join(world: int, limit: float) -> None:
    """Reach process 0, and begin to give signs of life."""
    if dist.is_initialized():  # by another launcher, such as accelerate's for notebooks
        rank, store = dist.get_rank(), dist.distributed_c10d._get_default_store()
    else:
        if not is_main():
            where = os.environ.get("MASTER_ADDR", "127.0.0.1"), os.environ.get("MASTER_PORT", "29500")
            _reach(*where, min(PATIENCE_SECONDS, limit))
        rank = int(os.environ.get("RANK", "0"))
        store = connect(rank, limit)
    _heartbeats.append(Heartbeat(store, rank, world, limit, int(os.environ.get("LOCAL_WORLD_SIZE", world))))


def check_precision(precision: str, cpu: bool) -> None:
    """Raises: UserError: fp16 on a CPU, whose kernels overflow or do not exist."""
    if precision == "fp16" and cpu:
        raise UserError("precision: fp16 needs a GPU; choose bf16 or no on a CPU")


def precision_here(precision: str, cpu: bool) -> str:
    """A config's `precision`, with what `auto` is on this machine."""
    return ("bf16" if has_bf16(cpu) else "no") if precision == "auto" else precision


def has_bf16(cpu: bool) -> bool:
    """Whether the GPU, or the processor, has instructions for bf16; where it is emulated it is slower than fp32."""
    if not cpu:
        return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    return PROCESSOR.is_file() and bool({"avx512_bf16", "amx_bf16"} & set(PROCESSOR.read_text().split()))


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
            f"(--ntasks-per-node=1) with `srun`, or say --processes 1 if that is meant"
        )
    file = getattr(args, "accelerate_config", None)
    job = {} if file is None else from_accelerate(Path(file))
    if job and world != (wanted := job["processes"] * job["machines"]):
        raise UserError(
            f"{file}: num_processes {wanted}, found {world}; start the run with ehr-msn or "
            f"./launch.sh and --accelerate-config {file} (accelerate launch starts a single "
            f"process where the config says MULTI_CPU)"
        )
    local = int(os.environ.get("LOCAL_WORLD_SIZE", world))
    wanted = (processes or local) * (machines or max(1, world // local))
    if world != wanted:
        asked = " ".join(f"{f} {n}" for f, n in (("--processes", processes), ("--machines", machines)) if n is not None)
        raise UserError(
            f"asked for {wanted} processes ({asked}; --processes counts those of each machine), found {world}; "
            f"start the run with ehr-msn or ./launch.sh, on every machine with the same flags and its own "
            f"--machine-rank"
        )
    gpus = torch.cuda.device_count()
    if gpus and local > gpus and not _truth("ACCELERATE_USE_CPU"):
        raise UserError(f"{local} processes on a machine with {gpus} GPUs; start at most {gpus} (--processes {gpus})")
    return world


def _truth(name: str) -> bool:
    return os.environ.get(name, "").lower() in ("1", "true", "yes")


def share(batch_size: int, world: int, key: str) -> int:
    """Rows of a step that each process computes: `batch_size` counts those of all processes, in every command.

    Raises: UserError: they do not divide evenly.
    """
    if batch_size % world:
        raise UserError(
            f"{key} {batch_size} does not divide among {world} processes: it counts the rows of a step over all of "
            f"them; choose a multiple of {world}, e.g. {-(-batch_size // world) * world}"
        )
    return batch_size // world


def _reach(host: str, port: str, patience: float) -> None:
    """Wait until process 0 accepts connections: torch would wait half an hour and then fail without the reason."""
    where, began, told = f"{host}:{port}", time.monotonic(), False
    while True:
        try:
            with socket.create_connection((host, int(port)), timeout=5):
                return
        except (OSError, ValueError) as error:
            waited = time.monotonic() - began
            if isinstance(error, (socket.gaierror, ValueError)) or waited > patience:
                raise UserError(
                    f"process 0 does not answer at {where} ({error}); is --main-address right and the same on all "
                    f"machines, does machine 0 run, and may this machine reach that port?"
                ) from None
        if waited > 15 and not told and os.environ.get("LOCAL_RANK", "0") == "0":
            told = True
            print(f"waiting for process 0 at {where}", file=sys.stderr, flush=True)
        time.sleep(0.2)


def _leave() -> None:
    """Destroy the process group at exit: gloo's threads otherwise abort a finished process now and then."""
    while _heartbeats:
        _heartbeats.pop().end()
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def on_main(action: Callable[[], T]) -> T | None:
    """Run `action` in process 0 while the others wait, however long; if it raises there, the others exit silently.

    Returns: its value in process 0; elsewhere None.
    """
    if not distributed():
        return action() if is_main() else None
    if dist.get_rank() == 0:
        code = 0
        try:
            return action()
        except BaseException as error:
            code = next((code for kind, code in CODES.items() if isinstance(error, kind)), 1)
            raise
        finally:
            _heartbeats[0].from_main(str(code))
    if code := int(_heartbeats[0].from_main()):
        sys.exit(code)
    return None


def watch(files: Iterable[Path]) -> None:
    """A run under which one of these files is moved or deleted saves and ends."""
    _needed[:] = [path.absolute() for path in files if path.is_file()]


class stopping:
    """A flag that SIGTERM (preemption) and SIGHUP set, in place of an exception in the middle of a step.

    `with stopping() as stop:` in every process, `stop.agreed()` at the same steps in all of them. What they agree on
    uses the CPU (gloo), so that asking at every step does not wait for a GPU. A run whose store or features are moved
    or deleted stops too: mapped files would end it without a word, on some file systems.
    """

    def __init__(self) -> None:
        self.requested = False
        self.gone: Path | None = None  # what a process found no more, twice
        self._looked, self._missed = time.monotonic(), False

    def __enter__(self) -> Self:
        self._group: Any = None  # the default group
        if distributed() and dist.get_backend() != "gloo":
            timeout = timedelta(seconds=COLLECTIVE * _heartbeats[0].limit)
            self._group = dist.new_group(backend="gloo", timeout=timeout)
        self._before = {number: signal.signal(number, self._set) for number in stops()}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _set(self, number: int, _: object) -> None:
        hung_up(number)
        self.requested = True

    def agreed(self, step: int = -1) -> bool:
        """Whether any process received a stop signal, after `step`; the same answer in all processes."""
        for heartbeat in _heartbeats:
            heartbeat.step = step
        self._look()
        stopped = self.any(self.requested)
        if stopped and distributed():  # process 0 names it, whichever process missed it
            found: list[Path | None] = [None] * dist.get_world_size()
            dist.all_gather_object(found, self.gone, group=self._group)
            self.gone = next((path for path in found if path is not None), None)
        return stopped

    def _look(self) -> None:
        """Whether what the run needs is still there."""
        if time.monotonic() - self._looked < LOOK_SECONDS:
            return
        self._looked, gone = time.monotonic(), next((p for p in _needed if not os.path.exists(p)), None)
        if gone is not None and self._missed:
            self.gone, self.requested = gone, True
        self._missed = gone is not None

    def any(self, flag: bool) -> bool:
        """Whether the flag is true in any process."""
        if not distributed():
            return flag
        flags = torch.tensor(int(flag))
        dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=self._group)
        return bool(flags.item())


# ---- Work that takes longer than a process group waits: shared by files, without a collective call


def agreed(ask: Callable[[], T]) -> T:
    """Process 0's answer, in all processes."""
    answer: list[Any] = [on_main(ask)]
    if not distributed():
        return cast("T", answer[0])
    dist.broadcast_object_list(answer, src=0)
    return cast("T", answer[0])


def divide(
    files: Sequence[Path],
    make: Callable[[int, Bar], None],
    what: str,
    unit: str,
    sizes: Sequence[int] | None = None,
    whole: Callable[[Path], bool] = Path.is_file,
) -> None:
    """Make the files that are not there, each in one process; returns in every process once all are there.

    A stopped run goes on with the files that it lacks.

    Args:
        files: the same in all processes. make: writes file number i under its final name when it is complete.
        what, unit: of the bar. sizes: units in each file, which `make` counts; None: no bar here.
        whole: whether a file can be used; others are removed and made.
    Raises: UserError: no file has come for `PATIENCE_HOURS`.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if distributed() else (0, 1)

    def absent() -> set[int]:
        found = [i for i, path in enumerate(files) if not whole(path)]
        for i in found:
            files[i].unlink(missing_ok=True)
        return set(found)

    mine = sorted(agreed(absent) & set(range(rank, len(files), world)))
    with Bar(what, sum(sizes[i] for i in mine) if sizes else 0, unit, shown=rank == 0 and bool(sizes and mine)) as bar:
        for i in mine:
            make(i, bar)
    waited, before = time.monotonic(), -1
    with Bar("other processes", len(files), "files", shown=rank == 0, after=5) as bar:
        while (there := sum(path.is_file() for path in files)) < len(files):
            if there != before:
                bar.advance(there - max(before, 0))
                waited, before = time.monotonic(), there
            if time.monotonic() - waited > PATIENCE_HOURS * 3600:
                lost = next(path for path in files if not path.is_file())
                raise UserError(
                    f"{lost}: another process has not written it for {PATIENCE_HOURS:g} hours; has it died?"
                )
            time.sleep(0.2)
