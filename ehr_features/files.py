"""Atomic writes, tables of features/, locks, digests and provenance.

A command writes to a temporary sibling and renames it when it is complete: a file with its final name is never partial.
"""

from __future__ import annotations

import ast
import contextlib
import datetime
import errno
import fcntl
import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import socket
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pandas as pd

from configs import UserError
from configs.commands import command_line
from ehr_features.schema import KEYS, NEVER_EMPTY, SAMPLES, TABLES, Column, view_names
from ehr_features.typed import read_json, read_parquet, shapes
from ehr_features.typed.read import check_keys, check_parquet
from ehr_features.typed.seal import SEAL, read_seal, sealed_digest

PARTIAL = ".partial"
AGAIN = "build the features again"
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)  # errors of the disk or the mount, not of the program


def make_folder(folder: str | Path) -> None:
    """Make a folder and those above it. Raises: UserError: it cannot be made."""
    try:
        led_to(folder).mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise UserError(f"{folder}: a file has that name; choose another folder with out=...") from None
    except OSError as error:
        if error.errno in (*FULL, errno.EACCES):
            raise
        why = (error.strerror or str(error)).lower()
        raise UserError(f"{folder}: cannot be made ({why}); choose another folder with out=...") from None


@contextlib.contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Turn the disk errors of DuckDB, safetensors and torch into an OSError that names the file."""
    try:
        yield
    except Exception as error:
        says = f"{error} {error.__context__}"  # torch gives the reason only in the context
        code = next((n for n in FULL if getattr(error, "errno", None) == n or os.strerror(n) in says), None)
        if code is None:
            raise
        raise OSError(code, os.strerror(code), str(path)) from error


@contextlib.contextmanager
def new_folder(folder: str | Path) -> Iterator[Path]:
    """Give a temporary sibling of `folder`; it takes the folder's place when the block ends without an error."""
    folder = led_to(folder)
    part = folder.with_name(f".{folder.name}{PARTIAL}-{os.getpid()}")
    make_folder(folder.parent)
    for mark in (PARTIAL, f".old{PARTIAL}"):
        for stale in folder.parent.glob(f".{folder.name}{mark}-*"):
            if not _alive(stale.name.rpartition("-")[2]):  # left by a killed process
                if mark != PARTIAL and not folder.exists():  # killed between the two renames below
                    stale.rename(folder)
                shutil.rmtree(stale, ignore_errors=True)
    make_folder(part)
    try:
        with writing(folder):
            yield part
        if folder.exists():
            old = folder.with_name(f".{folder.name}.old{PARTIAL}-{os.getpid()}")
            try:
                folder.rename(old)
                part.rename(folder)
            except BaseException:  # Ctrl-C between the two
                if not folder.exists():
                    old.rename(folder)
                raise
            shutil.rmtree(old)
        else:
            part.rename(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


@contextlib.contextmanager
def new_file(path: str | Path) -> Iterator[Path]:
    """Give a temporary sibling of `path` (same suffix); it is renamed when the block ends without an error."""
    path, part = _beside(path)
    try:
        with writing(path):
            yield part
            with part.open("rb") as file:
                os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def check_new_file(path: str | Path) -> None:
    """Refuse a path that `new_file` could not write, before the work begins. Raises: UserError, OSError."""
    path, part = _beside(path)
    try:
        part.touch()
    except FileNotFoundError:
        raise UserError(f"{path}: no file can be made there; choose another name") from None
    finally:
        part.unlink(missing_ok=True)


def _beside(path: str | Path) -> tuple[Path, Path]:
    """A file's place and its temporary sibling; a device, a pipe or a folder of that name is never replaced."""
    path = led_to(path)
    if path.exists() and not path.is_file():
        raise UserError(f"{path}: is {'a folder' if path.is_dir() else 'no regular file'}; wanted the name of a file")
    make_folder(path.parent)
    return path, path.with_name(f".{path.stem}{PARTIAL}-{os.getpid()}{path.suffix}")


def led_to(path: str | Path) -> Path:
    """The target of a symbolic link, so that the target is written and the link stays; any other path unchanged."""
    return Path(os.path.realpath(path)) if Path(path).is_symlink() else Path(path)


def check_ours(folder: str | Path, what: str, marks: Sequence[str], unfinished: Sequence[str] = ()) -> None:
    """Refuse to write into a folder that holds other files than ours; hidden files do not count.

    Args:
        what: the kind of folder, for the message: `a store`.
        marks: file names of which a folder of this kind has at least one.
        unfinished: file names that it may have before it has one of `marks`.
    Raises: UserError: the folder is a file, or holds other files and none of the marks.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: a file of that name exists; choose another folder with out=...")
    held = {path.name for path in folder.iterdir() if path.name[0] != "."} if folder.is_dir() else set()
    if (foreign := sorted(held - set(unfinished))) and not held & set(marks):
        raise UserError(f"{folder}: not {what}; it holds {', '.join(foreign[:5])}. Choose another folder with out=...")


def check_settings(folder: str | Path, what: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    """Refuse to write into a folder that was made with other settings. Raises: UserError: names each, there and now."""
    if keys := [key for key in {**old, **new} if old.get(key) != new.get(key)]:
        lines = [f"  {key}: {old.get(key)!r} there, {new.get(key)!r} now" for key in keys]
        raise UserError(
            "\n".join([f"{folder}: holds {what} with other settings:", *lines, "remove it, or choose another out=..."])
        )


def tidy(folder: str | Path, *, locked: bool = False) -> None:
    """Remove temporary files that ended processes left in a folder.

    Args:
        locked: the caller holds the folder's lock, so no other process writes there: remove all of them.
    """
    for old in Path(folder).glob(f".*{PARTIAL}-*"):
        if locked or not _alive(old.name.rpartition(f"{PARTIAL}-")[2].partition(".")[0]):
            shutil.rmtree(old) if old.is_dir() else old.unlink(missing_ok=True)


def write_json(path: str | Path, value: Any) -> None:
    """Write JSON, readable by eye; NaN is refused (write None)."""
    with new_file(path) as part:
        part.write_text(json.dumps(value, indent=2, allow_nan=False, default=_plain) + "\n", encoding="utf-8")


def write_seal(folder: str | Path, *patterns: str) -> None:
    """Note the files of a folder that match, as they are now, so that a later change of one is named (typed/seal.py).

    Files that seal.txt lists already, and that do not match, stay listed as they were.
    """
    folder = Path(folder)
    found = sorted({path for pattern in patterns for path in folder.glob(pattern) if path.is_file()})
    listed = read_seal(folder) | {path.relative_to(folder).as_posix(): sealed_digest(path) for path in found}
    with new_file(folder / SEAL) as part:
        part.write_text("".join(f"{listed[name]}  {name}\n" for name in sorted(listed)), encoding="utf-8")


def whole_numbers(column: pd.Series) -> pd.Series:
    """Whole numbers in any form (`1`, ` 1`, `1.0`) as nullable Int64; a value that is no whole number becomes NA."""
    number = pd.to_numeric(column.astype("string").str.strip(), errors="coerce").astype("Float64")
    return number.where((number == number.round()) & (number.abs() < 2**53)).astype("Int64")


def named(column: pd.Series) -> pd.Series:
    """Ids or paths without blanks around them; NA where there is none: an empty cell, a repeated header."""
    text = column.astype("string").str.strip()
    return text.where(~text.isin(["", str(column.name)]))


def read_table(
    folder: str | Path,
    name: str,
    columns: Sequence[str] | Callable[[list[str]], Sequence[str]] | None = None,
    *,
    values: bool = True,
) -> pd.DataFrame:
    """Read a table of a features/ folder, or of notes.

    Args:
        folder: a folder that `ehr-msn features` wrote.
        name: `images`, `stays`, `stay_films`, `samples/TASK`.
        columns: those to read, or a function of those that the table has; all if None.
        values: check them too, not only their types; the audit reports on them itself.
    Raises: UserError: no features folder, no such table, a column that is absent or of another type, a value that its
        column may not hold.
    """
    path, said, declared = _found(Path(folder), name)
    needed = [c for c, column in declared.items() if (values and c in said) or column.needed]
    table = read_parquet(
        path, declared, AGAIN, names=needed if columns is None else columns, more=columns is None, values=values
    )
    if values:
        if table.empty and name in NEVER_EMPTY:
            raise UserError(f"{path}: no rows; {AGAIN}")
        if name in KEYS and set(keys := KEYS[name]) <= set(table):
            check_keys(table, keys, path, AGAIN)
    return table.assign(view=view_names(table["view"])) if "view" in table else table


def check_table(folder: Path, name: str) -> Path:
    """Refuse a table of a features/ folder by its columns, as `read_table` does; no row is read. Returns: its path."""
    path, _said, declared = _found(folder, name)
    check_parquet(path, declared, AGAIN, [column for column, about in declared.items() if about.needed])
    return path


def _found(folder: Path, name: str) -> tuple[Path, dict[str, Column], dict[str, Column]]:
    """The path of a table of features/, its columns by schema.json, and all that are declared."""
    if not (folder / "provenance.json").is_file():
        raise UserError(
            f"{folder}: not a features folder; write one with {command_line('features', 'features', f'out={folder}')}"
        )
    path = folder / f"{name}.parquet"
    if not path.is_file():
        found = sorted(p.relative_to(folder).with_suffix("").as_posix() for p in folder.rglob("*.parquet"))
        raise UserError(f"{path}: no such table; this features folder has {', '.join(found)}")
    said = _said(folder, name)
    return path, said, said | (SAMPLES if name.startswith("samples/") else TABLES.get(name, {}))


def _said(folder: Path, name: str) -> dict[str, Column]:
    """The columns of a table by the folder's schema.json."""
    path = folder / "schema.json"
    said = read_json(path, shapes.SchemaJson).get(name, {}) if path.is_file() else {}
    return {column: Column(about["type"]) for column, about in said.items()}


def provenance(config: Mapping[str, Any], sources: Sequence[str | Path] = (), **more: Any) -> dict[str, Any]:
    """Versions, source files with size and mtime, config, and the values passed by name, which together identify a
    result."""
    packages = ("ehr-msn", "torch", "timm", "lightly", "pandas", "ibis-framework", "duckdb", "scikit-learn")
    versions = {"python": platform.python_version()}
    for package in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    files = {}
    for source in map(Path, sources):
        if source.is_file():
            stat = source.stat()
            files[source.as_posix()] = {"bytes": stat.st_size, "mtime": int(stat.st_mtime)}
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return {"written_at": now, "versions": versions, "sources": files, "config": dict(config), **more}


def digest(value: Any) -> str:
    """16 hex digits that change when the value (anything JSON can hold) changes."""
    text = json.dumps(value, sort_keys=True, default=_plain)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def file_digest(path: str | Path) -> str:
    """16 hex digits of a file's SHA-256."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def code_digest(*modules: ModuleType) -> str:
    """16 hex digits of modules, of every module of this package that they import, and of its data files.

    A cache under such a key is not read by a version whose code could give another result.
    """
    home = Path(__file__).parent
    files = sorted(path for path in home.rglob("*") if path.suffix in (".csv", ".txt", ".yaml"))
    waiting = {module.__name__ for module in modules}
    seen: set[str] = set()
    while waiting:
        seen.add(name := waiting.pop())
        source = home.parent.joinpath(*name.split("."))
        path = source / "__init__.py" if source.is_dir() else source.with_suffix(".py")
        if path.is_file():  # otherwise a name inside a module
            files.append(path)
            waiting |= _imports(path.read_text(encoding="utf-8"), home.name) - seen
    return digest(sorted((path.relative_to(home).as_posix(), file_digest(path)) for path in files))


@functools.cache
def _imports(code: str, package: str) -> frozenset[str]:
    """The modules of a package that a file's code imports, and their parents."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    parts = [name.split(".") for name in names if name.partition(".")[0] == package]
    return frozenset(".".join(words[: depth + 1]) for words in parts for depth in range(len(words)))


def _alive(pid: str) -> bool:
    with contextlib.suppress(ProcessLookupError, ValueError, PermissionError):
        os.kill(int(pid), 0)
        return True
    return False


def _plain(value: Any) -> Any:
    """numpy scalars, paths and timestamps as JSON."""
    if hasattr(value, "item"):
        return value.item()
    if isinstance(value, (Path, datetime.date, pd.Timestamp)):
        return str(value)
    raise TypeError(f"{type(value).__name__} is not JSON")


# ---- Locks: one command at a time in a folder. The kernel releases a lock when its process ends, so none is stale.

_held: dict[Path, int] = {}  # lock file -> descriptor; kept until the process ends


def lock(folder: Path, name: str = ".lock") -> None:
    """Make the folder if need be and hold a lock in it until this process ends, however it ends.

    Raises: UserError: another process holds it, or a file has the folder's name.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: a file of that name exists; choose another folder with out=...")
    make_folder(folder)
    _hold(folder.resolve() / name, folder)


def locked(folder: Path, name: str = ".lock") -> bool:
    """Whether another process holds the folder's lock."""
    try:
        with (folder / name).open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # no lock there, or a file system without locks
        return False
    return False


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
    """In a forked child: close the inherited locks, so that they end with the parent."""
    for handle in _held.values():
        os.close(handle)
    _held.clear()
