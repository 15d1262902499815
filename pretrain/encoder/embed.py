"""Frozen features of films by an encoder, and the check that they are finite.

Input: an encoder, film files or uint8 films. Output: (N, D) float32.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from configs import UserError
from pretrain.encoder.model import Encoder
from pretrain.encoder.preprocess import NO_STORE, Preprocess
from pretrain.encoder.sources import load
from pretrain.store.decode import BadFilm


@torch.inference_mode()
def embed(
    folder: str | Path | Encoder,
    films: str | Path | Iterable[str | Path | np.ndarray | Tensor] | np.ndarray | Tensor,
    *,
    pool: str | None = None,
    batch_size: int = 64,
    device: str | torch.device = "cpu",
    names: Sequence[str] | None = None,
) -> Tensor:
    """Frozen features of films, the same for a film's file, its pixels, and its square in a store.

    Args:
        folder: encoder/, a run that has one, a published encoder (pretrain.encoder.sources), or a loaded one.
        films: paths of film files; or uint8 (N, H, W), an array or a tensor; or a list of uint8 (H, W).
        names: of the films, for errors; their paths or numbers if None.
    Returns: (N, D) float32 on the CPU.
    Raises: UserError: a film that cannot be read, or features that are not finite.
    """
    encoder = folder if isinstance(folder, Encoder) else load(folder)
    encoder = encoder.to(device).eval()
    given: Any = [films] if isinstance(films, (str, Path)) else films
    if not isinstance(given, (np.ndarray, Tensor)):
        given = list(given)
        names = names or [str(f) if isinstance(f, (str, Path)) else f"number {i}" for i, f in enumerate(given)]
        if encoder.preprocess.store is None and any(isinstance(film, (str, Path)) for film in given):
            warnings.warn(f"{encoder.name}: {NO_STORE}", stacklevel=2)
    elif given.ndim == 2:
        given = given[None]
    names = names or [f"number {i}" for i in range(len(given))]
    parts: list[Tensor] = []
    for start in range(0, len(given), batch_size):
        part = given[start : start + batch_size]
        if isinstance(part, list):
            read = [_film(encoder.preprocess, film) for film in part]
            part = np.stack(read) if len({film.shape for film in read}) == 1 else read
        x = torch.cat([encoder.preprocess(f) for f in part]) if isinstance(part, list) else encoder.preprocess(part)
        parts.append(encoder(x.to(device), pool).float().cpu())
        check_finite(parts[-1], encoder.name, names[start : start + batch_size])
    return torch.cat(parts) if parts else torch.empty(0, encoder.width)


def _film(preprocess: Preprocess, film: str | Path | np.ndarray | Tensor) -> np.ndarray:
    """The pixels of a film given by its path or as pixels."""
    if not isinstance(film, (str, Path)):
        return np.asarray(film.cpu() if isinstance(film, Tensor) else film)
    try:
        return preprocess.read(film)
    except BadFilm as error:
        raise UserError(f"{film}: {error}; leave this film out") from None


def check_finite(features: Tensor, encoder: str, films: Sequence[object]) -> None:
    """Refuse features that are not finite or whose squares are not, because no head can be fitted on them.

    Raises: UserError.
    """
    bad = (~features.float().flatten(1).square().isfinite().all(dim=1)).nonzero().flatten().tolist()
    if bad:
        raise UserError(
            f"{encoder}: features that are not finite or above 1e19, of film {films[bad[0]]} and {len(bad) - 1} more "
            f"of its {len(films)}; the weights overflow or are damaged: pretrain or export them again"
        )
