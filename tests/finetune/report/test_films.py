"""The report's encoder section: points for all, films only on request."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from finetune.report import films as report_films
from finetune.run_folders import Run, read_runs
from pretrain import encoder as encoders

SIZE = 32


class Films:
    """A store of drawn films."""

    def __init__(self, folder: Path) -> None:
        self.index = pd.read_parquet(folder.parent / "features" / "images.parquet", columns=["dicom_id"])

    def read(self, films: list[str]) -> np.ndarray:
        rng = np.random.default_rng(len(films))
        return rng.integers(0, 255, (len(films), SIZE, SIZE), dtype=np.uint8)


@pytest.fixture(params=["vit_tiny_patch16_224", "densenet121"])
def run(request: pytest.FixtureRequest, report_runs: list[Path], monkeypatch: pytest.MonkeyPatch) -> Run:
    """A pretraining with weights and a store."""
    args: dict[str, Any] = {"growth_rate": 4, "block_config": [1, 1]}
    if request.param.startswith("vit"):
        args = {"embed_dim": 24, "depth": 2, "num_heads": 3, "patch_size": 8}
    torch.manual_seed(0)
    one = read_runs(report_runs[:1])[0]
    store = report_runs[0].parents[1] / "store"
    store.mkdir(exist_ok=True)
    (store / "store.json").write_text("{}", encoding="utf-8")
    folder = report_runs[0].parents[1] / f"encoder_{request.param}"
    encoder = encoders.create(request.param, image_size=SIZE, model_args=args)
    encoders.save(folder / "encoder", encoder)
    monkeypatch.setattr(report_films, "Store", Films)
    config = one.config | {"store": str(store)}
    return Run(**{**one.__dict__, "folder": folder, "config": config, "encoder": encoder.meta})


def test_no_film_is_shown_unless_asked_for(run: Run) -> None:
    html = report_films.films_section([run], with_films=False)
    assert "figure-map-" in html and "<img" not in html and "data:image" not in html


def test_films_neighbours_and_attention_are_shown_where_asked_for(run: Run) -> None:
    html = report_films.films_section([run], with_films=True)
    assert "figure-nearest-" in html and "figure-attention-" in html
    assert html.count("<img") == 4 * 6 + report_films.SHOWN


def test_weights_that_are_gone_are_named_and_cost_no_other_part(run: Run) -> None:
    (run.folder / "encoder" / "encoder.safetensors").unlink()
    html = report_films.films_section([run], with_films=True)
    assert "cannot be shown" in html and "<figure" not in html


def test_the_map_names_no_film_and_no_subject(run: Run) -> None:
    html = report_films.films_section([run], with_films=True)
    assert "film00" not in html and "1000000" not in html


def test_rollout_is_a_distribution_over_tokens_and_leaves_the_encoder_as_it_was() -> None:
    torch.manual_seed(0)
    encoder = encoders.create(
        "vit_tiny_patch16_224",
        image_size=SIZE,
        model_args={"embed_dim": 24, "depth": 2, "num_heads": 3, "patch_size": 8},
    ).eval()
    x = torch.randn(3, 1, SIZE, SIZE)
    before = encoder(x)
    maps = report_films.rollout(encoder, x)
    assert maps.shape == (3, 4, 4) and (maps > 0).all() and (maps.sum(axis=(1, 2)) < 1).all()
    torch.testing.assert_close(encoder(x), before)


def test_grad_cam_lights_up_where_the_map_is_strong() -> None:
    class Net(torch.nn.Module):
        is_vit = False

        def features(self, x: torch.Tensor) -> torch.Tensor:
            return torch.relu(x)

        def pool(self, maps: torch.Tensor, pool: str) -> torch.Tensor:
            return maps.mean(dim=(2, 3))

    x = torch.zeros(1, 2, 4, 4)
    x[0, 0, 1, 2] = 5.0
    heat = report_films.grad_cam(Net(), x)  # type: ignore[arg-type]
    assert np.unravel_index(heat[0].argmax(), (4, 4)) == (1, 2) and (heat > 0).sum() == 1
