"""Small test data: films with planted findings for the probes, ICU stays for the fusion models; a store in memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from safetensors.numpy import save_file

from ehr_features.files import write_json
from pretrain.store.decode import Square
from tests.written import series_json

SIZE = 32
NAMES = ("Edema", "Pneumonia", "Pneumothorax")


class MemoryStore:
    """What `pretrain.store.Store` offers, without files."""

    def __init__(self, films: dict[str, np.ndarray]) -> None:
        self.films, self.size, self.hash = films, SIZE, "memory"
        self.folder, self.square = Path("memory"), Square(SIZE)

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
        monkeypatch.setattr("finetune.layouts.Store", lambda folder: store)
        return tmp_path

    return make


def icu_world(folder: Path, *, stays: int = 160, seed: int = 0, films: int = 3, shuffled: bool = False) -> MemoryStore:
    """Write folder/features for the ICU tasks and return the films.

    Death has a part in the record (column 0 drifts) and one in the last film before hour 48 (its upper half is bright).
    Half of the stays have films; some have films after hour 48 only, and some films are not in the store.
    """
    rng = np.random.default_rng(seed)
    stay, subject = np.arange(stays) + 1000, np.arange(stays) // 2 + 100
    split = np.array(["train", "train", "train", "val", "test"])[(subject - 100) % 5]
    hours = rng.integers(48, 90, stays)
    record, film = rng.normal(size=stays), rng.normal(size=stays)
    death = (1.5 * record + 1.5 * film + rng.logistic(size=stays) > 1).astype(int)
    values = [
        rng.normal(size=(h, 5)) + np.linspace(0, 1, h)[:, None] * r * [1, 0, 0, 0, 0]
        for h, r in zip(hours, record, strict=True)
    ]
    offsets = np.concatenate([[0], np.cumsum(hours)])
    has_film = rng.random(stays) < 0.6
    rows, pixels = [], {}
    for i in np.flatnonzero(has_film):
        for k, at in enumerate(np.sort(rng.uniform(1, 60, rng.integers(1, films + 1)))):
            name = f"film{i:04d}_{k}"
            rows.append((stay[i], name, at, rng.choice(["AP", "PA"])))
            picture = rng.normal(100, 20, (SIZE, SIZE))
            picture[: SIZE // 2] += 25 * film[i]
            pixels[name] = np.clip(picture, 0, 255).astype(np.uint8)
    taken = pd.DataFrame(rows, columns=["stay_id", "dicom_id", "hours_from_intime", "view"])
    last = taken[taken["hours_from_intime"] <= 48].groupby("stay_id")["dicom_id"].last()
    samples = pd.DataFrame(
        {
            "sample_id": [f"{s}_48" for s in stay],
            "stay_id": stay,
            "subject_id": subject,
            "split": split,
            "predict_at_hours": 48.0,
            "dicom_id": pd.Series(stay).map(last).to_numpy(object),
            "mortality": rng.permutation(death) if shuffled else death,
        }
    )
    features = folder / "features"
    (features / "samples").mkdir(parents=True, exist_ok=True)
    taken.to_parquet(features / "stay_films.parquet")
    images = taken.merge(samples[["stay_id", "subject_id", "split"]])
    images["Edema"] = (
        images["stay_id"].map(pd.Series(film, index=stay)) + rng.logistic(size=len(images)) > 0.5
    ).astype(float)
    images.assign(study_id=np.arange(len(images))).to_parquet(features / "images.parquet")
    samples.to_parquet(features / "samples" / "mortality.parquet")
    phenotypes = samples.assign(predict_at_hours=hours - 0.5, phenotype_2=death, phenotype_49=rng.permutation(death))
    phenotypes["dicom_id"] = pd.Series(stay).map(taken.groupby("stay_id")["dicom_id"].last()).to_numpy(object)
    late = phenotypes["dicom_id"].map(taken.set_index("dicom_id")["hours_from_intime"]) > phenotypes["predict_at_hours"]
    phenotypes.loc[late, "dicom_id"] = None
    phenotypes.drop(columns="mortality").to_parquet(features / "samples" / "phenotypes.parquet")
    pd.DataFrame(
        {"stay_id": stay, "subject_id": subject, "los_hours": hours - 0.5, "age_years": rng.integers(18, 90, stays)}
    ).assign(split=split).to_parquet(features / "stays.parquet")
    names = [f"v{i}" for i in range(5)]
    observed = (rng.random((offsets[-1], 17)) < 0.5).astype(np.uint8)
    save_file(
        {
            "stay_id": stay,
            "offsets": offsets,
            "values": np.concatenate(values).astype(np.float32),
            "observed": observed,
        },
        features / "series.safetensors",
    )
    normaliser = {"mean": [0.0] * 4 + [None], "std": [1.0] * 4 + [None]}
    write_json(features / "series.json", series_json(names, [f"v{i}" for i in range(17)], normaliser=normaliser))
    write_json(features / "provenance.json", {})
    pixels.pop(taken["dicom_id"].iloc[0])
    return MemoryStore(pixels)


@pytest.fixture
def make_icu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """A function that writes an ICU world, puts its store in place of the one on disk, and gives its folder."""

    def make(**options: object) -> Path:
        store = icu_world(tmp_path, **options)  # type: ignore[arg-type]
        monkeypatch.setattr("finetune.fusion.inputs.Store", lambda folder: store)
        return tmp_path

    return make
