"""Speed of the intervals: `evaluate` against a loop of scikit-learn over the same resamples.

    ./launch.sh python -m benchmarks.metrics [--rows 12000] [--labels 25] [--samples 1000] [--loop 4]

The loop computes AUROC and AUPRC only, on `--loop` resamples, and its time is scaled to `--samples`; `evaluate`
computes all metrics.
"""

from __future__ import annotations

import argparse
import resource
import time

import numpy as np
from sklearn.metrics import average_precision_score, roc_auc_score

from finetune.metrics import evaluate
from finetune.resample import multiplicities


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=12_000)
    parser.add_argument("--labels", type=int, default=25)
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--loop", type=int, default=4)
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    y = (rng.random((args.rows, args.labels)) < np.linspace(0.03, 0.4, args.labels)).astype(float)
    p = 1 / (1 + np.exp(-(rng.normal(size=y.shape) + y - 1)))
    began, wall = time.process_time(), time.perf_counter()
    table = evaluate(y, p, samples=args.samples)
    ours, wall = time.process_time() - began, time.perf_counter() - wall
    began = time.process_time()
    for counts in multiplicities(args.rows, args.loop, 0):
        for draw in counts.T:
            rows = np.repeat(np.arange(args.rows), draw.astype(int))
            for i in range(args.labels):
                roc_auc_score(y[rows, i], p[rows, i])
                average_precision_score(y[rows, i], p[rows, i])
    loop = (time.process_time() - began) * args.samples / args.loop
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"{args.samples} resamples x {args.labels} labels x {args.rows:,} rows, {table['metric'].nunique()} metrics")
    print(f"evaluate {ours:.1f} s (wall {wall:.1f} s); scikit-learn in a loop {loop:.0f} s (scaled from {args.loop})")
    print(f"largest memory of this process {memory:.0f} MB")
    what = f"{args.samples} resamples x {args.labels} labels x {args.rows:,} rows, s of processor time"
    print(f"| {what} | {ours:.1f} | scikit-learn in a loop, AUROC and AUPRC only {loop:.0f} | {loop / ours:.0f}x |")


if __name__ == "__main__":
    main()
