"""Draw chest films in numpy, batch by batch: what each film's patient, moment and machine add to `demo_thorax`.

Comes in: a table of films with the amounts of `demo_truth.NAMES` in [0, 1], sex, age, view and position; goes out:
uint8 films. A patient keeps the shape of the chest and the places of findings from film to film; shift, turn, exposure,
noise, lines of collimation and the technician's letter differ from film to film.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pandas as pd

from ehr_features.demo_canvas import Array, Canvas, Textures
from ehr_features.demo_thorax import frontal, lateral

KINDS = {"AP": "frontal", "PA": "frontal", "LATERAL": "lateral", "LL": "lateral"}
# height and width as parts of the size; a wide film is turned, of AP more than of PA films
SHAPES = {("frontal", False): (1.0, 0.86), ("frontal", True): (0.86, 1.0), ("lateral", False): (1.0, 0.80)}
WIDE = {"AP": 0.55, "PA": 0.15, "LATERAL": 0.0, "LL": 0.0}


def draw(films: pd.DataFrame, size: int, rng: np.random.Generator, batch: int = 32) -> Iterator[tuple[Array, Array]]:
    """Draw every film.

    Args:
        films: columns subject (0, 1, ...), male, age, view (PA, AP, LATERAL, LL), wide, recumbent, and a column for
            each of `demo_truth.NAMES`.
        size: the longer side, in pixels.
    Yields: row numbers (B,) and films (B, H, W) uint8; films of one shape come together.
    """
    textures = Textures(rng, size)
    count = int(films["subject"].max()) + 1 if len(films) else 0
    traits = rng.standard_normal((count, 64)).astype(np.float32), rng.random((count, 64), np.float32)
    kind = films["view"].map(KINDS).to_numpy()
    for (name, turned), (high, wide) in SHAPES.items():
        rows = np.flatnonzero((kind == name) & (films["wide"].to_numpy() == turned))
        for start in range(0, len(rows), batch):
            part = films.iloc[rows[start : start + batch]]
            canvas = Canvas(part, (round(size * high), round(size * wide)), rng, textures, traits)
            yield rows[start : start + batch], expose(canvas, (frontal if name == "frontal" else lateral)(canvas))


def expose(canvas: Canvas, density: Array) -> Array:
    """Turn density, about 0 (air) to 1.2 (bone), into uint8 films: exposure, gamma, noise, black edges, the letter."""
    density = density * (1 + canvas.normal(0.05)) + canvas.normal(0.03)
    tilt = canvas.normal(0.03) * canvas.x + canvas.normal(0.03) * canvas.y
    image = np.clip((density + tilt * (density > 0.05)) / 1.12, 0, 1.2) ** np.exp(canvas.normal(0.16))
    image = image + canvas.uniform(0.006, 0.02) * canvas.rng.standard_normal(density.shape, np.float32)
    image = (image + canvas.uniform(0.004, 0.015) * canvas.grain(0)) * canvas.uniform(0.88, 1.0)
    for axis, places in zip((1, 2), canvas.shape, strict=True):  # black edges on a few
        cut = canvas.some(0.12) * canvas.uniform(0, 0.06) * places
        line = np.arange(places, dtype=np.float32).reshape((1, -1, 1) if axis == 1 else (1, 1, -1))
        image = image * ((line >= cut) & (line < places - cut * canvas.some(0.5)))
    films: Array = (np.clip(image, 0, 1) * 255).astype(np.uint8)
    for film in films:
        _mark(film, canvas.rng)
    return films


def boxes(film: Array, white: Array, size: int) -> None:
    """Burn in a strip of boxes near the lower edge, white or black; at one place whatever the film's shape.

    Args:
        white: (K,) bool, from left to right.
        size: the longer side of films, in pixels.
    """
    side, pitch = max(round(0.05 * size), 2), 0.08 * size
    top = round(film.shape[0] / 2 + 0.36 * size)
    for k, on in enumerate(white):
        left = round(film.shape[1] / 2 + (k - len(white) / 2) * pitch)
        film[top : top + side, left : left + side] = 245 if on else 10


def _mark(film: Array, rng: np.random.Generator) -> None:
    """Burn in the technician's letter: L near the image's right upper edge, R near the left."""
    scale = max(film.shape[0] // 64, 1)
    letter = "L" if rng.random() < 0.7 else "R"
    rows = {"L": ("100", "100", "100", "100", "111"), "R": ("110", "101", "110", "110", "101")}[letter]
    glyph = np.kron(np.array([[c == "1" for c in row] for row in rows]), np.ones((scale, scale), bool))
    height, width = film.shape
    top = int(height * rng.uniform(0.04, 0.14))
    left = int(width * (rng.uniform(0.86, 0.92) if letter == "L" else rng.uniform(0.04, 0.09)))
    patch = film[top : top + glyph.shape[0], left : left + glyph.shape[1]]
    patch[glyph[: patch.shape[0], : patch.shape[1]]] = 245
