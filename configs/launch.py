"""Start the processes of one run on this machine: `python -m configs.launch --processes N ... -- MODULE ARGS`.

Each process gets the variables that torch.distributed and accelerate read: RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR,
MASTER_PORT.
SIGTERM and Ctrl-C are passed on once, so that a run can save and leave with its own exit code.

Differs from torchrun and accelerate launch: both print a traceback and exit with 1 whatever the run's own code, so that
a preempted run (75) or a mistake in a config (2) could not be told from a crash.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence

PATIENCE_SECONDS = 60.0  # for the others, once one process has left


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the launcher's flags, start the processes, return the run's exit code."""
    parser = argparse.ArgumentParser(prog="python -m configs.launch", description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, default=1, help="processes on this machine, one a GPU")
    parser.add_argument("--machines", type=int, default=1)
    parser.add_argument("--machine-rank", type=int, default=0)
    parser.add_argument("--main-address", default=None, help="host[:port] of machine 0; the same on every machine")
    parser.add_argument("rest", nargs=argparse.REMAINDER, help="-- MODULE ARGS")
    args = parser.parse_args(argv)
    module = args.rest[1:] if args.rest[:1] == ["--"] else args.rest
    if args.processes < 1 or args.machines < 1 or not 0 <= args.machine_rank < args.machines:
        parser.error("--processes and --machines must be at least 1, --machine-rank from 0 to machines - 1")
    if args.machines > 1 and not args.main_address:
        parser.error("--main-address HOST[:PORT] of machine 0 is needed with --machines > 1")
    if not module:
        parser.error("nothing to run: give -- MODULE ARGS")
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
        words = [sys.executable, "-m", *module]
        children.append(subprocess.Popen(words, env=os.environ | own, preexec_fn=_end_with_me))
    for came in told:
        _send(children, came)  # it came while they were started
    return _wait(children, told)


def _end_with_me() -> None:
    """In a child: be killed when the launcher is, so that none trains on alone and holds the folder."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # 1: PR_SET_PDEATHSIG


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
            print(f"stopped by {signal.Signals(-code).name} before it began; the same command begins", file=sys.stderr)
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
