"""Record the subjects on which weights were trained: written beside each encoder/, read by the leak check."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd

from ehr_features.files import new_file
from ehr_features.typed import read_parquet
from pretrain.encoder.hub import card_note
from pretrain.encoder.model import encoder_folder, read_meta
from pretrain.encoder.sources import find
from pretrain.shapes import SEEN

NAME = "seen_subjects.parquet"


def read_seen(weights: str | Path) -> pd.DataFrame | None:
    """The subjects (subject_id, split) seen by an encoder/ folder or a run folder.

    Returns: None for bare weights and for an encoder without its run: their films are unknown.
    Raises: UserError: the list is damaged.
    """
    folder = encoder_folder(weights)
    path = folder.parent / NAME
    if not (folder.is_dir() and path.is_file()):
        return None
    seen = read_parquet(path, SEEN, "copy the run again", names=["subject_id"], more=True)
    return seen.reindex(columns=["subject_id", "split"])


def write_seen(folder: Path, subjects: pd.DataFrame, before: str | Path | None) -> None:
    """Write a run's list: its own subjects, and those of the weights from which it started, as far as they are known.

    Unknown ones are recorded in encoder.json (`ancestry`).

    Args:
        folder: the run folder. subjects: subject_id, split; repeated rows are fine.
        before: the initial weights; None for random ones.
    """
    seen = subjects[["subject_id", "split"]]
    if before is not None and (earlier := read_seen(before)) is not None:
        seen = pd.concat([seen, earlier])
    with new_file(folder / NAME) as part:
        seen.drop_duplicates("subject_id").sort_values("subject_id", ignore_index=True).to_parquet(part, index=False)


def ancestry(path: str | Path) -> dict[str, Any]:
    """The entry in encoder.json about the initial weights of a run."""
    folder = encoder_folder(path)
    own = (folder / "encoder.json").is_file()
    meta = read_meta(folder) if own else {}
    keys = ("ehr_groups", "splits_seen", "supervised_by", "started_from", "datasets")
    kept = {key: meta[key] for key in keys if meta.get(key)}
    unknown = read_seen(path) is None or kept.get("started_from", {}).get("films") == "unknown"
    before = {"weights": str(path), "films": "unknown" if unknown else "known"}
    source = None if own else find(path)
    card = "" if own else card_note(path, str(path)) if source is None else source.card
    earlier = kept.get("started_from", {}).get("card", "")
    return kept | {"started_from": before | ({"card": card or earlier} if card or earlier else {})}
