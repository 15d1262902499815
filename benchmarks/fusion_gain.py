"""The gain of fusion on the synthetic hospital, beside the best possible gain; and two checks that it is real.

    ./launch.sh python -m benchmarks.fusion_gain OUT [--seeds 10 11 12 13 14] [--subjects 3000] [--encoder pixels]

For each seed three hospitals are drawn, and every model is trained TRAININGS times on death in hospital:

    level     death depends on the record and the last film: does a fused model beat the best single modality?
    change    of the films, only the change between two carries risk: only models of several films can find it
    shuffled  findings, codes and deaths belong to other subjects: is the AUROC 0.5?

The second has 1.5 times as many subjects as the first, the third 0.4 times.

Finished steps are skipped, so the same command resumes. Prints Markdown. The AUROC is that of the test stays with a
film, mean over trainings. A gain has Student's interval over the seeds, one hospital each. The single modality is the
best on those same test stays, chosen in each hospital, which can only make the gain smaller. Films are read as 16 x 16
pixels, the cheapest encoder; `--encoder msn` pretrains one on each hospital. The hyper-parameters were chosen on seeds
1 and 2.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats
from sklearn.metrics import roc_auc_score

from configs import load
from ehr_features.typed import read_json
from finetune.config import FuseConfig
from finetune.fusion.train import fuse
from finetune.results import each_training, read_predictions

CONFIGS = Path(__file__).resolve().parents[1] / "configs" / "demo"
TRAININGS = 2
SINGLE = ("record_lstm", "record_transformer", "record_gbm", "film_only")
FUSED = ("medfuse", "concat", "attention")
WORLDS: dict[str, tuple[list[str], float, tuple[str, ...]]] = {  # options of the generator, size, models
    "level": ([], 1.0, (*SINGLE, *FUSED)),
    "change": (["--risk", "change"], 1.5, ("record_lstm", *FUSED, "medfuse_time")),
    "shuffled": (["--shuffled"], 0.4, ("record_lstm", "film_only", *FUSED)),
}
Aurocs = dict[str, NDArray[np.float64]]  # model -> (seeds,)
RECIPE = ["lr=1e-3", "dropout=0.5", "samples=0", "checkpoint_every=0", f"seeds={TRAININGS}"]


def hospital(folder: Path, seed: int, subjects: int, options: list[str]) -> None:
    """Raw tables, films, features and store, by the user's commands."""
    data, cxr = folder / "data", f"mimic_cxr={folder / 'data' / 'mimic-cxr'}"
    size = ["--subjects", str(subjects), "--seed", str(seed)]
    build = ["ehr_features", "build", str(CONFIGS / "features.yaml"), f"mimic_iv={data / 'mimic-iv'}", cxr]
    for done, words in (
        (data / "truth.json", ["ehr_features", "demo", str(data), *size, *options]),
        (folder / "features" / "provenance.json", [*build, f"out={folder / 'features'}", "tasks=[mortality]"]),
        (
            folder / "store" / "store.json",
            ["pretrain", "images", str(CONFIGS / "images.yaml"), cxr, f"out={folder / 'store'}"],
        ),
    ):
        if not done.is_file():
            subprocess.run([sys.executable, "-m", *words], check=True, stdout=subprocess.DEVNULL)


def pretrained(folder: Path, seed: int) -> Path:
    """The demo's EHR-conditioned encoder, pretrained on this hospital's train films."""
    words = ["pretrain", "train", str(CONFIGS / "pretrain_vit_tiny.yaml"), f"out={folder / 'msn'}", f"seed={seed}"]
    words += [f"features={folder / 'features'}", f"store={folder / 'store'}"]
    subprocess.run([sys.executable, "-m", *words], check=True, stdout=subprocess.DEVNULL)
    return folder / "msn"


def trained(folder: Path, model: str, seed: int, encoder: str) -> Path:
    """The run of a model on a hospital; reused if finished."""
    words = [f"features={folder / 'features'}", f"store={folder / 'store'}", f"encoder={encoder}", f"model={model}"]
    runs = folder / ("runs" if encoder == "pixels" else f"runs_{Path(encoder).name}")
    words += [f"out={runs / model}", f"seed={seed}", *RECIPE, *(["pool=null"] if encoder == "pixels" else [])]
    with redirect_stdout(sys.stderr):
        return fuse(load(FuseConfig, CONFIGS / "fuse_mortality.yaml", words))


def auroc(run: Path) -> tuple[float, float]:
    """AUROC on the test stays with a film, mean over trainings; and its standard error for random scores."""
    values = []
    for training in each_training([run]):
        ids, labels, logits = read_predictions(training, "test")
        keep = ids["has_image"].to_numpy(bool)
        died = labels.to_numpy()[keep, 0]
        values.append(roc_auc_score(died, logits.to_numpy()[keep, 0]))
    positives, negatives = (died > 0).sum(), (died == 0).sum()
    return float(np.mean(values)), float(np.sqrt((positives + negatives + 1) / (12 * positives * negatives)))


def student(values: NDArray[np.float64]) -> str:
    """Mean and 95% interval over the seeds."""
    if len(values) < 2:
        return f"{values.mean():+.3f}"
    half = stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values))
    return f"{values.mean():+.3f} ({values.mean() - half:+.3f} to {values.mean() + half:+.3f})"


def show(world: str, found: Aurocs, errors: NDArray[np.float64], possible: dict[str, float], seeds: list[int]) -> None:
    """Print the AUROCs of a setting, and a summary."""

    def row(name: str, values: NDArray[np.float64], last: str, possible: str, sign: str = "") -> None:
        print(f"| {name} | {' | '.join(f'{v:{sign}.3f}' for v in values)} | {last} | {possible} |")

    print(f"\n| {world}: AUROC, test | {' | '.join(f'seed {seed}' for seed in seeds)} | mean | possible |")
    print("|---" * (len(seeds) + 3) + "|")
    for model, values in found.items():
        part = "record" if model.startswith("record") else "film" if model == "film_only" else "both"
        part = "record" if world == "change" and model != "medfuse_time" else part  # one film has no signal there
        row(model, values, f"{values.mean():.3f}", f"{possible[part]:.3f}")
    if world == "shuffled":
        error = float(np.sqrt((errors**2).sum()) / len(errors))
        furthest = max(abs(values.mean() - 0.5) for values in found.values()) / error
        print(f"\nstandard error of a mean: {error:.3f}; the furthest from 0.5 is {furthest:.1f} of them away")
        return
    single = np.max([values for model, values in found.items() if model in SINGLE], axis=0)
    gain = possible["both"] - max(possible["record"], possible["film"])
    for model, values in found.items():
        if model not in SINGLE:
            name = f"{model} minus the best single modality" if world == "level" else f"{model} less record_lstm"
            row(
                name,
                values - single,
                student(values - single),
                f"{gain if world == 'level' or model == 'medfuse_time' else 0:+.3f}",
                "+",
            )
    if world == "change":
        gap = found["medfuse_time"] - found["medfuse"]
        row("medfuse_time less medfuse", gap, student(gap), f"{gain:+.3f}", "+")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", metavar="OUT", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[10, 11, 12, 13, 14])
    parser.add_argument(
        "--subjects", type=int, default=3000, help="of a hospital: about nine ICU stays for ten of them"
    )
    parser.add_argument("--worlds", nargs="+", choices=WORLDS, default=list(WORLDS))
    parser.add_argument("--encoder", default="pixels", help="`pixels`, `msn`, or any that `fuse` takes")
    args = parser.parse_args()
    torch.set_num_threads(1)
    for world in args.worlds:
        options, size, models = WORLDS[world]
        found: dict[str, list[float]] = {model: [] for model in models}
        errors, truths = [], []
        for seed in args.seeds:
            folder = args.out / f"{world}_{seed}"
            hospital(folder, seed, round(args.subjects * size), options)
            encoder = str(pretrained(folder, seed)) if args.encoder == "msn" else args.encoder
            truths.append(read_json(folder / "data" / "truth.json")["bayes"]["mortality"])
            for model in models:
                value, error = auroc(trained(folder, model, seed, encoder))
                found[model].append(value)
            errors.append(error)
        possible = {part: float(np.mean([truth[part] for truth in truths])) for part in ("record", "film", "both")}
        show(world, {m: np.array(v) for m, v in found.items()}, np.array(errors), possible, args.seeds)


if __name__ == "__main__":
    main()
