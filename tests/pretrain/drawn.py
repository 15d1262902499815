"""Films drawn from noise, and the config of a store of them."""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pretrain.config import ImagesConfig
from pretrain.store import Store


def draw(path: Path, seed: int, height: int = 40, width: int = 32) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 256, (height // 4, width // 4), dtype=np.uint8)
    Image.fromarray(noise).resize((width, height)).save(path, quality=95)


def config(out: Path, films: Path | None = None, mimic: Path | None = None, **more: Any) -> ImagesConfig:
    where = {"films": str(films)} if films else {"mimic_cxr": str(mimic)}
    return ImagesConfig(**{"out": str(out), "size": 32, "workers": 1, **where, **more})


def whole(folder: Path) -> dict[str, bytes]:
    store = Store(folder)
    return {i: store[i].tobytes() for i in store.index.dicom_id}


VIEWS = [("AP", ""), ("PA", ""), ("LATERAL", ""), ("", "postero-anterior"), ("", "lateral"), ("", ""), ("LL", "")]
