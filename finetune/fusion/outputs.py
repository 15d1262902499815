"""Outputs of a fusion run: results.json, predictions/, the weights; and its messages."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file

from configs import UserError
from ehr_features.files import new_file, read_table
from ehr_features.schema import HELD_OUT
from finetune import metrics, results
from finetune.config import FuseConfig
from finetune.fit import weights_of
from finetune.fusion.net import FilmBranch, Net
from finetune.fusion.samples import FILM_TASKS, RETROSPECTIVE, Samples, length_of_stay, macros
from finetune.labelled import AGE_BANDS, age_bands
from finetune.metrics import by_count, prevalence, thirds
from finetune.run_folders import report_line
from pretrain import encoder as encoders
from pretrain import run
from pretrain.seen import ancestry, write_seen
from pretrain.text.notes import summary


class Predictions(NamedTuple):
    """A net's predictions for samples, in their order, each once."""

    rows: NDArray[np.int64]  # (N,)
    logits: NDArray[np.float64]  # (N, L)
    weights: NDArray[np.float64] | None  # (N, 2 or 3) record, film (, note), for models that weight them


def write(
    folder: Path,
    samples: Samples,
    rows: dict[str, NDArray[np.int64]],
    trainings: list[dict[str, Predictions]],
    config: FuseConfig,
    about: dict[str, Any],
) -> pd.DataFrame:
    """Write predictions/ (of the first training) and results.json (means over trainings); returns the latter's rows."""
    table = samples.table
    if config.features is not None:
        ages = read_table(config.features, "stays", ["stay_id", "age_years"]).set_index("stay_id")["age_years"]
        table = table.assign(age_years=table["stay_id"].map(ages).astype(float))
    elif "age_years" not in table:
        table = table.assign(age_years=np.nan)
    named = [name for name in ("sample_id", "stay_id", "subject_id", "dicom_id") if name in table]
    absent = np.isin(samples.names, list(metrics.unlearned(samples.labels[rows["train"]], samples.names)))
    tables = []
    for split in trainings[0]:
        found = [training[split] for training in trainings]
        at = found[0].rows
        if split not in HELD_OUT:  # a test split with reduced inputs; its name is the subset
            chances = torch.from_numpy(np.stack([f.logits for f in found])).sigmoid().numpy()
            tables.append(_rate(samples, rows["train"], at, chances, config).assign(split="test", subset=split))
            continue
        ids = table.iloc[at][named].astype({"dicom_id": "string"}).assign(has_image=samples.has_image[at])
        if (weights := found[0].weights) is not None:
            ids[["weight_record", "weight_film", "weight_text"][: weights.shape[1]]] = weights
        labels = pd.DataFrame(samples.labels[at], columns=samples.names)
        results.write_predictions(folder, split, ids, labels, np.where(absent, np.nan, found[0].logits))
        chances = torch.from_numpy(np.stack([f.logits for f in found])).sigmoid().numpy()  # (trainings, N, L)
        chosen = subsets(table.iloc[at], samples.has_image[at], split)
        if config.task in FILM_TASKS and split == "test":
            counts = by_count(samples.names, samples.labels[at])
            chosen |= {name: keep for name, keep in counts.items() if keep.any()}
        for subset, keep in chosen.items():
            rated = _rate(samples, rows["train"], at[keep], chances[:, keep], config)
            tables.append(rated.assign(split=split, subset=subset))
    done = pd.concat(tables, ignore_index=True)
    keys = ("task", "model", "seed", "allow_leak", "pairing", "freeze", "film", "control")
    if config.task in FILM_TASKS:
        about = about | {"prevalence": prevalence(samples.names, samples.labels[rows["train"]])}
    retrospective = config.task in RETROSPECTIVE
    told = {
        **{key: getattr(config, key) for key in keys},
        "seeds": len(config.every_seed),
        "retrospective": retrospective,
        **about,
    }
    told["warnings"] = [*told["warnings"], *metrics.without_value(done)]
    results.write_results(folder, told, done)
    return done


def poorer(samples: Samples, has_films: bool, seed: int) -> dict[str, Samples]:
    """The samples with reduced inputs: no film, half of the films (drawn by seed), or a series that ends 6 or 24 h
    early."""
    steps = {h: round(h / samples.step_hours) for h in (6, 24)}
    out = {
        f"without the last {h} h": replace(samples, length=np.maximum(samples.length - n, 0)) for h, n in steps.items()
    }
    if has_films:
        half = np.random.default_rng([seed, 2]).random(len(samples)) < 0.5
        for name, lost in (("without films", np.ones_like(half)), ("without half of the films", half)):
            out[name] = replace(samples, films=np.where(lost[:, None], -1, samples.films))
    return out


def subsets(table: pd.DataFrame, has_image: NDArray[np.bool_], split: str) -> dict[str, NDArray[np.bool_]]:
    """All samples, and those with a film; for the test split also age bands and code status."""
    out = {"all": np.ones(len(table), bool), "paired": has_image}
    if split == "test":
        bands = age_bands(table["age_years"])
        out |= {f"age={band}": (bands == band).to_numpy(bool) for band in AGE_BANDS}
        for status in table["code_status"].dropna().unique() if "code_status" in table else ():
            out[f"code_status={status}"] = (table["code_status"] == status).to_numpy(bool, na_value=False)
        if len(out) > 6:
            out["code_status=not charted"] = table["code_status"].isna().to_numpy()
    return {name: keep for name, keep in out.items() if keep.any()}


def _rate(
    samples: Samples,
    train: NDArray[np.int64],
    at: NDArray[np.int64],
    chances: NDArray[np.float64],
    config: FuseConfig,
) -> pd.DataFrame:
    """Metrics of the given rows; chances (trainings, N, L)."""
    subjects = samples.table["subject_id"].to_numpy()[at]
    shares = prevalence(samples.names, samples.labels[train])
    reasons = metrics.unlearned(samples.labels[train], samples.names)
    table = metrics.evaluate(
        samples.labels[at],
        np.where(np.isin(samples.names, list(reasons)), np.nan, chances),
        names=samples.names,
        groups=subjects,
        samples=config.samples,
        seed=config.seed,
        macros=macros(samples.names) | (thirds(shares) if config.task in FILM_TASKS else {}),
        reasons=reasons,
    )
    if samples.hours_left is None:
        return table
    more = length_of_stay(samples, train, at, chances, subjects, config.samples, config.seed)
    return pd.concat([table, more], ignore_index=True)


def save(folder: Path, net: Net, samples: Samples, config: FuseConfig) -> None:
    """Write model.safetensors (without the encoder), and encoder/ if it was tuned."""
    state = {k: v.contiguous() for k, v in weights_of(net).items() if not k.startswith("films.encoder.")}
    with new_file(folder / "model.safetensors") as part:
        save_file(state, part)
    encoder = None if net.films is None else net.films.encoder
    if net.films is not None and encoder is not None:
        origin = net.films.origin
        more: dict[str, Any] = ({} if origin is None else ancestry(origin)) | {"tuned_from": config.encoder}
        if config.task in FILM_TASKS or config.films is not None:
            more["supervised_by"] = "findings" if config.films is None else f"the labels of {config.films.table}"
        else:  # trained on an outcome, which is known at discharge only
            more["ehr_groups"] = {**(encoder.meta.get("ehr_groups") or {}), config.task: "discharge"}
        encoders.save(folder / "encoder", encoder, more)
        write_seen(folder, samples.table[samples.table["split"] == "train"], origin)


def announce(
    log: run.Log,
    config: FuseConfig,
    samples: Samples,
    rows: dict[str, NDArray[np.int64]],
    films: FilmBranch | None,
    about: dict[str, Any],
) -> None:
    """Print what will be trained. Raises: UserError: an empty split."""
    seen = films is not None or samples.film_tokens is not None
    encoder = f"{config.encoder} {'frozen' if config.freeze else 'tuned'}" if seen else "no films"
    control = "" if config.control == "none" else f", control: {config.control}"
    seeds = f", {len(config.every_seed)} seeds" if len(config.every_seed) > 1 else ""
    units = "stays" if config.films is None else "films"
    task = f"{config.task} (retrospective)" if config.task in RETROSPECTIVE else config.task
    log.say(f"fuse: {config.model} on {task}, {config.pairing} {units}, {encoder}{control}{seeds}")
    for line in about.get("table", ()):
        log.say(f"  {line}")
    if "encoder_weights" in about:
        log.say(f"  {about['encoder_weights']}")
    if "text" in about:
        log.say(f"  {summary(about['text'])}")
    for split, own in rows.items():
        if not len(own):
            where = config.features if config.films is None else config.films.table
            raise UserError(f"{where}: no {split} samples of {config.task} with pairing={config.pairing}")
        events = int(np.median(np.nansum(samples.labels[own], axis=0)))
        log.say(f"  {split:5} {len(own):6} samples, {samples.has_image[own].sum()} with a film, {events} positive")
    for warning in about["warnings"]:
        log.say(f"  warning: {warning}")


def show(log: run.Log, table: pd.DataFrame, folder: Path) -> None:
    """Print the test metrics with their intervals, the output folder, and the next command."""
    chosen = table["metric"].isin(["auroc", "auprc", "kappa", "mae_hours"]) & table["subset"].isin(["all", "paired"])
    kept = table[(table["split"] == "test") & chosen]
    labels = list(dict.fromkeys(kept["label"]))
    kept = kept[kept["label"].str.startswith(("macro", "los_hours")) if len(labels) > 2 else kept["label"] == labels[0]]
    for row in kept.to_dict("records"):
        interval = "" if pd.isna(row["low"]) else f"  ({row['low']:.3f} to {row['high']:.3f})"
        value = "  -  " if pd.isna(row["value"]) else f"{row['value']:.3f}"
        says = f"  test {row['subset']:6} {row['label']:12} {row['metric'].upper()} {value}{interval}  n {row['n']}"
        log.say(f"{says}  {row['reason']}" if row["reason"] else says)
    for warning in metrics.without_value(table):
        log.say(f"  warning: {warning}")
    log.say(f"wrote {folder}\nnext: {report_line(folder)}")
