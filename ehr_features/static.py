"""Image-level EHR groups -> a vector for each film (fit on train, apply to all).

Comes in: rows of images.parquet and names of groups. Goes out: (N, S) float32, the columns' names, what was fitted
(JSON). What is missing is a category or a mask, never a made-up value.

Preset `msn` gives the columns, bins and order of the published sets. Differs from CXR-EHR-MSN: a missing view or
position is zero in all its columns (there, a forest fitted on all rows filled it in), and so is every record column of
a subject who has no record (there, the film is dropped).
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from configs import UserError
from ehr_features import schema
from ehr_features.static_groups import DEFAULT, MSN, MSN_READS, MSN_SETS, READS, Columns, Scale

TEXT = "text"  # the film's note as a vector: a group of pretraining, read by a text encoder (pretrain/notes.py)
REPORTING_ONLY = ("race", "insurance", "language", "code_status", "anchor_year_group", "care_unit")


def encode(
    images: pd.DataFrame, groups: Sequence[str], *, preset: str = "default", fitted: dict[str, Any] | None = None
) -> tuple[np.ndarray, list[str], dict[str, Any]]:
    """Turn EHR columns into a vector for each film.

    Args:
        images: N rows of images.parquet (any index); `split` is needed when fitting.
        groups: names of `READS`, in the order wanted; with preset `msn` also the names of published sets (`MSN_SETS`).
        preset: `default`, or `msn` for the published columns.
        fitted: what an earlier call gave back; None fits on the rows of split train only.
    Returns: (N, S) float32, S names, fitted (JSON can hold it). All rows are encoded, whatever their split.
    Raises: UserError: an unknown group, a column that may not be an input, no train rows to fit on, a missing column.
    """
    names = resolve(groups, preset)
    reads = MSN_READS if preset == "msn" else READS
    if missing := sorted({c for name in names for c in reads[name]} - set(images)):
        raise UserError(
            f"images: columns {missing} are missing, needed by the groups {names}; build the features again"
        )
    if fitted is None:
        fitted = {"preset": preset, "groups": names, "scales": {}}
        train = _train_rows(images) if preset != "msn" else np.ones(len(images), bool)
    else:
        train = None
        if (fitted.get("preset"), fitted.get("groups")) != (preset, names):
            raise UserError(f"fitted for {fitted.get('groups')} ({fitted.get('preset')}), asked for {names} ({preset})")
    scale = Scale(fitted["scales"], train)
    columns: Columns = {}
    for name in names:
        columns |= MSN[name](images) if preset == "msn" else DEFAULT[name](images, scale)
    array = np.column_stack(list(columns.values())).astype(np.float32) if columns else np.zeros((len(images), 0), "f4")
    if fitted.setdefault("columns", list(columns)) != list(columns):
        raise UserError(f"fitted with the columns {fitted['columns']}, these films give {list(columns)}")
    return array, list(columns), fitted


def resolve(groups: Sequence[str], preset: str = "default") -> list[str]:
    """Check names of groups and open published sets; each group once, in order. Raises: UserError: no such input."""
    if isinstance(groups, str):
        raise UserError(f"groups: wanted a list, got the text {groups!r}; write [{groups}]")
    if preset not in ("default", "msn"):
        raise UserError(f"ehr preset {preset!r}: wanted default or msn")
    known = MSN_READS if preset == "msn" else READS
    names: list[str] = []
    for group in groups:
        if preset == "msn" and group in MSN_SETS:
            names += MSN_SETS[group]
        elif group in known:
            names.append(group)
        else:
            raise UserError(_refusal(group, [*known, *(MSN_SETS if preset == "msn" else ())], preset))
    return list(dict.fromkeys(names))


def available_at(groups: Sequence[str], preset: str = "default") -> dict[str, str]:
    """When each group is known: `study`, `admission` or `discharge` (the latest of the columns that it reads).

    `text` is known at the study: a note from after its film is refused where it is read.
    """
    reads, order = (MSN_READS if preset == "msn" else READS), ("study", "admission", "discharge")
    when = {name: column.available_at for name, column in schema.IMAGES.items()}
    known: dict[str, str] = {
        g: max((when[c] for c in reads[g]), key=order.index) for g in resolve(_columns_of(groups), preset)
    }
    return known | ({TEXT: "study"} if TEXT in groups else {})


def _columns_of(groups: Sequence[str]) -> list[str]:
    return [group for group in groups if group != TEXT]


def _refusal(group: str, known: Sequence[str], preset: str) -> str:
    if group == TEXT:
        return "group `text` is no column: it goes with pretraining's ehr.notes and ehr.text_encoder"
    if group in REPORTING_ONLY:
        return f"group `{group}` serves subgroup reporting only and cannot be an input; take it out of the groups"
    if group in READS:
        return f"group `{group}` does not exist in ehr preset {preset}; it has {', '.join(known)}"
    near = difflib.get_close_matches(group, known, n=1)
    hint = f"did you mean `{near[0]}`?" if near else f"groups: {', '.join(known)}"
    return f"unknown EHR group `{group}` (ehr preset {preset}); {hint}"


def _train_rows(images: pd.DataFrame) -> np.ndarray:
    if "split" not in images:
        raise UserError("images: column `split` is missing; EHR columns are fitted on the train split only")
    train = (images["split"] == "train").to_numpy()
    if not train.any():
        raise UserError(f"images: none of {len(images)} films is of split train, so EHR columns cannot be fitted")
    return train
