"""A checklist in the style of TRIPOD+AI, filled from the runs; the other items stay blank for the authors.

Source: Collins et al., BMJ 2024;385:e078378 (the items' numbers; the wording here is ours).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from markupsafe import Markup

from ehr_features.typed.shapes import Provenance, Series
from finetune.report.cohort import attrition, folders
from finetune.report.html import number, render, section, table
from finetune.report.results import by_task, labels, title
from finetune.run_folders import Run, part, read_object

BLANK = "to be filled in by the authors"


def checklist_section(runs: Sequence[Run]) -> Markup:
    """The table; left out where nothing was evaluated."""
    if not by_task(runs):
        return Markup("")
    found = facts(runs)
    rows = [[item, what, found.get(item) or render("span", "blank", BLANK)] for item, what in ITEMS.items()]
    filled = sum(item in found for item in ITEMS)
    lead = f"In the style of TRIPOD+AI: {filled} of {len(ITEMS)} items are filled from the runs, the others are blank."
    body = table(["item", "asked", "these runs"], rows, class_="checklist")
    return section("checklist", "Checklist", render("div", "card", body), lead=lead)


ITEMS = {
    "1": "Title: development or evaluation of a prediction model, population, outcome",
    "3": "Background: health context, known inequalities",
    "4": "Objectives",
    "5": "Data: sources and dates",
    "6": "Participants: setting and eligibility",
    "7": "Data preparation",
    "8": "Outcome: what is predicted, from when",
    "9": "Predictors",
    "10": "Sample size",
    "11": "Missing data",
    "12": "Analysis: models, selection, internal validation",
    "13": "Class imbalance",
    "14": "Fairness: approaches and their rationale",
    "15": "Output: probability or class, thresholds",
    "16": "Training and evaluation data: how they differ",
    "17": "Ethical approval",
    "18": "Open science: funding, conflicts, protocol, registration, data, code",
    "19": "Patient and public involvement",
    "20": "Flow of participants",
    "21": "Participants and outcomes in each split",
    "22": "The full model, to be used by others",
    "23": "Performance with intervals, in subgroups too",
    "24": "Updating of the model",
    "25": "Interpretation, fairness included",
    "26": "Limitations",
    "27": "Usability in care, and what comes next",
}


def facts(runs: Sequence[Run]) -> dict[str, str]:
    """Item -> text from the runs' files; items that they do not answer are absent."""
    found = _data_facts(folders(runs))
    tasks = by_task(runs)
    done = [run for chosen in tasks.values() for run in chosen]
    found["8"] = "; ".join(
        f"{title(task)} ({n} label{'s' if n > 1 else ''})"
        for task, chosen in tasks.items()
        if (n := len(labels(chosen)))
    )
    sizes = []
    for task, chosen in tasks.items():
        head = next((h for run in chosen if (h := run.headline())), None)
        if head:
            sizes.append(f"{task}: {number(head['n'])} test rows, {number(head['positives'])} positive labels")
    found["10"] = f"{'; '.join(sizes)}. No calculation of the size that is needed." if sizes else ""
    models = ", ".join(dict.fromkeys(str(run.result.get("model")) for run in done))
    seeds = ", ".join(dict.fromkeys(str(run.result.get("seed")) for run in done))
    found["12"] = f"Models: {models}. Chosen on validation; the test split is read once. Seeds: {seeds}."
    found["15"] = "Probabilities (the sigmoid of logits); thresholds for F1 from the validation split."
    found["16"] = f"One split by subject.{_guarded(done)}"
    found["23"] = "In this report: AUROC, AUPRC, calibration, curves; intervals resample subjects."
    weights = [run.called for run in runs if run.encoder or (run.folder / "model.safetensors").is_file()]
    found["22"] = f"Weights and configs are in the run folders of {', '.join(weights)}." if weights else ""
    if any("=" in str(s) for run in done for s in run.rows["subset"]):
        found["14"] = "Performance is reported in subgroups; nothing was done to make it equal."
    return {item: text for item, text in found.items() if text}


def _guarded(runs: Sequence[Run]) -> str:
    """How many validation and test subjects each encoder saw in pretraining, where both lists are known."""
    out = ""
    for run in runs:
        if counts := run.result.get("guard"):
            out += (
                f" {run.called}: {counts['both']:,} of {counts['held_out']:,} validation and test subjects are among "
                f"the {counts['seen']:,} that its encoder saw."
            )
        if run.result.get("allow_leak"):
            out += f" {run.called}: the guard was switched off (allow_leak)."
    return out


def _data_facts(found: Sequence[Path]) -> dict[str, str]:
    """From the features folders."""
    if not found:
        return {}
    folder = found[0]
    config = part(read_object(folder / "provenance.json", Provenance), "config")
    series = read_object(folder / "series.json", Series)
    names = {"mimic_iv": "MIMIC-IV", "mimic_ed": "MIMIC-IV-ED", "mimic_cxr": "MIMIC-CXR"}
    sources = ", ".join(name for key, name in names.items() if config.get(key))
    steps = attrition(folder)
    took = [f"{before - after:,} of {before:,} {what}: {why}" for what, before, after, why in steps if after < before]
    rules = "; ".join(took[:8]) or "no rule left a row out"
    imputed = series.get("imputation")
    return {
        "5": f"{sources}; versions in provenance.json." if sources else "",
        "6": f"Preset {config.get('preset', 'default')}. Left out: {rules}." if steps else "",
        "7": f"Series in steps of {config.get('step_hours', 1)} h, normalised with train statistics." if series else "",
        "9": f"{len(series.get('columns', []))} series columns, and the film." if series.get("columns") else "",
        "11": f"Imputation of the series: {imputed if isinstance(imputed, str) else 'see series.json'}."
        if imputed
        else "",
        "20": "See Data, above." if steps else "",
        "21": "See Data, above.",
    }
