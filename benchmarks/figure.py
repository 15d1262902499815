"""Draw the README's figure: `./launch.sh python -m benchmarks.figure [OUT --seeds S ...]`.

Differences in AUROC with their intervals, from docs/results.json, drawn for light and for dark pages
(docs/results-light.svg, docs/results-dark.svg). With OUT, the folder of `benchmarks.demo`, the numbers are read anew
from its finished hospitals (each hospital's paired difference, and their mean with its 95% interval over hospitals)
and from benchmarks/real_films.csv (the same over folds of patients).
"""

from __future__ import annotations

import argparse
import json
from html import escape
from pathlib import Path
from typing import Any

from pandas import Series, read_csv

from benchmarks.demo import Between, between
from benchmarks.pages import ROOT
from benchmarks.real_films import BASE, OURS, ROWS, SETTING, interval

NUMBERS = ROOT / "docs/results.json"
REAL = "Real films: pretrained minus raw pixels"
SAYS = {  # rows of the figure: the difference of benchmarks.demo
    "Synthetic films: pretrained minus raw pixels": "pretrained minus raw pixels",
    "The same, 10% of subjects labelled": "the same, 10% of subjects labelled",
    "Synthetic films: minus random weights": "pretrained minus random weights",
    "Synthetic films: the record added to pretraining": "with minus without the record",
    "Death: the film added to the record": "death: fused minus record only",
}
COLOURS = {  # page, text, quiet text, lines, marks
    "light": ("#ffffff", "#1f2328", "#59636e", "#d1d9e0", "#00796b"),
    "dark": ("#0d1117", "#f0f6fc", "#9198a1", "#3d444d", "#4db6ac"),
}
WIDTH, EDGE, LEFT, RIGHT, WORDS, TOP, ROW, STEP = 456, 14, 14, 256, 268, 64, 50, 16


def measured(out: Path, seeds: list[int]) -> dict[str, Any]:
    """The numbers of the figure, from finished demos and the shipped rows of real films."""
    films = read_csv(ROWS)
    films = films[(films[SETTING] == Series(BASE)[SETTING]).all(axis=1) & (films["share"] == 1)]
    by = films.pivot(index="fold", columns="source", values="findings")
    each = by[OURS] - by["raw pixels"]
    found = {REAL: Between(list(each), *interval(each))}
    found |= {says: between(gap, [out / f"seed_{seed}" for seed in seeds]) for says, gap in SAYS.items()}
    rows = [
        {
            "says": says,
            **{key: round(value, 3) for key, value in (("value", of.mean), ("low", of.low), ("high", of.high))},
            "each": [round(value, 3) + 0.0 for value in of.each],  # no -0.0
        }
        for says, of in found.items()
    ]
    folds = " ".join(map(str, sorted(by.index)))
    commands = [
        f"benchmarks.real_films OUT --films FILMS --labelled nih --folds {folds}",
        f"benchmarks.demo OUT --seeds {' '.join(map(str, seeds))}",
    ]
    on = f"Real films: {len(by)} folds of patients. The others: {len(seeds)} synthetic hospitals."
    return {"commands": [f"./launch.sh python -m {words}" for words in commands], "on": on, "rows": rows}


def said(row: dict[str, Any]) -> str:
    """A difference with its interval, in the words of the README."""
    return f"{row['value']:+.3f} ({row['low']:.3f} to {row['high']:.3f})"


def text(x: float, y: float, words: str, colour: str, more: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" fill="{colour}" {more}>{escape(words)}</text>'


def draw(numbers: dict[str, Any], theme: str) -> str:
    """The forest plot as SVG: a mean with its interval for each difference, and a faint dot for each hospital."""
    page, ink, quiet, line, mark = COLOURS[theme]
    rows = numbers["rows"]
    low = min(0.0, *(min(row["low"], *row["each"]) for row in rows)) - 0.01
    high = max(max(row["high"], *row["each"]) for row in rows) + 0.01

    def at(value: float) -> float:
        return LEFT + (value - low) / (high - low) * (RIGHT - LEFT)

    parts, y = [], float(TOP)
    for row in rows:
        halo = f'paint-order="stroke" stroke="{page}" stroke-width="5"'
        parts.append(text(EDGE, y, row["says"], ink, f'font-weight="600" {halo}'))
        y += STEP + 8
        top = y - 4
        parts.append(f'<path d="M{at(row["low"]):.1f} {top}H{at(row["high"]):.1f}" stroke="{mark}" stroke-width="3"/>')
        parts.append(f'<circle cx="{at(row["value"]):.1f}" cy="{top}" r="5" fill="{mark}"/>')
        parts += [f'<circle cx="{at(value):.1f}" cy="{top - 9}" r="2.5" fill="{quiet}"/>' for value in row["each"]]
        parts.append(text(WORDS, y, said(row), quiet, 'font-size="14"'))
        y += ROW - STEP + 4
    bottom = y - 18
    axis = [f'<path d="M{at(0):.1f} {TOP - 18}V{bottom}" stroke="{quiet}" stroke-dasharray="4 3"/>']
    for tick in range(-1, int(high / 0.05) + 1):
        if low <= (value := tick * 0.05) <= high:
            label = "0" if tick == 0 else f"{value:+.2f}"
            axis.append(text(at(value), bottom + 16, label, quiet, 'text-anchor="middle" font-size="12"'))
            axis.append(f'<path d="M{at(value):.1f} {bottom}v4" stroke="{line}"/>')
    head = text(EDGE, 28, "Difference in AUROC, mean with its 95% interval", ink, 'font-size="16" font-weight="700"')
    foot = text(EDGE, bottom + 40, numbers["on"], quiet, 'font-size="12"')
    height = bottom + 54
    title = "; ".join(f"{row['says']}: {said(row)}" for row in rows)
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:.0f}" width="{WIDTH}" '
            f'height="{height:.0f}" font-family="system-ui, -apple-system, Segoe UI, Helvetica, Arial, sans-serif" '
            'font-size="15">',
            f"<title>{escape(title)}</title>",
            f'<rect width="{WIDTH}" height="{height:.0f}" rx="8" fill="{page}"/>',
            head,
            *axis,
            *parts,
            foot,
            "</svg>\n",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", metavar="OUT", type=Path, nargs="?", help="folder of benchmarks.demo")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 10, 11, 12, 13, 14])
    args = parser.parse_args()
    if args.out is not None:
        NUMBERS.write_text(json.dumps(measured(args.out, args.seeds), indent=1) + "\n", encoding="utf-8")
    numbers = json.loads(NUMBERS.read_text(encoding="utf-8"))
    for theme in COLOURS:
        path = ROOT / f"docs/results-{theme}.svg"
        path.write_text(draw(numbers, theme), encoding="utf-8")
        print(path.relative_to(ROOT))


if __name__ == "__main__":
    main()
