"""Check intervals and p-values on simulated trainings and subjects, for which the truth is known.

    ./launch.sh python -m benchmarks.intervals [--replicates 1000] [--what seeds subjects]

`seeds`: two methods of n trainings each, whose AUROC (mean 0.80) varies between trainings; 30% of the subjects are
positive, and the scores of any two trainings correlate at 0.93. A part of the remaining variance is common to all
trainings of a method: none, half or all of it, row by row. Prints how often p < 0.05 if the methods are equal, and how
often the interval covers a true difference of 0.02. `subjects`: one training; the coverage of each metric's interval.
Each replicate is a separate label, so that one call evaluates many.
"""

from __future__ import annotations

import argparse
from itertools import product

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.special import expit, logit
from scipy.stats import norm

from finetune.compare import paired
from finetune.metrics import evaluate

AUROC, CORRELATION, PREVALENCE, BATCH = 0.80, 0.93, 0.3, 100
SDS = (0.003, 0.008, 0.015)  # of AUROC between trainings
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
        spread = sd * 2**0.5 / norm.pdf(shift / 2**0.5)
        truths.append(norm.cdf(shift / (2 + spread**2) ** 0.5))
        noise = own**0.5 * rng.normal(size=y.shape) + (1 - own) ** 0.5 * rng.normal(size=(runs, *y.shape))
        each = shift + spread * rng.normal(size=(runs, 1, BATCH))
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
    found = []
    for _ in range(0, replicates, BATCH):
        y, a, b, truth = trainings(rng, runs, subjects, sd, gap, own)
        table = paired(y, a, b, groups=np.arange(subjects), samples=samples, same_seeds=same_seeds).iloc[1:]
        found.append((truth < table["low"]) | (table["high"] < truth) if gap else table["p"] < 0.05)
    return float(np.mean(found))


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


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--what", nargs="+", choices=("seeds", "subjects"), default=["seeds", "subjects"])
    parser.add_argument("--replicates", type=int, default=1000, help="in hundreds (default 1000)")
    parser.add_argument("--trainings", type=int, nargs="+", default=[3, 5, 10])
    parser.add_argument("--subjects", type=int, nargs="+", default=[100, 300, 1000, 3000])
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    more = {"replicates": args.replicates, "seed": args.seed}
    if "seeds" in args.what:
        print("| trainings a side | subjects | sd of AUROC | p < 0.05, own seeds | equal seeds | interval holds 0.02 |")
        print("|---" * 6 + "|")
        for i, (runs, count, sd) in enumerate(product(args.trainings, args.subjects, SDS)):
            own = (0, 0.5, 1)[(i + i // 3) % 3]
            found = [
                missed(runs, count, sd, gap=gap, own=own, same_seeds=same, **more)
                for gap, same in ((0, False), (0, True), (0.02, i % 2 == 0))
            ]
            print(f"| {runs} | {count:,} | {sd} | {found[0]:.1%} | {found[1]:.1%} | {1 - found[2]:.1%} |", flush=True)
    if "subjects" in args.what:
        for i, (count, share, films) in enumerate(SAMPLES):
            held = coverage(count, share, films=films, **more)
            if not i:
                print(f"| subjects, positive, films each | {' | '.join(held.index)} |\n{'|---' * (1 + len(held))}|")
            print(f"| {count:,}, {share:.0%}, {films} | {' | '.join(f'{h:.1%}' for h in held)} |", flush=True)


if __name__ == "__main__":
    main()
