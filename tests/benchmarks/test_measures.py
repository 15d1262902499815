"""Parts of the benchmarks: folds of whole subjects, operations compared with hand counts, printed intervals."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats

from benchmarks import real_films, recipes
from benchmarks.pretrain import count


def test_folds_are_whole_patients_and_each_film_is_tested_once(films):
    nih = films[films["source"] == "nih"]
    assert (nih.groupby("patient")["fold"].nunique() == 1).all() and set(nih["fold"]) == set(range(5))
    assert nih["fold"].value_counts().between(45, 75).all()
    assert (films.loc[films["source"] != "nih", "fold"] == -1).all()
    assert real_films.label_columns(films) == ["Edema", "Mass", "male", "ap"]  # Rare has too few films


@pytest.mark.parametrize("count", [0, 100])
def test_no_film_of_the_test_patients_is_pretrained_on(films, tmp_path, count):
    real_films.tables_of_a_fold(films, 2, count, tmp_path, tmp_path)
    pretrained, probed = pd.read_csv(tmp_path / "pretrain.csv"), pd.read_csv(tmp_path / "probe.csv")
    tested = set(films.loc[films["fold"] == 2, "patient"])
    train = pretrained[pretrained["split"] == "train"]
    others = len(films) - (pretrained["split"] != "train").sum()
    assert not set(train["patient"]) & tested and len(train) == (count or others)
    assert (pretrained["split"] == "test").sum() == (films["fold"] == 2).sum()
    assert set(probed.loc[probed["split"] == "test", "patient"]) == tested and set(probed["patient"].str[:3]) == {"nih"}
    assert "Edema" in probed and "Edema" not in pretrained  # pretraining reads no label


def test_the_table_has_students_interval_over_the_folds():
    gains, rows = [0.01, 0.03, 0.02, 0.04, 0.05], []
    for fold, gain in enumerate(gains):
        for source, value in ((real_films.OURS, 0.7 + gain), ("raw pixels", 0.7), ("random weights", 0.6)):
            row = {"fold": fold, "source": source, "share": 1.0, "findings": value, "sex": 0.6, "view": 0.9}
            rows.append(real_films.BASE | row)
            if source == real_films.OURS:  # has no rivals of its own: they do not depend on the steps
                rows.append(real_films.BASE | row | {"steps": 4000, "findings": 0.75 + gain})
    text = real_films.table(pd.DataFrame(rows), [{"network": "resnet"}, {"network": "vit"}, {"steps": 4000}], 1.0)
    # the corrected variance of Nadeau and Bengio: 1/folds, and test films to train films 1 to 4
    half = stats.t.ppf(0.975, 4) * np.std(gains, ddof=1) * (1 / 5 + 1 / 4) ** 0.5
    assert f"{np.mean(gains):+.3f} ({np.mean(gains) - half:+.3f} to {np.mean(gains) + half:+.3f})" in text
    assert "| network resnet | 5 | 0.730 |" in text and "vit" not in text
    assert f"| steps 4000 | 5 | 0.780 | +0.180 ({0.18 - half:+.3f} to {0.18 + half:+.3f}) | +0.080 (" in text
    assert text.endswith(
        "|  | +0.050 (+0.050 to +0.050) | 0.600 | 0.900 |"
    )  # never trained from scratch; minus the first


def test_a_difference_of_fewer_folds_says_so_and_one_of_none_is_empty():
    assert real_films.gap(pd.Series([0.1, 0.1]), 5) == "+0.100 (+0.100 to +0.100), 2 folds"
    assert real_films.gap(pd.Series([0.1]), 1) == "+0.100" and real_films.gap(pd.Series(dtype=float), 5) == ""


def test_a_finding_of_few_films_does_not_count(films, tmp_path, monkeypatch):
    few = films.index[(films["fold"] == 0) & (films["ap"] == 1)]
    films.loc[few, "Mass"] = [1] * 4 + [0] * (len(few) - 4)  # of a perfect score, and too few
    test = films[films["fold"] == 0]
    ids = pd.DataFrame({"dicom_id": test["path"].map(lambda p: Path(p).stem)})
    logits = test[["Edema", "Mass", "male", "ap"]].astype(float).reset_index(drop=True)
    logits.loc[logits.index[(test["ap"] == 0)], "Mass"] = 0.0
    logits["Edema"] = 0.0
    monkeypatch.setattr(real_films, "read_predictions", lambda *_: (ids, None, logits))
    assert real_films.scores(films, tmp_path) == {"findings": 0.5, "sex": 1.0, "view": 1.0}


def test_shipped_rows_have_the_columns_of_this_release():
    assert list(pd.read_csv(real_films.ROWS)) == real_films.COLUMNS
    assert list(pd.read_csv(recipes.SHIPPED)) == recipes.COLUMNS


def test_operations_of_a_step_are_counted_as_by_hand():
    q = torch.randn(2, 3, 100, 8, requires_grad=True)
    x, w = torch.randn(7, 5), torch.randn(5, 4)

    def attend_and_multiply():
        torch.nn.functional.scaled_dot_product_attention(q, q, q).sum().backward()
        return x @ w

    products = 2 * 2 * 3 * 100 * 100 * 8
    assert count(attend_and_multiply) == (2 + 4) * products + 2 * 7 * 5 * 4
