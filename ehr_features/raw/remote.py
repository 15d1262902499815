"""Files at a URL (gs://, s3://, http://, memory://, ...): options, parallel reads, errors with a next step.

Everything is opened by fsspec. `storage` of a config gives the options of a protocol's file system, for example

    storage: {gs: {requester_pays: my-project, token: key.json}}

for requester-pays buckets, whose costs go to the named project. The file system retries 429, 5xx and cut connections;
a remaining network error is reported as such, never as a damaged film.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from csv import reader as csv_reader
from pathlib import Path
from typing import Any

import fsspec
import pandas as pd
import pyarrow.parquet as pq

from configs import UserError, first_line
from configs.amounts import amount, machine_memory
from ehr_features.files import digest, new_file
from ehr_features.schema import Raw
from ehr_features.typed.read import UNREADABLE

PACKAGES = {"gs": "gcsfs", "gcs": "gcsfs", "s3": "s3fs", "az": "adlfs", "abfs": "adlfs", "http": "aiohttp"}
SUFFIXES = (".parquet", ".csv", ".csv.gz")  # of a table
AT_ONCE = 32  # concurrent requests
PACKED = (".gz", ".bz2", ".xz", ".zst", ".zip")
LINE = 2**16  # bytes in which a table's header ends
INFLATION, SMALL = 100, 10_000_000  # no compressed table expands so many times, but for one of less than SMALL bytes


def is_url(path: str) -> bool:
    """Whether a path is read through fsspec. A file:// URL is a local path."""
    return "://" in path and not path.startswith("file://")


def configure(storage: Mapping[str, Mapping[str, Any]]) -> None:
    """Set the options of file systems that this process opens from now on.

    Raises: UserError: a key file does not exist.
    """
    # gcsfs otherwise opens a second, gRPC connection to find the bucket's type, and waits minutes for it
    os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    for name in ("gcsfs", "fsspec.prefetcher"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # permanent failures are reported by `explained`
    for protocol, options in storage.items():
        token = options.get("token")  # gcsfs takes the path of a missing file for a token and sends it to the server
        if isinstance(token, str) and (token.endswith(".json") or os.sep in token) and not os.path.isfile(token):
            raise UserError(f"storage.{protocol}.token={token}: no such file; wanted a key file, anon, or none")
        names = ("gs", "gcs") if protocol in ("gs", "gcs") else (protocol,)
        for name in names:
            fsspec.config.conf[name] = {**fsspec.config.conf.get(name, {}), **options}


@contextlib.contextmanager
def explained(url: str) -> Iterator[None]:
    """Turn a file system's error into a UserError with the next step."""
    if not is_url(url):
        yield
        return
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:  # each file system has its own exceptions, and wraps those of its HTTP library
        raise UserError(f"{url}: {_why(url, error)}") from None


def user_table(path: str | Path, columns: Sequence[str] = (), dtype: Any = None, **csv: Any) -> pd.DataFrame:
    """A user's table (.csv, .csv.gz, .parquet), local or at a URL.

    Args:
        columns: that it must have.
        dtype: of the columns of a CSV; `csv`: other arguments of pandas.read_csv.
    Raises: UserError: absent, damaged, a column missing, no rows.
    """
    place = str(path)
    check_regular(place)
    try:
        with explained(place), fsspec.open(place, "rb", compression="infer") as file:
            if place.endswith(".parquet"):
                check_rows(file, place)
                check_distinct(pq.read_schema(file).names, place)
                file.seek(0)
                table = pd.read_parquet(file)
            else:
                packed = place.endswith(PACKED)
                raw = Inflated(file, place, fingerprint(place)["bytes"]) if packed else file
                bounded = io.BufferedReader(raw, LINE)
                if csv.get("header", 0) is not None:
                    check_distinct(_names(bounded.peek(LINE)), place)  # pandas would call the second `a` `a.1`
                table = pd.read_csv(bounded, dtype=dtype, **csv)
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{path}: no such table") from None
    except (*UNREADABLE, zlib.error) as error:  # gzip, pandas and pyarrow each raise their own
        raise UserError(f"{path}: cannot be read as a table ({first_line(error)}); was it copied whole?") from None
    if missing := [c for c in columns if c not in table]:
        raise UserError(f"{path}: columns missing: {', '.join(missing)}; found {', '.join(map(str, table.columns))}")
    if table.empty:
        raise UserError(f"{path}: no rows")
    return table


def _names(start: bytes) -> list[str]:
    """The column names in the first line of a CSV file."""
    lines = start.decode("utf-8-sig", "replace").splitlines()
    return next(csv_reader(lines[:1]), [])


def check_distinct(names: Sequence[str], path: str) -> None:
    """Refuse a table that has a column twice. Raises: UserError."""
    if twice := [name for name, count in Counter(name.strip() for name in names if name.strip()).items() if count > 1]:
        raise UserError(f"{path}: two columns are called `{twice[0]}`")


def check_regular(path: str) -> None:
    """Refuse a pipe or device: reading one may wait for ever or never end. Raises: UserError."""
    if not is_url(path) and os.path.exists(path) and not os.path.isfile(path):
        kind = "a folder" if os.path.isdir(path) else "a pipe or device"
        raise UserError(f"{path}: {kind}; wanted a regular file, .csv, .csv.gz or .parquet")


def check_rows(file: Any, path: str) -> None:
    """Refuse a Parquet table that needs more memory than there is: a few bytes may stand for billions of equal cells.

    Raises: UserError.
    """
    about = pq.ParquetFile(file).metadata
    check_cells(about.num_rows, about.num_columns, path)
    file.seek(0)


def check_cells(rows: int, columns: int, path: str) -> None:
    """Refuse a table whose cells, of eight bytes at least, exceed the machine's memory. Raises: UserError."""
    if (need := 8 * rows * columns) > (has := machine_memory()):
        raise UserError(
            f"{path}: {rows:,} rows x {columns} columns need {amount(need)} of memory or more, this machine has "
            f"{amount(has)}; is the file what it should be?"
        )


class Inflated(io.RawIOBase):
    """A compressed table's content, up to `INFLATION` times the bytes of its file."""

    def __init__(self, file: Any, path: str, size: int | None) -> None:
        self.file, self.path, self.read_so_far = file, path, 0
        self.most = max(SMALL, INFLATION * (size or 0)) if size is not None else None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self.file.read(len(buffer))
        buffer[: len(data)] = data
        self.read_so_far += len(data)
        if self.most is not None and self.read_so_far > self.most:
            raise UserError(
                f"{self.path}: expands to more than {amount(self.most)}, {INFLATION} times its size: no table does; "
                "download it again"
            )
        return len(data)


def exists(path: str) -> bool:
    """Whether a file exists. Raises: UserError: it cannot be determined (no credentials, no network, ...)."""
    if not is_url(path):
        return Path(path).is_file()
    with explained(path):
        filesystem, inner = fsspec.url_to_fs(path)
        try:
            return bool(filesystem.info(inner)["type"] == "file")
        except FileNotFoundError:
            return False


def find_table(root: str, raw: Raw) -> str | None:
    """The file of a table below a folder or URL; None if there is none."""
    root = root.removeprefix("file://").rstrip("/")
    for place in raw.places:
        for suffix in SUFFIXES:
            if exists(path := f"{root}/{place}{suffix}"):
                return path
    return None


def fingerprint(path: str) -> dict[str, Any]:
    """Size and modification time (or ETag) of a file or URL: changes when its content does."""
    with explained(path):
        filesystem, inner = fsspec.url_to_fs(path)
        info = filesystem.info(inner)
    changed = next(
        (info[k] for k in ("mtime", "LastModified", "last_modified", "updated", "created") if k in info), None
    )
    return {"bytes": info.get("size"), "mtime": changed if isinstance(changed, float) else str(changed)}


def fetch(urls: Sequence[str]) -> list[bytes | None]:
    """The contents of several objects of one file system, read concurrently; None for an object that does not exist.

    Raises: UserError: an object could not be read although it may exist, after the file system's retries.
    """
    if not urls:
        return []
    with explained(urls[0]):
        filesystem, _ = fsspec.url_to_fs(urls[0])
        inner = [filesystem._strip_protocol(url) for url in urls]
        options = {"batch_size": AT_ONCE} if filesystem.async_impl else {}
        found = filesystem.cat(inner, on_error="return", **options)
    out: list[bytes | None] = []
    for url, name in zip(urls, inner, strict=True):
        content = (
            found.get(name) if isinstance(found, dict) else found
        )  # for a single path without wildcards, fsspec returns bytes
        if isinstance(content, BaseException) and not isinstance(content, FileNotFoundError):
            with explained(url):
                raise content
        out.append(content if isinstance(content, bytes) else None)
    return out


def cached(url: str, fingerprint: Mapping[str, Any], folder: Any) -> str:
    """A local copy of a remote file, one for each version of its content, written atomically."""
    place = folder / "remote" / f"{digest([url, dict(fingerprint)])}-{url.rpartition('/')[2]}"
    if not place.is_file():
        with explained(url), new_file(place) as part:
            filesystem, inner = fsspec.url_to_fs(url)
            filesystem.get_file(inner, str(part))
    return str(place)


def _why(url: str, error: Exception) -> str:
    protocol, text = url.partition("://")[0], first_line(error)[:200]
    code = str(getattr(error, "code", getattr(error, "status", "")))
    names = {kind.__name__ for kind in type(error).__mro__}
    if isinstance(error, ImportError) or "not known" in text:
        package = PACKAGES.get(protocol, f"the fsspec file system of {protocol}://")
        return f"reading {protocol}:// needs {package}: {sys.executable} -m pip install {package}"
    if "requester pays" in str(error).lower():
        return (
            "this bucket lets the reader pay; name the project that does, which must be yours: "
            f"storage.{protocol}.requester_pays=PROJECT"
        )
    if code == "401" or names & {"DefaultCredentialsError", "RefreshError", "GoogleAuthError", "NoCredentialsError"}:
        return (
            f"no credentials, or none that it takes ({text}); for Google: gcloud auth application-default login, or "
            f"storage.{protocol}.token=FILE"
        )
    if code == "403" or isinstance(error, PermissionError) or text.startswith("Forbidden"):
        return f"these credentials may not read it ({text}); does your account have access to the bucket?"
    if isinstance(error, FileNotFoundError):
        return "no such file"
    if code in ("408", "429") or code.startswith("5"):
        return f"the storage answered {code} again and again ({text}); wait a while, then run the same command again"
    return f"cannot be read ({type(error).__name__}: {text}); what is done is kept: run the same command again"
