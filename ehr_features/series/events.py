"""Filter chartevents and labevents once into Parquet.

Input: a source, itemids and subjects. Output: small Parquet files in the cache folder, named by a key of their inputs,
and the number of rows read. Files are written atomically.
"""

from __future__ import annotations

import json
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ibis
import ibis.expr.types as ir
import pyarrow as pa

from ehr_features.files import code_digest, digest, new_file, new_folder, write_json
from ehr_features.raw import spark
from ehr_features.raw.engine import hold, measure_progress, read, readable
from ehr_features.raw.remote import explained, fingerprint
from ehr_features.raw.source import EVENTS, Source, named
from ehr_features.schema import READ
from ehr_features.series.channels import SPECIMEN_TYPE, Channel, item_ids
from ehr_features.typed import read_json
from ehr_features.typed.shapes import Scan

NOBODY = -1
CODE_STATUS = (223758, 228687)


def selected(source: Source, declared: tuple[Channel, ...], folder: Path) -> dict[str, tuple[ir.Table, int]]:
    """The events of both presets' items and of all subjects with an ICU stay or a film, so that one filtering serves
    every preset and cohort, and the films' record.

    Args:
        declared: every variable (`read_variables`).
    """
    items = {i for preset in ("default", "medfuse") for i in item_ids(declared, preset)}
    subjects = set(source.table("icustays").subject_id.to_pyarrow().drop_null().to_pylist())
    if source.has("cxr_metadata"):
        subjects |= set(source.table("cxr_metadata").subject_id.to_pyarrow().drop_null().to_pylist())
    return cached(source, items | {*CODE_STATUS, SPECIMEN_TYPE}, subjects, folder)


def cached(
    source: Source, items: Iterable[int], subjects: Iterable[int], folder: Path
) -> dict[str, tuple[ir.Table, int]]:
    """The events of some items and subjects.

    Args:
        items: itemids to keep. subjects: subject_ids to keep. folder: of the cache.
    Returns: table name -> (its rows, how many rows the raw table has).
    """
    items, subjects = sorted(items), sorted(subjects)
    return {name: _one(source, name, items, subjects, folder) for name in EVENTS}


def _one(source: Source, name: str, items: list[int], subjects: list[int], folder: Path) -> tuple[ir.Table, int]:
    if name not in source.files:  # held in memory
        rows = source.rows(name)
        kept = _kept(source, name, items, subjects)
        return kept.filter(named(name, kept)), rows
    path_, columns = source.files[name], READ[name].columns
    made = [fingerprint(path_), dict(columns), source.layout, items, subjects, source.con.name]
    key = digest([name, path_, made, code_digest(sys.modules[__name__])])
    path, facts = folder / f"{name}-{key}.parquet", folder / f"{name}-{key}.json"
    if not (path.exists() and facts.is_file()):
        with explained(path_), readable(path_), progress(source.con, f"reading {name} (once)", reading(path_)):
            rows, more = _write(source, lambda: _kept(source, name, items, subjects), path, path_)
        written = read(source.con, str(path))
        dropped = int(written.filter(~named(name, written)).count().execute()) - more
        write_json(facts, {"rows_read": rows, "dropped": dropped})
    found, kept = read_json(facts, Scan), read(source.con, str(path))
    source.dropped[name] = found["dropped"]
    return kept.filter(named(name, kept)), found["rows_read"]


def _kept(source: Source, name: str, items: list[int], subjects: list[int]) -> ir.Table:
    """The events of some items and subjects; rows without their ids too, empty, to be counted."""
    who = hold(source.con, "event_subjects", pa.table({"subject_id": pa.array([NOBODY, *subjects], pa.int64())}))
    table = source.events(name, items)
    table = table.select(**{c: ibis.cases((named(name, table), table[c])) for c in table.columns})
    return table.semi_join(who, [table.subject_id.fill_null(NOBODY) == who.subject_id])


def _write(source: Source, table: Callable[[], ir.Table], path: Path, raw: str) -> tuple[int, int]:
    """Write a table to Parquet; returns how many rows its scan read, and how many of those written are no rows."""
    if source.con.name != "duckdb":
        return _write_spark(source.con, table, path, raw)
    con = source.con.con
    con.execute("PRAGMA enable_profiling = 'no_output'")
    try:
        with new_file(path) as part:
            table().to_parquet(part, compression="zstd")
        if raw.endswith(".parquet"):  # of which only some parts are read
            return int(read(source.con, raw).count().execute()), 0
        return _rows_scanned(json.loads(con.get_profiling_information("json"))), 0
    finally:
        con.execute("PRAGMA disable_profiling")


def _write_spark(con: Any, table: Callable[[], ir.Table], path: Path, raw: str) -> tuple[int, int]:
    """As `_write`: the executors write a folder."""
    with new_folder(path) as part:
        found = None
        while found is None:  # again as a whole, if a value holds a line break
            shutil.rmtree(part)  # Spark makes it
            spark.write_parquet(con, table(), part)
            found = spark.counted(con, raw)
        return found


def _rows_scanned(profile: Any) -> int:
    """The rows that came out of the file scan, without scans of the lists of items and subjects."""
    found = [0]
    if isinstance(profile, dict):
        if profile.get("type") == "TABLE_SCAN" and "ARROW" not in str(profile.get("name", "")):
            found.append(int(profile.get("intermediate_rows", 0)))
        found += [_rows_scanned(child) for key in ("operator", "children") for child in profile.get(key, [])]
    return max(found)


def reading(*paths: str | Path) -> Callable[[], float] | None:
    """The percent of files that this process has read since now, by the bytes that it has read of anything.

    DuckDB's own measure of a query weighs its stages by guesses: it stands still, or says 24 % at the end. None: a file
    is not local, or the system counts no bytes.
    """
    counts = Path("/proc/self/io")
    files = [Path(str(path).removeprefix("file://")) for path in paths]
    if not counts.is_file() or not all(file.is_file() for file in files):
        return None
    size = max(sum(file.stat().st_size for file in files), 1)

    def read_so_far() -> int:
        return int(counts.read_text().split()[1])

    begun = read_so_far()
    return lambda: min(100 * (read_so_far() - begun) / size, 100.0)


class Stages:
    """The percent of work in stages of equal share."""

    def __init__(self, num: int) -> None:
        self.num, self.stage = num, 0
        self.percent: Callable[[], float] = lambda: 0.0

    def begin(self, stage: int, percent: Callable[[], float] | None) -> None:
        """Begin a stage, counted from 0, whose own percent is a function."""
        self.stage, self.percent = stage, percent or (lambda: 0.0)

    def __call__(self) -> float:
        return (100 * self.stage + self.percent()) / self.num


@contextmanager
def progress(con: Any, what: str, percent: Callable[[], float] | None = None) -> Iterator[None]:
    """Show how far some work is, with the time left; without a terminal, a line at intervals.

    Args:
        percent: of the work; the engine's measure of its query if None.
    """
    if con.name != "duckdb" or not measure_progress(con.con, True):
        print(f"  {what} ...", file=sys.stderr, flush=True)
        yield
        return
    con.con.execute("SET enable_progress_bar_print = false")
    done = threading.Event()
    watcher = threading.Thread(target=_watch, args=(percent or con.con.query_progress, what, done), daemon=True)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()


def _watch(percent: Callable[[], float], what: str, done: threading.Event) -> None:
    terminal, begun, said = sys.stderr.isatty(), time.monotonic(), 0.0
    while not done.wait(0.5):
        spent = time.monotonic() - begun
        if spent < 2 or (not terminal and spent - said < 20):
            continue
        said, part = spent, max(percent(), 0.0)
        left = f", about {spent * (100 - part) / part:.0f} s left" if part > 1 else ""
        end = "\r" if terminal else "\n"
        print(f"  {what}: {part:3.0f} %, {spent:.0f} s{left}   ", end=end, file=sys.stderr, flush=True)
    if said and terminal:
        print(file=sys.stderr)
