"""Engines that run ibis expressions (DuckDB in process, or Spark), and their errors as messages for a user."""

from __future__ import annotations

import contextlib
import gzip
import os
import re
import shutil
import signal
import tempfile
import threading
import weakref
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import duckdb
import ibis
import ibis.expr.types as ir
import pyarrow as pa

from configs import UserError
from configs.signals import Stopped, stops

_OPEN: weakref.WeakSet[Any] = weakref.WeakSet()  # DuckDB connections, for `interruptible`


def connect(engine: str, *, memory: str = "1GB", threads: int = 2, spill: Path | None = None) -> Any:
    """An ibis backend with a memory limit; DuckDB spills to `spill`."""
    number, unit = re.fullmatch(r"([\d.]+)\s*([MGT]B)", memory).groups()  # type: ignore[union-attr]
    size = float(number) * {"MB": 1, "GB": 1000, "TB": 1_000_000}[unit]
    if engine == "pyspark":
        return _spark(int(size), threads)
    con = ibis.duckdb.connect()
    _OPEN.add(con.con)
    settings = {
        "memory_limit": f"{int(max(size * 0.6, size - 1500))}MB",  # the rest: Python, CSV buffers, mapped files
        "threads": threads,
        "preserve_insertion_order": False,
        "TimeZone": "UTC",
        "temp_directory": str(spill or tempfile.gettempdir()),
    }
    for name, value in settings.items():
        con.con.execute(f"SET {name} = {value!r}")
    measure_progress(con.con, False)
    return con


def measure_progress(con: Any, on: bool) -> bool:
    """Switch DuckDB's measuring of a query on or off; False: it stays off, in a notebook without ipywidgets."""
    try:
        con.execute(f"SET enable_progress_bar = {on}")
    except duckdb.InvalidInputException:
        return False
    return True


def _spark(megabytes: int, threads: int) -> Any:
    try:
        from pyspark.sql import SparkSession
    except ImportError:
        raise UserError("engine=pyspark: pyspark is not installed; pip install 'ehr-msn[spark]', and Java 17") from None
    if shutil.which("java") is None and "JAVA_HOME" not in os.environ:
        raise UserError("engine=pyspark: Java is not installed; Spark 4 needs Java 17 or 21. Or take engine=duckdb")
    builder = SparkSession.builder
    if "PYSPARK_GATEWAY_PORT" not in os.environ:  # spark-submit sets the master itself
        builder = builder.master(f"local[{threads}]")
    session = (
        builder.appName("ehr_features")
        .config("spark.driver.memory", f"{megabytes}m")
        .config("spark.sql.session.timeZone", "UTC")
        .config("spark.sql.shuffle.partitions", 2 * threads)
        .config("spark.sql.warehouse.dir", tempfile.gettempdir())
        .config("spark.ui.enabled", False)
        .config("spark.ui.showConsoleProgress", False)
        .getOrCreate()
    )
    session.sparkContext.setLogLevel("ERROR")
    return ibis.pyspark.connect(session)


def read(con: Any, path: str, columns: list[str]) -> ir.Table:
    """Open one file; every CSV column is text."""
    if path.endswith(".parquet"):
        return con.read_parquet(path)
    if con.name == "duckdb":
        text = dict.fromkeys(columns, "VARCHAR")
        return con.read_csv(path, columns=text, header=True, auto_detect=False, delim=",", quote='"', escape='"')
    return con.read_csv(path, header=True, inferSchema=False, multiLine=True, escape='"')


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
        yield from table.to_pyarrow_batches(chunk_size=rows)


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


# DuckDB's and thrift's errors about damaged bytes, often without the file's name
_ABOUT_BYTES = ["Error", "InvalidInputException", "SerializationException", "OutOfRangeException", "InternalException"]


def _damage(error: BaseException, one_file: bool) -> str | None:
    """The first line of an engine's error about a damaged file; None for other errors."""
    text = str(error).strip()
    if type(error).__module__.split(".")[0] not in ("duckdb", "_duckdb", "pyspark", "py4j"):
        return None
    marks = "GZIP|gzip|CSV Error|Parquet|EOFException|ZipException|Unexpected end|No magic bytes|Failed to read file"
    about_bytes = one_file and type(error).__name__ in _ABOUT_BYTES
    return _line(text) if about_bytes or re.search(marks, text) else None


def _line(text: str) -> str:
    """The first line of an error, without the bytes that it quotes."""
    return "".join(sign for sign in (text.splitlines() or [""])[0][:300] if sign.isprintable()).strip(" :")
