"""Frozen features of films, computed once and kept on disk under the hashes of what made them.

Comes in: an encoder's name (a folder, `random:...`, `pixels`), a store, film ids. Goes out: (N, D) a pool.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from timm.layers import resample_abs_pos_embed
from torch import Tensor

from configs import UserError
from ehr_features.files import digest, new_file
from ehr_features.progress import Bar
from finetune.config import WEIGHTS
from pretrain import encoder as encoders
from pretrain.encoder.preprocess import Preprocess
from pretrain.encoder.weights import CLASSIFIERS, COUNTER, read_state

if TYPE_CHECKING:
    from finetune.config import WeightsConfig
    from pretrain.encoder import Encoder
    from pretrain.store import Store

Features = dict[str, NDArray[np.float32]]  # pool -> (N, D)


@dataclass(frozen=True)
class Frozen:
    """What turns films into features.

    Attributes:
        name: for tables: the folder, `pixels`, `random:...`.
        key: changes when anything that the features depend on does.
        encode: uint8 (B, S, S) -> {pool: (B, D)}.
        folder: encoder/ whose pretraining the guard looks into; None where nothing was learned.
        about: parameters, input size, films seen: what every row of a comparison carries.
    """

    name: str
    key: str
    encode: Callable[[NDArray[np.uint8]], Features]
    folder: Path | None = None
    about: Mapping[str, Any] = field(default_factory=dict)


def open_frozen(
    spec: str,
    *,
    seed: int = 0,
    pixels: int = 16,
    device: str | torch.device = "cpu",
    weights: WeightsConfig | None = None,
) -> Frozen:
    """The frozen encoder that a config names.

    Args:
        spec: an encoder/ folder, a run with one, `random:ARCH`, `random:FOLDER`, `pixels`, or a weights file.
        seed: of random weights.
        pixels: side of the raw-pixel baseline.
        weights: what a bare weights file is.
    Raises: UserError: no such encoder.
    """
    if spec == "pixels":

        def shrink(films: NDArray[np.uint8]) -> Features:
            small = torch.nn.functional.adaptive_avg_pool2d(torch.from_numpy(films)[:, None].float() / 255, pixels)
            return {"avg": small.flatten(1).numpy()}

        key = f"pixels{pixels}"
        about: dict[str, Any] = {"hash": key, "parameters": 0, "image_size": pixels, "films_seen": 0, "weights": "none"}
        return Frozen(f"pixels {pixels}x{pixels}", key, shrink, None, about)
    encoder, folder = open_any(spec, seed, weights)
    encoder = encoder.to(device).eval()

    @torch.inference_mode()
    def encode(films: NDArray[np.uint8]) -> Features:
        features = encoder.features(encoder.preprocess(films).to(device))
        return {pool: encoder.pool(features, pool).float().cpu().numpy() for pool in encoder.pools if pool != "max"}

    about = describe(encoder, spec, folder)
    return Frozen(spec, str(about["hash"]), encode, folder, about)


def open_any(spec: str, seed: int = 0, weights: WeightsConfig | None = None) -> tuple[Encoder, Path | None]:
    """The encoder, and the folder or file that it was trained in (None for random weights). Raises: UserError."""
    if spec.startswith("random:") and weights is not None:
        if spec != f"random:{weights.arch}":
            raise UserError(f"encoder={spec} and weights.arch={weights.arch} differ; give one architecture")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return fresh(weights), None
    if not spec.endswith(WEIGHTS) or spec.startswith("random:"):
        return open_encoder(spec, seed)
    if weights is None:
        raise UserError(f"{spec}: a bare weights file; say what it is: weights.arch=..., weights.image_size=...")
    return open_weights(spec, weights), Path(spec)


def describe(encoder: Encoder, spec: str, folder: Path | None) -> dict[str, Any]:
    """What every row of a comparison carries: parameters, input size, films seen in pretraining; `hash`: of weights."""
    step, origin = encoder.meta.get("step"), "random, timm's initialisation"
    if folder is not None:
        origin = spec if step is None or folder.is_file() else f"step {step}"
    state = {name: file_weights(value) for name, value in encoder.net.state_dict().items()}
    return {
        "hash": digest([state, encoder.meta["arch"], encoder.meta["model_args"], encoder.preprocess.to_json()]),
        "parameters": sum(p.numel() for p in encoder.net.parameters()),
        "image_size": encoder.meta["image_size"],
        "step": step,
        "arch": encoder.meta["arch"],
        "films_seen": 0 if folder is None else encoder.meta.get("num_films"),  # None: unknown
        "weights": origin,
    }


def film_features(
    frozen: Frozen, store: Store, films: Sequence[str], *, cache: Path | None = None, batch_size: int = 128
) -> Features:
    """Features of films, read from `cache` where they were computed before.

    Args:
        films: M dicom_ids, all in the store.
    Returns: pool -> (M, D) float32, rows as `films`.
    """
    wanted = sorted(set(films))
    path = None if cache is None else cache / f"films_{digest([frozen.key, store.hash, wanted])}.safetensors"
    found = _read(path)
    if found is None:
        parts: list[Features] = []
        with Bar(f"features of {frozen.name}", len(wanted), "films") as bar:
            for start in range(0, len(wanted), batch_size):
                part = wanted[start : start + batch_size]
                parts.append(frozen.encode(store.read(part)))
                bar.advance(len(part))
        found = {pool: np.concatenate([part[pool] for part in parts]).astype(np.float32) for pool in parts[0]}
        if path is not None:
            with new_file(path) as file:
                save_file({pool: np.ascontiguousarray(value) for pool, value in found.items()}, file)
    place = {film: i for i, film in enumerate(wanted)}
    rows = np.array([place[film] for film in films], dtype=np.intp)
    return {pool: value[rows] for pool, value in found.items()}


def _read(path: Path | None) -> Features | None:
    """What is in the cache; a damaged file counts as absent and is written anew."""
    if path is None or not path.is_file():
        return None
    try:
        return load_file(path)
    except (SafetensorError, OSError):
        return None


# ---- An encoder from a bare weights file of timm or torchvision: ImageNet, DINOv2, or anyone's.


def fresh(config: WeightsConfig) -> encoders.Encoder:
    """`config.arch` with random weights."""
    return encoders.create(
        config.arch,
        in_chans=config.in_chans,
        image_size=config.image_size,
        model_args=dict(config.model_args),
        preprocess=Preprocess(config.image_size, "dataset", config.mean, config.std, config.in_chans),
    )


def open_weights(path: str | Path, config: WeightsConfig) -> encoders.Encoder:
    """Build `config.arch` and fill it from `path`.

    Raises: UserError: no such file, not a file of tensors, weights of another architecture.
    """
    encoder = fresh(config)
    wanted = encoder.net.state_dict()
    state = {key: value for key, value in read_state(Path(path)).items() if not key.startswith(CLASSIFIERS)}
    state |= {key: value for key, value in wanted.items() if key.endswith(COUNTER) and key not in state}
    if "pos_embed" in state and "pos_embed" in wanted:
        prefix = 0 if encoder.net.no_embed_class else encoder.net.num_prefix_tokens
        grid = list(encoder.net.patch_embed.grid_size)
        state["pos_embed"] = resample_abs_pos_embed(state["pos_embed"], grid, num_prefix_tokens=prefix)
    if faults := encoders.differences(wanted, state):
        raise UserError(f"{path}: these weights are not of weights.arch={config.arch}: {faults}")
    encoder.net.load_state_dict(state)
    return encoder.eval()


def pooled(encoder: Encoder, films: Tensor | NDArray[np.uint8], pool: str | None) -> Tensor:
    """Films uint8 (P, S, S) -> features (P, D), or (P, 2 D) for pool `both`."""
    features = encoder.features(encoder.preprocess(films).to(next(encoder.parameters()).device))
    if pool == "both":
        return torch.cat([encoder.pool(features, name) for name in sorted(encoder.pools) if name != "max"], dim=1)
    return encoder.pool(features, pool or ("cls" if "cls" in encoder.pools else "avg"))


def open_encoder(spec: str, seed: int = 0) -> tuple[Encoder, Path | None]:
    """The encoder that a config names, and its folder (None for random weights).

    Args:
        spec: an encoder/ folder, a run folder that has one, or `random:ARCH`, `random:FOLDER` (that one, new weights).
        seed: of random weights.
    Raises: UserError: no such encoder.
    """
    rest = spec.removeprefix("random:")
    folder = Path(rest)
    folder = folder / "encoder" if (folder / "encoder" / "encoder.json").is_file() else folder
    if not spec.startswith("random:"):
        return encoders.load(folder), folder
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if not folder.is_dir():
            return encoders.create(rest, in_chans=1), None
        meta = encoders.read_meta(folder)
        keys = ("in_chans", "image_size", "model_args", "pool")
        preprocess = Preprocess.from_json(meta["preprocess"], meta["in_chans"])
        return encoders.create(meta["arch"], preprocess=preprocess, **{key: meta[key] for key in keys}), None


def file_weights(value: Tensor) -> str:
    """A few hex digits of a tensor's content."""
    return hashlib.sha256(value.detach().cpu().contiguous().numpy().tobytes()).hexdigest()[:16]
