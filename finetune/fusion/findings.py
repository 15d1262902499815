"""First stage of the film branch: logistic heads for the findings on frozen features of all labelled train films.

Many films have finding labels, few stays have an outcome. The heads reduce a film to one logit per finding, from which
an outcome can be learned with few stays. MedFuse (arXiv:2207.07027) trains the whole encoder on the 14 findings first;
here only the heads are trained, and an encoder is fine-tuned in the second stage, if at all.

The logits of train films are cross-fitted over subjects: a head is overconfident on the films it was fitted on, and a
model trained on such logits would rely on films too much.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from configs import UserError
from ehr_features.progress import Bar
from finetune.encoders import Features, Frozen, film_features
from finetune.fusion.models import Head
from finetune.labelled import evaluation_labels, read_films, training_labels
from finetune.metrics import macro_auroc
from pretrain import run

if TYPE_CHECKING:
    from pretrain.store import Store

PENALTIES = (1e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)  # penalties on the sum of squared weights, added to the mean loss
FOLDS = 5


def labelled_films(
    features: str | Path, frozen: Frozen, store: Store, cache: Path | None
) -> dict[str, tuple[Features, NDArray[np.float32], NDArray[np.int64]]]:
    """The labelled frontal films of train and val: split -> features by pool, labels (M, 14), subjects (M,).

    Raises: UserError: no labelled film in one of them.
    """
    films = read_films(features).in_store(store)
    out = {}
    for split, label in (("train", training_labels), ("val", evaluation_labels)):
        rows = films.rows(split)
        if not len(rows):
            raise UserError(f"{features}: no labelled {split} films for the findings; set film=features")
        ids = films.table["dicom_id"].iloc[rows].tolist()
        subjects = films.table["subject_id"].iloc[rows].to_numpy(np.int64)
        out[split] = (film_features(frozen, store, ids, cache=cache), label(films.labels.iloc[rows]), subjects)
    return out


def fit(
    train: tuple[Tensor, NDArray[np.float32]],
    val: tuple[Tensor, NDArray[np.float32]],
    subjects: NDArray[np.int64],
    films: Tensor,
    of: NDArray[np.int64],
) -> tuple[nn.Linear, Tensor, dict[str, float]]:
    """Fit one logistic head a finding; the penalty is chosen by the macro AUROC on validation.

    Args:
        train: standardised features (M, D) and labels (M, L), NaN unknown; labels of one class are left out.
        subjects: (M,) of the train films.
        films: (P, D) standardised features of the films to describe.
        of: (P,) their subjects.
    Returns: a linear layer; the logits (P, L) of `films`, cross-fitted for train subjects and standardised over the
        cross-fitted train films; penalty and AUROC.
    """
    x, y = train[0].float(), torch.from_numpy(train[1])
    both = ((y == 1).sum(0) > 0) & ((y == 0).sum(0) > 0)
    y = y[:, both]
    fits = len(PENALTIES) + FOLDS
    with Bar("heads of the findings", fits, "fits", shown=run.is_main(), after=5) as bar:
        heads = []
        for penalty in PENALTIES:
            heads.append(_logistic(x, y, penalty))
            bar.advance()
        logits = torch.stack([val[0].float() @ weight.T + bias for weight, bias in heads], dim=1)  # (N, H, L)
        aurocs = macro_auroc(val[1][:, both.numpy()], logits.numpy())
        chosen = int(aurocs.argmax())
        weight, bias = heads[chosen]
        seen, described = _folds(subjects), _folds(of)
        unseen, ours = x @ weight.T + bias, films.float() @ weight.T + bias
        known = torch.from_numpy(np.isin(of, subjects))
        for fold in range(FOLDS):
            bar.advance()
            if not (seen == fold).any() or (seen == fold).all():
                continue
            w, b = _logistic(x[seen != fold], y[seen != fold], PENALTIES[chosen])
            unseen[seen == fold] = x[seen == fold] @ w.T + b
            rows = (described == fold) & known
            ours[rows] = films.float()[rows] @ w.T + b
    deviation, mean = torch.std_mean(unseen, dim=0)
    deviation = deviation.clamp(min=1e-6)
    layer = Head(x.shape[1], len(weight))
    with torch.no_grad():
        layer.weight.copy_(weight / deviation[:, None])
        layer.bias.copy_((bias - mean) / deviation)
    about = {"penalty": PENALTIES[chosen], "val_auroc": float(aurocs[chosen])}
    return layer.requires_grad_(False), (ours - mean) / deviation, about


def _folds(subjects: NDArray[np.int64]) -> Tensor:
    """A fold for each film, by its subject."""
    unique, inverse = np.unique(subjects, return_inverse=True)
    folds = [int(hashlib.sha256(str(subject).encode()).hexdigest(), 16) % FOLDS for subject in unique.tolist()]
    return torch.tensor(folds, dtype=torch.int64)[torch.from_numpy(inverse)]


def _logistic(x: Tensor, y: Tensor, penalty: float) -> tuple[Tensor, Tensor]:
    """Weights (L, D), biases (L,) at the minimum of each label's mean loss + penalty x its sum of squared weights."""
    known = ~y.isnan()
    target, count = y.nan_to_num(), known.sum(0).clamp(min=1)
    weight = torch.zeros(y.shape[1], x.shape[1], requires_grad=True)
    bias = torch.zeros(y.shape[1], requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=60, history_size=10, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        losses = functional.binary_cross_entropy_with_logits(x @ weight.T + bias, target, reduction="none")
        loss = (losses * known / count).sum() + penalty * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return weight.detach(), bias.detach()
