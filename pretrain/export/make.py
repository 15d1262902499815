"""Write encoder/ from a run, with a model card, and copies of it for other uses.

Input: a run folder, or the method of a running one. Output: encoder/ (see pretrain/encoder/model.py).
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from configs import UserError
from ehr_features.config import TEXT_GROUP
from ehr_features.files import digest, new_folder, write_json
from pretrain import encoder as encoders
from pretrain.config import PretrainConfig
from pretrain.data import Films
from pretrain.encoder import Encoder
from pretrain.encoder.model import encoder_folder
from pretrain.encoder.weights import to_channels
from pretrain.export import card
from pretrain.export.card import NO_RESULTS, READABLE, model_card
from pretrain.export.formats import WRITERS, opened
from pretrain.methods import Method
from pretrain.run import load_checkpoint
from pretrain.run.processes import precision_here
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
        "precision": precision_here(config.precision, next(encoder.parameters()).device.type == "cpu"),
        "datasets": card.datasets(config.features, config.films.layout),
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
        meta["datasets"] = list(dict.fromkeys([*meta["datasets"], *before.pop("datasets", [])]))
        meta["splits_seen"] = sorted({*before.pop("splits_seen", []), *meta["splits_seen"]})
        meta |= before
    if last and config.readability and films.columns:
        meta["readability"] = readability(encoder, films, store, config.seed)  # sets the encoder to eval mode
    encoder.preprocess = dataclasses.replace(encoder.preprocess, store=store.square)
    about = {**encoder.meta, "preprocess": encoder.preprocess.to_json(), **meta}
    return encoders.save(folder / "encoder", encoder, meta, card=model_card(about, config))


def readability(encoder: Encoder, films: Films, store: Store, seed: int) -> dict[str, dict[str, Any]]:
    """Predict each EHR column linearly from frozen features: ridge on half the subjects, scored on the rest; both on
    the films whose record has it.

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
    from sklearn.metrics import roc_auc_score

    assert films.known is not None
    known = torch.from_numpy(films.known[chosen])
    known |= ~known.any(dim=0)  # a mask, or hours since a value: never a target, but each film has it
    out: dict[str, dict[str, Any]] = {}
    fitted_on: dict[bytes, list[int]] = {}  # columns that the same films have are fitted together
    for i in range(len(films.columns)):
        fitted_on.setdefault(known[:, i].numpy().tobytes(), []).append(i)
    guesses: dict[int, Tensor] = {}
    for same in fitted_on.values():
        on, off = first & known[:, same[0]], ~first & known[:, same[0]]
        if on.any() and off.any():
            guesses |= dict(zip(same, _ridge(x[on], y[on][:, same], x[off]).unbind(1), strict=True))
    for i, name in enumerate(films.columns):
        on, off = first & known[:, i], ~first & known[:, i]
        wanted, fitted = y[off, i], y[on, i]
        if len(wanted.unique()) < 2 or len(fitted.unique()) < 2:
            continue
        guess = guesses[i]
        if len(y[known[:, i], i].unique()) == 2:
            out[name] = {
                "metric": "auroc",
                "value": float(roc_auc_score(wanted > wanted.min(), guess)),
                "chance": 0.5,
            }
        elif spread := (wanted - fitted.mean()).square().mean().item():
            r2 = 1 - (wanted - guess).square().mean().item() / spread
            out[name] = {"metric": "r2", "value": r2, "chance": 0.0}
    groups = dict(zip(films.columns, films.column_groups, strict=True))
    vector = [name for name in out if groups[name] == TEXT_GROUP and out[name]["metric"] == "r2"]
    if vector:
        mean = float(np.mean([out.pop(name)["value"] for name in vector]))
        out["text (mean over its columns)"] = {"metric": "r2", "value": mean, "chance": 0.0}
    return out


def _ridge(x: Tensor, y: Tensor, new: Tensor) -> Tensor:
    """Fit y (N, S) on standardised x (N, D), mean squared error + 0.01 |weights|^2; predict at `new` (M, D)."""
    from sklearn.linear_model import Ridge
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

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
    name: str | None = None,
) -> Path:
    """Copy the encoder of a run, for use elsewhere, and compare the copy with it.

    Args:
        source: a run folder, or an encoder/ (its own branch only).
        out: a new folder: the form's files, encoder.json, MODEL_CARD.md, and the same card as README.md with what a
            hub reads above it.
        in_chans: 1 or 3: the first layer gives the same features for gray films repeated in so many channels.
        branch: None: that of encoder/; `anchor` reads the trained branch from the newest checkpoint.
        form: `timm`, `transformers`, `onnx` or `torchscript` (pretrain/export/formats.py).
        probe: a probe's run folder; its numbers go into the model card. None: the newest one beside the run.
        name: on a hub, ORG/NAME; for the card.
    Raises: UserError: no encoder or checkpoint there, `out` exists, the form cannot have this encoder, or packages are
        missing.
    """
    source, out = Path(source), Path(out)
    if form not in WRITERS:
        raise UserError(f"--format {form}: wanted {', '.join(WRITERS)}")
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"{out}: exists; choose a new folder")
    folder, encoder = encoder_folder(source), encoders.load(source)
    text = (folder / "MODEL_CARD.md").read_text(encoding="utf-8") if (folder / "MODEL_CARD.md").is_file() else None
    held = encoder.meta.get("branch", "target")
    if branch == "target" and held != "target":
        raise UserError(f"{folder}: method {encoder.meta.get('method')} has no target branch; leave --branch out")
    other = branch == "anchor" and held == "target"
    found = Path(probe) if probe is not None else None if other else card.own_results(source)
    results = None if found is None else card.read_results(found, source)
    if text is not None and results is not None:
        text = text.replace(NO_RESULTS, card.probe_table(results))
    if other:
        target = f"the target branch after {encoder.meta.get('step')} steps"
        _fill_from_anchor(encoder, source)
        text = text and text.replace(target, f"the anchor branch after {encoder.meta['step']} steps")
        text = text and text.replace(READABLE, f"{READABLE} of the target branch")
        encoder.meta.pop("readability", None)  # it was measured on the other branch
    encoder.meta = encoder.meta | {"branch": branch or held}
    if in_chans is not None and in_chans != encoder.meta["in_chans"]:
        encoder, text = _with_channels(encoder, in_chans, text)
    name = name or out.resolve().name
    library = form if form in ("timm", "transformers", "onnx") else "pytorch"
    top = card.header(encoder.meta, name, library, card.trained_on(encoder.meta, source), results)
    with new_folder(out) as part:
        if form == "timm":
            encoders.write_files(part, encoder, card=text)
        else:
            write_json(part / "encoder.json", encoders.about(encoder))
            if text is not None:
                (part / "MODEL_CARD.md").write_text(text, encoding="utf-8")
        print(WRITERS[form](part, encoder))
        body = "\n".join([text or f"# {name}\n\n{card.LICENCE}\n", opened(form, encoder, name)])
        (part / "README.md").write_text(top + body, encoding="utf-8")
    return out


def _with_channels(encoder: Encoder, in_chans: int, text: str | None) -> tuple[Encoder, str | None]:
    """The same encoder for another number of equal channels, and its card."""
    before = encoder.meta
    state, said = to_channels(encoder.net.state_dict(), in_chans)
    meta = before | {"in_chans": in_chans}
    preprocess = dataclasses.replace(encoder.preprocess, in_chans=in_chans)
    made = encoders.create(
        meta["arch"], in_chans=in_chans, image_size=meta["image_size"], model_args=meta["model_args"],
        preprocess=preprocess, pool=meta["pool"],
    )  # fmt: skip
    made.net.load_state_dict(state)
    made.meta, made.name = meta, encoder.name
    if text is not None:
        old, new = (f"{number} channel(s)" for number in (before["in_chans"], in_chans))
        text = text.replace(old, new) + f"\nExported with {said}.\n"
    return made.eval(), text


def _fill_from_anchor(encoder: Encoder, source: Path) -> None:
    state = load_checkpoint(source) if (source / "checkpoints").is_dir() else None
    if state is None:
        raise UserError(f"{source}: no checkpoint, so no anchor branch; give the run folder, or leave --branch out")
    net = {k.removeprefix("anchor.net."): v for k, v in state["model"].items() if k.startswith("anchor.net.")}
    encoder.net.load_state_dict(net)
    encoder.meta = encoder.meta | {"step": state["step"]}
