"""The fusion models: sizes, and invariances of their outputs."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor, nn

from finetune.fusion.cross_attention import kind_of
from finetune.fusion.models import MODELS, FilmOnly, MedFuse, RecordLSTM, Sizes, last_hour, mean_hours

SIZES = Sizes(inputs=7, film=6, labels=3, hidden=32, joint=10)
FUSED = [name for name in MODELS if not name.startswith("record_") and name != "film_only"]


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def make(name: str, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return MODELS[name](SIZES).eval()


def inputs(model: nn.Module, rows: int = 5, hours: int = 9, seed: int = 0) -> dict[str, Tensor]:
    """Rows of different lengths, the first with a film, the second without."""
    make = torch.Generator().manual_seed(seed)
    lengths = torch.arange(rows) % hours + 1
    series = torch.randn(rows, hours, SIZES.inputs, generator=make)
    count = torch.arange(1, rows + 1) % 2 * torch.randint(1, 4, (rows,), generator=make)
    film = torch.randn(rows, 4, SIZES.film, generator=make)
    age = torch.rand(rows, 4, generator=make) * 48
    has_image = torch.arange(4) < count[:, None]
    if not getattr(model, "many_films", False):
        film, age, has_image = film[:, 0], age[:, 0], has_image[:, 0]
    return {"series": series, "lengths": lengths, "film": film, "has_image": has_image, "hours": age}


def test_the_record_lstm_has_the_published_number_of_weights() -> None:
    assert count(RecordLSTM(Sizes(inputs=76, film=512, labels=25))) == 874_777


def test_medfuse_has_the_published_number_of_weights_in_use() -> None:
    """With resnet34 on three channels and a film branch that keeps its 14-finding head."""
    film_encoder = timm.create_model("resnet34", num_classes=0, in_chans=3)
    medfuse = MedFuse(Sizes(inputs=76, film=512, labels=25, film_labels=14))
    assert count(film_encoder) + count(medfuse) == 23_887_744
    assert count(film_encoder) + count(FilmOnly(Sizes(inputs=76, film=512, labels=14))) == 21_291_854
    assert count(medfuse.fuse) == 1_576_960 and count(medfuse.project) == 131_328


@pytest.mark.parametrize("name", MODELS)
def test_padding_and_batch_mates_change_nothing(name: str) -> None:
    model = make(name)
    batch = inputs(model)
    whole = model(**batch).logits
    garbage = batch | {"series": torch.cat([batch["series"], torch.full((5, 4, 7), 1e3)], dim=1)}
    for i, length in enumerate(batch["lengths"]):
        garbage["series"][i, length:] = 1e3
    assert torch.allclose(model(**garbage).logits, whole, atol=1e-5)
    for i, length in enumerate(batch["lengths"]):
        alone = {key: value[i : i + 1] for key, value in batch.items()}
        alone["series"] = alone["series"][:, :length]
        assert torch.allclose(model(**alone).logits, whole[i : i + 1], atol=1e-5)


@pytest.mark.parametrize("name", FUSED)
def test_what_stands_in_a_missing_films_place_changes_nothing(name: str) -> None:
    model = make(name)
    batch = inputs(model)
    missing = ~batch["has_image"]
    assert missing.any() and batch["has_image"].any()
    other = batch | {"film": torch.where(missing[..., None], 50.0, batch["film"])}
    rows = ~batch["has_image"] if batch["has_image"].ndim == 1 else torch.ones(5, dtype=torch.bool)
    assert torch.allclose(model(**batch).logits[rows], model(**other).logits[rows], atol=1e-5)


@pytest.mark.parametrize("name", [*FUSED, "film_only"])
def test_the_film_changes_the_logits(name: str) -> None:
    model = make(name)
    batch = inputs(model)
    moved = model(**batch | {"film": batch["film"] + 1}).logits - model(**batch).logits
    seen = batch["has_image"] if batch["has_image"].ndim == 1 else batch["has_image"].any(1)
    assert (moved.abs().sum(1)[seen] > 1e-4).all()


@pytest.mark.parametrize("name", [*FUSED, "record_lstm", "record_transformer"])
def test_the_record_changes_the_logits(name: str) -> None:
    model = make(name)
    batch = inputs(model)
    moved = model(**batch | {"series": batch["series"] + 1}).logits - model(**batch).logits
    assert (moved.abs().sum(1) > 1e-4).all()


@pytest.mark.parametrize("name", MODELS)
def test_every_weight_can_learn(name: str) -> None:
    model = make(name).train()
    output = model(**inputs(model, rows=16))
    sum((part.square().mean() for part in output.parts.values()), output.logits.square().mean()).backward()
    idle = [n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert not idle


def test_attention_gives_a_missing_film_no_weight() -> None:
    model = make("attention")
    batch = inputs(model)
    weights = model(**batch).weights
    assert torch.allclose(weights.sum(1), torch.ones(5))
    assert (weights[~batch["has_image"], 1] == 0).all() and (weights[batch["has_image"], 1] > 0).all()


def test_late_averages_where_there_is_a_film() -> None:
    model = make("late")
    batch = inputs(model)
    output = model(**batch)
    mean = (output.parts["record"] + output.parts["film"]) / 2
    assert torch.allclose(output.logits, torch.where(batch["has_image"][:, None], mean, output.parts["record"]))


def test_medfuse_time_sees_the_change_between_films() -> None:
    """Two stays whose last film is the same and whose film before differs."""
    model = make("medfuse_time")
    batch = inputs(model)
    batch["has_image"][:] = torch.tensor([True, True, False, False])
    other = batch | {"film": batch["film"].clone()}
    other["film"][:, 0] += 1
    assert (model(**batch).logits - model(**other).logits).abs().sum(1).min() > 1e-4


def test_the_model_of_the_page_keeps_what_every_model_must_keep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """docs/adding_a_model.md: its class, as it stands there, in under 100 lines."""
    page = (Path(__file__).resolve().parents[2] / "docs/adding_a_model.md").read_text(encoding="utf-8")
    code = page.split("```python\n")[1].split("```")[0]
    assert len(code.splitlines()) < 100
    (tmp_path / "my_model.py").write_text(code, encoding="utf-8")
    monkeypatch.setitem(MODELS, "bilinear", kind_of(f"{tmp_path / 'my_model.py'}:Bilinear"))
    test_padding_and_batch_mates_change_nothing("bilinear")
    test_what_stands_in_a_missing_films_place_changes_nothing("bilinear")
    test_the_film_changes_the_logits("bilinear")
    test_every_weight_can_learn("bilinear")


def test_helpers_of_a_worked_table() -> None:
    states = torch.tensor([[[1.0], [3.0], [9.0]], [[2.0], [4.0], [6.0]]])
    lengths = torch.tensor([2, 3])
    assert last_hour(states, lengths).tolist() == [[3.0], [6.0]]
    assert mean_hours(states, lengths).tolist() == [[2.0], [4.0]]
