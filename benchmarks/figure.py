"""Draw the README's figure: `./launch.sh python -m benchmarks.figure [OUT --seeds S ...]`.

Differences in AUROC with their intervals, from docs/results.json, drawn for light and for dark pages
(docs/results-light.svg, docs/results-dark.svg). With OUT, the folder of `benchmarks.demo`, the numbers are read anew
from its finished hospitals: each hospital's paired difference, with its 95% interval over subjects.
"""

from __future__ import annotations

import argparse
import json
from html import escape
from pathlib import Path
from typing import Any

from benchmarks.demo import GAPS
from benchmarks.pages import ROOT
from finetune.report.verdict import difference
from finetune.run_folders import read_run

NUMBERS = ROOT / "docs/results.json"
SAYS = {  # rows of the figure: the difference of benchmarks.demo
    "Findings: pretrained minus raw pixels": "pretrained minus raw pixels",
    "The same, 10% of subjects labelled": "the same, 10% of subjects labelled",
    "Findings: pretrained minus random weights": "pretrained minus random weights",
    "Findings: the record added to pretraining": "with minus without the record",
    "Death: the film added to the record": "death: fused minus record only",
}
COLOURS = {  # page, text, quiet text, lines, marks
    "light": ("#ffffff", "#1f2328", "#59636e", "#d1d9e0", "#00796b"),
    "dark": ("#0d1117", "#f0f6fc", "#9198a1", "#3d444d", "#4db6ac"),
}
WIDTH, EDGE, LEFT, RIGHT, WORDS, TOP, ROW, STEP = 456, 14, 74, 256, 268, 64, 42, 16


def measured(out: Path, seeds: list[int]) -> dict[str, Any]:
    """The numbers of the figure, from finished demos."""
    rows = []
    for says, gap in SAYS.items():
        a, b, also, share = GAPS[gap]
        points = []
        for seed in seeds:
            one, other, *rest = (read_run(out / f"seed_{seed}/runs" / name, name) for name in (a, b, *also))
            found = difference([one], [other], rest, share=share)
            assert found is not None, f"seed {seed}: {a} and {b} share no rows"
            points.append(dict(zip(("value", "low", "high"), (round(x, 3) for x in found[:3]), strict=True)))
            points[-1]["hospital"] = seed
        rows.append({"says": says, "points": points})
    seen = " ".join(map(str, seeds))
    return {"command": f"./launch.sh python -m benchmarks.demo OUT --seeds {seen}", "rows": rows}


def said(point: dict[str, float]) -> str:
    """A difference with its interval, in the words of the README."""
    return f"{point['value']:+.3f} ({point['low']:.3f} to {point['high']:.3f})"


def text(x: float, y: float, words: str, colour: str, more: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" fill="{colour}" {more}>{escape(words)}</text>'


def draw(numbers: dict[str, Any], theme: str) -> str:
    """The forest plot as SVG: a block for each difference, a line for each hospital."""
    page, ink, quiet, line, mark = COLOURS[theme]
    points = [point for row in numbers["rows"] for point in row["points"]]
    low = min(0.0, *(point["low"] for point in points)) - 0.01
    high = max(point["high"] for point in points) + 0.01

    def at(value: float) -> float:
        return LEFT + (value - low) / (high - low) * (RIGHT - LEFT)

    parts, y = [], float(TOP)
    for row in numbers["rows"]:
        halo = f'paint-order="stroke" stroke="{page}" stroke-width="5"'
        parts.append(text(EDGE, y, row["says"], ink, f'font-weight="600" {halo}'))
        for point in row["points"]:
            y += STEP + 3
            x, top = at(point["value"]), y - 4
            parts.append(
                f'<path d="M{at(point["low"]):.1f} {top}H{at(point["high"]):.1f}" stroke="{mark}" stroke-width="3"/>'
            )
            parts.append(f'<circle cx="{x:.1f}" cy="{top}" r="5" fill="{mark}"/>')
            parts.append(text(EDGE, y, f"seed {point['hospital']}", quiet, 'font-size="13"'))
            parts.append(text(WORDS, y, said(point), quiet, 'font-size="14"'))
        y += ROW - STEP + 4
    bottom = y - 18
    axis = [f'<path d="M{at(0):.1f} {TOP - 18}V{bottom}" stroke="{quiet}" stroke-dasharray="4 3"/>']
    for tick in range(-1, int(high / 0.05) + 1):
        if low <= (value := tick * 0.05) <= high:
            label = "0" if tick == 0 else f"{value:+.2f}"
            axis.append(text(at(value), bottom + 16, label, quiet, 'text-anchor="middle" font-size="12"'))
            axis.append(f'<path d="M{at(value):.1f} {bottom}v4" stroke="{line}"/>')
    head = text(EDGE, 28, "AUROC, difference with its 95% interval", ink, 'font-size="16" font-weight="700"')
    height = bottom + 28
    title = "; ".join(f"{row['says']}: {said(row['points'][0])}" for row in numbers["rows"])
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
            "</svg>\n",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", metavar="OUT", type=Path, nargs="?", help="folder of benchmarks.demo")
    parser.add_argument("--seeds", type=int, nargs="+", default=[10, 11, 12, 13, 14])
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
