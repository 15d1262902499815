"""Intervals and p: compared with scipy's tests, and on simulated trainings with known truth."""

from itertools import product

import numpy as np
import pytest
from scipy import stats

from benchmarks.intervals import OWN, RUNS, SDS, coverage, influence, intervals, missed, trainings
from finetune.compare import paired
from finetune.metrics import distribution, evaluate
from finetune.resample import Label, spread


def still(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Trainings whose values are equal in all resamples of subjects."""
    return values, np.repeat(values[:, None], 9, axis=1)


def test_without_subjects_it_is_students_test_of_pairs_and_between_welch_and_pooled_of_two_samples() -> None:
    rng = np.random.default_rng(0)
    for n in (3, 5, 10):
        a, b = rng.normal(0.8, 0.01, n), rng.normal(0.8, 0.02, n)
        gap = float(a.mean() - b.mean())
        assert spread([still(a - b)]).p(gap) == pytest.approx(stats.ttest_rel(a, b).pvalue)
        low, high = spread([still(a)]).around(float(a.mean()))
        assert (low, high) == pytest.approx(stats.t.interval(0.95, n - 1, a.mean(), stats.sem(a)))
        ends = [stats.ttest_ind(a, b, equal_var=equal).pvalue for equal in (True, False)]
        assert min(ends) - 1e-9 <= spread([still(a), still(-b)]).p(gap) <= max(ends) + 1e-9


def test_one_training_a_side_varies_over_subjects_alone() -> None:
    draws = np.random.default_rng(0).normal(0.8, 0.02, (2, 4000))
    got = spread([(np.array([0.8]), draws[:1]), (np.array([-0.7]), -draws[1:])])
    assert got.variance == pytest.approx(2 * 0.02**2, rel=0.1)
    assert got.p(0.1) == pytest.approx(2 * stats.t.sf(0.1 / got.variance**0.5, 3999))  # 4,000 resamples


def test_a_comparison_on_few_positives_has_few_degrees_of_freedom() -> None:
    rng = np.random.default_rng(0)
    y = (np.arange(60) < 6).astype(float)[:, None]
    a, b = (rng.normal(size=(1, 60, 1)) + gain * y for gain in (1.5, 0.5))
    row = paired(y, a, b, groups=np.arange(60), samples=1000).iloc[0]
    df = 1 / (1 / (2 * 6 - 2) + 1 / 999)
    error = (row["high"] - row["difference"]) / stats.t.ppf(0.975, df)
    assert row["p"] == pytest.approx(2 * stats.t.sf(abs(row["difference"]) / error, df), rel=1e-3)


def test_three_pairs_of_one_sign_are_no_proof() -> None:
    rng = np.random.default_rng(0)
    y = (rng.random((400, 1)) < 0.4).astype(float)
    shared = rng.normal(size=y.shape)
    a, b = (np.stack([shared + (1 + k + better) * y for k in (0, 0.2, 0.4)]) for better in (0.02, 0))
    a[2] += 0.3 * y  # one of the three is much better, all are a little
    row = paired(y, a, b, groups=np.arange(400), same_seeds=True, samples=200).iloc[0]
    assert row["low"] < 0 < row["high"] and row["p"] > 0.25 and row["claim"] == "method"


def test_two_methods_without_variance_differ_by_nothing_or_have_no_p() -> None:
    assert spread([still(np.zeros(3))]).p(0.0) == 1
    assert np.isnan(spread([still(np.full(3, 0.1))]).p(0.1))


def test_the_simulation_judges_the_intervals_of_compare() -> None:
    """Up to the error of 4,000 resamples (1% of the half-width) and terms of second order."""
    for runs, same_seeds in ((3, False), (3, True), (5, True)):
        y, a, b, _ = trainings(np.random.default_rng(runs), runs, 200, 0.008, 0.02, 0.5)
        y, a, b = y[:, :12], a[:, :, :12], b[:, :, :12]  # each label is a replicate
        table = paired(y, a, b, groups=np.arange(200), samples=4000, same_seeds=same_seeds).iloc[1:]
        (values, of), (others, theirs) = influence(y, a), influence(y, b)
        p, low, high = intervals(y, values, of, others, theirs, same_seeds=same_seeds)
        np.testing.assert_allclose(table["difference"], (low + high) / 2, atol=1e-12)
        ratio = ((table["high"] - table["low"]) / (high - low)).to_numpy()
        assert abs(ratio.mean() - 1) < 0.02 and abs(ratio - 1).max() < 0.08, ratio
        np.testing.assert_allclose(table["p"], p, atol=0.03)


@pytest.mark.slow
@pytest.mark.parametrize("sd", SDS)
@pytest.mark.parametrize(("subjects", "replicates"), [(100, 3000), (300, 2000), (1000, 1000), (3000, 600)])
def test_p_is_below_5_percent_and_the_interval_misses_in_3_to_7_percent(
    subjects: int, replicates: int, sd: float
) -> None:
    """In each setting: p where the methods are equal, the interval where they differ, with own and with equal seeds.

    Outside only by what sampling explains (99.9%).
    """
    low, high = stats.binom.ppf([0.001, 0.999], replicates * len(OWN), [0.03, 0.07]) / replicates / len(OWN)
    for gap in (0, 0.02):
        of = [missed(subjects, sd, gap=gap, own=own, replicates=replicates, seed=0) for own in OWN]
        for setting in product(RUNS, (False, True)):
            share = np.mean([own[setting] for own in of])
            assert low <= share <= high, (setting, gap, share)


@pytest.mark.slow
@pytest.mark.parametrize(("subjects", "prevalence", "films"), [(60, 0.1, 1), (100, 0.1, 3), (300, 0.1, 1)])
def test_one_trainings_interval_holds_the_truth_with_few_positives(
    subjects: int, prevalence: float, films: int
) -> None:
    held = coverage(subjects, prevalence, films=films, replicates=500, seed=0)
    assert held["auroc"] > 0.92 and held["auprc"] > 0.91 and held.min() > 0.9, held
    assert "calibration_error" not in held


def test_every_interval_holds_its_value_and_stays_between_0_and_1() -> None:
    rng = np.random.default_rng(0)
    y = (rng.random((60, 30)) < 0.12).astype(float)
    p = rng.random((3, *y.shape)) * 0.5 + 0.4 * y
    for runs in (p, p[0]):
        table = evaluate(y, runs, samples=60, thresholds=np.full(30, 0.5))
        known = table[table["low"].notna()]
        assert ((known["low"] <= known["value"]) & (known["value"] <= known["high"])).all() and len(known) > 150
        bounded = known[~known["metric"].str.startswith("calibration")]
        assert bounded["low"].min() >= 0 and bounded["high"].max() <= 1


def test_the_binned_calibration_error_has_no_interval_but_what_no_error_would_give() -> None:
    rng = np.random.default_rng(0)
    p = rng.random((400, 100))
    table = evaluate(rng.random(p.shape) < p, p, samples=2).query("metric == 'calibration_error' and label != 'macro'")
    assert table[["low", "high"]].isna().all(axis=None) and table["reason"].str.startswith("no interval: binned").all()
    said = table["reason"].str.extract(r"(0\.\d+)$")[0].astype(float)
    assert said.mean() == pytest.approx(table["value"].mean(), rel=0.03)  # these scores are perfectly calibrated


def test_a_value_at_its_limit_has_no_interval_and_the_reason() -> None:
    table = evaluate(np.arange(40) > 25, np.arange(40) / 40, samples=50).set_index(["label", "metric"])
    assert table.loc[("0", "auroc"), "value"] == 1 and np.isnan(table.loc[("0", "auroc"), "low"])
    assert "at its limit" in table.loc[("macro", "auroc"), "reason"]


def test_a_comparison_computes_no_more_than_the_auroc(monkeypatch: pytest.MonkeyPatch) -> None:
    """`distribution` with AUROC alone leaves out the other statistics, and gives the values of all of them together."""
    rng = np.random.default_rng(0)
    y, group = (rng.random((60, 2)) < 0.4).astype(float), rng.integers(0, 30, 60)
    s = rng.random((60, 2)).round(1)
    whole = distribution(y, s, group, samples=20, seed=0)
    monkeypatch.setattr(Label, "_ranks", None)
    monkeypatch.setattr(Label, "_sums", None)
    values, draws = distribution(y, s, group, samples=20, seed=0, metrics=["auroc"])
    assert np.array_equal(values["auroc"], whole[0]["auroc"])
    assert np.array_equal(draws["auroc"], whole[1]["auroc"], equal_nan=True)


def test_counts_beyond_float32_are_held_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    y, group = (rng.random(60) < 0.4).astype(float), rng.integers(0, 30, 60)
    light = Label.of(y, rng.random(60), group, 30)
    monkeypatch.setattr("finetune.resample.WHOLE", 10)
    assert light.positives.dtype == np.float32 and Label.of(y, y, group, 30).positives.dtype == np.float64
