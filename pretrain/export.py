"""Write encoder/ from a run, with a model card, and copies of it for other uses.

Input: a run folder, or the method of a running one. Output: encoder/ (see pretrain/encoder/model.py).
"""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.linear_model import Ridge
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from configs import UserError
from ehr_features.config import TEXT_GROUP
from ehr_features.files import digest, new_folder, read_json, write_json
from pretrain import encoder as encoders
from pretrain.config import PretrainConfig
from pretrain.data import Films
from pretrain.encoder import Encoder
from pretrain.encoder.model import encoder_folder
from pretrain.encoder.weights import to_channels
from pretrain.methods import Method
from pretrain.run import load_checkpoint
from pretrain.seen import ancestry
from pretrain.store import Store

READ_FILMS = 4000  # largest number of films for the readability of EHR columns


def write(
    folder: Path,
    config: PretrainConfig,
    method: Method,
    films: Films,
    store: Store,
    step: int,
    *,
    last: bool = False,
    seconds: float | None = None,
) -> Path:
    """runs/X/encoder/ as it is now; `last` adds how linearly readable the EHR columns are, `seconds` the
    processor seconds that its training took."""
    branch, encoder = method.product
    meta: dict[str, Any] = {
        "method": config.method,
        "step": step,
        "branch": branch,
        "ehr_groups": films.available_at,
        "ehr": {**config.ehr.model_dump(), "columns": films.columns} if config.ehr.groups else None,
        "splits_seen": sorted(set(films.table["split"])),
        "num_films": len(films),
        "films_trained": step * config.optim.batch_size,
        "processor_seconds": seconds,
        "num_subjects": int(films.table["subject_id"].nunique()),
        "config_hash": digest(config.model_dump(mode="json")),
        "features_hash": films.source_hash,
        "store_hash": store.hash,
    }
    if films.text is not None:
        meta["text"] = films.text
    if config.encoder.init is not None:
        before = ancestry(config.encoder.init)
        meta["ehr_groups"] = before.pop("ehr_groups", {}) | meta["ehr_groups"]
        meta["splits_seen"] = sorted({*before.pop("splits_seen", []), *meta["splits_seen"]})
        meta |= before
    if last and config.readability and films.columns:
        meta["readability"] = readability(encoder, films, store, config.seed)  # sets the encoder to eval mode
    encoder.preprocess = dataclasses.replace(encoder.preprocess, store=store.square)
    about = {**encoder.meta, "preprocess": encoder.preprocess.to_json(), **meta}
    return encoders.save(folder / "encoder", encoder, meta, card=model_card(about, config))


def readability(encoder: Encoder, films: Films, store: Store, seed: int) -> dict[str, dict[str, Any]]:
    """Predict each EHR column linearly from frozen features: ridge on half the subjects, scored on the rest.

    A low value is possible for columns given to the anchor: the target need not learn what the record provides.
    Returns: column -> metric (auroc of a yes / no column, else r2), value, chance; the columns of a text's vector have
        no individual meaning and are summarised by their mean.
    """
    chosen = np.random.default_rng(seed).permutation(len(films))[:READ_FILMS]
    device = next(encoder.parameters()).device
    x = encoders.embed(encoder, store.read(films.table["dicom_id"].to_numpy(object)[chosen].tolist()), device=device)
    y = torch.from_numpy(films.static[chosen])
    subjects = films.table["subject_id"].to_numpy()[chosen]
    first = torch.from_numpy(np.isin(subjects, np.random.default_rng(seed).permutation(np.unique(subjects))[::2]))
    if first.all() or not first.any():
        return {}
    guess = _ridge(x[first], y[first], x[~first])
    out: dict[str, dict[str, Any]] = {}
    for i, name in enumerate(films.columns):
        wanted, fitted = y[~first, i], y[first, i]
        if len(wanted.unique()) < 2 or len(fitted.unique()) < 2:
            continue
        if len(y[:, i].unique()) == 2:
            out[name] = {
                "metric": "auroc",
                "value": float(roc_auc_score(wanted > wanted.min(), guess[:, i])),
                "chance": 0.5,
            }
        elif spread := (wanted - fitted.mean()).square().mean().item():
            r2 = 1 - (wanted - guess[:, i]).square().mean().item() / spread
            out[name] = {"metric": "r2", "value": r2, "chance": 0.0}
    groups = dict(zip(films.columns, films.column_groups, strict=True))
    vector = [name for name in out if groups[name] == TEXT_GROUP and out[name]["metric"] == "r2"]
    if vector:
        mean = float(np.mean([out.pop(name)["value"] for name in vector]))
        out["text (mean over its columns)"] = {"metric": "r2", "value": mean, "chance": 0.0}
    return out


def _ridge(x: Tensor, y: Tensor, new: Tensor) -> Tensor:
    """Fit y (N, S) on standardised x (N, D), mean squared error + 0.01 |weights|^2; predict at `new` (M, D)."""
    alpha = 0.01 * len(x) ** 2 / max(len(x) - 1, 1)  # for standard deviations over N - 1; StandardScaler divides by N
    fitted = make_pipeline(StandardScaler(), Ridge(alpha)).fit(x.double(), y.double())
    return torch.from_numpy(fitted.predict(new.double()).reshape(len(new), -1))


def export(
    source: str | Path,
    out: str | Path,
    *,
    in_chans: int | None = None,
    branch: str | None = None,
    form: str = "timm",
    probe: str | Path | None = None,
) -> Path:
    """Copy the encoder of a run, for use elsewhere.

    Args:
        source: a run folder, or an encoder/ (its own branch only).
        out: a new folder; for ONNX too (encoder.onnx beside encoder.json).
        in_chans: 1 or 3: the first layer gives the same features for gray films repeated in so many channels.
        branch: None: that of encoder/; `anchor` reads the trained branch from the newest checkpoint.
        form: `timm` or `onnx`.
        probe: a probe's run folder; its numbers go into the model card.
    Raises: UserError: no encoder or checkpoint there, `out` exists, or packages for ONNX are missing.
    """
    source, out = Path(source), Path(out)
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"{out}: exists; choose a new folder")
    folder, encoder = encoder_folder(source), encoders.load(source)
    card = (folder / "MODEL_CARD.md").read_text(encoding="utf-8") if (folder / "MODEL_CARD.md").is_file() else None
    if card is not None and probe is not None:
        card = card.replace(NO_RESULTS, probe_table(read_json(Path(probe) / "results.json")))
    held = encoder.meta.get("branch", "target")
    if branch == "target" and held != "target":
        raise UserError(f"{folder}: method {encoder.meta.get('method')} has no target branch; leave --branch out")
    if branch == "anchor" and held == "target":
        target = f"the target branch after {encoder.meta.get('step')} steps"
        _fill_from_anchor(encoder, source)
        card = card and card.replace(target, f"the anchor branch after {encoder.meta['step']} steps")
        card = card and card.replace(READABLE, f"{READABLE} of the target branch")
        encoder.meta.pop("readability", None)  # it was measured on the other branch
    meta = encoder.meta | {"branch": branch or held}
    if in_chans is not None and in_chans != meta["in_chans"]:
        before = meta["in_chans"]
        state, said = to_channels(encoder.net.state_dict(), in_chans)
        meta |= {"in_chans": in_chans}
        preprocess = dataclasses.replace(encoder.preprocess, in_chans=in_chans)
        encoder = encoders.create(
            meta["arch"], in_chans=in_chans, image_size=meta["image_size"], model_args=meta["model_args"],
            preprocess=preprocess, pool=meta["pool"],
        )  # fmt: skip
        encoder.net.load_state_dict(state)
        if card is not None:
            card = card.replace(f"{before} channel(s)", f"{in_chans} channel(s)") + f"\nExported with {said}.\n"
    encoder.meta = meta
    if form == "timm":
        return encoders.save(out, encoder, card=card)
    return _to_onnx(out, encoder, card)


def _fill_from_anchor(encoder: Encoder, source: Path) -> None:
    state = load_checkpoint(source) if (source / "checkpoints").is_dir() else None
    if state is None:
        raise UserError(f"{source}: no checkpoint, so no anchor branch; give the run folder, or leave --branch out")
    net = {k.removeprefix("anchor.net."): v for k, v in state["model"].items() if k.startswith("anchor.net.")}
    encoder.net.load_state_dict(net)
    encoder.meta = encoder.meta | {"step": state["step"]}


def _to_onnx(out: Path, encoder: Encoder, card: str | None) -> Path:
    """encoder.onnx: normalised views (N, C, S, S) -> features (N, D), any N."""
    if missing := [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]:
        raise UserError(f"--format onnx needs {' and '.join(missing)}: pip install {' '.join(missing)}")
    size, chans = encoder.meta["image_size"], encoder.meta["in_chans"]
    views = torch.zeros(2, chans, size, size)
    with new_folder(out) as part:
        torch.onnx.export(
            encoder.eval(), (views,), part / "encoder.onnx", input_names=["views"], output_names=["features"],
            dynamo=True, dynamic_shapes={"x": {0: "films"}}, external_data=False, verbose=False,
        )  # fmt: skip
        write_json(part / "encoder.json", {**encoder.meta, "preprocess": encoder.preprocess.to_json()})
        if card is not None:
            (part / "MODEL_CARD.md").write_text(card, encoding="utf-8")
    return out


# ---- MODEL_CARD.md: what the weights are, the data they saw, and the limits of their use.

LICENCE = """\
Trained on credentialed data (PhysioNet) where it was MIMIC: the data must not leave your institution, and weights may
carry traces of patients. Share them only after checking the data use agreement. For research; not a medical device."""


NAMES = {
    "msn": "masked Siamese networks (MSN)", "pmsn": "masked Siamese networks with a power-law prior (PMSN)",
    "dino": "DINO", "ibot": "iBOT", "mae": "a masked autoencoder (MAE)", "simclr": "SimCLR", "vicreg": "VICReg",
    "lejepa": "LeJEPA", "byol": "BYOL",
}  # fmt: skip
READABLE = "## How linearly readable the record is from the frozen features"
NO_RESULTS = "None yet: `ehr-msn probe` measures it, `ehr-msn export RUN OUT --probe PROBE` writes it here."


def model_card(meta: dict[str, Any], config: PretrainConfig) -> str:
    """The card's Markdown, from encoder.json and the config; `probe_table` later replaces `NO_RESULTS`."""
    lines = [
        f"# {meta['arch']}, pretrained on chest films with {NAMES.get(config.method, config.method)}",
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


def _input(preprocess: dict[str, Any]) -> str:
    parts = {f"store {k}": v for k, v in (preprocess.get("store") or {}).items()} | preprocess
    return ", ".join(f"{k} {v}" for k, v in parts.items() if v is not None and k != "store")


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
