"""From uint8 films to what an encoder takes: the same numbers in pretraining, evaluation and anywhere else.

Comes in: uint8 films, 0 is black. Goes out: (N, C, size, size) float32. encoder.json records every choice made here.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from configs import UserError

Normalise = Literal["crop", "film", "dataset"]
SOFT = 0.1  # added to the standard deviation, so that an empty crop stays near 0 instead of becoming noise


@dataclasses.dataclass(frozen=True)
class Preprocess:
    """How films become input.

    Args:
        size: pixels of a side after resizing.
        normalise: `crop`: each view by its own mean and deviation (softened by 0.1); `film`: each by those of the film
            that it was cut from (a whole film: the same as crop); `dataset`: by `mean` and `std`.
        mean, std: of pixels in [0, 1]; used by `dataset` only.
        in_chans: the gray channel is repeated.
    """

    size: int
    normalise: Normalise = "crop"
    mean: float = 0.5
    std: float = 0.25
    in_chans: int = 1

    def __call__(self, films: np.ndarray | Tensor) -> Tensor:
        """Resize and normalise whole films.

        Args:
            films: uint8, (H, W) or (N, H, W); padded to squares with black, as in the store.
        Returns: (N, in_chans, size, size) float32.
        Raises: UserError: not uint8, or not films.
        """
        tensor = torch.as_tensor(np.array(films) if isinstance(films, np.ndarray) else films)
        if tensor.dtype != torch.uint8 or tensor.ndim not in (2, 3) or not tensor.numel():
            raise UserError(
                f"films: wanted uint8 of shape (N, H, W) or (H, W), got {tensor.dtype} of shape {(*tensor.shape,)}; "
                "pretrain.store packs films of other kinds (16-bit, DICOM, colour)"
            )
        pixels = pad_square(tensor.view(-1, 1, *tensor.shape[-2:])).float() / 255
        if pixels.shape[-1] != self.size:
            pixels = F.interpolate(pixels, size=(self.size, self.size), mode="bilinear", antialias=True)
        return self.to_input(pixels)

    def to_input(self, pixels: Tensor, mean: Tensor | None = None, std: Tensor | None = None) -> Tensor:
        """Normalise views (N, 1, h, w) in [0, 1]; `mean`, `std` (N,) are those of the films, for `film`."""
        if self.normalise == "dataset":
            normal = (pixels - self.mean).div_(self.std)
        else:
            if self.normalise == "crop" or mean is None or std is None:
                std, mean = torch.std_mean(pixels, dim=(1, 2, 3), correction=0)
            normal = (pixels - mean.view(-1, 1, 1, 1)).div_(std.view(-1, 1, 1, 1) + SOFT)
        return normal.expand(-1, self.in_chans, -1, -1)

    def to_json(self) -> dict[str, Any]:
        """What encoder.json says of it."""
        return {
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
    def from_json(cls, meta: dict[str, Any], in_chans: int) -> Preprocess:
        """The reverse of `to_json`."""
        given = {key: meta[key] for key in ("normalise", "mean", "std") if meta.get(key) is not None}
        return cls(size=meta["resize"], in_chans=in_chans, **given)


def pad_square(films: Tensor) -> Tensor:
    """(N, 1, H, W) -> (N, 1, S, S), the film in the middle of a black square; never cropped."""
    height, width = films.shape[-2:]
    side = max(height, width)
    top, left = (side - height) // 2, (side - width) // 2
    return F.pad(films, (left, side - width - left, top, side - height - top)) if height != width else films
