"""The report's differences: each pair of methods on the same test rows, with the interval of the difference.

Input: evaluated runs of one task; runs whose names differ by a seed alone (`x_seed1`, `x_seed2`) are one method.
Output: one figure. All pairs of up to FEW methods, else each against the best record-only model on validation, or
the first where there is none; p is Holm-adjusted over the pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd
from markupsafe import Markup
from scipy.special import expit

from ehr_features.progress import Bar
from finetune.compare import Drawn, holm, paired, pairs
from finetune.names import CONTROLS, RECORDS, unit, without_seed
from finetune.report.forest import Row, forest
from finetune.report.html import both_widths, figure, fixed, frame, interval, join, number, told
from finetune.report.results import key_of
from finetune.run_folders import Run, common_rows, is_macro, methods, trainings_of

FEW = 5
ADDED = "auroc_difference"  # rows of results.json by `fuse adds=true`
LESS = {**CONTROLS, **{model: f"{kind} on the record" for model, kind in RECORDS.items()}}
LABELS = ["pair", "label", "difference", "p (Holm over labels)", "n"]
FEWEST = 20  # test rows in common


def pairs_figure(task: str, runs: Sequence[Run], samples: int = 1000, drawn: Drawn | None = None) -> Markup | None:
    """Differences of the main AUROC between methods. `drawn`: resamples of runs, read and filled."""
    able = spoken(methods([run for run in runs if run.predicted and run.headline() is not None]))
    names = list(able)
    if len(names) < 2:
        return None
    base = reference(able)
    chosen = list(combinations(names, 2)) if len(names) <= FEW else [(base, name) for name in names if name != base]
    found, apart, each = [], [], []
    drawn = Drawn() if drawn is None else drawn
    common = common_rows([run for method in able.values() for run in method])
    within = common if common is not None and len(common) >= FEWEST else None
    with Bar(f"comparing, {task}", len(chosen), "pairs", after=5) as bar:
        for first, second in chosen:
            if (table := compare(able[second], able[first], samples, drawn, within=within)) is None:
                apart.append(f"{second} and {first}")
            else:
                found.append(_higher_first(second, first, table[table["main"]].iloc[0].to_dict()))
                each += _each(f"{second} − {first}", table)
            bar.advance()
    if not found:
        return None
    adjusted = holm(np.array([row["p"] for *_, row in found], dtype=float))
    rows, cells = [], []
    for (first, second, row), p in zip(found, adjusted, strict=True):
        value = float(row["difference"]), float(row["low"]), float(row["high"])
        rows.append(Row(first, [(0, *value)], f"minus {second}", says=_p(float(p))))
        means = [number(float(row[side])) for side in ("a", "b")]
        tests = [number(float(row["p"])), number(float(p))]
        cells.append([f"{first} − {second}", *means, interval(*value), *tests, row["n"], row["runs_a"], row["runs_b"]])
    drawing = both_widths(lambda w: forest(rows, {0: "difference"}, w, chance=0.0, x_label="difference in AUROC"))
    label = "macro AUROC" if len(next(iter(able.values()))[0].labels) > 1 else "AUROC"
    scored = f"{_rows(found, runs[0])} that {'both' if within is None else 'all'} scored"
    caption = (
        f"The higher {label} less the lower, on the {scored}. Intervals and p (two-sided, Holm-adjusted over these "
        "pairs) are Student's, over subjects and, where both have several, over training seeds. An interval that "
        "crosses the dashed line shows no difference."
    )
    columns = ["pair", "first", "second", "difference", "p", "p (Holm)", "n", "seeds of first", "of second"]
    return figure(
        key_of("pairs", task),
        "Differences between models",
        drawing,
        caption,
        join(
            [frame(pd.DataFrame(cells, columns=columns)), frame(pd.DataFrame(each, columns=LABELS)) if each else None]
        ),
        note=_note(found, apart),
    )


def spoken(found: dict[str, list[Run]]) -> dict[str, list[Run]]:
    """Methods under the names of their models, without a seed where there are several; their own if names are equal."""
    names = [without_seed(own[0].called) if len(own) > 1 else own[0].called for own in found.values()]
    names = [name if names.count(name) == 1 else key for name, key in zip(names, found, strict=True)]
    return dict(zip(names, found.values(), strict=True))


def adds_figure(task: str, runs: Sequence[Run]) -> Markup | None:
    """What the film adds over the record, over knowing that a film was taken, and over another patient's film."""
    drawn, cells = [], []
    for run in runs:
        added = run.rows[(run.rows["metric"] == ADDED) & run.rows["value"].notna()]
        for row in added[added["label"] == run.main].to_dict("records"):
            less = str(row["subset"]).removeprefix("paired, less ")
            low, high = (None if pd.isna(row[end]) else float(row[end]) for end in ("low", "high"))
            value = float(row["value"]), low, high
            drawn.append(Row(run.called, [(0, *value)], f"less {LESS.get(less, less)}"))
            cells.append([run.called, LESS.get(less, less), interval(*value), row["n"], row["positives"]])
    if not drawn:
        return None
    drawing = both_widths(lambda w: forest(drawn, {0: "difference"}, w, chance=0.0, x_label="difference in AUROC"))
    caption = (
        "The fused model minus controls, on test stays with a film: minus the best record-only model; "
        "minus a model that knows whether there is a film, its view and its age; minus one with another patient's "
        "film. Right of the dashed line in all three, the pixels themselves add to the prediction."
    )
    numbers = frame(pd.DataFrame(cells, columns=["model", "less", "difference", "n", "positives"]))
    return figure(key_of("adds", task), "What the film adds", drawing, caption, numbers)


def reference(able: dict[str, list[Run]]) -> str:
    """What many methods are compared with: the best record-only model on validation, else the first."""
    records = {}
    for name, runs in able.items():
        head = runs[0].row(runs[0].main, split="val")
        if str(runs[0].result.get("model")).startswith("record") and head:
            records[name] = float(head["value"])
    return max(records, key=lambda name: records[name]) if records else next(iter(able))


def compare(
    a: Sequence[Run],
    b: Sequence[Run],
    samples: int = 1000,
    drawn: Drawn | None = None,
    *,
    within: pd.Index | None = None,
) -> pd.DataFrame | None:
    """Paired differences of each label on the test rows that all these runs have; None: too few rows.

    Args:
        within: rows that further runs have in common, which limit the comparison.
    """
    a, b = ([own for run in side for own in trainings_of(run)] for side in (a, b))
    read = [run.by_row for run in (*a, *b) if run.by_row is not None]
    common = common_rows([*a, *b])
    if common is None:
        return None
    common = common if within is None else common.intersection(within)
    names = [str(c).removeprefix("label_") for c in read[0] if str(c).startswith("label_")]
    wanted = [f"{kind}_{name}" for kind in ("label", "logit") for name in names]
    if len(common) < FEWEST or any(name not in one for one in read for name in wanted):
        return None
    read = [one.loc[common] for one in read]
    labels, *others = (one[wanted[: len(names)]].to_numpy(float) for one in read)
    same = all(np.array_equal(y, labels, equal_nan=True) for y in others)
    logits = [one[wanted[len(names) :]].to_numpy(float) for one in read]
    whole = all((np.isfinite(of).all(0) | np.isnan(of).all(0)).all() for of in logits)  # NaN: a label not learned
    if not same or not whole:
        return None
    seeds = [[int(run.result["seed"]) for run in side] for side in (a, b)]
    scores = [expit(of) for of in logits]
    sides = [
        np.stack(side)[np.argsort(s, kind="stable")]
        for side, s in zip((scores[: len(a)], scores[len(a) :]), seeds, strict=True)
    ]
    together = pairs(*seeds)
    groups = read[0]["subject_id"].to_numpy()
    table = paired(labels, *sides, groups=groups, names=names, samples=samples, same_seeds=together, drawn=drawn)
    main = table["label"] == a[0].main
    return table.assign(main=main) if main.any() and np.isfinite(table.loc[main, "difference"]).all() else None


def _higher_first(first: str, second: str, row: dict[Any, Any]) -> tuple[str, str, dict[Any, Any]]:
    """A pair and its row, turned round where the second model is the better."""
    if row["difference"] >= 0:
        return first, second, row
    turned = {"difference": -row["difference"], "low": -row["high"], "high": -row["low"]}
    swapped = {f"{name}{one}": row[f"{name}{other}"] for name in ("", "runs_") for one, other in ("ab", "ba")}
    return second, first, row | turned | swapped


def _each(pair: str, table: pd.DataFrame) -> list[list[Any]]:
    """Rows of the table behind the figure: each label's difference, p adjusted over the labels."""
    labels = table[~table["label"].map(is_macro) & table["difference"].notna()].to_dict("records")
    cells = [
        [pair, told(r["label"]), interval(r["difference"], r["low"], r["high"]), r["p_holm"], r["n"]] for r in labels
    ]
    return cells if len(cells) > 1 else []


def _rows(found: Sequence[tuple[str, str, dict[Any, Any]]], run: Run) -> str:
    """`1,022 test studies`, or the range where pairs have different rows in common."""
    counts = sorted({int(row["n"]) for *_, row in found})
    return f"{' to '.join(f'{n:,}' for n in (counts[0], counts[-1])[: len(counts)])} test {unit(run)}"


def _p(p: float) -> str:
    return "" if np.isnan(p) else f"p = {fixed(p)}" if p >= 0.001 else "p < 0.001"


def _note(found: Sequence[tuple[str, str, dict[Any, Any]]], apart: Sequence[str]) -> str:
    says = []
    if any(row["claim"] != "method" for *_, row in found):
        says.append(
            "With fewer than three training seeds each, a difference holds for these runs, not for the methods."
        )
    if apart:
        says.append(f"Fewer than {FEWEST} test rows in common, or other labels, so not compared: {', '.join(apart)}.")
    return " ".join(says)
