"""MODEL_CARD.md: what the weights are, the data they saw, the limits of their use; README.md adds what a hub reads.

Input: encoder.json, the run's config, a probe's results.json. Output: Markdown, and the YAML above it.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from configs import UserError
from ehr_features.demo.beside import truth_of
from ehr_features.typed import read_json, read_yaml
from ehr_features.typed.shapes import RunConfig
from pretrain.config import PretrainConfig
from pretrain.encoder.model import encoder_folder
from pretrain.options import TITLES
from pretrain.shapes import ProbeResults

LICENCE = """\
Trained on credentialed data (PhysioNet) where it was MIMIC: the data must not leave your institution, and weights may
carry traces of patients. Share them only after checking the data use agreement. For research; not a medical device."""


PHYSIONET: dict[str, Any] = {
    "license": "other",
    "license_name": "physionet-credentialed-health-data-1.5.0",
    "license_link": "https://physionet.org/content/mimic-cxr-jpg/view-license/2.1.0/",
}
LAYOUTS = {  # our layouts of public data sets, as they are usually called
    "nih": "nih-chest-x-rays", "chexpert": "chexpert", "padchest": "padchest", "vindr": "vindr-cxr",
    "rsna": "rsna-pneumonia", "brax": "brax",
}  # fmt: skip
HUB_METRICS = {"auroc": "roc_auc", "auprc": "average_precision", "brier": "brier_score", "f1": "f1"}

LONG = {"msn": "masked Siamese networks", "pmsn": "masked Siamese networks with a power-law prior"}
LONG["mae"] = "a masked autoencoder"
READABLE = "## How linearly readable the record is from the frozen features"
NO_RESULTS = "None yet: `ehr-msn probe` measures it, `ehr-msn export RUN OUT --probe PROBE` writes it here."


def model_card(meta: dict[str, Any], config: PretrainConfig) -> str:
    """The card's Markdown, from encoder.json and the config; `probe_table` later replaces `NO_RESULTS`."""
    lines = [
        f"# {meta['arch']}, pretrained on chest films with {_method(config.method)}",
        "",
        f"- Network: timm `{meta['arch']}` {meta['model_args']}; {meta['in_chans']} channel(s), {meta['image_size']}"
        f" px, {meta['width']} features (pool `{meta['pool']}`).",
        f"- Input: {_input(meta['preprocess'])}.",
        f"- Weights: the {meta['branch']} branch after {meta['step']} steps.",
        f"- Films: {meta['num_films']} of {meta['num_subjects']} subjects, split {', '.join(meta['splits_seen'])}."
        " No finding label was read.",
        *_start(meta),
        f"- Record: {_record(meta, config)}. Inference needs no record.",
        f"- Config {meta['config_hash']} (preset {config.preset}, seed {config.seed}), features"
        f" {meta['features_hash']}, store {meta['store_hash']}.",
    ]
    if late := [name for name, when in meta["ehr_groups"].items() if when == "discharge"]:
        lines.append(
            f"- **Outcome-supervised**: {', '.join(late)} is known only at discharge. Not comparable with"
            " self-supervised encoders; never evaluate on subjects that it saw."
        )
    if readable := meta.get("readability"):
        lines += ["", READABLE, ""]
        lines += ["| column | metric | value | chance |", "|---|---|---|---|"]
        lines += [f"| {n} | {r['metric']} | {r['value']:.3f} | {r['chance']:g} |" for n, r in readable.items()]
    lines += ["", "## Results", "", NO_RESULTS, ""]
    return "\n".join([*lines, "## Licence and use", "", LICENCE, ""])


def _method(name: str) -> str:
    title = TITLES.get(name, name)
    return f"{LONG[name]} ({title})" if name in LONG else title


def _input(preprocess: dict[str, Any]) -> str:
    parts = {f"store {k}": v for k, v in (preprocess.get("store") or {}).items()} | preprocess
    return ", ".join(f"{k} {v}" for k, v in parts.items() if v is not None and k != "store")


def datasets(features: str | None, layout: str | None) -> list[str]:
    """The public data sets of a run, by their usual names; synthetic ones and a table of one's own films have none."""
    if features is not None and truth_of(features):
        return []
    if features is not None:
        return ["mimic-cxr", "mimic-iv"]
    return [LAYOUTS[layout]] if layout in LAYOUTS else []


def trained_on(meta: dict[str, Any], source: Path) -> list[str] | None:
    """The data sets in encoder.json, or by the run's config.yaml (before 0.3.0); None: unknown."""
    if "datasets" in meta:
        return list(meta["datasets"])
    path = (source if (source / "config.yaml").is_file() else source.parent) / "config.yaml"
    if not path.is_file():
        return None
    config = read_yaml(path, RunConfig)
    return datasets(config.get("features"), (config.get("films") or {}).get("layout"))


def own_results(source: Path) -> Path | None:
    """The newest run beside SOURCE that probes the films of this encoder with frozen features, if there is one."""
    folder = encoder_folder(source).resolve()
    found = []
    for path in folder.parent.parent.glob("*/results.json"):
        run = read_json(path, ProbeResults).get("run", {})
        of = run.get("encoder")
        frozen = run.get("task") == "findings" and run.get("model") in ("linear", "logistic", "knn")
        if frozen and not run.get("allow_leak") and of and encoder_folder(of).resolve() == folder:
            found.append((path.stat().st_mtime, path.parent))
    return max(found)[1] if found else None


def read_results(probe: Path, source: Path) -> dict[str, Any]:
    """A probe's results.json. Raises: UserError: none, or of another encoder."""
    path = probe / "results.json"
    if not path.is_file():
        raise UserError(f"--probe {probe}: no results.json in it; give the run folder of a finished probe")
    results: dict[str, Any] = read_json(path, ProbeResults)
    of = results.get("run", {}).get("encoder")
    if of and Path(of).exists() and encoder_folder(of).resolve() != encoder_folder(source).resolve():
        raise UserError(f"--probe {probe}: it measured {of}, not {source}; give a probe of this encoder")
    return results


def header(
    meta: dict[str, Any], name: str, library: str, trained: Sequence[str] | None, results: dict[str, Any] | None
) -> str:
    """The YAML that a hub reads, between its lines of dashes: licence, tags, data sets, and a probe's test metrics."""
    mimic = trained is None or any(data.startswith("mimic") for data in trained)
    licence: dict[str, Any] = PHYSIONET if mimic else {"license": "other", "license_name": "that-of-the-training-films"}
    tags = ["chest-x-ray", "radiology", "medical", "self-supervised-learning", str(meta.get("method", "ehr-msn"))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        data = ModelCardData(
            **licence,
            library_name=library,
            pipeline_tag="image-feature-extraction",
            tags=[*tags, "ehr"] if meta.get("ehr_groups") else tags,
            datasets=list(trained) if trained else None,
            metrics=sorted({HUB_METRICS[r["metric"]] for r in _macro(results) if r["metric"] in HUB_METRICS}) or None,
            model_name=name,
            eval_results=_evaluated(results, list(trained or ())) or None,
        )
    return f"---\n{data.to_yaml(line_break=chr(10))}\n---\n"


def _macro(results: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The rows with the mean over labels on all films of the test split."""
    rows = [] if results is None else results["rows"]
    kept = [r for r in rows if r.get("label") == "macro" and r.get("split") == "test"]
    kept = [r for r in kept if r.get("subset") in (None, "all") and r.get("value") is not None]
    return [r for r in kept if r.get("fraction") in (None, 1, 1.0)]


def _evaluated(results: dict[str, Any] | None, trained: list[str]) -> list[EvalResult]:
    if results is None:
        return []
    run = results["run"]
    return [
        EvalResult(
            task_type="image-classification",
            task_name=f"{run.get('task')}, {run.get('model')} on frozen features",
            dataset_type=trained[0] if trained else "own-films",
            dataset_name=trained[0] if trained else "own films",
            dataset_split="test",
            metric_type=HUB_METRICS[row["metric"]],
            metric_name=f"{row['metric']} (mean over labels)",
            metric_value=round(float(row["value"]), 4),
        )
        for row in _macro(results)
        if row["metric"] in HUB_METRICS
    ]


def probe_table(results: dict[str, Any]) -> str:
    """Markdown of a probe's results.json: the mean over labels of each metric on the test split."""
    run, kept = results["run"], _macro(results)
    lines = [f"{run.get('task')}, {run.get('model')} on frozen features, test split:", ""]
    lines += ["| metric | value | 95% interval | films |", "|---|---|---|---|"]
    for r in kept:
        low, high = (f"{r[k]:.3f}" if r.get(k) is not None else "?" for k in ("low", "high"))
        lines.append(f"| {r['metric']} | {r['value']:.3f} | {low} to {high} | {r.get('n', '')} |")
    return "\n".join(lines)


def _start(meta: dict[str, Any]) -> list[str]:
    before = meta.get("started_from")
    return [f"- Started from: {before['weights']}, whose films are {before['films']}."] if before else []


def _record(meta: dict[str, Any], config: PretrainConfig) -> str:
    if not meta["ehr_groups"]:
        return "none"
    told = "; ".join(f"`{name}` (known at {when})" for name, when in meta["ehr_groups"].items())
    if not config.ehr.groups:
        return f"none in this run; {told} in the run from which it started"
    how = {
        "condition": f"told to the anchor ({config.ehr.inject})",
        "predict": "predicted from the film",
        "contrast": "contrasted with the film",
    }[config.ehr.use]
    return f"{told}; {how}{', permuted between films (control)' if config.ehr.permuted else ''}"
