"""`probe`: how much of the findings a frozen encoder's features hold.

Comes in: features/ (labels, split), store/ (films), an encoder. Goes out: runs/X/ with results.json, predictions/ and a
table on the screen. Validation chooses the head; the test split is read once, at the end.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from rich import box
from rich.console import Console
from rich.table import Table
from scipy.special import expit

from configs import UserError
from ehr_features.files import read_table
from finetune import classic, heads
from finetune.films import Films, check_splits, evaluation_labels, read_films, training_labels
from finetune.frozen import Features, Frozen, film_features, open_frozen
from finetune.guard import NOTHING, Seen, check_encoder
from finetune.heads import Data, Predict
from finetune.metrics import evaluate, f1_thresholds
from finetune.results import write_predictions, write_results
from pretrain import run
from pretrain.store import Store

if TYPE_CHECKING:
    from finetune.config import ProbeConfig


def probe(config: ProbeConfig, args: argparse.Namespace | None = None) -> Path:
    """Fit a probe and score it.

    Returns: the run folder.
    Raises: UserError: an encoder that saw the test subjects, films or labels that are not there, another run in `out`.
    """
    if run.check_world(args) > 1:
        raise UserError(f"method={config.method} runs in one process; start it with --processes 1")
    assert config.store is not None
    began = time.monotonic()
    store = Store(config.store)
    films = read_films(config.features, labels=config.labels, views=config.views).in_store(store)
    check_splits(films)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    frozen = open_frozen(config.encoder, seed=config.seed, pixels=config.pixels, device=device)
    subjects = read_table(config.features, "images", ["subject_id", "split"])
    seen = NOTHING
    if frozen.folder is not None:
        seen = check_encoder(frozen.folder, subjects, features=config.features, allow_leak=config.allow_leak)
    folder = run.open_run(config.out, config, sources=[Path(config.features) / "images.parquet"])
    if run.complete(folder):
        return folder
    log = run.Log(folder)
    log.say(_plan(config, films, frozen))
    for warning in seen.warnings:
        log.say(f"warning: {warning}")
    cache = Path(config.cache) if config.cache else folder.parent / "cache"
    features = film_features(frozen, store, films.table["dicom_id"].tolist(), cache=cache)
    predict, chosen = fit(config, films, features, log, device)
    rows = finish(folder, films, features, predict, samples=config.samples, seed=config.seed)
    write_results(folder, about(config, films, frozen, seen, chosen), rows)
    run.finish(folder, seconds=round(time.monotonic() - began, 1))
    show(rows, f"{config.method} probe of {frozen.name}, test split")
    log.say(f"{folder}: results.json, predictions/ ({time.monotonic() - began:.0f} s)")
    print(f"next: ./launch.sh report {folder}")
    return folder


def fit(
    config: ProbeConfig, films: Films, features: Features, log: run.Log, device: str
) -> tuple[Predict, dict[str, Any]]:
    """Train on train, choose on val."""
    rows = films.rows("train")
    labels = training_labels(films.labels.iloc[rows], uncertain=config.uncertain, missing=config.missing)
    train = Data({pool: value[rows] for pool, value in features.items()}, labels)
    rows = films.rows("val")
    val = Data({pool: value[rows] for pool, value in features.items()}, evaluation_labels(films.labels.iloc[rows]))
    if config.method == "logistic":
        return classic.logistic(train, val, pools=config.pools, strengths=config.strengths)
    if config.method == "knn":
        return classic.knn(train, val, pools=config.pools, neighbours=config.neighbours)
    return heads.linear(
        train,
        val,
        pools=config.pools,
        lrs=config.lrs,
        weight_decays=config.weight_decays,
        epochs=config.epochs,
        patience=config.patience,
        batch_size=config.batch_size,
        seed=config.seed,
        device=device,
        say=lambda epoch, value: log.log({"epoch": epoch, "val/auroc/macro": value}, epoch),
    )


def finish(
    folder: Path, films: Films, features: Features, predict: Predict, *, samples: int, seed: int
) -> pd.DataFrame:
    """Predict val and test, write the predictions, score them."""
    tables, cut = [], None
    for split in ("val", "test"):
        rows = films.rows(split)
        logits = predict({pool: value[rows] for pool, value in features.items()})
        labels = evaluation_labels(films.labels.iloc[rows])
        ids = films.table.iloc[rows][["dicom_id", "study_id", "subject_id", "view"]]
        write_predictions(folder, split, ids, pd.DataFrame(labels, columns=films.names), logits)
        cut = f1_thresholds(labels, expit(logits)) if cut is None else cut  # of val
        table = evaluate(
            labels,
            expit(logits),
            names=films.names,
            groups=ids["subject_id"].to_numpy(),
            samples=samples,
            seed=seed,
            thresholds=cut,
        )
        tables.append(table.assign(split=split))
    return pd.concat(tables, ignore_index=True)


def about(config: ProbeConfig, films: Films, frozen: Frozen, seen: Seen, chosen: Mapping[str, Any]) -> dict[str, Any]:
    """`run` of results.json."""
    counts = films.table.groupby("split").agg(films=("dicom_id", "size"), subjects=("subject_id", "nunique"))
    return {
        "task": "findings",
        "model": config.method,
        "encoder": frozen.name,
        "seed": config.seed,
        "allow_leak": config.allow_leak,
        "warnings": list(seen.warnings),
        "pretraining_films": seen.films,
        "supervision": seen.supervision,
        "compared_by": dict(frozen.about),
        "chosen": dict(chosen),
        "splits": counts.to_dict("index"),
        "left_out": films.left_out,
        "labels": {"training": {"uncertain": config.uncertain, "missing": config.missing}, "views": config.views},
    }


def show(rows: pd.DataFrame, title: str) -> None:
    """The test split on the screen."""
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", pad_edge=False)
    for name in ("label", "AUROC", "95% interval", "AUPRC", "prevalence", "films", "positive"):
        table.add_column(name, justify="left" if name == "label" else "right")
    test = rows[(rows["split"] == "test")]
    for label in dict.fromkeys(test["label"]):
        by = test[test["label"] == label].set_index("metric")
        row = by.loc["auroc"]
        if np.isnan(row["value"]):
            table.add_row(label, "-", str(row["reason"]), "", "", str(row["n"]), str(row["positives"]))
            continue
        interval = f"{row['low']:.3f} - {row['high']:.3f}" if not np.isnan(row["low"]) else "-"
        numbers = [f"{by.loc[m, 'value']:.3f}" for m in ("auprc", "prevalence")]
        table.add_row(label, f"{row['value']:.3f}", interval, *numbers, f"{row['n']:,}", f"{row['positives']:,}")
    Console(highlight=False).print(table)


def _plan(config: ProbeConfig, films: Films, frozen: Frozen) -> str:
    counts = ", ".join(f"{len(films.rows(split)):,} {split}" for split in ("train", "val", "test"))
    left = "".join(f"; {number:,} left out ({why})" for why, number in films.left_out.items())
    return f"{config.method} probe of {frozen.name} on {len(films.names)} findings: {counts} films{left}"
