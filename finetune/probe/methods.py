"""The methods of `probe`: fit on train rows, choose on val rows, return logits of any rows.

Input: films, a config, and the features (of an encoder, raw pixels, or the record). Output: a `Learner`, which is also
used for fractions of the training set and for shifts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from configs import UserError
from ehr_features import static
from ehr_features.own_films.config import TableConfig
from ehr_features.own_films.record import check_groups, encode_group
from finetune.encoders import Features
from finetune.guard import refuse_discharge
from finetune.labelled import Films
from finetune.metrics import unlearned
from finetune.probe import heads
from finetune.probe.heads import Data, LinearHead, Say, boosting, knn, logistic

if TYPE_CHECKING:
    from finetune.config import ProbeConfig

Rows = NDArray[np.intp]


class Fitted(NamedTuple):
    """A fitted method."""

    predict: Callable[[Rows], NDArray[np.float64]]  # rows -> logits (n, L)
    chosen: dict[str, Any]  # chosen on validation, with its AUROC
    head: LinearHead | None = None  # a linear head, if the method has one
    export: Callable[[Path], None] | None = None  # writes the tuned encoder into a run folder
    unlearned: dict[str, str] = {}  # labels whose logits are NaN: why


Learner = Callable[[Rows, Rows, int], Fitted]  # train rows, val rows, seed


GRIDS = {
    "linear": ("pools", "lrs", "weight_decays", "epochs", "patience", "batch_size"),
    "logistic": ("pools", "strengths"),
    "knn": ("pools", "neighbours"),
    "attentive": ("tune",),
    "finetune": ("tune",),
}


def grid(config: ProbeConfig) -> dict[str, Any]:
    """A method's search space and training length, by which runs are compared."""
    return config.model_dump(mode="json", include=set(GRIDS.get(config.method, ())))


def learned_only(config: ProbeConfig, films: Films, learn: Learner) -> Learner:
    """The learner, with NaN for labels that it cannot learn. Raises: UserError: there is no other label."""

    def careful(train_rows: Rows, val_rows: Rows, seed: int) -> Fitted:
        why = unlearned(films.trained(train_rows, config.uncertain, config.empty), films.names)
        if len(why) == len(films.names):
            raise UserError(f"no label has both classes among {len(train_rows)} train films, so nothing can be learned")
        fit, absent = learn(train_rows, val_rows, seed), np.isin(films.names, list(why))
        return fit._replace(predict=lambda rows: np.where(absent, np.nan, fit.predict(rows)), unlearned=why)

    return careful


def val_labels(films: Films, rows: Rows, trained: NDArray[np.float32]) -> NDArray[np.float32]:
    """Validation labels by the evaluation policy, without those that were not learned."""
    labels = films.evaluated(rows)
    labels[:, np.isin(films.names, list(unlearned(trained, films.names)))] = np.nan
    return labels


def at(features: Features, rows: Rows) -> Features:
    return {pool: value[rows] for pool, value in features.items()}


def on_features(
    config: ProbeConfig, films: Films, given: Features | Callable[[Rows], Features], device: str, say: Say
) -> Learner:
    """Heads on fixed features, one row per film; if `given` is a function, it makes them, fitted on the train rows."""
    balanced = config.class_weights == "balanced"

    def learn(train_rows: Rows, val_rows: Rows, seed: int) -> Fitted:
        features = given(train_rows) if callable(given) else given
        labels = films.trained(train_rows, config.uncertain, config.empty)
        train = Data(at(features, train_rows), labels)
        val = Data(at(features, val_rows), val_labels(films, val_rows, labels))
        if config.method == "logistic":
            head, chosen = logistic(train, val, pools=config.pools, strengths=config.strengths, balanced=balanced)
        elif config.method == "knn":
            other, chosen = knn(train, val, pools=config.pools, neighbours=config.neighbours, device=device)
            return Fitted(lambda rows: other(at(features, rows)), chosen)
        elif config.method == "boosting":
            other, chosen = boosting(train, val, seed=seed, balanced=balanced)
            return Fitted(lambda rows: other(at(features, rows)), chosen)
        else:
            head, chosen = heads.linear(
                train,
                val,
                pools=config.pools,
                lrs=config.lrs,
                weight_decays=config.weight_decays,
                epochs=config.epochs,
                patience=config.patience,
                batch_size=config.batch_size,
                seed=seed,
                balanced=balanced,
                device=device,
                say=say,
            )
        return Fitted(lambda rows: head(at(features, rows)), chosen, head)

    return learn


def record(config: ProbeConfig, films: Films, train_rows: Rows) -> Features:
    """Record features of each film, without its pixels: columns of `groups`, fitted on the train rows.

    Raises: UserError: a group that is known only at discharge, or missing for these films.
    """
    if films.own is not None:
        assert config.films is not None
        array, names = own_record(config.films, config.groups, films, train_rows)
    else:
        refuse_discharge(config.groups, static.available_at(config.groups))
        if lacking := [group for group in config.groups if not static.has(group, films.table.columns)]:
            rest = [group for group in config.groups if group not in lacking]
            raise UserError(
                f"groups: nothing of {', '.join(lacking)} is known of these films; groups=[{','.join(rest)}]"
            )
        split = np.where(np.isin(np.arange(len(films)), train_rows), "train", "test")
        array, names, _ = static.encode(films.table.assign(split=split), config.groups)
    if not names:
        raise UserError("groups: the metadata baseline needs at least one group, e.g. groups=[sex,age,view]")
    return {"avg": array}


def own_record(
    config: TableConfig, groups: Sequence[str], films: Films, train_rows: Rows
) -> tuple[NDArray[Any], list[str]]:
    """Columns of a table outside MIMIC as the record of its films (N, S), and their S names, fitted on the train rows.

    Raises: UserError: a group that is no column of the table, a label, or known only after the film.
    """
    assert films.own is not None
    refuse_discharge(groups, dict.fromkeys(config.outcomes, "discharge"))
    check_groups(films.own, groups, config.table)
    if labels := [group for group in groups if group in films.names]:
        raise UserError(f"groups: {', '.join(labels)} is a label of {config.table}, and no input; leave it out")
    rows = films.table["row"].to_numpy(np.intp)
    train = np.isin(np.arange(len(films.own.films)), rows[train_rows])
    parts = [encode_group(films.own, group, train, config.categories, config.table) for group in groups]
    names = [name for part in parts for name in part[1]]
    return np.concatenate([values for values, _ in parts], axis=1)[rows] if parts else np.zeros((len(rows), 0)), names
