"""Write encoder/ from a run, with a model card, and copies of it for other uses.

Comes in: a run folder, or the target branch of a running one. Goes out: encoder/ (see pretrain/encoder.py).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ehr_features.files import digest, file_digest
from pretrain import encoder as encoders
from pretrain.batches import Films
from pretrain.card import model_card
from pretrain.config import PretrainConfig
from pretrain.encoder import Encoder
from pretrain.store import Store

READ_FILMS = 4000  # at most so many for the readability of EHR columns


def write(
    folder: Path,
    config: PretrainConfig,
    encoder: Encoder,
    films: Films,
    store: Store,
    step: int,
    *,
    branch: str = "target",
    last: bool = False,
) -> Path:
    """runs/X/encoder/ as it is now; `last` adds how linearly readable the EHR columns are."""
    meta: dict[str, Any] = {
        "step": step,
        "branch": branch,
        "ehr_groups": films.available_at,
        "ehr": {**config.ehr.model_dump(), "columns": films.columns} if config.ehr.groups else None,
        "splits_seen": sorted(set(films.table["split"])),
        "num_films": len(films),
        "num_subjects": int(films.table["subject_id"].nunique()),
        "config_hash": digest(config.model_dump(mode="json")),
        "features_hash": file_digest(Path(config.features) / "images.parquet"),
        "store_hash": store.hash,
    }
    if last and config.readability and films.columns:
        training = encoder.training
        meta["readability"] = readability(encoder, films, store, config.seed)
        encoder.train(training)
    about = {**encoder.meta, "preprocess": encoder.preprocess.to_json(), **meta}
    return encoders.save(folder / "encoder", encoder, meta, card=model_card(about, config))


def readability(encoder: Encoder, films: Films, store: Store, seed: int) -> dict[str, dict[str, Any]]:
    """How well each EHR column is linearly read from frozen features: ridge on half the subjects, scored on the rest.

    A column that the anchor was told may have become unreadable: the target need not hold what the record gives.
    Returns: column -> metric (auroc of a yes / no column, else r2), value, chance.
    """
    chosen = np.random.default_rng(seed).permutation(len(films))[:READ_FILMS]
    device = next(encoder.parameters()).device
    x = encoders.embed(encoder, store.read(films.table["dicom_id"].to_numpy(object)[chosen].tolist()), device=device)
    y = torch.from_numpy(films.static[chosen])
    subjects = films.table["subject_id"].to_numpy()[chosen]
    first = torch.from_numpy(np.isin(subjects, np.random.default_rng(seed).permutation(np.unique(subjects))[::2]))
    if first.all() or not first.any():
        return {}
    guess = _ridge(x[first], y[first], x[~first])
    out: dict[str, dict[str, Any]] = {}
    for i, name in enumerate(films.columns):
        wanted, fitted = y[~first, i], y[first, i]
        if len(wanted.unique()) < 2 or len(fitted.unique()) < 2:
            continue
        if len(y[:, i].unique()) == 2:
            out[name] = {"metric": "auroc", "value": _auroc(wanted > wanted.min(), guess[:, i]), "chance": 0.5}
        else:
            r2 = 1 - ((wanted - guess[:, i]).square().mean() / (wanted - fitted.mean()).square().mean()).item()
            out[name] = {"metric": "r2", "value": r2, "chance": 0.0}
    return out


def _ridge(x: Tensor, y: Tensor, new: Tensor, penalty: float = 1e-2) -> Tensor:
    """Fit y (N, S) on standardised x (N, D); predict at `new` (M, D)."""
    mean, std = x.double().mean(dim=0), x.double().std(dim=0).clamp_min(1e-6)
    x, new, centre = (x.double() - mean) / std, (new.double() - mean) / std, y.double().mean(dim=0)
    gram = x.T @ x / len(x) + penalty * torch.eye(x.shape[1], dtype=torch.double)
    return (new @ torch.linalg.solve(gram, x.T @ (y.double() - centre) / len(x)) + centre).float()


def _auroc(positive: Tensor, score: Tensor) -> float:
    """Of pairs of a positive and a negative, the share in the right order; ties count half."""
    _, place, counts = score.unique(return_inverse=True, return_counts=True)
    rank = (counts.cumsum(0) - (counts - 1) / 2)[place]
    num_pos, num_neg = int(positive.sum()), int((~positive).sum())
    return float((rank[positive].sum() - num_pos * (num_pos + 1) / 2) / (num_pos * num_neg))
