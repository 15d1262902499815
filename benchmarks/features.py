"""Time and memory of the full extraction on the MIMIC-IV demo multiplied k-fold, from csv.gz.

./launch.sh python -m benchmarks.features DEMO [--k 1 5 20] [--scratch FOLDER] [--json FILE]

DEMO is the open MIMIC-IV demo (hosp/, icu/). For each k it is copied k times with renumbered subjects, admissions and
stays; `python -m ehr_features build` then runs in its own process with an empty cache (preset default, tasks mortality
and phenotypes, no films). Reference: the published extraction (MedFuse, mimic4extract; seconds of all its steps, memory
of the largest), measured once on two such cores and not repeated here.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import duckdb

REFERENCE_SECONDS = {1: 24.0, 20: 369.0}  # mimic4extract, all its steps, wall clock
REFERENCE_MB = {1: 139, 20: 140}  # the published code reads line by line
ENLARGED = {"patients": "hosp", "admissions": "hosp", "diagnoses_icd": "hosp", "labevents": "hosp"}
ENLARGED |= {"icustays": "icu", "chartevents": "icu"}
KEPT = {"d_items": "icu", "d_labitems": "hosp"}
IDS = ("subject_id", "hadm_id", "stay_id")
APART = 100_000_000  # offset of the ids of a copy; ids have eight digits


def enlarge(demo: Path, folder: Path, k: int, thin: int = 1) -> dict[str, int]:
    """Write k copies of the demo, each with other ids; of events one row in `thin`. Returns: rows of each table."""
    rows = {}
    con = duckdb.connect()
    for name, part in ENLARGED.items():
        target = folder / part / f"{name}.csv.gz"
        target.parent.mkdir(parents=True, exist_ok=True)
        read = f"read_csv('{demo / part / name}.csv.gz', all_varchar=true, header=true)"
        if thin > 1 and name.endswith("events"):
            read = f"(SELECT * FROM {read} QUALIFY row_number() OVER () % {thin} = 0)"
        columns = [c[0] for c in con.execute(f"DESCRIBE SELECT * FROM {read}").fetchall()]
        select = [f"CAST({c} AS BIGINT) + i * {APART} AS {c}" if c in IDS else f'"{c}"' for c in columns]
        sql = f"SELECT {', '.join(select)} FROM {read}, range({k}) AS copies(i)"
        con.execute(f"COPY ({sql}) TO '{target}' (HEADER, COMPRESSION gzip)")
        rows[name] = con.execute(f"SELECT count(*) FROM {read}").fetchone()[0] * k  # type: ignore[index]
    for name, part in KEPT.items():
        shutil.copy(demo / part / f"{name}.csv.gz", folder / part)
    return rows


def extract(folder: Path, out: Path) -> dict[str, Any]:
    """Run the extraction. Returns: wall and CPU seconds, peak memory, size of features and cache, seconds per step."""
    config = out.with_suffix(".yaml")
    config.write_text(f"mimic_iv: {folder}\nout: {out}\nmemory: 1GB\nthreads: 2\n")
    begun = time.monotonic()
    process = subprocess.Popen([sys.executable, "-m", "ehr_features", "build", str(config)], stdout=subprocess.DEVNULL)
    _pid, status, usage = os.wait4(process.pid, 0)
    seconds = time.monotonic() - begun
    if status:
        raise SystemExit(f"the extraction failed with status {status}")
    steps = json.loads((out / "provenance.json").read_text())["seconds"]
    cpu = round(usage.ru_utime + usage.ru_stime, 2)
    disk = [
        sum(p.stat().st_size for p in f.rglob("*") if p.is_file()) for f in (out, out.with_name(f"{out.name}.cache"))
    ]
    numbers = {"seconds": round(seconds, 2), "cpu": cpu, "peak_mb": round(usage.ru_maxrss / 1024)}
    return numbers | {"disk_mb": round(sum(disk) / 1e6), "steps": steps}


def exponent(points: dict[int, float]) -> float:
    """The slope of log(seconds) over log(rows)."""
    x, y = [math.log(k) for k in points], [math.log(s) for s in points.values()]
    mx, my = sum(x) / len(x), sum(y) / len(y)
    return sum((a - mx) * (b - my) for a, b in zip(x, y, strict=True)) / sum((a - mx) ** 2 for a in x)


def table(results: dict[int, dict[str, Any]]) -> list[str]:
    """The results as rows of Markdown; a ratio above 1 means that ours needs less."""
    rows = []
    for k, now in results.items():
        if k in REFERENCE_SECONDS:
            what, rows_read = f"demo x {k}", now["chart_rows"] + now["lab_rows"]
            seconds, memory = REFERENCE_SECONDS[k], REFERENCE_MB[k]
            rows += [
                f"| features, {what} ({rows_read:,d} event rows), s | {now['seconds']:.1f} | published {seconds:.0f} "
                f"| {seconds / now['seconds']:.1f}x |",
                f"| features, {what}, peak memory, MB | {now['peak_mb']} | published {memory} "
                f"| {memory / now['peak_mb']:.1f}x |",
            ]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("demo", type=Path, help="the folder of the open MIMIC-IV demo")
    parser.add_argument("--k", type=int, nargs="+", default=[1, 5, 20])
    parser.add_argument("--scratch", type=Path, default=None, help="folder for the enlarged tables (kept)")
    parser.add_argument("--json", type=Path, default=None, help="also write the numbers to this file")
    args = parser.parse_args()
    scratch = args.scratch or Path(tempfile.mkdtemp(prefix="features-benchmark-"))
    results = {}
    for k in args.k:
        folder = scratch / f"demo-times-{k}"
        if not (folder / "rows.json").is_file():
            print(f"k = {k}: writing the tables ...", flush=True)
            with multiprocessing.get_context("spawn").Pool(1) as pool:  # keep its memory out of the extraction's
                rows = pool.apply(enlarge, (args.demo, folder, k))
            (folder / "rows.json").write_text(json.dumps(rows))
        rows = json.loads((folder / "rows.json").read_text())
        out = scratch / f"features-{k}"
        for old in (out, out.with_name(out.name + ".cache")):
            shutil.rmtree(old, ignore_errors=True)
        results[k] = extract(folder, out) | {"chart_rows": rows["chartevents"], "lab_rows": rows["labevents"]}
        known = REFERENCE_SECONDS.get(k)
        faster = f"{known / results[k]['seconds']:.0f} x faster than the reference's {known:.0f} s" if known else ""
        now = results[k]
        print(
            f"k = {k:3d}: {now['chart_rows']:>11,d} chart rows  {now['seconds']:7.1f} s ({now['cpu']:.1f} s of CPU)  "
            f"{now['peak_mb']:5d} MB  {now['disk_mb']:5d} MB on disk  {faster}"
        )
        print("        " + ", ".join(f"{name} {seconds:.1f}" for name, seconds in now["steps"].items()), flush=True)
    if len(results) > 1:
        print(f"scaling exponent (seconds over rows): {exponent({k: r['seconds'] for k, r in results.items()}):.2f}")
    print("\n".join(table(results)))
    if args.json:
        args.json.write_text(json.dumps(results, indent=2) + "\n")
    if args.scratch is None:
        shutil.rmtree(scratch)


if __name__ == "__main__":
    main()
