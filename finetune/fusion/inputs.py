"""The inputs of a fusion run: samples with their films, and the film branch, fitted on train films.

Input: a FuseConfig. Output: samples, a film branch (None for a record-only model), and their description for
results.json.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray

from configs import UserError
from ehr_features.files import read_table
from ehr_features.static import fit_scale
from finetune import guard
from finetune.config import FuseConfig
from finetune.encoders import Features, Frozen, film_features, open_encoder, store_warnings, to_be_tuned
from finetune.fusion import findings
from finetune.fusion.cross_attention import kind_of
from finetune.fusion.film_tokens import film_tokens
from finetune.fusion.net import FilmBranch
from finetune.fusion.own_samples import check_model, load_table, read_only
from finetune.fusion.samples import Samples, another_film, load
from finetune.labelled import evaluation_labels, read_films, training_labels
from pretrain.encoder.model import STAGES
from pretrain.store import Store
from pretrain.text.notes import Notes, note_tokens, note_vectors, read_notes


def prepare(config: FuseConfig, accelerator: Accelerator) -> tuple[Samples, FilmBranch | None, dict[str, Any]]:
    """Read, check and fit. Raises: UserError: no such model or task, an encoder that saw val or test subjects."""
    about: dict[str, Any] = {"warnings": [], "encoder": config.encoder, "supervision": "none", "films_seen": "none"}
    kind = kind_of(config.model)
    tokens, sees_films = getattr(kind, "reads_tokens", False), getattr(kind, "uses_film", True)
    store = None
    try:
        store = None if config.store is None else Store(config.store)
    except UserError:
        if sees_films or Path(str(config.store)).exists():
            raise
        about["warnings"].append(f"{config.store}: no store there; every film of a stay counts as present")
    own = None
    if config.features is not None:
        films = config.num_films if getattr(kind, "many_films", False) else 1
        samples = load(config.features, config.task, readable=store, films=films, max_hours=config.max_hours)
    else:
        check_model(config, kind)
        samples, own = load_table(config, store)
        about["warnings"] += own.warnings
        about |= {"left_out": own.left_out, "table": [] if own.own is None else list(own.own.said)}
    lost = int((samples.table["dicom_id"].notna().to_numpy() & ~samples.has_image).sum())
    if lost:
        about["warnings"].append(f"{lost} samples have a film that the store lacks; they count as without a film")
    if config.task == "findings" and config.model != "film_only" and not tokens:
        raise UserError(
            "task=findings has films without a stay: take model=film_only, cross_attention, film_tokens or "
            "note_tokens, or task=radiology with the record"
        )
    if config.notes is not None and config.model != "film_tokens":
        samples, about["text"] = read(config, samples, _cache(config), tokens)
    if not sees_films:
        return samples, None, about | {"encoder": None}
    assert store is not None and config.encoder is not None, "checked by read_by_model"
    pools = [] if tokens or config.pool is None else [config.pool]
    where = {"device": accelerator.device, "weights": config.weights}
    frozen = open_encoder(config.encoder, seed=config.seed, pools=pools, **where)
    if frozen.folder is not None:
        subjects = samples.table[["subject_id", "split"]].drop_duplicates()
        seen = guard.check_encoder(
            frozen.folder,
            subjects,
            features=config.features,
            own=None if own is None else own.own,
            labels=() if own is None else own.names,
            allow_leak=config.allow_leak,
            same_source=own is None,
            card=frozen.card,
        )
        about["warnings"] += seen.warnings
        about |= {"supervision": seen.supervision, "films_seen": seen.films, "guard": seen.compared}
    about["warnings"] += store_warnings(frozen, store)
    samples = samples if own is None else read_only(samples)
    about |= {"encoder_weights": frozen.said} if frozen.said else {}
    if tokens:
        states, _ = film_tokens(frozen, store, samples.film_ids, _cache(config))
        return replace(samples, film_tokens=states), None, about
    samples, branch, more = _films(config, samples, frozen, store)
    return samples, branch, about | more


def _films(
    config: FuseConfig, samples: Samples, frozen: Frozen, store: Store
) -> tuple[Samples, FilmBranch, dict[str, Any]]:
    """The samples with film features, and the branch fitted on train films."""
    cache = _cache(config)
    name = config.pool or getattr(kind_of(config.model), "pool", None)
    rows = samples.films[samples.rows("train")]
    rows = np.unique(rows[rows >= 0])
    if not len(rows):
        raise UserError(f"{source_of(config)}: no train sample of {config.task} has a film in {config.store}")
    if config.control == "context":
        nothing = torch.zeros(0)
        return replace(samples, store=store), FilmBranch(nothing, nothing, keep=False), {}
    features = pool(film_features(frozen, store, samples.film_ids, cache=cache), name)
    width = features.shape[1]
    mean, deviation = _scale(features[rows]) if config.standardise else (torch.zeros(width), torch.ones(width))
    head, more = None, dict[str, float]()
    if config.film != "features":
        assert config.features is not None, "checked by the config"
        labelled = findings.labelled_films(config.features, frozen, store, cache)
        scaled = [((torch.from_numpy(pool(labelled[s][0], name)) - mean) / deviation, labelled[s][1]) for s in labelled]
        films = (torch.from_numpy(features) - mean) / deviation
        head, logits, more = findings.fit(scaled[0], scaled[1], labelled["train"][2], films, samples.film_subjects())
        features = np.concatenate([features, logits.numpy()], axis=1)
    branch = FilmBranch(
        mean,
        deviation,
        encoder=None if config.freeze else to_be_tuned(frozen, store),
        origin=None if config.freeze else frozen.folder,
        pool=name,
        findings=head,
        keep=config.film != "findings",
        context=config.context,
        fixed_norm=not str(config.encoder).startswith("random:"),
    )
    samples = replace(samples, features=features, store=store)
    samples = another_film(samples, config.seed) if config.control == "another" else samples
    return samples, branch, {"findings_head": more} if more else {}


def source_of(config: FuseConfig) -> str:
    """The features/ folder or the table of films, for a message."""
    return str(config.features if config.films is None else config.films.table)


def _scale(features: NDArray[np.float32]) -> tuple[torch.Tensor, torch.Tensor]:
    mean, deviation = fit_scale(
        features, constant=1
    )  # a column that is constant now may vary once the encoder is tuned
    return torch.from_numpy(mean), torch.from_numpy(deviation)


def _cache(config: FuseConfig) -> Path:
    return Path(config.cache) if config.cache else Path(config.out).parent / "cache"


def pool(pools: Features, name: str | None) -> NDArray[np.float32]:
    """One pool of the features; `both` is class token and mean; None is the class token's (else the mean).

    Raises: UserError: no such pool.
    """
    if name == "both":
        return np.concatenate([pools[key] for key in sorted(pools) if key != STAGES], axis=1)
    if name is not None and name not in pools:
        raise UserError(f"pool={name}: this encoder has {', '.join(pools)}")
    return pools[name or max(pools)]


# ---- Notes of the films: one vector per note, or token states.


def read(config: FuseConfig, samples: Samples, cache: Path, tokens: bool) -> tuple[Samples, dict[str, Any]]:
    """Add their notes to the samples.

    Args:
        tokens: the states of each token, for the models over tokens; else one vector per note.
    Returns: samples; their description for results.json.
    Raises: UserError: no notes, a note from after its film, no note of these films.
    """
    assert config.notes is not None and config.text_encoder is not None, "checked by read_by_model"
    assert config.features is not None, "checked by the config"
    images = read_table(config.features, "images")
    taken = images.set_index("dicom_id")["taken_at"] if "taken_at" in images else None
    notes = read_notes(config.notes, taken)
    films = samples.table["dicom_id"]
    if tokens:
        states, rows, about = note_tokens(notes, config.text_encoder, films, cache)
        return replace(samples, note_tokens=states, note=rows), about
    distinct = films.dropna().unique().tolist()
    vectors, has, about = note_vectors(notes, config.text_encoder, distinct, cache)
    place = {film: i for i, film in enumerate(distinct) if has[i]}
    rows = np.array([place.get(film, -1) for film in films], np.int64)
    train = np.unique(rows[samples.rows("train")])
    train = train[train >= 0]
    if not len(train):
        raise UserError(f"{config.notes}: no train sample of {config.task} has a note")
    mean, deviation = _scale(vectors[train])
    parts = [(torch.from_numpy(vectors) - mean) / deviation] if config.text != "findings" else []
    if config.text != "features":
        logits, more = _findings(config, notes, distinct, vectors, samples, rows, cache)
        parts.append(logits)
        about |= {"findings_head": more}
    return replace(samples, text=torch.cat(parts, dim=1).float().numpy(), note=rows), about


def _findings(
    config: FuseConfig,
    notes: Notes,
    films: list[str],
    vectors: NDArray[np.float32],
    samples: Samples,
    rows: NDArray[np.int64],
    cache: Path,
) -> tuple[torch.Tensor, dict[str, float]]:
    """Logits of the findings for each film's note, by heads fitted on the notes of all labelled train films.

    As for films (finetune/fusion/findings.py), the logits of train subjects come from heads that were not fitted on
    them.
    """
    assert config.text_encoder is not None and config.features is not None
    labelled = read_films(config.features)
    ids = labelled.table["dicom_id"].tolist()
    every, has, _ = note_vectors(notes, config.text_encoder, ids, cache)
    train = np.intersect1d(labelled.rows("train"), np.flatnonzero(has))
    val = np.intersect1d(labelled.rows("val"), np.flatnonzero(has))
    if not len(train) or not len(val):
        raise UserError(f"{config.notes}: no labelled train or val film has a note; set text=features")
    mean, deviation = _scale(every[train])
    scaled = (torch.from_numpy(every) - mean) / deviation
    own = np.zeros(len(films), np.int64)
    known = rows >= 0
    own[rows[known]] = samples.table["subject_id"].to_numpy(np.int64)[known]
    subjects = labelled.table["subject_id"].to_numpy(np.int64)[train]
    _, logits, about = findings.fit(
        (scaled[train], training_labels(labelled.labels.iloc[train])),
        (scaled[val], evaluation_labels(labelled.labels.iloc[val])),
        subjects,
        (torch.from_numpy(vectors) - mean) / deviation,
        own,
    )
    return logits, about
