"""Preprocess films for an encoder, with the same numbers in pretraining, evaluation and elsewhere.

Input: film files, or uint8 films in which 0 is black. Output: (N, C, size, size) float32. A film becomes the square of
a store, which is resized and normalised; encoder.json records every parameter.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from configs import UserError
from pretrain.store.decode import Square, check_same, decode

Normalise = Literal["crop", "film", "dataset"]
SOFT = 0.1  # added to the standard deviation, so that an empty crop stays near 0 and is not amplified to noise
NO_STORE = (
    "encoder.json lacks preprocess.store, as in version 0.2.0: film files are resized from their full size, so "
    "their features differ slightly from those of stored films; copy `preprocess` of the store's store.json there"
)


@dataclasses.dataclass(frozen=True)
class Preprocess:
    """Preprocessing of films for an encoder.

    Args:
        size: pixels of a side after resizing.
        normalise: `crop`: each view by its own mean and standard deviation (plus 0.1); `film`: each by those of the
            film from which it was cut (for a whole film the same as crop); `dataset`: by `mean` and `std`.
        mean, std: of pixels in [0, 1]; used by `dataset` only. One number, or one per channel.
        in_chans: number of channels; the grey channel is repeated.
        store: the preprocessing of film files to squares; None: unknown, films are padded and resized as they are.
    """

    size: int
    normalise: Normalise = "crop"
    mean: float | tuple[float, ...] = 0.5
    std: float | tuple[float, ...] = 0.25
    in_chans: int = 1
    store: Square | None = None

    def __call__(self, films: np.ndarray | Tensor) -> Tensor:
        """Resize and normalise whole films.

        Args:
            films: uint8, (H, W) or (N, H, W); decoded films or squares of the store, which give the same numbers.
        Returns: (N, in_chans, size, size) float32.
        Raises: UserError: not uint8, or not films.
        """
        return self.to_input(self.resize(self.squares(films)[:, None].float() / 255))

    def read(self, path: str | Path) -> np.ndarray:
        """Read a film's file as uint8, as a square if `store` is known. Raises: BadFilm."""
        return decode(path) if self.store is None else self.store(path)

    def squares(self, films: np.ndarray | Tensor) -> Tensor:
        """Turn films of any size, uint8 (H, W) or (N, H, W), into the squares of a store, (N, S, S)."""
        tensor = torch.as_tensor(np.array(films) if isinstance(films, np.ndarray) else films)
        if tensor.dtype != torch.uint8 or tensor.ndim not in (2, 3) or not tensor.numel():
            raise UserError(
                f"films: wanted uint8 of shape (N, H, W) or (H, W), got {tensor.dtype} of shape {(*tensor.shape,)}; "
                "pretrain.store packs films of other kinds (16-bit, DICOM, colour)"
            )
        tensor = tensor.view(-1, *tensor.shape[-2:])
        if self.store is None:
            return pad_square(tensor)
        if tensor.shape[-2:] == (self.store.size, self.store.size):
            return tensor
        return torch.from_numpy(np.stack([self.store.of(film) for film in tensor.cpu().numpy()])).to(tensor.device)

    def resize(self, pixels: Tensor) -> Tensor:
        """Squares (N, 1, S, S) in [0, 1] -> (N, 1, size, size)."""
        if pixels.shape[-1] == self.size:
            return pixels
        return F.interpolate(pixels, size=(self.size, self.size), mode="bilinear", antialias=True)

    def to_input(self, pixels: Tensor, mean: Tensor | None = None, std: Tensor | None = None) -> Tensor:
        """Normalise views (N, 1, h, w) in [0, 1]; `mean`, `std` (N,) are those of the films, for `film`."""
        if self.normalise == "dataset":
            if isinstance(self.mean, tuple) or isinstance(self.std, tuple):
                centre, spread = (pixels.new_tensor(one).view(1, -1, 1, 1) for one in (self.mean, self.std))
                return ((pixels - centre) / spread).expand(-1, self.in_chans, -1, -1)
            normal = (pixels - self.mean).div_(self.std)
        else:
            if self.normalise == "crop" or mean is None or std is None:
                std, mean = torch.std_mean(pixels, dim=(1, 2, 3), correction=0)
            normal = (pixels - mean.view(-1, 1, 1, 1)).div_(std.view(-1, 1, 1, 1) + SOFT)
        return normal.expand(-1, self.in_chans, -1, -1)

    def per_channel(self) -> tuple[list[float], list[float]]:
        """Mean and deviation of each channel; 0 and 1 if films are normalised by their own."""
        fixed = (self.mean, self.std) if self.normalise == "dataset" else (0.0, 1.0)
        given = [list(one) if isinstance(one, tuple) else [one] for one in fixed]
        mean, std = (one * self.in_chans if len(one) == 1 else one for one in given)
        return mean, std

    def to_json(self) -> dict[str, Any]:
        """Its description in encoder.json."""
        return {
            **({} if self.store is None else {"store": self.store.to_json()}),
            "resize": self.size,
            "pad": "black, to a square, film in the middle",
            "interpolation": "bilinear, antialiased",
            "normalise": self.normalise,
            "mean": self.mean if self.normalise == "dataset" else None,
            "std": self.std if self.normalise == "dataset" else None,
            "std_added": 0.0 if self.normalise == "dataset" else SOFT,
            "intensity": "uint8 / 255, air black",
        }

    @classmethod
    def from_json(cls, meta: dict[str, Any], in_chans: int, where: str = "encoder.json") -> Preprocess:
        """The reverse of `to_json`. Raises: UserError: damaged, or an unsupported preprocessing."""
        store = Square.from_json(meta["store"], f"{where}: preprocess.store") if meta.get("store") else None
        given = {key: meta[key] for key in ("normalise", "mean", "std") if meta.get(key) is not None}
        given |= {key: tuple(value) for key, value in given.items() if isinstance(value, list)}
        try:
            made = cls(size=int(meta["resize"]), in_chans=in_chans, store=store, **given)
        except (KeyError, TypeError, ValueError):
            raise UserError(f"{where}: preprocess.resize is not a number of pixels; export the encoder again") from None
        if made.normalise not in get_args(Normalise):
            raise UserError(f"{where}: preprocess.normalise is {made.normalise!r}; wanted crop, film or dataset")
        fixed = ("pad", "interpolation", "intensity", *(["std_added"] if made.normalise != "dataset" else []))
        check_same({key: made.to_json()[key] for key in fixed}, meta, f"{where}: preprocess")
        return made


def pad_square(films: Tensor) -> Tensor:
    """(N, H, W) -> (N, S, S): centre films in a black square; nothing is cropped."""
    height, width = films.shape[-2:]
    side = max(height, width)
    top, left = (side - height) // 2, (side - width) // 2
    return F.pad(films, (left, side - width - left, top, side - height - top)) if height != width else films
