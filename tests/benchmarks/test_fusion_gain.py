"""Computation of the fusion gain."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from sklearn.metrics import roc_auc_score

from benchmarks.fusion_gain import auroc, show, student
from finetune.results import write_predictions


def test_the_interval_of_a_gain_is_students() -> None:
    values = np.array([0.04, 0.06, 0.05, 0.09, 0.01])
    low, high = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert student(values) == f"{values.mean():+.3f} ({low:+.3f} to {high:+.3f})"


def test_auroc_is_of_the_stays_with_a_film_and_its_error_that_of_scores_that_say_nothing(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    ids = pd.DataFrame({"sample_id": np.arange(300).astype(str), "subject_id": np.arange(300)})
    ids["has_image"] = rng.random(300) < 0.5
    labels = pd.DataFrame({"mortality": (rng.random(300) < 0.3).astype(float)})
    died, wanted = labels["mortality"].to_numpy()[ids["has_image"]], []
    for seed in (3, 4):
        logits = rng.normal(size=(300, 1))
        write_predictions(tmp_path / f"seed_{seed}", "test", ids, labels, logits)
        wanted.append(roc_auc_score(died, logits[ids["has_image"], 0]))
    value, error = auroc(tmp_path)
    assert value == pytest.approx(np.mean(wanted))
    null = [roc_auc_score(rng.permutation(died), np.arange(len(died))) for _ in range(4000)]
    assert error == pytest.approx(np.std(null), rel=0.06)


def test_a_gain_is_over_the_best_single_modality_of_each_hospital(capsys: pytest.CaptureFixture[str]) -> None:
    found = {"record_lstm": [0.8, 0.6], "film_only": [0.7, 0.7], "medfuse": [0.85, 0.8]}
    possible = {"record": 0.8, "film": 0.75, "both": 0.9}
    show("level", {k: np.array(v) for k, v in found.items()}, np.array([0.03, 0.03]), possible, [10, 11])
    row = next(line for line in capsys.readouterr().out.splitlines() if "medfuse minus the best" in line)
    assert re.findall(r"[+-]\d\.\d{3}", row)[:2] == ["+0.050", "+0.100"] and row.endswith("| +0.100 |")
