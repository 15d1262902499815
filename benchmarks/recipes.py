"""A search for a small recipe: pretrainings with settings drawn at random, each with the same processor time.

    ./launch.sh python -m benchmarks.recipes OUT --films DIR/films.csv [--tries 0 16] [--seconds 150] [--best 4]

Each draw is trained on hospital 1; the best go on to hospital 2 and to real films (the patients of three of the five
folds of benchmarks.real_films, scored on one). Each training adds a row to OUT/recipes.csv: the keys that it set, and
the macro AUROC of its frozen encoder on the test split with all train subjects and with a tenth of them, beside raw
pixels and the same network's random weights. `--name NAME --keys ...` is one try by hand.

    ./launch.sh python -m benchmarks.recipes OUT --films DIR/films.csv --report try_3 [try_5 ...]

trains these tries again on hospitals 10 to 14 and on real films, scored on the patients of the two folds that chose
nothing. Rows that are there are skipped, so the same command resumes. benchmarks/recipes.csv has every try so far, and
is where `--report` finds a try that OUT does not have.
"""

from __future__ import annotations

import argparse
import random
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from benchmarks import real_films
from benchmarks.encoders import LAST_LAYER, hospital
from benchmarks.real_films import SHARES, append, call, pack, read_rows
from configs import UserError, cli
from ehr_features.typed import read_json
from finetune.demo import auroc_rows

COLUMNS = ["try", "data", "keys", "seconds", "steps", "auroc", "auroc_tenth", "pixels", "pixels_tenth"]
COLUMNS += ["random", "random_tenth"]
KEPT = (3, 4)  # folds of real patients that choose nothing
CHOOSE, REPORT = ["1", "2", "real 0"], [*map(str, range(10, 15)), *(f"real {fold}" for fold in KEPT)]
SHIPPED = Path(__file__).with_name("recipes.csv")
RESNET = "{layers: [1, 1, 1, 1], channels: [%d, %d, %d, %d], stem_type: deep, stem_width: %d}"
DENSE = "{growth_rate: %d, block_config: [2, 3, 4, 3], stem_type: %s}"
NETWORKS = {
    "resnet": ["encoder.arch=resnet18", "encoder.model_args=" + RESNET % (24, 48, 96, 192, 12)],
    "wide resnet": ["encoder.arch=resnet18", "encoder.model_args=" + RESNET % (32, 64, 128, 256, 16)],
    "densenet": ["encoder.arch=densenet121", "encoder.model_args=" + DENSE % (12, "''")],
    "densenet, deep stem": ["encoder.arch=densenet121", "encoder.model_args=" + DENSE % (24, "deep")],
    "vit, convolutional stem": [
        "encoder.arch=visformer_tiny",
        "encoder.model_args={init_channels: 16, embed_dim: 96, depth: [2, 2, 2], num_heads: 3}",
    ],
}
COMMON = ["views.ratio=[1,1]", "optim.lr_start=0", "optim.warmup_steps=30", "optim.betas=[0.9,0.98]"]
COMMON += ["optim.optimizer=adamw", "optim.weight_decay=0.04", "optim.weight_decay_end=0.04", "optim.lr_end=0.01"]
COMMON += ["optim.lr_batch=null", "optim.stretch=1", "optim.clip=3", "head.hidden=256", "log_every=50", "ehr.groups=[]"]


def draw(number: int) -> list[str]:
    """The keys of a try, drawn with its number as the seed."""
    pick = random.Random(number).choice
    method, size = pick(["msn", "msn", "simclr", "vicreg"]), pick([48, 64])
    low, focal = pick([0.1, 0.2, 0.3, 0.5]), pick([0, 0, 2, 4])
    network = pick(list(NETWORKS))
    if network.startswith("vit") or (network.startswith("densenet") and size == 48):
        focal = 0  # the first takes views of one size, and of 24 px the others leave no map
    keys = [f"method={method}", *NETWORKS[network]]
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
    keys += [f"films.positives={pick(['film', 'film', 'study'])}", f"films.views={pick(['frontal', 'frontal', 'all'])}"]
    keys += [f"films.per_subject_cap={pick(['null', 'null', 1])}"]  # 1: fewer films, each another patient's
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


@dataclass(frozen=True)
class Data:
    """Films to pretrain on, and how an encoder is scored on them."""

    pretraining: list[str]  # keys that name them
    own: list[str]  # keys that these films ask for, whatever a try says
    score: Callable[[str, Path], dict[float, float]]  # an encoder, a folder -> share of subjects: macro AUROC, test


def data(name: str, out: Path, subjects: int, films: Path | None, labelled: str | None = None) -> Data:
    """A hospital by its seed, or real films with a fold of their patients as test split: `real 0`."""
    if name.startswith("real"):
        if films is None:
            raise UserError(f"{name} needs --films")
        return _real(films, labelled, int(name.split()[1]), out)
    keys = hospital(out / f"hospital_{name}_{subjects}", subjects, int(name))

    def score(encoder: str, folder: Path) -> dict[float, float]:
        given = [f"encoder={encoder}", "method=logistic", "fraction=[0.1,1]", LAST_LAYER, f"out={folder}"]
        call("probe", "demo/probe_linear", *keys, *given)
        rows = {share: auroc_rows(folder, "all", share) for share in SHARES}
        return {share: next(r["value"] for r in rows[share] if r["label"] == "macro") for share in SHARES}

    return Data(keys, [], score)


def _real(films: Path, labelled: str | None, fold: int, out: Path) -> Data:
    known = real_films.read_films(films, labelled=labelled)
    if fold not in KEPT:
        known = known[~known["fold"].isin(KEPT)]
    store = out / "real_store"
    pack(films, store, films.parent)
    keys, probing = real_films.tables_of_a_fold(known, fold, 0, out / f"real_{fold}", films.parent)

    def score(encoder: str, folder: Path) -> dict[float, float]:
        found = {}
        for share in SHARES:
            given = [*probing, f"store={store}", f"encoder={encoder}", "method=logistic", f"fraction={share}"]
            call("probe", "own_films/probe", *given, f"out={folder / str(share)}")
            found[share] = real_films.scores(known, folder / str(share))["findings"]
        return found

    # Their table has no studies, and no view of the children's films.
    return Data([*keys, f"store={store}"], ["films.positives=film", "films.views=all"], score)


def attempt(out: Path, name: str, where: str, given: Data, keys: Sequence[str]) -> dict[str, Any]:
    """Pretrain and probe, the random weights too. Returns: the row of the table, without raw pixels."""
    run = out / f"{name}_{where.replace(' ', '_')}"
    call("pretrain", "demo/pretrain_vit_tiny", *COMMON, "seed=0", *keys, *given.pretraining, f"out={run / 'encoder'}")
    about = read_json(run / "encoder" / "encoder" / "encoder.json")
    row = {"try": name, "data": where, "keys": shlex.join(keys), "steps": about["step"]}
    row |= {"seconds": round(about["processor_seconds"])}
    row |= scored(given, str(run / "encoder"), run / "probe", "auroc")
    return row | scored(given, f"random:{run / 'encoder'}", run / "probe_random", "random")


def scored(given: Data, encoder: str, folder: Path, name: str) -> dict[str, float]:
    """The columns of a frozen encoder: its macro AUROC, and with a tenth of the train subjects."""
    found = given.score(encoder, folder)
    return {name: round(found[1.0], 4), f"{name}_tenth": round(found[0.1], 4)}


def best(rows: Sequence[dict[Any, Any]], where: str, count: int) -> list[str]:
    """The tries of largest AUROC on a data set."""
    mine = sorted((r for r in rows if r["data"] == where), key=lambda r: -r["auroc"])
    return [row["try"] for row in mine[:count]]


def main() -> None:
    """Run what is missing, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", metavar="OUT", type=Path)
    parser.add_argument("--films", type=Path, metavar="CSV", help="of real films, as in benchmarks.real_films")
    parser.add_argument("--labelled", metavar="SOURCE", help="of these, as in benchmarks.real_films")
    parser.add_argument("--data", nargs="+", default=CHOOSE, help="(default: hospitals 1 and 2, and `real 0`)")
    parser.add_argument("--subjects", type=int, default=2400)
    parser.add_argument("--tries", type=int, nargs=2, default=[0, 16], metavar=("FIRST", "END"), help="(default 0 16)")
    parser.add_argument("--seconds", type=float, default=150, help="of processor time for each try (default 150)")
    parser.add_argument("--best", type=int, default=4, help="tries that go on after the first data set (default 4)")
    parser.add_argument("--name", help="of one try by hand, with --keys")
    parser.add_argument("--keys", nargs="*", default=[], metavar="key=value")
    parser.add_argument("--report", nargs="+", metavar="TRY", help="tries to report on other hospitals and patients")
    args = parser.parse_args()
    if bool(args.name) != bool(args.keys):
        parser.error("--name and --keys are one try by hand, and go together")
    where = REPORT if args.report else args.data
    if not args.report and (kept := sorted({*where} & {*REPORT})):
        parser.error(f"--data {' '.join(kept)}: kept for --report, chooses nothing")
    if wrong := [name for name in where if not re.fullmatch(r"\d+|real \d", name)]:
        parser.error(f"--data {wrong[0]}: a hospital by its seed, or a fold of real patients as 'real 0'")
    if args.films is None and (real := [name for name in where if name.startswith("real")]):
        parser.error(f"{real[0]} needs --films")
    path = args.out / "recipes.csv"
    go_on(path, asked(args, read(path)), where, args)
    print(pd.DataFrame(read(path)).sort_values("auroc", ascending=False).drop(columns="keys").to_string(index=False))


def asked(args: argparse.Namespace, rows: Sequence[dict[Any, Any]]) -> dict[str, list[str]]:
    """The keys of each try that was asked for.

    Raises: UserError: no such try; one that the table has with other keys.
    """
    if args.report:
        first_last = reversed([*rows, *read(SHIPPED)])  # a later row may have keys of its data set as well
        known = {row["try"]: shlex.split(row["keys"]) for row in first_last}
        if absent := [name for name in args.report if name not in known]:
            raise UserError(f"--report {' '.join(absent)}: no such try in {args.out} or {SHIPPED.name}")
        return {name: known[name] for name in args.report}
    budget = [f"optim.processor_seconds={args.seconds}", "optim.steps=null"]
    tries = {args.name: args.keys} if args.name else {f"try_{i}": draw(i) for i in range(*args.tries)}
    given = {name: [*budget, *keys] for name, keys in tries.items()}
    for row in rows:
        if row["try"] in given and shlex.split(row["keys"])[: len(given[row["try"]])] != given[row["try"]]:
            raise UserError(f"{args.out}: has {row['try']} with other keys; choose another folder, or another --name")
    return given


def read(path: Path) -> list[dict[Any, Any]]:
    """The rows so far."""
    return read_rows(path, COLUMNS).to_dict("records")


def go_on(path: Path, tries: dict[str, list[str]], where: Sequence[str], args: argparse.Namespace) -> None:
    """Run what the table does not have, on one data set after the other."""
    for number, name in enumerate(where):
        given = data(name, args.out, args.subjects, args.films, args.labelled)
        pixels = scored(given, "pixels", args.out / f"pixels_{name.replace(' ', '_')}_{args.subjects}", "pixels")
        drawn = [row for row in read(path) if row["try"] in tries]
        going = list(tries) if args.report or args.name or not number else best(drawn, where[0], args.best)
        for each in going:
            if not any((row["try"], row["data"]) == (each, name) for row in read(path)):
                keys = [*tries[each], *given.own]
                append(path, [attempt(args.out, each, name, given, keys) | pixels], COLUMNS)


if __name__ == "__main__":
    sys.exit(cli.guard(main, signals=True))
