"""Rows of numbers as pictures: forest plots as SVG; bars and a cohort's flow as plain HTML that wraps on a phone."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from finetune.report_figures import COLOURS, Scale, mark, span, svg, tick_text
from finetune.report_html import Html, fixed, interval, join, number, tag

LETTER, SMALL = 7.2, 6.1  # pixels of a letter, about
GAP, TOP = 14, 26
PAGE = 780  # pixels: a longer plot is cut between rows, so that paper and eye can hold it


@dataclass(frozen=True)
class Row:
    """A row of a forest plot: its name, a remark such as `31 of 402`, and a point for each series."""

    name: str
    points: Sequence[tuple[int, float, float | None, float | None]]  # series, value, low, high
    remark: str = ""
    best: float | None = None  # where its dotted mark stands: what is possible, or chance
    strong: bool = False
    says: str = ""  # under the number of a row with one point: its p


def forest(
    rows: Sequence[Row],
    names: dict[int, str],
    width: int,
    *,
    chance: float | None = 0.5,
    x_label: str = "AUROC",
) -> Html:
    """Points with intervals: a block for each row, in it a line for each series.

    Args:
        names: series -> its name, for tips.
        width: pixels; above 500 the numbers are written out at the right.
        chance: where the dashed line stands.
    """
    wide = width > 500
    step = 17 if max(len(row.points) for row in rows) <= 4 else 14
    room = max(max(len(row.name) * LETTER, len(row.remark) * SMALL) for row in rows) + 18
    left = min(room, 290 if wide else 128)
    letters = int((left - 8) / LETTER)
    right = (170 if chance == 0 else 148) if wide else 66 if any(row.says for row in rows) else 40
    values = [v for row in rows for point in row.points for v in point[1:] if v is not None and np.isfinite(v)]
    values += [row.best for row in rows if row.best is not None] + ([chance] if chance is not None else [])
    x = Scale(*span([values], pad=0.04), left, width - right)
    pages: list[list[tuple[Row, float]]] = [[]]
    for row in rows:
        tall = max(len(row.points) * step, 17 * len(_wrap(row.name, letters)) + 17 * bool(row.remark or row.says))
        if pages[-1] and sum(t + GAP for _, t in pages[-1]) + tall > PAGE:
            pages.append([])
        pages[-1].append((row, tall))

    def draw(page: Sequence[tuple[Row, float]]) -> Html:
        stripes: list[Any] = []
        blocks: list[Any] = []
        y = float(TOP)
        for i, (row, tall) in enumerate(page):
            if i % 2 == 0:
                stripes.append(tag("rect", x=0, y=y - GAP / 2, width=width, height=tall + GAP, rx=4, class_="stripe"))
            blocks.append(_name(row, y + tall / 2, letters))
            blocks.append(_points(row, names, x, y, tall, step, width))
            y += tall + GAP
        bottom = y - GAP / 2
        ground = _ground(x, bottom, chance, x_label, width)
        return svg(width, bottom + 42, f"{x_label} of {', '.join(names.values())}", stripes, ground, blocks)

    return join([draw(page) for page in pages])


def _ground(x: Scale, bottom: float, chance: float | None, x_label: str, width: int) -> Html:
    """Grid, chance and the axis under the rows."""
    ticks = x.ticks(5 if width > 500 else 3)
    step = ticks[1] - ticks[0] if len(ticks) > 1 else 0.1
    lines = [tag("line", x1=x(t), x2=x(t), y1=TOP - GAP / 2, y2=bottom, class_="grid") for t in ticks]
    if chance is not None:
        lines.append(tag("line", x1=x(chance), x2=x(chance), y1=TOP - GAP / 2, y2=bottom, class_="reference"))
    texts = [tag("text", tick_text(t, step), x=x(t), y=bottom + 16, text_anchor="middle", class_="tick") for t in ticks]
    name = tag("text", x_label, x=(x.start + x.end) / 2, y=bottom + 34, text_anchor="middle", class_="axis-name")
    head = f"{x_label} (95% interval)" if width > 500 and chance is not None else None
    return join([lines, texts, name, tag("text", head, x=width - 4, y=12, text_anchor="end", class_="tiny")])


def _wrap(name: str, letters: int) -> list[str]:
    """A name in up to three lines; what is longer still loses its middle, as its end tells seeds apart."""
    lines = textwrap.wrap(name, letters, break_long_words=False) if len(name) > letters else [name]
    if len(lines) > 3 or any(len(line) > letters + 2 for line in lines):
        lines = [f"{name[: (letters - 1) // 2]}…{name[-(letters // 2) :]}"]
    return lines


def _name(row: Row, middle: float, letters: int) -> Html:
    lines = _wrap(row.name, letters)
    at = middle + 4 - 8 * (len(lines) - 1) - (7 if row.remark else 0)
    full = tag("title", row.name) if lines != [row.name] else None
    css = "row-name strong" if row.strong else "row-name"
    texts = [tag("text", full, line, x=6, y=at + 16 * i, class_=css) for i, line in enumerate(lines)]
    remark = _shorten(row.remark, letters)
    return join([texts, tag("text", remark, x=6, y=at + 16 * len(lines) - 2, class_="tiny") if remark else None])


def _shorten(text: str, letters: int) -> str:
    most = int(letters * LETTER / SMALL) + 1
    return text if len(text) <= most else f"{text[: most - 1]}…"


def _points(row: Row, names: dict[int, str], x: Scale, y: float, tall: float, step: int, width: int) -> Html:
    """The points and intervals of a row, and their numbers at the right."""
    parts: list[Any] = []
    if row.best is not None:
        tip = tag("title", number(row.best))
        parts.append(tag("line", tip, x1=x(row.best), x2=x(row.best), y1=y - 4, y2=y + tall + 4, class_="best"))
    line = y + tall / 2 - step * (len(row.points) - 1) / 2
    for index, value, low, high in row.points:
        text = interval(value, low, high) if width > 500 else fixed(value, 2)
        says = f"{names.get(index, '')}: {interval(value, low, high)}"
        if low is not None and high is not None and np.isfinite(low) and np.isfinite(high):
            parts.append(tag("line", x1=x(low), x2=x(high), y1=line, y2=line, class_=f"whisker c{index % COLOURS}"))
        parts.append(mark(index, x(value), line, 4.4, says))
        up = 5 if row.says else 0
        parts.append(tag("text", text, x=width - 4, y=line + 4 - up, text_anchor="end", class_="value"))
        line += step
    if row.says and len(row.points) == 1:
        parts.append(tag("text", row.says, x=width - 4, y=y + tall / 2 + 14, text_anchor="end", class_="tiny"))
    return join(parts)


def bars(rows: Sequence[tuple[str, float, str]], *, top: float = 1.0) -> Html:
    """Horizontal bars (name, share of `top`, what to write beside it) that wrap by themselves."""
    items = []
    for name, value, says in rows:
        bar = tag("span", tag("i", style=f"width:{100 * min(max(value / top, 0), 1):.1f}%"), class_="bar")
        items.append(tag("li", tag("span", name, class_="bar-name"), bar, tag("span", says, class_="bar-value")))
    return tag("ul", items, class_="bars")


def flow(steps: Sequence[tuple[str, int, int, str]]) -> Html:
    """A cohort's flow, table by table: (what is counted, rows before, rows after, why rows left).

    Rules that took nothing out are counted in one line.
    """
    parts = []
    for name in dict.fromkeys(step[0] for step in steps if step[1]):
        own = [step for step in steps if step[0] == name]
        first, idle = own[0][1], sum(before == after for _, before, after, _ in own)
        items = [_step(name, first, first, first, "", css="start")]
        items += [_step("", before, after, first, why) for _, before, after, why in own if before != after]
        quiet = f"{idle} {'rules' if len(own) == idle else 'other rules'} took nothing out" if idle > 1 else None
        items.append(tag("li", quiet, class_="quiet") if quiet else Html(""))
        parts.append(tag("ol", items, class_="flow"))
    return join(parts)


def _step(name: str, before: int, after: int, most: int, why: str, css: str | None = None) -> Html:
    widths = (100 * after / max(most, 1), 100 * (before - after) / max(most, 1))
    bar = tag(
        "span", tag("i", style=f"width:{widths[0]:.1f}%"), tag("b", style=f"width:{widths[1]:.1f}%"), class_="bar"
    )
    left = tag("span", name or f"−{before - after:,} {why}", class_="bar-name")
    return tag("li", left, bar, tag("strong", f"{after:,}"), class_=css)
