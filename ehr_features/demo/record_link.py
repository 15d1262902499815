"""Values of the record that follow what a film shows: laboratory values, saturation and ventilation before each film.

Each value of `VALUES` is drawn for a film from a normal distribution whose mean is shifted if the film shows one of the
value's findings, given them independently of everything else. So the probability of each finding given the values has a
closed form: `posterior`. The strengths are AUROCs of one value for its findings, each with its source; values without
findings are noise. Age and heart size are linked by `truth.FILM` (no published AUROC was found for that either).

A film's values are charted after the subject's previous film and stored before this one. A value is missing for all
films of one visit or stay (`MISSING`), except the saturation of ICU and emergency films, which is always there.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import pandas as pd

from ehr_features.demo.plan import Plan, age_and_sex, hours_between
from ehr_features.demo.truth import NAMES, Array, presence

MISSING = 0.4  # probability that a value was not measured in a visit or stay
PANEL_HOURS, BEDSIDE_HOURS = 12.0, 1 / 6  # longest time from a value to its film
APART_HOURS = 36.0  # films further apart belong to two visits
NOISE = "noise"
NO_SOURCE = "no published AUROC found"


@dataclass(frozen=True)
class Value:
    """A value: its item in labevents or chartevents, its distribution without findings, and its strength.

    Attributes:
        typical, spread: median and standard deviation without the findings (`log`: spread of the natural logarithm).
        findings: drawn findings, any of which shifts the value. auroc: of the value for them. falls: it is lower then.
        binary: 1 with probability `auroc` if a finding is there, else 1 - `auroc`.
    """

    item: int
    label: str
    unit: str
    typical: float
    spread: float
    digits: int
    bounds: tuple[float, float]
    normal: tuple[float, float]
    findings: tuple[str, ...] = ()
    auroc: float = 0.5
    source: str = NOISE
    log: bool = False
    falls: bool = False
    binary: bool = False


CAP = "Müller 2007, doi:10.1186/1471-2334-7-10: pneumonia with an infiltrate, 545 emergency patients"
CPE = "Karmpaliotis 2007, doi:10.1378/chest.06-1247"
VALUES: dict[str, Value] = {
    "nt_probnp": Value(
        50963, "NTproBNP", "pg/mL", 900, 1.3, 0, (5, 70000), (0, 450), ("edema",), 0.80,
        f"{CPE}: BNP, cardiogenic oedema against ARDS, 80 ICU patients", log=True,
    ),
    "creatinine": Value(
        50912, "Creatinine", "mg/dL", 1.1, 0.5, 1, (0.2, 20), (0.5, 1.2), ("edema",), 0.60,
        f"{NO_SOURCE}: set to a weak link; {CPE} reports worse kidney function with cardiogenic oedema", log=True,
    ),
    "white_cells": Value(
        51301, "White Blood Cells", "K/uL", 9.5, 0.45, 1, (0.2, 100), (4, 11), ("consolidation",), 0.69, CAP, log=True,
    ),
    "crp": Value(
        50889, "C-Reactive Protein", "mg/L", 30, 1.2, 1, (0.3, 500), (0, 5), ("consolidation",), 0.76, CAP, log=True,
    ),
    "sodium": Value(50983, "Sodium", "mEq/L", 139, 4, 0, (110, 170), (133, 145)),
    "potassium": Value(50971, "Potassium", "mEq/L", 4.1, 0.5, 1, (2, 8), (3.3, 5.1)),
    "hemoglobin": Value(51222, "Hemoglobin", "g/dL", 10.5, 1.9, 1, (3, 20), (12, 16)),
    "platelets": Value(51265, "Platelet Count", "K/uL", 200, 0.45, 0, (5, 1500), (150, 440), log=True),
    "spo2": Value(
        220277, "O2 saturation pulseoxymetry", "%", 96.2, 1.9, 0, (60, 100), (95, 100),
        ("edema", "consolidation", "effusion"), 0.76, NO_SOURCE, falls=True,
    ),
    "ventilator": Value(
        226732, "O2 Delivery Device(s)", "", 0, 1, 0, (0, 1), (0, 1), ("device",), 0.80, NO_SOURCE, binary=True,
    ),
}  # fmt: skip
BEDSIDE = ("spo2", "ventilator")  # the others are of labevents
LINKED = tuple(dict.fromkeys(f for value in VALUES.values() for f in value.findings))
COMBINATIONS = np.array(list(itertools.product((False, True), repeat=len(LINKED))))  # (C, linked findings)


@dataclass
class Planted:
    """The values of each study, columns in the order of VALUES.

    Attributes:
        scores: (studies, V): standardised values, NaN where missing. charted, stored: (studies, V) datetime64[s].
        link: share of the published strengths.
    """

    scores: Array
    charted: Array
    stored: Array
    link: float

    def readings(self) -> Array:
        """(studies, V): the values in their units, NaN where missing."""
        out = np.empty_like(self.scores)
        for k, value in enumerate(VALUES.values()):
            spread = value.spread * self.scores[:, k]
            number = value.typical * np.exp(spread) if value.log else value.typical + spread
            out[:, k] = np.round(np.clip(number, *value.bounds), value.digits)
        return out

    def log_likelihood(self, studies: Array, there: Array, scores: Array | None = None) -> Array:
        """log P(values of a study | its findings), up to a constant.

        Args:
            studies: (N,) rows. there: (N or 1, M, linked findings) bool. scores: in place of the planted ones.
        Returns: (N, M).
        """
        held = (self.scores if scores is None else scores)[studies]
        total = np.zeros(np.broadcast_shapes((len(studies), 1), there.shape[:2]))
        for k, value in enumerate(VALUES.values()):
            if not value.findings:
                continue
            shows = there[..., [LINKED.index(f) for f in value.findings]].any(-1)
            score = held[:, k, None]
            if value.binary:
                one = np.where(shows, strength(value, self.link), 1 - strength(value, self.link))
                each = np.log(np.where(score == 1, one, 1 - one))
            else:
                each = -((score - shift(value, self.link) * shows) ** 2) / 2
            total += np.where(np.isnan(score), 0.0, each)
        return total


def strength(value: Value, link: float) -> float:
    """AUROC of a value for its findings at a share of the published strength (of the distance between the means)."""
    return NormalDist().cdf(link * NormalDist().inv_cdf(value.auroc))


def shift(value: Value, link: float) -> float:
    """Distance between the means with and without findings, in standard deviations, below 0 for a value that falls."""
    size = math.sqrt(2) * NormalDist().inv_cdf(value.auroc) * link
    return -size if value.falls else size


def plant(plan: Plan, subjects: pd.DataFrame, studies: pd.DataFrame) -> Planted | None:
    """Draw the values of every study; None with plan.record_link=0. Uses a random stream of its own."""
    if not plan.record_link:
        return None
    rng = np.random.default_rng([plan.seed, 10])
    shape = (len(studies), len(VALUES))
    shown = pd.DataFrame({name: studies[f"x_{name}"].to_numpy(float) > 0 for name in NAMES})
    draws = rng.standard_normal(shape)
    scores = np.empty(shape)
    for k, value in enumerate(VALUES.values()):
        there = shown[list(value.findings)].any(axis=1).to_numpy()
        if value.binary:
            one = strength(value, plan.record_link)
            scores[:, k] = draws[:, k] < NormalDist().inv_cdf(one) * np.where(there, 1, -1)
        else:
            scores[:, k] = draws[:, k] + shift(value, plan.record_link) * there
    before = hours_between(studies["time"], studies.groupby("subject_id")["time"].shift())
    visit = np.cumsum(~(before <= APART_HOURS)) - 1
    gone = (rng.random((len(studies), len(VALUES))) < MISSING)[visit]
    icu, emergency = studies["stay_id"].notna().to_numpy(), studies["ed_stay_id"].notna().to_numpy()
    names = list(VALUES)
    gone[:, names.index("spo2")] = ~(icu | emergency)
    gone[:, names.index("ventilator")] |= ~icu
    known = studies["subject_id"].map(subjects.set_index("subject_id")["kind"]).to_numpy() != "film"
    scores[gone | ~known[:, None]] = np.nan
    charted, stored = _times(rng, studies, before)
    return Planted(scores, charted, stored, plan.record_link)


def _times(rng: np.random.Generator, studies: pd.DataFrame, before: Array) -> tuple[Array, Array]:
    """(studies, V) times of charting and of storage: one panel of laboratory values and one look at the bedside."""
    lead = np.empty((len(studies), len(VALUES)))
    for places, longest in ((False, PANEL_HOURS), (True, BEDSIDE_HOURS)):
        hours = np.fmin(longest, 0.8 * before) * rng.uniform(0.1, 1.0, len(studies))
        lead[:, [(name in BEDSIDE) == places for name in VALUES]] = hours[:, None]
    wait = lead * rng.uniform(0.1, 0.9, (len(studies), 1))
    taken = studies["time"].to_numpy().astype("datetime64[s]")[:, None]
    charted = taken - np.ceil(lead * 3600).astype("timedelta64[s]")
    return charted, charted + np.floor(wait * 3600).astype("timedelta64[s]")


def posterior(plan: Plan, studies: pd.DataFrame, planted: Planted, *, values: bool = True) -> tuple[Array, Array]:
    """The findings of each study given its values, age, sex and whether it is of an ICU stay.

    Given the common factor of the severely ill the findings are independent, so the factor is integrated by quadrature
    (Q nodes) and the linked findings are enumerated (C combinations).

    Args:
        values: False leaves the values out: age, sex and place alone.
    Returns: weights (N, Q, C) that sum to 1 per study, and P(finding | node) (N, Q, findings).
    """
    nodes, share = np.polynomial.hermite_e.hermegauss(31)
    age_z, male = age_and_sex(studies)
    icu, rate = studies["stay_id"].notna().to_numpy(float), studies["rate"].fillna(0).to_numpy(float)
    p = presence(age_z, male, icu, rate, plan.risk, nodes)
    linked = p[..., None, [NAMES.index(name) for name in LINKED]]
    weight = np.where(COMBINATIONS, linked, 1 - linked).prod(-1) * (share / share.sum())[:, None]
    if values:
        likely = planted.log_likelihood(np.arange(len(studies)), COMBINATIONS[None])
        weight *= np.exp(likely - likely.max(-1, keepdims=True))[:, None]
    return weight / weight.sum((1, 2), keepdims=True), p


def stay_likelihood(studies: pd.DataFrame, stays: pd.DataFrame, planted: Planted) -> Callable[[slice, Array], Array]:
    """log P(values of a stay's films that are stored by hour 48 | its film part).

    Returns: a function of a slice of the stays and their drawn film parts (n, D, 20), which gives (n, D).
    """
    own = studies.reset_index(drop=True).reset_index(names="row").dropna(subset="stay_id")
    own["stay"] = pd.Index(stays["stay_id"]).get_indexer(own["stay_id"].astype("int64"))
    own = own[own["stay"] >= 0].assign(rank=lambda table: table.groupby("stay").cumcount())
    of = np.full((len(stays), int(own["rank"].max()) + 1 if len(own) else 0), -1)
    of[own["stay"], own["rank"]] = own["row"]
    limit = np.full(len(studies), np.datetime64("1900-01-01", "s"))
    limit[own["row"]] = stays["intime"].to_numpy().astype("datetime64[s]")[own["stay"]]
    limit[own["row"]] += np.timedelta64(48 * 3600, "s")
    scores = np.where(planted.stored <= limit[:, None], planted.scores, np.nan)
    rate = studies["rate"].fillna(0).to_numpy(float)
    linked = [NAMES.index(name) for name in LINKED]

    def likelihood(rows: slice, films: Array) -> Array:
        total = np.zeros(films.shape[:2])
        for study in of[rows].T:
            has = np.flatnonzero(study >= 0)
            latent, change = films[has][..., linked], films[has][..., [len(NAMES) + k for k in linked]]
            there = latent + change * rate[study[has], None, None] > 0
            total[has] += planted.log_likelihood(study[has], there, scores)
        return total

    return likelihood
