"""Engines that run ibis expressions (DuckDB in process, or Spark), and their errors as messages for a user."""

from __future__ import annotations

import contextlib
import gzip
import re
import signal
import tempfile
import threading
import weakref
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import duckdb
import ibis
import ibis.expr.types as ir
import pyarrow as pa
import pyarrow.parquet as pq
from ibis.util import gen_name

from configs import UserError
from configs.signals import Stopped, stops
from ehr_features.config import megabytes
from ehr_features.raw import spark

_OPEN: weakref.WeakSet[Any] = weakref.WeakSet()  # DuckDB connections, for `interruptible`


def connect(
    engine: str,
    *,
    memory: str = "1GB",
    threads: int = 2,
    spill: Path | None = None,
    settings: Mapping[str, Any] = MappingProxyType({}),
) -> Any:
    """An ibis backend with a memory limit; it spills to `spill`. `settings` are Spark's."""
    size = megabytes(memory)
    share = int(max(size * 0.6 - 50, size - 1500))  # the rest: Python, CSV buffers, mapped files
    if engine == "pyspark":
        return spark.connect(share, threads, spill, settings)
    con = ibis.duckdb.connect()
    _OPEN.add(con.con)
    settings = {
        "memory_limit": f"{share}MB",
        "threads": threads,
        "preserve_insertion_order": False,
        "TimeZone": "UTC",
        "temp_directory": str(spill or tempfile.gettempdir()),
    }
    for name, value in settings.items():
        con.con.execute(f"SET {name} = {value!r}")
    with contextlib.suppress(duckdb.CatalogException):  # of 1.3 and later: the system caches files too
        con.con.execute("SET enable_external_file_cache = false")
    measure_progress(con.con, False)
    return con


def measure_progress(con: Any, on: bool) -> bool:
    """Switch DuckDB's measuring of a query on or off; False: it stays off, in a notebook without ipywidgets."""
    try:
        con.execute(f"SET enable_progress_bar = {on}")
    except duckdb.InvalidInputException:
        return False
    return True


def read(con: Any, path: str, columns: list[str] | None = None, *, count: bool = False) -> ir.Table:
    """Open one file; every CSV column is text. `count`: of CSV, count its rows meanwhile (Spark)."""
    if con.name != "duckdb":
        is_parquet = path.endswith(".parquet")
        return spark.read_parquet(con, path) if is_parquet else spark.read_csv(con, path, columns or [], count=count)
    if path.endswith(".parquet"):
        return con.read_parquet(path)
    text = dict.fromkeys(columns or [], "VARCHAR")
    return con.read_csv(path, columns=text, header=True, auto_detect=False, delim=",", quote='"', escape='"')


def hold(con: Any, name: str, table: pa.Table) -> ir.Table:
    """Register a small in-memory table with the engine."""
    if con.name == "duckdb":  # ibis 12's create_table writes SQL that DuckDB 2.0 refuses
        con.con.register(name, table)
        return con.table(name)
    con._session.createDataFrame(table).createOrReplaceTempView(name)
    return con.table(name)


def batches(con: Any, table: ir.Table, rows: int = 500_000) -> Iterator[pa.RecordBatch]:
    """The rows of an expression in record batches."""
    if con.name == "duckdb":  # ibis 12's to_pyarrow_batches calls a method that DuckDB 2.0 renamed
        found = con.con.sql(ibis.to_sql(table, dialect="duckdb"))
        yield from found.to_arrow_reader(rows) if hasattr(found, "to_arrow_reader") else found.fetch_record_batch(rows)
    else:
        yield from spark.batches(con, table, rows)


def gathered(table: ir.Table) -> pa.Table:
    """All rows of an expression, also of so many that Spark's driver could not collect them."""
    con = table.get_backend()
    if con.name == "duckdb":
        return table.to_pyarrow()
    return pa.Table.from_batches(batches(con, table), table.schema().to_pyarrow())


def kept(con: Any, table: ir.Table) -> ir.Table:
    """The table of an expression, computed once and kept by the engine, which may spill it."""
    if con.name != "duckdb":
        return spark.kept(con, table)
    name = gen_name("kept")
    con.con.execute(f"CREATE TEMP TABLE {name} AS {ibis.to_sql(table, dialect='duckdb')}")
    return con.table(name)


def release(con: Any, table: ir.Table) -> None:
    """Give back what `kept` keeps."""
    if con.name == "duckdb":
        con.con.execute(f"DROP TABLE {table.get_name()}")


def save(con: Any, table: ir.Table, path: Path) -> None:
    """Write an expression to one Parquet file."""
    if con.name == "duckdb":
        table.to_parquet(path, compression="zstd")
        return
    with pq.ParquetWriter(path, table.schema().to_pyarrow(), compression="zstd") as writer:
        for batch in batches(con, table):
            writer.write_batch(batch)


@contextlib.contextmanager
def readable(path: str) -> Iterator[None]:
    """Turn the readers' errors about a damaged file into a UserError that names it."""
    try:
        with named_by_the_engine(f"{path}: "):
            yield
    except (EOFError, zlib.error, gzip.BadGzipFile, UnicodeDecodeError, pa.ArrowInvalid) as error:
        raise UserError(f"{path}: damaged or cut short ({_line(str(error))}); download it again") from None
    except OSError as error:
        if error.errno is not None or "://" in path:  # pyarrow's errors about damaged bytes have no errno
            raise
        raise UserError(f"{path}: damaged or cut short ({_line(str(error))}); download it again") from None


@contextlib.contextmanager
def named_by_the_engine(where: str = "") -> Iterator[None]:
    """As `readable`, for queries: DuckDB opens Parquet lazily, so the damaged file is named from its own error."""
    try:
        yield
    except Exception as error:
        if _of_engine(error) and re.search(OUT_OF_MEMORY, f"{type(error).__name__} {error}"):
            raise UserError(f"the engine ran out of memory ({_line(str(error))}); {MORE_MEMORY}") from None
        if (says := _damage(error, one_file=bool(where))) is None:
            raise
        raise UserError(f"{where}{says}; is the file whole? Download it again") from None


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """End the block on Ctrl-C, SIGTERM and SIGHUP, also during a query.

    The signal handler raises, but DuckDB replaces an exception raised during a query by its own error, and drops one
    raised just before a query (while it imports its helpers). So queries are interrupted until the block is left.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    left = threading.Event()
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, *stops())}

    def interrupt() -> None:
        while not left.wait(0.2):
            for con in list(_OPEN):
                con.interrupt()

    def note(number: int, frame: Any) -> None:
        if not came:
            threading.Thread(target=interrupt, daemon=True).start()
        came.append(number)
        handler = before[signal.Signals(number)]
        assert callable(handler)
        handler(number, frame)

    for number, handler in before.items():
        if callable(handler):
            signal.signal(number, note)
    try:
        yield
    except Exception:  # Stopped and KeyboardInterrupt are not Exceptions
        if not came:
            raise
    finally:
        left.set()
        for number, handler in before.items():
            signal.signal(number, handler)
    if came:
        stopped = Stopped(f"stopped by {signal.Signals(came[0]).name}")
        raise KeyboardInterrupt if came[0] == signal.SIGINT else stopped


OUT_OF_MEMORY = "OutOfMemory|maxResultSize|GC overhead limit|UNABLE_TO_ACQUIRE_MEMORY"
MORE_MEMORY = "give more with memory=... (audit: --memory), of executors with spark.executor.memory in `spark`"


def _of_engine(error: BaseException) -> bool:
    return type(error).__module__.split(".")[0] in ("duckdb", "_duckdb", "pyspark", "py4j")


# DuckDB's and thrift's errors about damaged bytes, often without the file's name
_ABOUT_BYTES = ["Error", "InvalidInputException", "SerializationException", "OutOfRangeException", "InternalException"]


def _damage(error: BaseException, one_file: bool) -> str | None:
    """The first line of an engine's error about a damaged file; None for other errors."""
    text = str(error).strip()
    if not _of_engine(error):
        return None
    marks = "GZIP|gzip|CSV Error|Parquet|EOFException|ZipException|Unexpected end|No magic bytes|Failed to read file"
    about_bytes = one_file and type(error).__name__ in _ABOUT_BYTES
    return _line(text) if about_bytes or re.search(marks, text) else None


def _line(text: str) -> str:
    """The first line of an error, without the bytes that it quotes."""
    return "".join(sign for sign in (text.splitlines() or [""])[0][:300] if sign.isprintable()).strip(" :")
