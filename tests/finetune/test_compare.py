"""Paired comparisons."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from configs import UserError
from finetune.__main__ import main
from finetune.compare import against, compare_runs, holm, paired, show, trainings
from finetune.metrics import evaluate
from finetune.results import write_predictions, write_results


def test_holm_of_a_hand_worked_table() -> None:
    # sorted .01 .02 .03 .04 -> x4 x3 x2 x1 = .04 .06 .06 .04, made monotone
    np.testing.assert_allclose(holm(np.array([0.04, np.nan, 0.01, 0.03, 0.02])), [0.06, np.nan, 0.04, 0.06, 0.06])


def sample(better: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    y = (rng.random((300, 2)) < 0.4).astype(float)
    shared = rng.normal(size=y.shape)
    a, b = (1 / (1 + np.exp(-(shared + k * y + 0.1 * rng.normal(size=y.shape)))) for k in (1 + better, 1))
    return y, a, b, np.arange(300) // 2


def test_a_better_method_is_found_and_equal_ones_are_not() -> None:
    y, a, b, group = sample(better=0.5)
    table = paired(y, a[None], b[None], groups=group, names=["x", "y"], samples=400).set_index("label")
    assert table.loc["macro", "low"] > 0 and table.loc["macro", "p"] < 0.01
    assert np.isnan(table.loc["macro", "p_holm"]) and (table.loc[["x", "y"], "p_holm"] < 0.05).all()
    y, a, b, group = sample(better=0.0)
    table = paired(y, a[None], b[None], groups=group, samples=400).set_index("label")
    assert table.loc["macro", "low"] < 0 < table.loc["macro", "high"] and table.loc["macro", "p"] > 0.05


def test_pairing_makes_the_interval_of_a_difference_narrower_than_those_of_its_parts() -> None:
    y, a, b, group = sample(better=0.1)
    table = paired(y, a[None], b[None], groups=group, samples=400).set_index("label")
    alone = evaluate(y, a, groups=group, samples=400).query("label == 'macro' and metric == 'auroc'").iloc[0]
    assert table.loc["macro", "high"] - table.loc["macro", "low"] < 0.5 * (alone["high"] - alone["low"])
    assert table.loc["macro", "a"] == pytest.approx(alone["value"], abs=1e-12)


def test_a_difference_within_the_noise_of_training_is_no_claim_between_methods() -> None:
    rng = np.random.default_rng(0)
    y, a, b, group = sample(better=0.0)
    noisy = [[np.clip(s + rng.normal(0, spread), 0, 1) for spread in (0,) * 3] for s in (a, b)]
    strength = [[0.0, 0.5, -0.5], [0.1, 0.6, -0.4]]  # each training is a little better or worse on this sample
    runs = [
        np.stack([1 / (1 + np.exp(-(np.log(p / (1 - p)) + k * y))) for p, k in zip(ps, ks, strict=True)])
        for ps, ks in zip(noisy, strength, strict=True)
    ]
    one = paired(y, runs[0][1:2], runs[1][2:3], groups=group, samples=300).iloc[0]
    three = paired(y, *runs, groups=group, samples=300).iloc[0]
    assert one["claim"] == "one run" and one["low"] > 0
    assert three["claim"] == "method" and three["low"] < 0 < three["high"]


def test_a_label_with_one_positive_has_no_p() -> None:
    y, a, b, group = sample(better=0.5)
    y[:, 1] = np.arange(300) == 7
    table = paired(y, a[None], b[None], groups=group, names=["x", "rare"], samples=200).set_index("label")
    assert np.isnan(table.loc["rare", ["low", "p", "p_holm"]].astype(float)).all()
    assert table.loc["x", "p_holm"] == table.loc["x", "p"]  # Holm counts the labels that have a p


def test_runs_of_equal_seeds_are_drawn_together() -> None:
    y, a, _, group = sample(better=0.0)
    strength = [0.0, 0.5, 1.0]
    runs = np.stack([1 / (1 + np.exp(-(np.log(a / (1 - a)) + k * y))) for k in strength])
    better = np.stack([1 / (1 + np.exp(-(np.log(a / (1 - a)) + (k + 0.3) * y))) for k in strength])
    together = paired(y, better, runs, groups=group, samples=300, same_seeds=True).iloc[0]
    apart = paired(y, better, runs, groups=group, samples=300).iloc[0]
    assert together["low"] > 0 > apart["low"]


def write_run(
    folder: Path, y: np.ndarray, p: np.ndarray, seed: int, ids: np.ndarray | None = None, **more: object
) -> Path:
    films = np.arange(len(y)) if ids is None else ids
    table = pd.DataFrame({"dicom_id": films, "study_id": films // 2, "subject_id": films // 4})
    write_predictions(folder, "test", table, pd.DataFrame(y, columns=["x", "y"]), np.log(p / (1 - p)))
    run = {"task": "findings", "model": "linear", "encoder": "e", "allow_leak": False, "warnings": []}
    rows = evaluate(y, p, names=["x", "y"], samples=0).assign(split="test")
    write_results(folder, {**run, "seed": seed, **more}, rows)
    return folder


def test_run_folders_are_compared_whatever_the_order_of_their_rows(tmp_path: Path) -> None:
    y, a, b, _ = sample(better=0.5)
    order = np.random.default_rng(0).permutation(300)
    one = write_run(tmp_path / "a", y, a, 0)
    two = write_run(tmp_path / "b", y[order], b[order], 0, ids=order)
    table = compare_runs([one], [two], samples=200)
    assert table.loc[0, "label"] == "macro" and table.loc[0, "n"] == 300
    back = compare_runs([two], [one], samples=200)
    assert back.loc[0, "difference"] == pytest.approx(-table.loc[0, "difference"], abs=1e-12)
    other = write_run(tmp_path / "c", 1 - y, b, 0)
    with pytest.raises(UserError, match="not the same test rows and labels"):
        compare_runs([one], [other])


def test_runs_are_compared_by_the_id_that_tells_their_rows_apart(tmp_path: Path) -> None:
    y, a, _, _ = sample(better=0.5)
    runs = [write_run(tmp_path / name, y, a, 0) for name in "ab"]
    wanted = compare_runs(runs[:1], runs[1:], samples=10)
    for run in runs:
        path = run / "predictions/test.parquet"
        table = pd.read_parquet(path)
        table.assign(study_id=table["dicom_id"]).drop(columns="dicom_id").iloc[::-1].to_parquet(path)
    pd.testing.assert_frame_equal(compare_runs(runs[:1], runs[1:], samples=10), wanted)


@pytest.mark.parametrize("steps", ["x7", [], ["x7"], None, [3]])
def test_a_grid_of_other_steps_is_refused_by_its_file(tmp_path: Path, steps: object) -> None:
    (tmp_path / "grid.json").write_text(json.dumps({"methods": {"a": "a"}, "steps": steps}))
    with pytest.raises(UserError, match=r"grid\.json: "):
        against(tmp_path)


def test_a_run_of_several_seeds_counts_as_its_trainings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    y, a, b, _ = sample(better=0.5)
    for name, p in (("a", a), ("b", b)):
        for seed in (8, 9, 10):
            write_run(tmp_path / name / f"seed_{seed}", y, p, seed)
        write_run(tmp_path / name, y, p, 8, seeds=3)  # above them: means, and the predictions of the first
    out = tmp_path / "table.csv"
    table = show([str(tmp_path / "a")], [str(tmp_path / "b")], split="test", samples=50, seed=0, out=str(out))
    assert table["runs_a"].tolist() == table["runs_b"].tolist() == [3, 3, 3] and set(table["claim"]) == {"method"}
    assert "the runs at hand" not in capsys.readouterr().out and len(pd.read_csv(out)) == 3


def test_probes_of_one_pretraining_are_no_claim_about_its_method(tmp_path: Path) -> None:
    y, a, b, _ = sample(better=0.5)

    def runs(name: str, p: np.ndarray, hashes: list[str]) -> list[Path]:
        by = [{"hash": h, "weights": "step 9", "parameters": 7, "image_size": 64, "films_seen": 5} for h in hashes]
        return [write_run(tmp_path / f"{name}{i}", y, p, i, compared_by=by[i]) for i in range(3)]

    one, three, other = runs("one", a, ["x"] * 3), runs("three", a, list("xyz")), runs("other", b, list("uvw"))
    assert set(compare_runs(three, other, samples=50)["claim"]) == {"method"}
    assert set(compare_runs(one, other, samples=50)["claim"]) == {"one run"}
    assert set(compare_runs([three[0]] * 3, other, samples=50)["claim"]) == {"one run"}
    assert trainings([{"seed": i, "compared_by": {"weights": "w.pth", "hash": "x"}} for i in range(3)]) == 3


def test_each_row_carries_what_the_methods_are_and_what_else_differs_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    y, a, b, _ = sample(better=0.5)
    by = {"hash": "h", "weights": "none", "parameters": 1234567, "image_size": 16, "films_seen": 0}
    one = write_run(tmp_path / "a", y, a, 0, compared_by=by, grid={"lrs": [0.1]}, fractions=[{"films": 9}])
    two = write_run(tmp_path / "b", y, b, 0, compared_by=by | {"films_seen": None}, grid={"lrs": [1.0]})
    out = tmp_path / "table.csv"
    show([str(one)], [str(two)], split="test", samples=50, seed=0, out=str(out))
    said = capsys.readouterr().out
    assert "1,234,567 parameters, 16 px, 0 films seen" in said and "unknown films seen" in said
    assert "not the encoder alone: head grid and pools" in said and "train films" in said
    table = pd.read_csv(out)
    assert (table[["parameters_a", "image_size_b", "films_seen_a"]] == [1234567, 16, 0]).all(axis=None)
    assert len(table) == 3 and table["films_seen_b"].isna().all()


def test_a_grid_is_one_table_against_one_of_its_methods(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Differences are those of `compare_runs`, Holm's p is over all methods but the baseline, costs are means."""
    y, a, b, _ = sample(better=0.5)
    arms = {"msn-off": b, "msn-predict": a, "mae-off": b}
    for arm, scores in arms.items():
        for seed in range(3):
            by = {"hash": f"{arm}{seed}", "weights": "step 9", "films_trained": 48, "processor_seconds": 10.0 + seed}
            noisy = np.clip(scores + np.random.default_rng([seed, len(arm)]).normal(0, 0.02, y.shape), 0.001, 0.999)
            write_run(tmp_path / f"{arm}-s{seed}" / "probe", y, noisy, seed, compared_by=by)
    methods = {f"{arm}-s{seed}": arm for arm in arms for seed in range(3)} | {"dino-off-s0": "dino-off"}
    (tmp_path / "grid.json").write_text(json.dumps({"methods": methods, "steps": ["pretrain", "probe"]}))
    table = against(tmp_path, "msn-off", samples=100).set_index("method")
    assert list(table.index) == list(arms) and (table["runs"] == 3).all() and (table["processor_seconds"] == 11).all()
    folders = [[tmp_path / f"{arm}-s{seed}" / "probe" for seed in range(3)] for arm in ("msn-predict", "msn-off")]
    found = compare_runs(*folders, samples=100).iloc[0]
    for key in ("difference", "low", "high", "p"):
        assert table.loc["msn-predict", key] == found[key]
    assert np.isnan(table.loc["msn-off", "difference"])
    np.testing.assert_array_equal(table["p_holm"], holm(table["p"].to_numpy()))
    out = tmp_path / "table.md"
    with pytest.raises(SystemExit, match="0"):
        main(["compare", str(tmp_path), "--table", "--with", "msn-off", "--samples", "50", "--out", str(out)])
    assert "msn-predict" in out.read_text() and "differences from msn-off" in capsys.readouterr().out
    for words in (["--table", "--with", "dino-off"], ["--table", "--with", "a", "b"], []):
        with pytest.raises(SystemExit, match="2"):
            main(["compare", str(tmp_path), *words])


def test_the_interval_of_a_difference_ends_where_a_difference_can() -> None:
    y = np.array([[1], [1], [0], [0], [0], [1.0]])
    a, b = np.array([[0.9], [0.2], [0.1], [0.3], [0.2], [0.8]]), np.array([[0.1], [0.4], [0.9], [0.3], [0.2], [0.3]])
    row = paired(y, a[None], b[None], groups=np.arange(6), samples=200).iloc[0]
    assert row["high"] == 1 and -1 <= row["low"] < row["difference"] < 1
