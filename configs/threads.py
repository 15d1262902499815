"""Threads of BLAS, OpenMP and torch: the cores that this process may use, over the processes of the machine.

Chosen once, before numpy and torch are imported, which read the environment then. Without it each process would start
a thread for every core of the machine, also where a container or a job has a few of them. OMP_NUM_THREADS, where it
is set, is kept.
"""

from __future__ import annotations

import math
import os
from pathlib import Path

FIRST = "OMP_NUM_THREADS"  # torch, MKL and OpenBLAS read it where they have none of their own
OTHERS = ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
MARK = "EHR_MSN_THREADS"  # the number that was chosen here: a child process chooses anew
CGROUP = Path("/sys/fs/cgroup")


def cores(root: Path = CGROUP) -> int:
    """Cores that this process may use: those it is bound to, or fewer by the quota of its cgroup."""
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, math.ceil(min(bound, _quota(root))))


def _quota(root: Path) -> float:
    """Cores of the cgroup's quota, version 2 or 1; infinite without one."""
    own = [line.rpartition(":")[2] for line in _read(Path("/proc/self/cgroup")).splitlines()]
    found = [math.inf]
    for place in {root, *(root / path.lstrip("/") for path in own)}:
        words = _read(place / "cpu.max").split()
        if len(words) != 2:
            words = [_read(place / "cpu" / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period")]
        if all(word.isdecimal() for word in words) and int(words[1]):  # `max`, or -1: none
            found.append(int(words[0]) / int(words[1]))
    return min(found)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""


def of_each(processes: int) -> dict[str, str]:
    """The variables of each of some processes of this machine; what the user has set is kept."""
    chosen = os.environ.get(MARK)
    given = {name: value for name in (FIRST, *OTHERS) if (value := os.environ.get(name)) not in (None, chosen)}
    number = given.get(FIRST, str(max(1, cores() // processes)))
    mark = {} if FIRST in given else {MARK: number}
    return mark | dict.fromkeys((FIRST, *OTHERS), number) | given


def choose() -> None:
    """Set the variables for this process, one of as many as the launcher says, and for its children."""
    os.environ.update(of_each(_processes()))


def _processes() -> int:
    number = os.environ.get("LOCAL_WORLD_SIZE", "1")
    return int(number) if number.isdecimal() and int(number) else 1


def said() -> str:
    """The choice as a line of the log."""
    processes = _processes()
    has = f"{cores()} core{'s' * (cores() > 1)}, {processes} process{'es' * (processes > 1)} on this machine"
    return f"threads: {os.environ.get(FIRST, 'as numpy and torch choose')} a process ({has})"
