"""Fusion runs with notes: the gain of the note token on a planted signal, and errors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from pydantic import ValidationError

from configs import UserError
from finetune.compare import compare_runs
from finetune.config import FuseConfig
from finetune.fusion import inputs
from finetune.fusion import inputs as module
from finetune.fusion.train import fuse
from finetune.metrics import THIRDS, thirds
from finetune.results import read_results

Make = Callable[..., Path]
pytestmark = pytest.mark.usefixtures("word_encoder")


def config(folder: Path, **changes: Any) -> FuseConfig:
    small = {"hidden": 16, "layers": 1, "joint": 16, "epochs": 3, "samples": 20, "lr": 1e-2, "batch_size": 32}
    paths = {"features": str(folder / "features"), "store": "memory", "encoder": "pixels", "out": str(folder / "run")}
    return FuseConfig(**(paths | small | changes))


def reads(notes: Path, **more: Any) -> dict[str, Any]:
    return {"notes": str(notes), "text_encoder": "words", **more}


@pytest.fixture
def told(make_icu: Make, write_notes: Make) -> tuple[Path, Path]:
    """Data in which most films have notes that indicate death; findings for the film tasks."""
    folder = make_icu(stays=500)
    rng = np.random.default_rng(1)
    samples = pd.read_parquet(folder / "features/samples/mortality.parquet").dropna(subset="dicom_id")
    words = {0: ["walks", "eats", "talks", "stable"], 1: ["shock", "gray", "cold", "mottled"]}
    notes = {
        film: " ".join(rng.choice(words[death if rng.random() < 0.9 else 1 - death], 3))
        for film, death in zip(samples["dicom_id"], samples["mortality"], strict=True)
        if rng.random() < 0.9
    }
    images = pd.read_parquet(folder / "features/images.parquet")
    for name, chance in (("Fracture", 0.1), ("Pneumonia", 0.3)):
        images[name] = (rng.random(len(images)) < chance).astype(float)
    images.to_parquet(folder / "features/images.parquet")
    columns = ["dicom_id", "stay_id", "subject_id", "split", "Edema", "Fracture", "Pneumonia"]
    findings = images[columns].assign(sample_id=images["dicom_id"], predict_at_hours=np.nan)
    findings.to_parquet(folder / "features/samples/findings.parquet")
    return folder, write_notes(notes)


def auroc(run: Path, subset: str = "paired") -> float:
    _, rows = read_results(run)
    rows = rows[(rows["metric"] == "auroc") & (rows["split"] == "test") & (rows["label"] == "macro")]
    return float(rows.set_index("subset")["value"][subset])


@pytest.mark.parametrize("model", ["medfuse", "attention"])
def test_the_note_adds_what_it_tells(told: tuple[Path, Path], model: str) -> None:
    folder, notes = told
    options = {"model": model, "epochs": 20, "film": "features", "samples": 0}
    without = fuse(config(folder, **options, out=str(folder / "without")))
    found = fuse(config(folder, **options, **reads(notes, text="features")))
    assert auroc(found) > auroc(without) + 0.1
    about, _ = read_results(found)
    assert about["text"]["films_with_note"] < about["text"]["films"] and about["text"]["encoder"] == "words"
    table = pd.read_parquet(found / "predictions/test.parquet")
    assert ("weight_text" in table) == (model == "attention")


def test_a_notes_findings_come_from_heads_fitted_on_train(told: tuple[Path, Path]) -> None:
    folder, notes = told
    about, _ = read_results(fuse(config(folder, epochs=1, film="features", **reads(notes, text="both"))))
    assert 0 <= about["text"]["findings_head"]["val_auroc"] <= 1


def test_a_note_is_read_where_its_film_cannot_be(told: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    real = module.read
    monkeypatch.setattr(module, "read", lambda *a: seen.append(real(*a)) or seen[-1])
    folder, notes = told
    films = inputs.Store("memory").films  # type: ignore[attr-defined]
    lost = next(film for film in pd.read_parquet(notes / "notes.parquet")["dicom_id"] if film in films)
    del films[lost]
    fuse(config(folder, epochs=1, film="features", **reads(notes, text="features")))
    samples = seen[0][0]
    row = (samples.table["dicom_id"] == lost).to_numpy()
    assert (samples.note[row] >= 0).all() and not samples.has_image[row].any() and row.any()


@pytest.mark.parametrize("model", ["cross_attention", "film_tokens", "note_tokens"])
def test_models_over_tokens_are_rated_by_prevalence_and_count(told: tuple[Path, Path], model: str) -> None:
    folder, notes = told
    run = fuse(config(folder, model=model, task="findings", pairing="paired", epochs=1, **reads(notes)))
    about, rows = read_results(run)
    assert {"macro rarest third", "macro middle third", "macro commonest third"} <= set(rows["label"])
    assert {"findings=1", "findings=2"} <= set(rows.loc[rows["split"] == "test", "subset"])
    assert about["prevalence"]["Fracture"] < about["prevalence"]["Pneumonia"]
    assert pd.read_parquet(run / "predictions/test.parquet")["has_image"].all()


def test_films_without_a_film_or_a_note_are_predicted_too(told: tuple[Path, Path]) -> None:
    """Partial pairing: each row once."""
    folder, notes = told
    run = fuse(config(folder, model="cross_attention", task="findings", epochs=1, samples=0, **reads(notes)))
    table = pd.read_parquet(run / "predictions/test.parquet")
    wanted = pd.read_parquet(folder / "features/samples/findings.parquet").query("split == 'test'")
    assert sorted(table["sample_id"]) == sorted(wanted["sample_id"]) and table.filter(like="logit_").notna().all().all()


def test_a_note_from_after_its_film_is_refused(told: tuple[Path, Path]) -> None:
    folder, notes = told
    images = pd.read_parquet(folder / "features/images.parquet")
    images.assign(taken_at=pd.Timestamp("2100-01-01")).to_parquet(folder / "features/images.parquet")
    with pytest.raises(UserError, match="known only after their film"):
        fuse(config(folder, **reads(notes)))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"notes": "n"}, "go together"),
        ({"notes": "n", "text_encoder": "e", "model": "concat"}, "reads none"),
        ({"model": "cross_attention", "task": "findings"}, "reads the films' notes"),
        ({"notes": "n", "text_encoder": "e", "model": "note_tokens"}, "is for findings or radiology"),
        ({"notes": "n", "text_encoder": "e", "model": "film_tokens", "task": "findings", "freeze": False}, "frozen"),
    ],
)
def test_what_does_not_go_together_is_refused(tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        config(tmp_path, **changes)


def test_a_comparison_goes_by_prevalence_and_by_the_number_of_findings(told: tuple[Path, Path]) -> None:
    folder, notes = told
    options = {"task": "findings", "pairing": "paired", "epochs": 1, "samples": 0}
    both = fuse(config(folder, model="cross_attention", out=str(folder / "both"), **options, **reads(notes)))
    film = fuse(config(folder, model="film_tokens", out=str(folder / "film"), **options))
    table = compare_runs([both], [film], samples=50).set_index("label")
    assert list(table.index[:4]) == ["macro", *THIRDS] and {"macro, findings=1", "macro, findings=2"} <= set(
        table.index
    )
    rarest = thirds(read_results(both)[0]["prevalence"])[THIRDS[0]]
    assert table.loc[THIRDS[0], "difference"] == pytest.approx(table.loc[rarest, "difference"].mean())
    assert table.loc[["macro", *THIRDS, "macro, findings=1"], "p_holm"].isna().all()
    assert table.loc["Edema", "p_holm"] >= table.loc["Edema", "p"]
