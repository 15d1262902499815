"""A film's features are equal in all ways of computing them; `pytest -s` prints the table of
docs/using_the_encoder.md."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

import finetune.fusion.inputs
import finetune.probe.main
from finetune.config import FuseConfig, ProbeConfig
from finetune.embed import embed, nearest
from finetune.fusion.train import fuse
from pretrain import encoder as encoders
from pretrain.config import ImagesConfig
from pretrain.encoder.preprocess import Preprocess
from pretrain.store import Store, pack

PAGE = (Path(__file__).parents[2] / "docs/using_the_encoder.md").read_text(encoding="utf-8")
SIDE = 48  # of the store; a JPEG of more than twice that is decoded at a reduced scale
SHAPES = {
    "wide, large": (150, 260), "tall, large": (260, 150), "square, large": (204, 204),
    "wide, small": (30, 44), "tall, small": (44, 31), "square, small": (37, 37), "of the store's size": (SIDE, SIDE),
}  # fmt: skip
TINY = {"depth": 1, "embed_dim": 24, "num_heads": 2, "patch_size": 8}
DENSE = {"block_config": (2, 2), "growth_rate": 8}
ENCODERS: dict[str, dict[str, Any]] = {
    "ViT": {"arch": "vit_tiny_patch16_224", "model_args": TINY},
    "DenseNet": {"arch": "densenet121", "model_args": DENSE, "in_chans": 3},
}
PREPARED = {"ViT": Preprocess(32), "DenseNet": Preprocess(40, "dataset", 0.45, 0.23, 3)}


def draw(folder: Path, ids: list[str]) -> dict[str, Path]:
    """Films of all shapes, as PNG and JPEG, smooth like real films."""
    folder.mkdir()
    paths = {}
    for i, name in enumerate(ids):
        shape = list(SHAPES.values())[i % len(SHAPES)]
        coarse = np.random.default_rng(i).integers(20, 235, (9, 9), dtype=np.uint8)
        film = Image.fromarray(coarse).resize(shape[::-1], Image.Resampling.BICUBIC)
        paths[name] = folder / f"{name}.{'jpg' if i // len(SHAPES) % 2 else 'png'}"
        film.save(paths[name])
    return paths


def plain(folder: Path, films: list[Path]) -> np.ndarray:
    """Run the lines of the docs page unchanged."""
    (code,) = re.findall(r"```python\n(import json.*?)```", PAGE, re.DOTALL)
    own = code.replace("demo/runs/pretrain_ehr/encoder", folder.as_posix()).partition("\nfilms = ")[0]
    assert sum(bool(re.match(r"    \w", line)) for line in own.splitlines()) <= 12, (
        "ten lines or so, from film to features"
    )
    space: dict[str, Any] = {}
    exec(own, space)
    return np.stack([space["features"](film).numpy() for film in films])


@pytest.mark.parametrize("kind, encoding", [("ViT", "raw"), ("DenseNet", "raw"), ("ViT", "jpeg")])
def test_five_ways_give_the_same_features(
    make_icu: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, kind: str, encoding: str
) -> None:
    house = make_icu(stays=40)
    ids = pd.read_parquet(house / "features/images.parquet")["dicom_id"].tolist()
    films = draw(house / "films", ids)
    given = {"films": str(house / "films"), "out": str(house / "store"), "size": SIDE, "workers": 1}
    store = Store(pack(ImagesConfig.model_validate(given | {"encoding": encoding})))
    torch.manual_seed(0)
    made = encoders.create(image_size=PREPARED[kind].size, preprocess=PREPARED[kind], **ENCODERS[kind])
    made.preprocess = Preprocess(**{**made.preprocess.__dict__, "store": store.square})
    folder = encoders.save(house / "run/encoder", made.eval())
    got: dict[str, dict[str, np.ndarray]] = {}

    def watched(name: str, module: Any) -> None:
        original = module.film_features

        def film_features(frozen: Any, store: Any, films: list[str], **more: Any) -> Any:
            out = original(frozen, store, films, **more)
            got[name] = dict(zip(films, out[made.meta["pool"]], strict=True))
            return out

        monkeypatch.setattr(module, "film_features", film_features)

    watched("probe", finetune.probe.main)
    watched("fuse", finetune.fusion.inputs)
    monkeypatch.setattr("finetune.fusion.inputs.Store", Store)
    common = {key: str(house / key) for key in ("features", "store")} | {"encoder": str(house / "run"), "samples": 0}
    knn = {"method": "knn", "neighbours": [3], "views": "all", "out": str(house / "runs/probe")}
    finetune.probe.main.probe(ProbeConfig.model_validate(common | knn))
    one = {"model": "film_only", "film": "features", "epochs": 1, "out": str(house / "runs/fuse")}
    fuse(FuseConfig.model_validate(common | one))
    table = pd.read_parquet(embed(str(house / "run"), str(house / "films"), str(house / "embeddings.parquet")))
    got["embed"] = dict(zip(table["dicom_id"], table.filter(regex=r"^f\d+$").to_numpy(), strict=True))
    some = ids[: 2 * len(SHAPES)]
    got["encoder.embed"] = dict(zip(some, encoders.embed(folder, [films[i] for i in some]).numpy(), strict=True))
    if encoding == "raw":
        got["timm and torchvision alone"] = dict(zip(some, plain(folder, [films[i] for i in some]), strict=True))
    original, got["nearest"] = encoders.embed, {}
    for name in some:
        copy = films[name].with_name(f"copy{films[name].suffix}")
        copy.write_bytes(films[name].read_bytes())

        def kept(*args: Any, name: str = name, **more: Any) -> torch.Tensor:
            out = original(*args, **more)
            got["nearest"][name] = out[0].numpy()
            return out

        with monkeypatch.context() as patch:
            patch.setattr(encoders, "embed", kept)
            assert nearest(str(house / "embeddings.parquet"), str(copy), number=1)["dicom_id"].tolist() == [name]
    print(f"\n| {kind} | films | largest difference |\n|---|---|---|")
    for way, features in got.items():
        both = sorted(features.keys() & got["probe"].keys())
        assert len(both) >= min(len(some), 7)
        largest = max(float(np.abs(features[i] - got["probe"][i]).max()) for i in both)
        print(f"| {way} | {len(both)} | {largest:.1e} |")
        assert largest < 1e-5, way
        assert f"| {way} |" in PAGE


def test_pixels_in_any_form_give_the_features_of_the_file(tmp_path: Path) -> None:
    torch.manual_seed(0)
    made = encoders.create("vit_tiny_patch16_224", image_size=32, model_args=TINY).eval()
    square = Store(_packed(tmp_path)).square
    made.preprocess = Preprocess(**{**made.preprocess.__dict__, "store": square})
    (path,) = (tmp_path / "films").glob("*.png")
    film = np.asarray(Image.open(path))
    wanted = encoders.embed(made, path)
    for form in (
        [path], str(path), film, film[None], torch.from_numpy(film.copy()), [film], [torch.from_numpy(film.copy())],
        square(path), square(path)[None], (path for _ in range(1)),
    ):  # fmt: skip
        torch.testing.assert_close(encoders.embed(made, form), wanted, rtol=0, atol=0)


def _packed(folder: Path) -> Path:
    draw(folder / "films", ["film"])
    given = {"films": str(folder / "films"), "out": str(folder / "store"), "size": SIDE, "workers": 1}
    return pack(ImagesConfig.model_validate(given))
