"""Stage one of the film branch: logits of findings, cross-fitted over subjects."""

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from finetune.fusion import findings


def world(seed: int, num: int, width: int = 60) -> tuple[torch.Tensor, np.ndarray, np.ndarray]:
    """Random features and labels, one film per subject: nothing can be learned, much can be memorised."""
    rng = np.random.default_rng(seed)
    labels = (rng.random((num, 1)) < 0.5).astype(np.float32)
    return torch.from_numpy(rng.normal(size=(num, width)).astype(np.float32)), labels, np.arange(num) + 1000 * seed


def test_logits_of_train_films_come_from_heads_that_have_not_seen_them() -> None:
    x, y, subjects = world(1, 150)
    val = world(2, 400)
    layer, logits, _ = findings.fit((x, y), val[:2], subjects, x, subjects)
    memorised = roc_auc_score(y[:, 0], layer(x)[:, 0].numpy())
    cross_fitted = roc_auc_score(y[:, 0], logits[:, 0].numpy())
    assert memorised > 0.75, "the head that has seen the films knows them by heart"
    assert cross_fitted < 0.62


def test_films_of_other_subjects_get_the_head_of_all_train_films() -> None:
    x, y, subjects = world(1, 150)
    new, _, others = world(3, 20)
    layer, logits, about = findings.fit((x, y), world(2, 400)[:2], subjects, new, others)
    torch.testing.assert_close(logits, layer(new), rtol=1e-4, atol=1e-4)
    assert about["penalty"] in findings.PENALTIES


def test_heads_are_the_minimum_that_scikit_learn_finds() -> None:
    x, y, _ = world(1, 300, width=20)
    y[::7] = np.nan
    known = ~np.isnan(y[:, 0])
    for penalty in (0.01, 0.3):
        weight, bias = findings._logistic(x, torch.from_numpy(y), penalty)
        theirs = LogisticRegression(C=1 / (2 * penalty * known.sum()), tol=1e-8, max_iter=1000)
        theirs.fit(x.numpy()[known].astype(np.float64), y[known, 0])
        np.testing.assert_allclose((x @ weight.T + bias)[:, 0], theirs.decision_function(x), atol=2e-3)


def test_all_films_of_a_subject_are_in_one_fold() -> None:
    subjects = np.array([7, 8, 7, 9, 8, 7])
    folds = findings._folds(subjects)
    assert len(set(folds[subjects == 7].tolist())) == 1 and len(set(folds[subjects == 8].tolist())) == 1
