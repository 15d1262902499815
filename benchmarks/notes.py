"""Notes per second on a synthetic hospital multiplied k-fold, from csv.gz.

    ./launch.sh python -m benchmarks.notes [--k 70] [--subjects 800] [--reference 300] [--scratch FOLDER] [--json FILE]

The hospital of `ehr-msn hospital` is copied k times with other ids; `ehr-msn notes` then runs
in its own process, including start-up and reading. Reference: the method of the published pipeline, one film after the
other in pandas: rows are selected by comparing a whole column, text is built in Python, and sentences that name a
finding are dropped; reading is not counted. A second reference selects rows by a prepared index. Both write the notes
of the first films from the same tables; the output says how many equal ours byte for byte before any filter.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import duckdb
import pandas as pd

from benchmarks.features import APART, IDS
from ehr_features.films.record import TRIAGE
from ehr_features.notes import facts as notes_words
from ehr_features.notes import leak_filter

TABLES = {"admissions": "iv/hosp", "diagnoses_icd": "iv/hosp", "edstays": "ed/ed", "triage": "ed/ed"}
TABLES |= {"vitalsign": "ed/ed", "medrecon": "ed/ed", "pyxis": "ed/ed"}
RAW = {"iv/hosp": "mimic-iv/hosp", "ed/ed": "mimic-iv-ed/ed"}
KEPT = {"d_icd_diagnoses": "iv/hosp"}
SIGNS = {"heartrate": "heart_rate", "resprate": "resp_rate", "o2sat": "o2sat", "sbp": "sbp", "dbp": "dbp"}
WORDS = {"heartrate": "heart rate {} per minute", "resprate": "respiratory rate {} per minute"}
WORDS |= {"o2sat": "oxygen saturation {}%"}


def command(*words: str) -> None:
    subprocess.run([sys.executable, "-m", *words], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def hospital(folder: Path, subjects: int) -> None:
    """The demo's tables and features."""
    raw = folder / "raw"
    size = ["--subjects", str(subjects), "--seed", "1", "--film-size", "32", "--leak", "0.2"]
    command("ehr_features", "demo", str(raw), *size)
    roots = [f"mimic_{key}={raw / f'mimic-{name}'}" for key, name in (("iv", "iv"), ("ed", "iv-ed"), ("cxr", "cxr"))]
    config = folder / "features.yaml"
    config.write_text("tasks: [mortality]\nmemory: 1GB\n")
    command("ehr_features", "build", str(config), *roots, f"out={folder / 'once'}")


def enlarge(folder: Path, k: int) -> None:
    """Write k copies of the tables that notes read and of the films of features/, with other ids."""
    con = duckdb.connect()

    def select(source: str, **instead: str) -> str:
        columns = [row[0] for row in con.execute(f"DESCRIBE SELECT * FROM {source}").fetchall()]
        ids = {c: f"CAST({c} AS BIGINT) + i * {APART}" for c in (*IDS, "ed_stay_id")} | instead
        parts = ", ".join(f'{ids.get(c, chr(34) + c + chr(34))} AS "{c}"' for c in columns)
        return f"SELECT {parts} FROM {source}, range({k}) AS copies(i)"

    for name, place in TABLES.items():
        at = folder / "raw" / RAW[place] / f"{name}.csv.gz"
        target = folder / place / f"{name}.csv.gz"
        target.parent.mkdir(parents=True, exist_ok=True)
        source = f"read_csv('{at}', all_varchar=true, header=true)"
        con.execute(f"COPY ({select(source)}) TO '{target}' (HEADER, COMPRESSION gzip)")
    for name, place in KEPT.items():
        shutil.copy(folder / "raw/mimic-iv/hosp" / f"{name}.csv.gz", folder / place)
    features = folder / "features"
    features.mkdir(exist_ok=True)
    shutil.copy(folder / "once/provenance.json", features)
    source = f"'{folder / 'once/images.parquet'}'"
    films = select(source, dicom_id="dicom_id || '-' || i")
    con.execute(f"COPY ({films}) TO '{features / 'images.parquet'}' (FORMAT parquet)")


def ours(folder: Path) -> dict[str, float]:
    """Run the command. Returns: films, notes, wall seconds, peak resident memory in MB."""
    out, config = folder / "notes", folder / "notes.yaml"
    for old in (out, out.with_name("notes.cache")):
        shutil.rmtree(old, ignore_errors=True)
    keys = {"features": folder / "features", "mimic_iv": folder / "iv", "mimic_ed": folder / "ed", "out": out}
    config.write_text("".join(f"{key}: {value}\n" for key, value in keys.items()) + "memory: 2GB\nthreads: 2\n")
    begun = time.monotonic()
    process = subprocess.Popen([sys.executable, "-m", "ehr_features", "notes", str(config)], stdout=subprocess.DEVNULL)
    _pid, status, usage = os.wait4(process.pid, 0)
    seconds = time.monotonic() - begun
    process.returncode = os.waitstatus_to_exitcode(status)
    if status:
        raise SystemExit(f"the command failed with status {status}")
    written = json.loads((out / "provenance.json").read_text())["rows_written"]["notes"]
    return {"notes": written, "seconds": round(seconds, 2), "peak_mb": round(usage.ru_maxrss / 1024)}


class Reference:
    """Notes film by film, from tables in memory.

    Args:
        indexed: select rows by an index; else by comparing the column, as published.
    """

    KEYS = ("subject_id", "hadm_id", "stay_id")

    def __init__(self, folder: Path, indexed: bool) -> None:
        text = {"icd_code": str, "pain": str}
        times = {"admissions": ["admittime", "dischtime", "edregtime", "deathtime"], "edstays": ["intime", "outtime"]}
        read = {
            name: pd.read_csv(
                folder / place / f"{name}.csv.gz", dtype=text,
                parse_dates=times.get(name, ["charttime"] if name in ("vitalsign", "medrecon", "pyxis") else []),
            )
            for name, place in (TABLES | KEPT).items()
        }  # fmt: skip
        titles = read.pop("d_icd_diagnoses")
        titles["title"] = titles["long_title"].str.replace(r"\s+", " ", regex=True).str.replace(";", ",").str.strip()
        coded = read["diagnoses_icd"].merge(titles, on=["icd_code", "icd_version"])
        last = read["edstays"].groupby("hadm_id")["outtime"].max()  # the multiplied tables have no ICU stays
        came = read["admissions"]
        came = came[came["dischtime"] >= came["admittime"]]  # others are never history
        ends = pd.DataFrame({"a": came["dischtime"], "b": came["deathtime"], "c": came["hadm_id"].map(last)})
        came = read["admissions"].assign(over_at=ends.max(axis=1))
        self.tables = read | {"diagnoses_icd": coded, "admissions": came}
        self.groups: dict[tuple[str, str], dict[Any, Any]] = {}
        if indexed:
            wanted = [("edstays", "stay_id"), ("edstays", "hadm_id"), ("admissions", "hadm_id")]
            wanted += [("admissions", "subject_id"), ("diagnoses_icd", "hadm_id")]
            wanted += [(name, "stay_id") for name in ("triage", "vitalsign", "medrecon", "pyxis")]
            self.groups = {(name, key): self.tables[name].groupby(key).indices for name, key in wanted}
        self.abbreviations = notes_words.read_abbreviations(None)
        self.expander = notes_words.expander(self.abbreviations)
        leaks = leak_filter.read("standard")
        assert leaks is not None
        self.leak = re.compile(leaks.any_term)

    def rows(self, name: str, key: str, value: Any) -> pd.DataFrame:
        """Rows of a table with a key."""
        table = self.tables[name]
        if not self.groups:
            return table[table[key] == value]
        return table.iloc[self.groups[name, key].get(value, [])]

    def note(self, film: Any) -> tuple[str, str]:
        """The note before and after the filter."""
        at, lines = film.taken_at, []
        sex = {"M": "male", "F": "female"}.get(film.sex)
        age = None if pd.isna(film.age_years) else f"{film.age_years:.0f}"
        age = f"over {min(int(film.age_years) - 2, 89)}" if film.age_capped is True else age
        lines.append("Patient: " + ", ".join(filter(None, [age and f"{age} years old", sex])) + ".")
        visit = self.rows("edstays", "stay_id", film.ed_stay_id)
        visit = visit[visit["intime"] <= at]
        if visit.empty:
            visit = self.rows("edstays", "hadm_id", film.hadm_id)
            visit = visit[visit["intime"] <= at].sort_values("intime")
        came = self.rows("admissions", "hadm_id", film.hadm_id)
        lines.append(self.arrival(at, visit, came))
        if len(visit):
            lines += self.visit(at, visit["stay_id"].iloc[-1])
        lines.append(self.history(at, film.subject_id))
        note = "\n".join(filter(None, lines))
        sentences = re.split(r"(?<=\.)\s", note)
        return note, " ".join(s for s in sentences if not self.leak.search(s))

    @staticmethod
    def arrival(at: pd.Timestamp, visit: pd.DataFrame, came: pd.DataFrame) -> str:
        said, arrived = [], None
        if len(visit):
            arrived, how = visit["intime"].iloc[-1], visit["arrival_transport"].iloc[-1]
            said = [how.lower()] if isinstance(how, str) and how != "UNKNOWN" else []
        elif len(came) and came["edregtime"].iloc[0] <= at:
            arrived = came["edregtime"].iloc[0]
        said += [f"{(at - arrived).total_seconds() / 3600:.1f} hours ago"] if arrived is not None else []
        text = f"Emergency department arrival: {', '.join(said)}." if said else ""
        if len(came) and came["admittime"].iloc[0] <= at:
            hours = (at - came["admittime"].iloc[0]).total_seconds() / 3600
            text = f"{text} Hospital admission: {hours:.1f} hours ago.".strip()
        return text

    @staticmethod
    def signs(row: dict[str, Any]) -> list[str]:
        """The plausible vital signs in words."""
        charted = row["temperature"]
        said, celsius = [], charted if charted <= 50 else (charted - 32) / 1.8
        low, high = TRIAGE["ed_temperature_c"][1:]
        if low <= celsius <= high:
            said.append(f"temperature {celsius:.1f} C")
        seen = {}
        for column, name in SIGNS.items():
            low, high = TRIAGE[f"ed_{name}"][1:]
            if low <= row[column] <= high:
                seen[column] = f"{row[column]:.0f}"
        said += [WORDS[c].format(seen[c]) for c in WORDS if c in seen]
        if pressure := "/".join(seen[c] for c in ("sbp", "dbp") if c in seen):
            alone = "" if "/" in pressure else "systolic " if "sbp" in seen else "diastolic "
            said.append(f"blood pressure {alone}{pressure} mmHg")
        return said

    def visit(self, at: pd.Timestamp, stay: int) -> list[str]:
        """Lines on a visit."""
        lines, first = [], self.rows("triage", "stay_id", stay)
        if len(first):
            row = first.iloc[0].to_dict()
            words = row["chiefcomplaint"]
            words = notes_words.complaint(words, self.abbreviations, self.expander) if isinstance(words, str) else None
            lines.append(f"Chief complaint: {words}." if words else "")
            said = [f"acuity {row['acuity']:.0f} of 5"] if 1 <= row["acuity"] <= 5 else []
            said += self.signs(row)
            said += [f"pain {row['pain']} of 10"] if str(row["pain"]).isdigit() and int(row["pain"]) <= 10 else []
            lines.append(f"Triage: {', '.join(said)}." if said else "")
        later = self.rows("vitalsign", "stay_id", stay)
        later = later[later["charttime"] <= at].sort_values("charttime")
        last: dict[str, Any] = {}
        when = None
        for row in later.to_dict("records"):
            for column in ("temperature", *SIGNS):
                alone = {c: row[c] if c == column else float("nan") for c in ("temperature", *SIGNS)}
                if self.signs(alone):
                    last[column], when = row[column], row["charttime"]
        if last:
            said = self.signs({c: last.get(c, float("nan")) for c in ("temperature", *SIGNS)})
            hours = (at - when).total_seconds() / 3600
            lines.append(f"Latest vital signs, {hours:.1f} hours ago: {', '.join(said)}.")
        for name, label in (("pyxis", "Given in the emergency department"), ("medrecon", "Home medication")):
            rows = self.rows(name, "stay_id", stay)
            names = sorted(set(rows.loc[rows["charttime"] <= at, "name"].dropna()), key=str.lower)
            lines.append(f"{label}: {'; '.join(names)}." if names else "")
        return lines

    def history(self, at: pd.Timestamp, subject: int) -> str:
        """Earlier admissions and their diagnoses."""
        ended = self.rows("admissions", "subject_id", subject)
        ended = ended[ended["over_at"] < at].sort_values("over_at", ascending=False)
        if ended.empty:
            return ""
        titles: list[str] = []
        for admission in ended["hadm_id"]:
            coded = self.rows("diagnoses_icd", "hadm_id", admission).sort_values("seq_num")
            titles += [title for title in coded["title"] if title not in titles]
        text = f"Earlier admissions: {len(ended)}."
        return f"{text} Diagnoses of earlier admissions: {'; '.join(titles)}." if titles else text


def reference(folder: Path, films: pd.DataFrame, indexed: bool) -> tuple[float, list[str]]:
    """Seconds for the notes of some films, and the notes before the filter."""
    way = Reference(folder, indexed)
    begun = time.monotonic()
    notes = [way.note(film)[0] for film in films.itertuples()]
    return time.monotonic() - begun, notes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--k", type=int, default=70, help="copies of the hospital; default %(default)s")
    parser.add_argument("--subjects", type=int, default=800, help="of one copy; default %(default)s")
    parser.add_argument("--reference", type=int, default=300, metavar="N", help="films of the references")
    parser.add_argument("--scratch", type=Path, default=None, help="folder for the tables (kept)")
    parser.add_argument("--json", type=Path, default=None, help="also write the numbers to this file")
    args = parser.parse_args()
    folder = args.scratch or Path(tempfile.mkdtemp(prefix="notes-benchmark-"))
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "once").is_dir():
        hospital(folder, args.subjects)
    enlarge(folder, args.k)
    found = ours(folder)
    written = pd.read_parquet(folder / "notes/unfiltered.parquet").iloc[: args.reference]
    films = pd.read_parquet(folder / "features/images.parquet").set_index("dicom_id", drop=False)
    films = films.loc[written["dicom_id"]]
    visits = len(pd.read_csv(folder / "ed/ed/edstays.csv.gz", usecols=["stay_id"]))
    rate = found["notes"] / found["seconds"]
    print(f"{found['notes']:,.0f} notes of {visits:,} visits in {found['seconds']:.1f} s, {found['peak_mb']} MB")
    if found["notes"] < 1e6:
        print(f"extrapolated in proportion, not measured: a million notes in {1e6 / rate / 60:.1f} minutes")
    print("\n| what | ours | reference | ratio |\n|---|---|---|---|")
    says: dict[bool, Callable[[float], str]] = {
        False: lambda r: f"pandas film by film, columns compared (as published) {r:,.1f}",
        True: lambda r: f"pandas film by film, rows by an index {r:,.1f}",
    }
    same = {}
    for indexed, says_rate in says.items():
        seconds, notes = reference(folder, films, indexed)
        slow = len(notes) / seconds
        same["indexed" if indexed else "compared"] = sum(
            a == b for a, b in zip(notes, written["note"], strict=True)
        ) / len(notes)
        print(f"| notes a second, {visits:,} visits | {rate:,.0f} | {says_rate(slow)} | {rate / slow:,.1f}x |")
    print(
        "\nthe references' notes that equal ours byte for byte: " + ", ".join(f"{n} {s:.1%}" for n, s in same.items())
    )
    if args.json:
        args.json.write_text(json.dumps(found | {"rate": rate, "same": same}, indent=2) + "\n")
    if args.scratch is None:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
