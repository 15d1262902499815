"""What a fusion run leaves: results.json, predictions/, the weights; and what it says before and after."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor, nn

from configs import UserError
from ehr_features.files import new_file
from finetune import metrics, results
from finetune.config import FuseConfig
from finetune.net import Net
from finetune.samples import Samples
from pretrain import encoder as encoders
from pretrain import run


class Predictions(NamedTuple):
    """What a net says of some samples, in their order, each once."""

    rows: NDArray[np.int64]  # (N,)
    logits: NDArray[np.float64]  # (N, L)
    weights: NDArray[np.float64] | None  # (N, 2) record and film, of a model that weighs them


def write(
    folder: Path, samples: Samples, found: dict[str, Predictions], config: FuseConfig, about: dict[str, Any]
) -> pd.DataFrame:
    """predictions/ and results.json; returns the rows of the latter."""
    tables = []
    for split, predictions in found.items():
        rows = predictions.rows
        ids = samples.table.iloc[rows][["sample_id", "stay_id", "subject_id", "dicom_id"]]
        ids = ids.assign(has_image=samples.has_image[rows])
        if predictions.weights is not None:
            ids = ids.assign(weight_record=predictions.weights[:, 0], weight_film=predictions.weights[:, 1])
        labels = pd.DataFrame(samples.labels[rows], columns=samples.names)
        results.write_predictions(folder, split, ids, labels, predictions.logits)
        for subset, keep in {"all": np.ones(len(rows), bool), "paired": samples.has_image[rows]}.items():
            if keep.any():
                table = metrics.evaluate(
                    samples.labels[rows][keep],
                    torch.from_numpy(predictions.logits[keep]).sigmoid().numpy(),
                    names=samples.names,
                    groups=ids["subject_id"].to_numpy()[keep],
                    samples=config.samples,
                    seed=config.seed,
                )
                tables.append(table.assign(split=split, subset=subset))
    table = pd.concat(tables, ignore_index=True)
    facts = {"task": config.task, "model": config.model, "seed": config.seed, "allow_leak": config.allow_leak}
    results.write_results(folder, {**facts, "pairing": config.pairing, "freeze": config.freeze, **about}, table)
    return table


def save(folder: Path, net: Net, samples: Samples, config: FuseConfig) -> None:
    """model.safetensors (without the encoder), and encoder/ where it was tuned."""
    state = {k: v.contiguous() for k, v in weights_of(net).items() if not k.startswith("films.encoder.")}
    with new_file(folder / "model.safetensors") as part:
        save_file(state, part)
    encoder = None if net.films is None else net.films.encoder
    if encoder is not None:
        groups = {**(encoder.meta.get("ehr_groups") or {}), config.task: "discharge"}
        encoders.save(folder / "encoder", encoder, {"ehr_groups": groups, "tuned_from": config.encoder})
        seen = samples.table.loc[samples.table["split"] == "train", ["subject_id"]].drop_duplicates()
        with new_file(folder / "seen_subjects.parquet") as part:
            seen.to_parquet(part, index=False)


def announce(
    log: run.Log,
    config: FuseConfig,
    samples: Samples,
    parts: dict[str, NDArray[np.int64]],
    net: Net,
    about: dict[str, Any],
) -> None:
    """What will be done, before it is done. Raises: UserError: an empty split."""
    number = sum(p.numel() for p in net.parameters() if p.requires_grad)
    encoder = (
        "no film encoder"
        if about["encoder"] is None
        else f"encoder {about['encoder']} {'frozen' if config.freeze else 'tuned'}"
    )
    log.say(f"fuse: {config.model} ({number:,} weights) on {config.task}, {config.pairing} stays, {encoder}")
    for split, rows in parts.items():
        events = int(np.median(np.nansum(samples.labels[rows], axis=0)))
        log.say(f"  {split:5} {len(rows):6} samples, {samples.has_image[rows].sum()} with a film, {events} positive")
        if not len(rows):
            raise UserError(f"{config.features}: no {split} samples of {config.task} with pairing={config.pairing}")
    for warning in about["warnings"]:
        log.say(f"  warning: {warning}")


def show(log: run.Log, table: pd.DataFrame, folder: Path) -> None:
    """The test numbers with their intervals, where they are, and what to run next."""
    kept = table[(table["split"] == "test") & table["metric"].isin(["auroc", "auprc"])]
    labels = list(dict.fromkeys(kept["label"]))
    kept = kept[kept["label"] == ("macro" if len(labels) > 2 else labels[0])]
    for row in kept.to_dict("records"):
        interval = "" if pd.isna(row["low"]) else f"  ({row['low']:.3f} to {row['high']:.3f})"
        value = "  -  " if pd.isna(row["value"]) else f"{row['value']:.3f}"
        says = f"  test {row['subset']:6} {row['label']:12} {row['metric'].upper()} {value}{interval}  n {row['n']}"
        log.say(f"{says}  {row['reason']}" if row["reason"] else says)
    log.say(f"wrote {folder}\nnext: ./launch.sh report {folder}")


def weights_of(net: nn.Module) -> dict[str, Tensor]:
    """A copy on the CPU."""
    return {key: value.detach().cpu().clone() for key, value in net.state_dict().items()}
