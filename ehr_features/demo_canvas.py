"""The coordinates, the chance and the textures that a batch of drawn films shares."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

Array = NDArray[Any]  # float32 unless said


class Textures:
    """Vessels (branching lines from a hilum) and grain, drawn once and shared; each film takes its own pieces."""

    def __init__(self, rng: np.random.Generator, size: int) -> None:
        self.grain = np.stack([_smooth_noise(rng, 2 * size, s * size / 128) for s in (1.2, 3.0, 26.0)])
        self.vessels = np.stack([_vessels(rng, size) for _ in range(24)])

    def take(self, rng: np.random.Generator, octave: int, count: int, height: int, width: int) -> Array:
        """(count, height, width) pieces of one grain, standard deviation 1."""
        side = self.grain.shape[1]
        top = rng.integers(0, side - height, count)
        left = rng.integers(0, side - width, count)
        views = np.lib.stride_tricks.sliding_window_view(self.grain[octave], (height, width))
        return views[top, left]

    def lungs(self, rng: np.random.Generator, count: int, height: int, width: int) -> Array:
        """(count, height, width): vessels of both lungs, in [0, 1]."""
        half = width // 2
        left, right = rng.integers(0, len(self.vessels), (2, count))
        y = np.linspace(0, self.vessels.shape[1] - 1, height).astype(int)
        x = np.linspace(0, self.vessels.shape[2] - 1, half).astype(int)
        pieces = self.vessels[:, y][:, :, x]
        out = np.zeros((count, height, width), np.float32)
        out[:, :, width - half :] = pieces[left]
        out[:, :, :half] = pieces[right, :, ::-1]
        return out


class Canvas:
    """A batch of films of one shape. Coordinates x, y (B, H, W): -1 at the left and the top edge, 1 at the others.

    `trait` and `place` give a patient's own values, `normal` and `uniform` a film's; all (B, 1, 1).
    """

    def __init__(
        self,
        films: pd.DataFrame,
        shape: tuple[int, int],
        rng: np.random.Generator,
        textures: Textures,
        traits: tuple[Array, Array],
    ) -> None:
        self.rng, self.textures, self.shape, self.count = rng, textures, shape, len(films)
        subject = films["subject"].to_numpy()
        self._traits, self._places = iter(traits[0][subject].T), iter(traits[1][subject].T)
        self.found = {name: films[name].to_numpy(np.float32)[:, None, None] for name in films.columns if name != "view"}
        self.male, self.recumbent = self.found["male"], self.found["recumbent"]
        self.portable = (films["view"] == "AP").to_numpy(np.float32)[:, None, None]
        self.age = (self.found["age"] - 65) / 15
        down, across = (np.linspace(-1, 1, places, dtype=np.float32) for places in shape)
        x, y = across[None, None, :] - self.normal(0.06), down[None, :, None] - self.normal(0.06)
        angle, zoom = self.normal(0.055), 1.06 + self.normal(0.07)
        self.x = (x * np.cos(angle) + y * np.sin(angle)) / zoom
        self.y = (y * np.cos(angle) - x * np.sin(angle)) / zoom

    def normal(self, sd: float) -> Array:
        return np.float32(sd) * self.rng.standard_normal((self.count, 1, 1), np.float32)

    def uniform(self, low: float, high: float) -> Array:
        return np.float32(low) + np.float32(high - low) * self.rng.random((self.count, 1, 1), np.float32)

    def some(self, probability: float) -> Array:
        return (self.rng.random((self.count, 1, 1)) < probability).astype(np.float32)

    def trait(self, sd: float) -> Array:
        return np.float32(sd) * next(self._traits)[:, None, None]

    def place(self, low: float, high: float) -> Array:
        return np.float32(low) + np.float32(high - low) * next(self._places)[:, None, None]

    def side(self) -> Array:
        """-1 or 1: the side of a patient's finding."""
        return np.where(self.place(0, 1) < 0.5, np.float32(-1), np.float32(1))

    def grain(self, octave: int) -> Array:
        return self.textures.take(self.rng, octave, self.count, *self.shape)

    def vessels(self) -> Array:
        return self.textures.lungs(self.rng, self.count, *self.shape)


def step(t: Array, soft: float) -> Array:
    """0 below -soft, 1 above +soft, a line between; t in the units of the coordinates."""
    return np.clip(t * np.float32(0.5 / soft) + np.float32(0.5), 0, 1)


def dome(q: Array) -> Array:
    """Thickness of an ellipsoid whose rim is at q = 1."""
    return np.sqrt(np.clip(1 - q, 0, 1))


def _smooth_noise(rng: np.random.Generator, side: int, sigma: float) -> Array:
    frequency = np.fft.rfftfreq(side)[None, :] ** 2 + np.fft.fftfreq(side)[:, None] ** 2
    spectrum = np.fft.rfft2(rng.standard_normal((side, side))) * np.exp(-2 * (np.pi * sigma) ** 2 * frequency)
    noise = np.fft.irfft2(spectrum, (side, side))
    return ((noise - noise.mean()) / noise.std()).astype(np.float32)


def _vessels(rng: np.random.Generator, size: int) -> Array:
    """(size, size // 2): branching lines from the hilum of the lung that lies to the right of the midline."""
    scale = 2
    picture = Image.new("L", (size // 2 * scale, size * scale))
    pen = ImageDraw.Draw(picture)
    width, height = picture.size
    stems = [(0.20, 0.44, angle, 4.5) for angle in rng.uniform(-1.4, 1.4, 10)]
    while stems:
        x, y, angle, thick = stems.pop()
        length = rng.uniform(0.05, 0.10)
        nx, ny = x + 2 * length * np.cos(angle) * 0.9, y + length * np.sin(angle)
        shade = int(255 * min(1.0, thick / 5))
        pen.line((x * width, y * height, nx * width, ny * height), shade, max(1, round(thick * size / 160)))
        if thick > 1.1 and 0.15 < nx < 0.82 and 0.08 < ny < 0.85:
            stems += [(nx, ny, angle + rng.normal(0.0, 0.22), thick * 0.80)]
            if rng.random() < 0.55:
                stems += [(nx, ny, angle + rng.choice([-1, 1]) * rng.uniform(0.35, 0.8), thick * 0.62)]
    picture = picture.filter(ImageFilter.GaussianBlur(0.9 * scale * size / 128))
    return np.asarray(picture.resize((size // 2, size), Image.Resampling.BOX), np.float32) / 255
