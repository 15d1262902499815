"""The demo over several seeds: the measured AUROC of each run, and the mean.

    ./launch.sh python -m benchmarks.demo OUT --seeds 12 13 14

runs `./launch.sh demo OUT/seed_N --seed N` for each seed without a finished run, then prints a Markdown table. The
hyper-parameters were chosen on seeds 1 to 3; report on others.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from ehr_features.files import read_json
from finetune.demo import FUSIONS, PROBES, auroc_rows, demo


def auroc(run: Path, subset: str) -> float:
    """The macro AUROC on the test split."""
    return float(next(row["value"] for row in auroc_rows(run, subset) if row["label"] == "macro"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", metavar="OUT", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[12, 13, 14])
    parser.add_argument("--subjects", type=int, default=1600)
    args = parser.parse_args()
    folders = [args.out / f"seed_{seed}" for seed in args.seeds]
    for folder, seed in zip(folders, args.seeds, strict=True):
        demo(folder, subjects=args.subjects, seed=seed)
    print("| macro AUROC, test | " + " | ".join(f"seed {seed}" for seed in args.seeds) + " | mean | possible |")
    print("|---" * (len(folders) + 3) + "|")
    bayes = [read_json(folder / "data" / "truth.json")["bayes"] for folder in folders]
    for says, run, subset, part in [
        *((says, run, "all", None) for says, run in PROBES.items()),
        *((says, run, "paired", part) for says, (run, part) in FUSIONS.items()),
    ]:
        values = [auroc(folder / "runs" / run, subset) for folder in folders]
        cells = " | ".join(f"{value:.3f}" for value in [*values, sum(values) / len(values)])
        possible = "" if part is None else f"{sum(b['mortality'][part] for b in bayes) / len(bayes):.3f}"
        print(f"| {'death: ' if part else 'findings: '}{says} | {cells} | {possible} |")


if __name__ == "__main__":
    main()
