"""A search for the demo's recipe: pretrainings with settings drawn at random, each with the same processor time.

    ./launch.sh python -m benchmarks.recipes OUT [--hospitals 1 2] [--tries 0 40] [--seconds 150]

writes synthetic hospitals, scores raw pixels on each, then pretrains and probes try after try. Each try adds a row to
OUT/recipes.csv: the keys that it set, and the macro AUROC of its frozen encoder on the test split with all train
subjects and with a tenth of them. `--name NAME --keys ...` is one try by hand. Rows that are there are skipped, so the
same command resumes. The hospitals serve to choose; report on others. benchmarks/recipes.csv has every try made so far.
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from benchmarks.encoders import hospital
from configs import cli
from ehr_features.typed import read_json
from finetune.demo import CONFIGS, auroc_rows

COLUMNS = ["try", "hospital", "keys", "seconds", "steps", "auroc", "auroc_tenth", "pixels", "pixels_tenth"]
RESNET, DENSE = "{layers: [1, 1, 1, 1], channels: [%d, %d, %d, %d], stem_type: deep, stem_width: %d}", "densenet121"
NETWORKS = {
    "resnet": ["encoder.arch=resnet18", "encoder.model_args=" + RESNET % (24, 48, 96, 192, 12)],
    "wide resnet": ["encoder.arch=resnet18", "encoder.model_args=" + RESNET % (32, 64, 128, 256, 16)],
    "densenet": ["encoder.arch=densenet121", "encoder.model_args={growth_rate: 12, block_config: [2, 3, 4, 3]}"],
    "vit": ["encoder.model_args={patch_size: 8, embed_dim: 96, depth: 4, num_heads: 3}"],
}
COMMON = ["views.ratio=[1,1]", "optim.lr_start=0", "optim.warmup_steps=30", "optim.betas=[0.9,0.98]"]
COMMON += ["optim.optimizer=adamw", "optim.weight_decay=0.04", "optim.weight_decay_end=0.04", "optim.lr_end=0.01"]
COMMON += ["optim.lr_batch=null", "optim.stretch=1", "optim.clip=3", "head.hidden=256", "log_every=50"]


def draw(number: int) -> list[str]:
    """The keys of a try, drawn with its number as the seed."""
    pick = random.Random(number).choice
    method, size = pick(["msn", "msn", "simclr", "vicreg"]), pick([48, 64])
    low, focal = pick([0.1, 0.2, 0.3, 0.5]), pick([0, 0, 2, 4])
    keys = [f"method={method}", *NETWORKS[pick([name for name in NETWORKS if name != "vit"])]]
    keys += [
        f"encoder.image_size={size}",
        f"views.target_scale=[{pick([low, 0.5])},1]",
        f"views.random_scale=[{low},1]",
    ]
    keys += [
        f"views.num_focal={focal}",
        "views.num_random=1",
        f"views.focal_size={size // 2}",
        "views.focal_scale=[0.1,0.4]",
    ]
    keys += [f"views.brightness={pick([0.1, 0.2, 0.4])}", f"views.normalise={pick(['crop', 'film'])}"]
    keys += [f"optim.batch_size={pick([32, 64, 128])}", f"optim.lr={pick([0.0005, 0.001, 0.002, 0.004])}"]
    keys += [f"films.positives={pick(['film', 'film', 'study'])}"]
    if method == "msn":
        start = pick([0.0, 0.9, 0.95, 0.99])
        keys += [f"optim.ema={start}", f"optim.ema_end={pick([start, 1.0]) if start else start}", "head.out=64"]
        keys += [f"loss.prototypes={pick([64, 128, 256])}", f"loss.target_temperature={pick([0.05, 0.1, 0.25])}"]
        keys += [f"mask.ratio={pick([0.0, 0.0, 0.15])}", "mask.cell=16", f"mask.fill={pick(['noise', 'mean', 'film'])}"]
    elif method == "simclr":
        keys += ["mask.ratio=0", f"simclr.temperature={pick([0.1, 0.2, 0.5])}", "head.out=64"]
    else:
        keys += ["mask.ratio=0", "head.out=256"]
    return keys


def attempt(out: Path, name: str, seed: int, inputs: Sequence[str], keys: Sequence[str]) -> dict[str, Any]:
    """Pretrain and probe. Returns: the row of the table, without its baseline."""
    run = out / f"{name}_hospital_{seed}"
    _call("pretrain", "pretrain_vit_tiny", *inputs, *COMMON, *keys, "ehr.groups=[]", "seed=0", f"out={run / 'msn'}")
    about = read_json(run / "msn" / "encoder" / "encoder.json")
    full, tenth = score(run / "probe", str(run / "msn"), inputs)
    row = {"try": name, "hospital": seed, "keys": " ".join(keys), "steps": about["step"]}
    return row | {"seconds": round(about["processor_seconds"]), "auroc": full, "auroc_tenth": tenth}


def score(out: Path, encoder: str, inputs: Sequence[str]) -> tuple[float, float]:
    """Macro AUROC of a frozen encoder on the test split, from all train subjects and from a tenth."""
    _call("probe", "probe_linear", *inputs, f"encoder={encoder}", "method=logistic", "fraction=[0.1,1]", f"out={out}")
    full, tenth = (
        next(r["value"] for r in auroc_rows(out, "all", share) if r["label"] == "macro") for share in (1.0, 0.1)
    )
    return round(full, 4), round(tenth, 4)


def _call(command: str, config: str, *keys: str) -> None:
    words = [sys.executable, "-P", "-m", "configs", command, str(CONFIGS / f"{config}.yaml"), *keys]
    subprocess.run(words, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL)


def main() -> None:
    """Run what is missing, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", metavar="OUT", type=Path)
    parser.add_argument("--hospitals", type=int, nargs="+", default=[1, 2], help="seeds of the data (default 1 2)")
    parser.add_argument("--subjects", type=int, default=2400)
    parser.add_argument("--tries", type=int, nargs=2, default=[0, 20], metavar=("FIRST", "END"), help="(default 0 20)")
    parser.add_argument("--seconds", type=float, default=150, help="of processor time for each try (default 150)")
    parser.add_argument("--name", help="of one try by hand, with --keys")
    parser.add_argument("--keys", nargs="*", default=[], metavar="key=value")
    args = parser.parse_args()
    budget = [f"optim.processor_seconds={args.seconds}", "optim.steps=null"]
    tries = {f"try_{i}": [*budget, *draw(i)] for i in range(*args.tries)}
    if args.name:
        tries = {args.name: args.keys}
    path = args.out / "recipes.csv"
    rows: list[dict[Any, Any]] = pd.read_csv(path).to_dict("records") if path.is_file() else []
    for seed in args.hospitals:
        inputs = hospital(args.out / f"hospital_{seed}", args.subjects, seed)
        pixels, tenth = score(args.out / f"pixels_{seed}", "pixels", inputs)
        for name, keys in tries.items():
            if any((row["try"], row["hospital"]) == (name, seed) for row in rows):
                continue
            rows.append(attempt(args.out, name, seed, inputs, keys) | {"pixels": pixels, "pixels_tenth": tenth})
            pd.DataFrame(rows)[COLUMNS].to_csv(path, index=False)
    print(pd.DataFrame(rows).sort_values("auroc", ascending=False).drop(columns="keys").to_string(index=False))


if __name__ == "__main__":
    sys.exit(cli.guard(main, signals=True))
