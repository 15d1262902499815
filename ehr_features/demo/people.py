"""Draw the synthetic subjects, admissions, ICU stays, emergency visits and film studies, with their latents.

Input: `Plan`. Output: `People`, the tables that tables.py, events.py, visits.py and cxr.py write.
Film times and the first 48 h of a stay's length are independent of the latents, so the order of a film carries no
information about the outcome.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from ehr_features.demo import text as demo_text
from ehr_features.demo.plan import Plan, age_and_sex, hours_between
from ehr_features.demo.record_link import Planted, plant
from ehr_features.demo.truth import CHANNELS, FILM, NAMES, PHENOTYPES, Array, Outcomes, draw_film, draw_record, sigmoid


@dataclass
class People:
    """The tables, rows in order of subject; latents are arrays with a row per admission or study."""

    subjects: pd.DataFrame
    admissions: pd.DataFrame
    stays: pd.DataFrame
    visits: pd.DataFrame
    studies: pd.DataFrame
    record: Array  # (admissions, 11)
    film: Array  # (admissions, 20)
    phenotypes: Array  # (admissions, 25) 0/1
    planted: Planted | None  # values of the record that follow the films


def people(plan: Plan, outcomes: Outcomes) -> People:
    """Draw everyone; deterministic in `plan`."""
    rng = np.random.default_rng([plan.seed, 1])
    subjects = _subjects(rng, plan.subjects)
    admissions = _admissions(rng, subjects)
    age_z, male = age_and_sex(admissions)
    record = draw_record(rng, age_z, male)
    film = draw_film(rng, age_z, male, admissions["icu"].to_numpy(float), plan.risk)
    admissions["frail"] = demo_text.frailty(plan.seed, len(admissions), 0)
    logits = outcomes.logits(record, film, age_z, male, admissions["frail"].to_numpy())
    drawn = rng.random((len(admissions), 1 + len(PHENOTYPES))) < sigmoid(logits)
    dies, phenotypes = drawn[:, 0] & admissions["icu"].to_numpy(), drawn[:, 1:].astype(float)
    if plan.shuffled:  # shifted by half the table, to belong to another subject
        phenotypes = np.roll(phenotypes, len(phenotypes) // 2, axis=0)
        icu = np.flatnonzero(admissions["icu"])
        dies[icu] = np.roll(dies[icu], len(icu) // 2)
    admissions["died"] = dies
    later = admissions.duplicated("subject_id") & admissions.groupby("subject_id")["died"].shift(fill_value=False)
    keep = ~later.to_numpy()  # no admission after death
    admissions, record, film, phenotypes = (
        admissions[keep].reset_index(drop=True),
        record[keep],
        film[keep],
        phenotypes[keep],
    )
    stays, admissions = _stays(rng, admissions)
    visits, admissions = _visits(rng, subjects, admissions, stays)
    last = admissions[admissions["died"]].set_index("subject_id")["deathtime"]
    after = admissions.groupby("subject_id")["dischtime"].max() + pd.to_timedelta(
        rng.integers(20, 900, admissions["subject_id"].nunique()), "D"
    )
    dod = after[rng.random(len(after)) < 0.12]
    subjects["dod"] = pd.concat([last, dod[~dod.index.isin(last.index)]]).reindex(subjects["subject_id"]).to_numpy()
    inside = visits["admission"].to_numpy()
    own = demo_text.frailty(plan.seed, len(visits), 1)
    visits["frail"] = np.where(inside >= 0, admissions["frail"].to_numpy()[inside], own)
    studies = demo_text.with_frailty(draw_studies(rng, plan, subjects, stays, visits, film), stays, visits, plan)
    planted = plant(plan, subjects, studies)
    return People(subjects, admissions, stays, visits, studies, record, film, phenotypes, planted)


def _subjects(rng: np.random.Generator, count: int) -> pd.DataFrame:
    kind = rng.choice(["icu", "ward", "ed", "film"], count, p=[0.76, 0.05, 0.12, 0.07])
    table = pd.DataFrame(
        {"subject_id": np.sort(10_000_032 + rng.choice(9_000_000, count, replace=False)), "kind": kind}
    )
    table["male"] = rng.random(count) < 0.55
    table["age"] = np.clip(np.round(65 + 15 * rng.standard_normal(count)), 18, 99).astype(int)
    table["anchor_year"] = rng.integers(2112, 2190, count)
    table["year_group"] = rng.choice(["2008 - 2010", "2011 - 2013", "2014 - 2016", "2017 - 2019"], count)
    table["race"] = rng.choice(
        ["WHITE", "BLACK/AFRICAN AMERICAN", "HISPANIC/LATINO - PUERTO RICAN", "ASIAN", "UNKNOWN", "OTHER"],
        count,
        p=[0.62, 0.15, 0.07, 0.05, 0.06, 0.05],
    )
    table["pinned"] = "train"  # official split: few subjects are validate or test
    table.loc[rng.random(count) < 0.03, "pinned"] = "test"
    table.loc[rng.random(count) < 0.02, "pinned"] = "validate"
    table["has_films"] = (kind == "ed") | (kind == "film") | (rng.random(count) < 0.85)
    return table


def _admissions(rng: np.random.Generator, subjects: pd.DataFrame) -> pd.DataFrame:
    """A row per admission; one ICU subject in six has a second one."""
    source = subjects[subjects["kind"].isin(["icu", "ward"])]
    again = source[(source["kind"] == "icu") & (rng.random(len(source)) < 0.16)]
    first, second = source.assign(number=0), again.assign(number=1)
    table = pd.concat([first, second]).sort_values(["subject_id", "number"], ignore_index=True)
    start = pd.to_datetime(table["anchor_year"].astype(str) + "-01-01") + pd.to_timedelta(
        rng.integers(0, 300 * 1440, len(table)), "min"
    )
    gap = pd.to_timedelta(np.where(table["number"] > 0, rng.integers(400, 900, len(table)), 0), "D")
    table["admittime"] = (start + gap).astype("datetime64[s]")
    table["age"] = table["age"] + (table["admittime"].dt.year - table["anchor_year"])
    table["hadm_id"] = 20_000_000 + rng.choice(9_999_999, len(table), replace=False)
    table["icu"] = table["kind"] == "icu"
    table["icd_version"] = np.where(table["year_group"] < "2014", 9, 10)
    table.loc[rng.random(len(table)) < 0.15, "icd_version"] = 10
    return table


def _stays(rng: np.random.Generator, admissions: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """ICU stays, a fifth of them shorter than 48 h, a few admissions with two; and the admissions' ends."""
    rows = np.flatnonzero(admissions["icu"])
    count = len(rows)
    first = admissions.iloc[rows].assign(admission=rows)
    hours = np.where(
        rng.random(count) < 0.18, rng.uniform(9, 47, count), np.clip(48.5 + rng.exponential(42, count), 0, 260)
    )
    first["intime"] = first["admittime"] + pd.to_timedelta(np.round(rng.exponential(6, count) * 3600) + 60, "s")
    first["hours"], first["index"] = hours, 0
    second = first[rng.random(count) < 0.05].copy()
    second["intime"] = second["intime"] + pd.to_timedelta(
        np.round((second["hours"] + rng.uniform(12, 60, len(second))) * 3600), "s"
    )
    second["hours"], second["index"] = np.clip(48.5 + rng.exponential(30, len(second)), 0, 200), 1
    stays = pd.concat([first, second]).sort_values(["admission", "index"], ignore_index=True)
    final = ~stays.duplicated("admission", keep="last")
    # death: in the stay (not before 62 h where 48 h are reached) or on the ward after it
    dies = (stays["died"] & final).to_numpy()
    here = dies & (rng.random(len(stays)) < 0.75)
    long = stays["hours"].to_numpy() >= 48
    at = np.where(long, 62 + rng.exponential(45, len(stays)), stays["hours"])
    stays.loc[here, "hours"] = np.minimum(at, 260)[here]
    stays["outtime"] = (stays["intime"] + pd.to_timedelta(np.round(stays["hours"] * 3600), "s")).astype("datetime64[s]")
    late = stays["intime"] + pd.to_timedelta(
        np.round((np.maximum(stays["hours"], 62) + rng.exponential(40, len(stays))) * 3600), "s"
    )
    stays["deathtime"] = stays["outtime"].where(here, late).where(dies).astype("datetime64[s]")
    stays["stay_id"] = 30_000_000 + rng.choice(4_999_999, len(stays), replace=False)
    stays["intime"] = stays["intime"].astype("datetime64[s]")
    units = [
        "Medical Intensive Care Unit (MICU)",
        "Surgical Intensive Care Unit (SICU)",
        "Cardiac Vascular Intensive Care Unit (CVICU)",
        "Coronary Care Unit (CCU)",
    ]
    stays["unit"] = rng.choice(units, len(stays), p=[0.4, 0.25, 0.2, 0.15])
    stays["last_unit"] = np.where(rng.random(len(stays)) < 0.07, "Neuro Intermediate", stays["unit"])
    end = stays[final].set_index("admission")
    home = pd.to_timedelta(np.round(rng.exponential(90, len(admissions)) * 3600 + 7200), "s")
    left = end["outtime"].reindex(range(len(admissions))).fillna(admissions["admittime"]) + home
    admissions = admissions.assign(deathtime=end["deathtime"].reindex(range(len(admissions))))
    admissions["dischtime"] = admissions["deathtime"].fillna(left).astype("datetime64[s]")
    return stays, admissions


def _visits(
    rng: np.random.Generator, subjects: pd.DataFrame, admissions: pd.DataFrame, stays: pd.DataFrame
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Emergency visits: before two thirds of the admissions, and some that end at home."""
    came = np.flatnonzero(rng.random(len(admissions)) < 0.65)
    inside = admissions.iloc[came][["subject_id", "male", "race", "hadm_id"]].assign(admission=came)
    left = admissions["admittime"].iloc[came] + pd.to_timedelta(rng.integers(0, 7200, len(came)), "s")
    arrival = stays.groupby("admission")["intime"].min().reindex(came).set_axis(left.index)  # in the ICU
    inside["outtime"] = left.where(arrival.isna() | (left < arrival), arrival)
    inside["intime"] = admissions["admittime"].iloc[came] - pd.to_timedelta(
        np.round(rng.uniform(1.5, 14, len(came)) * 3600), "s"
    )
    home = subjects[(subjects["kind"] == "ed") | ((subjects["kind"] != "film") & (rng.random(len(subjects)) < 0.12))]
    start = pd.to_datetime((home["anchor_year"] - 1).astype(str) + "-02-01") + pd.to_timedelta(
        rng.integers(0, 250 * 86400, len(home)), "s"
    )
    outside = home[["subject_id", "male", "race"]].assign(admission=-1, intime=start)
    outside["outtime"] = start + pd.to_timedelta(np.round(rng.uniform(1.5, 12, len(home)) * 3600), "s")
    visits = pd.concat([inside, outside]).sort_values(["subject_id", "intime"], ignore_index=True)
    visits["intime"], visits["outtime"] = (
        visits["intime"].astype("datetime64[s]"),
        visits["outtime"].astype("datetime64[s]"),
    )
    visits["ed_stay_id"] = 35_000_000 + rng.choice(4_999_999, len(visits), replace=False)
    by_admission = visits[visits["admission"] >= 0].set_index("admission")
    admissions = admissions.assign(
        edregtime=by_admission["intime"].reindex(range(len(admissions))),
        edouttime=by_admission["outtime"].reindex(range(len(admissions))),
    )
    return visits, admissions


def channel_levels(record: Array, hours: Array) -> Array:
    """(N, 9) level of each channel at `hours` (N,): severity, rising until 48 h, plus its offset."""
    severity = record[:, 0] + record[:, 1] * (np.minimum(hours, 48) / 48 - 1)
    return severity[:, None] + record[:, 2 : 2 + len(CHANNELS)]


# ---- Film studies: in ICU stays, in emergency visits, and elsewhere


def draw_studies(
    rng: np.random.Generator,
    plan: Plan,
    subjects: pd.DataFrame,
    stays: pd.DataFrame,
    visits: pd.DataFrame,
    film: Array,
) -> pd.DataFrame:
    """A row per study: subject, time, view, the latents `x_NAME` of what its films show, and, of ICU stays, the share
    `rate` of the change that they show."""
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
    """Serial studies of ICU stays; the last one before 48 h shows the admission's film latents without noise."""
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
    rate = np.clip(rate, -1.2, 3)
    x = latent[:, : len(NAMES)] + latent[:, len(NAMES) :] * rate[:, None]
    studies = part[["subject_id", "stay_id", "age", "male"]].assign(view="AP", recumbent=rng.random(len(part)) < 0.75)
    studies["time"] = part["intime"] + pd.to_timedelta(np.round(table["hours_in"] * 3600), "s")
    studies[[f"x_{name}" for name in FILM]] = x
    studies["rate"] = rate
    return studies
