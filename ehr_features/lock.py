"""One command at a time in a folder. A lock ends with its process, however that ends: none is ever stale."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

from configs import UserError
from ehr_features.files import led_to, make_folder

_held: dict[Path, int] = {}  # lock file -> descriptor; kept until the process ends


def lock(folder: Path, name: str = ".lock") -> None:
    """Make the folder if need be and hold a lock in it until this process ends, however it ends.

    Raises: UserError: another process holds it, or a file has the folder's name.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: a file of that name exists; choose another folder with out=...")
    make_folder(folder)
    _hold(folder.resolve() / name, folder)


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Hold a lock beside a folder that is written aside and renamed when it is complete.

    Raises: UserError: another process holds it.
    """
    place = led_to(folder)
    make_folder(place.parent)
    path = place.parent.resolve() / f".{place.name}.lock"
    _hold(path, folder)
    try:
        yield
    finally:
        os.close(_held.pop(path))


def _hold(path: Path, folder: Path) -> None:
    if path in _held:
        if path.exists() and os.fstat(_held[path]).st_ino == path.stat().st_ino:
            return
        os.close(_held.pop(path))  # the folder was removed and made again
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.read(handle, 200).decode(errors="replace").strip() or "another process"
        os.close(handle)
        raise UserError(
            f"{folder}: another command works in this folder ({holder}); wait for it or choose another with out=..."
        ) from None
    except OSError as error:  # some network file systems have no locks
        print(f"note: {folder} cannot be locked ({error.strerror}); start no second command in it", file=sys.stderr)
    os.ftruncate(handle, 0)
    os.pwrite(handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
    _held[path] = handle


def forget() -> None:
    """In a forked child: leave the locks to the parent, so that they end with it."""
    for handle in _held.values():
        os.close(handle)
    _held.clear()
