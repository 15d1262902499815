"""Token states of films by a frozen encoder, computed once and kept on disk in half precision.

A ViT gives its class token and its patches, a convolutional net the cells of its last map, `pixels` 8-pixel patches of
a small film; larger grids are averaged to `side` x `side`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import save_file
from torch import Tensor
from torch.nn import functional

from ehr_features.files import digest, new_file
from ehr_features.progress import Bar
from finetune.encoders import read_ahead
from pretrain.encoder.embed import check_finite
from pretrain.run.cache import complete, header
from pretrain.text.encoder import Tokens

if TYPE_CHECKING:
    from finetune.encoders import Frozen
    from pretrain.store import Store

PART = 4096  # films in a cache file
PIXELS = 32  # side of the film that `pixels` cuts into patches of 8


def film_tokens(
    frozen: Frozen,
    store: Store,
    films: Sequence[str],
    cache: Path,
    *,
    side: int = 7,
) -> tuple[Tokens, int]:
    """Token states of films.

    Args:
        frozen: the encoder, as opened for its features. films: M dicom_ids of the store.
    Returns: the states of each film, rows as `films`; N, tokens of a film.
    """
    wanted, encode = sorted(set(films)), _encode(frozen, side)

    def make(part: list[str], path: Path, bar: Bar) -> None:
        _write(frozen.name, encode, store, part, path, bar)

    start = f"film_tokens_{digest([frozen.key, store.hash, side])}"
    found = complete(cache, start, wanted, PART, make, f"tokens of {frozen.name}", "films")
    paths = sorted({path for path, _ in found.values()})
    with safe_open(paths[0], "numpy") as file:
        places, width = int(file.metadata()["tokens"]), file.get_slice("values").get_shape()[1]
    number = {path: i for i, path in enumerate(paths)}
    part, row = np.array([(number[found[film][0]], found[film][1]) for film in films], np.int64).reshape(-1, 2).T
    return Tokens(tuple(paths), part, row * places, np.full(len(films), places, np.int64), width), places


def _encode(frozen: Frozen, side: int) -> Callable[[NDArray[np.uint8]], Tensor]:
    """uint8 (B, S, S) -> (B, N, D)."""
    encoder = frozen.encoder
    if encoder is None:

        def patches(films: NDArray[np.uint8]) -> Tensor:
            small = functional.adaptive_avg_pool2d(torch.from_numpy(films)[:, None].float() / 255, PIXELS)
            return functional.unfold(small, 8, stride=8).transpose(1, 2)  # (B, 16, 64)

        return patches

    device = next(encoder.parameters()).device

    @torch.inference_mode()
    def encode(films: NDArray[np.uint8]) -> Tensor:
        states = encoder.features(encoder.preprocess(films).to(device)).float()
        prefix = states[:, :0]
        if states.ndim == 3:
            number = int(encoder.net.num_prefix_tokens)
            prefix, states = states[:, :number], states[:, number:]
            rows = round(states.shape[1] ** 0.5)
            states = states.transpose(1, 2).unflatten(2, (rows, -1))  # (B, D, h, w)
        else:
            prefix = states.new_zeros(len(states), 0, states.shape[1])
        if max(states.shape[2:]) > side:
            states = functional.adaptive_avg_pool2d(states, side)
        return torch.cat([prefix, states.flatten(2).transpose(1, 2)], dim=1).cpu()

    return encode


def _write(
    name: str, encode: Callable[[NDArray[np.uint8]], Tensor], store: Store, films: Sequence[str], path: Path, bar: Bar
) -> None:
    parts = []
    for batch, pixels in read_ahead(store, films, 64):
        made = encode(pixels).half()
        check_finite(made, name, batch)
        parts.append(made.numpy())
        bar.advance(len(batch))
    states = np.concatenate(parts)  # (m, N, D)
    about = {"tokens": str(states.shape[1]), **header(films)}
    with new_file(path) as file:
        save_file({"values": np.ascontiguousarray(states.reshape(-1, states.shape[2]))}, file, metadata=about)
