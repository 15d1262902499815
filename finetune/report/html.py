"""Markup that cannot be injected: every plain string is escaped, only what `tag` made passes as it is.

Comes in: names, numbers and text from data. Goes out: one HTML page without scripts that loads nothing.
"""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pandas as pd

VOID = {"meta", "br", "hr", "img", "col", "link"}
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


class Html(str):
    """Markup that is already safe."""


def tag(name: str, *children: Any, **attributes: Any) -> Html:
    """Make an element; `class_` is class, `_` in names becomes `-`, None children and attributes are left out."""
    given = {key.rstrip("_").replace("_", "-"): value for key, value in attributes.items() if value is not None}
    shown = "".join(f' {key}="{html.escape(_plain(value))}"' for key, value in given.items())
    if name in VOID:
        return Html(f"<{name}{shown}>")
    return Html(f"<{name}{shown}>{join(children)}</{name}>")


def join(children: Iterable[Any]) -> Html:
    """Put children beside each other; what is not Html is escaped."""
    return Html("".join(c if isinstance(c, Html) else html.escape(_plain(c), quote=False) for c in _flat(children)))


def _flat(children: Iterable[Any]) -> Iterable[Any]:
    for child in children:
        if child is None:
            continue
        if isinstance(child, (list, tuple)):
            yield from _flat(child)
        else:
            yield child


def _plain(value: Any) -> str:
    """Text of an attribute or a child; coordinates are cut to a tenth of a pixel."""
    if isinstance(value, (float, np.floating)):
        return f"{value:.1f}".removesuffix(".0")
    return str(value)


def number(value: Any, digits: int = 3) -> str:
    """A number for a reader: 12,345; 0.812; an en dash where there is none."""
    if value is None or (isinstance(value, (float, np.floating)) and not math.isfinite(value)) or value is pd.NA:
        return "–"
    if isinstance(value, (bool, np.bool_)):
        return "yes" if value else "no"
    if isinstance(value, (int, np.integer)):
        return f"{value:,}"
    if isinstance(value, (float, np.floating)):
        size = abs(float(value))
        if size and (size < 10**-digits or size >= 1e6):
            return f"{value:.2e}".replace("-", "−")
        return (f"{value:,.{digits}f}" if size < 1000 else f"{value:,.0f}").replace("-", "−")
    return str(value)


def interval(value: Any, low: Any, high: Any, digits: int = 3) -> str:
    """`0.812 (0.771–0.846)`, or the value alone where it has no interval."""
    if number(value) == "–" or number(low) == "–" or number(high) == "–":
        return fixed(value, digits)
    between = " to " if low < 0 else "–"
    return f"{fixed(value, digits)} ({fixed(low, digits)}{between}{fixed(high, digits)})"


def fixed(value: Any, digits: int = 3) -> str:
    """A score or a difference of scores, always with the same places."""
    return "–" if number(value) == "–" else f"{round(float(value), digits) + 0.0:,.{digits}f}".replace("-", "−")


def table(columns: Sequence[str], rows: Iterable[Sequence[Any]], *, class_: str = "") -> Html:
    """A table; columns whose cells are all numbers are set to the right."""
    listed = [[cell if isinstance(cell, str) else number(cell) for cell in row] for row in rows]
    right = [bool(listed) and all(_numeric(row[i]) for row in listed) for i in range(len(columns))]
    side = ["n" if r else None for r in right]
    head = tag("tr", [tag("th", c, scope="col", class_=s) for c, s in zip(columns, side, strict=True)])
    body = [tag("tr", [tag("td", cell, class_=s) for cell, s in zip(row, side, strict=True)]) for row in listed]
    return tag("div", tag("table", tag("thead", head), tag("tbody", body), class_=class_ or None), class_="scroll")


def _numeric(cell: str) -> bool:
    return not isinstance(cell, Html) and (cell[:1].isdigit() or cell[:1] in "−–") and len(cell) < 24


def frame(data: pd.DataFrame) -> Html:
    """A data frame as a table, its column names with spaces for underscores."""
    return table([str(c).replace("_", " ") for c in data.columns], data.itertuples(index=False, name=None))


def figure(
    key: str, title: str, drawing: Html, caption: str, numbers: Html | None = None, *, note: str | None = None
) -> Html:
    """A figure: what it shows, the drawing, what to see, and its numbers in a table that opens."""
    behind = tag("details", tag("summary", "Numbers behind this figure"), numbers) if numbers else None
    says = tag("figcaption", tag("p", caption), tag("p", note, class_="note") if note else None)
    return tag("figure", tag("h3", title), drawing, says, behind, id=f"figure-{key}")


def both_widths(draw: Callable[[int], Html]) -> Html:
    """The drawing twice, for a page and for a phone; the style shows one of them."""
    return join([tag("div", draw(786), class_="wide"), tag("div", draw(350), class_="narrow")])


def section(key: str, title: str, *children: Any, lead: str | None = None) -> Html:
    """A section with a heading and a sentence under it; nothing where it has no children."""
    body = [child for child in _flat(children) if child]
    if not body:
        return Html("")
    return tag("section", tag("h2", title), tag("p", lead, class_="lead") if lead else None, body, id=key)


def page(title: str, head: Html, sections: Sequence[tuple[str, str, Html]], foot: str) -> str:
    """The whole file.

    Args:
        sections: (key, short name for the list of contents, markup); empty markup is left out.
    """
    style = Html((Path(__file__).parent / "report.css").read_text(encoding="utf-8"))
    shown = [(key, name, body) for key, name, body in sections if body]
    links = tag("nav", tag("ol", [tag("li", tag("a", n, href=f"#{k}")) for k, n, _ in shown]), aria_label="Contents")
    meta = [
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=POLICY),
        tag("meta", name_="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name_="color-scheme", content="light dark"),
        tag("title", title),
        tag("style", style),
    ]
    main = tag("main", head, [body for _, _, body in shown], tag("footer", foot))
    text = tag("html", tag("head", meta), tag("body", links, main), lang="en")
    return f"<!doctype html>\n{text}\n"


# ---- Names of labels and metrics for a reader: phenotypes, bins of the length of stay, means over labels.

# Source: AHRQ's single-level CCS, shortened.
PHENOTYPES = MappingProxyType(
    {
        2: "Septicemia",
        49: "Diabetes without complication",
        50: "Diabetes with complications",
        53: "Disorders of lipid metabolism",
        55: "Fluid and electrolyte disorders",
        98: "Essential hypertension",
        99: "Hypertension with complications",
        100: "Acute myocardial infarction",
        101: "Coronary atherosclerosis",
        105: "Conduction disorders",
        106: "Cardiac dysrhythmias",
        108: "Congestive heart failure",
        109: "Acute cerebrovascular disease",
        122: "Pneumonia",
        127: "COPD and bronchiectasis",
        130: "Pleurisy, pneumothorax, collapse",
        131: "Respiratory failure",
        133: "Other lower respiratory disease",
        134: "Other upper respiratory disease",
        151: "Other liver diseases",
        153: "Gastrointestinal hemorrhage",
        157: "Acute renal failure",
        158: "Chronic kidney disease",
        238: "Complications of procedures",
        249: "Shock",
    }
)
STAYS = ("under 1 day", *(f"{day} to {day + 1} days" for day in range(1, 8)), "8 to 14 days", "14 days or more")
METRICS = MappingProxyType(
    {
        "f1": "F1",
        "auroc": "AUROC",
        "auprc": "AUPRC",
        "brier": "Brier score",
        "sensitivity_at_specificity_90": "sensitivity at 90% specificity",
        "kappa": "kappa (linear weights)",
        "mae_hours": "mean absolute error, hours",
        "r2": "R²",
    }
)


def told(label: str) -> str:
    """A label for a reader; one that is unknown keeps its words."""
    kind, _, number = label.rpartition("_")
    if label == "macro" or label.startswith("macro "):
        of = label.removeprefix("macro").strip()
        return f"Mean, {of}" if of else "Mean (macro)"
    if kind == "phenotype" and number.isdecimal() and int(number) in PHENOTYPES:
        return PHENOTYPES[int(number)]
    if kind == "los_bin" and number.isdecimal() and int(number) < len(STAYS):
        return STAYS[int(number)][:1].upper() + STAYS[int(number)][1:]
    text = label.replace("_", " ")
    return text[:1].upper() + text[1:]


def variable(name: str) -> str:
    """A variable of the series for a reader."""
    words = {"ph": "pH", "fio2": "FiO₂", "gcs": "GCS", "bp": "blood pressure"}
    text = " ".join(words.get(word, word) for word in name.replace("_", " ").split(" "))
    return text if text[:2] == "pH" else text[:1].upper() + text[1:]


def metric(name: str) -> str:
    """A metric for a reader."""
    return METRICS.get(name) or name.replace("_", " ")
