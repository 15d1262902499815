"""A small world for the probes: films with planted findings, their features/ table, a store in memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from ehr_features.files import write_json

SIZE = 32
NAMES = ("Edema", "Pneumonia", "Pneumothorax")


class MemoryStore:
    """What `pretrain.store.Store` offers, without files."""

    def __init__(self, films: dict[str, np.ndarray]) -> None:
        self.films, self.size, self.hash = films, SIZE, "memory"

    def __contains__(self, film: object) -> bool:
        return film in self.films

    def read(self, films: Sequence[str]) -> np.ndarray:
        return np.stack([self.films[film] for film in films])


def world(folder: Path, *, subjects: int = 150, seed: int = 0, shuffled: bool = False) -> MemoryStore:
    """Write folder/features and return the films: a finding brightens a corner; a subject has one to three films."""
    rng = np.random.default_rng(seed)
    subject = np.repeat(np.arange(subjects) + 100, rng.integers(1, 4, subjects))
    n = len(subject)
    split = rng.choice(["train", "val", "test"], p=[0.5, 0.2, 0.3], size=subjects)[subject - 100]
    findings = (rng.random((n, len(NAMES))) < [0.4, 0.3, 0.2]).astype(float)
    films = rng.normal(100, 20, (n, SIZE, SIZE))
    for i, (row, column) in enumerate([(0, 0), (0, 16), (16, 0)]):
        films[:, row : row + 16, column : column + 16] += 25 * findings[:, i, None, None]
    if shuffled:
        findings = findings[rng.permutation(n)]
    findings[rng.random(findings.shape) < 0.05] = -1
    findings[rng.random(findings.shape) < 0.1] = np.nan
    ids = [f"film{i:04d}" for i in range(n)]
    table = pd.DataFrame(
        {
            "dicom_id": ids,
            "study_id": subject * 10 + np.arange(n) % 2,
            "subject_id": subject,
            "split": split,
            "view": rng.choice(["AP", "PA", "LATERAL"], p=[0.5, 0.4, 0.1], size=n),
            "sex": rng.choice(["F", "M"], size=subjects)[subject - 100],
            "age_years": rng.integers(18, 90, size=subjects)[subject - 100],
            **{name: findings[:, i] for i, name in enumerate(NAMES)},
        }
    )
    features = folder / "features"
    features.mkdir(parents=True, exist_ok=True)
    table.to_parquet(features / "images.parquet")
    write_json(features / "provenance.json", {})
    pixels = np.clip(films, 0, 255).astype(np.uint8)
    return MemoryStore(dict(zip(ids, pixels, strict=True)))


@pytest.fixture
def make_world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """A function that writes a world, puts its store in place of the one on disk, and gives its folder."""

    def make(**options: object) -> Path:
        store = world(tmp_path, **options)  # type: ignore[arg-type]
        monkeypatch.setattr("finetune.probe.Store", lambda folder: store)
        return tmp_path

    return make
