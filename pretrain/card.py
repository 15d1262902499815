"""MODEL_CARD.md: what weights are, what they saw, what may be done with them."""

from __future__ import annotations

from typing import Any

from pretrain.config import PretrainConfig

LICENCE = """\
Trained on credentialed data (PhysioNet) where it was MIMIC: the data must not leave your institution, and weights may
carry traces of patients. Share them only after checking the data use agreement. For research; not a medical device."""


def model_card(meta: dict[str, Any], config: PretrainConfig, results: str = "") -> str:
    """The card's Markdown, from encoder.json, the config, and probe results where they exist."""
    lines = [
        f"# {meta['arch']}, pretrained on chest films with masked Siamese networks",
        "",
        f"- Network: timm `{meta['arch']}` {meta['model_args']}; {meta['in_chans']} channel(s), {meta['image_size']}"
        f" px, {meta['width']} features (pool `{meta['pool']}`).",
        f"- Input: {', '.join(f'{k} {v}' for k, v in meta['preprocess'].items() if v is not None)}.",
        f"- Weights: the {meta['branch']} branch after {meta['step']} steps.",
        f"- Films: {meta['num_films']} of {meta['num_subjects']} subjects, split {', '.join(meta['splits_seen'])}."
        " No finding label was read.",
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
        lines += ["", "## How linearly readable the record is from the frozen features", ""]
        lines += ["| column | metric | value | chance |", "|---|---|---|---|"]
        lines += [f"| {n} | {r['metric']} | {r['value']:.3f} | {r['chance']:g} |" for n, r in readable.items()]
    lines += ["", "## Results", "", results or "None yet: `./launch.sh probe` measures it.", ""]
    return "\n".join([*lines, "## Licence and use", "", LICENCE, ""])


def _record(meta: dict[str, Any], config: PretrainConfig) -> str:
    if not meta["ehr_groups"]:
        return "none (vanilla MSN)"
    told = "; ".join(f"`{name}` (known at {when})" for name, when in meta["ehr_groups"].items())
    how = (
        f"told to the anchor ({config.ehr.inject})"
        if config.ehr.use == "condition"
        else "a target of the anchor (control)"
    )
    return f"{told}; {how}{', permuted between films (control)' if config.ehr.permuted else ''}"
