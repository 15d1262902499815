"""Ids of films and subjects outside MIMIC: the same file or person has the same id in every table and command."""

from __future__ import annotations

import hashlib
import posixpath
from pathlib import Path

import numpy as np
import pandas as pd

from ehr_features.files import whole_numbers

NO_COINCIDENCE = 2**40  # two hospitals may both number their people 1, 2, 3, but not with ids that long
SUFFIXES = (".jpg", ".jpeg", ".png", ".dcm", ".dicom")


def film_id(path: str | Path) -> str:
    """A film's id outside MIMIC: its file name without the suffix of a film; a DICOM UID keeps all its parts."""
    name = str(path).rstrip("/").rpartition("/")[2]
    return next((name[: -len(s)] for s in SUFFIXES if name.lower().endswith(s) and len(name) > len(s)), name)


def film_ids(paths: pd.Series) -> pd.Series:
    """The ids of a table's films: their file names, with their folders if two films have the same name."""
    stems = paths.map(film_id)
    if not stems[~paths.duplicated()].duplicated().any():
        return stems
    return paths.map(lambda path: posixpath.join(posixpath.dirname(posixpath.normpath(path)), film_id(path)))


def subject_numbers(names: pd.Series) -> pd.Series:
    """Subjects as whole numbers: an id that is one keeps it; any other text becomes 62 bits of its SHA-256.

    The number depends on the id alone, so that a part of a table, or another table of the same people, has the same
    numbers, and with them the same split.
    """
    codes, distinct = pd.factorize(names.astype("string").str.strip())
    own = whole_numbers(pd.Series(distinct))
    numbers = [hashed(name) if pd.isna(n) else int(n) for name, n in zip(distinct, own, strict=True)]
    return pd.Series(np.array(numbers, np.int64)[codes], index=names.index)


def hashed(text: str) -> int:
    """62 bits of a text's SHA-256."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 2
