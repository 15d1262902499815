"""Run all benchmarks and print one table.

    ./launch.sh python -m benchmarks.run [DEMO] [--only NAME ...] [--write]

DEMO is the open MIMIC-IV demo (hosp/, icu/); without it, benchmarks that need it are skipped with a message. Each
benchmark runs in its own process, one after the other, both sides of a ratio in one run. Output: a Markdown table
(what, ours, the reference, the ratio, the command), the machine and the versions; with --write it goes into
docs/speed.md between the marks `<!-- benchmarks -->` and `<!-- end -->`.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import os
import platform
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.pages import ROOT, fill

COMMANDS = {
    "features": "benchmarks.features DEMO",
    "linking": "benchmarks.linking",
    "notes": "benchmarks.notes",
    "pretrain": "benchmarks.pretrain",
    "metrics": "benchmarks.metrics",
    "fusion": "benchmarks.fusion FEATURES",
}
ROW = re.compile(r"^\| (?P<what>[^|]+) \| (?P<ours>[^|]+) \| (?P<reference>[^|]+) \| (?P<ratio>[\d.,]+ ?x) \|$", re.M)


def rows(printed: str, command: str) -> list[str]:
    """The rows `| what | ours | reference | ratio |` that a benchmark printed, with its command."""
    return [f"{found[0]} `./launch.sh python -m {command}` |" for found in ROW.finditer(printed)]


def machine() -> str:
    """The machine and the versions of the measurement."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file() and (found := re.search(r"model name\s*: (.+)", info.read_text())):
        cpu = found[1]
    packages = ("torch", "timm", "lightly", "duckdb", "scikit-learn", "pandas")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
    day = datetime.datetime.now(datetime.UTC).date()
    return f"{os.cpu_count()} x {cpu}, no GPU; Python {platform.python_version()}, {versions}; {day}."


def run(command: str, log: Path) -> str:
    """Run a benchmark and return its output. Raises: RuntimeError: it failed."""
    done = subprocess.run([sys.executable, "-m", *command.split()], cwd=ROOT, capture_output=True, text=True)
    log.write_text(done.stdout + done.stderr, encoding="utf-8")
    if done.returncode:
        raise RuntimeError(f"python -m {command}: exit code {done.returncode}\n{done.stderr[-1000:]}")
    return done.stdout


def features_of(demo: str, scratch: Path) -> str:
    """A features/ folder of the demo, for benchmarks that start from features."""
    out = scratch / "features"
    config = str(ROOT / "configs/demo/features.yaml")
    words = ["ehr_features", "build", config, f"mimic_iv={demo}", "mimic_cxr=null", "mimic_ed=null", f"out={out}"]
    subprocess.run([sys.executable, "-m", *words], cwd=ROOT, check=True, capture_output=True)
    return str(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("demo", metavar="DEMO", nargs="?", help="the open MIMIC-IV demo")
    parser.add_argument("--only", nargs="+", choices=list(COMMANDS), default=list(COMMANDS), metavar="NAME")
    parser.add_argument("--write", action="store_true", help="put the table into docs/speed.md")
    parser.add_argument("--logs", type=Path, default=Path("work/benchmarks"), help="what each printed")
    args = parser.parse_args()
    args.logs.mkdir(parents=True, exist_ok=True)
    lines = ["| what | ours | reference | ratio | command |", "|---" * 5 + "|"]
    with tempfile.TemporaryDirectory() as name:
        for what in args.only:
            typed = given = COMMANDS[what]
            if args.demo is None and typed.split()[-1].isupper():
                print(f"left out: {typed} needs the open MIMIC-IV demo", file=sys.stderr)
                continue
            given = given.replace(" DEMO", f" {args.demo}")
            if " FEATURES" in given:
                given = given.replace(" FEATURES", f" {features_of(args.demo, Path(name))}")
            print(f"python -m {given} ...", file=sys.stderr, flush=True)
            found = rows(run(given, args.logs / f"{what}.txt"), typed)
            lines += found or [f"| {what} | - | - | - | `./launch.sh python -m {typed}` |"]
    table = "\n".join([*lines, "", machine()])
    print(table)
    if args.write:
        path = ROOT / "docs/speed.md"
        path.write_text(fill(path.read_text(encoding="utf-8"), "benchmarks", table), encoding="utf-8")


if __name__ == "__main__":
    main()
