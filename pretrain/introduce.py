"""What a run says and writes before it begins: what is about to happen, and on whom it trains."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from ehr_features.files import new_file
from pretrain import run
from pretrain.batches import Cutter, Films, Steps
from pretrain.config import PretrainConfig
from pretrain.msn import MSN
from pretrain.notes import summary
from pretrain.schedule import Schedule
from pretrain.weights import seen_before


def introduce(log: run.Log, config: PretrainConfig, steps: Steps, msn: MSN, plan: Schedule, accelerator: Any) -> None:
    """Say what is about to happen, to log.txt and to the trackers."""
    films, o = steps.films, config.optim
    left_out = "; ".join(f"{n} {reason}" for reason, n in films.left_out.items() if n)
    number = sum(p.numel() for p in msn.anchor.parameters()) / 1e6
    log.say(
        f"films: {len(films)} of {films.table['subject_id'].nunique()} subjects"
        + (f" (left out: {left_out})" if left_out else "")
        + f"\nencoder: {config.encoder.arch}, {number:.1f} M weights, {config.encoder.image_size} px; "
        + _record(config, films)
        + f"\ntraining: {plan.total} steps of {o.batch_size} films ({plan.total / plan.steps_per_epoch:.1f} epochs) on "
        + f"{accelerator.num_processes} x {accelerator.device.type}, {config.precision}; preset {config.preset}"
    )
    if steps.partners is not None:
        paired, by = steps.partners.count(), config.films.positives
        log.say(f"pairs: {paired} of {len(films)} films have another of their {by}; the others are their own target")
    if o.accumulate > 1 and o.accumulate_mode == "approximate":
        log.say(
            f"note: the loss of each of {o.accumulate} parts by itself is an approximation: Sinkhorn, the mean entropy "
            "and batch norm see a part of the batch only"
        )
    if accelerator.num_processes > 1 and accelerator.device.type == "cpu" and _batch_norm(msn):
        log.say("note: on CPUs batch norm sees the films of its own process only (torch synchronises it on GPUs)")
    for name, cells in unmasked(config, steps.cutter).items():
        least = math.ceil(100 / cells) / 100
        log.say(
            f"warning: mask.ratio {config.mask.ratio} of the {cells} patches of {name} masks none; {least} masks one"
        )
    groups = np.array(films.column_groups, dtype=object)
    if same := [g for g in films.available_at if (films.static[:, groups == g] == films.static[0, groups == g]).all()]:
        log.say(f"warning: of EHR group {', '.join(same)} all films have the same: it tells the anchor nothing")
    if config.trackers:
        accelerator.init_trackers("pretrain", config=_flat(config.model_dump(mode="json")))


def unmasked(config: PretrainConfig, cutter: Cutter) -> dict[str, int]:
    """Patches of the views that are to be masked, and have too few for the ratio to be one of them."""
    views = {"encoder.image_size": cutter.random} | ({"views.focal_size": cutter.focal} if cutter.mask_focal else {})
    cells = {name: (v.size // cutter.patch) ** 2 for name, v in views.items() if v.count and config.mask.ratio}
    return {name: number for name, number in cells.items() if int(number * config.mask.ratio) == 0}


def _batch_norm(msn: MSN) -> bool:
    return any(isinstance(module, torch.nn.modules.batchnorm._BatchNorm) for module in msn.modules())


def _record(config: PretrainConfig, films: Films) -> str:
    ehr = config.ehr
    if not ehr.groups:
        return "no record (vanilla MSN)"
    permuted = ", permuted between films (control)" if ehr.permuted else ""
    text = "" if films.text is None else f"\n{summary(films.text)}"
    return f"{ehr.use} on {', '.join(ehr.groups)}: {len(films.columns)} columns, {ehr.inject}{permuted}{text}"


def write_seen(folder: Path, films: Films, init: str | None) -> None:
    """Whom the run trains on, and whom the weights that it starts from did: fine-tuning keeps them out of its test."""
    if run.is_main():
        seen = films.table[["subject_id", "split"]].drop_duplicates().sort_values("subject_id", ignore_index=True)
        if init is not None and (before := seen_before(init)) is not None:
            seen = pd.concat([seen, before[["subject_id", "split"]]]).drop_duplicates("subject_id", ignore_index=True)
        with new_file(folder / "seen_subjects.parquet") as part:
            seen.to_parquet(part, index=False)


def _flat(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, item in value.items():
        out |= _flat(item, f"{prefix}{key}.") if isinstance(item, dict) else {f"{prefix}{key}": str(item)}
    return out
