"""The planted signal: latents, true conditional probabilities, and the Bayes-optimal AUROC.

An admission has two parts that are independent given age and sex. The *record* part (`severity` r and the offsets of
nine vital and laboratory channels, centred so that the channels' mean is r) is visible only in the tables; the *film*
part (one latent amount per finding) only in films. Death and 25 phenotypes are drawn from logistic models of both.

Bayes values condition on the latents themselves, exactly:
    both    P(y | record part, film part, age, sex), the probability that y was drawn from;
    record  its mean over film parts drawn anew given age and sex; film: over record parts drawn anew.
With a text signal, death also depends on frailty (+1 or -1, visible only in complaints and home drugs). The readers
above are then averaged over frailty; `text` conditions on frailty, age and sex alone, `both_text` on everything, if a
visit has text. All are upper bounds: a model sees the record part through noisy, missing hourly values and the film
part through a noisy 128-px film. An AUROC is the expected one, positives weighted by p and negatives by 1 - p, on the
stated stays.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]  # float64 unless stated

CHANNELS = ("hr", "rr", "bp", "spo2", "temp", "gcs", "fio2", "glucose", "ph")
# a drawn finding: (prevalence in the ICU, outside it, age, common factor of the severely ill)
FILM: dict[str, tuple[float, float, float, float]] = {
    "heart": (0.32, 0.20, 0.30, 0.35),
    "edema": (0.30, 0.08, 0.10, 0.75),
    "consolidation": (0.25, 0.10, 0.00, 0.60),
    "effusion": (0.32, 0.10, 0.15, 0.75),
    "atelectasis": (0.25, 0.12, 0.10, 0.40),
    "pneumothorax": (0.10, 0.05, -0.10, 0.00),
    "mediastinum": (0.12, 0.08, 0.15, 0.00),
    "lesion": (0.08, 0.10, 0.25, 0.00),
    "device": (0.60, 0.08, 0.05, 0.00),
    "hyper": (0.20, 0.20, 0.20, 0.00),  # an imaged trait without a finding label; a sign of lung disease
}
NAMES = tuple(FILM)
DEATH_FILM = {"edema": 1.0, "effusion": 0.9, "consolidation": 0.8, "heart": 0.4, "pneumothorax": 0.4}
MOVES = ("edema", "consolidation", "effusion", "atelectasis")  # findings that change between films of a stay
CARRIERS = ("edema", "effusion")  # of risk="change"
CARRIED = (0.75, 0.12)  # mean and deviation of their latents then
DEATH = {"prevalence": 0.23, "record": 1.75, "film": 1.2, "text": 1.2}
CHANGE_SD = {"level": 0.35, "change": 0.6}  # by risk: of a latent amount, from the first to the last film before 48 h

# CCS group: prevalence, then weights on r, channels' offsets, drawn amounts, age (per 15 years), male
PHENOTYPES: dict[int, dict[str, float]] = {
    2: {"p": 0.22, "temp": 1.3, "bp": 0.7, "r": 0.6},
    49: {"p": 0.20, "glucose": 1.5},
    50: {"p": 0.12, "glucose": 1.5, "ph": 0.5},
    53: {"p": 0.40, "age": 0.6, "male": 0.3, "glucose": 0.4},
    55: {"p": 0.42, "ph": 1.1, "r": 0.4},
    98: {"p": 0.40, "bp": -1.1, "age": 0.3},
    99: {"p": 0.20, "bp": -0.8, "heart": 1.5, "age": 0.3},
    100: {"p": 0.12, "hr": 0.6, "heart": 1.6, "male": 0.5},
    101: {"p": 0.30, "heart": 1.2, "age": 0.6, "male": 0.6},
    105: {"p": 0.12, "hr": -1.2, "heart": 1.2, "age": 0.4},
    106: {"p": 0.32, "hr": 1.1, "heart": 1.0, "age": 0.4},
    108: {"p": 0.30, "heart": 2.2, "edema": 1.8, "effusion": 0.8, "age": 0.2},
    109: {"p": 0.12, "gcs": 1.7},
    122: {"p": 0.20, "consolidation": 2.8, "temp": 0.8},
    127: {"p": 0.18, "hyper": 2.4, "rr": 0.8},
    130: {"p": 0.12, "effusion": 2.2, "pneumothorax": 2.5},
    131: {"p": 0.35, "spo2": 1.0, "fio2": 0.8, "edema": 1.0, "consolidation": 1.0, "r": 0.4},
    133: {"p": 0.12, "atelectasis": 2.5, "consolidation": 0.8},
    134: {"p": 0.07, "rr": 1.2, "fio2": -0.5},
    151: {"p": 0.12, "gcs": 0.8, "temp": -0.9, "glucose": -0.6},
    153: {"p": 0.10, "hr": 1.1, "bp": 0.9},
    157: {"p": 0.33, "ph": 1.0, "bp": 0.6, "r": 0.6},
    158: {"p": 0.20, "ph": 0.9, "heart": 0.8, "age": 0.4},
    238: {"p": 0.20, "device": 1.5, "temp": 0.5},
    249: {"p": 0.16, "bp": 1.4, "r": 0.8},
}


def draw_record(rng: np.random.Generator, age_z: Array, male: Array) -> Array:
    """Record parts, (..., 11): severity r at hour 48, its rise over the first 48 h, offsets of the nine channels."""
    shape = (*np.broadcast_shapes(age_z.shape, male.shape), 1)
    mean = (0.30 * age_z + 0.15 * (male - 0.5))[..., None]
    severity = mean + 0.94 * rng.standard_normal(shape)
    offsets = 0.9 * rng.standard_normal((*shape[:-1], len(CHANNELS)))
    offsets -= offsets.mean(-1, keepdims=True)
    return np.concatenate([severity, 0.5 * rng.standard_normal(shape), offsets], -1)


def draw_film(rng: np.random.Generator, age_z: Array, male: Array, icu: Array, risk: str = "level") -> Array:
    """Film parts, (..., 20): the latent of each drawn finding at the last film, then its change from the first film."""
    shape = np.broadcast_shapes(age_z.shape, male.shape, icu.shape)
    mean, common = _means(age_z, male, icu), np.array([row[3] for row in FILM.values()])
    shared = rng.standard_normal((*shape, 1))
    latent = mean + common * shared + np.sqrt(1 - common**2) * rng.standard_normal((*shape, len(NAMES)))
    change = CHANGE_SD[risk] * np.isin(NAMES, MOVES) * rng.standard_normal((*shape, len(NAMES)))
    if risk == "change":  # their levels in the last film are set to the middle, so that only the change carries risk
        carry = np.isin(NAMES, CARRIERS)
        latent = np.where(carry, CARRIED[0] + CARRIED[1] * rng.standard_normal((*shape, len(NAMES))), latent)
    return np.concatenate([latent, change], -1)


def _means(age_z: Array, male: Array, icu: Array) -> Array:
    """(..., 10): the mean of each finding's latent given age, sex and place."""
    inside, outside, age, _ = (np.array(column) for column in zip(*FILM.values(), strict=True))
    quantile = np.vectorize(NormalDist().inv_cdf)
    mean: Array = np.where(icu[..., None] > 0, quantile(inside), quantile(outside)) + age * age_z[..., None]
    mean += np.where(np.array(NAMES) == "heart", -0.2, 0.0) * (male[..., None] - 0.5)
    return mean


def presence(age_z: Array, male: Array, icu: Array, rate: Array, risk: str, shared: Array) -> Array:
    """P(a film shows a finding | age, sex, place, the common factor), as `draw_film` draws it.

    Args:
        age_z, male, icu, rate: (N,); rate: share of the change that a film of a stay shows (0 outside). shared: (Q,).
    Returns: (N, Q, 10).
    """
    common = np.array([row[3] for row in FILM.values()])
    moved = (CHANGE_SD[risk] * np.isin(NAMES, MOVES) * rate[:, None]) ** 2  # variance
    mean = _means(age_z, male, icu)[:, None] + common * shared[:, None]
    variance = 1 - common**2 + moved
    if risk == "change":
        carry = np.isin(NAMES, CARRIERS) & (icu[:, None] > 0)
        mean = np.where(carry[:, None], CARRIED[0], mean)
        variance = np.where(carry, CARRIED[1] ** 2 + moved, variance)
    z: Array = mean / np.sqrt(variance)[:, None]
    return 0.5 * np.vectorize(math.erfc)(-z / math.sqrt(2))


def amounts(latent: Array) -> Array:
    """Drawn amount of each finding in [0, 1]: 0 where its latent is below 0, else .25 and more."""
    return np.where(latent > 0, np.clip(0.25 + 0.5 * latent, 0, 1), 0.0)


class Outcomes:
    """P(death) and P(phenotype) from the record part, the film part, age and sex, and, for death, frailty."""

    def __init__(self, risk: str = "level", text_signal: float = 0.0) -> None:
        self.risk, self.text_signal = risk, text_signal
        rng = np.random.default_rng(20240)  # fixed: the same outcome model for every seed
        age_z, male = rng.standard_normal(20000), (rng.random(20000) < 0.55).astype(float)
        record = draw_record(rng, age_z, male)
        film = draw_film(rng, age_z, male, np.ones(20000), risk)
        score = self._film_score(film)
        self.mean, self.sd = float(score.mean()), float(score.std())
        self.prevalence = np.array([DEATH["prevalence"], *(row["p"] for row in PHENOTYPES.values())])
        self.intercept = np.zeros(len(self.prevalence))
        frail = np.where(rng.random(20000) < 0.5, 1.0, -1.0) if text_signal else np.zeros(20000)
        self.intercept = _intercepts(self.logits(record, film, age_z, male, frail), self.prevalence)

    def _film_score(self, film: Array) -> Array:
        if self.risk == "change":
            k = len(NAMES) + np.array([NAMES.index(name) for name in CARRIERS])
            return film[..., k].sum(-1)
        weights = np.array([DEATH_FILM.get(name, 0.0) for name in NAMES])
        return amounts(film[..., : len(NAMES)]) @ weights

    def logits(self, record: Array, film: Array, age_z: Array, male: Array, frail: Array | float) -> Array:
        """(..., 26): death, then the phenotypes in the order of PHENOTYPES."""
        shown = amounts(film[..., : len(NAMES)])
        death = DEATH["record"] * record[..., 0] + DEATH["film"] * (self._film_score(film) - self.mean) / self.sd
        death = death + DEATH["text"] * self.text_signal * frail
        columns = [death]
        for row in PHENOTYPES.values():
            weight = np.array([row.get(name, 0.0) for name in CHANNELS])
            drawn = np.array([row.get(name, 0.0) for name in NAMES])
            rest = row.get("r", 0.0) * record[..., 0] + row.get("age", 0.0) * age_z + row.get("male", 0.0) * male
            columns.append(record[..., 2:] @ weight + shown @ drawn + rest)
        return np.stack(np.broadcast_arrays(*columns), -1) + self.intercept

    def probabilities(
        self,
        record: Array,
        film: Array,
        age_z: Array,
        male: Array,
        frail: Array | None = None,
        draws: int = 200,
        likelihood: Callable[[slice, Array], Array] | None = None,
    ) -> dict[str, Array]:
        """P(outcome | ...), each (N, 26).

        Args:
            frail: +1 or -1; 0: not visible in any text; None: no text signal.
            likelihood: log P(values planted in the record | film part), of rows and their drawn film parts
                (record_link.py); then `record` knows these values too.
        Returns: P for the readers `both` (record and film), `record`, `film`, and `last_film` (no change between
            films); with a text signal also `text`, and `both_text`: all three.
        """
        rng = np.random.default_rng(7)
        frail = np.zeros(len(record)) if frail is None else frail
        parts = [
            self._averages(rng, record[s], film[s], age_z[s], male[s], frail[s], draws)
            for s in _slices(len(record), 200)
        ]
        means = {reader: np.concatenate([part[reader] for part in parts]) for reader in parts[0]}
        if likelihood is not None:
            means["record"] = self._record_and_values(record, age_z, male, likelihood)
        known = {"both": self._mean(record, film, age_z, male)}
        if self.text_signal:
            known["both_text"] = self._mean(record, film, age_z, male, frail)
        return known | means

    def _mean(self, record: Array, film: Array, age_z: Array, male: Array, frail: Array | None = None) -> Array:
        """P(outcome), averaged over frailty if that is unknown (None, or 0)."""
        if not self.text_signal:
            return sigmoid(self.logits(record, film, age_z, male, 0.0))
        one, two = (sigmoid(self.logits(record, film, age_z, male, sign)) for sign in (1.0, -1.0))
        if frail is None:
            return (one + two) / 2
        share = ((1 + frail) / 2)[..., None]
        return share * one + (1 - share) * two

    def _record_and_values(
        self, record: Array, age_z: Array, male: Array, likelihood: Callable[[slice, Array], Array], draws: int = 1000
    ) -> Array:
        """P(outcome | record part, planted values, age, sex): film parts drawn anew, weighted by the values."""
        rng, parts = np.random.default_rng(8), []
        for rows in _slices(len(record), 100):
            age, sex = (np.repeat(value[rows, None], draws, 1) for value in (age_z, male))
            films = draw_film(rng, age, sex, np.ones_like(age), self.risk)
            likely = likelihood(rows, films)
            weight = np.exp(likely - likely.max(1, keepdims=True))
            weight /= weight.sum(1, keepdims=True)
            parts.append((self._mean(record[rows, None], films, age, sex) * weight[..., None]).sum(1))
        return np.concatenate(parts)

    def _averages(
        self,
        rng: np.random.Generator,
        record: Array,
        film: Array,
        age_z: Array,
        male: Array,
        frail: Array,
        draws: int,
    ) -> dict[str, Array]:
        age, sex = (np.repeat(value[:, None], draws, 1) for value in (age_z, male))
        films = draw_film(rng, age, sex, np.ones_like(age), self.risk)
        records = draw_record(rng, age, sex)
        last = films.copy()
        last[..., : len(NAMES)] = film[:, None, : len(NAMES)]
        averages = {
            "record": self._mean(record[:, None], films, age, sex).mean(1),
            "film": self._mean(records, film[:, None], age, sex).mean(1),
            "last_film": self._mean(records, last, age, sex).mean(1),
        }
        if self.text_signal:
            averages["text"] = self._mean(records, films, age, sex, np.repeat(frail[:, None], draws, 1)).mean(1)
        return averages


def sigmoid(x: Array) -> Array:
    """1 / (1 + exp(-x))."""
    return 1 / (1 + np.exp(-x))


def auroc(score: Array, weight: Array) -> float | None:
    """AUROC of a score where row i is positive with weight w_i and negative with 1 - w_i; None with one class only.

    With labels as weights it is the usual AUROC; with true probabilities it is the expected one.
    """
    _, place = np.unique(score, return_inverse=True)
    positive, negative = np.bincount(place, weight), np.bincount(place, 1 - weight)
    total = positive.sum() * negative.sum()
    return float((positive * (negative.cumsum() - negative / 2)).sum() / total) if total > 0 else None


def _slices(count: int, size: int) -> list[slice]:
    return [slice(start, start + size) for start in range(0, count, size)]


def _intercepts(logits: Array, prevalence: Array) -> Array:
    low, high = np.full(len(prevalence), -12.0), np.full(len(prevalence), 12.0)
    for _ in range(40):
        middle = (low + high) / 2
        above = sigmoid(logits + middle).mean(0) > prevalence
        low, high = np.where(above, low, middle), np.where(above, middle, high)
    return (low + high) / 2
