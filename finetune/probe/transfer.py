"""Transfer without training: score the head of a finished probe on other films, over the labels common to both.

Input: a run with head.safetensors and the encoder on which it was trained. Output: rows of the test split of the new
films; nothing is fitted to them, not even thresholds.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from safetensors.numpy import load_file, save_file

from configs import UserError
from ehr_features.files import new_file, write_json
from ehr_features.typed import read_json, undamaged
from finetune.config import ProbeConfig
from finetune.config.shapes import Head
from finetune.encoders import Frozen, film_features
from finetune.labelled import Films
from finetune.probe.evaluation import score, scored, subgroups
from finetune.probe.heads import LinearHead
from finetune.probe.methods import Fitted


def save(
    folder: Path, config: ProbeConfig, names: list[str], fit: Fitted, thresholds: np.ndarray, encoder_hash: str | None
) -> None:
    """Write head.safetensors (weights (D, L), bias (L,)) and head.json."""
    assert fit.head is not None
    with new_file(folder / "head.safetensors") as part:
        save_file({"weights": fit.head.weights, "bias": fit.head.bias}, part)
    cut = [None if np.isnan(t) else float(t) for t in thresholds]
    about: dict[str, Any] = {
        "labels": names,
        "pools": fit.head.names,
        "encoder": config.encoder,
        "encoder_hash": encoder_hash,
    }
    about["unlearned"] = fit.unlearned
    write_json(folder / "head.json", about | {"thresholds": cut})


def load(folder: str | Path) -> tuple[LinearHead, dict[str, Any]]:
    """The head of a run. Raises: UserError: it has none."""
    path = Path(folder)
    if not (path / "head.json").is_file():
        raise UserError(f"{folder}: no head.json; give a finished run of method=linear or logistic")
    about = read_json(path / "head.json", Head)
    with undamaged(path / "head.safetensors", "fit it again"):
        tensors = load_file(path / "head.safetensors")
    labels, width = len(about["labels"]), len(tensors.get("weights", ()))
    for name, shape in (("weights", (width, labels)), ("bias", (labels,))):
        if name not in tensors or tensors[name].shape != shape or tensors[name].dtype.kind != "f":
            raise UserError(f"{path}/head.safetensors: `{name}` is not of the labels in head.json; fit the probe again")
    if odd := [name for name, value in tensors.items() if not np.isfinite(value).all()]:
        raise UserError(f"{path}/head.safetensors: `{odd[0]}` has values that are not finite; fit the probe again")
    return LinearHead(about["pools"], tensors["weights"], tensors["bias"]), about


def apply(
    config: ProbeConfig, films: Films, frozen: Frozen, store: Any, folder: Path
) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Score the head on the test films, over the labels common to both.

    Raises: UserError: another encoder, or no label in common.
    """
    assert config.head is not None
    head, about = load(config.head)
    common = [name for name in about["labels"] if name in films.names]
    if not common:
        raise UserError(f"{config.head}: its labels ({', '.join(about['labels'])}) and these have none in common")
    if about["encoder_hash"] != frozen.key:
        raise UserError(
            f"{config.encoder}: not the encoder that the head of {config.head} was fitted on ({about['encoder']}): "
            "other weights, or other preprocessing"
        )
    rows = films.rows("test")
    if not len(rows):
        raise UserError("no film of split test to score the head on")
    cache = Path(config.cache) if config.cache else folder.parent / "cache"
    features = film_features(frozen, store, films.table["dicom_id"].iloc[rows].tolist(), cache=cache)
    place = [about["labels"].index(name) for name in common]
    unlearned = {name: why for name, why in about.get("unlearned", {}).items() if name in common}
    logits = np.where(np.isin(common, list(unlearned)), np.nan, head(features)[:, place])
    here = replace(films, labels=films.labels[common])
    on = scored(here, rows, logits, unit=config.unit)
    cut = np.array([np.nan if about["thresholds"][i] is None else about["thresholds"][i] for i in place])
    asked: dict[str, Any] = {"samples": config.samples, "seed": config.seed, "thresholds": cut, "reasons": unlearned}
    table = score(on, **asked).assign(split="test", subset="all")
    more: dict[str, Any] = {"transfer": {"head": config.head, "trained_with": about["encoder"], "labels": common}}
    on.write(folder, "test")
    tables = [table]
    if config.subgroups:
        rows_, more["gaps"] = subgroups(on, config.subgroups, **asked)
        tables.append(rows_.assign(split="test"))
    return pd.concat(tables, ignore_index=True).assign(fraction=1.0), more
