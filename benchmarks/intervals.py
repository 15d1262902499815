"""Check intervals and p-values on simulated trainings and subjects, for which the truth is known.

    ./launch.sh python -m benchmarks.intervals [--replicates 300] [--what seeds subjects]

`seeds`: two methods of n trainings each, whose AUROC (mean 0.80) varies between trainings; 30% of the subjects are
positive, and the scores of any two trainings correlate at 0.93. A part of the remaining variance is common to all
trainings of a method: none, half or all of it, in a third of the replicates each. Prints how often p < 0.05 if the
methods are equal, and how often the interval covers a true difference of 0.02. Methods of three and five trainings are
the first of ten. `compare` estimates the variance over subjects from resamples; here it is computed exactly, as for
infinitely many of them (DeLong et al. 1988), which is 50 times faster. `subjects`: one training; the coverage of each
metric's interval. Each replicate is a separate label, so that one call evaluates many.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from itertools import product

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.special import expit, logit
from scipy.stats import norm
from scipy.stats import t as student

from finetune.metrics import evaluate
from finetune.resample import added, degrees

AUROC, CORRELATION, PREVALENCE, BATCH = 0.80, 0.93, 0.3, 100
RUNS = (3, 5, 10)
SDS = (0.003, 0.008, 0.015)  # of AUROC between trainings
OWN = (0, 0.5, 1)  # the part of what two trainings do not share that all trainings of a method do
SAMPLES = ((60, 0.1, 1), (60, 0.3, 1), (100, 0.1, 1), (100, 0.1, 3), (300, 0.1, 1), (1000, 0.1, 2), (3000, 0.05, 1))
Array = NDArray[np.float64]


def trainings(
    rng: np.random.Generator, runs: int, subjects: int, sd: float, gap: float, own: float
) -> tuple[Array, Array, Array, float]:
    """Labels (N, BATCH), scores (runs, N, BATCH) of two methods, and the true difference of their AUROC.

    Args:
        gap: the approximate difference. own: the part of the variance that is common to a method's trainings.
    """
    y = (rng.random((subjects, BATCH)) < PREVALENCE).astype(float)
    shared = CORRELATION**0.5 * rng.normal(size=y.shape)
    scores, truths = [], []
    for auroc in (AUROC, AUROC - gap):
        shift = norm.ppf(auroc) * 2**0.5  # of the positives' scores
        between = sd * 2**0.5 / norm.pdf(shift / 2**0.5)
        truths.append(norm.cdf(shift / (2 + between**2) ** 0.5))
        noise = own**0.5 * rng.normal(size=y.shape) + (1 - own) ** 0.5 * rng.normal(size=(runs, *y.shape))
        each = shift + between * rng.normal(size=(runs, 1, BATCH))
        scores.append(each * y + shared + (1 - CORRELATION) ** 0.5 * noise)
    return y, scores[0], scores[1], truths[0] - truths[1]


def missed(
    subjects: int, sd: float, *, gap: float, own: float, replicates: int, seed: int
) -> dict[tuple[int, bool], float]:
    """By number of trainings and same_seeds, the share of intervals that miss the true difference.

    With `gap` 0 it is the share of p below 0.05.
    """
    rng = np.random.default_rng([seed, subjects, round(1e4 * sd), round(10 * own), gap > 0])
    found: dict[tuple[int, bool], list[float]] = {key: [] for key in product(RUNS, (False, True))}
    for _ in range(0, replicates, BATCH):
        y, a, b, truth = trainings(rng, max(RUNS), subjects, sd, gap, own)
        (values, of), (others, theirs) = (influence(y, scores) for scores in (a, b))
        for runs, same in found:
            given = [values[:runs], of[:runs], others[:runs], theirs[:runs]]
            p, low, high = intervals(y, *given, same_seeds=same)
            found[runs, same] += list((truth < low) | (truth > high) if gap else p < 0.05)
    return {key: float(np.mean(each)) for key, each in found.items()}


def influence(y: Array, scores: Array) -> tuple[Array, Array]:
    """AUROC (runs, L) of y (N, L) and scores (runs, N, L) without ties, and the influence (runs, N, L) of each subject.

    The sum of the squared influences is the variance of the AUROC over resamples of subjects, to first order.
    """
    positives, negatives = y.sum(0), (1 - y).sum(0)
    values, found = np.empty((len(scores), y.shape[1])), np.empty(scores.shape)
    for run, of in enumerate(scores):
        order = np.argsort(of, axis=0)
        positive = np.take_along_axis(y, order, 0)
        below = np.cumsum(1 - positive, 0) / negatives  # the share of negatives with a lower score
        above = 1 - np.cumsum(positive, 0) / positives  # the share of positives with a higher score
        values[run] = (below * positive).sum(0) / positives
        each = np.where(positive > 0, (below - values[run]) / positives, (above - values[run]) / negatives)
        np.put_along_axis(found[run], order, each, 0)
    return values, found


def intervals(
    y: Array, a: Array, of_a: Array, b: Array, of_b: Array, *, same_seeds: bool
) -> tuple[Array, Array, Array]:
    """p, low and high (L,) of `compare.paired` with infinitely many resamples, from the `influence` of each side."""
    sides = [(a - b, of_a - of_b)] if same_seeds else [(a, of_a), (-b, -of_b)]
    n = len(a)
    subjects = (sum(of.mean(0) for _, of in sides) ** 2).sum(0)
    for _, of in sides:
        subjects = subjects - ((of - of.mean(0)) ** 2).sum((0, 1)) / (n - 1) / n
    between = np.stack([values.var(0, ddof=1) for values, _ in sides]) / n
    smaller = np.minimum(y.sum(0), (1 - y).sum(0))
    variance, df = added(between, np.full(len(sides), n - 1), subjects, np.array([degrees(m) for m in smaller]))
    gap, error = (a - b).mean(0), np.sqrt(variance)
    half = student.ppf(0.975, df) * error
    return 2 * student.sf(np.abs(gap) / error, df), gap - half, gap + half


def coverage(count: int, prevalence: float, *, films: int, replicates: int, seed: int, samples: int = 200) -> pd.Series:
    """The coverage of one training's intervals, by metric; null intervals are excluded."""
    rng = np.random.default_rng([seed, count, round(100 * prevalence), films])

    def draw(count: int, shape: int) -> tuple[Array, Array, NDArray[np.intp]]:
        """Labels, probabilities, and the subject of each film; the films of a subject share label and risk."""
        risk = logit(prevalence) * 1.3 + 1.4 * rng.normal(size=(count, shape))
        y = (rng.random(risk.shape) < expit(risk)).astype(float)
        group = np.repeat(np.arange(count), films)
        return y[group], expit(risk[group] + (films > 1) * 0.7 * rng.normal(size=(len(group), shape))), group

    y, p, _ = draw(500_000 // films, 1)
    threshold = float(np.quantile(p, 1 - prevalence))
    truth = evaluate(y, p, samples=0, thresholds=[threshold]).query("label == '0'").set_index("metric")["value"]
    parts = []
    for _ in range(0, replicates, BATCH):
        y, p, group = draw(count, BATCH)
        table = evaluate(y, p, groups=group, samples=samples, thresholds=np.full(BATCH, threshold))
        parts.append(table[(table["label"] != "macro") & table["low"].notna()])
    table = pd.concat(parts)
    held = (table["low"] <= table["metric"].map(truth)) & (table["metric"].map(truth) <= table["high"])
    return held.groupby(table["metric"], sort=False).mean()


def _print_rows(count: int, sd: float, *, replicates: int, seed: int) -> list[list[float]]:
    """The rows of the table for 3, 5 and 10 trainings: p below 0.05 and coverage, each with own seeds and equal
    ones."""
    each = replicates // len(OWN)
    of = {gap: [missed(count, sd, gap=gap, own=own, replicates=each, seed=seed) for own in OWN] for gap in (0, 0.02)}
    rows = []
    for runs in RUNS:
        means = {
            (gap, same): float(np.mean([own[runs, same] for own in of[gap]]))
            for gap, same in product(of, (False, True))
        }
        rows.append([1 - mean if gap else mean for (gap, _), mean in means.items()])
        print(f"| {runs} | {count:,} | {sd} |" + _percent(rows[-1]), flush=True)
    return rows


def _percent(found: Sequence[float]) -> str:
    return " {:.1%}, {:.1%} | {:.1%}, {:.1%} |".format(*found)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--what", nargs="+", choices=("seeds", "subjects"), default=["seeds", "subjects"])
    parser.add_argument("--replicates", type=int, default=300, help="in 300s (default 300)")
    parser.add_argument("--subjects", type=int, nargs="+", default=[100, 300, 1000, 3000])
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    more = {"replicates": args.replicates, "seed": args.seed}
    if "seeds" in args.what:
        print("| trainings a side | subjects | sd of AUROC | p < 0.05: own, equal seeds | held: own, equal seeds |")
        print("|---" * 5 + "|", flush=True)
        rows = [row for count, sd in product(args.subjects, SDS) for row in _print_rows(count, sd, **more)]
        print("| mean | | |" + _percent(np.mean(rows, axis=0)))
    if "subjects" in args.what:
        for i, (count, share, films) in enumerate(SAMPLES):
            held = coverage(count, share, films=films, **more)
            if not i:
                print(f"| subjects, positive, films each | {' | '.join(held.index)} |\n{'|---' * (1 + len(held))}|")
            print(f"| {count:,}, {share:.0%}, {films} | {' | '.join(f'{h:.1%}' for h in held)} |", flush=True)


if __name__ == "__main__":
    main()
