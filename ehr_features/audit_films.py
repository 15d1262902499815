"""The part of the audit that looks at films: when they were taken, and what their rows say of the past.

Comes in: the tables of a features/ folder and, where they are still those of the build, the raw tables.
"""

from __future__ import annotations

import ibis
import ibis.expr.types as ir
import numpy as np
import pandas as pd
import pyarrow as pa

from ehr_features import film_record, films, schema
from ehr_features.engine import hold
from ehr_features.source import Source
from ehr_features.verdict import Verdict, decide

SLACK_HOURS = 1e-6
TIMES = "films and stays stand at the times of the raw tables"
ENDED = "earlier admissions and their diagnoses had ended before the film"


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
    outside = (hours < -SLACK_HOURS) | (hours > at["los_hours"] + SLACK_HOURS)
    bad = {
        "films at another hour than they were taken": int((~near).sum()),
        "films from before or after their stay": int(outside.sum()),
        "films of another subject": int((at["subject_id"] != at["subject_id_stay"]).sum()),
    }
    return decide("films of stays stand at the hour they were taken", bad, f"{len(at)} films of stays")


def check_history(stays: pd.DataFrame, images: pd.DataFrame) -> Verdict:
    """What a film's row says of the past is of the past: arrivals, triage, earlier studies."""
    hours = [c for c in schema.IMAGES if c.startswith("hours_since_")]
    triage = [c for c, s in schema.IMAGES.items() if s.group == "ed_triage"]
    unborn = images["hours_since_ed_arrival"].isna() | (images["hours_since_ed_arrival"] < 0)
    began = images.groupby(["subject_id", "study_id"])["taken_at"].min()
    rank = began.groupby("subject_id").rank(method="min") - 1
    told = images.loc[unborn, triage].notna().any(axis=1)
    earlier = images.set_index(["subject_id", "study_id"])["num_prior_studies"]
    held = images.merge(stays[["stay_id", "intime", "outtime"]], on="stay_id")
    bad = {
        "films linked to an ICU stay that does not hold them": int(
            (~held["taken_at"].between(held["intime"], held["outtime"])).sum()
        ),
        "arrivals or studies from after the film": int((images[hours] < 0).any(axis=1).sum()),
        "films with the triage of a visit that had not begun": int(told.sum()),
        "films with more earlier studies than there are": int((earlier > rank.reindex(earlier.index)).sum()),
    }
    return decide("triage, arrivals and earlier studies are from before the film", bad, f"{len(images)} films")


def check_times(source: Source, stays: pd.DataFrame, images: pd.DataFrame) -> Verdict:
    """The times that everything else is measured by are those of the raw tables."""
    bad = {}
    raw = source.table("icustays").select("stay_id", "subject_id", "intime", "outtime")
    bad["stays of another time or subject than in icustays"] = _not_among(source, raw, stays)
    if source.has("cxr_metadata"):
        table = source.table("cxr_metadata")
        told = table.select("dicom_id", "subject_id", taken_at=films.timestamp(table.StudyDate, table.StudyTime))
        timed = images.dropna(subset="taken_at")
        bad["films of another time or subject than in the metadata"] = _not_among(source, told, timed)
    return decide(TIMES, bad, f"{len(stays)} stays, {len(images)} films")


def check_ended(source: Source, images: pd.DataFrame) -> Verdict:
    """What a film's row says of earlier admissions is of admissions that had ended."""
    columns = ["dicom_id", "subject_id", "taken_at", "age_years"]
    table = _held(source, images[columns].astype({"dicom_id": "string"}))
    again = film_record.earlier_admissions(source, table).to_pandas()
    both = images[["dicom_id", "num_prior_admissions", "prior_phenotypes"]].merge(again, on="dicom_id")
    more = both["num_prior_admissions_x"].fillna(0) > both["num_prior_admissions_y"].fillna(0)
    said, known = (both[f"prior_phenotypes_{side}"].fillna("").astype(str).str.split() for side in "xy")
    unknown = [not set(a) <= set(b) for a, b in zip(said, known, strict=True)]
    bad = {
        "films with more earlier admissions than had ended": int(more.sum()),
        "films with diagnoses of admissions that had not ended": int(np.sum(unknown)),
    }
    return decide(ENDED, bad, f"{int(both['num_prior_admissions_x'].notna().sum())} films with a record")


def _not_among(source: Source, raw: ir.Table, ours: pd.DataFrame) -> int:
    """How many rows have no equal row in a raw table, by its columns."""
    names = list(raw.columns)
    ours = ours[names].astype({n: "string" for n in names if n == "dicom_id"})
    found = raw.semi_join(_held(source, ours), names).distinct().count().execute()
    return len(ours) - int(found)


def _held(source: Source, frame: pd.DataFrame) -> ir.Table:
    times = {n: "datetime64[us]" for n in frame if pd.api.types.is_datetime64_any_dtype(frame[n])}
    table = pa.Table.from_pandas(frame.astype(times), preserve_index=False)
    return hold(source.con, ibis.util.gen_name("audited"), table)
