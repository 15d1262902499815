"""Features of the open demo, enlarged, on Spark with a small driver: time, memory, and whether they equal DuckDB's.

    ./launch.sh python -m benchmarks.spark DEMO --cxr LINKED [--k 1 5 20] [--memory 1GB]
        [--master local-cluster[2,1,1024]] [--scratch FOLDER]

DEMO is the open MIMIC-IV demo and LINKED the film tables of its subjects; each is copied k times with other ids
(benchmarks.full). `driver` is the largest resident memory of Python and of the driver's JVM, together; with
local-cluster the executors are JVMs of their own. Needs the extra `spark` and Java.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
from safetensors.numpy import load_file

from benchmarks.full import hospital


def built(folder: Path, out: Path, keys: str) -> tuple[float, float]:
    """Build features in a process of their own. Returns: seconds, peak MB of the driver."""
    for old in (out, out.with_name(f"{out.name}.cache")):
        shutil.rmtree(old, ignore_errors=True)
    config = out.with_suffix(".yaml")
    tables = f"mimic_iv: {folder / 'iv'}\nmimic_cxr: {folder / 'cxr'}\nout: {out}\n"
    config.write_text(f"{tables}tasks: [mortality, phenotypes, decompensation]\n{keys}")
    begun, most, done = time.monotonic(), [0.0], threading.Event()
    process = subprocess.Popen([sys.executable, "-m", "ehr_features", "build", str(config)])

    def watch() -> None:
        while not done.wait(0.5):
            most.append(max(most.pop(), driver(process.pid)))

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    status = process.wait()
    done.set()
    watcher.join()
    if status:
        raise SystemExit(f"{config}: failed with status {status}")
    return time.monotonic() - begun, most[0]


def driver(pid: int) -> float:
    """Resident MB of a process and its JVM, without the executors and Python workers that the JVM starts."""
    total = 0.0
    try:
        mine = psutil.Process(pid)
        for one in (mine, *mine.children()):
            total += one.memory_info().rss / 2**20
    except psutil.NoSuchProcess:
        pass
    return total


def differences(one: Path, other: Path) -> list[str]:
    """The files of two features folders that differ."""
    found = []
    for path in sorted(one.rglob("*.parquet")):
        try:
            pd.testing.assert_frame_equal(pd.read_parquet(path), pd.read_parquet(other / path.relative_to(one)))
        except AssertionError:
            found.append(path.name)
    a, b = (load_file(folder / "series.safetensors") for folder in (one, other))
    found += [f"series: {key}" for key in a if not np.array_equal(a[key], b[key])]
    names = ("series.json", "schema.json", "attrition.json")
    return found + [name for name in names if (one / name).read_bytes() != (other / name).read_bytes()]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("demo", type=Path, help="the folder of the open MIMIC-IV demo")
    parser.add_argument("--cxr", type=Path, required=True, help="the film tables of its subjects")
    parser.add_argument("--k", type=int, nargs="+", default=[1, 5, 20])
    parser.add_argument("--memory", default="1GB")
    parser.add_argument("--master", default="local[2]")
    parser.add_argument("--scratch", type=Path, default=None, help="folder for the enlarged tables (kept)")
    args = parser.parse_args()
    scratch = args.scratch or Path(tempfile.mkdtemp(prefix="spark-benchmark-"))
    print("| copies | event rows | master | `memory` | Spark s | driver, peak MB | DuckDB s | differences |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    for k in args.k:
        folder = scratch / f"hospital-{k}"
        if not (folder / "rows.json").is_file():
            rows = hospital(args.demo, args.cxr, folder, k)
            (folder / "rows.json").write_text(json.dumps(rows))
        rows = json.loads((folder / "rows.json").read_text())
        spark = f"memory: {args.memory}\nengine: pyspark\nspark: {{spark.master: '{args.master}'}}\n"
        seconds, peak = built(folder, scratch / f"spark-{k}", spark)
        reference, _peak = built(folder, scratch / f"duckdb-{k}", "memory: 4GB\n")
        bad = ", ".join(differences(scratch / f"duckdb-{k}", scratch / f"spark-{k}")) or "none"
        size = f"| {k} | {rows['chartevents'] + rows['labevents']:,} | {args.master} | {args.memory} "
        print(f"{size}| {seconds:.0f} | {peak:,.0f} | {reference:.0f} | {bad} |", flush=True)
    if args.scratch is None:
        shutil.rmtree(scratch)


if __name__ == "__main__":
    main()
