"""Parts of the benchmarks: folds of whole subjects, operations compared with hand counts, printed intervals."""

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats

from benchmarks import real_films
from benchmarks.pretrain import count


@pytest.fixture
def films(tmp_path):
    rng = np.random.default_rng(0)
    count = 400
    patients = rng.integers(0, 120, count)
    table = pd.DataFrame({"path": [f"a/{i}.png" for i in range(count)], "source": ["nih"] * 300 + ["other"] * 100})
    table["patient"] = [f"{s}{p}" for s, p in zip(table["source"], patients, strict=True)]
    table["sex"], table["age_years"], table["view"] = rng.choice(["M", "F"], count), 50, rng.choice(["AP", "PA"], count)
    table["findings"] = rng.choice(["Edema", "Edema|Mass", "No Finding", "Rare"], count, p=[0.3, 0.2, 0.45, 0.05])
    table["pixels"] = 128
    table.to_csv(tmp_path / "films.csv", index=False)
    return real_films.read_films(tmp_path / "films.csv")


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
    assert not set(train["patient"]) & tested and len(train) == (count or (pretrained["split"] == "train").sum())
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
    half = stats.t.ppf(0.975, 4) * np.std(gains, ddof=1) / 5**0.5
    assert f"{np.mean(gains):+.3f} ({np.mean(gains) - half:+.3f} to {np.mean(gains) + half:+.3f})" in text
    assert "| network resnet | 5 | 0.730 |" in text and "vit" not in text
    assert f"| steps 4000 | 5 | 0.780 | +0.180 ({0.18 - half:+.3f} to {0.18 + half:+.3f}) | +0.080 (" in text


def test_operations_of_a_step_are_counted_as_by_hand():
    q = torch.randn(2, 3, 100, 8, requires_grad=True)
    x, w = torch.randn(7, 5), torch.randn(5, 4)

    def attend_and_multiply():
        torch.nn.functional.scaled_dot_product_attention(q, q, q).sum().backward()
        return x @ w

    products = 2 * 2 * 3 * 100 * 100 * 8
    assert count(attend_and_multiply) == (2 + 4) * products + 2 * 7 * 5 * 4
