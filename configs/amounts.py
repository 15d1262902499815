"""Bytes in words, and how much memory this process may use and a disk has free."""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path

from configs.loader import UserError

LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")  # of a container: v2, v1


def amount(number: float) -> str:
    """A number of bytes in the unit that suits it: `1.2 GB`, `340 MB`, `4 KB`, `0 bytes`."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
        if number >= size:
            return f"{number / size:,.1f} {unit}" if number < 10 * size else f"{number / size:,.0f} {unit}"
    return f"{number:.0f} bytes"


def machine_memory() -> int:
    """Bytes of memory of this machine, or of the container if that may use less."""
    found = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for path in LIMITS:
        with contextlib.suppress(OSError, ValueError):  # absent, or `max`
            found.append(int(Path(path).read_text(encoding="ascii")))
    return min(found)


def check_memory(need: float, what: str, advice: str) -> None:
    """Refuse what this machine's memory cannot hold, before any work. Raises: UserError."""
    if need > (has := machine_memory()):
        raise UserError(f"{what}: {amount(need)} of memory are needed, this machine has {amount(has)}; {advice}")


def free_beside(path: str | Path) -> int | None:
    """Free bytes of the disk on which a file stands or would stand; None if that cannot be determined."""
    place = Path(path).absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    try:
        return shutil.disk_usage(place).free
    except OSError:
        return None
