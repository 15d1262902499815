"""The demo over several hospitals: what each run measured, and the mean differences with their intervals.

    ./launch.sh python -m benchmarks.demo OUT --seeds 0 10 11 12 13 14

runs `./launch.sh demo OUT/seed_N --seed N` for each seed without a finished run, then prints two Markdown tables: the
macro AUROCs, and paired differences on each hospital's test rows. Their mean has a 95% interval by Student's t over the
hospitals, each with its own data, pretraining and heads. The recipe was chosen on hospital 1 (benchmarks/recipes.py).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy import stats

from configs import UserError, cli
from ehr_features.typed import read_json
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
RECORD, FILM = "mortality_record_lstm", "mortality_film_only"
GAPS: dict[str, tuple[str, tuple[str, ...], float]] = {  # minuend; subtrahend, the best of them; share of labels
    "pretrained minus random weights": ("probe_ehr", ("probe_random",), 1.0),
    "pretrained minus raw pixels": ("probe_ehr", ("probe_pixels",), 1.0),
    "the same, 10% of subjects labelled": ("probe_ehr", ("probe_pixels",), FEW),
    "with minus without the record": ("probe_ehr", ("probe_films",), 1.0),
    "death: fused minus record only": ("mortality_medfuse", (RECORD,), 1.0),
    "death: fused minus film only": ("mortality_medfuse", (FILM,), 1.0),
    "death: fused minus the better of the two": ("mortality_medfuse", (RECORD, FILM), 1.0),
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


class Between(NamedTuple):
    """A paired difference in each hospital (or fold of patients), and its mean with a 95% interval over them."""

    each: list[float]
    mean: float
    low: float
    high: float


def between(says: str, folders: list[Path]) -> Between:
    """One of GAPS on each hospital's test rows; of deaths on those with a film."""
    a, others, share = GAPS[says]
    each = []
    for folder in folders:
        one, film, *rest = (read_run(folder / "runs" / name, name) for name in (a, FILM, *others))
        within = film.by_row.index if others[0] in (RECORD, FILM) and film.by_row is not None else None
        found = [difference([one], [other], share=share, within=within) for other in rest]
        assert None not in found, f"{folder}: {a} and {', '.join(others)} share no rows"
        each.append(min(gap[0] for gap in found if gap is not None))
    return over(each)


def over(each: list[float]) -> Between:
    """The interval is Student's t; two are the least."""
    interval = stats.ttest_1samp(each, 0).confidence_interval()
    return Between(each, float(np.mean(each)), float(interval.low), float(interval.high))


def gaps(folders: list[Path]) -> str:
    """A row for each paired difference."""
    names = [folder.name.replace("_", " ") for folder in folders]
    lines = [f"| difference in AUROC | {' | '.join(names)} | mean (95% interval) |", "|---" * (len(folders) + 2) + "|"]
    for says in GAPS:
        found = between(says, folders)
        mean = f"{found.mean:+.3f} ({found.low:+.3f} to {found.high:+.3f})"
        lines.append(f"| {says} | " + " | ".join(f"{x:+.3f}" for x in found.each) + f" | {mean} |")
    return "\n".join(lines)


def main() -> None:
    """Run what is missing, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", metavar="OUT", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 10, 11, 12, 13, 14])
    parser.add_argument("--subjects", type=int, default=2400)
    args = parser.parse_args()
    if len(args.seeds) < 2:
        raise UserError("--seeds: two hospitals or more are needed for an interval; for one there is `demo`")
    folders = [args.out / f"seed_{seed}" for seed in args.seeds]
    for folder, seed in zip(folders, args.seeds, strict=True):
        demo(folder, subjects=args.subjects, seed=seed)
    print(values(folders), gaps(folders), sep="\n\n")


if __name__ == "__main__":
    sys.exit(cli.guard(main, signals=True))
