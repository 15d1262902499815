"""`probe`: how much of the findings an encoder's features hold.

Comes in: labelled films (features/ and store/, or a public data set) and an encoder. Goes out: runs/X/ with
results.json, predictions/, the head where there is one, and a table on the screen. Validation chooses; the test split
is read once, at the end.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch

from configs import UserError, load
from configs.commands import command_line
from configs.loader import Given
from ehr_features.files import read_table
from ehr_features.schema import HELD_OUT
from finetune.config import ProbeConfig
from finetune.encoders import Frozen, film_features, open_encoder, store_warnings
from finetune.guard import NOTHING, Seen, check_encoder
from finetune.labelled import Films, check_splits, fraction_rows
from finetune.layouts import open_films, radiologists
from finetune.metrics import f1_thresholds
from finetune.probe import evaluation, transfer
from finetune.probe.evaluation import check_fields, score, scored, subgroups
from finetune.probe.methods import Fitted, Learner, grid, on_features, record
from finetune.probe.shift import in_a_line, shift, sides
from finetune.results import write_results
from pretrain import run


class Through(NamedTuple):
    """What films are seen through: its name, what a comparison says of it, and what its pretraining saw."""

    name: str
    about: Mapping[str, Any]
    seen: Seen
    said: str = ""  # see Frozen


def probe(config: ProbeConfig | Given, args: argparse.Namespace | None = None) -> Path:
    """Fit a probe and score it.

    Args:
        config: a ProbeConfig, its keys in a dict, a YAML file, or the name of a shipped one.
        args: the command line's, for the number of processes.
    Returns: the run folder.
    Raises: UserError: an encoder that saw the test subjects, films or labels that are not there, another run in `out`.
    """
    config = load(ProbeConfig, config)
    began = time.monotonic()
    tuned = config.method in ("finetune", "attentive")
    if not tuned and run.check_world(args) > 1:
        raise UserError(f"method={config.method} runs in one process; start it with --processes 1")
    accelerator = run.accelerator(args, mixed_precision=config.precision) if tuned else None
    with accelerator.main_process_first() if accelerator else nullcontext():  # one process packs
        films, store = open_films(config)
    if config.method != "transfer":
        check_splits(films)
    check_asked(config, films)
    device = str(accelerator.device) if accelerator else "cuda" if torch.cuda.is_available() else "cpu"
    frozen, through = _through(config, films, store, device, tuned)
    sources = [Path(config.features) / "images.parquet"] if config.features else [Path(config.films.table)]  # type: ignore[union-attr]
    folder = run.open_run(config.out, config, sources=sources, may_differ=["cache"])
    if run.complete(folder):
        return folder
    log = run.Log(folder, accelerator)
    log.say(evaluation.plan(config, films, through.name))
    if through.said:
        log.say(through.said)
    for warning in [*through.seen.warnings, *films.warnings]:
        log.say(f"warning: {warning}")
    if config.method == "transfer":
        assert frozen is not None and store is not None
        rows, more = transfer.apply(config, films, frozen, store, folder)
    else:
        learn = _learner(config, films, frozen, store, folder, log, accelerator, device)
        rows, more = evaluate(config, films, learn, folder, through.about)
    if run.is_main():
        write_results(folder, about(config, films, through, more), rows)
        evaluation.table(rows, f"{config.method} probe of {through.name}, test split, by {config.unit}")
        for line in evaluation.notes(more):
            log.say(line)
    run.finish(folder, seconds=round(time.monotonic() - began, 1))
    log.say(f"{folder}: results.json, predictions/ ({time.monotonic() - began:.0f} s)")
    log.say(f"next: {command_line('report', folder)}")
    return folder


def check_asked(config: ProbeConfig, films: Films) -> None:
    """That what is wanted at the end can be given, before hours are spent. Raises: UserError."""
    check_fields(config.subgroups, films.table)
    if config.shift is not None:
        sides(config.shift, films)
    if config.radiologists is not None:
        radiologists(config.radiologists, films)


def _through(config: ProbeConfig, films: Films, store: Any, device: str, tuned: bool) -> tuple[Frozen | None, Through]:
    """The frozen encoder (None where the method trains it, or sees no film), and what is known of it."""
    if config.encoder == "metadata":
        about = {"hash": None, "parameters": 0, "image_size": 0, "films_seen": 0, "weights": "none"}
        return None, Through(f"metadata ({', '.join(config.groups)})", about, NOTHING)
    weights, seen = config.weights, NOTHING
    frozen = open_encoder(config.encoder, seed=config.seed, pixels=config.pixels, device=device, weights=weights)
    if frozen.folder is not None:
        subjects = films.table[["subject_id", "split"]]
        if config.features:
            subjects = read_table(config.features, "images", ["subject_id", "split"])
        seen = check_encoder(
            frozen.folder,
            subjects,
            features=config.features,
            allow_leak=config.allow_leak,
            same_source=bool(config.features),
            other_people=config.other_people,
        )
    assert store is not None, "an encoder sees films"
    seen = replace(seen, warnings=[*seen.warnings, *store_warnings(frozen, store)])
    return None if tuned else frozen, Through(frozen.name, frozen.about, seen, frozen.said)


def _learner(
    config: ProbeConfig,
    films: Films,
    frozen: Frozen | None,
    store: Any,
    folder: Path,
    log: run.Log,
    accelerator: Any,
    device: str,
) -> Learner:
    def say(epoch: int, value: float) -> None:
        log.log({"epoch": epoch, "val/auroc/macro": value}, epoch)

    if config.encoder == "metadata":
        return on_features(config, films, record(config, films), device, say)
    if frozen is None:
        from finetune.probe.tune import through_encoder

        return through_encoder(config, films, store, folder, log, accelerator)
    cache = Path(config.cache) if config.cache else folder.parent / "cache"
    features = film_features(frozen, store, films.table["dicom_id"].tolist(), cache=cache)
    return on_features(config, films, features, device, say)


def evaluate(
    config: ProbeConfig, films: Films, learn: Learner, folder: Path, through: Mapping[str, Any]
) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Fit all fractions, then score val and, once, test; subgroups and shift of the largest fraction."""
    more: dict[str, Any] = {"fractions": []}
    fits: dict[float, list[Fitted]] = {}
    for fraction in config.fractions:
        for draw in range(config.repeats if fraction < 1 else 1):
            rows = fraction_rows(films, fraction, config.seed + draw)
            fits.setdefault(fraction, []).append(learn(rows, films.rows("val"), config.seed + draw))
            subjects = int(films.table["subject_id"].iloc[rows].nunique())
            said = {"fraction": fraction, "draw": draw, "films": len(rows), "subjects": subjects}
            more["fractions"].append(said | fits[fraction][-1].chosen)
    tables = [table for fraction in fits for table in _scored(config, films, fits[fraction], fraction)]
    largest = config.fractions[-1]
    best = fits[largest][0]
    cut = _thresholds(config, films, best)
    for split in HELD_OUT:
        on = scored(films, films.rows(split), best.predict(films.rows(split)), unit=config.unit)
        if run.is_main():
            on.write(folder, split)
    if best.head is not None:
        transfer.save(folder, config, films.names, best, cut, through["hash"])
    if best.export is not None and run.is_main():
        best.export(folder)
    if config.radiologists is not None:
        read, more["radiologists"] = by_radiologists(config, films, best, cut)
        tables.append(read.assign(split="test_radiologist", subset="all", fraction=largest))
    if config.subgroups:
        wanted, samples, seed = config.subgroups, config.samples, config.seed
        groups, more["gaps"] = subgroups(on, wanted, samples=samples, seed=seed, thresholds=cut)
        tables.append(groups.assign(split="test", fraction=largest))
    if config.shift is not None:
        across, more["shift"] = shift(config, films, learn)
        more["shift"]["says"] = in_a_line(more["shift"])
        tables.append(across.assign(fraction=1.0))
    return pd.concat(tables, ignore_index=True), more


def _scored(config: ProbeConfig, films: Films, fits: list[Fitted], fraction: float) -> list[pd.DataFrame]:
    """Rows of val and test: means over the draws, whose interval draws draws and subjects."""
    cuts = np.stack([_thresholds(config, films, fit) for fit in fits])
    tables = []
    for split in HELD_OUT:
        rows = films.rows(split)
        each = [scored(films, rows, fit.predict(rows), unit=config.unit) for fit in fits]
        runs = np.stack([one.probabilities for one in each])
        table = score(each[0], samples=config.samples, seed=config.seed, thresholds=cuts, runs=runs)
        tables.append(table.assign(split=split, subset="all", fraction=fraction))
    return tables


def _thresholds(config: ProbeConfig, films: Films, fit: Fitted) -> np.ndarray:
    """Of the largest F1 on val."""
    on = scored(films, films.rows("val"), fit.predict(films.rows("val")), unit=config.unit)
    return f1_thresholds(on.labels, on.probabilities)


def by_radiologists(
    config: ProbeConfig, films: Films, fit: Fitted, cut: np.ndarray
) -> tuple[pd.DataFrame, dict[str, Any]]:
    """The test films by the radiologists' labels of MIMIC-CXR 2.1.0, over the labels that they gave."""
    theirs = radiologists(str(config.radiologists), films)
    place = [films.names.index(name) for name in theirs.names]
    logits = fit.predict(theirs.table["row"].to_numpy(np.intp))[:, place]
    on = scored(theirs, np.arange(len(theirs)), logits, unit="study")
    says = {"studies": len(on.table), "without": [name for name in films.names if name not in theirs.names]}
    return score(on, samples=config.samples, seed=config.seed, thresholds=cut[place]), says


def about(config: ProbeConfig, films: Films, through: Through, more: Mapping[str, Any]) -> dict[str, Any]:
    """`run` of results.json."""
    counts = films.table.groupby("split").agg(films=("dicom_id", "size"), subjects=("subject_id", "nunique"))
    return {
        "task": "findings",
        "model": config.method,
        "encoder": through.name,
        "seed": config.seed,
        "allow_leak": config.allow_leak,
        "warnings": [*through.seen.warnings, *films.warnings],
        "unit": config.unit,
        "pretraining_films": through.seen.films,
        "supervision": through.seen.supervision,
        "guard": through.seen.compared,
        "compared_by": dict(through.about),
        "grid": grid(config),
        "splits": counts.to_dict("index"),
        "left_out": films.left_out,
        "labels": {
            "training": {"uncertain": config.uncertain, "missing": config.empty or films.empty},
            "evaluation": {"uncertain": "ignore", "missing": films.empty},
            "views": config.views,
        },
        **more,
    }
