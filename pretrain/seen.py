"""Subjects that an encoder has seen in pretraining: written by each run, read by the guard."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd

from ehr_features.files import new_file, undamaged
from pretrain import run
from pretrain.data import Films
from pretrain.encoder.model import encoder_folder, read_meta


def write_seen(folder: Path, films: Films, init: str | None) -> None:
    """Whom the run trains on, and whom the weights that it starts from did: fine-tuning keeps them out of its test."""
    if run.is_main():
        seen = films.table[["subject_id", "split"]].drop_duplicates().sort_values("subject_id", ignore_index=True)
        if init is not None and (before := seen_before(init)) is not None:
            seen = pd.concat([seen, before[["subject_id", "split"]]]).drop_duplicates("subject_id", ignore_index=True)
        with new_file(folder / "seen_subjects.parquet") as part:
            seen.to_parquet(part, index=False)


def seen_before(path: str | Path) -> pd.DataFrame | None:
    """The subjects that weights have seen (subject_id, split), as the run says that they are of; None: unknown."""
    listed = encoder_folder(path).parent / "seen_subjects.parquet"
    if not (encoder_folder(path).is_dir() and listed.is_file()):
        return None
    with undamaged(listed, "copy the run again"):
        return pd.read_parquet(listed)


def ancestry(path: str | Path) -> dict[str, Any]:
    """What encoder.json must go on saying of weights that another run starts from."""
    folder = encoder_folder(path)
    meta = read_meta(folder) if folder.is_dir() else {}
    kept = {key: meta[key] for key in ("ehr_groups", "splits_seen", "supervised_by", "started_from") if meta.get(key)}
    films = "unknown" if seen_before(path) is None else "known"
    if kept.get("started_from", {}).get("films") == "unknown":
        films = "unknown"
    return kept | {"started_from": {"weights": str(path), "films": films}}


def seen_after(origin: Path | None, subjects: pd.DataFrame) -> pd.DataFrame | None:
    """Whom an encoder has seen once it was trained further: those of before, and `subjects`.

    Args:
        origin: the encoder/ folder or weights file that training went on from; None for random weights.
        subjects: subject_id (and split) of the films that it was trained on now.
    Returns: a seen_subjects.parquet; None where those of before are unknown.
    """
    now = subjects.drop_duplicates("subject_id")
    if origin is None:
        return now
    before = origin.parent / "seen_subjects.parquet"
    if not (origin.is_dir() and before.is_file()):
        return None
    with undamaged(before, "copy the run again"):
        return pd.concat([pd.read_parquet(before), now]).drop_duplicates("subject_id")
