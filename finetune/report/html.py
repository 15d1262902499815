"""The page's parts as templates (parts.html.j2), and numbers and names as a reader reads them.

Input: names, numbers and text from data. Output: one HTML page without scripts that loads nothing. The templates
escape every string that is not `Markup`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


@functools.cache
def _parts() -> Any:
    folder = FileSystemLoader(Path(__file__).parent)
    environment = Environment(
        loader=folder, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("parts.html.j2").module


def render(part: str, *values: Any) -> Markup:
    """A macro of parts.html.j2 with its values."""
    return Markup(getattr(_parts(), part)(*values).strip())


def join(children: Iterable[Any]) -> Markup:
    """Put children beside each other, lists of them too; None is left out, and what is not Markup is escaped."""
    return Markup("").join(_flat(children))


def _flat(children: Iterable[Any]) -> Iterable[Any]:
    for child in children:
        if isinstance(child, (list, tuple)):
            yield from _flat(child)
        elif child is not None:
            yield child


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
    """A score or a difference of scores with a fixed number of decimals."""
    return "–" if number(value) == "–" else f"{round(float(value), digits) + 0.0:,.{digits}f}".replace("-", "−")


def table(columns: Sequence[str], rows: Iterable[Sequence[Any]], *, class_: str = "") -> Markup:
    """A table; columns of numbers are right-aligned."""
    listed = [[cell if isinstance(cell, str) else number(cell) for cell in row] for row in rows]
    right = [bool(listed) and all(_numeric(row[i]) for row in listed) for i in range(len(columns))]
    return render("table", columns, listed, right, class_)


def _numeric(cell: str) -> bool:
    return not isinstance(cell, Markup) and (cell[:1].isdigit() or cell[:1] in "−–") and len(cell) < 24


def frame(data: pd.DataFrame) -> Markup:
    """A data frame as a table, its column names with spaces for underscores."""
    return table([str(c).replace("_", " ") for c in data.columns], data.itertuples(index=False, name=None))


def figure(
    key: str, title: str, drawing: Markup, caption: str, numbers: Markup | None = None, *, note: str | None = None
) -> Markup:
    """A figure: title, drawing, caption, and its numbers in a table that unfolds."""
    return render("figure", key, title, drawing, caption, numbers, note)


def both_widths(draw: Callable[[int], Markup]) -> Markup:
    """The drawing twice, for a page and for a phone; the style shows one of them."""
    return render("widths", draw(786), draw(350))


def section(key: str, title: str, *children: Any, lead: str | None = None) -> Markup:
    """A section with a heading and a sentence under it; nothing where it has no children."""
    body = join(children)
    return render("section", key, title, lead, body) if body else body


def page(title: str, head: Markup, sections: Sequence[tuple[str, str, Markup]], foot: str) -> str:
    """The whole file.

    Args:
        sections: (key, short name for the list of contents, markup); empty markup is left out.
    """
    style = Markup((Path(__file__).parent / "report.css").read_text(encoding="utf-8"))
    return f"{render('page', title, style, POLICY, head, [part for part in sections if part[2]], foot)}\n"


# ---- Names of labels and metrics: phenotypes, bins of the length of stay, means over labels

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
    """A label for a reader; an unknown one keeps its words."""
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
