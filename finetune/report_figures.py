"""Charts as SVG: line panels and point maps.

Comes in: numbers and names. Goes out: `Html`. Colours come from the page's style (classes c0 ... c7), so that a dark
screen and paper work too; every series also has its own marker or dash, so that colour is never alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import numpy as np

from finetune.report_html import Html, both_widths, join, tag

COLOURS = 8
DASHES = (None, "6 3", "2 3", "8 3 2 3")


@dataclass(frozen=True)
class Series:
    """One line: points (x, y), an optional band (low, high), and the index that gives its colour and marker."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    index: int = 0
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    marks: bool = False
    whiskers: bool = False  # low and high as bars, and no line


@dataclass(frozen=True)
class Scale:
    """Data to pixels, linear or logarithmic."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high, value = (math.log10(max(v, 1e-12)) if self.log else v for v in (self.low, self.high, value))
        return self.start + (self.end - self.start) * (value - low) / ((high - low) or 1.0)

    def ticks(self, about: int = 5) -> list[float]:
        rough = (self.high - self.low) / about or 1.0
        power = 10.0 ** math.floor(math.log10(rough))
        step = min((m * power for m in (1, 2, 2.5, 5, 10)), key=lambda step: abs(math.log(step / rough)))
        first = math.ceil(self.low / step - 1e-9) * step
        return [first + i * step for i in range(int((self.high - first) / step + 1e-6) + 1)]


@dataclass(frozen=True)
class Frame:
    """What a line panel looks like around its lines."""

    x_label: str = ""
    y_label: str = ""
    x_range: tuple[float, float] | None = None
    y_range: tuple[float, float] | None = None
    log_x: bool = False
    diagonal: bool = False
    marks_y: Sequence[tuple[float, str]] = field(default_factory=tuple)  # horizontal lines with a name
    labels: bool = False  # the series' names at the ends of their lines
    ticks_x: Sequence[float] = field(default_factory=tuple)  # where the values stand, if they are few


def tick_text(value: float, step: float) -> str:
    if abs(value) >= 10000 or step >= 1000:
        return f"{value / 1000:g}k".replace("-", "−")
    places = max(0, -math.floor(math.log10(step) + 1e-9)) if step else 0
    if abs(step * 10**places - round(step * 10**places)) > 1e-6:
        places += 1
    if places > 4 and abs(value) > step / 2:
        power = math.floor(math.log10(abs(value)) + 1e-9)
        return f"{value / 10**power:.{max(places + power, 0)}f}e{power}".replace("-", "−")
    return f"{value:.{places if places <= 4 else 0}f}".replace("-", "−")


def svg(width: float, height: float, says: str, *children: Any) -> Html:
    """An SVG with a name for those who hear it."""
    name = tag("title", says)
    return tag("svg", name, children, viewBox=f"0 0 {width:g} {height:g}", role="img", width=width, height=height)


def mark(index: int, x: float, y: float, size: float = 4.0, tip: str | None = None) -> Html:
    """A marker in the series' colour and shape: disc, square, diamond, triangle, then open ones."""
    css = f"mark c{index % COLOURS}" + (" open" if (index // 4) % 2 else "")
    says = tag("title", tip) if tip else None
    shape = index % 4
    if shape == 0:
        return tag("circle", says, cx=x, cy=y, r=size, class_=css)
    if shape == 1:
        return tag("rect", says, x=x - size * 0.9, y=y - size * 0.9, width=size * 1.8, height=size * 1.8, class_=css)
    corners = [(0, -1.3), (1.3, 0), (0, 1.3), (-1.3, 0)] if shape == 2 else [(0, -1.2), (1.2, 0.9), (-1.2, 0.9)]
    return tag(
        "polygon", says, points=" ".join(f"{x + a * size:.1f},{y + b * size:.1f}" for a, b in corners), class_=css
    )


def legend(names: Sequence[tuple[int, str]]) -> Html:
    """Marker and name of each series, shared by the panels under it."""
    items = []
    for index, name in names:
        icon = tag("svg", mark(index, 7, 7), viewBox="0 0 14 14", width=14, height=14, aria_hidden="true")
        items.append(tag("li", icon, " ", name))
    return tag("ul", items, class_="legend")


def panel(series: Sequence[Series], frame: Frame, title: str = "", width: int = 250, height: int = 190) -> Html:
    """Lines over a common axis."""
    lines = [s for s in series if len(s.x)]
    if not lines:
        return Html("")
    x_range = frame.x_range or span([s.x for s in lines], pad=0.0)
    y_range = frame.y_range or span([v for s in lines for v in (s.y, s.low, s.high) if v is not None], pad=0.06)
    right = 12 + (max(len(s.name) for s in lines) * 7.2 if frame.labels else 0)
    x = Scale(*x_range, 50 if frame.y_label else 42, width - min(right, width * 0.36), log=frame.log_x)
    y = Scale(*y_range, height - 40, 30 if title else 12)
    parts = [_axes(x, y, frame, width, height, title)]
    if frame.diagonal:
        a, b = max(x.low, y.low), min(x.high, y.high)
        parts.append(tag("line", x1=x(a), y1=y(a), x2=x(b), y2=y(b), class_="reference"))
    for level, name in frame.marks_y:
        if y.low <= level <= y.high:
            parts.append(tag("line", x1=x.start, x2=x.end, y1=y(level), y2=y(level), class_="reference"))
            parts.append(tag("text", name, x=x.end, y=y(level) + 13, class_="tiny", text_anchor="end"))
    parts += [_line(s, x, y) for s in lines]
    if frame.labels:
        parts += _end_labels(lines, x, y)
    return svg(width, height, f"{title or frame.y_label} against {frame.x_label}", tag("g", parts, class_="panel"))


def panels(specs: Sequence[tuple[Sequence[Series], Frame, str]], *, columns: int = 3) -> Html:
    """Several line panels, three or two beside each other on a page, one under the other on a phone."""
    css = "panels two-columns" if columns == 2 else "panels"

    def draw(width: int) -> Html:
        size = (320, 210) if width < 500 else (360, 240) if columns == 2 else (250, 185)
        return tag("div", [panel(lines, frame, title, *size) for lines, frame, title in specs if lines], class_=css)

    return both_widths(draw)


def span(values: Sequence[Sequence[float]], pad: float) -> tuple[float, float]:
    """Lowest and highest of all finite values, with room on both sides."""
    flat = np.concatenate([np.asarray(v, dtype=float) for v in values])
    flat = flat[np.isfinite(flat)]
    low, high = (float(flat.min()), float(flat.max())) if len(flat) else (0.0, 1.0)
    room = (high - low) * pad or (0.0 if high > low else max(abs(high), 1.0) * 0.05)
    return low - room, high + room


def _axes(x: Scale, y: Scale, frame: Frame, width: int, height: int, title: str) -> Html:
    parts: list[Any] = [tag("text", title, x=2, y=15, class_="panel-title") if title else None]
    rows = y.ticks(4)
    for value in rows:
        parts.append(tag("line", x1=x.start, x2=x.end, y1=y(value), y2=y(value), class_="grid"))
        step = rows[1] - rows[0] if len(rows) > 1 else 1.0
        parts.append(
            tag("text", tick_text(value, step), x=x.start - 6, y=y(value) + 4, text_anchor="end", class_="tick")
        )
    columns = list(frame.ticks_x) or x.ticks(max(2, int((x.end - x.start) // 55)))
    columns = [t for i, t in enumerate(columns) if i == 0 or x(t) - x(columns[i - 1]) > 18]
    for value in columns:
        step = columns[1] - columns[0] if len(columns) > 1 else 1.0
        text = f"{value:g}" if x.log else tick_text(value, step)
        parts.append(tag("line", x1=x(value), x2=x(value), y1=y.start, y2=y.start + 4, class_="axis"))
        parts.append(tag("text", text, x=x(value), y=y.start + 16, text_anchor="middle", class_="tick"))
    parts.append(tag("line", x1=x.start, x2=x.end, y1=y.start, y2=y.start, class_="axis"))
    parts.append(
        tag("text", frame.x_label, x=(x.start + x.end) / 2, y=height - 6, text_anchor="middle", class_="axis-name")
    )
    if frame.y_label:
        turned = f"translate(11 {(y.start + y.end) / 2:.1f}) rotate(-90)"
        parts.append(tag("text", frame.y_label, transform=turned, text_anchor="middle", class_="axis-name"))
    return join(parts)


def _line(s: Series, x: Scale, y: Scale) -> Html:
    """One series; what lies outside the axes is left out."""
    room = 1e-6 * (y.high - y.low)
    inside = [y.low - room <= v <= y.high + room for v in s.y]
    kept = [i for i, shown in enumerate(inside) if shown]
    points = [(x(s.x[i]), y(s.y[i])) for i in kept]
    css = f"c{s.index % COLOURS}" if s.index >= 0 else "neutral"
    parts: list[Html] = []
    if s.low is not None and s.high is not None:
        ends = [(x(s.x[i]), y(min(s.high[i], y.high)), y(max(s.low[i], y.low))) for i in kept]
        if s.whiskers:
            parts += [tag("line", x1=a, x2=a, y1=high, y2=low, class_=f"whisker {css}") for a, high, low in ends]
        else:
            band = [(a, high) for a, high, _ in ends] + [(a, low) for a, _, low in reversed(ends)]
            parts.append(tag("polygon", points=_points(band), class_=f"band {css}"))
    if not s.whiskers:
        dash = DASHES[(s.index // COLOURS) % len(DASHES)]
        for shown, part in groupby(range(len(s.y)), key=lambda i: inside[i]):
            piece = _points([(x(s.x[i]), y(s.y[i])) for i in part])
            if shown:
                name = tag("title", s.name)
                parts.append(tag("polyline", name, points=piece, class_=f"line {css}", stroke_dasharray=dash))
    if s.marks or len(points) == 1:
        parts += [mark(s.index, a, b, 3.5) for a, b in points]
    elif s.index >= 0 and not s.whiskers:
        parts += [mark(s.index, *points[i], 3.2) for i in _tellers(s.index, len(points))]
    return join(parts)


def _tellers(index: int, num: int) -> list[int]:
    """Points of a long line that carry its marker, apart from those of the other lines."""
    return [int((k + (1 + index % COLOURS) / (COLOURS + 1)) / 3 * (num - 1)) for k in range(3)] if num > 1 else []


def _points(points: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{a:.1f},{b:.1f}" for a, b in points)


def _end_labels(lines: Sequence[Series], x: Scale, y: Scale) -> list[Html]:
    """Names beside the lines' ends, moved apart where they would touch."""
    placed: list[Html] = []
    last = y.end - 14
    for at, s in sorted(((y(s.y[-1]), s) for s in lines if np.isfinite(s.y[-1])), key=lambda pair: pair[0]):
        last = max(at, last + 14)
        place = x(s.x[-1]) + 7
        placed.append(tag("text", s.name, x=place, y=last + 4, class_="name"))
    return placed


def scatter(
    x: np.ndarray, y: np.ndarray, groups: Sequence[tuple[str, np.ndarray]], title: str, size: int = 350
) -> Html:
    """Points on a map, a colour and marker for each group of rows (boolean masks)."""
    sx = Scale(*span([list(x)], pad=0.04), 8, size - 8)
    sy = Scale(*span([list(y)], pad=0.04), size - 8, 30)
    parts: list[Any] = [tag("text", title, x=8, y=16, class_="panel-title")]
    for i, (_, rows) in enumerate(groups):
        parts.append(
            tag("g", [mark(i, sx(a), sy(b), 2.6) for a, b in zip(x[rows], y[rows], strict=True)], class_="dots")
        )
    return svg(size, size, f"map of films by {title}", parts)
