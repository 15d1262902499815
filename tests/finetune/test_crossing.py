"""Models over tokens, and the note as one more token: invariances of their outputs."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from finetune.fusion.cross_attention import TOKEN_MODELS
from finetune.fusion.models import Attention, MedFuse, Note, Sizes
from finetune.metrics import by_count, prevalence, thirds

SIZES = Sizes(inputs=7, film=6, labels=3, hidden=32, joint=10, text=5, places=4)


def make(name: str) -> nn.Module:
    torch.manual_seed(0)
    return TOKEN_MODELS[name](SIZES).eval()


def tokens(rows: int = 6) -> dict[str, Tensor]:
    """Rows with and without a film, notes of no, one and more tokens."""
    draw = torch.Generator().manual_seed(0)
    lengths = torch.arange(rows) % 4 * 2
    note = torch.randn(rows, 7, 5, generator=draw)
    note[torch.arange(7) >= lengths[:, None]] = 0
    has_image = torch.arange(rows) % 3 != 1
    film = torch.randn(rows, 4, 6, generator=draw) * has_image[:, None, None]
    return {"film": film, "has_image": has_image, "note": note, "lengths": lengths}


@pytest.mark.parametrize("name", TOKEN_MODELS)
def test_padding_garbage_and_batch_mates_change_nothing(name: str) -> None:
    model, batch = make(name), tokens()
    whole = model(**batch).logits
    assert whole.isfinite().all()
    note = torch.cat([batch["note"], torch.full((6, 3, 5), 1e3)], dim=1)
    note[torch.arange(10) >= batch["lengths"][:, None]] = 1e3
    film = torch.where(batch["has_image"][:, None, None], batch["film"], 1e3)
    assert torch.allclose(model(**batch | {"note": note, "film": film}).logits, whole, atol=1e-5)
    for i, length in enumerate(batch["lengths"]):
        alone = {key: value[i : i + 1] for key, value in batch.items()}
        alone["note"] = alone["note"][:, : max(1, int(length))]
        assert torch.allclose(model(**alone).logits, whole[i : i + 1], atol=1e-5)


@pytest.mark.parametrize("name", TOKEN_MODELS)
def test_each_model_sees_what_its_name_says(name: str) -> None:
    model, batch = make(name), tokens()
    whole = model(**batch).logits
    film = model(**batch | {"film": batch["film"] + torch.arange(6.0)}).logits - whole
    note = model(**batch | {"note": batch["note"] + torch.arange(5.0)}).logits - whole
    moved = {"film": film.abs().sum(1) > 1e-4, "note": note.abs().sum(1) > 1e-4}
    there = {"film": batch["has_image"], "note": batch["lengths"] > 0}
    sees = TOKEN_MODELS[name].sees  # type: ignore[attr-defined]
    for side in ("film", "note"):
        assert torch.equal(moved[side], there[side] if side in sees else torch.zeros(6, dtype=torch.bool)), side


@pytest.mark.parametrize("name", TOKEN_MODELS)
def test_every_weight_can_learn(name: str) -> None:
    model = make(name).train()
    model(**tokens(12)).logits.square().mean().backward()
    idle = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert not idle


@pytest.mark.parametrize("kind", [MedFuse, Attention])
def test_record_film_and_note_may_each_be_missing(kind: type[nn.Module]) -> None:
    """All eight cases, alone and together; values in place of a missing input have no effect."""
    torch.manual_seed(0)
    model = kind(SIZES).eval()
    there = torch.tensor(list(itertools.product([True, False], repeat=3)))
    series, film, text = torch.randn(8, 9, 7), torch.randn(8, 6), torch.randn(8, 5)
    lengths, hours = torch.full((8,), 9), torch.zeros(8)

    def run(series: Tensor, film: Tensor, text: Tensor, rows: slice = slice(None)) -> Tensor:
        record, image, note = there[rows].unbind(1)
        given = (series[rows], lengths[rows], film[rows], image, hours[rows])
        logits: Tensor = model(*given, note=Note(text[rows], note, record)).logits
        return logits

    whole = run(series, film, text)
    assert whole.isfinite().all() and len(whole.round(decimals=4).unique(dim=0)) == 8
    garbage = [
        torch.where(there[:, i].view(-1, *[1] * (x.ndim - 1)), x, 1e3) for i, x in enumerate((series, film, text))
    ]
    assert torch.allclose(run(*garbage), whole, atol=1e-5)
    for i in range(8):
        assert torch.allclose(run(series, film, text, slice(i, i + 1)), whole[i : i + 1], atol=1e-5)


def test_attention_weighs_three_and_gives_what_is_missing_nothing() -> None:
    model = Attention(SIZES).eval()
    there = torch.tensor(list(itertools.product([True, False], repeat=3)))
    record, image, note = there.unbind(1)
    given = (torch.randn(8, 9, 7), torch.full((8,), 9), torch.randn(8, 6), image, torch.zeros(8))
    weights = model(*given, note=Note(torch.randn(8, 5), note, record)).weights
    assert torch.equal(weights > 0, there) and torch.allclose(weights[:7].sum(1), torch.ones(7))


def test_findings_fall_into_thirds_and_films_into_counts() -> None:
    names = ["Edema", "Fracture", "No Finding", "Pneumonia", "Support Devices", "Never"]
    labels = np.array([[1, 0, 0, 1, 1, 0], [1, 1, 0, 1, 1, 0], [0, 0, 1, 0, 1, 0], [1, 0, 0, np.nan, 0, 0]], np.float32)
    shares = prevalence(names, labels)
    assert shares["Pneumonia"] == pytest.approx(2 / 3) and shares["Fracture"] == 0.25
    groups = list(thirds(shares).values())
    assert groups == [["Fracture", "No Finding"], ["Pneumonia", "Edema"], ["Support Devices"]]
    counts = {name: rows.tolist() for name, rows in by_count(names, labels).items()}
    assert counts["findings=1"] == [False, False, False, True] and counts["findings=2"][0] and counts["findings=3+"][1]
