"""Forest plots as SVG: points with intervals, their numbers beside them.

Input: rows of names and values. Output: `Markup` for a width: on a page the names stand left of the points, on a phone
above them.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup

from finetune.report.figures import COLOURS, Scale, mark, shape, span, svg, tick_text
from finetune.report.html import interval, join, number

WIDEST, SMALL = 8.2, 6.7  # pixels of a letter: of a name, of a remark
GAP, TOP = 14, 26
PAGE = 780  # pixels: a longer plot is split between rows, to fit a printed page


@dataclass(frozen=True)
class Row:
    """A row of a forest plot: its name, a remark such as `31 of 402`, and a point for each series."""

    name: str
    points: Sequence[tuple[int, float, float | None, float | None]]  # series, value, low, high
    remark: str = ""
    best: float | None = None  # position of the dotted mark: the possible value, or chance
    strong: bool = False
    says: str = ""  # under the number of a row with one point: its p


def forest(
    rows: Sequence[Row],
    names: dict[int, str],
    width: int,
    *,
    chance: float | None = 0.5,
    x_label: str = "AUROC",
) -> Markup:
    """Points with intervals, their numbers at the right: a block for each row, in it a line for each series.

    Args:
        names: series -> its name, for tips.
        width: pixels; the names stand left of the points, or under 500 px above them.
        chance: where the dashed line stands.
    """
    wide = width > 500
    step = 17 if max(len(row.points) for row in rows) <= 4 else 14
    room = max(max(len(row.name) * WIDEST, len(row.remark) * SMALL) for row in rows) + 18
    left = min(room, 300.0) if wide else 12.0
    right = 170 if chance == 0 else 148
    most = (left if wide else width) - 8
    values = [v for row in rows for point in row.points for v in point[1:] if v is not None and np.isfinite(v)]
    values += [row.best for row in rows if row.best is not None] + ([chance] if chance is not None else [])
    x = Scale(*span([values], pad=0.04), left, width - right)
    pages: list[list[_Block]] = [[]]
    for row in rows:
        block = _Block(row, wrap(row.name, most / WIDEST), wrap(row.remark, most / SMALL), step, stacked=not wide)
        if pages[-1] and sum(b.tall + GAP for b in pages[-1]) + block.tall > PAGE:
            pages.append([])
        pages[-1].append(block)

    def draw(page: Sequence[_Block]) -> Markup:
        stripes: list[Any] = []
        blocks: list[Any] = []
        bands: list[tuple[float, float]] = []  # where the points lie
        y = float(TOP)
        for i, block in enumerate(page):
            if i % 2 == 0:
                size = {"width": width, "height": block.tall + GAP}
                stripes.append(shape("rect", x=0, y=y - GAP / 2, **size, rx=4, class_="stripe"))
            blocks.append(block.text(y, width))
            blocks.append(_row_points(block, names, x, y, width))
            bands.append((y + block.head + 2, y + block.tall + GAP / 2))
            y += block.tall + GAP
        bottom = y - GAP / 2
        ground = _ground(x, bands if not wide else [(TOP - GAP / 2, bottom)], chance, x_label, width)
        return svg(width, bottom + 42, f"{x_label} of {', '.join(names.values())}", stripes, ground, blocks)

    return join([draw(page) for page in pages])


@dataclass(frozen=True)
class _Block:
    """A row of a forest plot with its texts in lines: left of its points, or above them if `stacked`."""

    row: Row
    name: list[str]
    remark: list[str]
    step: int
    stacked: bool

    @property
    def head(self) -> float:
        """Height of the texts."""
        says = 15 if self.stacked and self.row.says and not self.remark else 0
        return 16 * len(self.name) + 15 * len(self.remark) + says

    @property
    def tall(self) -> float:
        points = len(self.row.points) * self.step
        return self.head + points if self.stacked else max(points, self.head, 34 if self.row.says else 0)

    def line(self, y: float) -> float:
        """Where the first point stands."""
        return y + self.head + self.step / 2 if self.stacked else y + (self.tall - self.step * (self.points - 1)) / 2

    @property
    def points(self) -> int:
        return len(self.row.points)

    def text(self, y: float, width: int) -> Markup:
        at = y + 12 if self.stacked else y + (self.tall - self.head) / 2 + 12
        css = "row-name strong" if self.row.strong else "row-name"
        texts = [shape("text", line, x=6, y=at + 16 * i, class_=css) for i, line in enumerate(self.name)]
        at += 16 * len(self.name) - 2
        texts += [shape("text", line, x=6, y=at + 15 * i, class_="tiny") for i, line in enumerate(self.remark)]
        if self.row.says and self.points == 1:
            place = at if self.stacked else self.line(y) + 14
            texts.append(shape("text", self.row.says, x=width - 4, y=place, text_anchor="end", class_="tiny"))
        return join(texts)


def wrap(text: str, letters: float) -> list[str]:
    """A text in lines, whole; a word that is longer than a line is broken."""
    text = re.sub(r"\bseed (?=\d)", "seed\u00a0", text)  # no line begins with a seed's number
    return textwrap.wrap(text, max(int(letters), 8), break_on_hyphens=False)


def _ground(x: Scale, bands: Sequence[tuple[float, float]], chance: float | None, x_label: str, width: int) -> Markup:
    """Grid and chance in these bands (top, bottom), and the axis under the rows."""
    bottom = bands[-1][1]
    ticks = x.ticks(5 if width > 500 else 3)
    step = ticks[1] - ticks[0] if len(ticks) > 1 else 0.1
    places = [(t, "grid") for t in ticks] + ([(chance, "reference")] if chance is not None else [])
    lines = [shape("line", x1=x(t), x2=x(t), y1=a, y2=b, class_=css) for t, css in places for a, b in bands]
    texts = [
        shape("text", tick_text(t, step), x=x(t), y=bottom + 16, text_anchor="middle", class_="tick") for t in ticks
    ]
    name = shape("text", x_label, x=(x.start + x.end) / 2, y=bottom + 34, text_anchor="middle", class_="axis-name")
    head = f"{x_label} (95% interval)" if chance is not None else None
    return join([lines, texts, name, shape("text", head, x=width - 4, y=12, text_anchor="end", class_="tiny")])


def _row_points(block: _Block, names: dict[int, str], x: Scale, y: float, width: int) -> Markup:
    """The points and intervals of a row, and their numbers at the right."""
    parts: list[Any] = []
    line, row = block.line(y), block.row
    if row.best is not None:
        top, bottom = line - block.step / 2 - 3, line + block.step * (block.points - 0.5) + 3
        tip = shape("title", number(row.best))
        parts.append(shape("line", tip, x1=x(row.best), x2=x(row.best), y1=top, y2=bottom, class_="best"))
    for index, value, low, high in row.points:
        text = interval(value, low, high)
        if low is not None and high is not None and np.isfinite(low) and np.isfinite(high):
            parts.append(shape("line", x1=x(low), x2=x(high), y1=line, y2=line, class_=f"whisker c{index % COLOURS}"))
        parts.append(mark(index, x(value), line, 4.4, f"{names.get(index, '')}: {text}"))
        up = 5 if row.says and not block.stacked else 0
        parts.append(shape("text", text, x=width - 4, y=line + 4 - up, text_anchor="end", class_="value"))
        line += block.step
    return join(parts)
