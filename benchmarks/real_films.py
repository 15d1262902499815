"""A smoke test on real films: a short vanilla pretraining, then sex, view and findings from the frozen features.

    ./launch.sh python -m benchmarks.real_films OUT --mimic-cxr DIR --nih DIR --mimic-iv DIR [--seeds 0 1 2] [--folds 3]

`--mimic-cxr`: NIH films in MIMIC-CXR-JPG's layout under other names. Their sex and person are known only from NIH's
table (`--nih`: Data_Entry*.csv and the same image files). Cross-validation is by person: each film is scored by an
encoder and a head of a fold that saw neither its NIH person nor its subject_id. Prints AUROC over all films and the
paired difference to random weights of the same architecture (95% interval over seeds and persons).
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from scipy.special import expit

from configs import cli, load
from ehr_features.build import build
from ehr_features.config import FeaturesConfig
from ehr_features.schema import FINDINGS, FRONTAL
from finetune.compare import paired
from finetune.config import ProbeConfig
from finetune.demo import CONFIGS
from finetune.probe.main import probe
from finetune.results import read_predictions
from pretrain.config import ImagesConfig, PretrainConfig
from pretrain.store import pack
from pretrain.train import train

RECIPE = ["encoder.model_args={embed_dim: 96, depth: 4, num_heads: 3}", "ehr.groups=[]", "readability=false"]
Scores = dict[str, pd.DataFrame]
SOURCES = ("random weights", "pretrained", "raw 16x16 pixels")


def read_films(mimic_cxr: Path, nih: Path) -> pd.DataFrame:
    """One row per frontal film: ids, path, male, ap, findings, and person (from NIH's or the linked tables)."""
    metadata, findings = (pd.read_csv(mimic_cxr / f"mimic-cxr-2.0.0-{n}.csv.gz") for n in ("metadata", "chexpert"))
    named = pd.read_csv(next(nih.glob("Data_Entry*.csv")))
    named["stem"] = named["Image Index"].map(lambda name: Path(name).stem)
    twins = _contents(nih).merge(named, on="stem").drop_duplicates("content")
    films = _contents(mimic_cxr).merge(twins.drop(columns=["stem", "path"]), on="content", validate="m:1")
    films = films.rename(columns={"stem": "dicom_id"}).merge(metadata, on="dicom_id", validate="1:1")
    films = films.merge(findings, on=["subject_id", "study_id"], how="left", validate="m:1")
    films = films[films["ViewPosition"].isin(FRONTAL)].sort_values("dicom_id", ignore_index=True)
    films["male"] = (films["Patient Gender"] == "M").astype(int)
    films["ap"] = (films["ViewPosition"] == "AP").astype(int)
    people, subjects = (pd.factorize(films[c])[0] for c in ("Patient ID", "subject_id"))
    links = (np.ones(len(films)), (people, people.max() + 1 + subjects))
    size = int(people.max() + subjects.max() + 2)
    films["person"] = connected_components(coo_array(links, shape=(size, size)), directed=False)[1][people]
    return films


def _contents(folder: Path) -> pd.DataFrame:
    paths = sorted(folder.rglob("*.jpg"))
    rows = [(p.stem, p.relative_to(folder).as_posix(), hashlib.sha256(p.read_bytes()).hexdigest()) for p in paths]
    return pd.DataFrame(rows, columns=["stem", "path", "content"])


def parts(films: pd.DataFrame, seed: int, folds: int, fold: int) -> pd.Series:
    """train, val (an eighth of the rest) or test of a fold: whole persons, in folds of about equally many films."""
    sizes = films.groupby("person").size().sample(frac=1, random_state=seed)
    order = (sizes.cumsum() - 1) * folds * 8 // len(films)  # eighths of folds
    eighth = films["person"].map(order)
    split = pd.Series("train", index=films.index).mask(eighth % 8 == 7, "val")
    return split.mask(eighth // 8 == fold, "test")


def prepared(args: argparse.Namespace, films: pd.DataFrame, folder: Path, split: pd.Series) -> None:
    """features/ with the fold's split, and films.csv: the inputs of pretraining and probe."""
    folder.mkdir(parents=True, exist_ok=True)
    films.assign(split=split).to_csv(folder / "films.csv", index=False)
    patients = pd.read_csv(next((args.mimic_iv / "hosp").glob("patients.csv*")))
    listed = pd.read_csv(args.mimic_cxr / "mimic-cxr-2.0.0-metadata.csv.gz")
    subjects = pd.DataFrame({"subject_id": films["subject_id"], "split": split}).drop_duplicates()
    others = set(patients["subject_id"]) | set(listed["subject_id"])
    others = pd.DataFrame({"subject_id": sorted(others - set(subjects["subject_id"])), "split": "train"})
    pd.concat([subjects, others]).to_csv(folder / "split.csv", index=False)
    given = [f"mimic_iv={args.mimic_iv}", f"mimic_cxr={args.mimic_cxr}", "tasks=[]", f"split={folder / 'split.csv'}"]
    if not (folder / "features" / "provenance.json").is_file():
        build(load(FeaturesConfig, CONFIGS / "features.yaml", [*given, f"out={folder / 'features'}"]))


def run(args: argparse.Namespace, films: pd.DataFrame, labels: Sequence[str], seed: int, fold: int) -> Scores:
    """Pretrain and probe one fold. Returns: source -> probabilities of its test films, by dicom_id."""
    folder = args.out / f"seed_{seed}_fold_{fold}"
    prepared(args, films, folder, parts(films, seed, args.folds, fold))
    store = f"store={args.out / 'store'}"
    given = [f"features={folder / 'features'}", store, f"out={folder / 'pretrained'}", f"seed={seed}"]
    given += [*RECIPE, f"optim.steps={args.steps}", *args.keys]
    encoder = train(load(PretrainConfig, CONFIGS / "pretrain_vit_small.yaml", given))
    table = f"{{layout: csv, table: {folder / 'films.csv'}, images: {args.mimic_cxr}, columns: {list(labels)}, "
    table += "subject: person, study: dicom_id, split: split, view: ViewPosition}"
    found = {}
    for source, spec in zip(SOURCES, (f"random:{encoder}", str(encoder), "pixels"), strict=True):
        out = folder / f"probe_{source.replace(' ', '_')}"
        given = ["features=null", "labels=[]", "samples=0", "empty=zeros", f"films={table}", store]  # as in MIMIC
        given += [f"encoder={spec}", f"out={out}", f"seed={seed}"]
        probe(load(ProbeConfig, CONFIGS / "probe_linear.yaml", given))
        ids, _, logits = read_predictions(out, "test")
        found[source] = pd.DataFrame(expit(logits.to_numpy()), index=ids["dicom_id"], columns=list(logits))
    return found


def table(films: pd.DataFrame, findings: Sequence[str], runs: dict[str, list[pd.DataFrame]]) -> str:
    """AUROC of each source, and the paired difference of the first two."""
    head = f"| AUROC, {len(films)} films, mean of {len(runs[SOURCES[0]])} seeds | {' | '.join(SOURCES)} |"
    rows = [f"{head} pretrained minus random |", "|---|---|---|---|---|"]
    whole, ap = np.ones(len(films), bool), films["ap"].to_numpy() == 1
    for says, columns, among in (
        ("sex", ["male"], whole),
        ("view (AP or PA)", ["ap"], whole),
        (f"{len(findings)} findings, macro", list(findings), whole),
        ("the same, AP films", list(findings), ap),
        ("the same, PA films", list(findings), ~ap),
    ):
        labels = films.loc[among, columns].fillna(0).replace(-1, np.nan).to_numpy(np.float64)
        scores = {source: np.stack([each[columns].to_numpy()[among] for each in runs[source]]) for source in SOURCES}
        people = films.loc[among, "person"].to_numpy()
        found = [
            paired(labels, scores["pretrained"], scores[source], groups=people, same_seeds=True).iloc[0]
            for source in SOURCES
        ]
        gap = f"{found[0]['difference']:+.3f} ({found[0]['low']:+.3f} to {found[0]['high']:+.3f})"
        values = " | ".join(f"{each['b']:.3f}" for each in found)
        rows.append(f"| {says} | {values} | {gap} |")
    return "\n".join(rows)


def main() -> None:
    """Run what is missing, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", metavar="OUT", type=Path)
    for name in ("mimic-cxr", "nih", "mimic-iv"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of folds and trainings")
    parser.add_argument("--folds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--keys", nargs="*", default=[], metavar="key=value", help="of every pretraining")
    args = parser.parse_args()
    films = read_films(args.mimic_cxr, args.nih)
    findings = [name for name in FINDINGS if (films[name] == 1).sum() >= 20]
    if not (args.out / "store" / "store.json").is_file():
        pack(ImagesConfig(mimic_cxr=str(args.mimic_cxr), out=str(args.out / "store"), size=96, views="frontal"))
    runs: dict[str, list[pd.DataFrame]] = {source: [] for source in SOURCES}
    for seed in args.seeds:
        folds = [run(args, films, [*findings, "male", "ap"], seed, fold) for fold in range(args.folds)]
        for source in SOURCES:
            runs[source].append(pd.concat([fold[source] for fold in folds]).loc[films["dicom_id"]])
    print(table(films, findings, runs))


if __name__ == "__main__":
    sys.exit(cli.guard(main, signals=True))
