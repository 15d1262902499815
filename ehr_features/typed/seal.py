"""seal.txt: whether the files of a folder are still as a command of ours wrote them.

A command that completes a folder writes a line for each of its files there: a digest and the name
(`files.write_seal`). Whoever reads such a file compares. A valid value in the place of another is no error, and a user
may edit a table on purpose: a changed file is read, with a warning. Folders without seal.txt, and files that it does
not list, e.g. a user's own tables in samples/, are read as they are.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import sys
from pathlib import Path

SEAL = "seal.txt"
ABOVE = 3  # folders in which a file may be listed: runs/X lists seed_0/predictions/test.parquet
BLOCK, BLOCKS = 2**18, 64  # of a file above 16 MiB as many bytes are read, in blocks from its start to its end
CHANGED = (
    "warning: {path}: changed since it was written, and read as it is now. Make {folder} again, or copy it again; "
    "if you changed the file on purpose, remove its line from {seal}"
)

_compared: set[tuple[str, int, int]] = set()  # a file and its state: a warning is given once


def sealed_digest(path: Path) -> str:
    """32 hex digits of a file's size and content; of a file above 16 MiB 64 blocks of it are read."""
    size = path.stat().st_size
    sha = hashlib.sha256(f"{size} ".encode())
    with path.open("rb") as file:
        if size <= BLOCK * BLOCKS:
            sha.update(file.read())
        else:
            for i in range(BLOCKS):
                file.seek(i * (size - BLOCK) // (BLOCKS - 1))
                sha.update(file.read(BLOCK))
    return sha.hexdigest()[:32]


def read_seal(folder: Path) -> dict[str, str]:
    """Name -> digest of the files that a folder's seal.txt lists; empty without one."""
    try:
        lines = (folder / SEAL).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return {}
    return {name: digest for digest, _, name in (line.partition("  ") for line in lines) if name}


def check_seal(path: str | Path) -> None:
    """Warn once if a file is no longer as its command left it."""
    path = Path(path)
    for folder in list(path.parents)[:ABOVE]:
        name = path.relative_to(folder).as_posix()
        if (wanted := read_seal(folder).get(name)) is None:
            continue
        with contextlib.suppress(OSError):  # it is being replaced
            state = path.stat()
            if (key := (str(path), state.st_size, state.st_mtime_ns)) not in _compared:
                _compared.add(key)
                if sealed_digest(path) != wanted and os.environ.get("RANK", "0") == "0":
                    print(CHANGED.format(path=path, folder=folder, seal=folder / SEAL), file=sys.stderr)
        return


def forget() -> None:
    """Compare, and warn, again."""
    _compared.clear()
