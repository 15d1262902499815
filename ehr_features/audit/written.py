"""The written tables of a features/ folder, queried where they lie: counts come into memory, rows do not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import duckdb
import ibis
import ibis.expr.types as ir
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from ehr_features import schema
from ehr_features.files import AGAIN, check_table
from ehr_features.raw.engine import connect, gathered, hold
from ehr_features.raw.source import Source
from ehr_features.typed import read_json, shapes, undamaged
from ehr_features.typed.read import check_parquet

IDS = ("stay_id", "subject_id", "predict_at_hours")
SQL = {"int64": "BIGINT", "float64": "DOUBLE", "string": "VARCHAR", "boolean": "BOOLEAN", "date": "DATE"}


class Written:
    """Views of stays, images (empty without films), stay_films and `samples/TASK` on a DuckDB connection.

    Attributes:
        con: the connection. columns: view -> its columns. tasks: the names of the samples with ids.
        films: whether there are films.
    Raises: UserError: no features folder, or a table that is absent, damaged or of another shape.
    """

    def __init__(self, features: Path, memory: str, threads: int = 2) -> None:
        self.features = features
        paths = {"stays": check_table(features, "stays")}
        self.films = (features / "images.parquet").is_file()
        if self.films:
            paths |= {name: check_table(features, name) for name in ("images", "stay_films")}
        ours = read_json(features / "schema.json", shapes.SchemaJson)
        for path in sorted(features.glob("samples/*.parquet")):  # a user's own table may hold anything
            if (name := f"samples/{path.stem}") in ours:
                check_table(features, name)
            else:
                check_parquet(path, {}, AGAIN, [])
            if _has_ids(pq.read_schema(path)):
                paths[name] = path
        self.columns = {name: pq.read_schema(path).names for name, path in paths.items()}
        self.tasks = [name.removeprefix("samples/") for name in paths if name.startswith("samples/")]
        self._paths, self._own = paths, connect("duckdb", memory=memory, threads=threads)
        self._open(self._own.con)

    def _open(self, con: Any) -> None:
        self.con = con
        for name, path in self._paths.items():
            columns = "*"
            if name.startswith("samples/"):
                columns = "* REPLACE (dicom_id::VARCHAR AS dicom_id)"
                columns += "".join(f", NULL::BIGINT AS {c}" for c in IDS if c not in self.columns[name])
            file = str(path).replace("'", "''")
            with undamaged(path, AGAIN):
                con.execute(f"CREATE TEMP VIEW {quoted(name)} AS SELECT {columns} FROM read_parquet('{file}')")
        if not self.films:
            typed = ", ".join(f"NULL::{sql_type(c.type)} AS {quoted(name)}" for name, c in schema.IMAGES.items())
            con.execute(f"CREATE TEMP VIEW images AS SELECT {typed} WHERE false")

    def beside(self, source: Source) -> None:
        """Move the views to the connection of the raw tables, so that one limit of memory holds for both."""
        if source.con.name == "duckdb":
            self.con.close()
            self._own = source.con
            self._open(source.con.con)

    def view(self, source: Source, name: str, *columns: str) -> None:
        """Name a raw table for the queries; a missing one is empty."""
        if not source.has(name):
            kinds = schema.READ[name].columns
            typed = ", ".join(f"NULL::{sql_type(kinds[c])} AS {c}" for c in columns)
            self.con.execute(f"CREATE OR REPLACE TEMP VIEW {name} AS SELECT {typed} WHERE false")
            return
        self.expression(source, name, source.table(name).select(*columns))

    def expression(self, source: Source, name: str, table: ir.Table) -> None:
        """Name an expression over raw tables for the queries."""
        if source.con.name == "duckdb":
            self.con.execute(f"CREATE OR REPLACE TEMP VIEW {name} AS {ibis.to_sql(table, dialect='duckdb')}")
        else:
            self.con.register(name, gathered(table))

    def table(self, source: Source, name: str, sql: str) -> ir.Table:
        """The result of a query for expressions over raw tables."""
        if source.con.name == "duckdb":
            self._execute(f"CREATE OR REPLACE TEMP TABLE {name} AS {sql}")
            return source.con.table(name)
        return hold(source.con, name, self._execute(sql).to_arrow_table())

    def numbers(self, sql: str) -> tuple[int, ...]:
        """The row of a query that counts."""
        return tuple(int(n or 0) for n in self._execute(sql).fetchall()[0])

    def frame(self, sql: str) -> pd.DataFrame:
        """The result of a query; for small ones."""
        return self._execute(sql).df()

    def rows(self, name: str) -> int:
        return self.numbers(f"SELECT count(*) FROM {quoted(name)}")[0]

    def _execute(self, sql: str) -> Any:
        try:
            return self.con.execute(sql)
        except duckdb.Error:
            for path in self._paths.values():  # damaged bytes are named by the file that holds them
                with undamaged(path, AGAIN), pq.ParquetFile(path) as file:
                    for _batch in file.iter_batches():
                        pass
            raise


def quoted(name: str) -> str:
    """A name in SQL."""
    return '"' + name.replace('"', '""') + '"'


def sql_type(kind: str) -> str:
    """A declared type in SQL."""
    return SQL.get(kind, "TIMESTAMP")


def _has_ids(kinds: pa.Schema) -> bool:
    """Whether a table of samples has the columns to be checked; a user's own table may lack them."""
    if not {"split", "dicom_id"} <= set(kinds.names):
        return False
    tests = (pa.types.is_integer, pa.types.is_floating, pa.types.is_null)
    return all(any(test(kinds.field(name).type) for test in tests) for name in IDS if name in kinds.names)
