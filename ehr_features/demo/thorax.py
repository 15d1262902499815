"""Anatomy and findings of a chest as sums of tissue thicknesses along the beam.

Every function takes a `Canvas` of B films and returns densities (B, H, W): about 0 for air, 0.7 for soft tissue, 1.2
for dense tissue. In a frontal film the patient's right is on the left; in a lateral film the spine is on the right.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

# ---- Coordinates, random numbers and textures of a batch of films

Array = NDArray[Any]  # float32 unless stated


class Textures:
    """Vessels (branching lines from a hilum) and grain, drawn once; each film uses random crops of them."""

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

    `trait` and `place` are values of a patient, `normal` and `uniform` values of a film; all (B, 1, 1).
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
    """0 below -soft, 1 above +soft, linear between; t in the units of the coordinates."""
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


@dataclass
class Lungs:
    """Where the lungs are: `inside` (B, H, W) in [0, 1], and their edges as functions of the coordinates."""

    inside: Array
    lobe: Array
    floor: Array
    bottom: Array
    outer: Array
    top: Array


def frontal(c: Canvas) -> Array:
    """AP and PA films."""
    broad = 0.05 * (c.male - 0.5) + c.trait(0.025)
    lungs = _lungs(c, broad)
    heart, hila = _heart(c, lungs.floor)
    air = (0.43 + 0.05 * c.found["hyper"] + c.normal(0.025)) * (1 - 0.10 * c.recumbent)
    density = _body(c, broad) + _bones(c, broad)
    density = density - air * lungs.lobe * (1 - heart) + 0.07 * heart + hila * lungs.inside
    vessels = (0.10 + 0.08 * c.found["edema"]) * c.vessels()
    density = density + (vessels + 0.012 * c.grain(0)) * lungs.inside
    lungs.inside = lungs.inside * (1 - 0.85 * heart)
    return density + _opacities(c, lungs) + _pleura(c, lungs) + _devices(c)


def _lungs(c: Canvas, broad: Array) -> Lungs:
    x, y, ax = c.x, c.y, np.abs(c.x)
    short = 0.10 * c.recumbent + 0.04 * c.portable + 0.12 * c.found["atelectasis"] - 0.13 * c.found["hyper"]
    floor = 0.50 + c.trait(0.04) + c.normal(0.03) - short
    middle, half = 0.40 + broad, 0.315 + broad * 0.6
    top = -0.80 + c.trait(0.03)
    arch = (0.13 + c.trait(0.015)) * (1 - 0.75 * c.found["hyper"])
    bottom = floor - 0.05 * (x < 0) + 0.16 + arch * (((ax - middle + 0.06) / half) ** 2 * 1.3 - 1.2)
    wide = 0.03 * np.exp(-(((y + 0.28) / 0.1) ** 2)) + 0.08 * c.found["mediastinum"] * np.exp(
        -(((y + 0.35) / 0.35) ** 2)
    )
    outer = middle - 0.03 + half * np.sqrt(np.clip((y - top) / 0.75, 0, 1)) + 0.05 * np.clip(y + 0.2, -1, 1)
    inside = step(outer - ax, 0.05) * step(ax - 0.155 - wide, 0.05) * step(bottom - y, 0.035) * step(y - top, 0.05)
    lobe = inside * (0.75 + 0.25 * np.clip(1 - ((ax - middle) / half) ** 2, 0, 1))
    return Lungs(inside, lobe, floor, bottom, outer, top)


def _body(c: Canvas, broad: Array) -> Array:
    """Neck, shoulders, trunk, upper arms, belly; breasts of women."""
    y, ax = c.y, np.abs(c.x)
    shoulder = np.clip((y + 0.98 - 0.28 * np.clip(ax - 0.2, 0, 1)) / 0.16, 0, 1) ** 0.7
    neck = 0.21 + 0.04 * c.male
    trunk = 0.93 + broad + 0.22 * step(-0.32 - y, 0.22) + 0.05 * np.clip(y, 0, 1) + c.trait(0.03)
    edge = neck + (trunk - neck) * shoulder
    inside = step(edge - ax, 0.02)
    arm = dome(((ax - 1.16 - 0.05 * y) / 0.17) ** 2) * step(y + 0.45, 0.12)
    breast = (1 - c.male) * c.place(0.03, 0.11) * dome(((ax - 0.46) / 0.30) ** 2 + ((y - 0.28) / 0.30) ** 2)
    soft = 0.34 + 0.40 * dome((ax / edge) ** 2) ** 0.7 + 0.36 * step(y - 0.58, 0.22) + breast
    return inside * soft + (1 - inside) * (0.42 * arm + 0.03)


def _bones(c: Canvas, broad: Array) -> Array:
    """Ribs, spine, windpipe, clavicles, shoulder blades; bones fade with age and are denser in men."""
    x, y, ax = c.x, c.y, np.abs(c.x)
    bone = (1.0 - 0.20 * c.age + c.normal(0.06)) * (0.9 + 0.2 * c.male)
    slope = 0.42 + c.trait(0.04) + 0.13 * c.portable
    spacing = 0.152 + c.trait(0.010)
    behind = (y + 0.30 - slope * (ax - 0.15) + 0.88 * (ax - 0.25) ** 2) / spacing
    before = (y + 0.05 + 0.55 * (ax - 0.2)) / (spacing * 1.35)
    cage = step(0.83 + broad - ax, 0.06) * step(ax - 0.10, 0.05) * step(y + 0.86, 0.08) * step(0.62 - y, 0.12)
    ribs = np.clip(np.cos(2 * np.pi * behind) - 0.15, 0, 1) ** 0.6 * 0.075
    ribs = ribs + np.clip(np.cos(2 * np.pi * before) - 0.45, 0, 1) * 0.045 * step(ax - 0.33, 0.1)
    spine = dome((x / 0.105) ** 2) * (0.14 + 0.03 * np.cos(2 * np.pi * y / 0.135))
    windpipe = -0.075 * np.clip(1 - ((x + 0.012) / 0.045) ** 2, 0, 1) * step(-0.30 - y, 0.06)
    key = y + 0.67 + c.trait(0.03) - 0.05 * c.portable + 0.112 * np.sin(np.clip(ax - 0.06, 0, 1) * 4.6)
    clavicle = 0.10 * np.exp(-((key / 0.030) ** 2)) * step(ax - 0.07, 0.04) * step(0.72 - ax, 0.06)
    blade = 0.055 * step(0.16 - np.abs(ax - 0.80 + 0.12 * (y + 0.3)), 0.05) * step(0.05 - y, 0.1) * step(y + 0.62, 0.08)
    return bone * (ribs * cage + spine + clavicle + blade) + windpipe


def _heart(c: Canvas, floor: Array) -> tuple[Array, Array]:
    """Where heart and great vessels replace air, in [0, 1]; and the hila."""
    x, y, enlarged = c.x, c.y, c.found["heart"]
    large = 0.15 * enlarged + 0.010 * c.age * (1 - enlarged) + c.trait(0.013)
    size = (1 + 0.10 * c.portable) * (1 + large * 1.7)
    cx, cy = 0.12 + 0.10 * large, floor - 0.10
    u, v = (x - cx) * 0.88 + (y - cy) * 0.46, (y - cy) * 0.88 - (x - cx) * 0.46
    left = dome((u / (0.345 * size)) ** 2 + (v / (0.265 * size)) ** 2)
    right = dome(((x + 0.08) / (0.15 * size)) ** 2 + ((y - cy + 0.02) / (0.26 * size)) ** 2)
    vascular = dome(((x - 0.03) / 0.17) ** 2 + ((y + 0.22) / 0.42) ** 2)
    age = np.clip(1 + 0.25 * c.age, 0.5, 2)
    knob = dome(((x - 0.15) / 0.085) ** 2 + ((y + 0.38) / 0.12) ** 2)
    solid = np.maximum(np.maximum(left, 0.9 * right) ** 0.55, np.maximum(0.8 * vascular, 0.75 * age * knob) ** 0.6)
    hila = np.exp(-(((np.abs(x) - 0.215) / 0.075) ** 2) - ((y + 0.10) / 0.14) ** 2)
    return np.minimum(solid, 1), (0.10 + 0.08 * c.found["edema"]) * hila


def _opacities(c: Canvas, lungs: Lungs) -> Array:
    """Edema (both lungs, from the hila), consolidation (one or two ragged foci), bands of atelectasis, a nodule."""
    x, y, ax, found = c.x, c.y, np.abs(c.x), c.found
    fine, cloud = c.grain(1), c.grain(2)
    hilar = np.exp(-(((ax - 0.28) / 0.26) ** 2) - ((y - 0.05) / 0.42) ** 2)
    total = found["edema"] * (0.22 * hilar + 0.06 + 0.030 * fine + 0.02 * cloud)
    for second in (False, True):
        dx = (x - c.side() * c.place(0.28, 0.52)) / c.place(0.14, 0.23)
        dy = (y - c.place(-0.40, 0.34)) / c.place(0.14, 0.23)
        there = found["consolidation"] * ((c.place(0, 1) < 0.6) if second else 1)
        total = total + there * 0.30 * np.clip(1.15 - dx**2 - dy**2 + 0.35 * fine + 0.25 * cloud, 0, 1)
    side, band = c.side(), y - lungs.bottom + 0.16 + 0.25 * (ax - 0.4) * c.place(-1, 1)
    collapse = 0.20 * np.exp(-((band / 0.036) ** 2)) + 0.13 * step(band, 0.12)
    total = total + found["atelectasis"] * step(x * side, 0.05) * collapse
    q = (x - c.side() * c.place(0.25, 0.55)) ** 2 + (y - c.place(-0.5, 0.3)) ** 2
    nodule = dome(q / (0.06 + 0.08 * found["lesion"]) ** 2)
    return (total + 0.26 * (found["lesion"] > 0) * nodule) * lungs.inside


def _pleura(c: Canvas, lungs: Lungs) -> Array:
    """Effusion (the angle filled, a rising edge; a veil when lying) and pneumothorax (a dark rim, a thin line)."""
    x, y, ax, found = c.x, c.y, np.abs(c.x), c.found
    hemi = np.maximum(step(x * c.side(), 0.05), c.place(0, 1) < 0.45)
    rise = found["effusion"] * (0.42 - 0.12 * c.recumbent)
    level = lungs.bottom - rise * (0.35 + 0.9 * np.clip((ax - 0.2) / 0.5, 0, 1.2) ** 2) - 0.02
    fluid = 0.32 * step(y - level, 0.06) + 0.08 * c.recumbent * found["effusion"]
    side, depth = c.side(), 0.06 + 0.16 * found["pneumothorax"]
    rim = np.minimum(lungs.outer - ax, y - lungs.top)
    edge = -0.12 * step(depth - rim, 0.015) + 0.10 * np.exp(-(((rim - depth) / 0.012) ** 2))
    gone = (found["pneumothorax"] > 0) * step(x * side, 0.04) * step(0.35 - y, 0.2)
    return ((found["effusion"] > 0) * hemi * fluid + gone * edge) * lungs.inside


def _devices(c: Canvas) -> Array:
    """A breathing tube with a feeding tube, a central line, a pacemaker; leads: one or more where there is a device."""
    x, y, thin = c.x, c.y, 0.012
    has, kind = c.found["device"] > 0, c.place(0, 1)
    tube, line, pace = has * (kind < 0.6), has * (kind > 0.35) * (kind < 0.85), has * (kind > 0.85)
    wind = step(0.018 - np.abs(x + 0.01 + 0.02 * np.sin(3 * y)), thin) * step(c.place(-0.42, -0.30) - y, 0.02)
    feed = step(0.011 - np.abs(x - 0.02 - 0.12 * np.clip(y - 0.3, 0, 1)), thin)
    neck = -0.10 - 0.20 * np.clip(-0.45 - y, 0, 1) ** 0.8
    central = step(0.012 - np.abs(x - neck), thin) * step(c.place(-0.15, 0.05) - y, 0.02)
    box = step(1 - np.maximum(np.abs(x - 0.52) / 0.11, np.abs(y + 0.52) / 0.085), 0.25)
    loop = np.sqrt(((x - 0.24) / 0.28) ** 2 + ((y + 0.05) / 0.46) ** 2)
    wire = step(0.035 - np.abs(loop - 1), 0.03) * step(x - 0.02, 0.03) * (x < 0.6)
    lead = y - c.uniform(-0.4, 0.2) - c.uniform(-0.5, 0.5) * x - 0.12 * np.sin(4 * x + c.uniform(0, 6))
    lines = tube * (0.20 * wind + 0.12 * feed) + line * 0.18 * central + pace * (0.30 * box + 0.16 * wire)
    return lines + has * 0.08 * step(0.009 - np.abs(lead), 0.010)


def lateral(c: Canvas) -> Array:
    """LATERAL and LL films: the spine to the right, the breastbone to the left."""
    x, y = c.x, c.y
    broad = 0.04 * (c.male - 0.5) + c.trait(0.02)
    chest = np.maximum(0.80 + broad - 0.40 * np.clip(-0.25 - y, 0, 1) ** 1.2, 0.25)
    thick = dome(((x - 0.03) / chest) ** 2)
    arms = 0.22 * dome(((y + 0.92 - 0.3 * x) / 0.16) ** 2) * (y < -0.6)
    density = (thick > 0) * (0.30 + 0.16 * step(y - 0.55, 0.3)) + 0.40 * thick**0.6 + arms
    floor = 0.42 + c.trait(0.04) + c.normal(0.03) + 0.10 * c.found["hyper"] - 0.08 * c.found["atelectasis"]
    bottom = floor + 0.10 * np.sin(3.0 * (x - 0.1)) + 0.16 * np.clip(x, 0, 1)
    edge = 0.56 + broad + 0.05 * c.found["hyper"] - 0.6 * np.clip(-0.35 - y, 0, 1) ** 1.3
    inside = step(edge - np.abs(x + 0.02), 0.05) * step(bottom - y, 0.04) * step(y + 0.80, 0.06)
    large = 1 + 0.26 * c.found["heart"] + c.trait(0.02)
    u, v = (x + 0.22) * 0.85 + (y - floor + 0.16) * 0.5, (y - floor + 0.16) * 0.85 - (x + 0.22) * 0.5
    heart = dome((u / (0.40 * large)) ** 2 + (v / (0.29 * large)) ** 2)
    density = density - (0.34 + c.normal(0.025)) * inside + 0.24 * heart * inside
    inside = inside * (1 - 0.75 * heart)
    arch = np.exp(-(((np.hypot(x - 0.12, y + 0.24) - 0.20) / 0.07) ** 2)) * step(-0.15 - y, 0.1)
    hila = np.exp(-(((x - 0.06) / 0.12) ** 2) - ((y + 0.05) / 0.15) ** 2)
    vascular = 0.06 * arch * np.clip(1 + 0.25 * c.age, 0.5, 2) + 0.11 * hila + 0.014 * (c.grain(0) + c.grain(1))
    bone = 1.0 - 0.20 * c.age + c.normal(0.06)
    vertebra = 0.13 + 0.05 * np.cos(2 * np.pi * (y - 0.2 * x) / 0.15)
    spine = vertebra * dome(((x - 0.50 - 0.10 * np.cos(1.8 * (y - 0.1))) / 0.115) ** 2)
    breast = 0.10 * np.exp(-(((x + 0.60 + broad - 0.10 * np.clip(-y, 0, 1)) / 0.035) ** 2)) * step(0.3 - y, 0.1)
    ribs = 0.035 * np.clip(np.cos(2 * np.pi * (y + 0.55 * x) / 0.17), 0, 1) * inside
    return density + vascular * inside + bone * (spine + breast + ribs) + _lateral_findings(c, inside, bottom)


def _lateral_findings(c: Canvas, inside: Array, bottom: Array) -> Array:
    x, y, found, fine = c.x, c.y, c.found, c.grain(1)
    total = found["edema"] * (0.14 * np.exp(-((x / 0.4) ** 2) - ((y - 0.05) / 0.45) ** 2) + 0.03 * fine)
    q = ((x - c.place(-0.3, 0.35)) / 0.2) ** 2 + ((y - c.place(-0.4, 0.3)) / 0.18) ** 2
    total = total + found["consolidation"] * 0.18 * np.clip(1.15 - q + 0.35 * fine + 0.25 * c.grain(2), 0, 1)
    level = bottom - found["effusion"] * 0.42 * np.clip((x + 0.1) / 0.5, 0, 1.2) ** 1.5
    total = total + (found["effusion"] > 0) * 0.26 * step(y - level, 0.06)
    total = total + found["atelectasis"] * 0.10 * np.exp(-(((y - bottom + 0.15) / 0.05) ** 2))
    q = (x - c.place(-0.3, 0.3)) ** 2 + (y - c.place(-0.5, 0.2)) ** 2
    total = total + 0.22 * (found["lesion"] > 0) * dome(q / (0.06 + 0.08 * found["lesion"]) ** 2)
    line = step(0.011 - np.abs(x + 0.05 - 0.1 * np.sin(2 * y + c.uniform(0, 6))), 0.012)
    return total * inside + (found["device"] > 0) * 0.14 * line * step(c.uniform(-0.3, 0.1) - y, 0.02)
