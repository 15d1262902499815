"""Random numbers of a film: hashes of (seed, epoch, film, purpose) in [0, 1), equal in every run and process."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import pandas as pd

_STEP = np.uint64(0x9E3779B97F4A7C15)


def film_keys(dicom_ids: Sequence[str]) -> np.ndarray:
    """(N,) uint64, one for each film, the same in every run."""
    digests = b"".join(hashlib.blake2b(name.encode(), digest_size=8).digest() for name in dicom_ids)
    return np.frombuffer(digests, dtype="<u8")


def uniforms(keys: np.ndarray, count: int, seed: int, epoch: int, purpose: str) -> np.ndarray:
    """(B, count) float64 in [0, 1): a hash of (seed, epoch, purpose, key, column).

    Source: splitmix64 (Steele, Lea, Flood 2014), used as a counter-based generator.
    """
    salt = hashlib.blake2b(f"{seed}/{epoch}/{purpose}".encode(), digest_size=8).digest()
    start = _mix(keys.astype(np.uint64) ^ np.frombuffer(salt, dtype="<u8"))
    return (_mix(start[:, None] + np.arange(1, count + 1, dtype=np.uint64) * _STEP) >> np.uint64(11)) * 2.0**-53


def _mix(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def within_cap(table: pd.DataFrame, keep: np.ndarray, cap: int, seed: int) -> np.ndarray:
    """Draw at most `cap` films of each subject with `seed`.

    Args:
        table: dicom_id, subject_id. keep: (N,) bool, the films to draw from.
    Returns: (N,) bool, the films drawn.
    """
    drawn = pd.Series(uniforms(film_keys(table["dicom_id"].tolist()), 1, seed, 0, "cap")[:, 0], index=table.index)
    return keep & (drawn.where(keep).groupby(table["subject_id"]).rank() <= cap).to_numpy()
