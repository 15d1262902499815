"""Check intervals and p-values on simulated trainings and subjects, for which the truth is known.

    ./launch.sh python -m benchmarks.intervals [--replicates 300] [--what seeds subjects]

`seeds`: two methods of n trainings each, whose AUROC (mean 0.80) varies between trainings; 30% of the subjects are
positive, and the scores of any two trainings correlate at 0.93. A part of the remaining variance is common to all
trainings of a method: none, half or all of it, in a third of the replicates each. Prints how often p < 0.05 if the
methods are equal, and how often the interval covers a true difference of 0.02. `subjects`: one training; the coverage
of each metric's interval. Each replicate is a separate label, so that one call evaluates many.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from itertools import product

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.special import expit, logit
from scipy.stats import norm

from finetune.metrics import evaluate
from finetune.resample import multiplicities, spread

AUROC, CORRELATION, PREVALENCE, BATCH = 0.80, 0.93, 0.3, 100
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
    runs: int,
    subjects: int,
    sd: float,
    *,
    gap: float,
    own: float,
    same_seeds: bool,
    replicates: int,
    seed: int,
    samples: int = 50,
) -> float:
    """The share of intervals that miss the true difference; with `gap` 0 the share of p below 0.05."""
    rng = np.random.default_rng([seed, runs, subjects, round(1e4 * sd), round(10 * own), same_seeds, gap > 0])
    (drawn,) = multiplicities(subjects, samples, 0, rows=1)
    found = []
    for _ in range(0, replicates, BATCH):
        y, a, b, truth = trainings(rng, runs, subjects, sd, gap, own)
        for p, low, high in differences(y, a, b, drawn, same_seeds):
            found.append(not low <= truth <= high if gap else p < 0.05)
    return float(np.mean(found))


def differences(y: Array, a: Array, b: Array, drawn: Array, same_seeds: bool) -> Iterator[tuple[float, float, float]]:
    """p and interval of `compare.paired` for each label, of rows that are subjects and scores without ties: faster."""
    (values, draws), (others, theirs) = (_aurocs(y, scores, drawn) for scores in (a, b))
    for i in range(y.shape[1]):
        sides = [(values[:, i], draws[:, :, i]), (-others[:, i], -theirs[:, :, i])]
        if same_seeds:
            sides = [(sides[0][0] + sides[1][0], sides[0][1] + sides[1][1])]
        gap, varies = float(values[:, i].mean() - others[:, i].mean()), spread(sides)
        yield varies.p(gap), *varies.around(gap)


def _aurocs(y: Array, scores: Array, drawn: Array) -> tuple[Array, Array]:
    """AUROC (runs, L) of y (N, L) and scores (runs, N, L), and in resamples: drawn (N, R) -> (runs, R, L)."""
    weights = np.concatenate([np.ones((len(y), 1)), drawn], axis=1, dtype=np.float32)
    found = np.empty((len(scores), weights.shape[1], y.shape[1]))
    for run, i in product(range(len(scores)), range(y.shape[1])):
        order = np.argsort(scores[run, :, i])
        weight, positive = weights[order], y[order, i] > 0
        below = np.cumsum(np.where(positive[:, None], 0, weight), axis=0)  # negatives with a lower score
        pairs = np.einsum("nr,nr->r", below[positive], weight[positive], dtype=np.float64)
        found[run, :, i] = pairs / (weight[positive].sum(0, dtype=np.float64) * below[-1])
    return found[:, 0], found[:, 1:]


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


def _print_row(runs: int, subjects: int, sd: float, *, replicates: int, seed: int) -> list[float]:
    """A row of the table: p below 0.05 and coverage, each of trainings of their own seeds and of equal ones."""
    found = []
    for gap, same in product((0, 0.02), (False, True)):
        of = [
            missed(runs, subjects, sd, gap=gap, own=own, same_seeds=same, replicates=replicates // len(OWN), seed=seed)
            for own in OWN
        ]
        found.append(1 - np.mean(of) if gap else np.mean(of))
    print(f"| {runs} | {subjects:,} | {sd} |" + _percent(found), flush=True)
    return found


def _percent(found: Sequence[float]) -> str:
    return " {:.1%}, {:.1%} | {:.1%}, {:.1%} |".format(*found)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--what", nargs="+", choices=("seeds", "subjects"), default=["seeds", "subjects"])
    parser.add_argument("--replicates", type=int, default=300, help="in 300s (default 300)")
    parser.add_argument("--trainings", type=int, nargs="+", default=[3, 5, 10])
    parser.add_argument("--subjects", type=int, nargs="+", default=[100, 300, 1000, 3000])
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    more = {"replicates": args.replicates, "seed": args.seed}
    if "seeds" in args.what:
        print("| trainings a side | subjects | sd of AUROC | p < 0.05: own, equal seeds | held: own, equal seeds |")
        print("|---" * 5 + "|", flush=True)
        rows = [_print_row(runs, count, sd, **more) for runs, count, sd in product(args.trainings, args.subjects, SDS)]
        print("| mean | | |" + _percent(np.mean(rows, axis=0)))
    if "subjects" in args.what:
        for i, (count, share, films) in enumerate(SAMPLES):
            held = coverage(count, share, films=films, **more)
            if not i:
                print(f"| subjects, positive, films each | {' | '.join(held.index)} |\n{'|---' * (1 + len(held))}|")
            print(f"| {count:,}, {share:.0%}, {films} | {' | '.join(f'{h:.1%}' for h in held)} |", flush=True)


if __name__ == "__main__":
    main()
