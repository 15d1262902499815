"""Metrics against scikit-learn, hand-worked tables, and a loop over resamples."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit, logit
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score, brier_score_loss, f1_score, roc_auc_score
from threadpoolctl import threadpool_info, threadpool_limits

from configs import UserError
from finetune.config import ProbeConfig
from finetune.metrics import evaluate, f1_thresholds, macro
from finetune.probe import watch
from finetune.resample import Label, calibrate, multiplicities
from finetune.score import score


def value(table: pd.DataFrame, metric: str, label: str = "0", column: str = "value") -> float:
    return table[(table["label"] == label) & (table["metric"] == metric)][column].item()


@st.composite
def tied_sample(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    n = draw(st.integers(2, 40))
    y = np.array(draw(st.lists(st.integers(0, 1), min_size=n, max_size=n)), dtype=float)
    y[:2] = [0, 1]
    steps = draw(st.integers(1, 12))  # few steps: many ties
    s = np.array(draw(st.lists(st.integers(0, steps), min_size=n, max_size=n))) / steps
    return y, s


@given(tied_sample())
@settings(max_examples=200, deadline=None)
def test_values_equal_scikit_learn_with_ties(sample: tuple[np.ndarray, np.ndarray]) -> None:
    y, s = sample
    table = evaluate(y, s, samples=0, thresholds=[0.5])
    assert value(table, "auroc") == pytest.approx(roc_auc_score(y, s), abs=1e-12)
    assert value(table, "auprc") == pytest.approx(average_precision_score(y, s), abs=1e-12)
    assert value(table, "brier") == pytest.approx(brier_score_loss(y, s), abs=1e-12)
    assert value(table, "f1") == pytest.approx(f1_score(y, s >= 0.5), abs=1e-12)
    assert value(table, "prevalence") == pytest.approx(y.mean(), abs=1e-12)


def test_calibration_at_the_numbers_limit_is_a_fit_without_a_warning() -> None:
    y = np.array([1, 1, 1, 1, 0, 1, 0, 0, 1, 0, 0, 0.0])
    s = np.array([0.999, 0, 0.75, 0.25, 0, 0.25, 0.999, 0.001, 0.5, 0.999, 0.25, 0.5])
    intercept, slope = calibrate(y, s)
    x = logit(np.clip(s, 1e-6, 1 - 1e-6))
    residual = y - expit(intercept + slope * x)
    assert abs(residual.sum()) < 1e-3 and abs((residual * x).sum()) < 1e-2  # the likelihood's equations


@given(tied_sample(), st.integers(0, 2**32 - 1))
@settings(max_examples=50, deadline=None)
def test_each_resample_equals_scikit_learn_on_repeated_rows(sample: tuple[np.ndarray, np.ndarray], seed: int) -> None:
    y, s = sample
    group = np.random.default_rng(seed).integers(0, max(1, len(y) // 2), size=len(y))
    group = np.unique(group, return_inverse=True)[1]
    counts = np.concatenate(list(multiplicities(group.max() + 1, 5, seed)), axis=1)
    drawn = Label.of(y, s, group, group.max() + 1, 0.5).statistics(counts)
    for r in range(5):
        rows = np.repeat(np.arange(len(y)), counts[group, r].astype(int))
        if len(np.unique(y[rows])) < 2:
            assert all(np.isnan(drawn[metric][r]) for metric in drawn)
            continue
        assert drawn["auroc"][r] == pytest.approx(roc_auc_score(y[rows], s[rows]), abs=1e-12)
        assert drawn["auprc"][r] == pytest.approx(average_precision_score(y[rows], s[rows]), abs=1e-12)
        assert drawn["brier"][r] == pytest.approx(brier_score_loss(y[rows], s[rows]), abs=1e-12)
        assert drawn["f1"][r] == pytest.approx(f1_score(y[rows], s[rows] >= 0.5), abs=1e-12)


def test_a_hand_worked_table() -> None:
    # scores from high to low: 1 0 1 0 0; pairs won: 3 + 2 of 6; precision at the positives: 1, 2/3
    y, p = np.array([1, 0, 1, 0, 0.0]), np.array([0.9, 0.8, 0.6, 0.4, 0.2])
    table = evaluate(y, p, names=["edema"], samples=0, thresholds=[0.5])
    expected = {
        "auroc": 5 / 6,
        "auprc": (1 + 2 / 3) / 2,
        "brier": (0.01 + 0.64 + 0.16 + 0.16 + 0.04) / 5,
        "sensitivity_at_specificity_90": 0.5,  # no false positive allowed of 3: only the first positive
        "f1": 2 * 2 / (3 + 2),
        "sensitivity": 1.0,
        "specificity": 2 / 3,
        "calibration_error": (0.1 + 0.8 + 0.4 + 0.4 + 0.2) / 5,  # each score in a bin of its own
    }
    for metric, wanted in expected.items():
        assert value(table, metric, "edema") == pytest.approx(wanted, abs=1e-12), metric
        assert value(table, metric, "macro") == pytest.approx(wanted, abs=1e-12), metric


def test_sensitivity_at_specificity_is_the_best_point_of_the_roc_curve() -> None:
    rng = np.random.default_rng(3)
    y = (rng.random(300) < 0.3).astype(float)
    s = np.round(rng.normal(size=300) + y, 1)
    best = max((s[y == 1] >= cut).mean() for cut in [*np.unique(s), np.inf] if (s[y == 0] >= cut).mean() <= 0.1 + 1e-12)
    assert value(evaluate(y, s, samples=0), "sensitivity_at_specificity_90") == pytest.approx(best, abs=1e-12)


def test_calibration_is_the_logistic_fit_of_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    p = rng.random(400)
    y = (rng.random(400) < p**2).astype(float)
    x = logit(np.clip(p, 1e-6, 1 - 1e-6))[:, None]
    fit = LogisticRegression(C=np.inf, tol=1e-10, max_iter=1000).fit(x, y)
    assert calibrate(y, p) == pytest.approx((fit.intercept_[0], fit.coef_[0, 0]), abs=1e-5)


def test_the_one_step_calibration_interval_is_near_that_of_refitting() -> None:
    rng = np.random.default_rng(0)
    p = rng.random(500)
    y = (rng.random(500) < p).astype(float)
    table = evaluate(y, p, samples=300)
    refitted = []
    for counts in multiplicities(500, 300, 0):
        refitted += [calibrate(np.repeat(y, c.astype(int)), np.repeat(p, c.astype(int)))[1] for c in counts.T]
    low, high = np.quantile(refitted, [0.025, 0.975])
    assert value(table, "calibration_slope", column="low") == pytest.approx(low, abs=0.05)
    assert value(table, "calibration_slope", column="high") == pytest.approx(high, abs=0.05)


def test_a_label_with_one_class_is_null_with_its_reason_and_out_of_the_macro() -> None:
    y = np.array([[0, 1], [0, 0], [0, 1], [0, 0]], dtype=float)
    p = np.array([[0.1, 0.9], [0.2, 0.1], [0.3, 0.8], [0.4, 0.3]])
    table = evaluate(y, p, names=["none", "both"], samples=50)
    assert np.isnan(value(table, "auroc", "none"))
    assert value(table, "auroc", "none", "reason") == "one class only: 0 positives of 4"
    assert value(table, "auroc", "macro") == value(table, "auroc", "both") == 1.0


def test_a_resample_with_one_class_leaves_the_label_out_of_its_macro() -> None:
    draws = np.array([[0.8, np.nan, 0.1], [0.6, 1.0, 0.1], [np.nan, np.nan, 0.1]])
    got = macro(draws, np.array([True, True, False]))
    np.testing.assert_array_equal(got, [0.8, 0.8, np.nan])


def test_no_interval_where_many_resamples_have_one_class() -> None:
    y, p = np.zeros(60), np.linspace(0, 1, 60)
    y[40] = 1
    table = evaluate(y, p, samples=200)  # a resample misses the only positive with probability 1/e
    assert value(table, "auroc") == pytest.approx(40 / 59) and np.isnan(value(table, "auroc", column="low"))
    assert "5% of the resamples" in value(table, "auroc", column="reason")
    y[[20, 50, 55, 58]] = 1  # 5 positives: e^-5
    assert value(evaluate(y, p, samples=200), "auroc", column="low") > 0


def test_missing_labels_are_left_out() -> None:
    rng = np.random.default_rng(1)
    y, p = (rng.random((60, 2)) < 0.5).astype(float), rng.random((60, 2))
    y[::3, 0] = np.nan
    table = evaluate(y, p, samples=20)
    known = ~np.isnan(y[:, 0])
    assert value(table, "auroc") == pytest.approx(roc_auc_score(y[known, 0], p[known, 0]), abs=1e-12)
    assert value(table, "auroc", column="n") == 40
    assert value(table, "auroc", "macro", "n") == 60


def test_a_score_of_a_row_without_a_label_does_not_matter() -> None:
    y, p = np.array([0, 1, 0, 1, np.nan]), np.array([0.1, 0.6, 0.7, 0.8, np.nan])
    pd.testing.assert_frame_equal(evaluate(y, p, samples=9, seed=1), evaluate(y, np.nan_to_num(p), samples=9, seed=1))
    assert value(evaluate(y, p, samples=0), "auroc") == 0.75


def test_scores_that_are_no_probabilities_have_ranks_only() -> None:
    table = evaluate([0, 1, 0, 1.0], [-3, 5, 2, 1.0], samples=0)
    assert value(table, "auroc") == 0.75
    assert np.isnan(value(table, "brier"))
    for label in ("0", "macro"):
        assert value(table, "brier", label, "reason") == "scores outside [0, 1] are not probabilities"
    mixed = evaluate(np.eye(2)[[0, 1, 0, 1]], np.array([[3, 0.1], [0, 0.7], [1, 0.2], [1, 0.9]]), samples=5)
    assert np.isnan(value(mixed, "brier")) and value(mixed, "brier", "1") > 0
    assert np.isnan(value(mixed, "brier", "macro")) and value(mixed, "auroc", "macro") > 0.9


def test_tables_with_pandas_own_missing_values_are_taken() -> None:
    y = pd.DataFrame({"a": pd.array([1, 0, None, 1], dtype="Int64"), "b": [True, False, True, True]})
    p = np.array([[0.9, 0.4], [0.8, 0.1], [0.2, 0.6], [0.7, 0.5]])
    wanted = evaluate([[1, 1], [0, 0], [np.nan, 1], [1, 1]], p, names=["a", "b"], samples=8)
    pd.testing.assert_frame_equal(evaluate(y, pd.DataFrame(p), names=["a", "b"], samples=8), wanted)


def test_intervals_resample_subjects_not_rows() -> None:
    rng = np.random.default_rng(0)
    y = (rng.random(40) < 0.5).astype(float)
    p = np.clip(0.3 * y + 0.6 * rng.random(40), 0, 1)
    once = evaluate(y, p, groups=np.arange(40), samples=400)
    twice = evaluate(np.tile(y, 5), np.tile(p, 5), groups=np.tile(np.arange(40), 5), samples=400)  # five films each
    pd.testing.assert_frame_equal(
        once.query("metric != 'x'")[["value", "low", "high"]], twice[["value", "low", "high"]], atol=1e-9
    )
    rows = evaluate(np.tile(y, 5), np.tile(p, 5), samples=400)
    wide = value(twice, "auroc", column="high") - value(twice, "auroc", column="low")
    narrow = value(rows, "auroc", column="high") - value(rows, "auroc", column="low")
    assert wide > 1.7 * narrow  # about sqrt(5)


def test_groups_may_be_text_and_the_same_seed_gives_the_same_interval() -> None:
    y, p = [0, 1, 0, 1, 1.0], [0.2, 0.4, 0.6, 0.8, 0.5]
    a = evaluate(y, p, groups=["a", "a", "b", "c", "d"], samples=30, seed=7)
    b = evaluate(y, p, groups=[5, 5, 1, 2, 3], samples=30, seed=7)
    pd.testing.assert_frame_equal(a, b)


def test_the_draws_do_not_depend_on_how_many_are_held_at_a_time() -> None:
    small = np.concatenate(list(multiplicities(10, 9, 3, rows=2_000_000)), axis=1)
    whole = np.concatenate(list(multiplicities(10, 9, 3)), axis=1)
    np.testing.assert_array_equal(small, whole)
    assert (whole.sum(0) == 10).all()


def test_scores_of_noise_are_at_one_half_within_their_interval() -> None:
    rng = np.random.default_rng(5)
    table = evaluate((rng.random((500, 3)) < 0.2).astype(float), rng.random((500, 3)), samples=300)
    assert value(table, "auroc", "macro", "low") < 0.5 < value(table, "auroc", "macro", "high")


def test_the_f1_threshold_is_the_best_of_all() -> None:
    rng = np.random.default_rng(2)
    y = (rng.random(80) < 0.3).astype(float)
    s = np.round(rng.random(80) + 0.5 * y, 1)
    cut = f1_thresholds(y, s)[0]
    assert f1_score(y, s >= cut) == max(f1_score(y, s >= c) for c in np.unique(s))
    assert np.isnan(f1_thresholds(np.zeros(5), np.arange(5.0))[0])


def test_separated_classes_have_no_calibration_slope() -> None:
    table = evaluate([0, 0, 1, 1.0], [0.1, 0.2, 0.8, 0.9], samples=10)
    assert np.isnan(value(table, "calibration_slope"))
    assert "separate" in value(table, "calibration_slope", column="reason")


@pytest.mark.parametrize(
    ("labels", "scores", "more", "says"),
    [
        ([0, 1], [0.1, 0.2, 0.3], {}, r"labels are \(2, 1\) and scores \(3, 1\)"),
        ([0, 2], [0.1, 0.2], {}, "label is not 0, 1 or NaN: 1 of them, the first in row 1"),
        ([0, 1], [0.1, np.nan], {}, "score is not finite"),
        ([0, 1], [0.1, 0.2], {"groups": [1, None]}, "1 of them missing"),
        ([0, 1], [0.1, 0.2], {"names": ["macro"]}, "called `macro`"),
        ([], [], {}, "at least one"),
    ],
)
def test_bad_input_says_what_and_where(labels: list, scores: list, more: dict, says: str) -> None:
    with pytest.raises(UserError, match=says):
        evaluate(labels, scores, **more)


def test_intervals_use_one_thread_of_blas(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small matrices on many threads took 2.9 times the processor seconds."""
    seen = []
    statistics = Label.statistics

    def watched(self: Label, *given: Any) -> Any:
        seen.extend(of["num_threads"] for of in threadpool_info() if of["user_api"] == "blas")
        return statistics(self, *given)

    monkeypatch.setattr(Label, "statistics", watched)
    with threadpool_limits(2, user_api="blas"):
        evaluate([0, 1, 1, 0], [0.1, 0.2, 0.9, 0.4], samples=3)
    assert seen and set(seen) == {1}


@pytest.mark.parametrize(
    ("labels", "scores", "says"),
    [
        ([0, 2], [0.1, 0.2], r"labels\.npy: label is not 0, 1 or NaN"),
        ([0, 1], [0.1, np.nan], r"scores\.npy: score is not"),
    ],
)
def test_score_names_the_file_of_a_wrong_value(
    tmp_path: Path, labels: list[float], scores: list[float], says: str
) -> None:
    for name, values in (("labels", labels), ("scores", scores)):
        np.save(tmp_path / f"{name}.npy", np.array(values)[:, None])
    with pytest.raises(UserError, match=says):
        score(str(tmp_path / "labels.npy"), str(tmp_path / "scores.npy"), samples=0)


@pytest.mark.parametrize(("method", "head"), [("logistic", "logistic"), ("linear", "linear"), ("knn", "linear")])
def test_a_watch_fits_the_head_of_its_config_and_knn(method: str, head: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def on_features(config: ProbeConfig, *_: Any) -> Any:
        asked.append(config.method)
        return lambda *_: SimpleNamespace(chosen={"val_auroc": 0.5, "pool": "avg", "neighbours": 5})

    monkeypatch.setattr(watch, "on_features", on_features)
    monkeypatch.setattr(watch, "film_features", lambda *_: None)
    films: Any = SimpleNamespace(table=pd.DataFrame({"dicom_id": ["a"]}), own=None, rows=lambda split: split)
    config = ProbeConfig.model_construct(method=method, features=None, seed=0)
    values = watch.probed(config, films, SimpleNamespace(folder=None), None)  # type: ignore[arg-type]
    assert asked == [head, "knn"] and set(values) == {"linear/auroc", "linear/pool", "knn/auroc", "knn/neighbours"}
