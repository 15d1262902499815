"""The audit of films: when they were taken, and whether their rows use only the past.

Input: the tables of a features/ folder and, if they are unchanged since the build, the raw tables.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd

from ehr_features import cohort, schema
from ehr_features.audit.verdict import Verdict, decide
from ehr_features.config import FeaturesConfig
from ehr_features.films import linking, record
from ehr_features.raw.source import Source

SLACK_HOURS = 1e-6
RECORD = "each film's row has only values that the raw tables held when it was taken"
STAYS = "stays equal the raw tables"


def check_films(stays: pd.DataFrame, images: pd.DataFrame, samples: dict[str, pd.DataFrame]) -> Verdict:
    """No sample has a film from after its prediction, or of another subject."""
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
    """The films of stays have their own hour, in their own stay."""
    at = stay_films.merge(images[["dicom_id", "subject_id", "taken_at"]], "left", "dicom_id")
    at = at.merge(stays[["stay_id", "subject_id", "intime", "los_hours"]], "left", "stay_id", suffixes=("", "_stay"))
    hours = (pd.to_datetime(at["taken_at"]) - pd.to_datetime(at["intime"])).dt.total_seconds() / 3600
    near = np.isclose(hours, at["hours_from_intime"], atol=1e-3)
    outside = (hours < -SLACK_HOURS) | (hours > at["los_hours"] + SLACK_HOURS)
    bad = {
        "films with another hour than that at which they were taken": int((~near).sum()),
        "films from before or after their stay": int(outside.sum()),
        "films of another subject": int((at["subject_id"] != at["subject_id_stay"]).sum()),
    }
    return decide("films of stays have the hour at which they were taken", bad, f"{len(at)} films of stays")


def check_history(stays: pd.DataFrame, images: pd.DataFrame) -> Verdict:
    """Arrivals, triage and earlier studies of a film are from before it."""
    hours = [c for c in schema.IMAGES if c.startswith("hours_since_")]
    triage = [c for c, s in schema.IMAGES.items() if s.group == "ed_triage"]
    unborn = images["hours_since_ed_arrival"].isna() | (images["hours_since_ed_arrival"] < 0)
    began = images.groupby(["subject_id", "study_id"])["taken_at"].min()
    rank = began.groupby("subject_id").rank(method="min") - 1
    told = images.loc[unborn, triage].notna().any(axis=1)
    earlier = images.set_index(["subject_id", "study_id"])["num_prior_studies"]
    held = images.merge(stays[["stay_id", "intime", "outtime"]], on="stay_id")
    bad = {
        "films linked to an ICU stay that does not contain them": int(
            (~held["taken_at"].between(held["intime"], held["outtime"])).sum()
        ),
        "arrivals or studies from after the film": int((images[hours] < 0).any(axis=1).sum()),
        "films with the triage of a visit that began later": int(told.sum()),
        "films with too many earlier studies": int((earlier > rank.reindex(earlier.index)).sum()),
    }
    return decide("triage, arrivals and earlier studies are from before the film", bad, f"{len(images)} films")


def check_record(source: Source, images: pd.DataFrame, config: FeaturesConfig) -> Verdict:
    """Each column of a film's row equals what the raw tables held when it was taken."""
    counted = cohort.Attrition()
    linked = linking.link_films(source, counted, preset=config.preset, ed_tolerance_hours=config.ed_tolerance_hours)
    told = record.add_record(source, linked).to_pandas()
    return _compared(RECORD, "films", images, told, "dicom_id", schema.IMAGES)


def check_stays(source: Source, stays: pd.DataFrame, config: FeaturesConfig) -> Verdict:
    """Each column of a stay's row equals the raw tables."""
    told = cohort.stays(source, config.preset, cohort.Attrition()).to_pandas()
    return _compared(STAYS, "stays", stays, told, "stay_id", schema.STAYS)


def _compared(
    claim: str, what: str, ours: pd.DataFrame, told: pd.DataFrame, key: str, columns: Mapping[str, schema.Column]
) -> Verdict:
    names = [name for name in columns if name not in ("split", key)]
    both = ours.merge(told[[key, *names]], "left", key, suffixes=("", "_told"), indicator="known")
    bad = {f"{what} that are not in the raw tables": int((both["known"] != "both").sum())}
    for name in names:
        one, other = both[name], both[f"{name}_told"]
        if columns[name].type in ("int64", "float64"):
            a, b = (pd.to_numeric(c).to_numpy("float64", na_value=np.nan) for c in (one, other))
            differ = int((~np.isclose(a, b, rtol=1e-9, atol=1e-6, equal_nan=True)).sum())
        else:
            differ = int(((one != other).fillna(True) & ~(one.isna() & other.isna())).sum())
        bad[f"{what} whose {name} differs from the raw tables"] = differ
    return decide(claim, bad, f"{len(names)} columns of {len(ours)} {what}")
