"""Check which subjects an encoder has seen, and whether it may be tested on the given ones.

Input: an encoder folder and the split for its test. Output: what is known of its pretraining, with warnings; or a
UserError if the pretraining saw a val or test subject. Weights with unknown films pass and are labelled `unknown`.
Pretraining with a column known only at discharge, on train subjects, passes too, is labelled `outcome-supervised`, and
is kept out of self-supervised tables; as an input of a probe or a fusion such a column is refused.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from configs import UserError
from ehr_features.files import file_digest
from ehr_features.own_films.ids import NO_COINCIDENCE
from ehr_features.own_films.read import FilmsTable
from ehr_features.schema import HELD_OUT
from pretrain.encoder.model import read_meta
from pretrain.seen import read_seen


@dataclass(frozen=True)
class Seen:
    """What is known of an encoder's pretraining: `films` is `none` | `train` | `unknown` | `other source` | `leak`."""

    films: str
    supervision: str  # `none` | `self-supervised` | `outcome-supervised` | `supervised by ...` | `unknown`
    warnings: list[str]
    compared: dict[str, int] | None = None  # numbers of subjects: held_out, seen, both


NOTHING = Seen("none", "none", [])  # raw pixels, random weights, metadata


def check_encoder(
    folder: Path,
    subjects: pd.DataFrame,
    *,
    features: str | Path | None = None,
    own: FilmsTable | None = None,
    labels: Iterable[str] = (),
    allow_leak: bool = False,
    same_source: bool = True,
    other_people: bool = False,
    card: str = "",
) -> Seen:
    """Refuse an encoder whose pretraining saw a val or test subject of this split.

    Args:
        folder: an encoder/ folder (with its run's seen_subjects.parquet beside it), or a bare weights file.
        subjects: subject_id, split of the films to be tested; repeated rows are fine.
        features: the features/ folder of the split.
        own: instead, the table outside MIMIC of the films; the same source if the pretraining had this table, or
            another one of the same subjects.
        labels: what is predicted; a pretraining on one of them is supervised.
        same_source: the films are from a features/ folder; False: from a table of another data set, where equal ids are
            refused too, since they may be the same subjects.
        other_people: the user states that equal ids are different subjects.
        card: what is known of the training films of weights without a list of subjects, e.g. from their model card.
        allow_leak: continue with a warning at the top of the report.
    Raises: UserError: it saw some of them, or its list of subjects is damaged.
    """
    if folder.is_file():  # weights without a run
        known = f"; {card}, so it may have seen val or test subjects" if card else ""
        return Seen("unknown", "unknown", [f"{folder}: the films and labels of its training are unknown{known}"])
    meta = read_meta(folder)
    groups = meta.get("ehr_groups") or {}
    same_source = same_source or (own is not None and _same_people(folder, meta, own))
    told = set(labels)
    outcome = sorted(name for name, at in _available(groups) if at == "discharge" or name in told)
    supervision = "outcome-supervised" if outcome else "self-supervised" if "ehr_groups" in meta else "unknown"
    if not outcome and meta.get("supervised_by"):
        supervision = f"supervised by {meta['supervised_by']}"
    warnings = []
    if outcome:
        warnings.append(
            f"outcome-supervised: pretraining was conditioned on {', '.join(outcome)}, "
            + ("a label of this evaluation; " if told & set(outcome) else "known only at discharge; ")
            + "not comparable with self-supervised encoders"
        )
    held_out = set(subjects.loc[subjects["split"].isin(HELD_OUT), "subject_id"].map(_id))
    split_hash = features_hash(features) if features is not None else None if own is None else own.digest
    films, found, compared = _overlap(folder, meta, held_out, split_hash)
    unknown_before = (meta.get("started_from") or {}).get("films") == "unknown"
    says = f"{folder}: its pretraining saw {found} of the val or test subjects"
    if films == "leak" and other_people and not same_source:
        films = "other source"
        warnings.append(f"{says}, by their ids; other_people=true states that these are other people")
    elif films == "leak" and not allow_leak:
        mend = "if both sources number other people alike, set other_people=true"
        if same_source:
            where = f"features={features}" if own is None else "the same films.table, films.split and films.seed"
            mend = f"pretrain on this split's train subjects (pretrain with {where})"
        raise UserError(
            f"{says}; results on them would be too good: {mend}, or set allow_leak=true, which the report shows"
        )
    elif films == "leak":
        warnings.append(f"LEAK (allow_leak=true): {says}")
    elif films == "train" and unknown_before:
        films = "unknown"
    elif not same_source:
        films = "other source"
        none = "none of their subject_ids is a val or test subject here" if compared else "their subjects are unknown"
        warnings.append(f"{folder}: pretrained on films of another source; {none}")
    if films == "unknown":
        before = (meta.get("started_from") or {}).get("card")
        warnings.append(
            f"{folder}: the films of its pretraining are unknown; it may have seen val or test subjects"
            + (f" (it started from weights of which {before})" if before else "")
        )
    return Seen(films, supervision, warnings, compared)


def _same_people(folder: Path, meta: dict[str, Any], own: FilmsTable) -> bool:
    """Whether the pretraining was on this table, or on another one of some of its subjects, known by their long ids."""
    if meta.get("features_hash") == own.digest:
        return True
    listed, subjects = read_seen(folder), own.films["subject_id"]
    mine = set(subjects[subjects >= NO_COINCIDENCE].map(_id))
    return listed is not None and bool(mine & set(listed["subject_id"].map(_id)))


def refuse_discharge(groups: Iterable[str], available_at: dict[str, str]) -> None:
    """Refuse inputs that are known only at discharge.

    Args:
        groups: EHR groups for a model's input.
        available_at: group or column -> study | admission | discharge.
    Raises: UserError: one of them is an outcome.
    """
    if late := sorted(g for g in groups if available_at.get(g) == "discharge"):
        raise UserError(
            f"{', '.join(late)}: known only at discharge, so not an input of a prediction made before; leave it out"
        )


def _available(groups: dict[str, Any]) -> list[tuple[str, str]]:
    """(name, available_at) from {name: available_at} or {name: {available_at: ...}}."""
    return [(str(k), str(v.get("available_at") if isinstance(v, dict) else v)) for k, v in groups.items()]


def _overlap(
    folder: Path, meta: dict[str, Any], held_out: set[str], split_hash: str | None
) -> tuple[str, str, dict[str, int] | None]:
    """The relation of the seen films to the held-out subjects, how many of these were seen, and the counts."""
    if (listed := read_seen(folder)) is not None:
        seen = set(listed["subject_id"].map(_id))
        both = seen & held_out
        compared = {"held_out": len(held_out), "seen": len(seen), "both": len(both)}
        return ("leak" if both else "train"), f"{len(both)} of {len(held_out)}", compared
    splits = meta.get("splits_seen")
    same = split_hash is not None and meta.get("features_hash") == split_hash
    if not isinstance(splits, list) or not same:
        return "unknown", "", None
    late = [split for split in splits if split in HELD_OUT]
    return ("leak", f"all ({', '.join(late)})", None) if late else ("train", "", None)


def _id(subject: object) -> str:
    """Normalise an id that may be a number in one table and text in another: 7, 7.0 and "7" are equal."""
    text = str(subject).strip()
    return text.removesuffix(".0").lstrip("0") or text


def features_hash(folder: str | Path) -> str:
    """16 hex digits of a features/ folder: those of its images.parquet, which holds the split."""
    return file_digest(Path(folder) / "images.parquet")
