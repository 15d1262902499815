"""The numbers that the report itself computes, against scikit-learn and by hand."""

from __future__ import annotations

import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from markupsafe import Markup
from sklearn.metrics import precision_recall_curve, roc_curve

from finetune.compare import compare_runs
from finetune.report.curves import Scored, bins, curves_figure, net_benefit, precision_recall, roc
from finetune.report.figures import Scale, flow, shape, tick_text
from finetune.report.html import interval, number
from finetune.report.pairs import compare, methods
from finetune.report.results import possible
from finetune.report.training import smooth
from finetune.run_folders import read_runs

ROWS = st.lists(st.tuples(st.booleans(), st.integers(0, 8)), min_size=2, max_size=40).filter(
    lambda rows: 0 < sum(y for y, _ in rows) < len(rows)
)


def scored(rows: list[tuple[bool, int]]) -> Scored:
    y, p = zip(*rows, strict=True)
    return Scored(0, "run", np.array(y, float), np.array(p, float) / 10 + 0.05)


@settings(deadline=None)
@given(ROWS)
def test_roc_is_scikit_learns_with_ties(rows: list[tuple[bool, int]]) -> None:
    s = scored(rows)
    false, true = roc(s)
    wanted_false, wanted_true, _ = roc_curve(s.y, s.p, drop_intermediate=False)
    np.testing.assert_allclose(false, wanted_false)
    np.testing.assert_allclose(true, wanted_true)


@settings(deadline=None)
@given(ROWS)
def test_precision_and_recall_are_scikit_learns(rows: list[tuple[bool, int]]) -> None:
    s = scored(rows)
    recall, precision = precision_recall(s)
    wanted_precision, wanted_recall, _ = precision_recall_curve(s.y, s.p)
    np.testing.assert_allclose(recall[::-1], wanted_recall[:-1])
    np.testing.assert_allclose(precision[::-1], wanted_precision[:-1])


def test_net_benefit_by_hand() -> None:
    s = Scored(0, "run", np.array([1.0, 1, 0, 0, 0]), np.array([0.9, 0.3, 0.6, 0.2, 0.1]))
    # at 0.5: one true, one false positive of five: 0.2 - 0.2 * 1; at 0.25: two true, one false: 0.4 - 0.2 / 3
    np.testing.assert_allclose(net_benefit(s, np.array([0.5, 0.25])), [0.0, 0.4 - 0.2 / 3])


def test_bins_hold_every_row_once_and_their_interval_the_share() -> None:
    rng = np.random.default_rng(0)
    p = rng.random(207)
    s = Scored(0, "run", (rng.random(207) < p).astype(float), p)
    found = bins(s)
    assert found["n"].sum() == 207 and len(found) == 10
    assert (found["low"] <= found["observed"]).all() and (found["observed"] <= found["high"]).all()
    assert found["predicted"].is_monotonic_increasing


def test_a_pair_on_all_rows_is_what_compare_says(report_runs: list[Path]) -> None:
    runs = {run.name: run for run in read_runs(report_runs)}
    table = compare([runs["probe_ehr"]], [runs["pixels"]], samples=50)
    assert table is not None
    row = table[table["main"]].iloc[0]
    wanted = compare_runs([runs["probe_ehr"].folder], [runs["pixels"].folder], samples=50).iloc[0]
    for key in ("difference", "low", "high", "p"):
        assert row[key] == pytest.approx(wanted[key])
    heads = [runs[name].headline() for name in ("probe_ehr", "pixels")]
    assert row["difference"] == pytest.approx(heads[0]["value"] - heads[1]["value"])  # type: ignore[index]


def test_curves_are_drawn_on_the_rows_that_all_runs_scored(report_runs: list[Path], tmp_path: Path) -> None:
    few = shutil.copytree(report_runs[0].parent / "record_lstm", tmp_path / "few")
    table = pd.read_parquet(few / "predictions" / "test.parquet")
    table.iloc[10:70].to_parquet(few / "predictions" / "test.parquet")
    figure = curves_figure("mortality", read_runs([few, report_runs[0].parent / "medfuse"]))
    positives = int(table["label_mortality"].iloc[10:70].sum())
    assert figure and f"{positives} of 60 positive" in figure and "on the 60 rows that all" in figure
    table.iloc[:10].to_parquet(few / "predictions" / "test.parquet")
    apart = curves_figure("mortality", read_runs([few, report_runs[0].parent / "medfuse"]))
    assert apart and "share too few rows" in apart


def test_a_run_in_many_pairs_is_resampled_once_and_gives_the_same_numbers(report_runs: list[Path]) -> None:
    runs = {run.name: [run] for run in read_runs(report_runs)}
    names, drawn = ("pixels", "random", "probe_ehr"), {}  # type: ignore[var-annotated]
    pairs = [(a, b) for a in names for b in names if a < b]
    alone = [compare(runs[a], runs[b], 20) for a, b in pairs]
    together = [compare(runs[a], runs[b], 20, drawn) for a, b in pairs]
    assert len(drawn) == len(names)
    for one, other in zip(alone, together, strict=True):
        assert one is not None and other is not None
        pd.testing.assert_frame_equal(one, other)


def test_the_running_median_is_that_of_each_window() -> None:
    y = np.random.default_rng(0).standard_normal(1234)
    half = len(y) // 100
    wanted = [np.median(y[max(0, i - half) : i + half + 1]) for i in range(len(y))]
    np.testing.assert_allclose(smooth(y), wanted)


def test_runs_that_share_no_labels_are_not_compared(report_runs: list[Path]) -> None:
    runs = {run.name: run for run in read_runs(report_runs)}
    assert compare([runs["probe_ehr"]], [runs["medfuse"]], samples=20) is None


def test_runs_that_differ_by_a_seed_are_one_method(report_runs: list[Path]) -> None:
    one = next(run for run in read_runs(report_runs) if run.name == "probe_ehr")
    runs = [
        one.__class__(**{**one.__dict__, "name": f"probe_seed{seed}", "result": one.result | {"seed": seed}})
        for seed in (0, 1, 2)
    ]
    assert {name: len(group) for name, group in methods([*runs, one]).items()} == {"probe": 3, "probe_ehr": 1}
    assert set(methods([runs[0], runs[0]])) == {"probe_seed0"}  # the same seed twice is no replication


def test_what_is_possible_depends_on_what_the_model_sees(report_runs: list[Path]) -> None:
    mortality = {"record": 0.8, "film": 0.7, "both": 0.9, "all": {"record": 0.79, "both": 0.85}}
    truth = {"bayes": {"mortality": mortality, "phenotypes": {"macro": {"both": 0.75}, "groups": {"2": {"both": 0.7}}}}}
    runs = {run.name: run for run in read_runs(report_runs)}
    found = [possible(truth, "mortality", "mortality", runs[n]) for n in ("record_lstm", "film_only", "medfuse")]
    assert found == [0.79, 0.7, 0.85]
    assert possible(truth, "mortality", "mortality", runs["medfuse"], "paired") == 0.9
    assert possible(truth, "phenotypes", "phenotype_2", runs["medfuse"]) == 0.7
    assert possible(truth, "phenotypes", "macro", runs["medfuse"]) == 0.75
    findings = {"bayes": {"findings": {"Edema": 0.9, "Pneumothorax": 0.8, "Fracture": 0.5, "Cardiomegaly": None}}}
    assert possible(findings, "findings", "macro", runs["pixels"]) == pytest.approx(0.85)  # Fracture is not probed
    assert possible({}, "mortality", "mortality", runs["medfuse"]) is None


@settings(deadline=None)
@given(st.floats(-50, 50), st.floats(1e-3, 100))
def test_ticks_lie_inside_their_axis_and_read_as_different_numbers(low: float, size: float) -> None:
    ticks = Scale(low, low + size, 0, 100).ticks()
    assert ticks and all(low - 1e-6 * size <= t <= low + size * (1 + 1e-6) for t in ticks)
    step = ticks[1] - ticks[0] if len(ticks) > 1 else size
    if step < 1000:
        assert len({tick_text(t, step) for t in ticks}) == len(ticks)


@settings(deadline=None)
@given(st.text(), st.text())
def test_whatever_text_comes_in_is_text_in_the_markup(text: str, attribute: str) -> None:
    made = shape("p", text, title=attribute)
    seen: list[object] = []
    parser = HTMLParser()
    parser.handle_starttag = lambda name, attributes: seen.append((name, attributes))  # type: ignore[method-assign]
    parser.handle_data = lambda data: seen.append(data)  # type: ignore[method-assign]
    parser.feed(made)
    parser.close()
    assert isinstance(made, Markup) and seen[0] == ("p", [("title", attribute)])
    assert "".join(str(part) for part in seen[1:]) == text


def test_numbers_read_well() -> None:
    assert [number(v) for v in (None, float("nan"), 12345, 0.12345, -0.5, 1e-7, True)] == [
        "–", "–", "12,345", "0.123", "−0.500", "1.00e−07", "yes",
    ]  # fmt: skip
    assert interval(0.5, 0.4, 0.6) == "0.500 (0.400–0.600)" and interval(0.5, None, 0.6) == "0.500"
    assert interval(-0.1, -0.2, 0.1) == "−0.100 (−0.200 to 0.100)" and interval(2e-4, 0, 1) == "0.000 (0.000–1.000)"


def test_a_flow_draws_the_tables_that_lost_something_and_names_the_others() -> None:
    drawn = str(flow([("stays", 9, 9, "a"), ("films", 8, 8, "b"), ("films", 8, 6, "c"), ("visits", 0, 0, "d")]))
    assert "−2 c" in drawn and "Nothing taken out of: stays (9)" in drawn
    assert drawn.count('class="start"') == 1 and "visits" not in drawn
