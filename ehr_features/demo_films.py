"""Draw chest films in numpy: sums of soft tissue thicknesses, as an X-ray sees them, batch by batch.

Coordinates: x from -1 (image left, the patient's right) to 1, y from -1 (top) to 1. Comes in: a table of films with the
amounts of `demo_truth.NAMES` in [0, 1], sex, age, view and position; goes out: uint8 films, (N, H, W).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

Array = NDArray[Any]  # float32
Film = NDArray[np.uint8]
SHAPES = {"PA": (1.0, 0.86), "AP": (0.86, 1.0), "LATERAL": (1.0, 0.80)}  # height and width, as parts of the size


def draw(
    films: pd.DataFrame, size: int, rng: np.random.Generator, batch: int = 32
) -> Iterator[tuple[NDArray[np.int64], Film]]:
    """Draw every film.

    Args:
        films: columns male, age, view (PA, AP, LATERAL, LL), recumbent, and a column for each of `demo_truth.NAMES`.
        size: the longer side, in pixels.
    Yields: row numbers (B,) and films (B, H, W) uint8, films of one shape together.
    """
    textures = _Textures(rng, size)
    view = films["view"].replace("LL", "LATERAL").to_numpy()
    for name, (high, wide) in SHAPES.items():
        rows = np.flatnonzero(view == name)
        for start in range(0, len(rows), batch):
            part = rows[start : start + batch]
            canvas = _Canvas(films.iloc[part], round(size * high), round(size * wide), rng, textures)
            density = canvas.lateral() if name == "LATERAL" else canvas.frontal(portable=name == "AP")
            yield part, canvas.expose(density)


class _Textures:
    """Vessels (branching lines from a hilum) and grain, drawn once and shared; each film takes its own pieces."""

    def __init__(self, rng: np.random.Generator, size: int) -> None:
        self.grain = np.stack([_smooth_noise(rng, 2 * size, s * size / 128) for s in (1.2, 3.0, 9.0, 26.0)])
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


class _Canvas:
    """One batch of films of one shape: every attribute is (B, 1, 1) or (B, H, W)."""

    def __init__(
        self, films: pd.DataFrame, height: int, width: int, rng: np.random.Generator, textures: _Textures
    ) -> None:
        self.rng, self.textures, self.count, self.height, self.width = rng, textures, len(films), height, width
        column = {name: films[name].to_numpy(np.float32)[:, None, None] for name in films.columns if name != "view"}
        self.found, self.male, self.recumbent = column, column["male"], column["recumbent"]
        self.age = (column["age"] - 65) / 15
        y, x = np.meshgrid(np.linspace(-1, 1, height), np.linspace(-1, 1, width), indexing="ij")
        angle, zoom = self.normal(0.045), 1.06 + self.normal(0.06)
        x, y = x[None].astype(np.float32) - self.normal(0.05), y[None].astype(np.float32) - self.normal(0.05)
        self.x = (x * np.cos(angle) + y * np.sin(angle)) / zoom
        self.y = (y * np.cos(angle) - x * np.sin(angle)) / zoom

    def normal(self, sd: float, mean: float = 0.0) -> Array:
        return (mean + sd * self.rng.standard_normal((self.count, 1, 1))).astype(np.float32)

    def uniform(self, low: float, high: float) -> Array:
        return self.rng.uniform(low, high, (self.count, 1, 1)).astype(np.float32)

    def some(self, probability: float | Array) -> Array:
        return (self.rng.random((self.count, 1, 1)) < probability).astype(np.float32)

    def grain(self, octave: int) -> Array:
        return self.textures.take(self.rng, octave, self.count, self.height, self.width)

    def frontal(self, portable: bool) -> Array:
        """Density (B, H, W) of AP or PA films, about 0 (air) to 1.2 (dense)."""
        x, y, found = self.x, self.y, self.found
        ax = np.abs(x)
        broad = 0.05 * (self.male - 0.5) + self.normal(0.025)
        density = self._body(x, y, ax, broad)
        # lungs: a dome on top, a diaphragm below, the mediastinum between
        short = (
            0.10 * self.recumbent + (0.04 if portable else 0.0) + 0.12 * found["atelectasis"] - 0.13 * found["hyper"]
        )
        floor = 0.50 + self.normal(0.05) - short
        side = np.sign(x)
        middle, half = 0.40 + broad, 0.315 + broad * 0.6
        top = -0.80 + self.normal(0.03)
        arch = (0.13 + self.normal(0.015)) * (1 - 0.75 * found["hyper"])
        bottom = floor - 0.05 * (side < 0) + 0.16 + arch * (((ax - middle + 0.06) / half) ** 2 * 1.3 - 1) - arch * 0.2
        inner = (
            0.155
            + 0.05 * found["mediastinum"] * np.exp(-(((y + 0.35) / 0.35) ** 2))
            + 0.03 * np.exp(-(((y + 0.28) / 0.1) ** 2))
        )
        narrow = np.sqrt(np.clip((y - top) / 0.75, 0, 1))
        outer = middle - 0.03 + half * narrow + 0.05 * np.clip((y + 0.2), -1, 1)
        lung = _step(outer - ax, 0.05) * _step(ax - inner, 0.05) * _step(bottom - y, 0.035) * _step(y - top, 0.05)
        lobe = lung * (0.75 + 0.25 * np.clip(1 - ((ax - middle) / half) ** 2, 0, 1))
        air = (0.43 + 0.05 * found["hyper"] + self.normal(0.025)) * (1 - 0.10 * self.recumbent)
        heart, hila = self._heart(x, y, floor, portable)
        density = density - air * lobe * (1 - heart) + 0.07 * heart + hila * lung
        density = density + self._bones(x, y, ax, broad, portable)
        vessels = self.textures.lungs(self.rng, self.count, self.height, self.width)
        density = density + (0.10 + 0.08 * found["edema"]) * vessels * lung + 0.012 * self.grain(0) * lung
        density = density + self._diseases(x, y, ax, lung * (1 - 0.85 * heart), bottom, outer, top)
        return density + self._devices(x, y, floor)

    def _body(self, x: Array, y: Array, ax: Array, broad: Array) -> Array:
        shoulder = np.clip((y + 0.98 - 0.28 * np.clip(ax - 0.2, 0, 1)) / 0.16, 0, 1) ** 0.7
        neck = 0.21 + 0.04 * self.male
        trunk = 0.93 + broad + 0.22 * _step(-0.32 - y, 0.22) + 0.05 * np.clip(y, 0, 1) + self.normal(0.03)
        edge = neck + (trunk - neck) * shoulder
        thick = np.sqrt(np.clip(1 - (ax / edge) ** 2, 0, 1))
        inside = _step(edge - ax, 0.02)
        arm = np.sqrt(np.clip(1 - ((ax - 1.16 - 0.05 * y) / 0.17) ** 2, 0, 1)) * _step(y + 0.45, 0.12)
        belly = 0.36 * _step(y - 0.58, 0.22)
        breast = (1 - self.male) * self.uniform(0.03, 0.11)
        lower = np.clip(1 - ((ax - 0.46) / 0.30) ** 2 - ((y - 0.28) / 0.30) ** 2, 0, 1)
        soft = 0.34 + 0.40 * thick**0.7 + belly + breast * np.sqrt(lower)
        return inside * soft + (1 - inside) * (0.42 * arm + 0.03)

    def _bones(self, x: Array, y: Array, ax: Array, broad: Array, portable: bool) -> Array:
        bone = (1.0 - 0.12 * self.age + self.normal(0.08)) * (0.9 + 0.2 * self.male)
        slope = self.normal(0.04, 0.55 if portable else 0.42)
        spacing = self.normal(0.010, 0.152)
        behind = (y + 0.30 - slope * (ax - 0.15) + 0.55 * (ax - 0.25) ** 2 * 1.6) / spacing
        front = (y + 0.05 + 0.55 * (ax - 0.2)) / (spacing * 1.35)
        cage = _step(0.83 + broad - ax, 0.06) * _step(ax - 0.10, 0.05) * _step(y + 0.86, 0.08) * _step(0.62 - y, 0.12)
        wave = np.cos(2 * np.pi * behind)
        ribs = np.clip(wave - 0.15, 0, 1) ** 0.6 * 0.075 + np.clip(
            np.cos(2 * np.pi * front) - 0.45, 0, 1
        ) * 0.045 * _step(ax - 0.33, 0.1)
        spine = np.sqrt(np.clip(1 - (x / 0.105) ** 2, 0, 1)) * (0.14 + 0.03 * np.cos(2 * np.pi * y / 0.135))
        windpipe = -0.075 * np.clip(1 - ((x + 0.012) / 0.045) ** 2, 0, 1) * _step(-0.30 - y, 0.06)
        lift = self.normal(0.03, -0.05 if portable else 0.0)
        key = y + 0.70 + lift + 0.14 * np.sin(np.clip(ax - 0.06, 0, 1) * 4.6) * 0.8 - 0.03
        clavicle = 0.10 * np.exp(-((key / 0.030) ** 2)) * _step(ax - 0.07, 0.04) * _step(0.72 - ax, 0.06)
        blade = (
            0.055
            * _step(0.16 - np.abs(ax - 0.80 + 0.12 * (y + 0.3)), 0.05)
            * _step(0.05 - y, 0.1)
            * _step(y + 0.62, 0.08)
        )
        return bone * (ribs * cage + spine + clavicle + blade) + windpipe

    def _heart(self, x: Array, y: Array, floor: Array, portable: bool) -> tuple[Array, Array]:
        """Where heart and great vessels take the place of air, in [0, 1]: on the patient's left (image right); hila."""
        large = 0.15 * self.found["heart"] + 0.02 * self.age * (1 - self.found["heart"]) * 0.5 + self.normal(0.013)
        size = (1.10 if portable else 1.0) * (1 + large * 1.7)
        cx, cy = 0.12 + 0.10 * large, floor - 0.10
        u, v = (x - cx) * 0.88 + (y - cy) * 0.46, (y - cy) * 0.88 - (x - cx) * 0.46
        heart = np.sqrt(np.clip(1 - (u / (0.345 * size)) ** 2 - (v / (0.265 * size)) ** 2, 0, 1))
        right = np.sqrt(np.clip(1 - ((x + 0.08) / (0.15 * size)) ** 2 - ((y - cy + 0.02) / (0.26 * size)) ** 2, 0, 1))
        vascular = np.sqrt(np.clip(1 - ((x - 0.03) / 0.17) ** 2 - ((y + 0.22) / 0.42) ** 2, 0, 1))
        age = np.clip(1 + 0.25 * self.age, 0.5, 2)
        knob = np.sqrt(np.clip(1 - ((x - 0.15) / 0.085) ** 2 - ((y + 0.38) / 0.12) ** 2, 0, 1))
        hila = np.exp(-(((np.abs(x) - 0.215) / 0.075) ** 2) - ((y + 0.10) / 0.14) ** 2)
        solid = np.maximum(np.maximum(heart, 0.9 * right) ** 0.55, np.maximum(0.8 * vascular, 0.75 * age * knob) ** 0.6)
        return np.minimum(solid, 1), (0.10 + 0.08 * self.found["edema"]) * hila

    def _diseases(self, x: Array, y: Array, ax: Array, lung: Array, bottom: Array, outer: Array, top: Array) -> Array:
        found, total = self.found, np.zeros_like(x)
        cloud, fine = self.grain(3), self.grain(1)
        perihilar = np.exp(-(((ax - 0.28) / 0.26) ** 2) - ((y - 0.05) / 0.42) ** 2)
        total += found["edema"] * lung * (0.20 * perihilar + 0.055 + 0.030 * fine + 0.02 * cloud)
        for _ in range(2):  # one or two foci, either lung, ragged
            side, spot = np.sign(self.uniform(-1, 1)), self.uniform(-0.40, 0.34)
            q = ((x - side * self.uniform(0.28, 0.52)) / self.uniform(0.13, 0.22)) ** 2 + (
                (y - spot) / self.uniform(0.13, 0.22)
            ) ** 2
            total += (
                found["consolidation"]
                * 0.24
                * lung
                * np.clip(1.15 - q + 0.35 * fine + 0.25 * cloud, 0, 1)
                * (self.some(0.6) if _ else 1)
            )
        side, both = np.sign(self.uniform(-1, 1)), self.some(0.45)
        hemi = np.maximum(_step(x * side, 0.05), both)
        rise = found["effusion"] * (0.40 - 0.12 * self.recumbent)
        level = bottom - rise * (0.35 + 0.9 * np.clip((ax - 0.2) / 0.5, 0, 1.2) ** 2) - 0.02
        total += (
            (found["effusion"] > 0)
            * hemi
            * lung
            * (0.30 * _step(y - level, 0.06) + 0.07 * self.recumbent * found["effusion"])
        )
        side = np.sign(self.uniform(-1, 1))
        band = y - bottom + 0.16 + 0.25 * (ax - 0.4) * self.uniform(-1, 1)
        total += (
            found["atelectasis"]
            * lung
            * _step(x * side, 0.05)
            * (0.17 * np.exp(-((band / 0.032) ** 2)) + 0.10 * _step(band, 0.12))
        )
        side, depth = np.sign(self.uniform(-1, 1)), 0.06 + 0.16 * found["pneumothorax"]
        rim = np.minimum(outer - ax, (y - top) * 1.0)
        gone = (found["pneumothorax"] > 0) * _step(x * side, 0.04) * _step(0.35 - y, 0.2) * lung
        total += gone * (-0.12 * _step(depth - rim, 0.015) + 0.10 * np.exp(-(((rim - depth) / 0.012) ** 2)))
        side, spot, radius = np.sign(self.uniform(-1, 1)), self.uniform(-0.5, 0.3), 0.04 + 0.07 * found["lesion"]
        q = ((x - side * self.uniform(0.25, 0.55)) ** 2 + (y - spot) ** 2) / radius**2
        return total + 0.26 * (found["lesion"] > 0) * np.sqrt(np.clip(1 - q, 0, 1)) * lung

    def _devices(self, x: Array, y: Array, floor: Array) -> Array:
        """A breathing tube, a central line, leads: each film with devices has one or more of them."""
        has, kind = self.found["device"] > 0, self.uniform(0, 1)
        tube, line, pace = has * (kind < 0.6), has * (kind > 0.35) * (kind < 0.85), has * (kind > 0.85)
        wide = 0.011
        end = self.uniform(-0.42, -0.30)
        total = tube * 0.20 * _step(wide * 1.5 - np.abs(x + 0.01 + 0.02 * np.sin(3 * y)), 0.012) * _step(end - y, 0.02)
        feed = tube * 0.12 * _step(wide - np.abs(x - 0.02 - 0.12 * np.clip(y - 0.3, 0, 1)), 0.012)
        neck = -0.10 - 0.20 * np.clip(-0.45 - y, 0, 1) ** 0.8
        total += feed + line * 0.17 * _step(wide - np.abs(x - neck), 0.012) * _step(self.uniform(-0.15, 0.05) - y, 0.02)
        q = np.maximum(np.abs(x - 0.52) / 0.11, np.abs(y + 0.52) / 0.085)
        wire = np.sqrt((x - 0.24) ** 2 / 0.28**2 + (y + 0.05) ** 2 / 0.46**2)
        total += pace * (
            0.35 * _step(1 - q, 0.15) + 0.16 * _step(0.035 - np.abs(wire - 1), 0.03) * _step(x - 0.02, 0.03) * (x < 0.6)
        )
        lead = y - self.uniform(-0.4, 0.2) - self.uniform(-0.5, 0.5) * x - 0.12 * np.sin(4 * x + self.uniform(0, 6))
        return total + has * 0.08 * _step(0.009 - np.abs(lead), 0.010)

    def lateral(self) -> Array:
        """Density (B, H, W) of lateral films: the spine to the right, the breastbone to the left."""
        x, y, found = self.x, self.y, self.found
        broad = 0.04 * (self.male - 0.5) + self.normal(0.02)
        chest = 0.80 + broad - 0.10 * np.clip(-0.25 - y, 0, 1) ** 1.2 * 4
        thick = np.sqrt(np.clip(1 - (np.abs(x - 0.03) / np.maximum(chest, 0.25)) ** 2, 0, 1))
        density = 0.30 * (thick > 0) + 0.40 * thick**0.6 + 0.16 * _step(y - 0.55, 0.3) * (thick > 0)
        floor = 0.42 + self.normal(0.05) + 0.10 * found["hyper"] - 0.08 * found["atelectasis"]
        bottom = floor + 0.10 * np.sin(3.0 * (x - 0.1)) + 0.16 * np.clip(x, 0, 1)
        edge = 0.56 + broad + 0.05 * found["hyper"] - 0.6 * np.clip(-0.35 - y, 0, 1) ** 1.3
        lung = _step(edge - np.abs(x + 0.02), 0.05) * _step(bottom - y, 0.04) * _step(y + 0.80, 0.06)
        density = density - (0.34 + self.normal(0.025)) * lung
        bone = 1.0 - 0.12 * self.age + self.normal(0.08)
        curve = 0.50 + 0.10 * np.cos(1.8 * (y - 0.1))
        vertebra = 0.13 + 0.05 * np.cos(2 * np.pi * (y - 0.2 * x) / 0.15)
        density = density + bone * vertebra * np.sqrt(np.clip(1 - ((x - curve) / 0.115) ** 2, 0, 1))
        density = density + bone * 0.10 * np.exp(
            -(((x + 0.60 + broad - 0.10 * np.clip(-y, 0, 1)) / 0.035) ** 2)
        ) * _step(0.3 - y, 0.1)
        density = density + bone * 0.035 * np.clip(np.cos(2 * np.pi * (y + 0.55 * x) / 0.17), 0, 1) * lung
        arms = 0.22 * np.sqrt(np.clip(1 - ((y + 0.92 - 0.3 * x) / 0.16) ** 2, 0, 1)) * (y < -0.6)
        large = 1 + 0.26 * found["heart"] + self.normal(0.02)
        u, v = (x + 0.22) * 0.85 + (y - floor + 0.16) * 0.5, (y - floor + 0.16) * 0.85 - (x + 0.22) * 0.5
        heart = np.sqrt(np.clip(1 - (u / (0.40 * large)) ** 2 - (v / (0.29 * large)) ** 2, 0, 1))
        ring = np.hypot(x - 0.12, y + 0.24) - 0.20
        arch = np.exp(-((ring / 0.07) ** 2)) * _step(-0.15 - y, 0.1)
        hila = np.exp(-(((x - 0.06) / 0.12) ** 2) - ((y + 0.05) / 0.15) ** 2)
        density = density + arms + 0.24 * heart * lung
        lung = lung * (1 - 0.75 * heart)
        density = density + lung * (0.06 * arch * np.clip(1 + 0.25 * self.age, 0.5, 2) + 0.11 * hila)
        fine, cloud = self.grain(1), self.grain(3)
        density += lung * 0.014 * (self.grain(0) + fine)
        density += found["edema"] * lung * (0.14 * np.exp(-((x / 0.4) ** 2) - ((y - 0.05) / 0.45) ** 2) + 0.03 * fine)
        q = ((x - self.uniform(-0.3, 0.35)) / 0.2) ** 2 + ((y - self.uniform(-0.4, 0.3)) / 0.18) ** 2
        density += found["consolidation"] * 0.18 * lung * np.clip(1.15 - q + 0.35 * fine + 0.25 * cloud, 0, 1)
        level = bottom - found["effusion"] * 0.42 * np.clip((x + 0.1) / 0.5, 0, 1.2) ** 1.5
        density += (found["effusion"] > 0) * 0.26 * lung * _step(y - level, 0.06)
        density += found["atelectasis"] * 0.10 * lung * np.exp(-(((y - bottom + 0.15) / 0.05) ** 2))
        q = ((x - self.uniform(-0.3, 0.3)) ** 2 + (y - self.uniform(-0.5, 0.2)) ** 2) / (
            0.04 + 0.07 * found["lesion"]
        ) ** 2
        density += 0.22 * (found["lesion"] > 0) * np.sqrt(np.clip(1 - q, 0, 1)) * lung
        wire = x + 0.05 - 0.1 * np.sin(2 * y + self.uniform(0, 6))
        return density + (found["device"] > 0) * 0.14 * _step(0.011 - np.abs(wire), 0.012) * _step(
            self.uniform(-0.3, 0.1) - y, 0.02
        )

    def expose(self, density: Array) -> Film:
        """What differs between two films of one patient: exposure, gamma, scatter, noise, collimation, the marker."""
        density = density * (1 + self.normal(0.05)) + self.normal(0.03)
        tilt = self.normal(0.03) * self.x + self.normal(0.03) * self.y
        image = np.clip((density + tilt * (density > 0.05)) / 1.12, 0, 1.2) ** (1 / np.exp(self.normal(0.16)))
        noise = self.rng.standard_normal(density.shape, np.float32)
        image += self.uniform(0.006, 0.02) * noise + self.uniform(0.004, 0.015) * self.grain(0)
        image *= self.uniform(0.88, 1.0)
        for axis, places in ((1, self.height), (2, self.width)):  # black borders on a few
            cut = self.some(0.12) * self.uniform(0, 0.06) * places
            line = np.arange(places, dtype=np.float32).reshape((1, -1, 1) if axis == 1 else (1, 1, -1))
            image *= (line >= cut) & (line < places - cut * self.some(0.5))
        films = (np.clip(image, 0, 1) * 255).astype(np.uint8)
        for film in films:
            _mark(film, self.rng)
        return films


def _mark(film: Film, rng: np.random.Generator) -> None:
    """Burn in the technician's letter: L near the image's right upper edge, R near the left."""
    scale = max(film.shape[0] // 64, 1)
    letter = "L" if rng.random() < 0.7 else "R"
    rows = {"L": ("100", "100", "100", "100", "111"), "R": ("110", "101", "110", "110", "101")}[letter]
    glyph = np.kron(np.array([[c == "1" for c in row] for row in rows]), np.ones((scale, scale), bool))
    height, width = film.shape
    top = int(height * rng.uniform(0.04, 0.14))
    left = int(width * rng.uniform(0.86, 0.92)) if letter == "L" else int(width * rng.uniform(0.04, 0.09))
    patch = film[top : top + glyph.shape[0], left : left + glyph.shape[1]]
    patch[glyph[: patch.shape[0], : patch.shape[1]]] = 245


def _step(t: Array, soft: float) -> Array:
    """0 below -soft, 1 above +soft, a line between; t in the units of the coordinates."""
    return np.clip(t * (0.5 / soft) + 0.5, 0, 1)


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
        pen.line((x * width, y * height, nx * width, ny * height), fill=shade, width=max(1, round(thick * size / 160)))
        if thick > 1.1 and 0.15 < nx < 0.82 and 0.08 < ny < 0.85:
            stems += [(nx, ny, angle + rng.normal(0.0, 0.22), thick * 0.80)]
            if rng.random() < 0.55:
                stems += [(nx, ny, angle + rng.choice([-1, 1]) * rng.uniform(0.35, 0.8), thick * 0.62)]
    picture = picture.filter(ImageFilter.GaussianBlur(0.9 * scale * size / 128)).resize(
        (size // 2, size), Image.Resampling.BOX
    )
    return np.asarray(picture, np.float32) / 255
