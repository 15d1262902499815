"""Time and memory of linking every film of MIMIC-CXR to admissions, ICU stays and emergency stays.

./launch.sh python -m benchmarks.linking [--films 377110] [--scratch FOLDER] [--json FILE]

Random tables of the real sizes (MIMIC-IV 3.1, MIMIC-IV-ED 2.2, MIMIC-CXR 2.1.0) are written as csv.gz, opened like a
user's, and linked in a process of their own; reading, parsing and checking them is counted apart. `linking` finds the
interval of each film, of each kind; `whole` is `link_films`: it reads and checks the films, links them, names
admissions by stays and visits, and lists which films have no link, and why. Reference: a merge on subject_id and a
filter in pandas, on the same files; the published notebooks loop over the films and take about 12 minutes for
admissions and ICU stays.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

SIZES = {"patients": 364_627, "admissions": 546_028, "icustays": 94_458, "edstays": 425_087, "films": 377_110}
FILM_SUBJECTS = 65_379
LOOPS_SECONDS = 750  # the published notebooks, 8 min and 4.5 min by their own output
WHERE = {"patients": "iv/hosp", "admissions": "iv/hosp", "icustays": "iv/icu", "edstays": "ed/ed", "triage": "ed/ed"}
FIRST = pd.Timestamp("2150-01-01")


def times(hours: np.ndarray) -> np.ndarray:
    """Hours since the first day -> timestamps, to the second."""
    return (FIRST + pd.to_timedelta((hours * 3600).astype("int64"), unit="s")).to_numpy()


def draw(rng: np.random.Generator, num_films: int) -> dict[str, pd.DataFrame]:
    """Tables of the real sizes; half of the films are taken during an admission."""
    share = num_films / SIZES["films"]
    n = {name: max(int(size * share), 10) for name, size in SIZES.items()}
    subjects = 10_000_000 + rng.permutation(9_000_000)[: n["patients"]]
    seen = subjects[: max(int(FILM_SUBJECTS * share), 5)]
    patients = pd.DataFrame({"subject_id": subjects, "gender": rng.choice(["F", "M"], len(subjects))})
    patients = patients.assign(anchor_age=rng.integers(18, 90, len(subjects)), anchor_year=2150)
    patients = patients.assign(anchor_year_group="2011 - 2013", dod=None)

    def spans(count: int, mean_hours: float) -> pd.DataFrame:
        begin, long = rng.uniform(0, 60_000, count), rng.exponential(mean_hours, count)
        return pd.DataFrame({"subject_id": rng.choice(subjects, count), "begin": begin, "end": begin + long})

    admissions, visits = spans(n["admissions"], 110), spans(n["edstays"], 8)
    admissions["hadm_id"] = 20_000_000 + np.arange(len(admissions))
    stays = admissions.sample(n["icustays"], random_state=0)
    stays = stays.assign(end=stays["begin"] + (stays["end"] - stays["begin"]) / 2, stay_id=np.arange(len(stays)))
    inside = admissions[admissions["subject_id"].isin(seen)].sample(num_films // 2, replace=True, random_state=0)
    at = rng.uniform(inside["begin"], inside["end"])
    at = np.concatenate([at, rng.uniform(0, 60_000, num_films - len(inside))])
    who = np.concatenate([inside["subject_id"], rng.choice(seen, num_films - len(inside))])
    taken = pd.DatetimeIndex(times(at))
    films = pd.DataFrame({"dicom_id": [f"{i:044x}" for i in range(num_films)], "subject_id": who})
    films = films.assign(study_id=50_000_000 + np.arange(num_films), StudyDate=taken.strftime("%Y%m%d"))
    films = films.assign(
        StudyTime=taken.strftime("%H%M%S").astype(float), ViewPosition=rng.choice(["AP", "PA"], num_films)
    )
    films = films.assign(ViewCodeSequence_CodeMeaning=None, PatientOrientationCodeSequence_CodeMeaning="Erect")
    admissions = admissions.assign(admittime=times(admissions["begin"]), dischtime=times(admissions["end"]))
    admissions = admissions.assign(deathtime=None, race="", edregtime=None, edouttime=None, hospital_expire_flag=0)
    stays = stays.assign(intime=times(stays["begin"]), outtime=times(stays["end"]), los=1.0)
    stays = stays.assign(first_careunit="", last_careunit="")
    visits = visits.assign(intime=times(visits["begin"]), outtime=times(visits["end"]), hadm_id=None)
    visits["stay_id"] = 30_000_000 + np.arange(len(visits))
    triage = visits[["subject_id", "stay_id"]].assign(temperature=98.6, heartrate=80, resprate=16, o2sat=98)
    triage = triage.assign(sbp=120, dbp=80, pain="0", acuity=3, chiefcomplaint="COUGH")
    frames = {"patients": patients, "admissions": admissions, "icustays": stays, "edstays": visits, "triage": triage}
    return {name: f.drop(columns=["begin", "end"], errors="ignore") for name, f in frames.items()} | {"films": films}


def link(folder: Path) -> None:
    """Link as `build` does, and print the seconds."""
    from ehr_features.cohort import Attrition
    from ehr_features.config import FeaturesConfig
    from ehr_features.films import linking, record
    from ehr_features.raw.source import open_source

    roots = {f"mimic_{name}": str(folder / name) for name in ("iv", "cxr", "ed")}
    source = open_source(FeaturesConfig(**roots, out=folder / "out", memory="2GB"))
    began = time.monotonic()
    for name in ("cxr_metadata", *WHERE):  # parsed once, and kept
        source.table(name)
    films = linking.read_films(source, Attrition(), "default")
    read = time.monotonic()
    linking.find_intervals(source, films, linking.intervals(source), 6.0)
    found = time.monotonic()
    attrition = Attrition()
    films = linking.link_films(source, attrition)
    linked = time.monotonic()
    record.add_record(source, films)
    seconds = {"reading": read - began, "linking": found - read, "whole": linked - found}
    seconds["record"] = time.monotonic() - linked
    print(json.dumps({"seconds": seconds, "counts": attrition.counts["linking"]}))


def pandas_link(folder: Path) -> None:
    """The reference: merge, filter, keep the last that began; without record columns."""
    began = time.monotonic()
    films = pd.read_csv(folder / "cxr" / "mimic-cxr-2.0.0-metadata.csv.gz", dtype={"StudyDate": str})
    clock = films["StudyTime"].astype(int).astype(str).str.zfill(6)
    films["at"] = pd.to_datetime(films["StudyDate"] + clock, format="%Y%m%d%H%M%S")
    counts = {}
    spans: dict[str, tuple[str, str, str, int]] = {
        "hadm_id": ("admissions", "admittime", "dischtime", 0),
        "stay_id": ("icustays", "intime", "outtime", 0),
    }
    spans["ed_stay_id"] = ("edstays", "intime", "outtime", 6)
    tables = {
        name: pd.read_csv(folder / WHERE[name] / f"{name}.csv.gz", parse_dates=[start, end])
        for name, start, end, _hours in spans.values()
    }
    read = time.monotonic()
    for key, (name, start, end, hours) in spans.items():
        pairs = films[["dicom_id", "subject_id", "at"]].merge(tables[name], on="subject_id")
        margin = pd.Timedelta(hours=hours)
        near = pairs[(pairs["at"] >= pairs[start] - margin) & (pairs["at"] <= pairs[end] + margin)]
        counts[f"{key}_linked"] = int(near.sort_values(start).drop_duplicates("dicom_id", keep="last")["dicom_id"].size)
    seconds = {"reading": read - began, "linking": time.monotonic() - read}
    print(json.dumps({"seconds": seconds, "counts": counts}))


def timed(what: str, folder: Path) -> dict[str, Any]:
    """Run one of the two in its own process; adds its peak memory."""
    command = [sys.executable, __file__, "--run", what, "--scratch", str(folder)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    said = process.stdout.read() if process.stdout else ""
    _pid, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{what} failed with status {status}")
    cpu = round(usage.ru_utime + usage.ru_stime, 1)
    return json.loads(said.splitlines()[-1]) | {"cpu": cpu, "peak_mb": round(usage.ru_maxrss / 1024)}


def table(results: dict[str, dict[str, Any]], num_films: int) -> list[str]:
    """The results as rows of Markdown; a ratio above 1 means that ours needs less."""
    ours, theirs = results["link"]["seconds"], results["pandas_link"]["seconds"]["linking"]
    both = ours["whole"] + ours["record"]
    rows = [
        f"| {num_films:,d} films to admissions, ICU stays and emergency visits, s | {ours['linking']:.2f} "
        f"| pandas {theirs:.2f} | {theirs / ours['linking']:.1f}x |"
    ]
    if num_films == SIZES["films"]:
        rows.append(
            f"| the same, films checked, links explained, and the record's columns, s | {both:.1f} "
            f"| published loops, admissions and ICU stays alone "
            f"{LOOPS_SECONDS} | {LOOPS_SECONDS / both:.1f}x |"
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--films", type=int, default=SIZES["films"], help="other tables shrink in proportion")
    parser.add_argument("--scratch", type=Path, default=None, help="folder for the tables (kept)")
    parser.add_argument("--json", type=Path, default=None, help="also write the numbers to this file")
    parser.add_argument("--run", choices=["link", "pandas_link"], default=None, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        return {"link": link, "pandas_link": pandas_link}[args.run](args.scratch)
    folder = args.scratch or Path(tempfile.mkdtemp(prefix="linking-benchmark-"))
    if not (folder / "cxr").is_dir():
        print(f"writing tables for {args.films:,d} films ...", flush=True)
        for name, frame in draw(np.random.default_rng(0), args.films).items():
            path = folder / ("cxr/mimic-cxr-2.0.0-metadata" if name == "films" else f"{WHERE[name]}/{name}")
            path.parent.mkdir(parents=True, exist_ok=True)
            frame.to_csv(
                path.with_name(path.name + ".csv.gz"), index=False, compression={"method": "gzip", "compresslevel": 1}
            )
    results = {name: timed(name, folder) for name in ("link", "pandas_link")}
    for name, result in results.items():
        steps = ", ".join(f"{step} {seconds:.1f} s" for step, seconds in result["seconds"].items())
        counts = {k: v for k, v in result["counts"].items() if k.endswith("_linked")}
        print(f"{name:12} {steps} ({result['cpu']} s of CPU in all); {result['peak_mb']} MB; {counts}")
    print("\n".join(table(results, args.films)))
    if args.json:
        args.json.write_text(json.dumps(results, indent=2) + "\n")
    if args.scratch is None:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
