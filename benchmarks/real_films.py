"""Evidence on real films: what pretraining adds to random weights, raw pixels and training from scratch.

    ./launch.sh python -m benchmarks.real_films OUT --films DIR/films.csv [--tables networks films time record methods]

`--films`: a table with path, patient, view (AP, PA) and findings (words separated by |; empty: not labelled), where
known sex (M, F) and age; with `--labelled nih` only rows whose column source is `nih` count as labelled. The patients
of labelled films are split into five folds. A run pretrains on all films but those of the patients of one fold, probes
on the labelled films of the others (all, and a tenth of the patients), and is scored on the fold's: findings with at
least 30 films, among AP films and among PA films where five of them have it and five do not, averaged; sex; view. So
all five runs of a setting have their own test patients, training and heads, but they share train films: the intervals
are Student's t over the folds with the variance that Nadeau and Bengio (2003) correct for that.

What it is compared with is run once per network and fold, beside the first setting: random weights, raw pixels, and
training of all weights from the labels, in as many steps as pretraining, kept at the best of validation. Each run adds
its rows to `--rows` (OUT/rows.csv); what has rows there is skipped, so the same command resumes, on any machine. It
ends with the tables of all rows so far. `--rows benchmarks/real_films.csv` are those of docs/evidence.md; rows of
another films table are refused. A setting takes one core 15 to 40 minutes where it has bf16, two to three times as
long elsewhere; `time` and `methods` (16 settings) about five hours each.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml
from scipy import stats
from sklearn.metrics import roc_auc_score

from configs import UserError, cli
from ehr_features.files import file_digest
from ehr_features.own_films.ids import film_ids
from ehr_features.typed import read_json
from finetune.demo import CONFIGS
from finetune.results import read_predictions

FOLDS, LEAST, LEAST_TESTED = 5, 30, 5  # films with a finding: of all, and of a fold's AP or PA films
SHARES = (1.0, 0.1)
ROWS = Path(__file__).with_name("real_films.csv")
SETTING = ["method", "network", "record", "films", "steps"]
SCORES = ["findings", "sex", "view"]
COLUMNS = [*SETTING, "fold", "source", "share", *SCORES, "seconds", "precision", "table"]
NETWORKS = {  # the demo's recipe with each network, at 64 px
    "resnet": [],
    "vit": [
        "encoder.arch=vit_small_patch16_224",
        "encoder.model_args={patch_size: 8, embed_dim: 96, depth: 4, num_heads: 3}",
    ],
    "densenet": [
        "encoder.arch=densenet121",
        "encoder.model_args={growth_rate: 24, block_config: [2, 3, 4, 3], stem_type: deep}",
    ],
}
METHODS = ("simclr", "msn", "vicreg", "dino")  # their keys: of demo/grid_methods
RECORDS = {
    "off": ["ehr.groups=[]"],
    "condition": ["ehr.groups=[sex,age]", "ehr.use=condition"],
    "predict": ["ehr.groups=[sex,age]", "ehr.use=predict", "ehr.predict_weight=5"],
    "permuted": ["ehr.groups=[sex,age]", "ehr.use=predict", "ehr.predict_weight=5", "ehr.permuted=true"],
}
BASE: dict[str, Any] = {
    "method": "simclr",
    "network": "resnet",
    "record": "off",
    "films": 0,  # all
    "steps": 1000,
}
TABLES: dict[str, list[dict[str, Any]]] = {
    "networks": [{"network": name} for name in NETWORKS],
    "films": [{"films": n} for n in (500, 1000, 2000, 0)],
    "time": [{"steps": n} for n in (1000, 4000, 15000)],  # about 2, 8 and 30 minutes of one core
    "record": [{"record": name} for name in RECORDS],
    "methods": [{"method": name, "record": use} for name in METHODS for use in RECORDS],
}
OURS, RIVALS = "pretrained", ("random weights", "raw pixels", "from scratch")
SCRATCH_STEPS, BATCH = 1000, 64  # of training all weights from the labels: as many as of pretraining


def read_films(path: Path, partition: int = 0, labelled: str | None = None) -> pd.DataFrame:
    """The table with `labelled`, 0/1 columns (findings of at least LEAST labelled films, `male`, `ap`) and `fold` (-1:
    a patient without labelled films).

    Raises: UserError: no such column; no finding to probe; one that is named as a column.
    """
    films = pd.read_csv(path, dtype={"patient": str, "source": str, "findings": str})
    wanted = {"path", "patient", "view", "findings"} | ({"source"} if labelled else set())
    if absent := sorted(wanted - {*films}):
        raise UserError(f"{path}: no column {', '.join(absent)}; it has {', '.join(films)}")
    has = films["findings"].notna() & films["patient"].notna()
    films["labelled"] = has & (films["source"] == labelled) if labelled else has
    words = films["findings"].str.get_dummies("|")[films["labelled"]]
    names = [name for name in words if name != "No Finding" and words[name].sum() >= LEAST]
    if not names:
        of = f" of source {labelled}" if labelled else ""
        raise UserError(f"{path}: of its {films['labelled'].sum()} labelled films{of}, no finding has {LEAST} or more")
    known = films.reindex(columns=["sex", "view"])
    columns = words[names].reindex(films.index)
    columns["male"], columns["ap"] = known["sex"].map({"M": 1, "F": 0}), known["view"].map({"AP": 1, "PA": 0})
    if same := sorted({*names} & {*films, "male", "ap"}):
        raise UserError(f"{path}: its findings {', '.join(same)} are names of columns too; rename them")
    films = films.join(columns.where(films["labelled"]).astype("Int8").dropna(axis=1, how="all"))
    films["fold"] = films["patient"].map(folds(films[films["labelled"]], partition)).fillna(-1).astype(int)
    return films


def folds(films: pd.DataFrame, partition: int) -> pd.Series:
    """Patient -> fold, of about equally many films."""
    sizes = films.groupby("patient").size().sample(frac=1, random_state=partition)
    return ((sizes.cumsum() - 1) * FOLDS // len(films)).astype(int)


def tables_of_a_fold(
    films: pd.DataFrame, fold: int, count: int, folder: Path, root: Path
) -> tuple[list[str], list[str]]:
    """Write what pretraining reads and what the probe reads. Returns: the keys that name them."""
    folder.mkdir(parents=True, exist_ok=True)
    patients = films.loc[films["fold"] >= 0, "patient"].drop_duplicates().sample(frac=1, random_state=fold)
    val = set(patients[: len(patients) // 10])
    split = (
        pd.Series("train", index=films.index)
        .mask(films["patient"].isin(val), "val")
        .mask(films["fold"] == fold, "test")
    )
    given = films[films.columns.intersection(["path", "patient", "sex", "age", "age_years", "view"])].assign(
        split=split
    )
    train = given.index[split == "train"]
    kept = train if not count else train.to_series().sample(count, random_state=fold)
    given.loc[(split != "train") | given.index.isin(kept)].to_csv(folder / "pretrain.csv", index=False)
    labels = label_columns(films)
    probed = films[["path", "patient", "view", *labels]].assign(split=split)[films["labelled"]]
    probed.to_csv(folder / "probe.csv", index=False)
    common = [f"films.images={root}", "films.path=path", "films.subject=patient", "features=null"]
    one = [*common, f"films.table={folder / 'pretrain.csv'}"]
    return one, [
        *common,
        f"films.table={folder / 'probe.csv'}",
        f"films.columns={json.dumps(labels)}",
        "films.split=split",
    ]


def method_keys(name: str) -> list[str]:
    """What `demo/grid_methods` sets for a method."""
    arms = yaml.safe_load((CONFIGS / "grid_methods.yaml").read_text())["axes"]["method"]
    keys: list[str] = arms[name].get("pretrain", [])
    return keys


def label_columns(films: pd.DataFrame) -> list[str]:
    """The findings, then male and ap, where known."""
    return list(films)[list(films).index("labelled") + 1 : -1]


def scores(films: pd.DataFrame, run: Path) -> dict[str, float]:
    """AUROC on the test films: findings (macro within AP and within PA, averaged), sex, view. NaN: too few films."""
    ids, _, logits = read_predictions(run, "test")
    films = films[films["labelled"]]
    films = films.set_index(film_ids(films["path"])).loc[ids["dicom_id"]].reset_index(drop=True)
    found: dict[str, list[float]] = {name: [] for name in SCORES}
    for name in logits.columns[logits.notna().all()]:  # NaN: few patients, of whom none or all have it
        kind = {"male": "sex", "ap": "view"}.get(name, "findings")
        within = [films["ap"].eq(view).fillna(False) for view in (0, 1)]
        for among in within if kind == "findings" else [films[name].notna()]:
            truth = films.loc[among, name].to_numpy(int)
            if min(truth.sum(), len(truth) - truth.sum()) >= LEAST_TESTED:
                found[kind].append(float(roc_auc_score(truth, logits.loc[among, name])))
    return {kind: round(float(np.mean(values)), 4) if values else np.nan for kind, values in found.items()}


def sources(setting: dict[str, Any]) -> tuple[str, ...]:
    """What is probed of a setting."""
    return (OURS, *RIVALS) if setting == BASE | {"network": setting["network"]} else (OURS,)


def run(
    out: Path, films: pd.DataFrame, root: Path, setting: dict[str, Any], fold: int, wanted: Sequence[str]
) -> list[dict[str, Any]]:
    """Probe `wanted` of a setting's sources on a fold, pretraining before. Returns: a row for each share of labelled
    patients."""
    folder = out / ("-".join(str(setting[k]) for k in SETTING) + f"-fold{fold}")
    pretraining, probing = tables_of_a_fold(films, fold % FOLDS, setting["films"], folder, root)
    keys = [
        *method_keys(setting["method"]),
        *NETWORKS[setting["network"]],
        *RECORDS[setting["record"]],
        "encoder.image_size=64",
        "readability=false",
        "films.positives=film",
        f"optim.steps={setting['steps']}",
        f"seed={fold}",
    ]
    encoder, made = folder / "pretrained", []
    if OURS not in wanted:  # the network alone: rivals see nothing of its training
        encoder, keys = folder / "network", [*keys, "optim.steps=1", "optim.warmup_steps=0"]
    call("pretrain", "demo/pretrain_resnet", *pretraining, f"store={out / 'store'}", *keys, f"out={encoder}")
    about = read_json(encoder / "encoder" / "encoder.json")
    specs = dict(zip((OURS, *RIVALS), (encoder, f"random:{encoder}", "pixels", f"random:{encoder}"), strict=True))
    for source, spec in ((source, specs[source]) for source in wanted):
        for share in SHARES:
            probe = folder / f"{source.replace(' ', '_')}_{share:g}"
            method = ["method=logistic"]
            if source == RIVALS[2]:
                train = (pd.read_csv(folder / "probe.csv")["split"] == "train").sum()
                epochs = -(-SCRATCH_STEPS // max(1, int(share * train) // BATCH))
                method = ["method=finetune", f"tune.epochs={epochs}", f"tune.patience={max(1, epochs // 4)}"]
            given = [
                *probing,
                f"store={out / 'store'}",
                f"encoder={spec}",
                *method,
                f"fraction={share}",
                f"seed={fold}",
            ]
            call("probe", "own_films/probe", *given, f"out={probe}")
            row = {**setting, "fold": fold, "source": source, "share": share, **scores(films, probe)}
            made.append(row | {"seconds": round(about["processor_seconds"]), "precision": about["precision"]})
    return made


def pack(films: Path, store: Path, root: Path) -> None:
    """Pack the films, once."""
    if not (store / "store.json").is_file():
        call("images", "own_films/images", f"films={films}", f"root={root}", f"out={store}", "size=96")


def call(command: str, config: str, *keys: str) -> None:
    """Run a command of the product with a shipped config, on one core."""
    words = [sys.executable, "-P", "-m", "configs", command, str(CONFIGS.parent / f"{config}.yaml"), *keys]
    subprocess.run(words, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL)


def read_rows(path: Path, columns: Sequence[str]) -> pd.DataFrame:
    """The rows of a CSV so far. Raises: UserError: it has other columns, as that of another release."""
    if not path.is_file():
        return pd.DataFrame(columns=list(columns))
    rows = pd.read_csv(path, dtype={"data": str})
    if list(rows) != list(columns):
        raise UserError(f"{path}: has columns {', '.join(rows)}; wanted {', '.join(columns)}: begin another file")
    return rows


def append(path: Path, rows: Sequence[dict[str, Any]], columns: Sequence[str]) -> None:
    """Add rows to a CSV that other processes may add to as well."""
    pd.DataFrame(rows)[list(columns)].to_csv(path, mode="a", header=not path.is_file(), index=False)


def table(rows: pd.DataFrame, settings: Sequence[dict[str, Any]], share: float) -> str:
    """Findings within view of each setting, ours minus each rival and minus the first setting over the folds; sex and
    view."""
    columns = ["pretraining", "folds", OURS, *(f"minus {rival}" for rival in RIVALS), "minus the first", "sex", "view"]
    lines, first = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"], None
    for setting in settings:
        network = {"network": setting.get("network", BASE["network"])}
        mine, rivals = of(rows, BASE | setting, share), of(rows, BASE | network, share)
        if not len(mine):
            continue
        among = pd.concat([mine[mine["source"] == OURS], rivals[rivals["source"] != OURS]])
        by = {name: among.pivot(index="fold", columns="source", values=name) for name in SCORES}
        ours = by["findings"][OURS].dropna()
        others = [by["findings"].get(rival, ours * np.nan) for rival in RIVALS]
        gaps = [
            gap((ours - other).dropna(), len(ours)) for other in (*others, ours * np.nan if first is None else first)
        ]
        says = ", ".join(f"{k} {v or 'all'}" for k, v in setting.items())
        cells = [says, f"{len(ours)}", f"{ours.mean():.3f}", *gaps, *(f"{by[n][OURS].mean():.3f}" for n in SCORES[1:])]
        lines.append("| " + " | ".join(cells) + " |")
        first = ours if first is None else first
    return "\n".join(lines)


def of(rows: pd.DataFrame, setting: dict[str, Any], share: float) -> pd.DataFrame:
    """The rows of one setting and share."""
    return rows[(rows[SETTING] == pd.Series(setting)[SETTING]).all(axis=1) & (rows["share"] == share)]


def gap(differences: pd.Series, folds: int) -> str:
    """The mean with its 95% interval, and the number of folds where it is not `folds`."""
    if differences.empty:
        return ""
    mean, low, high = interval(differences)
    says = f"{mean:+.3f}" if len(differences) < 2 else f"{mean:+.3f} ({low:+.3f} to {high:+.3f})"
    return says if len(differences) == folds else f"{says}, {len(differences)} folds"


def interval(differences: pd.Series) -> tuple[float, float, float]:
    """Mean, low and high of a difference over folds. Runs on folds share train films, so that their variance is too
    small by the share of test to train films (Nadeau and Bengio 2003)."""
    n = len(differences)
    half = stats.t.ppf(0.975, n - 1) * differences.std() * (1 / n + 1 / (FOLDS - 1)) ** 0.5
    return differences.mean(), differences.mean() - half, differences.mean() + half


def main() -> None:
    """Run what is missing, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", metavar="OUT", type=Path)
    parser.add_argument("--films", type=Path, required=True, metavar="CSV")
    parser.add_argument("--root", type=Path, metavar="DIR", help="of its paths (default: the table's folder)")
    parser.add_argument("--tables", nargs="*", choices=list(TABLES), default=list(TABLES), help="(default: all)")
    parser.add_argument(
        "--folds",
        type=int,
        nargs="+",
        default=list(range(FOLDS)),
        help="(default: 0 to 4; 5 to 9 are another partition)",
    )
    parser.add_argument("--labelled", metavar="SOURCE", help="films of which source count as labelled (default: all)")
    parser.add_argument("--rows", type=Path, metavar="CSV", help="(default: OUT/rows.csv)")
    args = parser.parse_args()
    path, mine = args.rows or args.out / "rows.csv", f"{file_digest(args.films)} {args.labelled or ''}".strip()
    rows = read_rows(path, COLUMNS)
    if others := set(rows["table"]) - {mine}:
        raise UserError(
            f"{path}: has rows of another films table ({', '.join(others)}, not {mine}); give another --rows"
        )
    films = {part: read_films(args.films, part, args.labelled) for part in {fold // FOLDS for fold in args.folds}}
    root = args.root or args.films.parent
    pack(args.films, args.out / "store", root)
    settings = [BASE | each for name in args.tables for each in TABLES[name]]
    for setting, fold in itertools.product(settings, args.folds):
        there = rows[(rows[SETTING] == pd.Series(setting)[SETTING]).all(axis=1) & (rows["fold"] == fold)]
        if wanted := [source for source in sources(setting) if source not in set(there["source"])]:
            made = run(args.out, films[fold // FOLDS], root, setting, fold, wanted)
            append(path, [row | {"table": mine} for row in made], COLUMNS)
            rows = read_rows(path, COLUMNS)
    for name in TABLES:
        for share in SHARES:
            print(f"\n{name}, {share:.0%} of patients labelled\n\n{table(rows, TABLES[name], share)}")


if __name__ == "__main__":
    sys.exit(cli.guard(main, signals=True))
