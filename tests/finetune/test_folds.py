"""`probe` with folds, seeds and class weights; labels that cannot be learned; tables of runs."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from sklearn.linear_model import LogisticRegression

from configs import UserError
from finetune.compare import compare_runs
from finetune.config import FuseConfig, ProbeConfig
from finetune.labelled import Films, folded
from finetune.probe import probe
from finetune.probe.heads import balance
from finetune.report.runs import show
from finetune.results import read_predictions, read_results, write_table

World = Callable[..., Path]


def films(subjects: int = 41, per: int = 3) -> Films:
    rng = np.random.default_rng(0)
    who = np.repeat(np.arange(subjects), per)
    table = pd.DataFrame(
        {"dicom_id": np.arange(len(who)).astype(str), "study_id": np.arange(len(who)), "subject_id": who}
    )
    rare = np.isin(who, [1, 5, 9, 20, 40]).astype(float)
    labels = pd.DataFrame({"sick": (rng.random(subjects) < 0.4)[who].astype(float), "rare": rare, "all": 1.0})
    return Films(table.assign(split="train", view="AP"), labels, {})


@pytest.mark.parametrize("folds", [3, 5])
def test_folds_keep_subjects_whole_score_each_once_and_share_the_rare_class(folds: int) -> None:
    made = films()
    parts = folded(made, folds, 0)
    assert sorted(np.concatenate([part.test for part in parts])) == list(range(len(made)))
    assert sorted(np.concatenate([part.val for part in parts])) == list(range(len(made)))
    subject, rare = made.table["subject_id"].to_numpy(), made.labels["rare"].to_numpy()
    for part in parts:
        groups = [set(subject[rows]) for rows in part]
        assert not (groups[0] & groups[1] or groups[0] & groups[2] or groups[1] & groups[2])
        assert sum(map(len, groups)) == 41 and abs(len(groups[2]) - 41 / folds) < 3
        assert 0 < rare[part.test].sum() / 3 <= 5 // folds + 1 and rare[part.train].sum() > 0
    assert [set(p.test) for p in folded(made, folds, 1)] != [set(p.test) for p in parts]
    with pytest.raises(UserError, match="41 subjects; wanted at least one for each fold"):
        folded(made, 42, 0)


def test_balanced_weights_are_scikit_learns() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(200, 3)), (rng.random((200, 1)) < 0.15).astype(np.float32)
    weights = balance(y)[:, 0]
    assert weights.mean() == pytest.approx(1) and weights[y[:, 0] == 1].sum() == pytest.approx(100, abs=1e-3)
    ours = LogisticRegression().fit(x, y[:, 0], sample_weight=weights).coef_
    np.testing.assert_allclose(ours, LogisticRegression(class_weight="balanced").fit(x, y[:, 0]).coef_, atol=1e-4)
    assert (balance(np.ones((4, 1), np.float32)) == 1).all()


def given(folder: Path, out: str, **more: object) -> ProbeConfig:
    base = {"features": str(folder / "features"), "store": "memory", "encoder": "pixels", "pixels": 4, "samples": 40}
    return ProbeConfig.model_validate({**base, "method": "logistic", "out": str(folder / out), **more})


@pytest.mark.parametrize("method", ["logistic", "knn", "linear"])
def test_a_probe_in_folds_scores_every_study_once_by_a_head_that_never_saw_it(make_world: World, method: str) -> None:
    folder = make_world()
    run = probe(given(folder, "folds", folds=3, seeds=2, method=method))
    about, rows = read_results(run)
    ids, _, _ = read_predictions(run, "test")
    images = pd.read_parquet(folder / "features" / "images.parquet").query("view in ['AP', 'PA']")
    assert ids["study_id"].is_unique and set(ids["subject_id"]) == set(images["subject_id"])
    assert about["folds"] == 3 and about["seeds"] == 2 and len(about["fractions"]) == 6
    one, two = (read_results(run / f"seed_{seed}")[1] for seed in (0, 1))
    macro = [
        t.query("label == 'macro' and metric == 'auroc' and split == 'test'")["value"].item() for t in (rows, one, two)
    ]
    assert macro[0] == pytest.approx(np.mean(macro[1:])) and "f1" not in set(rows["metric"])
    table = compare_runs([run], [run], samples=20)
    assert table.loc[0, "runs_a"] == 2 and table.loc[0, "difference"] == 0


def test_listed_seeds_are_the_seeds_of_the_fits(make_world: World) -> None:
    """The same numbers as with each seed alone; a list of one seed is that seed."""
    folder = make_world()
    run = probe(given(folder, "listed", method="linear", epochs=2, seeds=[5, 2], fraction=[0.5, 1.0]))
    about, _ = read_results(run)
    assert about["seeds"] == 2 and about["seed"] == 5 and len(about["fractions"]) == 4
    assert sorted(p.name for p in run.glob("seed_*")) == ["seed_2", "seed_5"]
    for out, seeds in (("number", 1), ("list", [2])):
        alone = probe(given(folder, out, method="linear", epochs=2, seed=2 if seeds == 1 else 0, seeds=seeds))
        assert read_results(alone)[0]["seed"] == 2 and not list(alone.glob("seed_*"))
        ours, theirs = (read_predictions(of, "test")[2] for of in (run / "seed_2", alone))
        pd.testing.assert_frame_equal(ours, theirs)
    assert compare_runs([run], [run], samples=20).loc[0, "runs_a"] == 2


@pytest.mark.parametrize(
    ("seeds", "says"),
    [([0, 0], "listed twice"), ([], "at least 1"), (0, "greater than or equal to 1"), ([0.5], "integer")],
)
@pytest.mark.parametrize("schema", [ProbeConfig, FuseConfig])
def test_seeds_that_are_none_are_refused(tmp_path: Path, schema: type, seeds: object, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        schema.model_validate({"features": "f", "store": "s", "encoder": "pixels", "out": "o", "seeds": seeds})


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"folds": 2}, "take 3 or more"),
        ({"folds": 3, "shift": {"field": "view"}}, "need their own split"),
        ({"class_weights": "balanced", "method": "knn"}, "no loss to weigh"),
    ],
)
def test_what_does_not_go_together_is_said(tmp_path: Path, more: dict, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        given(tmp_path, "out", **more)


@pytest.mark.parametrize("method", ["logistic", "knn", "linear"])
def test_a_label_without_a_train_positive_is_null_named_and_out_of_the_macro(make_world: World, method: str) -> None:
    folder = make_world()
    path = folder / "features" / "images.parquet"
    images = pd.read_parquet(path)
    name = next(c for c in ("Edema", "Cardiomegaly", "Pneumothorax") if c in images and images[c].notna().any())
    images.loc[(images["split"] == "train") & (images[name] == 1), name] = 0.0
    images.to_parquet(path)
    run = probe(given(folder, "lone", method=method))
    about, rows = read_results(run)
    rows = rows[(rows["split"] == "test") & (rows["subset"] == "all") & (rows["metric"] == "auroc")].set_index("label")
    assert np.isnan(rows.loc[name, "value"]) and "0 positives among" in rows.loc[name, "reason"]
    others = [label for label in rows.index if not label.startswith("macro") and label != name]
    assert rows.loc["macro", "value"] == pytest.approx(rows.loc[others, "value"].mean())
    assert any(name in warning and "test" in warning for warning in about["warnings"])
    assert np.isnan(compare_runs([run], [run], samples=20).set_index("label").loc[name, "difference"])


def test_runs_that_differ_by_their_seed_are_averaged_and_written_as_a_table(
    make_world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_world()
    for seed in (0, 1):
        probe(given(folder, f"runs/none-s{seed}/probe", method="linear", seed=seed, epochs=2))
    out = folder / "table"
    for suffix in (".csv", ".md", ".tex"):
        show(folder / "runs", out=str(out.with_suffix(suffix)))
    table = pd.read_csv(out.with_suffix(".csv")).set_index("run")
    assert table.loc["none/probe", "seeds"] == 2 and len(table) == 3
    assert table.loc["none/probe", "auroc"] == pytest.approx(table["auroc"].iloc[:2].mean())
    assert "none/probe, mean of 2 seeds" in capsys.readouterr().out
    assert (
        out.with_suffix(".md").read_text().count("\n") == 5 and "| none/probe |" in out.with_suffix(".md").read_text()
    )
    assert "\\begin{tabular}" in out.with_suffix(".tex").read_text()
    with pytest.raises(UserError, match="CSV, Markdown or LaTeX"):
        show(folder / "runs", out=str(folder / "table.html"))


def test_tables_escape_what_their_language_would_read(tmp_path: Path) -> None:
    table = pd.DataFrame({"a_b": ["50% | _x_"], "v": [0.123456], "none": [np.nan]})
    for suffix, wanted in ((".md", "| 50% \\| _x_ | 0.1235 |  |"), (".tex", "50\\% | \\_x\\_ & 0.1235 &  \\\\")):
        write_table(tmp_path / f"t{suffix}", table)
        assert wanted in (tmp_path / f"t{suffix}").read_text()


def test_a_small_p_is_not_shown_as_zero(tmp_path: Path) -> None:
    write_table(tmp_path / "t.md", pd.DataFrame({"p": [7.853e-07, 0.0, 5.1e-5, -1e-6]}))
    assert [line.strip("| ") for line in (tmp_path / "t.md").read_text().splitlines()[2:]] == [
        "7.9e-07",
        "0.0000",
        "0.0001",
        "-1.0e-06",
    ]
