"""The demo over several hospitals: what each run measured, and the mean differences with their intervals.

    ./launch.sh python -m benchmarks.demo OUT --seeds 10 11 12 13 14

runs `./launch.sh demo OUT/seed_N --seed N` for each seed without a finished run, then prints two Markdown tables: the
macro AUROCs, and paired differences on each hospital's test rows. Their mean has a 95% interval by Student's t over the
hospitals, each with its own data, pretraining and heads. The recipe was chosen on hospital 1 (benchmarks/recipes.py).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
from scipy import stats

from configs import cli
from ehr_features.files import read_json
from finetune.demo import auroc_rows, demo
from finetune.report.verdict import difference
from finetune.run_folders import read_run

FEW = 0.1
PROBES = {
    "raw pixels": "probe_pixels",
    "random weights": "probe_random",
    "pretrained on films": "probe_films",
    "pretrained with records": "probe_ehr",
}
FUSIONS = {
    "record only (LSTM)": ("mortality_record_lstm", "record"),
    "film only": ("mortality_film_only", "film"),
    "fused (MedFuse)": ("mortality_medfuse", "both"),
}
GAPS = {  # what it says: minuend, subtrahend, runs whose rows count, share of labels
    "pretrained minus random weights": ("probe_ehr", "probe_random", (), None),
    "pretrained minus raw pixels": ("probe_ehr", "probe_pixels", (), None),
    "the same, 10% of subjects labelled": ("probe_ehr", "probe_pixels", (), FEW),
    "with minus without the record": ("probe_ehr", "probe_films", (), None),
    "death: fused minus record only": ("mortality_medfuse", "mortality_record_lstm", ("mortality_film_only",), None),
    "death: fused minus film only": ("mortality_medfuse", "mortality_film_only", (), None),
}


def auroc(run: Path, subset: str, share: float = 1.0) -> float:
    """The macro AUROC on the test split."""
    return float(next(row["value"] for row in auroc_rows(run, subset, share) if row["label"] == "macro"))


def values(folders: list[Path]) -> str:
    """A row for each model, a column for each hospital."""
    bayes = [read_json(folder / "data" / "truth.json")["bayes"] for folder in folders]
    lines = [
        "| macro AUROC, test | "
        + " | ".join(folder.name.replace("_", " ") for folder in folders)
        + " | mean | possible |"
    ]
    lines.append("|---" * (len(folders) + 3) + "|")
    rows = [(f"findings: {says}", run, "all", 1.0, None) for says, run in PROBES.items()]
    rows += [(f"findings, 10% of labels: {says}", run, "all", FEW, None) for says, run in PROBES.items()]
    rows += [(f"death: {says}", run, "paired", 1.0, part) for says, (run, part) in FUSIONS.items()]
    for says, run, subset, share, part in rows:
        found = [auroc(folder / "runs" / run, subset, share) for folder in folders]
        best = "" if part is None else f"{np.mean([b['mortality'][part] for b in bayes]):.3f}"
        lines.append(f"| {says} | " + " | ".join(f"{x:.3f}" for x in [*found, np.mean(found)]) + f" | {best} |")
    return "\n".join(lines)


def gaps(folders: list[Path]) -> str:
    """A row for each paired difference: each hospital's, and the mean with its interval over hospitals."""
    lines = [
        "| difference in AUROC | "
        + " | ".join(folder.name.replace("_", " ") for folder in folders)
        + " | mean (95% interval) |"
    ]
    lines.append("|---" * (len(folders) + 2) + "|")
    for says, (a, b, also, share) in GAPS.items():
        found = []
        for folder in folders:
            one, other, *rest = (read_run(folder / "runs" / name, name) for name in (a, b, *also))
            gap = difference([one], [other], rest, share=share)
            assert gap is not None, f"{folder}: {a} and {b} share no rows"
            found.append(gap[0])
        between = stats.ttest_1samp(found, 0).confidence_interval()
        mean = f"{np.mean(found):+.3f} ({between.low:+.3f} to {between.high:+.3f})"
        lines.append(f"| {says} | " + " | ".join(f"{x:+.3f}" for x in found) + f" | {mean} |")
    return "\n".join(lines)


def main() -> None:
    """Run what is missing, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", metavar="OUT", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[10, 11, 12, 13, 14])
    parser.add_argument("--subjects", type=int, default=2400)
    args = parser.parse_args()
    folders = [args.out / f"seed_{seed}" for seed in args.seeds]
    for folder, seed in zip(folders, args.seeds, strict=True):
        demo(folder, subjects=args.subjects, seed=seed)
    print(values(folders), gaps(folders), sep="\n\n")


if __name__ == "__main__":
    sys.exit(cli.guard(main, signals=True))
