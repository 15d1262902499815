"""Start the processes of one run on this machine: `python -m configs.launch --processes N ... -- MODULE ARGS`.

Each process gets the variables that torch.distributed and accelerate read: RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR,
MASTER_PORT.
SIGTERM and Ctrl-C are passed on once, so that a run can save and leave with its own exit code.

Differs from torchrun and accelerate launch: both print a traceback and exit with 1 whatever the run's own code, so that
a preempted run (75) or a mistake in a config (2) could not be told from a crash.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports below, which take a while
    from configs import signals

    signals.leave()

import argparse
import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from configs import UserError

KINDS = ("NO", "MULTI_GPU", "MULTI_CPU")  # what accelerate calls one process, several GPUs, several CPU processes
PATIENCE_SECONDS = 60.0  # for the others, once one process has left


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the launcher's flags, start the processes, return the run's exit code."""
    args, environment = _parse(argv)
    host, _, port = (args.main_address or "127.0.0.1").partition(":")
    if not port:
        port = "29500" if args.machines > 1 else str(_free_port())
    world = args.processes * args.machines
    threads = str(max(1, (os.cpu_count() or 1) // args.processes))
    children: list[subprocess.Popen[bytes]] = []
    told: list[int] = []  # signals that came, to be passed on

    def tell(number: int, _: object) -> None:
        told.append(number)
        _send(children, number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, tell)
    for local in range(args.processes):
        own = {
            "RANK": str(args.machine_rank * args.processes + local),
            "LOCAL_RANK": str(local),
            "WORLD_SIZE": str(world),
            "LOCAL_WORLD_SIZE": str(args.processes),
            "MASTER_ADDR": host,
            "MASTER_PORT": port,
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", threads),
        }
        words = [sys.executable, "-m", *args.module]
        children.append(
            subprocess.Popen(words, env=os.environ | environment | own, preexec_fn=end_with_me(os.getpid()))
        )
    for came in told:
        _send(children, came)  # it came while they were started
    return _wait(children, told)


def _parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, dict[str, str]]:
    """The launcher's flags, checked, and what else the processes' environment gets."""
    parser = argparse.ArgumentParser(prog="python -m configs.launch", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--processes", type=int, default=1, help="processes on this machine, one a GPU")
    parser.add_argument("--machines", type=int, default=1)
    parser.add_argument("--machine-rank", type=int, default=0)
    parser.add_argument("--main-address", default=None, help="host[:port] of machine 0; the same on every machine")
    parser.add_argument("--accelerate-config", metavar="FILE", help="says all of these, where no flag does")
    parser.add_argument("module", nargs=argparse.REMAINDER, help="-- MODULE ARGS")
    environment: dict[str, str] = {}
    args = parser.parse_args(argv)
    if args.accelerate_config is not None:
        try:
            flags, environment = _from_accelerate(Path(args.accelerate_config))
        except UserError as error:
            parser.exit(2, f"error: {error}\n")
        parser.set_defaults(**flags)
        args = parser.parse_args(argv)
    args.module = args.module[args.module[:1] == ["--"] :]
    if args.processes < 1 or args.machines < 1 or not 0 <= args.machine_rank < args.machines:
        parser.error("--processes and --machines must be at least 1, --machine-rank from 0 to machines - 1")
    if args.machines > 1 and not args.main_address:
        parser.error("--main-address HOST[:PORT] of machine 0 is needed with --machines > 1")
    if not args.module:
        parser.error("nothing to run: give -- MODULE ARGS")
    return args, environment


def _from_accelerate(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Flags and environment from what `accelerate config` writes. The precision is the run's own config's."""
    try:
        said = yaml.safe_load(path.read_text(encoding="utf-8"))
        machines = int(said.get("num_machines") or 1)
        processes, odd = divmod(int(said["num_processes"]), machines)
        rank, kind = int(said.get("machine_rank") or 0), str(said.get("distributed_type", "NO")).upper()
    except (OSError, UnicodeDecodeError, yaml.YAMLError, AttributeError, KeyError, TypeError, ValueError):
        raise UserError(f"{path}: no accelerate config with `num_processes`; `accelerate config` writes one") from None
    if odd:
        raise UserError(f"{path}: num_processes {said['num_processes']} do not divide among num_machines {machines}")
    if kind not in KINDS:
        raise UserError(f"{path}: distributed_type {kind} cannot be used here; wanted one of {', '.join(KINDS)}")
    address = said.get("main_process_ip")
    if address and said.get("main_process_port"):
        address = f"{address}:{said['main_process_port']}"
    environment = {"ACCELERATE_USE_CPU": "true"} if said.get("use_cpu") or kind == "MULTI_CPU" else {}
    if str(said.get("gpu_ids") or "all") != "all":
        environment["CUDA_VISIBLE_DEVICES"] = str(said["gpu_ids"])
    flags = {"processes": processes, "machines": machines, "machine_rank": rank, "main_address": address}
    return flags, environment


def end_with_me(parent: int) -> Callable[[], None]:
    """What a child does between fork and exec, to be killed when its parent is: none works on alone in the folder."""
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None

    def tie() -> None:
        if libc is not None:
            libc.prctl(1, signal.SIGKILL)  # 1: PR_SET_PDEATHSIG
        if os.getppid() != parent:  # it was killed before
            os._exit(1)

    return tie


def _wait(children: list[subprocess.Popen[bytes]], told: list[int]) -> int:
    """Wait for all; once one has failed the others get a while to leave by themselves, then SIGTERM, then SIGKILL."""
    code, deadline = 0, None
    while any(child.poll() is None for child in children):
        for child in children:
            if code == 0 and child.poll() not in (None, 0):
                code = _code(children.index(child), child.returncode, told)
                # A mistake is everybody's mistake, and processes that wait in a collective for a dead one never leave.
                deadline = time.monotonic() + (PATIENCE_SECONDS if code == 75 else 4.0)
        if deadline is not None and time.monotonic() > deadline:
            late = time.monotonic() > deadline + 10
            _send(children, signal.SIGKILL if late else signal.SIGTERM)
            time.sleep(0.5)
        time.sleep(0.05)
    return code or next((_code(i, c.returncode, told) for i, c in enumerate(children) if c.returncode), 0)


def _code(local: int, code: int, told: list[int]) -> int:
    if code >= 0:
        return code
    if -code in told:  # it had not come so far as to listen
        if local == 0:
            print(f"stopped by {signal.Signals(-code).name} before it began; the same command goes on", file=sys.stderr)
        return 75 if -code == signal.SIGTERM else 130
    print(
        f"process {local} was ended by {signal.Signals(-code).name}"
        + ("; was the memory used up?" if code == -signal.SIGKILL else ""),
        file=sys.stderr,
    )
    return 1


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
