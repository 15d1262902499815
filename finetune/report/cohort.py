"""The report's data section: cohort flow, splits, and how much of the series was measured.

Input: the folders of features and of notes that the runs' configs name. Output: one section.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
from markupsafe import Markup
from safetensors import safe_open

from ehr_features.files import read_table
from ehr_features.schema import DEATHS, SPLITS
from ehr_features.typed import read_json, undamaged
from ehr_features.typed.shapes import AttritionJson
from finetune.report.figures import bars, flow
from finetune.report.html import figure, frame, number, render, section, table, variable
from finetune.run_folders import Run


def folders(runs: Sequence[Run]) -> list[Path]:
    """The features folders of the runs, each once."""
    found = {run.features.resolve(): run.features for run in runs if run.features}
    return list(found.values())


def cohort_section(runs: Sequence[Run]) -> Markup:
    """Cohort flow, splits and missingness, for each features folder."""
    found = folders(runs)
    if not found:
        named = sorted({str(run.config["features"]) for run in runs if run.config.get("features")})
        where = f"The features folder {', '.join(named)} is not here" if named else "No run names a features folder"
        return section("data", "Data", render("paragraph", "muted", f"{where}: no cohort, splits or missingness."))
    parts: list[Any] = []
    for i, folder in enumerate(found):
        key = "" if i == 0 else f"-{i + 1}"
        parts.append(render("paragraph", "muted", "Features: ", folder.name) if len(found) > 1 else None)
        parts += [splits_figure(folder, key), flow_figure(folder, key), missing_figure(folder, key)]
    told = list({run.notes.resolve(): run.notes for run in runs if run.notes}.values())
    for i, folder in enumerate(told):
        title = "Films without a note, and why" + (f" ({folder.name})" if len(told) > 1 else "")
        parts.append(flow_figure(folder, "-notes" + ("" if i == 0 else f"-{i + 1}"), title))
    return section("data", "Data", parts, lead="Who is in it, who fell out and why, and how much was measured.")


def attrition(folder: Path) -> list[tuple[str, int, int, str]]:
    """(what is counted, before, after, why) of each exclusion in attrition.json."""
    path = folder / "attrition.json"
    if not path.is_file():
        return []
    return [(r["table"] or r["why"], r["before"], r["after"], r["why"]) for r in _attrition(path)["exclusions"]]


def _attrition(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = read_json(path, AttritionJson)
    return content


def notes(folder: Path) -> str | None:
    """Counts of attrition.json that excluded no row."""
    content = _attrition(folder / "attrition.json")
    told = [f"{number(n)} {what}" for what, n in content.get("counts", {}).get(DEATHS, {}).items() if n]
    told += [f"{number(n)} {what}" for n, what in _ambiguous(content) if n]
    return f"Also counted, and kept: {'; '.join(told)}." if told else None


def _ambiguous(content: dict[str, Any]) -> list[tuple[int, str]]:
    """How many films could have been linked to several admissions, stays or visits."""
    said = [r for r in content["exclusions"] if r["why"].startswith("ambiguous") and r.get("num_ids") is not None]
    return [(r["num_ids"], f"{r['table']} ({r['why']})") for r in said]


def flow_figure(folder: Path, key: str, title: str = "Who fell out, and why") -> Markup | None:
    """The cohort flow: a bar for each exclusion."""
    steps = attrition(folder)
    if not steps:
        return None
    numbers = frame(pd.DataFrame(steps, columns=["what", "before", "after", "why"]))
    caption = (
        "What is left after each rule (blue), and what the rule took out (orange). Counts of rows, never of values."
    )
    return figure(f"flow{key}", title, flow(steps), caption, numbers, note=notes(folder))


def splits_figure(folder: Path, key: str) -> Markup | None:
    """Subjects, films and stays by split, and the outcomes' prevalence in each."""
    rows, placed = [], []
    for name, id_ in (("images", "dicom_id"), ("stays", "stay_id")):
        if (folder / f"{name}.parquet").is_file():
            data = read_table(folder, name, [id_, "subject_id", "split"])
            placed.append(data[["subject_id", "split"]])
            counts = {s: data[data["split"] == s] for s in SPLITS}
            shown = {"images": "films", "stays": "ICU stays"}[name]
            rows.append(
                [
                    f"subjects with {shown}",
                    *[d["subject_id"].nunique() for d in counts.values()],
                    data["subject_id"].nunique(),
                ]
            )
            rows.append([shown, *[len(d) for d in counts.values()], len(data)])
    rows += _samples(folder)
    if not rows:
        return None
    splits = pd.concat(placed).drop_duplicates()["subject_id"].value_counts() if placed else pd.Series(dtype=int)
    caption = f"Split by subject: of {len(splits):,} subjects, {(splits > 1).sum():,} are in more than one column."
    return figure(f"splits{key}", "Splits", table(["", *SPLITS, "all"], rows), caption)


def _samples(folder: Path) -> list[list[Any]]:
    rows = []
    for path in sorted((folder / "samples").glob("*.parquet")):
        with undamaged(path, "build the features again"):
            have = [name for name in ("dicom_id", path.stem) if name in pq.read_schema(path).names]
        data = read_table(folder, f"samples/{path.stem}", ["split", *have])
        task = path.stem.replace("_", " ")
        counts = [data[data["split"] == s] for s in SPLITS]
        rows.append([f"samples: {task}", *[len(d) for d in counts], len(data)])
        if "dicom_id" in data:
            rows.append(["… with a film", *[int(d["dicom_id"].notna().sum()) for d in (*counts, data)]])
        if path.stem in data:
            rows.append([f"… positive ({task})", *[int((d[path.stem] == 1).sum()) for d in (*counts, data)]])
    return rows


def missing_figure(folder: Path, key: str) -> Markup | None:
    """The share of hours in which each variable was measured."""
    path = folder / "series.safetensors"
    if not path.is_file():
        return None
    from ehr_features.series import Mapped  # here, because it imports Ibis

    opened = Mapped(folder)
    with undamaged(path, "build the features again"), safe_open(path, "numpy") as file:
        observed = file.get_tensor("observed")  # (ΣT, 17)
    if not len(observed):
        return None
    names = [variable(column.removeprefix("mask->")) for column in opened.columns[len(opened.mean) :]]
    share = np.asarray(observed != 0).mean(axis=0)
    order = np.argsort(-share)
    rows = [(names[i], float(share[i]), f"{100 * share[i]:.1f}%") for i in order]
    caption = f"Share of the {len(observed):,} hours in which each variable was measured; the others are imputed."
    numbers = table(
        ["variable", "hours measured", "share"],
        [[names[i], int((observed[:, i] != 0).sum()), number(float(share[i]))] for i in order],
    )
    return figure(f"missing{key}", "How much of the series was measured", bars(rows), caption, numbers)
