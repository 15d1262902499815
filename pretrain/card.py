"""MODEL_CARD.md: what weights are, what they saw, what may be done with them."""

from __future__ import annotations

from typing import Any

from pretrain.config import PretrainConfig

LICENCE = """\
Trained on credentialed data (PhysioNet) where it was MIMIC: the data must not leave your institution, and weights may
carry traces of patients. Share them only after checking the data use agreement. For research; not a medical device."""


READABLE = "## How linearly readable the record is from the frozen features"
NO_RESULTS = "None yet: `./launch.sh probe` measures it, `python -m pretrain export --probe RUN` writes it here."


def model_card(meta: dict[str, Any], config: PretrainConfig) -> str:
    """The card's Markdown, from encoder.json and the config; `probe_table` takes the place of `NO_RESULTS`."""
    lines = [
        f"# {meta['arch']}, pretrained on chest films with masked Siamese networks",
        "",
        f"- Network: timm `{meta['arch']}` {meta['model_args']}; {meta['in_chans']} channel(s), {meta['image_size']}"
        f" px, {meta['width']} features (pool `{meta['pool']}`).",
        f"- Input: {', '.join(f'{k} {v}' for k, v in meta['preprocess'].items() if v is not None)}.",
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


def probe_table(results: dict[str, Any]) -> str:
    """Markdown of a probe's results.json: the mean over labels of each metric on the test split."""
    run, rows = results["run"], results["rows"]
    kept = [
        r for r in rows if r.get("label") == "macro" and r.get("split") == "test" and r.get("subset") in (None, "all")
    ]
    lines = [f"{run.get('task')}, {run.get('model')} on frozen features, test split:", ""]
    lines += ["| metric | value | 95% interval | films |", "|---|---|---|---|"]
    for r in kept:
        if r.get("value") is not None:
            low, high = (f"{r[k]:.3f}" if r.get(k) is not None else "?" for k in ("low", "high"))
            lines.append(f"| {r['metric']} | {r['value']:.3f} | {low} to {high} | {r.get('n', '')} |")
    return "\n".join(lines)


def _start(meta: dict[str, Any]) -> list[str]:
    before = meta.get("started_from")
    return [f"- Started from: {before['weights']}, whose films are {before['films']}."] if before else []


def _record(meta: dict[str, Any], config: PretrainConfig) -> str:
    if not meta["ehr_groups"]:
        return "none (vanilla MSN)"
    told = "; ".join(f"`{name}` (known at {when})" for name, when in meta["ehr_groups"].items())
    if not config.ehr.groups:
        return f"none in this run; {told} in the run that it started from"
    how = (
        f"told to the anchor ({config.ehr.inject})"
        if config.ehr.use == "condition"
        else "a target of the anchor (control)"
    )
    return f"{told}; {how}{', permuted between films (control)' if config.ehr.permuted else ''}"
