"""The gain of pretraining on the demo's planted findings, over training seeds.

    ./launch.sh python -m benchmarks.encoders OUT [--what resnet densenet record] [--seeds 0 1 2]

draws a synthetic hospital, pretrains, probes the frozen encoders, and prints the macro AUROC on its test split and the
paired difference to the first row (95% interval over seeds and subjects). `resnet`, `densenet`: a resnet34 and a small
DenseNet, with and without masked anchors. `record`: a small ViT without the record, with it (added as in preset
`default`, concatenated as in `paper`), and with another film's record. Finished steps are skipped, so the same command
resumes. The hyper-parameters were chosen on hospital 21; report on others.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from configs import cli, load
from finetune.compare import compare_runs
from finetune.config import ProbeConfig
from finetune.demo import CONFIGS, plan
from finetune.probe.main import probe
from pretrain.config import PretrainConfig
from pretrain.train import train

RANDOM, PIXELS = "random weights", "raw 16x16 pixels"
LAST_LAYER = "pools=[cls,avg,both]"  # of the heads; those of the demo are on all stages
Arms = Mapping[str, Sequence[str]]  # name -> config keys of its pretraining
# A control for batch norm alone: random weights whose running statistics were computed on these films.
STILL = ["optim.lr=1.0e-30", "optim.steps=60", "mask.ratio=0"]
CONV: Arms = {
    "random weights, batch norm of these films": STILL,
    "unmasked anchor": ["mask.ratio=0"],
    "masked anchor": [],
}
RECORD: Arms = {
    "vanilla": ["ehr.groups=[]"],
    "record added (`default`)": [],
    "record concatenated (`paper`)": ["ehr.inject=concat"],
    "another film's record (control)": ["ehr.permuted=true"],
}
RESNET = [  # full size, 21 million weights; small films and bf16: 300 steps take 6 minutes on one core
    "encoder.arch=resnet34",
    "encoder.model_args={}",
    "encoder.image_size=48",
    "views.focal_size=24",
    "optim.steps=300",
    "optim.lr=0.004",
    "precision=bf16",
]
PLANS: dict[str, tuple[str, Arms, list[str]]] = {
    "resnet": ("pretrain_densenet121", CONV, ["ehr.groups=[]", *RESNET]),
    "densenet": ("pretrain_densenet121", CONV, ["ehr.groups=[]"]),
    "record": ("pretrain_vit_tiny", RECORD, ["optim.steps=600"]),
}


def hospital(out: Path, subjects: int, seed: int) -> list[str]:
    """Run the demo's first three steps. Returns: the keys that give `pretrain` and `probe` its films."""
    for step in plan(out, subjects, seed, shuffled=False)[:3]:
        done = out / f"{step.name}.done"
        if not done.is_file():
            subprocess.run([sys.executable, "-m", *step.words], check=True)
            done.touch()
    return [f"features={out / 'features'}", f"store={out / 'store'}"]


def run(runs: Path, config: str, arms: Arms, inputs: Sequence[str], keys: Sequence[str], seed: int) -> None:
    """Pretrain and probe all arms with one seed, raw pixels and random weights too."""
    for name, own in arms.items():
        given = [*inputs, "readability=false", *keys, *own, f"out={folder(runs, name, seed)}", f"seed={seed}"]
        train(load(PretrainConfig, CONFIGS / f"{config}.yaml", given))
    encoders = {name: str(folder(runs, name, seed)) for name in arms}
    encoders |= {PIXELS: "pixels", RANDOM: f"random:{next(iter(encoders.values()))}"}
    for name, encoder in encoders.items():
        given = [*inputs, LAST_LAYER, f"encoder={encoder}", f"out={folder(runs, name, seed, 'probe')}", f"seed={seed}"]
        probe(load(ProbeConfig, CONFIGS / "probe_linear.yaml", given))


def folder(runs: Path, name: str, seed: int, what: str = "pretrain") -> Path:
    """The run folder of an arm and a seed."""
    return runs / f"{what}_{''.join(c if c.isalnum() else '_' for c in name)}_{seed}"


def table(runs: Path, names: Sequence[str], seeds: Sequence[int]) -> str:
    """One row per name: macro AUROC, mean over seeds, and the paired difference to the first name."""
    rows = [f"| macro AUROC, test, mean of {len(seeds)} seeds | | minus {names[0]} | p |", "|---|---|---|---|"]
    probes = {name: [folder(runs, name, seed, "probe") for seed in seeds] for name in names}
    for name in names:
        found = compare_runs(probes[name], probes[names[0]]).iloc[0]
        gap = f"{found['difference']:+.3f} ({found['low']:+.3f} to {found['high']:+.3f}) | {found['p']:.3f}"
        rows.append(f"| {name} | {found['a']:.3f} | {gap if name != names[0] else ' | '} |")
    return "\n".join(rows)


def main() -> None:
    """Run what is missing, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", metavar="OUT", type=Path)
    parser.add_argument("--what", nargs="+", choices=list(PLANS), default=list(PLANS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the trainings (default 0 1 2)")
    parser.add_argument("--hospital", type=int, default=22, help="seed of the data (default 22)")
    parser.add_argument("--subjects", type=int, default=1600)
    parser.add_argument("--keys", nargs="*", default=[], metavar="key=value", help="of every pretraining")
    args = parser.parse_args()
    inputs = hospital(args.out / f"hospital_{args.hospital}", args.subjects, args.hospital)
    said = []
    for what in args.what:
        config, arms, keys = PLANS[what]
        runs = args.out / f"{what}_{args.hospital}"
        for seed in args.seeds:
            run(runs, config, arms, inputs, [*keys, *args.keys], seed)
        said.append(f"{what}, hospital {args.hospital}\n\n{table(runs, [RANDOM, *arms, PIXELS], args.seeds)}")
    print("\n\n".join(said))


if __name__ == "__main__":
    sys.exit(cli.guard(main, signals=True))
