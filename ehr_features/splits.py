"""Split subjects into train / val / test, the same for films and stays.

Input: the subjects, and the official film split if there is one. Output: a split for each subject. The hash depends on
seed and subject alone, so adding or removing tables moves no subject to another split.
"""

from __future__ import annotations

import difflib
import hashlib
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import pandas as pd

from configs import UserError
from ehr_features.files import named, whole_numbers
from ehr_features.raw.remote import user_table
from ehr_features.schema import SPLITS

METHODS = ("hash", "official", "temporal")  # or the path of a file of subject_id, split
FRACTIONS = (0.7, 0.1, 0.2)
OFFICIAL = {"train": "train", "validate": "val", "test": "test"}


def assign(
    subjects: pd.DataFrame, official: pd.DataFrame | None = None, *, method: str = "hash", seed: int = 0
) -> pd.DataFrame:
    """Put each subject into train, val or test.

    Args:
        subjects: subject_id (repeats are fine) and, for `temporal`, anchor_year_group (null if unknown).
        official: subject_id, split (train | validate | test) of the film tables; one row per film is fine.
        method: `hash`: official validate / test subjects keep val / test, the others are split 70 / 10 / 20 by
            sha256(seed, subject_id); `official`: official train subjects keep train too, and subjects without films are
            hashed; `temporal`: the last anchor_year_group is test, the one before it val, the others and subjects
            without a group train; else the path of a .csv, .csv.gz or .parquet file of subject_id, split.
        seed: of the hash.
    Returns: subject_id, split; one row per subject, sorted.
    Raises: UserError: a subject in two splits, an invalid split name, a file without some of the subjects.
    """
    ids = pd.Index(sorted(subjects["subject_id"].unique()), name="subject_id")
    pinned = _official(official)
    hashed = pd.Series([by_hash(s, seed) for s in ids], index=ids, dtype=object)
    if method == "hash":
        kept = pinned[pinned != "train"].reindex(ids)
        split = kept.where(kept.notna(), hashed)
    elif method == "official":
        if pinned.empty:
            raise UserError("split=official: there is no official film split; set mimic_cxr, or take split=hash")
        kept = pinned.reindex(ids)
        split = kept.where(kept.notna(), hashed)
    elif method == "temporal":
        split = _temporal(subjects, ids)
    else:
        split = _from_file(Path(method), ids)
    return pd.DataFrame({"subject_id": ids, "split": split.to_numpy(object)})


def check(method: str) -> None:
    """Refuse a `split` that is neither a method nor a file, before anything is read. Raises: UserError."""
    if method in METHODS or Path(method).is_file():
        return
    near = difflib.get_close_matches(method, METHODS, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise UserError(f"split={method}: no such file, and no method either; methods: {', '.join(METHODS)}{hint}")


def by_hash(subject_id: int, seed: int, fractions: Sequence[float] = FRACTIONS) -> str:
    """The split of one subject: 70 / 10 / 20 by the first 8 bytes of sha256("SEED:SUBJECT_ID")."""
    digest = hashlib.sha256(f"{seed}:{int(subject_id)}".encode()).digest()
    at = int.from_bytes(digest[:8], "big") / 2**64
    return SPLITS[(at >= fractions[0]) + (at >= fractions[0] + fractions[1])]


def _official(official: pd.DataFrame | None) -> pd.Series:
    if official is None:
        return pd.Series(dtype=object)
    known = official[["subject_id", "split"]].drop_duplicates()
    return _one_each(known.assign(split=_names(known["split"], OFFICIAL, "the official film split")), "official split")


def _temporal(subjects: pd.DataFrame, ids: pd.Index) -> pd.Series:
    if "anchor_year_group" not in subjects or subjects["anchor_year_group"].isna().all():
        raise UserError("split=temporal: no subject has an anchor_year_group; it needs the patients table")
    known = subjects[["subject_id", "anchor_year_group"]].dropna().drop_duplicates()
    group = _one_each(known.rename(columns={"anchor_year_group": "split"}), "anchor_year_group").reindex(ids)
    names = sorted(group.dropna().unique())  # "2008 - 2010" sorts by its first year
    if len(names) < 3:
        raise UserError(
            f"split=temporal: wanted three or more anchor_year_groups, found {len(names)} ({', '.join(names)}); "
            "take split=hash"
        )
    return group.map({names[-1]: "test", names[-2]: "val"}).fillna("train")


def _from_file(path: Path, ids: pd.Index) -> pd.Series:
    check(str(path))
    frame = user_table(path, ["subject_id", "split"], {"subject_id": str})
    text = named(frame["subject_id"])
    nobody = text.isna()
    if nobody.any():
        print(f"warning: {path}: {nobody.sum()} rows without subject_id were dropped", file=sys.stderr)
    frame = frame.assign(subject_id=whole_numbers(text))[~nobody]
    if frame["subject_id"].isna().any():
        raise UserError(f"{path}: subject_id must be whole numbers")
    split = _one_each(frame.assign(split=_names(frame["split"], OFFICIAL | {"val": "val"}, str(path))), str(path))
    split.index = split.index.astype("int64")
    if missing := set(ids) - set(split.index):
        some = sorted(missing)[:3]
        raise UserError(f"{path}: {len(missing)} of {len(ids)} subjects have no row there, e.g. {some}; add them")
    return split.reindex(ids)


def _names(split: pd.Series, names: dict[str, str], where: str) -> pd.Series:
    if unknown := sorted(set(split.astype(str)) - set(names)):
        raise UserError(f"{where}: {unknown[:3]} is not a split; wanted {', '.join(names)}")
    return split.map(names)


def _one_each(frame: pd.DataFrame, where: str) -> pd.Series:
    """subject_id -> split; a subject with two splits is refused."""
    frame = frame[["subject_id", "split"]].drop_duplicates()
    both = _repeated(frame["subject_id"])
    if both:
        raise UserError(f"{where}: {len(both)} subjects are in two splits, e.g. {both[:3]}; a subject needs one")
    return frame.set_index("subject_id")["split"]


def _repeated(values: Iterable[int]) -> list[int]:
    series = pd.Series(values)
    return sorted(series[series.duplicated()].unique().tolist())
