"""Findings by how common they are, and films by how many findings they have: where a note might help.

Comes in: labels of films. Goes out: groups of labels and of rows, for the rows of results.json and for `compare`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

THIRDS = ("macro rarest third", "macro middle third", "macro commonest third")
NOT_FINDINGS = ("No Finding", "Support Devices")  # not counted among a film's findings


def prevalence(names: Sequence[str], labels: NDArray[np.float32]) -> dict[str, float]:
    """The share of films with each label among those where it is known.

    Args:
        labels: (N, L) of the train films: 1, 0, NaN.
    """
    known = np.maximum((~np.isnan(labels)).sum(0), 1)
    return {name: float(share) for name, share in zip(names, np.nansum(labels, axis=0) / known, strict=True)}


def thirds(shares: Mapping[str, float]) -> dict[str, list[str]]:
    """The labels in three groups by prevalence; none with fewer than three labels, nor of labels that never occur."""
    found = sorted((name for name, share in shares.items() if share > 0), key=lambda name: (shares[name], name))
    if len(found) < 3:
        return {}
    cut = np.array_split(np.array(found, object), 3)
    return {name: part.tolist() for name, part in zip(THIRDS, cut, strict=True)}


def by_count(names: Sequence[str], labels: NDArray[np.float32]) -> dict[str, NDArray[np.bool_]]:
    """Rows with one, two, and three or more findings: name -> (N,)."""
    counted = [i for i, name in enumerate(names) if name not in NOT_FINDINGS]
    number = (labels[:, counted] == 1).sum(1)
    return {"findings=1": number == 1, "findings=2": number == 2, "findings=3+": number >= 3}
