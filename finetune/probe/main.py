"""`probe`: how well findings can be predicted from an encoder's features.

Input: labelled films (features/ and store/, or a public data set) and an encoder. Output: runs/X/ with results.json,
predictions/, the head if there is one, and a table on the screen. Validation chooses; the test split is read once, at
the end.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from configs import UserError, load
from configs.loader import Given
from ehr_features.files import read_table
from ehr_features.schema import HELD_OUT
from finetune.config import ProbeConfig, seed_list
from finetune.encoders import Frozen, film_features, open_encoder, store_warnings
from finetune.guard import NOTHING, Seen, check_encoder
from finetune.labelled import Films, Part, check_splits, folded, fraction_rows
from finetune.layouts import open_films, radiologists
from finetune.metrics import f1_thresholds, without_value
from finetune.probe import evaluation, transfer
from finetune.probe.evaluation import Scored, check_fields, score, scored, subgroups
from finetune.probe.methods import Fitted, Learner, Rows, grid, learned_only, on_features, record
from finetune.probe.shift import in_a_line, shift, sides
from finetune.results import TRACKING, headline, write_results
from finetune.run_folders import report_line
from pretrain import run


class Through(NamedTuple):
    """The encoder of a probe: its name, its description for comparisons, and what its pretraining saw."""

    name: str
    about: Mapping[str, Any]
    seen: Seen
    said: str = ""  # see Frozen


def probe(config: ProbeConfig | Given, args: argparse.Namespace | None = None) -> Path:
    """Fit a probe and score it.

    Args:
        config: a ProbeConfig, its keys in a dict, a YAML file, or the name of a shipped one.
        args: command-line arguments, for the number of processes.
    Returns: the run folder.
    Raises: UserError: an encoder that saw the test subjects, missing films or labels, another run in `out`.
    """
    config = load(ProbeConfig, config)
    began = time.monotonic()
    tuned = config.method in ("finetune", "attentive")
    if not tuned and run.check_world(args) > 1:
        raise UserError(f"method={config.method} runs in one process; start it with --processes 1")
    run.check_trackers(config.trackers)
    run.check_precision(config.precision, cpu=not torch.accelerator.is_available())
    accelerator = (
        run.accelerator(args, limit=config.process_timeout, mixed_precision=config.precision) if tuned else None
    )
    films, store = open_films(config)
    if config.method != "transfer" and not config.folds:
        check_splits(films)
    check_asked(config, films)
    device = str(accelerator.device) if accelerator else "cuda" if torch.cuda.is_available() else "cpu"
    frozen, through = _through(config, films, store, device, tuned)
    sources = [Path(config.features) / "images.parquet"] if config.features else [Path(config.films.table)]  # type: ignore[union-attr]
    folder = run.open_run(config.out, config, sources=sources, may_differ=["cache", *TRACKING])
    run.needs(config.features, config.store)
    if run.complete(folder):
        return folder
    log = run.open_log(folder, config, accelerator)
    log.say(evaluation.plan(config, films, through.name))
    if through.said:
        log.say(through.said)
    for line in () if films.own is None else films.own.said:
        log.say(line)
    warnings = [*through.seen.warnings, *films.warnings]
    for warning in warnings:
        log.say(f"warning: {warning}")
    each: dict[int, pd.DataFrame] = {}
    if config.method == "transfer":
        assert frozen is not None and store is not None
        rows, more = transfer.apply(config, films, frozen, store, folder)
    else:
        learn = _learner(config, films, frozen, store, folder, log, accelerator, device)
        rows, more, each = evaluate(config, films, learned_only(config, films, learn), folder, through.about)
    for warning in without_value(rows):
        log.say(f"warning: {warning}")
    if run.is_main():
        said = about(config, films, through, {**more, "warnings": [*warnings, *without_value(rows)]})
        write_results(folder, said, rows)
        log.track(headline(rows), 0, "results")
        for seed, own in each.items():
            write_results(folder / f"seed_{seed}", said | {"seed": seed, "seeds": 1}, own)
        evaluation.table(rows, f"{config.method} probe of {through.name}, test split, by {config.unit}")
        for line in evaluation.notes(more):
            log.say(line)
    log.close()
    run.finish(folder, seconds=round(time.monotonic() - began, 1))
    log.say(f"{folder}: results.json, predictions/ ({time.monotonic() - began:.0f} s)")
    log.say(f"next: {report_line(folder)}")
    return folder


def check_asked(config: ProbeConfig, films: Films) -> None:
    """Check that the requested outputs are possible before hours are spent. Raises: UserError."""
    check_fields(config.subgroups, films.table)
    if config.shift is not None:
        sides(config.shift, films)
    if config.radiologists is not None:
        radiologists(config.radiologists, films)


def _through(config: ProbeConfig, films: Films, store: Any, device: str, tuned: bool) -> tuple[Frozen | None, Through]:
    """The frozen encoder (None if the method trains it, or uses no film), and its description."""
    if config.encoder == "metadata":
        about = {"hash": None, "parameters": 0, "image_size": 0, "films_seen": 0, "weights": "none"}
        return None, Through(f"metadata ({', '.join(config.groups)})", about, NOTHING)
    weights, seen = config.weights, NOTHING
    pools = config.pools if config.head is None else transfer.load(config.head)[0].names
    given: dict[str, Any] = {"pixels": config.pixels, "device": device, "weights": weights, "pools": pools}
    frozen = open_encoder(config.encoder, seed=config.seed, **given)
    if frozen.folder is not None:
        subjects = (films.table if films.own is None else films.own.films)[["subject_id", "split"]]
        if config.features:
            subjects = read_table(config.features, "images", ["subject_id", "split"])
        if config.folds:  # with folds every subject is tested
            subjects = films.table[["subject_id"]].assign(split="test")
        seen = check_encoder(
            frozen.folder,
            subjects,
            features=config.features,
            own=films.own,
            labels=films.names,
            allow_leak=config.allow_leak,
            same_source=bool(config.features),
            other_people=config.other_people,
            card=frozen.card,
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
    fits, last = 0, math.inf

    def say(epoch: int, value: float) -> None:
        nonlocal fits, last
        fits, last = fits + (epoch <= last), epoch  # a draw, fold or seed begins anew
        log.log({"epoch": epoch, "val/auroc/macro": value}, epoch, "" if fits == 1 else f"fits/{fits - 1}")

    if config.encoder == "metadata":
        return on_features(config, films, lambda rows: record(config, films, rows), device, say)
    if frozen is None:
        from finetune.probe.tune import through_encoder

        return through_encoder(config, films, store, folder, log, accelerator)
    cache = Path(config.cache) if config.cache else folder.parent / "cache"
    features = film_features(frozen, store, films.table["dicom_id"].tolist(), cache=cache)
    return on_features(config, films, features, device, say)


class Trained(NamedTuple):
    """The fits of one seed: one, or one per fold."""

    parts: list[Part]
    fits: list[Fitted]

    def predict(self, split: str) -> tuple[Rows, NDArray[np.float64]]:
        """Rows and logits; a label that any fold did not learn is NaN in all."""
        rows: list[Rows] = [getattr(part, split) for part in self.parts]
        logits = np.concatenate([fit.predict(own) for fit, own in zip(self.fits, rows, strict=True)])
        order = np.argsort(np.concatenate(rows), kind="stable")
        return np.concatenate(rows)[order], np.where(np.isnan(logits).any(0), np.nan, logits)[order]

    @property
    def unlearned(self) -> dict[str, str]:
        return {name: why for fit in self.fits for name, why in fit.unlearned.items()}


def evaluate(
    config: ProbeConfig, films: Films, learn: Learner, folder: Path, through: Mapping[str, Any]
) -> tuple[pd.DataFrame, dict[str, Any], dict[int, pd.DataFrame]]:
    """Fit all fractions, then score val and, once, test; subgroups and shift use the largest fraction.

    Returns: rows, further entries of results.json, and the rows of each seed if there are several.
    """
    fits, said = fitted(config, films, learn)
    more: dict[str, Any] = {"fractions": said}
    asked: dict[str, Any] = {"samples": config.samples, "seed": config.seed}
    tables = []
    for fraction in config.fractions:
        trained = fits[fraction]
        on, given = rated(config, films, trained)
        given |= asked
        for split, of in on.items():
            tables.append(score(of, **given).assign(split=split, subset="all", fraction=fraction))
            if fraction != config.fractions[-1] and run.is_main():
                for i in range(len(trained)):
                    of.write(folder / f"fraction_{fraction:g}" / f"draw_{i}", split, i)
    each = {}
    for i, seed in enumerate(config.every_seed if len(config.every_seed) > 1 else ()):
        own, own_given = rated(config, films, trained[i : i + 1])
        parts = [score(of, **own_given, **asked).assign(split=split) for split, of in own.items()]
        each[seed] = pd.concat(parts, ignore_index=True).assign(subset="all", fraction=fraction)
    if run.is_main():
        for split, of in on.items():
            of.write(folder, split)
            for i, seed in enumerate(each):
                of.write(folder / f"seed_{seed}", split, i)
    best, cut = trained[0].fits[0], given["thresholds"]
    if best.head is not None and not config.folds:
        transfer.save(folder, config, films.names, best, cut[0], through["hash"])
    if best.export is not None and not config.folds and run.is_main():
        best.export(folder)
    if config.radiologists is not None:
        read, more["radiologists"] = by_radiologists(config, films, [of.fits[0] for of in trained], cut)
        tables.append(read.assign(split="test_radiologist", subset="all", fraction=fraction))
    if config.subgroups:
        groups, more["gaps"] = subgroups(on["test"], config.subgroups, **given)
        tables.append(groups.assign(split="test", fraction=fraction))
    if config.shift is not None:
        across, more["shift"] = shift(config, films, learn)
        more["shift"]["says"] = in_a_line(more["shift"])
        tables.append(across.assign(fraction=1.0))
    return pd.concat(tables, ignore_index=True), more, each


def fitted(
    config: ProbeConfig, films: Films, learn: Learner
) -> tuple[dict[float, list[Trained]], list[dict[str, Any]]]:
    """The fits of each fraction, and their entries in results.json."""
    found: dict[float, list[Trained]] = {}
    said = []
    for fraction in config.fractions:
        least = config.repeats if fraction < 1 else 1
        for draw, seed in enumerate(seed_list(config.seed, config.seeds, least)):
            whole = Part(films.rows("train"), films.rows("val"), films.rows("test"))
            trained = Trained(folded(films, config.folds, seed) if config.folds else [whole], [])
            found.setdefault(fraction, []).append(trained)
            for fold, part in enumerate(trained.parts):
                rows = fraction_rows(films, part.train, fraction, seed)
                trained.fits.append(learn(rows, part.val, seed))
                subjects = int(films.table["subject_id"].iloc[rows].nunique())
                told = {"fraction": fraction, "draw": draw, "films": len(rows), "subjects": subjects}
                said.append(told | ({"fold": fold} if config.folds else {}) | trained.fits[-1].chosen)
    return found, said


def rated(config: ProbeConfig, films: Films, trained: Sequence[Trained]) -> tuple[dict[str, Scored], dict[str, Any]]:
    """Val and test predictions of each training; thresholds (runs, L) with the largest F1 on val, and `reasons`.

    Folds have no threshold: each head would need its own.
    """
    on = {}
    for split in HELD_OUT:
        found = [of.predict(split) for of in trained]
        on[split] = scored(films, found[0][0], np.stack([logits for _, logits in found]), unit=config.unit)
    reasons = {name: why for of in trained for name, why in of.unlearned.items()}
    val = on["val"]
    cut = None if config.folds else np.stack([f1_thresholds(val.labels, p) for p in val.runs])
    return on, {"thresholds": cut, "reasons": reasons}


def by_radiologists(
    config: ProbeConfig, films: Films, fits: Sequence[Fitted], cut: NDArray[np.float64]
) -> tuple[pd.DataFrame, dict[str, Any]]:
    """The test films with the radiologists' labels of MIMIC-CXR 2.1.0, over the labels in that file."""
    theirs = radiologists(str(config.radiologists), films)
    place = [films.names.index(name) for name in theirs.names]
    logits = np.stack([fit.predict(theirs.table["row"].to_numpy(np.intp))[:, place] for fit in fits])
    on = scored(theirs, np.arange(len(theirs)), logits, unit="study")
    says = {"studies": len(on.table), "without": [name for name in films.names if name not in theirs.names]}
    reasons = fits[0].unlearned
    return score(on, samples=config.samples, seed=config.seed, thresholds=cut[:, place], reasons=reasons), says


def about(config: ProbeConfig, films: Films, through: Through, more: Mapping[str, Any]) -> dict[str, Any]:
    """`run` of results.json."""
    counts = films.table.groupby("split").agg(films=("dicom_id", "size"), subjects=("subject_id", "nunique"))
    return {
        "task": "findings",
        "model": config.method,
        "encoder": through.name,
        "seed": config.seed,
        "allow_leak": config.allow_leak,
        "seeds": len(config.every_seed),
        "folds": config.folds,
        "unit": config.unit,
        "pretraining_films": through.seen.films,
        "supervision": through.seen.supervision,
        "guard": through.seen.compared,
        "compared_by": dict(through.about),
        "grid": grid(config),
        "splits": {} if config.folds else counts.to_dict("index"),
        "left_out": films.left_out,
        "labels": {
            "training": {
                "uncertain": config.uncertain,
                "missing": config.empty or films.empty,
                "class_weights": config.class_weights,
            },
            "evaluation": {"uncertain": "ignore", "missing": films.empty},
            "views": config.views,
        },
        **more,
    }
