"""Processor seconds, peak memory and spill of `features` and `audit` from the open demo's size to a full hospital.

    ./launch.sh python -m benchmarks.full DEMO --cxr LINKED [--k 1 5 20 40 full] [--memory 500MB 1GB 16GB] [--thin 1]
        [--scratch FOLDER] [--json FILE]

DEMO is the open MIMIC-IV demo and LINKED the film tables of its subjects; each is copied k times with other ids, as
csv.gz. `full` is the number of copies with the 94,458 ICU stays of MIMIC-IV 3.1; `--thin N` keeps one event in N.
`features` writes the tasks mortality, phenotypes and decompensation (a sample for each hour) with an empty cache;
`audit` then reads the raw tables again. Each runs in a process of its own. `peak` is its largest resident memory, pages
of mapped files included; `spill` the most that its engine had on the disk. A limit above what is needed (16GB) shows
the memory without one.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import duckdb

from benchmarks.features import APART, enlarge, exponent

DEMO_STAYS, FULL_STAYS = 140, 94_458
FILMS = {"metadata": "dicom_id", "chexpert": None, "split": "dicom_id"}  # table: the column that names a film
TASKS = "tasks: [mortality, phenotypes, decompensation]"
STEPS = ("build", "audit")


def hospital(demo: Path, cxr: Path, folder: Path, k: int, thin: int = 1) -> dict[str, int]:
    """Write k copies of the demo and of its films. Returns: rows of each table."""
    rows = enlarge(demo, folder / "iv", k, thin)
    (folder / "cxr").mkdir(parents=True, exist_ok=True)
    con = duckdb.connect()
    for name, film in FILMS.items():
        file = f"mimic-cxr-2.0.0-{name}.csv.gz"
        read = f"read_csv('{cxr / file}', all_varchar=true, header=true)"
        ids = [f"CAST({c} AS BIGINT) + i * {APART} AS {c}" for c in ("subject_id", "study_id")]
        ids += [f"{film} || '-' || i AS {film}"] if film else []
        sql = f"SELECT * REPLACE ({', '.join(ids)}) FROM {read}, range({k}) AS copies(i)"
        sql = f"SELECT * EXCLUDE (i) FROM ({sql})"
        con.execute(f"COPY ({sql}) TO '{folder / 'cxr' / file}' (HEADER, COMPRESSION gzip)")
        rows[name] = con.execute(f"SELECT count(*) FROM {read}").fetchone()[0] * k  # type: ignore[index]
    return rows


def measured(words: Sequence[str], spill: Path) -> dict[str, float]:
    """Run a command of `ehr_features`. Returns: wall and processor seconds, peak memory and spill in MB."""
    begun, spilled, peak, done = time.monotonic(), [0], [0], threading.Event()
    command = [sys.executable, "-m", "ehr_features", *words]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)

    def watch() -> None:  # the system's own peak of a child (ru_maxrss) has that of this process before it
        while not done.wait(0.2):
            spilled.append(max(spilled.pop(), sum(size(path) for path in spill.glob(".spill*/*"))))
            with contextlib.suppress(OSError, ValueError):
                said = Path(f"/proc/{process.pid}/status").read_text().split()
                now = int(said[said.index("VmHWM:") + 1])
                peak.append(max(peak.pop(), now))

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    told = process.stderr.read() if process.stderr else ""
    _pid, status, usage = os.wait4(process.pid, 0)
    done.set()
    watcher.join()
    if status:
        raise SystemExit(f"{' '.join(words)} failed with status {status}:\n{told}")
    cpu = round(usage.ru_utime + usage.ru_stime, 1)
    seconds = round(time.monotonic() - begun, 1)
    return {"seconds": seconds, "cpu": cpu, "peak_mb": peak[0] // 1024, "spill_mb": spilled[0] // 10**6}


def size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:  # the engine has removed it meanwhile
        return 0


def run(folder: Path, scratch: Path, memory: str) -> dict[str, dict[str, float]]:
    """`features` with an empty cache, then `audit` of it."""
    out = scratch / "features"
    for old in (out, out.with_name("features.cache")):
        shutil.rmtree(old, ignore_errors=True)
    config = scratch / "config.yaml"
    config.write_text(
        f"mimic_iv: {folder / 'iv'}\nmimic_cxr: {folder / 'cxr'}\nout: {out}\nmemory: {memory}\n{TASKS}\n"
    )
    words = {"build": ["build", str(config)], "audit": ["audit", str(out)]}
    return {step: measured(words[step], out.with_name("features.cache")) for step in STEPS}


def table(results: list[dict[str, Any]]) -> list[str]:
    """The results as Markdown, and the exponents of the processor seconds over the rows."""
    lines = ["| copies | event rows | films | `memory` | step | processor s | s | peak MB | spill MB |"]
    lines.append("|---|---|---|---|---|---|---|---|---|")
    for one in results:
        for step in STEPS:
            now = one[step]
            lines.append(
                f"| {one['k']} | {one['events']:,} | {one['films']:,} | {one['memory']} | {step} | {now['cpu']:.0f} "
                f"| {now['seconds']:.0f} | {now['peak_mb']:,} | {now['spill_mb']:,} |"
            )
    for memory in dict.fromkeys(one["memory"] for one in results):
        mine = [one for one in results if one["memory"] == memory]
        if len(mine) > 1:
            slopes = [f"{step} {exponent({o['events']: o[step]['cpu'] for o in mine}):.2f}" for step in STEPS]
            lines.append(f"\nexponent of processor seconds over event rows, memory={memory}: {', '.join(slopes)}")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("demo", type=Path, help="the folder of the open MIMIC-IV demo")
    parser.add_argument("--cxr", type=Path, required=True, help="the film tables of its subjects")
    parser.add_argument("--k", nargs="+", default=["1", "5", "20", "40", "full"], help="copies; full: all stays")
    parser.add_argument("--memory", nargs="+", default=["500MB", "1GB", "16GB"])
    parser.add_argument("--thin", type=int, default=1, help="keep one event in so many")
    parser.add_argument("--scratch", type=Path, default=None, help="folder for the enlarged tables (kept)")
    parser.add_argument("--json", type=Path, default=None, help="also write the numbers to this file")
    args = parser.parse_args()
    scratch = args.scratch or Path(tempfile.mkdtemp(prefix="full-benchmark-"))
    results = []
    for word in args.k:
        k = round(FULL_STAYS / DEMO_STAYS) if word == "full" else int(word)
        folder = scratch / f"hospital-{k}-{args.thin}"
        if not (folder / "rows.json").is_file():
            print(f"{k} copies: writing the tables ...", file=sys.stderr, flush=True)
            rows = hospital(args.demo, args.cxr, folder, k, args.thin)
            (folder / "rows.json").write_text(json.dumps(rows))
        rows = json.loads((folder / "rows.json").read_text())
        counts = {"k": k, "events": rows["chartevents"] + rows["labevents"], "films": rows["metadata"]}
        for memory in args.memory:
            results.append(counts | {"memory": memory} | run(folder, scratch, memory))
            print(json.dumps(results[-1]), file=sys.stderr, flush=True)
            if args.json:
                args.json.write_text(json.dumps(results, indent=2) + "\n")
    print("\n".join(table(results)))
    if args.scratch is None:
        shutil.rmtree(scratch)


if __name__ == "__main__":
    main()
