"""`python -m ehr_features audit FEATURES [RUN | NOTES ...]`: does anything leak? Proved or refuted, with counts.

Comes in: a features/ folder and the runs and notes that were made from it; or notes alone, which name their features.
Goes out: a line for each claim, `proved`, `refuted` or `cannot be proved`, and for notes how much of each finding they
tell. Exit 0 if all are proved, 2 otherwise.

Splits, film times, inputs and runs are checked on what was written, the series against the raw events
(audit_series.py).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pandas as pd

from ehr_features import schema
from ehr_features.audit_runs import check_runs
from ehr_features.audit_series import check_series
from ehr_features.files import read_json, read_table
from ehr_features.notes_audit import audit_notes, is_notes, split_folders
from ehr_features.splits import SPLITS
from ehr_features.verdict import PROVED, UNKNOWN, Verdict, decide

LABEL_GROUPS = ("finding", "phenotype", "outcome")
ORDER = ("study", "admission", "discharge")
SLACK_HOURS = 1e-6


def run(args: argparse.Namespace) -> int:
    """Print a verdict for each claim. Returns 0 if all are proved, else 2."""
    features, runs, notes = split_folders([args.features, *args.runs])
    verdicts = [] if is_notes(args.features) and not runs else audit(features, runs)
    tables = []
    for folder in notes:
        found, lines = audit_notes(folder, features)
        verdicts += found
        tables += [f"{folder}: {lines[0]}", *lines[1:]] if lines else []
    width = max(len(v.outcome) for v in verdicts)
    for verdict in verdicts:
        print(f"{verdict.outcome:{width}}  {verdict.claim}: {verdict.counts}")
    if tables:
        print("\n".join(["", *tables, ""]))
    bad = [v for v in verdicts if v.outcome != PROVED]
    if not bad:
        print(f"{args.features}: all {len(verdicts)} claims are proved")
        return 0
    open_ = sum(v.outcome == UNKNOWN for v in bad)
    print(f"{args.features}: {len(bad) - open_} claims refuted, {open_} cannot be proved, of {len(verdicts)}")
    return 2


def audit(features: Path, runs: list[Path]) -> list[Verdict]:
    """Check every claim. Raises: UserError: no features folder, or no run folder."""
    stays = read_table(features, "stays")
    films = (features / "images.parquet").is_file()
    images = read_table(features, "images") if films else _no_images()
    samples = {p.stem: read_table(features, f"samples/{p.stem}") for p in sorted(features.glob("samples/*.parquet"))}
    subjects = pd.concat([t[["subject_id", "split"]] for t in (stays, images, *samples.values())])
    verdicts = [check_splits({"stays": stays, "images": images, **{f"samples/{n}": t for n, t in samples.items()}})]
    verdicts.append(check_films(stays, images, samples))
    if films:
        verdicts.append(check_stay_films(stays, images, read_table(features, "stay_films")))
        verdicts.append(check_history(images))
    verdicts += check_series(features, stays)
    verdicts.append(check_inputs(features))
    return verdicts + check_runs(runs, subjects.drop_duplicates())


def _no_images() -> pd.DataFrame:
    types = {"string": "str", "timestamp": "datetime64[us]"}
    return pd.DataFrame({c: pd.Series(dtype=types.get(s.type, s.type)) for c, s in schema.IMAGES.items()})


def check_splits(tables: dict[str, pd.DataFrame]) -> Verdict:
    """No subject in two splits, in all tables together."""
    both = pd.concat([t[["subject_id", "split"]] for t in tables.values()]).drop_duplicates()
    bad = {
        "subjects in two splits": int(both["subject_id"].duplicated().sum()),
        "subjects in no split": int((~both["split"].isin(SPLITS)).sum()),
    }
    sizes = " / ".join(f"{(both['split'] == s).sum()} {s}" for s in SPLITS)
    proof = f"{both['subject_id'].nunique()} subjects in {len(tables)} tables, {sizes}"
    return decide("no subject is in two splits", bad, proof)


def check_films(stays: pd.DataFrame, images: pd.DataFrame, samples: dict[str, pd.DataFrame]) -> Verdict:
    """No sample has a film from after its prediction, or of somebody else."""
    timed = [t[t["predict_at_hours"].notna()].assign(task=name) for name, t in samples.items()]
    all_ = pd.concat(timed) if timed else pd.DataFrame(columns=["task", *schema.SAMPLES])
    paired = all_[all_["dicom_id"].notna()]
    at = paired.merge(images[["dicom_id", "subject_id", "taken_at"]], "left", "dicom_id", suffixes=("", "_film"))
    at = at.merge(stays[["stay_id", "subject_id", "intime", "outtime"]], "left", "stay_id", suffixes=("", "_stay"))
    hours = (pd.to_datetime(at["taken_at"]) - pd.to_datetime(at["intime"])).dt.total_seconds() / 3600
    bad = {
        "films from after their sample's prediction": int((hours > at["predict_at_hours"] + SLACK_HOURS).sum()),
        "films from before their stay": int((hours < -SLACK_HOURS).sum()),
        "films of another subject": int((at["subject_id_film"] != at["subject_id"]).sum()),
        "samples of another subject's stay": int((at["subject_id_stay"] != at["subject_id"]).sum()),
        "films without a time": int(hours.isna().sum()),
    }
    proof = f"{len(all_)} samples of {len(timed)} tasks, {len(paired)} with a film"
    return decide("no film is from after its sample's prediction", bad, proof)


def check_stay_films(stays: pd.DataFrame, images: pd.DataFrame, stay_films: pd.DataFrame) -> Verdict:
    """The films of stays stand at their own hour, in their own stay."""
    at = stay_films.merge(images[["dicom_id", "subject_id", "taken_at"]], "left", "dicom_id")
    at = at.merge(stays[["stay_id", "subject_id", "intime", "los_hours"]], "left", "stay_id", suffixes=("", "_stay"))
    hours = (pd.to_datetime(at["taken_at"]) - pd.to_datetime(at["intime"])).dt.total_seconds() / 3600
    near = np.isclose(hours, at["hours_from_intime"], atol=1e-3)
    bad = {
        "films at another hour than they were taken": int((~near).sum()),
        "films of another subject": int((at["subject_id"] != at["subject_id_stay"]).sum()),
    }
    return decide("films of stays stand at the hour they were taken", bad, f"{len(at)} films of stays")


def check_history(images: pd.DataFrame) -> Verdict:
    """What a film's row says of the past is of the past: arrivals, triage, earlier studies."""
    hours = [c for c in schema.IMAGES if c.startswith("hours_since_")]
    triage = [c for c, s in schema.IMAGES.items() if s.group == "ed_triage"]
    unborn = images["hours_since_ed_arrival"].isna() | (images["hours_since_ed_arrival"] < 0)
    began = images.groupby(["subject_id", "study_id"])["taken_at"].min()
    rank = began.groupby("subject_id").rank(method="min") - 1
    told = images.loc[unborn, triage].notna().any(axis=1)
    earlier = images.set_index(["subject_id", "study_id"])["num_prior_studies"]
    bad = {
        "arrivals or studies from after the film": int((images[hours] < 0).any(axis=1).sum()),
        "films with the triage of a visit that had not begun": int(told.sum()),
        "films with more earlier studies than there are": int((earlier > rank.reindex(earlier.index)).sum()),
    }
    return decide("triage, arrivals and earlier studies are from before the film", bad, f"{len(images)} films")


def check_inputs(features: Path) -> Verdict:
    """No label among the columns that models read, and no column said to be known earlier than it is."""
    described = read_json(features / "schema.json")
    ours = {"stays": schema.STAYS, "images": schema.IMAGES, "stay_films": schema.STAY_FILMS}
    early = unknown = columns = 0
    labels = set(schema.FINDINGS)
    for table, said in described.items():
        known = ours.get(table, schema.SAMPLES)
        columns += len(said)
        labels |= {c for c, about in said.items() if about["group"] in LABEL_GROUPS}
        for name, about in said.items():
            if name in known:
                early += ORDER.index(about["available_at"]) < ORDER.index(known[name].available_at)
            else:  # a label of a task
                unknown += about["group"] not in LABEL_GROUPS
    series = read_json(features / "series.json")["columns"]
    bad = {
        "labels among the columns of the series": len(labels & {c.removeprefix("mask->") for c in series}),
        "columns said to be known earlier than they are": int(early),
        "columns of samples that are neither keys nor labels": int(unknown),
    }
    late = {c for said in described.values() for c, about in said.items() if about["available_at"] == "discharge"}
    listed = ", ".join(sorted(late - labels))
    proof = f"{len(series)} series columns, {columns} table columns; known at discharge: {listed}"
    return decide("no finding, phenotype or outcome is among the inputs", bad, proof)
