"""What a fusion run reads of its films' notes: a token's content, or token states.

Comes in: samples and the config's `notes` and `text_encoder`. Goes out: the samples with `text` and `note`. The note of
a prediction is that of its film, also where the film itself cannot be read; it was known when the film was taken.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from configs import UserError
from ehr_features.files import read_table
from finetune import findings
from finetune.config import FuseConfig
from finetune.films import evaluation_labels, read_films, training_labels
from finetune.net import fit_scale
from finetune.samples import Samples
from pretrain.text.notes import Notes, note_tokens, note_vectors, read_notes


def read(config: FuseConfig, samples: Samples, cache: Path, tokens: bool) -> tuple[Samples, dict[str, Any]]:
    """The samples with their notes.

    Args:
        tokens: the states of each token, for the models over tokens; else one vector a note.
    Returns: samples; what results.json says.
    Raises: UserError: no notes, one from after its film, none of these films.
    """
    assert config.notes is not None and config.text_encoder is not None, "checked by the config"
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
    mean, deviation = fit_scale(vectors[train])
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

    As the films' own (finetune/findings.py): those of train subjects come from heads that have not seen them.
    """
    assert config.text_encoder is not None
    labelled = read_films(config.features)
    ids = labelled.table["dicom_id"].tolist()
    every, has, _ = note_vectors(notes, config.text_encoder, ids, cache)
    train = np.intersect1d(labelled.rows("train"), np.flatnonzero(has))
    val = np.intersect1d(labelled.rows("val"), np.flatnonzero(has))
    if not len(train) or not len(val):
        raise UserError(f"{config.notes}: no labelled train or val film has a note; set text=features")
    mean, deviation = fit_scale(every[train])
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
