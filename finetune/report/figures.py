"""Charts as SVG: line panels and point maps.

Input: numbers and names. Output: `Markup`. Colours come from the page's style (classes c0 ... c7), so that a dark
screen and paper work too; every series also has its own marker or dash, so that colour is never alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import numpy as np
from markupsafe import Markup

from finetune.report.html import both_widths, join, render

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
    """Axes, labels and reference lines of a line panel."""

    x_label: str = ""
    y_label: str = ""
    x_range: tuple[float, float] | None = None
    y_range: tuple[float, float] | None = None
    log_x: bool = False
    diagonal: bool = False
    marks_y: Sequence[tuple[float, str]] = field(default_factory=tuple)  # horizontal lines with a name
    ticks_x: Sequence[float] = field(default_factory=tuple)  # ticks at the values, if they are few


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


def shape(name: str, *children: Any, **attributes: Any) -> Markup:
    """An SVG element; `class_` is class, `_` in names becomes `-`, None is left out, coordinates have tenths."""
    given = {key.rstrip("_").replace("_", "-"): value for key, value in attributes.items() if value is not None}
    shown = Markup("").join(Markup(' {}="{}"').format(key, _tenths(value)) for key, value in given.items())
    return Markup("<{0}{1}>{2}</{0}>").format(Markup(name), shown, join(children))


def _tenths(value: Any) -> str:
    return f"{value:.1f}".removesuffix(".0") if isinstance(value, float) else str(value)


def svg(width: float, height: float, says: str, *children: Any) -> Markup:
    """An SVG with a title for screen readers."""
    name = shape("title", says)
    return shape("svg", name, children, viewBox=f"0 0 {width:g} {height:g}", role="img", width=width, height=height)


def mark(index: int, x: float, y: float, size: float = 4.0, tip: str | None = None) -> Markup:
    """A marker in the series' colour and shape: disc, square, diamond, triangle, then open ones."""
    css = f"mark c{index % COLOURS}" + (" open" if (index // 4) % 2 else "")
    says = shape("title", tip) if tip else None
    kind = index % 4
    if kind == 0:
        return shape("circle", says, cx=x, cy=y, r=size, class_=css)
    if kind == 1:
        return shape("rect", says, x=x - size * 0.9, y=y - size * 0.9, width=size * 1.8, height=size * 1.8, class_=css)
    corners = [(0, -1.3), (1.3, 0), (0, 1.3), (-1.3, 0)] if kind == 2 else [(0, -1.2), (1.2, 0.9), (-1.2, 0.9)]
    return shape(
        "polygon", says, points=" ".join(f"{x + a * size:.1f},{y + b * size:.1f}" for a, b in corners), class_=css
    )


def legend(names: Sequence[tuple[int, str]]) -> Markup:
    """Marker and name of each series, shared by the panels under it."""
    return render("legend", [(mark(index, 7, 7), name) for index, name in names])


def panel(series: Sequence[Series], frame: Frame, title: str = "", width: int = 250, height: int = 190) -> Markup:
    """Lines over a common axis."""
    lines = [s for s in series if len(s.x)]
    if not lines:
        return Markup("")
    x_range = frame.x_range or span([s.x for s in lines], pad=0.0)
    y_range = frame.y_range or span([v for s in lines for v in (s.y, s.low, s.high) if v is not None], pad=0.06)
    x = Scale(*x_range, 50 if frame.y_label else 42, width - 12, log=frame.log_x)
    y = Scale(*y_range, height - 40, 30 if title else 12)
    parts = [_axes(x, y, frame, width, height, title)]
    if frame.diagonal:
        a, b = max(x.low, y.low), min(x.high, y.high)
        parts.append(shape("line", x1=x(a), y1=y(a), x2=x(b), y2=y(b), class_="reference"))
    for level, name in frame.marks_y:
        if y.low <= level <= y.high:
            parts.append(shape("line", x1=x.start, x2=x.end, y1=y(level), y2=y(level), class_="reference"))
            parts.append(shape("text", name, x=x.end, y=y(level) + 13, class_="tiny", text_anchor="end"))
    parts += [_line(s, x, y) for s in lines]
    return svg(width, height, f"{title or frame.y_label} against {frame.x_label}", shape("g", parts, class_="panel"))


def panels(specs: Sequence[tuple[Sequence[Series], Frame, str]], *, columns: int = 3) -> Markup:
    """Several line panels, three or two beside each other on a page, one under the other on a phone."""
    css = "panels two-columns" if columns == 2 else "panels"

    def draw(width: int) -> Markup:
        size = (320, 210) if width < 500 else (360, 240) if columns == 2 else (250, 185)
        return render("div", css, join(panel(lines, frame, title, *size) for lines, frame, title in specs if lines))

    return both_widths(draw)


def span(values: Sequence[Sequence[float]], pad: float) -> tuple[float, float]:
    """Lowest and highest of all finite values, with room on both sides."""
    flat = np.concatenate([np.asarray(v, dtype=float) for v in values])
    flat = flat[np.isfinite(flat)]
    low, high = (float(flat.min()), float(flat.max())) if len(flat) else (0.0, 1.0)
    room = (high - low) * pad or (0.0 if high > low else max(abs(high), 1.0) * 0.05)
    return low - room, high + room


def _axes(x: Scale, y: Scale, frame: Frame, width: int, height: int, title: str) -> Markup:
    parts: list[Any] = [shape("text", title, x=2, y=15, class_="panel-title") if title else None]
    rows = y.ticks(4)
    for value in rows:
        parts.append(shape("line", x1=x.start, x2=x.end, y1=y(value), y2=y(value), class_="grid"))
        step = rows[1] - rows[0] if len(rows) > 1 else 1.0
        parts.append(
            shape("text", tick_text(value, step), x=x.start - 6, y=y(value) + 4, text_anchor="end", class_="tick")
        )
    columns = list(frame.ticks_x) or x.ticks(max(2, int((x.end - x.start) // 55)))
    columns = [t for i, t in enumerate(columns) if i == 0 or x(t) - x(columns[i - 1]) > 18]
    for value in columns:
        step = columns[1] - columns[0] if len(columns) > 1 else 1.0
        text = f"{value:g}" if x.log else tick_text(value, step)
        parts.append(shape("line", x1=x(value), x2=x(value), y1=y.start, y2=y.start + 4, class_="axis"))
        parts.append(shape("text", text, x=x(value), y=y.start + 16, text_anchor="middle", class_="tick"))
    parts.append(shape("line", x1=x.start, x2=x.end, y1=y.start, y2=y.start, class_="axis"))
    parts.append(
        shape("text", frame.x_label, x=(x.start + x.end) / 2, y=height - 6, text_anchor="middle", class_="axis-name")
    )
    if frame.y_label:
        turned = f"translate(11 {(y.start + y.end) / 2:.1f}) rotate(-90)"
        parts.append(shape("text", frame.y_label, transform=turned, text_anchor="middle", class_="axis-name"))
    return join(parts)


def _line(s: Series, x: Scale, y: Scale) -> Markup:
    """One series; what lies outside the axes is left out."""
    room = 1e-6 * (y.high - y.low)
    inside = [y.low - room <= v <= y.high + room for v in s.y]
    kept = [i for i, shown in enumerate(inside) if shown]
    points = [(x(s.x[i]), y(s.y[i])) for i in kept]
    css = f"c{s.index % COLOURS}" if s.index >= 0 else "neutral"
    parts: list[Markup] = []
    if s.low is not None and s.high is not None:
        ends = [(x(s.x[i]), y(min(s.high[i], y.high)), y(max(s.low[i], y.low))) for i in kept]
        if s.whiskers:
            parts += [shape("line", x1=a, x2=a, y1=high, y2=low, class_=f"whisker {css}") for a, high, low in ends]
        else:
            band = [(a, high) for a, high, _ in ends] + [(a, low) for a, _, low in reversed(ends)]
            parts.append(shape("polygon", points=_points(band), class_=f"band {css}"))
    if not s.whiskers:
        dash = DASHES[(s.index // COLOURS) % len(DASHES)]
        for shown, part in groupby(range(len(s.y)), key=lambda i: inside[i]):
            piece = _points([(x(s.x[i]), y(s.y[i])) for i in part])
            if shown:
                name = shape("title", s.name)
                parts.append(shape("polyline", name, points=piece, class_=f"line {css}", stroke_dasharray=dash))
    if s.marks or len(points) == 1:
        parts += [mark(s.index, a, b, 3.5) for a, b in points]
    elif s.index >= 0 and not s.whiskers:
        parts += [mark(s.index, *points[i], 3.2) for i in _tellers(s.index, len(points))]
    return join(parts)


def _tellers(index: int, num: int) -> list[int]:
    """Indices of a long line's points that carry its marker, staggered between lines."""
    return [int((k + (1 + index % COLOURS) / (COLOURS + 1)) / 3 * (num - 1)) for k in range(3)] if num > 1 else []


def _points(points: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{a:.1f},{b:.1f}" for a, b in points)


def scatter(
    x: np.ndarray, y: np.ndarray, groups: Sequence[tuple[str, np.ndarray]], title: str, size: int = 350
) -> Markup:
    """Points on a map, a colour and marker for each group of rows (boolean masks)."""
    sx = Scale(*span([list(x)], pad=0.04), 8, size - 8)
    sy = Scale(*span([list(y)], pad=0.04), size - 8, 30)
    parts: list[Any] = [shape("text", title, x=8, y=16, class_="panel-title")]
    for i, (_, rows) in enumerate(groups):
        parts.append(
            shape("g", [mark(i, sx(a), sy(b), 2.6) for a, b in zip(x[rows], y[rows], strict=True)], class_="dots")
        )
    return svg(size, size, f"map of films by {title}", parts)


# ---- Bars and cohort flow as HTML, which wraps on a phone


def bars(rows: Sequence[tuple[str, float, str]]) -> Markup:
    """Horizontal bars (name, share, what to write beside it) that wrap by themselves."""
    return render("bars", [(name, _percent(value, 1.0), says) for name, value, says in rows])


def _percent(value: float, of: float) -> str:
    return f"{100 * min(max(value / (of or 1), 0), 1):.1f}"


def flow(steps: Sequence[tuple[str, int, int, str]]) -> Markup:
    """A cohort's flow, table by table: (what is counted, rows before, rows after, why rows left).

    Rules that took nothing out are counted in one line, tables that lost nothing are named in the last.
    """
    parts, whole = [], []
    for name in dict.fromkeys(step[0] for step in steps if step[1]):
        own = [step for step in steps if step[0] == name]
        if all(before == after for _, before, after, _ in own):
            whole.append(f"{name} ({own[0][1]:,})")
            continue
        first, idle = own[0][1], sum(before == after for _, before, after, _ in own)
        items = [(name, first, 0)] + [(f"−{b - a:,} {why}", a, b - a) for _, b, a, why in own if a != b]
        shown = [(says, _percent(after, first), _percent(lost, first), f"{after:,}") for says, after, lost in items]
        quiet = f"{idle} {'rules' if len(own) == idle else 'other rules'} took nothing out" if idle > 1 else None
        parts.append(render("flow", shown, quiet))
    if whole:
        parts.append(render("flow", [], f"Nothing taken out of: {', '.join(whole)}"))
    return join(parts)
