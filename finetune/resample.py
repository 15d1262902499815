"""Statistics of many weighted samples at once, and their intervals: the arithmetic of `metrics` and `compare`.

Input: one label's outcomes and scores, the subject of each row, and how often each resample drew each subject. Output:
each statistic for each resample. A resample is a column of multiplicities (G, R), so every statistic is a few sums over
rows that are sorted once.

An interval is Student's: the variance over subjects comes from the resamples, that over trainings from the trainings'
values, because resampling three units underestimates their variance. `benchmarks.intervals` measures both.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, ParamSpec, TypeVar

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from scipy.special import expit, logit, stdtr, stdtrit
from threadpoolctl import ThreadpoolController

P = ParamSpec("P")
T = TypeVar("T")
Floats = NDArray[np.float64]
WHOLE = 4_000_000  # rows up to which float32 holds all counts of a resample exactly (2^24)
CHUNK = 4_000_000  # rows x resamples held at a time: 32 MB in each temporary array
SPECIFICITY = 0.9
BINS = 15
ROUNDING = 1e-24  # variances below this are rounding errors
DIFFERENCE = (-1.0, 1.0)  # of two values between 0 and 1
LEAST = 0.3  # the variance over subjects alone is at least minus this share of the trainings' variance
RANKS = ("auroc", "auprc", "sensitivity_at_specificity_90")
PROBABILITIES = ("brier", "calibration_error", "calibration_slope", "calibration_intercept")
THRESHOLDED = ("f1", "sensitivity", "specificity")


def one_thread(work: Callable[P, T]) -> Callable[P, T]:
    """The function with one BLAS thread: on matrices of a few rows more threads wait for each other, and cost."""

    @functools.wraps(work)
    def alone(*args: P.args, **kwargs: P.kwargs) -> T:
        with _libraries().limit(limits=1, user_api="blas"):
            return work(*args, **kwargs)

    return alone


@functools.cache
def _libraries() -> ThreadpoolController:
    import scipy.linalg  # noqa: F401  its BLAS is another than numpy's, and limited only if it is loaded

    return ThreadpoolController()


def multiplicities(num_groups: int, samples: int, seed: int, rows: int | None = None) -> Iterator[Floats]:
    """How often each resample draws each group, `num_groups` draws with replacement.

    Args:
        rows: rows of the sample, which limit the memory; `num_groups` if None. The draws do not depend on it.
    Yields: (num_groups, r) float64, r resamples at a time, `samples` in all.
    """
    rng = np.random.default_rng(seed)
    width = max(1, CHUNK // max(rows or num_groups, 1))
    for start in range(0, samples, width):
        r = min(width, samples - start)
        counts = np.empty((r, num_groups))
        for i in range(r):
            counts[i] = np.bincount(rng.integers(num_groups, size=num_groups), minlength=num_groups)
        yield np.ascontiguousarray(counts.T)


@dataclass(frozen=True)
class Label:
    """One label, sorted once for all its resamples.

    `thresholds` are the K distinct scores of positive rows, from high to low; a rank statistic of a weighted sample
    needs only the weight of positives at each, of negatives at or above each, and of negatives tied with each.
    """

    positives: sparse.csr_array  # (K, G): positive rows of each group at each threshold
    negatives: (
        sparse.csr_array
    )  # (K + 1, G): negative rows from each threshold up to the next higher one; the last: below all
    tied: sparse.csr_array  # (ties, G): negative rows equal to a threshold
    tied_at: NDArray[np.intp]  # (ties,): which thresholds
    sums: Floats  # (S, G): sums over rows for the other statistics
    gaps: sparse.csr_array | None  # (BINS, G): outcomes less probabilities, by bin of probability
    fit: tuple[float, float]  # calibration intercept and slope of the whole sample
    threshold: float | None

    @classmethod
    def of(
        cls,
        y: Floats,
        scores: Floats,
        group: NDArray[np.intp],
        num_groups: int,
        threshold: float | None = None,
        ranks_only: bool = False,
    ) -> Label:
        """Sort one label.

        Args:
            y: (n,), 0 or 1, both present.
            scores: (n,), finite; larger means more likely 1.
            group: (n,), 0 .. num_groups - 1.
            threshold: `score >= threshold` predicts 1, for F1; None leaves it out.
            ranks_only: leave out what needs probabilities.
        """
        positive = y > 0
        thresholds, place = np.unique(-scores[positive], return_inverse=True)
        at = np.searchsorted(thresholds, -scores[~positive], side="left")  # the first threshold <= the score
        ties = np.append(thresholds, np.nan)[at] == -scores[~positive]
        tied_at, tie_row = np.unique(at[ties], return_inverse=True)
        probabilities = not ranks_only and bool(scores.min() >= 0 and scores.max() <= 1)
        fit = calibrate(y, scores) if probabilities else (np.nan, np.nan)

        def count(row: NDArray[np.intp], of: NDArray[np.intp], num_rows: int) -> sparse.csr_array:
            ones = np.ones(len(row), np.float32 if len(y) < WHOLE else np.float64)
            return sparse.coo_array((ones, (row, of)), shape=(num_rows, num_groups)).tocsr()

        terms = _terms(y, scores, fit, probabilities, threshold)  # (S, n)
        sums = [np.bincount(group, weights=term, minlength=num_groups) for term in terms]
        gaps = None
        if probabilities:
            gaps = sparse.coo_array((y - scores, (_bins(scores), group)), shape=(BINS, num_groups)).tocsr()
        k = len(thresholds)
        return cls(
            positives=count(place, group[positive], k),
            negatives=count(at, group[~positive], k + 1),
            tied=count(tie_row, group[~positive][ties], len(tied_at)),
            tied_at=tied_at,
            sums=np.array(sums, dtype=np.float64).reshape(len(terms), num_groups),
            gaps=gaps,
            fit=fit,
            threshold=threshold,
        )

    def statistics(self, counts: Floats, metrics: Collection[str] | None = None) -> dict[str, Floats]:
        """Each statistic of each resample.

        Args:
            counts: (G, R) multiplicities.
            metrics: those that are wanted; None: all.
        Returns: name -> (R,); NaN where a resample has one class only.
        """
        rows = counts.astype(self.positives.dtype, copy=False)
        positives = self.positives @ rows  # (K, R), whole numbers as all below
        above = self.negatives @ rows
        np.cumsum(above, axis=0, out=above)  # (K + 1, R): negatives at or above each threshold
        p, n = positives.sum(axis=0, dtype=np.float64), above[-1].astype(np.float64)
        above = above[:-1]
        with np.errstate(invalid="ignore", divide="ignore"):
            pairs = p * n - np.einsum("kr,kr->r", positives, above, dtype=np.float64)
            ties = np.einsum("tr,tr->r", positives[self.tied_at], self.tied @ rows, dtype=np.float64)
            out = {"auroc": (pairs + 0.5 * ties) / (p * n), "prevalence": p / (p + n)}
            if metrics is None or not out.keys() >= set(metrics):
                out |= self._ranks(positives, above, p, n)
                out |= self._sums(self.sums @ counts, p, n, counts)
        defined = (p > 0) & (n > 0)
        return {name: np.where(defined, value, np.nan) for name, value in out.items()}

    def _ranks(self, positives: Floats, above: Floats, p: Floats, n: Floats) -> dict[str, Floats]:
        """Statistics of the ranks beside AUROC, from what `statistics` counted."""
        found = np.cumsum(positives, axis=0)  # (K, R)
        last = (above <= (1 - SPECIFICITY) * n + 1e-9).sum(axis=0)  # `above` never falls
        sensitivity = np.where(last > 0, found[last - 1, np.arange(len(p))], 0.0) / p
        above += found
        np.maximum(above, 1.0, out=above)
        precision = np.divide(found, above, dtype=np.float64)  # at each threshold
        return {
            "auprc": np.einsum("kr,kr->r", positives, precision) / p,
            "sensitivity_at_specificity_90": sensitivity,
        }

    def _sums(self, sums: Floats, p: Floats, n: Floats, counts: Floats) -> dict[str, Floats]:
        out = {}
        if self.gaps is not None:
            out["brier"] = sums[0] / (p + n)
            out["calibration_error"] = np.abs(self.gaps @ counts).sum(0) / (p + n)
            gradient, curvature = sums[1:3], sums[3:6]  # one Newton step from the whole sample's fit
            determinant = curvature[0] * curvature[2] - curvature[1] ** 2
            intercept = (curvature[2] * gradient[0] - curvature[1] * gradient[1]) / determinant
            slope = (curvature[0] * gradient[1] - curvature[1] * gradient[0]) / determinant
            out["calibration_intercept"] = self.fit[0] + intercept
            out["calibration_slope"] = self.fit[1] + slope
        if self.threshold is not None:
            true, false = sums[-2], sums[-1]
            out["f1"] = 2 * true / (true + false + p)
            out["sensitivity"] = true / p
            out["specificity"] = 1 - false / n
        return out


class Spread(NamedTuple):
    """Variance of an estimate, and its degrees of freedom; NaN if undefined."""

    variance: float
    df: float

    def around(
        self, value: float, between_0_and_1: bool = False, within: tuple[float, float] = (-np.inf, np.inf)
    ) -> tuple[float, float]:
        """The 95% interval; on the logit scale for values between 0 and 1, and none for 0 and 1; else cut to `within`,
        what the value can be."""
        half = stdtrit(self.df, 0.975) * np.sqrt(self.variance)
        if not between_0_and_1:
            return max(float(value - half), within[0]), min(float(value + half), within[1])
        if not 0 < value < 1:
            return np.nan, np.nan
        low, high = expit(logit(value) + np.array([-1, 1]) * half / (value * (1 - value)))
        return float(low), float(high)

    def p(self, value: float) -> float:
        """Two-sided p-value of the hypothesis that the value is 0."""
        if self.variance < ROUNDING:
            return 1.0 if value == 0 else np.nan
        return float(2 * stdtr(self.df, -abs(value) / np.sqrt(self.variance)))


def spread(sides: Sequence[tuple[Floats, Floats]], df: float = np.inf) -> Spread:
    """Variance of a sum of means over trainings, for other trainings and other subjects.

    Args:
        sides: the terms of the sum, each the values of its trainings (n,) and their resamples (n, R), which draw the
            same subjects in all sides.
        df: degrees of freedom of the variance over subjects; few resamples reduce them.
    Returns: NaN if more than 5% of the resamples are undefined. With one training on a side only subjects vary, and the
        result is for these trainings.
    """
    total = np.sum([draws.mean(0) for _, draws in sides], axis=0)
    kept = ~np.isnan(total)
    if kept.sum() < max(2, 0.95 * len(total)):
        return Spread(np.nan, np.nan)
    df = 1 / (1 / df + 1 / (kept.sum() - 1))
    subjects = float(total[kept].var(ddof=1))
    if min(len(values) for values, _ in sides) < 2:
        return Spread(subjects, df)
    n = np.array([len(values) for values, _ in sides])
    between = np.array([values.var(ddof=1) for values, _ in sides]) / n
    for (_, draws), count in zip(sides, n, strict=True):
        apart = (draws - draws.mean(0))[:, kept]
        subjects -= float(apart.var(axis=1, ddof=1).sum()) / (count - 1) / count
    return Spread(*map(float, added(between, n - 1, np.array(subjects), df)))


def added(between: Floats, free: NDArray[np.int64], subjects: Floats, df: float | Floats) -> tuple[Floats, Floats]:
    """The variance over trainings plus that over subjects alone, and its degrees of freedom.

    The variance between trainings contains the interaction of trainings and subjects. So does the variance of a
    resampled mean, from which it must be subtracted. The variance over subjects that remains may be estimated below 0:
    cutting it at 0 would reject too seldom, keeping it fully too often.

    The degrees of freedom of the trainings are Welch's. Those of the sum weight its parts by their share of the
    variance to the power of 1.25. Satterthwaite's power of 2 would be right if the shares were known: where three
    trainings happen to agree, their share is estimated too low, and up to 8% of true hypotheses are rejected. Power 1
    rejects as few as 3.7%, 1.25 from 4.3 to 6.4%.

    Args:
        between: (sides, ...) variance of each side's mean over its trainings.
        free: (sides,) trainings less one.
        subjects: (...) variance over subjects alone, as estimated.
        df: of `subjects`.
    """
    trainings = between.sum(0)
    variance = np.maximum(trainings + np.maximum(subjects, -LEAST * trainings), 0.0)
    with np.errstate(divide="ignore", invalid="ignore"):
        weighed = np.tensordot(1 / (free + 2), between**2, axes=1)
        welch = np.clip(trainings**2 / weighed - 2, free.min(), free.sum())
        share = np.minimum(trainings / variance, 1.0)
        both = 1 / (share**1.25 / welch + (1 - share) ** 1.25 / df)
    return variance, np.where(trainings < ROUNDING, df, both)


def smaller_class(y: Floats, group: NDArray[np.intp]) -> Floats:
    """The number of subjects in each label's smaller class: (N, L) -> (L,)."""
    return np.array([min(len(np.unique(group[column == k])) for k in (0, 1)) for column in y.T], np.float64)


def degrees(smaller: float) -> float:
    """Degrees of freedom of a variance over subjects, from the number in the smaller class."""
    return max(2 * smaller - 2, 1.0)


def calibrated_error(probabilities: Floats) -> float:
    """Expected binned error of perfectly calibrated probabilities (n,), by the normal approximation."""
    p = np.clip(probabilities, 0, 1)
    variance = np.bincount(_bins(p), weights=p * (1 - p))
    return float(np.sqrt(2 / np.pi * variance).sum() / max(len(p), 1))


def calibrate(y: Floats, probabilities: Floats) -> tuple[float, float]:
    """Intercept and slope of the logistic regression of outcomes on logit(probability); ideal (0, 1).

    Probabilities are clipped to [1e-6, 1 - 1e-6]. NaN if there is no finite fit: a single score, or separable classes.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    x = logit(np.clip(probabilities, 1e-6, 1 - 1e-6))
    low, high = x[y > 0], x[y <= 0]
    if low.min() >= high.max() or low.max() <= high.min():
        return (np.nan, np.nan)
    centre, deviation = x.mean(), x.std()
    design = ((x - centre) / deviation)[:, None]
    with warnings.catch_warnings():  # where Newton's steps are at the numbers' limit it goes on with lbfgs
        warnings.simplefilter("ignore", ConvergenceWarning)
        fit = LogisticRegression(C=np.inf, solver="newton-cholesky", tol=1e-10, max_iter=1000).fit(design, y)
    slope = float(fit.coef_[0, 0] / deviation)
    return float(fit.intercept_[0] - slope * centre), slope


def _bins(probabilities: Floats) -> NDArray[np.intp]:
    return np.minimum((probabilities * BINS).astype(np.intp), BINS - 1)


def _terms(y: Floats, s: Floats, fit: tuple[float, float], probabilities: bool, threshold: float | None) -> Floats:
    """(S, n): each row's contribution to each sum."""
    terms = []
    if probabilities:
        x = logit(np.clip(s, 1e-6, 1 - 1e-6))
        mu = expit(fit[0] + fit[1] * x)
        v = mu * (1 - mu)
        terms += [(s - y) ** 2, y - mu, (y - mu) * x, v, v * x, v * x * x]
    if threshold is not None:
        called = s >= threshold
        terms += [(called & (y > 0)).astype(float), (called & (y <= 0)).astype(float)]
    return np.array(terms).reshape(len(terms), len(y))
