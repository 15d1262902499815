"""Names of models for a reader, from their configs: `EHR-conditioned MSN, ViT-Tiny`, `Film and record, MedFuse`.

Input: runs. Output: a name for each; runs that would have the same name get what differs between them, and at last
their folder. The page, `runs`, `compare` and the demo's table take their names from here.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from finetune.run_folders import Run, is_macro, part, read_object
from pretrain.options import TITLES
from pretrain.shapes import EncoderJson

USES = {"condition": "EHR-conditioned", "predict": "EHR-predicting", "contrast": "EHR-contrasted"}
RECORDS = {"record_lstm": "LSTM", "record_transformer": "Transformer", "record_gbm": "Gradient boosting"}
FUSIONS = {
    "medfuse": "MedFuse",
    "medfuse_time": "MedFuse over time",
    "concat": "concatenated",
    "attention": "attention",
    "late": "late fusion",
    "daft": "DAFT",
    "mmtm": "MMTM",
    "cross_attention": "cross-attention with the note",
}
TOKENS = {"film_tokens": "Film only, token states", "note_tokens": "Note only, token states"}
CONTROLS = {"context": "no pixels", "another": "another patient's film"}
SIZED = {"layers", "channels", "embed_dim", "depth", "growth_rate", "block_config", "num_init_features"}
SMALL = 5_000_000  # weights: fewer than the smallest of timm's networks that are usual for films
SEED = re.compile(r", seeds? \d+")


def named(runs: Sequence[Run]) -> list[Run]:
    """The runs with `called` filled: a name of its own for each run of a task."""
    names = [model_name(run) for run in runs]
    for facet in FACETS:
        for same in _equal(runs, names):
            values = [facet(runs[i]) for i in same]
            if len(set(values)) > 1:
                for i, value in zip(same, values, strict=True):
                    names[i] = f"{names[i]}, {value}" if value else names[i]
    for same in _equal(runs, names):
        for i in same:
            names[i] = f"{names[i]} [{runs[i].name}]"
    return [replace(run, called=name) for run, name in zip(runs, names, strict=True)]


def encoder_meta(run: Run) -> dict[str, Any]:
    """encoder.json of the encoder that a run trained or read, with its number of weights; {} where it is gone."""
    folder: Path | None = run.folder / "encoder"
    if run.kind != "pretraining":
        given = str(run.config.get("encoder") or "").removeprefix("random:").removesuffix("/encoder")
        found = {inner: run.find(f"{given}/{inner}", "encoder.json") for inner in ("encoder", "") if given}
        folder = next(filter(None, found.values()), None)
    meta = read_object(folder / "encoder.json", EncoderJson) if folder else {}
    if meta and folder and (folder / "encoder.safetensors").is_file():
        with contextlib.suppress(SafetensorError), safe_open(folder / "encoder.safetensors", "numpy") as file:
            meta["parameters"] = sum(math.prod(file.get_slice(key).get_shape()) for key in file.keys())  # noqa: SIM118
    return meta


def model_name(run: Run) -> str:
    """The name of one run's model, as if there were no other."""
    if run.kind == "pretraining":
        return pretrained_name(encoder_meta(run) or _planned(run.config))
    if run.kind == "unfinished":
        return run.name
    if run.task != "findings" or "freeze" in run.config:
        return _fusion_name(run.result)
    name = encoder_name(run) or "Unknown encoder"
    return f"{name}, fine-tuned" if run.result.get("model") == "finetune" else name


def encoder_name(run: Run) -> str:
    """What an evaluation read films with; empty for none."""
    given, about, meta = str(run.result.get("encoder") or ""), part(run.result, "compared_by"), encoder_meta(run)
    if given.startswith("pixels"):
        side = about.get("image_size") or 16
        return f"Raw pixels, {side}x{side}"
    if given.startswith("random:"):
        asked = {"arch": given.removeprefix("random:").rsplit("/", 1)[-1]}
        return f"Random weights, {architecture({**asked, **about, **meta})}"
    if given.startswith("metadata"):
        return "Metadata without the film"
    if meta or (about.get("method") and about.get("arch")):
        use = {"use": about.get("record_use"), "permuted": about.get("permuted")}
        known = {"ehr_groups": about.get("record"), "ehr": use}
        return pretrained_name({**known, **about, **meta} if about else meta)
    file = Path(given.removesuffix("/").removesuffix("/encoder")).name
    return f"Weights of {file}" if file else ""


def pretrained_name(encoder: Mapping[str, Any]) -> str:
    """Method, use of the record, architecture. `encoder`: encoder.json, or what a config plans."""
    given = str(encoder.get("method") or "")
    method = TITLES.get(given, given.rpartition(":")[2] or "Pretrained encoder")
    record, ehr = encoder.get("ehr_groups"), part(dict(encoder), "ehr")
    said = f"{USES.get(str(ehr.get('use') or 'condition'), 'EHR with')} {method}" if record else method
    said += " on films alone" if record is not None and not record else ""
    said += ", another patient's record" if record and ehr.get("permuted") else ""
    return f"{said}, {architecture(encoder)}" if encoder.get("arch") else said


def architecture(encoder: Mapping[str, Any]) -> str:
    """A timm name for a reader: `ViT-Tiny`, `DenseNet-121`; of another size than timm's: `ResNet (small)`."""
    arch = str(encoder.get("arch") or "unknown architecture")
    vit = re.match(r"(?:vit|deit3?)_(tiny|small|base|large|huge|giant)", arch)
    net = re.match(r"(dense|res)net(\d+)", arch)
    family = "ViT" if vit else {"dense": "DenseNet", "res": "ResNet"}[net[1]] if net else arch
    if SIZED & set(part(dict(encoder), "model_args")):
        return f"{family} (small)" if (encoder.get("parameters") or SMALL) < SMALL else f"{family} (own size)"
    return f"{family}-{vit[1].title()}" if vit else f"{family}-{net[2]}" if net else arch


def _planned(config: Mapping[str, Any]) -> dict[str, Any]:
    """What encoder.json will say, from the config of a pretraining that has exported none."""
    ehr, encoder = part(dict(config), "ehr"), part(dict(config), "encoder")
    return {"method": config.get("method"), "ehr_groups": ehr.get("groups"), "ehr": ehr, **encoder}


def _fusion_name(result: Mapping[str, Any]) -> str:
    model = str(result.get("model") or "unknown model")
    control = CONTROLS.get(str(result.get("control")))
    seeds = f"{result['seeds']} seeds" if (result.get("seeds") or 1) > 1 else None
    if model in RECORDS or model.startswith("record"):
        name = f"Record only, {RECORDS.get(model, model)}"
    elif model == "film_only":
        name = "Film only"
    else:
        own = model.rpartition(":")[2] if ":" in model else model
        name = TOKENS.get(model) or f"Film and record, {FUSIONS.get(model, own)}"
    return ", ".join(filter(None, (name, control, seeds)))


FACETS: tuple[Callable[[Run], str], ...] = (
    lambda run: encoder_name(run) if run.kind == "evaluation" and run.task != "findings" else "",
    lambda run: str(run.result.get("model") or ""),
    lambda run: "encoder fine-tuned" if run.config.get("freeze") is False else "",
    lambda run: _said("record: ", ", ".join(map(str, _record(run)))),
    lambda run: _said("seed ", str(run.result.get("seed", run.config.get("seed", "")))),
)


def unit(run: Run) -> str:
    """What a test row of this run is: studies, films, stays, hours of stays."""
    hourly = {"decompensation": "hours of stays", "length_of_stay": "hours of stays"}
    films = run.task in ("findings", "radiology", "labels")
    given = {"study": "studies", "film": "films"}.get(str(run.result.get("unit")), "films" if films else "stays")
    return hourly.get(run.task, given)


def counted(run: Run, head: Mapping[str, Any], subset: str = "all") -> str:
    """The rows that a number is on: `1,022 studies`, `31 of 94 stays with a film`."""
    positives = "" if is_macro(run.main) else f"{head['positives']:,.0f} of "
    return f"{positives}{head['n']:,.0f} {unit(run)}{' with a film' if subset == 'paired' else ''}"


def without_seed(name: str) -> str:
    """A name that stands for all trainings of a method."""
    return SEED.sub("", name)


def _equal(runs: Sequence[Run], names: Sequence[str]) -> list[list[int]]:
    """Runs of one kind and task with the same name."""
    found: dict[tuple[str, str, str], list[int]] = {}
    for i, (run, name) in enumerate(zip(runs, names, strict=True)):
        found.setdefault((run.kind, run.task, name), []).append(i)
    return [same for same in found.values() if len(same) > 1]


def _record(run: Run) -> list[Any]:
    """The groups of the record that a run, or the encoder that it reads, was pretrained with."""
    found = part(run.config, "ehr").get("groups") or part(run.result, "compared_by").get("record")
    return found if isinstance(found, list) else []


def _said(what: str, value: str) -> str:
    return what + value if value else ""
