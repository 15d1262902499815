"""Start the processes of one run on this machine, for `--processes N`, under SLURM, or by an accelerate config.

Each process gets the variables that torch.distributed and accelerate read: RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR,
MASTER_PORT.
SIGTERM, SIGHUP and Ctrl-C are passed on once, so that a run can save and leave with its own exit code.
`python -m configs.launch --processes N ... -- MODULE ARGS` starts any module so.

Differs from torchrun and accelerate launch: both print a traceback and exit with 1 whatever the run's own code, so that
a preempted run (75) or a mistake in a config (2) could not be told from a crash.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports below, which take a while
    from configs.begin import begin

    begin()

import argparse
import ctypes
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from configs import UserError, threads
from configs.commands import COMMANDS, command_line
from configs.signals import INTERRUPTED, STOPPED, hung_up, stops

MOST_PROCESSES = 1024
KINDS = ("NO", "MULTI_GPU", "MULTI_CPU")  # what accelerate calls one process, several GPUs, several CPU processes
PATIENCE_SECONDS = 60.0  # for the others, once one process has left
REFUSED = {  # what accelerate offers besides, and why it is not used
    "FSDP": "FSDP shards weights, but a process of DDP holds those of a ViT-L, its target and its optimizer in 6 GB "
    "(docs/clusters.md); take MULTI_GPU, and checkpointing=true for the activations",
    "DEEPSPEED": "DeepSpeed replaces optimizer, precision and checkpoints: a run could not go on without it; and it "
    "shards weights that fit (docs/clusters.md); take MULTI_GPU",
    "FP8": "fp8 scales values by their history, which no checkpoint here holds, and its effect on these losses is not "
    "measured; take precision=bf16",
}
LOST_SECONDS = 8.0  # in which the launcher or a heartbeat names a process that is gone
ALONE = {"-h", "--help", "--print-config", "--keys"}  # flags of a command that only prints


@dataclass(frozen=True)
class Job:
    """The processes of a run."""

    processes: int = 1  # on each machine
    machines: int = 1
    machine_rank: int = 0
    main_address: str | None = None
    environment: Mapping[str, str] = field(default_factory=dict)  # more variables for each process


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of a command that several processes can run."""
    parser.add_argument("--processes", type=int, metavar="N", help="processes on each machine, one a GPU")
    parser.add_argument("--machines", type=int, metavar="M", help="number of machines")
    parser.add_argument("--machine-rank", type=int, metavar="I", help="this machine, from 0")
    parser.add_argument("--main-address", metavar="A", help="host[:port] of machine 0, the same on every machine")
    parser.add_argument("--accelerate-config", metavar="FILE", help="an accelerate config; flags override it")


def start(name: str, words: Sequence[str]) -> int | None:
    """Start the processes of a command, if there are several.

    Args:
        name: of `configs.commands`. words: the command's arguments, process flags among them.
    Returns: the run's exit code; None: one process is wanted, and the caller runs the command itself.
    Raises: UserError: flags, SLURM's variables or the accelerate config do not fit.
    """
    parser = argparse.ArgumentParser(prog=command_line(name), add_help=False, allow_abbrev=False)
    add_flags(parser)
    flags, rest = parser.parse_known_args(words)
    if ALONE & set(rest):
        return None
    job = plan(flags, os.environ)
    if job.processes == job.machines == 1 and flags.accelerate_config is None:
        return None
    return run(job, [*COMMANDS[name][:2], *words])


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m configs.launch`: start the processes of any module. Returns: the run's exit code."""
    parser = argparse.ArgumentParser(prog="python -m configs.launch", description=(__doc__ or "").splitlines()[0])
    add_flags(parser)
    parser.add_argument("module", nargs=argparse.REMAINDER, help="-- MODULE ARGS")
    flags = parser.parse_args(argv)
    words = flags.module[flags.module[:1] == ["--"] :]
    if not words:
        parser.error("nothing to run: give -- MODULE ARGS")
    try:
        return run(plan(flags, {}), words)
    except UserError as error:
        parser.exit(2, f"error: {error}\n")


def plan(flags: argparse.Namespace, environ: Mapping[str, str]) -> Job:
    """What flags leave open is read from SLURM's variables, then from the accelerate config, else one process.

    Raises: UserError: see `start`.
    """
    file = {} if flags.accelerate_config is None else from_accelerate(Path(flags.accelerate_config))
    slurm = _from_slurm(environ, flags.main_address)
    if file:
        slurm = {key: slurm[key] for key in ("machine_rank", "main_address") if key in slurm}
    names = ("processes", "machines", "machine_rank", "main_address")
    given = {name: getattr(flags, name) for name in names if getattr(flags, name) is not None}
    job = Job(**(file | slurm | given))
    if job.processes < 1 or job.machines < 1 or not 0 <= job.machine_rank < job.machines:
        raise UserError("--processes and --machines must be at least 1, --machine-rank from 0 to machines - 1")
    if job.processes > MOST_PROCESSES:
        raise UserError(f"--processes {job.processes}: wanted one a GPU, {MOST_PROCESSES:,} on a machine at most")
    if job.machines > 1 and not job.main_address:
        raise UserError("--main-address HOST[:PORT] of machine 0 is needed with --machines > 1")
    return job


def run(job: Job, words: Sequence[str]) -> int:
    """Run `python -m WORDS` in each process. Returns: the exit code of the first that failed, else 0."""
    host, _, port = (job.main_address or "127.0.0.1").partition(":")
    if not port:
        port = "29500" if job.machines > 1 else str(_free_port())
    children: list[subprocess.Popen[bytes]] = []
    told: list[int] = []  # signals that came, to be passed on

    def tell(number: int, _: object) -> None:
        hung_up(number)
        told.append(number)
        _send(children, number)

    for number in (*stops(), signal.SIGINT):
        signal.signal(number, tell)
    for local in range(job.processes):
        own = {
            "RANK": str(job.machine_rank * job.processes + local),
            "LOCAL_RANK": str(local),
            "WORLD_SIZE": str(job.processes * job.machines),
            "LOCAL_WORLD_SIZE": str(job.processes),
            "MASTER_ADDR": host,
            "MASTER_PORT": port,
            "TORCH_CPP_LOG_LEVEL": os.environ.get("TORCH_CPP_LOG_LEVEL", "ERROR"),  # no stack of a lost connection
            **threads.of_each(job.processes),
        }
        children.append(
            subprocess.Popen(
                [sys.executable, "-m", *words],
                env=os.environ | job.environment | own,
                preexec_fn=end_with_me(os.getpid()),
            )
        )
    for came in told:
        _send(children, came)  # it came while they were started
    return _wait(children, told, job.machine_rank * job.processes)


def _from_slurm(environ: Mapping[str, str], main_address: str | None) -> dict[str, Any]:
    """The job inside `srun`, one task a machine; {} elsewhere. Raises: UserError: several tasks on a machine."""
    if not (environ.get("SLURM_JOB_ID") and environ.get("SLURM_STEP_ID")):
        return {}
    machines = int(environ.get("SLURM_STEP_NUM_NODES") or environ.get("SLURM_NNODES") or 1)
    tasks = int(environ.get("SLURM_NTASKS") or 1)
    if tasks != machines:
        raise UserError(
            f"SLURM started {tasks} tasks on {machines} machines; use --ntasks-per-node=1: a task starts a process a "
            f"GPU itself"
        )
    found: dict[str, Any] = {
        "processes": int(environ.get("SLURM_GPUS_ON_NODE") or 1),
        "machines": machines,
        "machine_rank": int(environ.get("SLURM_NODEID") or 0),
    }
    if machines > 1 and main_address is None:
        nodes = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST") or ""
        try:
            hosts = subprocess.run(["scontrol", "show", "hostnames", nodes], check=True, capture_output=True, text=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise UserError(
                f"scontrol cannot name the first machine of {nodes} ({error}); add --main-address"
            ) from None
        port = 20000 + int(environ["SLURM_JOB_ID"]) % 20000
        found["main_address"] = f"{hosts.stdout.splitlines()[0]}:{port}"
    return found


def from_accelerate(path: Path) -> dict[str, Any]:
    """The job that `accelerate config` wrote. The precision is the run's own config's."""
    try:
        said = yaml.safe_load(path.read_text(encoding="utf-8"))
        machines = int(said.get("num_machines") or 1)
        processes, odd = divmod(int(said["num_processes"]), machines)
        rank, kind = int(said.get("machine_rank") or 0), str(said.get("distributed_type", "NO")).upper()
    except (OSError, UnicodeDecodeError, yaml.YAMLError, AttributeError, KeyError, TypeError, ValueError):
        raise UserError(f"{path}: no accelerate config with `num_processes`; `accelerate config` writes one") from None
    if odd:
        raise UserError(f"{path}: num_processes {said['num_processes']} do not divide among num_machines {machines}")
    refuse_unused(f"{path}: ", kind, str(said.get("mixed_precision", "no")))
    if kind not in KINDS:
        raise UserError(f"{path}: distributed_type {kind} cannot be used here; wanted one of {', '.join(KINDS)}")
    address = said.get("main_process_ip")
    if address and said.get("main_process_port"):
        address = f"{address}:{said['main_process_port']}"
    environment = {"ACCELERATE_USE_CPU": "true"} if said.get("use_cpu") or kind == "MULTI_CPU" else {}
    if str(said.get("gpu_ids") or "all") != "all":
        environment["CUDA_VISIBLE_DEVICES"] = str(said["gpu_ids"])
    return {
        "processes": processes,
        "machines": machines,
        "machine_rank": rank,
        "main_address": address,
        "environment": environment,
    }


def refuse_unused(where: str, kind: str = "", precision: str = "") -> None:
    """Raises: UserError: accelerate is to use what is not used here, by its config or its variables."""
    on = {name: os.environ.get(f"ACCELERATE_USE_{name}", "").lower() in ("1", "true", "yes") for name in REFUSED}
    precision = precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "")
    for name, why in REFUSED.items():
        if kind == name or on[name] or precision.upper() == name:
            raise UserError(f"{where}{why}")


def end_with_me(parent: int) -> Callable[[], None]:
    """What a child does between fork and exec, to be killed when its parent is: none works on alone in the folder."""
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None

    def tie() -> None:
        if libc is not None:
            libc.prctl(1, signal.SIGKILL)  # 1: PR_SET_PDEATHSIG
        if os.getppid() != parent:  # it was killed before
            os._exit(1)

    return tie


def _wait(children: list[subprocess.Popen[bytes]], told: list[int], number: int) -> int:
    """Wait for all; once one has failed the others get a while to leave by themselves, then SIGTERM, then SIGKILL.

    Args:
        number: of the first of them in the run.
    """
    code, deadline = 0, 0.0
    while any(child.poll() is None for child in children):
        failed = [child for child in children if child.poll() not in (None, 0)]
        if failed and not code:
            first = min(failed, key=lambda child: child.returncode)  # a killed one: the others leave because of it
            code = _code(number + children.index(first), first.returncode, told)
            # A mistake is everybody's mistake, and processes that wait in a collective for a dead one never leave.
            deadline = time.monotonic() + (PATIENCE_SECONDS if code == STOPPED and told else 4.0)
        if code:
            for child in filter(_is_stopped, children):  # by SIGSTOP, and it would not answer SIGTERM
                child.kill()
            if time.monotonic() > deadline:
                late = time.monotonic() > deadline + 10
                _send(children, signal.SIGKILL if late else signal.SIGTERM)
                time.sleep(0.5)
        time.sleep(0.05)
    return code or next((_code(number + i, c.returncode, told) for i, c in enumerate(children) if c.returncode), 0)


def _is_stopped(child: subprocess.Popen[bytes]) -> bool:
    """Whether it still runs and was stopped by a signal."""
    if child.poll() is not None or not hasattr(os, "waitid"):  # macOS before Python 3.13
        return False
    return os.waitid(os.P_PID, child.pid, os.WSTOPPED | os.WNOHANG | os.WNOWAIT) is not None


def _code(rank: int, code: int, told: list[int]) -> int:
    if code >= 0:
        return code
    if -code in told:  # it had not come so far as to listen
        if rank == 0:
            print(f"stopped by {signal.Signals(-code).name} before it began; the same command goes on", file=sys.stderr)
        return INTERRUPTED if -code == signal.SIGINT else STOPPED
    print(
        f"process {rank} was ended by {signal.Signals(-code).name}"
        + (" (was the memory used up?)" if code == -signal.SIGKILL else "")
        + "; the same command goes on from the last checkpoint",
        file=sys.stderr,
    )
    return 1


def between_processes(error: RuntimeError) -> bool:
    """Whether an error is of a call between the processes of a run: one of them has gone, or is stuck."""
    several = os.environ.get("WORLD_SIZE", "1") != "1"
    return several and ("torch.distributed" in type(error).__module__ or re.search("gloo|NCCL", str(error)) is not None)


def lost(error: RuntimeError) -> int:
    """Say that another process has gone, unless this machine's launcher does. Returns: the exit code."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the launcher has named the process, and ends the others
    time.sleep(LOST_SECONDS)
    late = re.search("[Tt]imed? ?out", str(error)) is not None
    what = "has waited too long for another process" if late else "has lost another process, which has ended"
    if os.environ.get("LOCAL_RANK", "0") == "0":  # one speaks on each machine
        says = (str(error).splitlines() or [""])[0][:200]
        rank, on = os.environ.get("RANK", "0"), "see the messages of the other machines"
        line = f"process {rank} {what} ({on}; {says}); the same command goes on from the last checkpoint"
        print(line, file=sys.stderr, flush=True)
    return STOPPED if late else 1


def _send(children: list[subprocess.Popen[bytes]], number: int) -> None:
    for child in children:
        if child.poll() is None:
            child.send_signal(number)


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


if __name__ == "__main__":
    sys.exit(main())
