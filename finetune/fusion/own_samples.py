"""Samples of a table of films outside MIMIC: a row per film, whose record is the table's columns.

The record of a film is a series of one step, so that every model of record and film takes it as it is: an LSTM over one
step is a layer on the columns. Models and settings that read hours are refused by name.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from configs import UserError
from ehr_features.schema import FRONTAL
from finetune.config import FuseConfig
from finetune.fusion.samples import VIEWS, Samples
from finetune.labelled import Films, check_splits
from finetune.layouts import read_layout
from finetune.probe.methods import own_record

if TYPE_CHECKING:
    from pretrain.store import Store


def check_model(config: FuseConfig, kind: Any) -> None:
    """Refuse a model that reads what a table of films has not. Raises: UserError."""
    assert config.films is not None
    if getattr(kind, "many_films", False):
        raise UserError(
            f"model={config.model} reads the films before a prediction and the hours between them; a table of films "
            "has no hourly series: take medfuse, attention or concat (film and columns), film_only or record_lstm"
        )
    if getattr(kind, "reads_tokens", False):
        raise UserError(f"model={config.model} reads notes or tokens of task=findings; it goes with features")
    if not config.groups and not getattr(kind, "needs_film", False):
        raise UserError(
            f"model={config.model} reads a record: name columns of {config.films.table} with 'groups=[age,sex]', or "
            "take model=film_only"
        )


def load_table(config: FuseConfig, readable: Store | None) -> tuple[Samples, Films]:
    """The samples of a table.

    Args:
        readable: the store; other films count as absent; None: all are readable.
    Raises: UserError: a fault of the table, a group that is no column, a split without films.
    """
    assert config.films is not None
    films = read_layout(config.films, find=False)
    films = films.keep(films.table["view"].isin(FRONTAL).to_numpy(dtype=bool), "not frontal")
    check_splits(films)
    table, num = films.table, len(films)
    record, _ = own_record(config.films, config.groups, films, films.rows("train"))
    here = np.array([readable is None or film in readable for film in table["dicom_id"]], bool)
    view = table["view"].to_numpy(object)[:, None] == np.array(VIEWS, object)
    known = [name for name in ("age_years", "code_status") if name in table]
    return Samples(
        table=table[["subject_id", "split", "dicom_id", *known]].assign(sample_id=np.arange(num)),
        labels=films.evaluated(np.arange(num)),
        names=films.names,
        values=record.astype(np.float32) if config.groups else np.zeros((num, 1), np.float32),
        start=np.arange(num, dtype=np.int64),
        length=np.full(num, int(bool(config.groups)), np.int32),
        film_ids=table["dicom_id"].tolist(),
        films=np.where(here, np.arange(num), -1).astype(np.int32)[:, None],
        hours=np.zeros((num, 1), np.float32),
        views=view.astype(np.float32),
    ), films


def read_only(samples: Samples) -> Samples:
    """The samples whose films are the readable ones alone, in the order of `film_ids`."""
    present = np.unique(samples.films[samples.films >= 0])
    place = np.full(len(samples.film_ids) + 1, -1, np.int32)
    place[present] = np.arange(len(present))
    ids = [samples.film_ids[i] for i in present]
    views = samples.views[present] if len(present) else np.zeros((1, len(VIEWS)), np.float32)
    return replace(samples, films=place[samples.films], film_ids=ids, views=views)


def sources(config: FuseConfig) -> list[Path]:
    """The table, whose content identifies a run's input."""
    assert config.films is not None
    return [Path(config.films.table)]
