"""Memory of a training process on Linux: what is freed stays with the process and is used again."""

from __future__ import annotations

import ctypes
import sys

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # of glibc's malloc.h


def keep_freed_memory() -> bool:
    """Tell glibc not to give large blocks back to the system between steps.

    A step allocates the same hundreds of megabytes as the one before. Given back, each page of them is faulted in and
    zeroed again, which costs more than the arithmetic on views does. Processes forked later inherit it.
    Returns: whether the C library took it; another one than glibc is left as it is.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(_MMAP_MAX, 0)) and bool(mallopt(_TRIM_THRESHOLD, 2**31 - 1))
