"""`fuse adds=true`: the gain in AUROC from the film, on the test samples with a film.

Input: a finished run of a fused model. Output: in RUN/controls/, trainings on the same samples without the pixels,
and in its results.json the paired differences of AUROC (metric `auroc_difference`), each with its interval:

    the best record-only model (on validation): the total gain;
    control=context: the record, and presence, view and age of the film without its pixels: that a film was ordered is
        itself informative;
    control=another: another subject's film of the same view: a network of equal size and input.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.special import expit

from ehr_features.files import write_seal
from finetune.compare import paired
from finetune.config import FuseConfig
from finetune.results import read_predictions, read_results, write_results

METRIC = "auroc_difference"
RECORD = ("record_lstm", "record_transformer", "record_gbm")
ALONE = {"freeze": True, "unfreeze_after": None, "record_weights": None, "film_weights": None, "freeze_record": False}


def controls(config: FuseConfig, folder: Path) -> dict[str, FuseConfig]:
    """The configs of the controls, by the name of their folder in `folder`."""
    plain = {"adds": False, "robustness": False}
    changes: dict[str, dict[str, Any]] = {model: {"model": model, **ALONE} for model in RECORD}
    changes |= {name: {"control": name} for name in ("context", "another")}
    return {k: config.model_copy(update=v | plain | {"out": str(folder / "controls" / k)}) for k, v in changes.items()}


def adds(
    config: FuseConfig,
    folder: Path,
    fuse: Callable[[FuseConfig, argparse.Namespace | None], Path],
    args: argparse.Namespace | None,
    say: Callable[[str], None],
    main: bool,
) -> None:
    """Train the controls that are not complete, and add the differences to FOLDER/results.json."""
    runs = {name: fuse(own, args) for name, own in controls(config, folder).items()}
    if not main:
        return
    reached = {name: _validation(runs[name]) for name in RECORD}
    best = max(reached, key=lambda name: reached[name])
    ours, tables = _films(folder, config), []
    for name in (best, "context", "another"):
        table = _less(ours, _films(runs[name], config), config)
        tables.append(table.assign(split="test", subset=f"paired, less {name}", fraction=1.0))
    about, rows = read_results(folder)
    added = pd.concat(tables, ignore_index=True)
    write_results(folder, about, pd.concat([rows[rows["metric"] != METRIC], added], ignore_index=True))
    write_seal(folder, "results.json")
    say("what the film adds, AUROC on the test samples with a film:")
    for row in added[added["label"] == "macro"].to_dict("records"):
        interval = "" if pd.isna(row["low"]) else f"  ({row['low']:+.3f} to {row['high']:+.3f})"
        say(f"  {row['subset'].removeprefix('paired, '):24} {row['value']:+.3f}{interval}  n {row['n']}")


def _validation(run: Path) -> float:
    """The macro AUROC on the validation samples with a film; -1 where there is none."""
    _, rows = read_results(run)
    chosen = rows[(rows["split"] == "val") & (rows["metric"] == "auroc") & (rows["label"] == "macro")]
    values = chosen.set_index("subset")["value"].dropna()
    return float(values.get("paired", values.get("all", -1.0)))


def _films(run: Path, config: FuseConfig) -> tuple[pd.DataFrame, pd.DataFrame, NDArray[np.float64]]:
    """Ids and labels of the test samples with a film, and their probabilities (trainings, N, L), by sample_id."""
    folders = [run] if len(config.every_seed) == 1 else [run / f"seed_{seed}" for seed in config.every_seed]
    read = [read_predictions(folder, "test") for folder in folders]
    ids, labels, _ = read[0]
    keep = np.flatnonzero(ids["has_image"].to_numpy(bool))
    keep = keep[np.argsort(ids["sample_id"].to_numpy()[keep], kind="stable")]
    return ids.iloc[keep], labels.iloc[keep], np.stack([expit(logits.to_numpy()[keep]) for *_, logits in read])


def _less(ours: tuple[Any, ...], theirs: tuple[Any, ...], config: FuseConfig) -> pd.DataFrame:
    """Rows of results.json: our AUROC minus theirs, for each label and `macro`."""
    (ids, labels, a), (other, _, b) = ours, theirs
    same = np.isin(ids["sample_id"], other["sample_id"])  # a control has no film where no other subject has one
    there = np.isin(other["sample_id"], ids["sample_id"])
    ids, labels, a, b = ids[same], labels[same], a[:, same], b[:, there]
    found = paired(
        labels.to_numpy(float),
        a,
        b,
        groups=ids["subject_id"].to_numpy(),
        names=[str(name) for name in labels],
        samples=config.samples,
        seed=config.seed,
        same_seeds=True,
    )
    found = found.rename(columns={"difference": "value"})[["label", "value", "low", "high", "n"]]
    positives = {str(name): int((labels[name] == 1).sum()) for name in labels}
    counts = [positives.get(name, sum(positives.values())) for name in found["label"]]
    without = "one class only among these samples, or not learned"
    reason = np.array([without if missing else None for missing in found["value"].isna()], dtype=object)
    return found.assign(metric=METRIC, positives=counts, reason=reason)
