"""When each film is taken and what it shows: studies in ICU stays, in emergency visits, and elsewhere."""

from __future__ import annotations

import numpy as np
import pandas as pd

from ehr_features.demo_plan import Plan, age_and_sex, hours_between
from ehr_features.demo_truth import FILM, NAMES, Array, draw_film


def draw_studies(
    rng: np.random.Generator,
    plan: Plan,
    subjects: pd.DataFrame,
    stays: pd.DataFrame,
    visits: pd.DataFrame,
    film: Array,
) -> pd.DataFrame:
    """A row per study: subject, time, view, and the latents `x_NAME` of what its films show."""
    with_films = subjects.set_index("subject_id")["has_films"]
    parts = [_icu_studies(rng, plan, stays[stays["subject_id"].map(with_films)], film)]
    pinned = subjects.set_index("subject_id")
    seen = visits[
        visits["subject_id"].map(with_films) & (rng.random(len(visits)) < np.where(visits["admission"] < 0, 0.9, 0.45))
    ]
    hours = rng.uniform(0.3, 1.0, len(seen)) * hours_between(seen["outtime"], seen["intime"])
    emergency = seen[["subject_id", "ed_stay_id"]].assign(
        time=seen["intime"] + pd.to_timedelta(np.round(hours * 3600), "s")
    )
    clinic = subjects[subjects["has_films"] & ((subjects["kind"] == "film") | (rng.random(len(subjects)) < 0.12))]
    clinic = pd.concat([clinic, clinic[rng.random(len(clinic)) < 0.3]])
    start = pd.to_datetime((clinic["anchor_year"] - 2).astype(str) + "-06-01") + pd.to_timedelta(
        rng.integers(0, 200 * 86400, len(clinic)), "s"
    )
    outside = pd.concat([emergency, clinic[["subject_id"]].assign(time=start)], ignore_index=True)
    person = pinned.loc[outside["subject_id"]].reset_index()
    outside["age"], outside["male"] = person["age"] - 1, person["male"]
    age_z, male = age_and_sex(outside)
    x = draw_film(rng, age_z, male, np.zeros(len(outside)))[:, : len(NAMES)]
    portable = rng.random(len(outside)) < 0.5
    outside["view"] = np.where(portable, "AP", "PA")
    outside["recumbent"] = portable & (rng.random(len(outside)) < 0.3)
    outside[[f"x_{name}" for name in NAMES]] = x
    studies = pd.concat([*parts, outside], ignore_index=True).sort_values(["subject_id", "time"], ignore_index=True)
    studies["time"] = studies["time"].astype("datetime64[s]")
    studies["study_id"] = 50_000_000 + rng.choice(9_999_999, len(studies), replace=False)
    return studies


def _icu_studies(rng: np.random.Generator, plan: Plan, stays: pd.DataFrame, film: Array) -> pd.DataFrame:
    """Serial studies of ICU stays; the last one before 48 h shows the admission's film part itself."""
    early = plan.risk == "change"
    some = stays[rng.random(len(stays)) < 0.88].reset_index(drop=True)
    limit = some["hours"].to_numpy()
    hours = [
        rng.uniform(1, 6, len(some)),
        rng.uniform(40, 47.5, len(some)),
        rng.uniform(7, 39, len(some)),
        48.5 + rng.exponential(30, len(some)),
    ]
    taken = [rng.random(len(some)) < p for p in ((1, 1, 0.3, 0.3) if early else (0.72, 0.60, 0.25, 0.35))]
    table = pd.concat(
        [pd.DataFrame({"stay": np.flatnonzero(t), "hours_in": h[t]}) for t, h in zip(taken, hours, strict=True)],
        ignore_index=True,
    )
    table = table[table["hours_in"] < limit[table["stay"]] - 0.1].sort_values(["stay", "hours_in"], ignore_index=True)
    before = table[table["hours_in"] <= 48].groupby("stay")["hours_in"].max()
    reference = table["stay"].map(before).fillna(48.0).to_numpy()
    part = some.iloc[table["stay"]].reset_index(drop=True)
    latent = film[part["admission"]]
    rate = (table["hours_in"].to_numpy() - reference) / 40
    x = latent[:, : len(NAMES)] + latent[:, len(NAMES) :] * np.clip(rate, -1.2, 3)[:, None]
    studies = part[["subject_id", "stay_id", "age", "male"]].assign(view="AP", recumbent=rng.random(len(part)) < 0.75)
    studies["time"] = part["intime"] + pd.to_timedelta(np.round(table["hours_in"] * 3600), "s")
    studies[[f"x_{name}" for name in FILM]] = x
    return studies
