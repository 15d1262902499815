"""A small pretraining: its config and its losses."""

import json
from pathlib import Path

import yaml

from configs import load
from pretrain.config import PretrainConfig

NUM = 24  # films
SMALL = {
    "encoder": {
        "arch": "vit_tiny_patch16_224",
        "image_size": 32,
        "model_args": {"embed_dim": 24, "depth": 2, "num_heads": 2},
    },
    "views": {"num_focal": 2, "focal_size": 16},
    "loss": {"prototypes": 8},
    "head": {"hidden": 16, "out": 8},
    "optim": {"batch_size": 8, "steps": 6, "lr_batch": None, "warmup_steps": 2},
}
SMALL_RESNET = {"arch": "resnet34", "model_args": {"channels": [8, 8, 16, 16], "layers": [1, 1, 1, 1]}}


def config(data: Path, out: Path, *overrides: str, **sections) -> PretrainConfig:
    path = out.parent / f"{out.name}.yaml"
    merged = {key: {**SMALL.get(key, {}), **sections.get(key, {})} for key in SMALL} | {
        key: value for key, value in sections.items() if key not in SMALL
    }
    merged |= {"features": str(data / "features"), "store": str(data / "store"), "out": str(out)}
    path.write_text(yaml.safe_dump(merged))
    return load(PretrainConfig, path, overrides)


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["train/loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
