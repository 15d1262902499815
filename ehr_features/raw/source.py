"""Find and open raw tables: MIMIC-IV 1.0, 2.x, 3.x, MIMIC-IV-ED, MIMIC-CXR(-JPG); csv, csv.gz, parquet; local or a URL.

Input: the root folders of a FeaturesConfig. Output: a `Source` whose `table(name)` is an ibis expression with the
columns of `schema.READ`, selected and cast by name. CSV columns are read as text by their header, so inserted columns
do no harm and the text "None" remains a value. Text that cannot be cast becomes null; each step counts the rows that it
drops for this reason. Whole numbers are read in any form: `220045`, ` 220045` and `220045.0` of CSV, integers and
floats of Parquet; 220045.5 is null. Rows without a required id and repeated headers are dropped and counted.
"""

from __future__ import annotations

import csv
import os
import re
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import fsspec
import ibis
import ibis.expr.types as ir
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from ibis import _

from configs import UserError
from configs.amounts import amount
from ehr_features.config import FeaturesConfig
from ehr_features.files import PARTIAL, make_folder, tidy
from ehr_features.raw.engine import connect, hold, kept, read, readable
from ehr_features.raw.remote import (
    INFLATION,
    SMALL,
    SUFFIXES,
    cached,
    configure,
    exists,
    explained,
    find_table,
    fingerprint,
    is_url,
)
from ehr_features.schema import READ, Raw

SINCE_22 = {"admissions": "admit_provider_id", "chartevents": "caregiver_id", "labevents": "order_provider_id"}
UTC = ("UTC", "ETC/UTC", "GMT", "Z", "+00:00", "+0000", "+00")
OFFSET = re.compile(r"\d:\d\d(?::\d\d(?:\.\d+)?)? *(Z|[+-]\d\d(?::?\d\d)?|[A-Z][A-Za-z]+/?\w*)$")
HEAD = 2**16  # bytes read to find a table's header
EVENTS = ("chartevents", "labevents")  # too large for memory
YEARS = ("1678-01-01", "2262-01-01")  # what pandas counts in nanoseconds; shifted MIMIC years are 2089 to 2214
_HOLDS = {"mimic_iv": "hosp/ and icu/", "mimic_ed": "ed/", "mimic_cxr": "mimic-cxr-2.0.0-metadata"}


class Source:
    """The raw tables of a config, opened on one engine.

    Attributes:
        con: the ibis backend. files: table name -> path or URL. columns: table name -> columns found there.
        layout: `1.0` (core/, ethnicity), `2.0` (hosp/, race), `2.2` (also caregiver_id; 2.2 to 3.1).
        dropped: table name -> rows without an id that they need, for tables whose rows have been counted.
    """

    def __init__(self, con: Any, files: Mapping[str, str], columns: Mapping[str, list[str]], layout: str) -> None:
        self.con, self.files, self.columns, self.layout = con, dict(files), dict(columns), layout
        self.dropped: dict[str, int] = {}
        self._tables: dict[str, ir.Table] = {}  # all rows, also those to be dropped
        self._absent: dict[str, str] = {}
        self._cache: Path | None = None  # folder for copies of remote tables

    @classmethod
    def from_frames(cls, frames: Mapping[str, pd.DataFrame], engine: str = "duckdb", layout: str = "2.2") -> Source:
        """A source of small tables held in memory (for tests); columns left out are null."""
        source = cls(connect(engine), {}, {}, layout)
        for name, frame in frames.items():
            raw = READ[name]
            table = pa.Table.from_pandas(frame[[c for c in raw.columns if c in frame]], preserve_index=False)
            for at, f in enumerate(table.schema):
                if pa.types.is_null(f.type):
                    table = table.set_column(at, f.name, table[f.name].cast(pa.string()))
            opened = hold(source.con, f"raw_{name}", table)
            source._tables[name] = opened.select(**_cast(opened, raw, {c: c for c in raw.columns}))
        return source

    def has(self, name: str) -> bool:
        """Whether the table was found."""
        return name in self._tables or name in self.files

    def table(self, name: str) -> ir.Table:
        """A raw table with the columns and types of schema.READ.

        Raises: UserError: the table is absent, empty, damaged, or lacks a column.
        """
        if name not in self._tables:
            if name not in self.files:
                raise UserError(self._absent.get(name, f"table `{name}` was not found"))
            self._tables[name] = self._open(name)
        return self._tables[name].filter(named(name, self._tables[name]))

    def rows(self, name: str) -> int:
        """Count the rows in the file of a table; `dropped` then holds how many of them lack an id."""
        kept, everything = self.table(name).count(), self._tables[name].count()
        rows = int(everything.execute())
        self.dropped[name] = rows - int(kept.execute())
        return rows

    def events(self, name: str, items: list[int]) -> ir.Table:
        """Rows of an event table with given itemids, or without an itemid."""
        if name in self._tables:
            return self._tables[name].filter(_.itemid.isin(items) | _.itemid.isnull())
        return self._open(name, items)

    def _open(self, name: str, items: list[int] | None = None) -> ir.Table:
        raw, path, found = READ[name], self.files[name], self.columns[name]
        check_columns(name, path, found, self.layout)
        check_zones(name, path)
        if is_url(path) and name not in EVENTS and self.con.name == "duckdb" and self._cache is not None:
            path = cached(path, fingerprint(path), self._cache)
        with explained(path), readable(path):
            opened = read(self.con, path, found, count=items is not None)
        if items is not None and opened.itemid.type().is_string():  # casting every row would be slow
            plain = opened.itemid.re_search(r"^[1-9][0-9]*$").fill_null(False)
            opened = opened.filter(opened.itemid.isin([str(i) for i in items]) | ~plain)
        names = {c: (raw.renamed.get(c, c) if self.layout == "1.0" else c) for c in raw.columns}
        table = opened.select(**_cast(opened, raw, names))
        table = table if items is None else table.filter(_.itemid.isin(items) | _.itemid.isnull())
        if name in EVENTS:
            return table
        with readable(path):  # a table read by several steps is parsed once, and damage is reported with its file
            return kept(self.con, table)


def named(name: str, table: ir.Table) -> ir.Value:
    """Whether a row of a raw table has the ids that it needs."""
    return ibis.and_(*(table[key].notnull() for key in READ[name].keys))


def without_ids(name: str) -> str:
    """The reason for which `table` drops rows of a raw table."""
    *others, last = READ[name].keys
    return f"no {', '.join(others)} or {last}" if others else f"no {last}"


def open_source(config: FeaturesConfig) -> Source:
    """Find the tables of a config, read their headers, and connect the engine.

    Raises: UserError: a wrong folder, a table that every build needs is absent, files of two layouts in one folder.
    """
    configure(config.storage)
    files: dict[str, str] = {}
    absent: dict[str, str] = {}
    for key, root in roots(config).items():
        tables = {name: raw for name, raw in READ.items() if raw.root == key}
        if root is None:
            absent |= {name: f"table `{name}` is needed here, but the config has no `{key}`" for name in tables}
            continue
        found = {name: path for name, raw in tables.items() if (path := find_table(root, raw))}
        if not found:
            raise UserError(f"{key}: {_wrong_folder(root, key)}")
        files |= found
        for name in tables.keys() - found.keys():
            path = f"{root.rstrip('/')}/{tables[name].places[0]}"
            absent[name] = f"{path}{{{','.join(SUFFIXES)}}}: no such file; `{key}` needs its table `{name}` here"
        if "edstays" in tables and "edstays" not in found:
            raise UserError(f"{absent['edstays']}: the other tables have neither the time of arrival nor the admission")
    columns = {name: header(path) for name, path in files.items()}
    layout = _layout(config.mimic_iv, files, columns)
    make_folder(config.cache_folder)
    tidy(config.cache_folder)
    spill = config.cache_folder / f".spill{PARTIAL}-{os.getpid()}"
    con = connect(config.engine, memory=config.memory, threads=config.threads, spill=spill, settings=config.spark)
    for protocol in {path.partition("://")[0] for path in files.values() if is_url(path)}:
        if config.engine == "duckdb":
            con.register_filesystem(fsspec.filesystem(protocol))
    source = Source(con, files, columns, layout)
    source._absent, source._cache = absent, config.cache_folder
    return source


def roots(config: FeaturesConfig) -> dict[str, str | None]:
    """The folders that a config names, by key."""
    return {"mimic_iv": config.mimic_iv, "mimic_ed": config.mimic_ed, "mimic_cxr": config.mimic_cxr}


def whole(column: ir.Value) -> ir.Value:
    """Whole numbers in any form as int64; a value that is no whole number becomes null."""
    if column.type().is_integer():
        return column.cast("int64")
    number = (column.strip() if column.type().is_string() else column).try_cast("float64")
    number = ibis.cases((number.abs() < 2**53, number))  # null for NaN and infinity; floor() would stop at them
    return ibis.cases((number == number.floor(), number)).try_cast("int64")


def _cast(table: ir.Table, raw: Raw, names: Mapping[str, str]) -> dict[str, ir.Value]:
    """The columns of a raw table, cast to their types; a value that cannot be cast becomes null.

    Args:
        names: our name -> the name in the file.
    """
    nothing = ibis.null("string")
    return {
        ours: _cast_one(table[name] if name in table.columns else nothing, raw.columns[ours], name, ours in raw.keys)
        for ours, name in names.items()
    }


def _cast_one(column: ir.Value, to: str, name: str, is_key: bool) -> ir.Value:
    if to == "string":
        text = column.cast("string")
        return text.strip().nullif("").nullif(name) if is_key else text.nullif("")  # `name`: a repeated header
    if to == "int64":
        return whole(column)
    # DuckDB 2.0 pushes a bare try_cast into the CSV reader as the column's type, and stops at the first bad value
    text = column.nullif("") if column.type().is_string() else column
    cast = column if str(column.type()) == to else text.try_cast(to)
    if to in ("timestamp", "date"):  # DuckDB takes `inf` and years up to 294247 as times; pandas stops at them
        first, last = (ibis.literal(day).cast(to) for day in YEARS)
        return ibis.cases(((cast >= first) & (cast < last), cast))
    return cast


def _wrong_folder(root: str, key: str) -> str:
    wanted = f"wanted the folder that holds {_HOLDS[key]}"
    with explained(root):
        filesystem, inner = fsspec.url_to_fs(root)
        if not filesystem.isdir(inner):
            return f"{root}: no such folder; {wanted}"
        below = sorted(Path(p).name for p in filesystem.ls(inner, detail=False))
    tables = [raw for raw in READ.values() if raw.root == key]
    inside = [name for name in below[:50] if any(find_table(f"{root.rstrip('/')}/{name}", raw) for raw in tables)]
    hint = f"; did you mean {root.rstrip('/')}/{inside[-1]}?" if inside else ""
    return f"{root}: none of its tables is there; found {below[:8]}; {wanted}{hint}"


def header(path: str) -> list[str]:
    """The column names of a table. Raises: UserError: empty, no gzip file, damaged."""
    with explained(path), readable(path):
        if path.endswith(".parquet"):
            with fsspec.open(path, "rb") as file:
                return list(pq.read_schema(file).names)
        line = _head(path).partition(b"\n")[0].decode("utf-8-sig")
    if not line.strip():
        raise UserError(f"{path}: the file is empty; download it again")
    return next(csv.reader([line.strip()]))


def _head(path: str) -> bytes:
    """The start of a CSV file, with the header and some rows."""
    with fsspec.open(path, "rb") as file:
        head = bytes(file.read(HEAD))  # one request of a URL
    if not path.endswith(".gz"):
        return head
    unzip, whole, most = zlib.decompressobj(wbits=31), bool(head), max(SMALL, INFLATION * len(head))
    head = unzip.decompress(head, most)
    if unzip.unconsumed_tail:
        raise UserError(f"{path}: its start expands to more than {amount(most)}: no table does; download it again")
    if whole and not unzip.eof and b"\n" not in head:
        raise EOFError("it ends within its header")
    return head


def check_columns(name: str, path: str, found: list[str], layout: str) -> None:
    """Refuse a table that lacks a required column."""
    raw = READ[name]
    for column in raw.columns:
        wanted = raw.renamed.get(column, column) if layout == "1.0" else column
        if wanted in found or column in raw.optional:
            continue
        whose = f"MIMIC-IV {layout}" if raw.root == "mimic_iv" else raw.root.upper().replace("_", "-")
        also = (
            f" (`{raw.renamed[column]}` in 1.0, `{column}` since 2.0)"
            if column in raw.renamed
            else " (every release has it)"
        )
        raise UserError(
            f"{path}: column `{wanted}` is missing; found {found}. The layout is that of {whose}, whose `{name}` has "
            f"`{wanted}`{also}; is this file `{name}`, and whole?"
        )


def check_zones(name: str, path: str) -> None:
    """Refuse a table whose times are in a zone other than UTC, by a Parquet column's type or a CSV's first rows.

    MIMIC's times are wall-clock times without a zone, like those of the films. UTC is read as such; in another zone it
    is unknown whether the wall clock is MIMIC's or was shifted.
    """
    times = [c for c, to in READ[name].columns.items() if to in ("timestamp", "date")]
    with explained(path), readable(path):
        if path.endswith(".parquet"):
            with fsspec.open(path, "rb") as file:
                types = {field.name: field.type for field in pq.read_schema(file)}
            zones = {c: [str(types[c].tz)] for c in times if getattr(types.get(c), "tz", None)}
        else:
            rows = list(csv.DictReader(_head(path).decode("utf-8-sig", "ignore").splitlines()[:-1])) if times else []
            zones = {c: [found[1] for row in rows if (found := OFFSET.search(row.get(c) or ""))] for c in times}
    if bad := {c: odd for c, all_ in zones.items() if (odd := [z for z in all_ if z.upper().strip() not in UTC])}:
        column, (zone, *_) = next(iter(bad.items()))
        raise UserError(
            f"{path}: the times of {', '.join(f'`{c}`' for c in bad)} are in the zone {zone}; wanted times without a "
            "zone, as MIMIC has them. To keep the clock of the zone, write the table again after "
            f"table['{column}'].dt.tz_localize(None) of pandas"
        )


def mixed(columns: Mapping[str, list[str]]) -> list[str]:
    """A warning if some tables have the columns that 2.2 added and others lack them."""
    there = {name: column in columns[name] for name, column in SINCE_22.items() if name in columns}
    if len(set(there.values())) < 2:
        return []
    new, old = (", ".join(n for n, has in there.items() if has == side) for side in (True, False))
    lacks = ", ".join(SINCE_22[n] for n, has in there.items() if not has)
    return [f"{new} as since 2.2, {old} as before (without {lacks}): are all tables from the same release?"]


def _layout(root: str, files: Mapping[str, str], columns: Mapping[str, list[str]]) -> str:
    """1.0, 2.0 or 2.2, by the folders and columns; contradictions are refused."""
    signs: dict[str, str] = {}  # evidence -> the layout that has it
    for name in ("patients", "admissions"):
        places = [p for p in ("core", "hosp") if any(exists(f"{root.rstrip('/')}/{p}/{name}{s}") for s in SUFFIXES)]
        signs |= {f"{place}/{name}": "1.0" if place == "core" else ">=2" for place in places}
    if "admissions" in columns:
        found = columns["admissions"]
        signs |= {f"admissions.{c}": v for c, v in (("ethnicity", "1.0"), ("race", ">=2")) if c in found}
    if "caregiver_id" in columns.get("chartevents", []):
        signs["chartevents.caregiver_id"] = ">=2"
    if len(set(signs.values())) > 1:
        seen = "; ".join(f"{sign} is {'1.0' if v == '1.0' else '2.0 or later'}" for sign, v in signs.items())
        raise UserError(f"{root}: files of two MIMIC-IV layouts are mixed here: {seen}. Keep one release in a folder")
    if "1.0" in signs.values():
        return "1.0"
    return "2.2" if "chartevents.caregiver_id" in signs or "chartevents" not in columns else "2.0"
