"""Spark: the session that a config asks for, and results that never stand in the driver's memory as a whole.

The executors write a result into a scratch folder, one Parquet file per partition; later steps read it there, and the
driver reads one file after the other. So driver and executors must share the folder (`cache` of the config).
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ibis
import ibis.expr.types as ir
import pyarrow as pa
import pyarrow.parquet as pq
from ibis.util import gen_name

from configs import UserError

LEAST_HEAP = 512  # MB; Spark's driver does not start with less
CSV = {"header": True, "inferSchema": False, "escape": '"'}


def connect(megabytes: int, threads: int, scratch: Path | None, settings: Mapping[str, Any]) -> Any:
    """An ibis backend on the session of `settings`, spark-submit or spark-defaults.conf, else on this machine.

    Args:
        megabytes: limit of the driver's JVM. threads: of a session on this machine.
        scratch: folder for results; None: a temporary one.
    Raises: UserError: pyspark or Java is absent; a setting or a server that is not supported.
    """
    try:
        from pyspark.sql import SparkSession
    except ImportError:
        raise UserError("engine=pyspark: pyspark is not installed; pip install 'ehr-msn[spark]', and Java 17") from None
    if shutil.which("java") is None and "JAVA_HOME" not in os.environ:
        raise UserError("engine=pyspark: Java is not installed; Spark 4 needs Java 17 or 21. Or take engine=duckdb")
    if "SPARK_REMOTE" in os.environ or "spark.remote" in settings:
        raise UserError("engine=pyspark: Spark Connect is not supported; name the cluster itself in spark.master")
    folder = Path(scratch or tempfile.mkdtemp(prefix="ehr_features-"))
    heap = max(megabytes, LEAST_HEAP)
    ours: dict[str, Any] = {
        "spark.driver.memory": f"{heap}m",
        "spark.driver.maxResultSize": f"{heap // 2}m",  # an error instead of a JVM that dies
        "spark.sql.execution.arrow.pyspark.enabled": True,
        "spark.sql.parquet.outputTimestampType": "TIMESTAMP_MICROS",
        "spark.sql.session.timeZone": "UTC",
        "spark.sql.warehouse.dir": tempfile.gettempdir(),
        "spark.ui.enabled": False,
        "spark.ui.showConsoleProgress": False,
    }
    master = settings.get("spark.master") or ("" if has_master() else f"local[{threads}]")
    if re.match(r"local(\[|$)", str(master)):  # a cluster has defaults of its own size
        ours |= {"spark.master": master, "spark.sql.shuffle.partitions": 2 * threads}
    builder = SparkSession.builder.appName("ehr_features")
    for name, value in (ours | dict(settings)).items():
        builder = builder.config(name, value)
    session = builder.getOrCreate()
    session.sparkContext.setLogLevel("ERROR")
    con = ibis.pyspark.connect(session)
    con.scratch, con.seen, con.broken = folder.resolve(), {}, set()  # observations by path; paths of unsplittable CSV
    weakref.finalize(con, shutil.rmtree, con.scratch, ignore_errors=True)
    return con


def has_master() -> bool:
    """Whether spark-submit, PYSPARK_SUBMIT_ARGS or spark-defaults.conf names the cluster."""
    if "PYSPARK_GATEWAY_PORT" in os.environ or "--master" in os.environ.get("PYSPARK_SUBMIT_ARGS", ""):
        return True
    home = os.environ.get("SPARK_HOME")
    folder = os.environ.get("SPARK_CONF_DIR") or (f"{home}/conf" if home else None)
    path = Path(folder or ".") / "spark-defaults.conf"
    return bool(folder) and path.is_file() and bool(re.search(r"^\s*spark\.master\b", path.read_text(), re.M))


def place(path: str | Path) -> str:
    """A path as Spark takes it; one without a scheme would be of the cluster's default file system."""
    return str(path) if "://" in str(path) else f"file://{Path(path).resolve()}"


def kept(con: Any, table: ir.Table) -> ir.Table:
    """A table computed once, by the executors, into the scratch folder."""
    return read_parquet(con, _written(con, table))


def batches(con: Any, table: ir.Table, rows: int) -> Iterator[pa.RecordBatch]:
    """The rows in their order; the driver holds one batch at a time."""
    folder, kinds = _written(con, table), table.schema().to_pyarrow()
    try:
        for path in sorted(folder.glob("part-*.parquet")):
            with pq.ParquetFile(path) as file:
                for batch in file.iter_batches(rows):
                    yield from pa.Table.from_batches([batch]).cast(kinds).to_batches()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def write_parquet(con: Any, table: ir.Table, folder: Path) -> None:
    """The executors write a folder of Parquet. Raises: UserError: the driver does not see their files."""
    table.to_parquet(place(folder))
    if not any(folder.glob("part-*.parquet")):
        raise UserError(
            f"engine=pyspark: {folder} has none of the files that the executors wrote there; set cache=FOLDER to one "
            "that driver and executors share"
        )


def _written(con: Any, table: ir.Table) -> Path:
    con.scratch.mkdir(parents=True, exist_ok=True)
    folder: Path = con.scratch / f"{gen_name('result')}.parquet"
    write_parquet(con, table, folder)
    return folder


def read_parquet(con: Any, path: str | Path) -> ir.Table:
    """Open a file or folder of Parquet."""
    return _view(con, con._session.read.parquet(place(path)))


def read_csv(con: Any, path: str, columns: list[str], *, count: bool = False) -> ir.Table:
    """Open a CSV; every column is text.

    Args:
        count: count its rows while they are read the first time (`counted`). A file that is not compressed is then read
            line by line, so that many tasks share it.
    """
    if not count:
        return _view(con, con._session.read.csv(place(path), multiLine=True, **CSV))
    from pyspark.sql import Observation, functions

    con.seen[path] = seen = Observation()
    rows = functions.count(functions.lit(1)).alias("rows")
    if not path.endswith(".csv") or path in con.broken:
        return _view(con, con._session.read.csv(place(path), multiLine=True, **CSV).observe(seen, rows))
    lines = con._session.read.text(place(path)).where("trim(value) != ''")
    odd = functions.expr("count_if(length(regexp_replace(value, '[^\"]', '')) % 2 = 1)").alias("odd")
    kinds = ", ".join(f"`{name}` STRING" for name in columns)
    row = functions.from_csv("value", kinds, {"escape": '"'}).alias("row")
    return _view(con, lines.observe(seen, rows, odd).select(row).select("row.*"))


def counted(con: Any, path: str) -> tuple[int, int] | None:
    """After a table opened with `count` was read: its rows, and how many more were read (its header, as a row).

    None: a value holds a line break, so that reading by lines was wrong; opened again, the file is read as a whole.
    """
    if path.endswith(".parquet"):  # by its footers
        return int(con._session.read.parquet(place(path)).count()), 0
    seen = con.seen.pop(path).get
    if seen.get("odd"):
        con.broken.add(path)
        return None
    header = int("odd" in seen)
    return int(seen["rows"]) - header, header


def _view(con: Any, frame: Any) -> ir.Table:
    frame.createOrReplaceTempView(name := gen_name("opened"))
    return con.table(name)
