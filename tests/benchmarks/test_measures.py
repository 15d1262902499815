"""Parts of the benchmarks: folds of whole subjects, operations compared with hand counts, printed intervals."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats

from benchmarks import real_films, recipes
from benchmarks.pretrain import count
from configs import UserError


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


def own_table(folder, **columns):
    """A table with what any hospital has: every third film without findings, every fifth of unknown view."""
    count = 200
    table = pd.DataFrame({"path": [f"{i % 2}/{i // 2}.png" for i in range(count)]})  # file names occur twice
    table["patient"] = [f"p{i % 40}" for i in range(count)]
    table["view"] = [None if i % 5 == 4 else ("AP", "PA")[i % 2] for i in range(count)]
    table["findings"] = [None if i % 3 == 0 else ("Edema|Mass, left", "No Finding")[i // 40 % 2] for i in range(count)]
    table.assign(**columns).to_csv(folder / "films.csv", index=False)
    return real_films.read_films(folder / "films.csv")


def test_any_table_of_films_will_do(tmp_path):
    films = own_table(tmp_path)
    assert real_films.label_columns(films) == ["Edema", "Mass, left", "ap"]  # no sex is known
    assert films["labelled"].sum() == 133 and films["ap"].isna().sum() == 94
    for fold in range(5):
        _, probing = real_films.tables_of_a_fold(films, fold, 0, tmp_path / "fold", tmp_path)
        pretrained, probed = (pd.read_csv(tmp_path / "fold" / f"{name}.csv") for name in ("pretrain", "probe"))
        tested = set(probed.loc[probed["split"] == "test", "patient"])
        mine = pretrained[pretrained["patient"].isin(tested)]
        assert len(mine) > (probed["split"] == "test").sum() and set(mine["split"]) == {"test"}  # unlabelled ones too
        assert 'films.columns=["Edema", "Mass, left", "ap"]' in probing


def test_a_film_of_unknown_view_or_sex_is_scored_where_it_can_be(tmp_path, monkeypatch):
    films = own_table(tmp_path, sex=["M", "F", None, "M"] * 50)
    test = films[films["labelled"]].iloc[::-1]  # in another order
    ids = pd.DataFrame({"dicom_id": test["path"].str.removesuffix(".png")})
    logits = test[["Edema", "Mass, left", "male", "ap"]].astype(float).fillna(9).reset_index(drop=True)
    logits["Mass, left"] = logits["Mass, left"].where(test["ap"].notna().to_numpy(), -9)  # wrong where no view is known
    monkeypatch.setattr(real_films, "read_predictions", lambda *_: (ids, None, logits))
    assert real_films.scores(films, tmp_path) == {"findings": 1.0, "sex": 1.0, "view": 1.0}
    monkeypatch.setattr(real_films, "read_predictions", lambda *_: (ids, None, logits[["Edema", "ap"]]))
    found = real_films.scores(films, tmp_path)
    assert found["findings"] == found["view"] == 1 and np.isnan(found["sex"])


def test_a_table_of_films_that_cannot_be_scored_is_refused(tmp_path):
    own_table(tmp_path)
    films = pd.read_csv(tmp_path / "films.csv")
    for wrong, says in (
        (films.drop(columns="view"), "no column view; it has path"),
        (films.head(40), "no finding has 30"),
        (films.replace({"findings": {"No Finding": "view"}}), "findings view are names of columns too"),
    ):
        wrong.to_csv(tmp_path / "wrong.csv", index=False)
        with pytest.raises(UserError, match=says):
            real_films.read_films(tmp_path / "wrong.csv")
    with pytest.raises(UserError, match="no column source"):
        real_films.read_films(tmp_path / "films.csv", labelled="nih")


@pytest.mark.parametrize(("count", "epochs", "patience"), [(640, 100, 25), (100_000, 1, 1)])
def test_training_from_scratch_takes_as_many_steps_as_pretraining(tmp_path, monkeypatch, count, epochs, patience):
    def tables(films, fold, films_kept, folder, root):
        folder.mkdir()
        pd.DataFrame({"split": ["train"] * count}).to_csv(folder / "probe.csv")
        return [], []

    asked = []
    monkeypatch.setattr(real_films, "tables_of_a_fold", tables)
    monkeypatch.setattr(real_films, "call", lambda *words: asked.append(words))
    monkeypatch.setattr(real_films, "scores", lambda *_: {})
    monkeypatch.setattr(real_films, "read_json", lambda _: {"processor_seconds": 1.0, "precision": "no"})
    real_films.run(tmp_path, None, tmp_path, real_films.BASE, 0, ["from scratch"])
    assert [words[0] for words in asked] == ["pretrain", "probe", "probe"] and "optim.steps=1" in asked[0]
    assert {f"tune.epochs={epochs}", f"tune.patience={patience}"} < {*asked[1]}  # of all labelled films


def test_rows_of_another_table_of_films_are_no_result_of_these(tmp_path, monkeypatch, capsys):
    own_table(tmp_path)
    (out := tmp_path / "out").mkdir()
    given = ["--films", str(tmp_path / "films.csv"), "--tables", "time", "--folds", "0"]
    shipped = ["--rows", str(real_films.ROWS)]
    monkeypatch.setattr("sys.argv", ["real_films", str(out), *given, *shipped])
    with pytest.raises(UserError, match="has rows of another films table"):
        real_films.main()
    monkeypatch.setattr(real_films, "pack", lambda *_: None)
    row = {"findings": 0.7, "sex": 0.6, "view": 0.9, "seconds": 9, "precision": "no"}

    def run(out, films, root, setting, fold, wanted):
        return [setting | row | {"fold": fold, "source": source, "share": 1.0} for source in wanted]

    monkeypatch.setattr(real_films, "run", run)
    monkeypatch.setattr("sys.argv", ["real_films", str(out), *given])
    real_films.main()
    assert "| steps 15000 | 1 | 0.700 |" in capsys.readouterr().out
    monkeypatch.setattr(real_films, "run", None)  # all rows are there
    real_films.main()
    assert len(pd.read_csv(out / "rows.csv")) == 4 + 1 + 1


def test_rows_have_the_columns_of_this_release(tmp_path):
    assert len(real_films.read_rows(real_films.ROWS, real_films.COLUMNS)) and len(recipes.read(recipes.SHIPPED))
    assert recipes.read(tmp_path / "none.csv") == []
    pd.DataFrame(recipes.read(recipes.SHIPPED)).drop(columns="random").to_csv(tmp_path / "old.csv", index=False)
    with pytest.raises(UserError, match="begin another file"):  # rows added to it would be shifted by a column
        recipes.read(tmp_path / "old.csv")


def test_operations_of_a_step_are_counted_as_by_hand():
    q = torch.randn(2, 3, 100, 8, requires_grad=True)
    x, w = torch.randn(7, 5), torch.randn(5, 4)

    def attend_and_multiply():
        torch.nn.functional.scaled_dot_product_attention(q, q, q).sum().backward()
        return x @ w

    products = 2 * 2 * 3 * 100 * 100 * 8
    assert count(attend_and_multiply) == (2 + 4) * products + 2 * 7 * 5 * 4
