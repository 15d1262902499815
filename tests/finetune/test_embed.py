"""`embed`, `nearest`, `score`, `probe --watch`."""

import fcntl
import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from configs import UserError
from ehr_features.files import write_json
from finetune.__main__ import main
from finetune.compare import show
from finetune.config import ProbeConfig
from finetune.embed import embed, nearest
from finetune.metrics import evaluate
from finetune.probe.main import probe
from finetune.probe.watch import watch
from finetune.report.page import report
from finetune.results import read_results
from finetune.score import score
from pretrain import encoder as encoders

World = Callable[..., Path]


def tiny(folder: Path, step: int = 1, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    args = {"depth": 1, "embed_dim": 24, "num_heads": 2, "patch_size": 8}
    made = encoders.create("vit_tiny_patch16_224", image_size=32, model_args=args)
    return encoders.save(folder / "encoder", made, {"step": step, "ehr_groups": {}})


def draw(folder: Path, count: int = 6) -> Path:
    (folder / "films").mkdir()
    for i in range(count):
        pixels = np.random.default_rng(i).integers(0, 255, (40, 30), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"films/film{i}.png")
    return folder / "films"


@pytest.mark.parametrize("name", ["embed", "report", "compare", "score"])
def test_an_output_that_cannot_be_written_is_refused_before_anything_is_read(tmp_path: Path, name: str) -> None:
    out, no = str(tmp_path), str(tmp_path / "nothing_here")
    commands = {
        "embed": lambda: embed(no, no, out),
        "report": lambda: report([no], out),
        "compare": lambda: show([no], [no], split="test", samples=10, seed=0, out=out),
        "score": lambda: score(no, no, out=out),
    }
    with pytest.raises(UserError, match="is a folder; wanted the name of a file"):
        commands[name]()


def test_films_of_a_folder_are_embedded_by_the_exported_encoder_alone(tmp_path: Path) -> None:
    encoder, films = tiny(tmp_path), draw(tmp_path)
    (films / "bad.jpg").write_bytes(b"\xff\xd8\xff no film")
    table = pd.read_parquet(embed(str(encoder), str(films), str(tmp_path / "out.parquet"), batch_size=4))
    assert table["dicom_id"].tolist() == [f"film{i}" for i in range(6)]  # the bad one is set aside
    assert table.filter(regex=r"^f\d+$").shape == (6, 24)
    one = pd.read_parquet(embed(str(encoder), str(films / "film3.png"), str(tmp_path / "one.parquet")))
    np.testing.assert_allclose(one.filter(regex=r"^f\d+$"), table.filter(regex=r"^f\d+$").iloc[[3]], atol=1e-5)


def test_films_that_cannot_be_read_are_said_once_for_each_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    encoder, films = tiny(tmp_path), draw(tmp_path)
    for folder, good in ((films, True), (tmp_path / "none", False)):
        folder.mkdir(exist_ok=True)
        for i in range(5):
            (folder / f"bad{i}.jpg").write_bytes(b"\xff\xd8\xff no film")
        if good:
            embed(str(encoder), str(folder), str(tmp_path / "out.parquet"))
            said = [line for line in capsys.readouterr().out.splitlines() if "left out:" in line]
            assert len(said) == 1 and "bad0.jpg and 4 more" in said[0]
        else:
            with pytest.raises(UserError, match=r"none of 5 films can be read; the first: .*bad0\.jpg"):
                embed(str(encoder), str(folder), str(tmp_path / "none.parquet"))
            assert "bad1" not in capsys.readouterr().out


def test_embeddings_that_changed_since_they_were_written_are_read_with_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = embed(str(tiny(tmp_path)), str(draw(tmp_path)), str(tmp_path / "out.parquet"))
    wanted = nearest(str(out), "film2")
    assert "changed" not in capsys.readouterr().err
    table = pq.read_table(out)
    pq.write_table(table.set_column(0, "dicom_id", table["dicom_id"].combine_chunks()[::-1]), out)
    assert not nearest(str(out), "film2").equals(wanted)
    assert f"warning: {out}: changed since `embed` wrote it" in capsys.readouterr().err


def test_the_nearest_film_to_a_copy_is_the_film(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    encoder, films = tiny(tmp_path), draw(tmp_path)
    out = str(embed(str(encoder), str(films), str(tmp_path / "out.parquet")))
    copy = tmp_path / "copy.png"
    copy.write_bytes((films / "film2.png").read_bytes())
    said = capsys.readouterr().out
    assert f"next: ./launch.sh nearest {out}\n" in said and "film0" not in said  # a path may hold a patient's id
    assert nearest(out, str(copy), number=3)["dicom_id"].tolist()[0] == "film2"
    assert nearest(out)["dicom_id"].tolist() == nearest(out, pd.read_parquet(out)["path"][0])["dicom_id"].tolist()
    found = nearest(out, "film2", number=99)
    assert "film2" not in found["dicom_id"].tolist() and len(found) == 5
    with pytest.raises(UserError, match="neither a film of"):
        nearest(out, "film99")


def test_a_film_whose_name_stands_twice_is_asked_for_by_its_path(tmp_path: Path) -> None:
    encoder, films = tiny(tmp_path), draw(tmp_path)
    (films / "other").mkdir()
    (films / "other/film2.png").write_bytes((films / "film5.png").read_bytes())
    out = str(embed(str(encoder), str(films), str(tmp_path / "new/out.parquet")))
    with pytest.raises(UserError, match=r"film2: 2 films of .* have this name"):
        nearest(out, "film2")
    found = nearest(out, (films / "other/film2.png").as_posix(), number=1)
    assert found["path"].item() == (films / "film5.png").as_posix() and found["cosine"].item() > 0.99


def test_an_encoder_of_anyone_with_timms_keys_is_enough(tmp_path: Path) -> None:
    net = timm.create_model("resnet10t", num_classes=0, in_chans=3)
    folder, films = tmp_path / "theirs", draw(tmp_path)
    folder.mkdir()
    save_file(net.state_dict(), folder / "encoder.safetensors")
    resize = {"image_size": 32, "normalise": "dataset", "mean": 0.449, "std": 0.226}
    about = {"arch": "resnet10t", "model_args": {}, "in_chans": 3, "width": 512, "image_size": 32, "pool": "avg"}
    made = encoders.create("resnet10t", in_chans=3, image_size=32).preprocess.to_json()
    write_json(folder / "encoder.json", about | {"preprocess": made | {k: v for k, v in resize.items() if k in made}})
    table = pd.read_parquet(embed(str(folder), str(films), str(tmp_path / "out.parquet")))
    assert table.filter(regex=r"^f\d+$").shape == (6, 512)
    labels = pd.DataFrame({"path": [f"film{i % 6}.png" for i in range(6)], "sick": [0, 1] * 3})
    labels.assign(split=["train", "train", "val", "val", "test", "test"]).to_csv(tmp_path / "my.csv", index=False)
    given = {"layout": "csv", "table": str(tmp_path / "my.csv"), "images": str(films), "columns": ["sick"], "size": 32}
    config = {"films": given | {"split": "split"}, "encoder": str(folder), "out": str(tmp_path / "runs/probe")}
    about, rows = read_results(probe(ProbeConfig.model_validate(config | {"samples": 20, "epochs": 2})))
    assert about["compared_by"]["films_seen"] is None and about["pretraining_films"] == "other source"
    assert 0 <= rows.query("label == 'sick' and metric == 'auroc' and split == 'test'")["value"].item() <= 1


@pytest.mark.parametrize("kind", ["npy", "csv", "parquet"])
def test_any_two_arrays_are_scored(tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(0)
    y = pd.DataFrame(rng.integers(2, size=(50, 2)), columns=["a", "b"]).astype(float)
    s = pd.DataFrame(rng.random((50, 2)), columns=["a", "b"])
    y.iloc[0, 0] = np.nan
    names = ["a", "b"] if kind != "npy" else ["0", "1"]
    for name, frame in (("y", y), ("s", s[["b", "a"]] if kind != "npy" else s)):  # columns are matched by name
        path = tmp_path / f"{name}.{kind}"
        if kind == "npy":
            np.save(path, frame.to_numpy())
        elif kind == "csv":
            frame.to_csv(path, index=False)
        else:
            frame.to_parquet(path)
    groups = tmp_path / "groups.csv"
    pd.DataFrame({"who": [f"p{i // 2}" for i in range(50)]}).to_csv(groups, index=False)
    out = tmp_path / "table.csv"
    got = score(str(tmp_path / f"y.{kind}"), str(tmp_path / f"s.{kind}"), groups=str(groups), samples=20, out=str(out))
    wanted = evaluate(y, s, names=names, groups=[i // 2 for i in range(50)], samples=20)
    pd.testing.assert_frame_equal(got, wanted)
    assert "auroc" in capsys.readouterr().out and len(pd.read_csv(out)) == len(wanted)


def test_arrays_that_do_not_fit_are_named(tmp_path: Path) -> None:
    np.save(tmp_path / "y.npy", np.zeros(4))
    np.save(tmp_path / "s.npy", np.zeros(5))
    with pytest.raises(UserError, match=r"4 rows and .* 5"):
        score(str(tmp_path / "y.npy"), str(tmp_path / "s.npy"))
    with pytest.raises(UserError, match="no such file"):
        score(str(tmp_path / "none.npy"), str(tmp_path / "s.npy"))


def test_a_file_without_a_header_loses_no_row(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    y, s = rng.integers(2, size=(30, 2)).astype(float), rng.random((30, 2))
    np.savetxt(tmp_path / "y.csv", y, delimiter=",")
    np.savetxt(tmp_path / "s.csv", s, delimiter=",")
    (tmp_path / "g.csv").write_text("\n".join(f"p{i // 3}" for i in range(30)))
    files = [str(tmp_path / name) for name in ("y.csv", "s.csv")]
    got = score(*files, groups=str(tmp_path / "g.csv"), samples=20)
    pd.testing.assert_frame_equal(got, evaluate(y, s, groups=[i // 3 for i in range(30)], samples=20))
    pd.DataFrame(y).to_csv(tmp_path / "y.csv", index=False)  # pandas' header: 0,1
    pd.DataFrame(s).to_csv(tmp_path / "s.csv")  # and its index
    pd.testing.assert_frame_equal(score(*files, samples=20), evaluate(y, s, samples=20))


def test_a_headless_column_that_begins_with_0_loses_no_row(tmp_path: Path) -> None:
    y, s = np.array([0, 1, 1, 0, 1]), np.array([0.4, 0.3, 0.8, 0.1, 0.9])
    np.savetxt(tmp_path / "y.csv", y, fmt="%d")  # its first line is also pandas' name of a single column
    np.save(tmp_path / "s.npy", s)
    got = score(str(tmp_path / "y.csv"), str(tmp_path / "s.npy"), samples=9)
    pd.testing.assert_frame_equal(got, evaluate(y, s, samples=9))


@pytest.mark.parametrize(
    "words",
    [
        ["score", "y.npy", "y.npy", "--samples"],
        ["score", "y.npy", "y.npy", "--seed"],
        ["compare", "a", "--with", "b", "--seed"],
        ["demo", "out", "--seed"],
        ["nearest", "e.parquet", "f", "--number"],
    ],
)
def test_a_number_below_0_is_the_users_mistake(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main([*words, "-3"])
    assert left.value.code == 2 and "-3 is below 0" in capsys.readouterr().err


def test_text_among_the_numbers_is_placed_and_not_told(tmp_path: Path) -> None:
    np.save(tmp_path / "y.npy", np.array([0, 1, 0]))
    (tmp_path / "s.csv").write_text('a\n0.1\nJane Roe\n""\n')
    with pytest.raises(UserError, match="1 cells are not numbers, the first in row 2 of column `a`") as error:
        score(str(tmp_path / "y.npy"), str(tmp_path / "s.csv"))
    assert "Roe" not in str(error.value)


def test_columns_of_other_names_are_matched_by_position_and_rows_by_their_key(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    y, s = np.array([0, 1, 0, 1.0]), np.array([0.2, 0.9, 0.4, 0.3])
    labels = pd.DataFrame({"dicom_id": list("abcd"), "subject_id": [1, 1, 2, 3], "sick": y})
    labels.to_csv(tmp_path / "y.csv", index=False)
    pd.DataFrame({"dicom_id": list("dbca"), "p": s[[3, 1, 2, 0]]}).to_csv(tmp_path / "s.csv", index=False)
    got = score(str(tmp_path / "y.csv"), str(tmp_path / "s.csv"), samples=20)
    pd.testing.assert_frame_equal(got, evaluate(y, s, names=["sick"], groups=[1, 1, 2, 3], samples=20))
    said = capsys.readouterr().out
    assert "sick by p" in said and "20 resamples of 3 subjects" in said
    pd.DataFrame({"dicom_id": list("dbcx"), "p": s}).to_csv(tmp_path / "s.csv", index=False)
    with pytest.raises(UserError, match=r"1 of the rows of .*y.csv are not here, by `dicom_id`"):
        score(str(tmp_path / "y.csv"), str(tmp_path / "s.csv"))


KEYED = pd.DataFrame({"subject_id": [1, 1, 2, 3], "view": ["AP", "PA", "AP", "PA"], "x": [0, 1, 0, 1.0]})


@pytest.mark.parametrize(
    ("labels", "scores"),
    [
        pytest.param({}, {}, id="two keys, unique together"),
        pytest.param({"dicom_id": list("abcd")}, {"dicom_id": list("abcd")}, id="three keys"),
        pytest.param({}, {"subject_id": ["1", "1", "2", "3"]}, id="numbers and text"),
        pytest.param({"view": ["AP", "PA", None, "PA"]}, {"view": ["AP", "PA", None, "PA"]}, id="a missing one"),
        pytest.param({"sample_id": range(4)}, {"stay_id": range(4)}, id="keys of their own"),
        pytest.param({"subject_id": ["01", "01", "02", "03"]}, {"subject_id": [1.0, 1, 2, 3]}, id="padded and real"),
        pytest.param({"subject_id": ["01", "01", "02", "03"]}, {"subject_id": ["01", "01", "02", "03"]}, id="padded"),
        pytest.param({"image": list("abcd")}, {"image": list("abcd")}, id="text that is no known key"),
    ],
)
def test_rows_are_joined_on_all_keys_that_both_files_have(tmp_path: Path, labels: dict, scores: dict) -> None:
    p, order, y, s = np.array([0.2, 0.9, 0.4, 0.3]), [3, 1, 0, 2], tmp_path / "y.csv", tmp_path / "s.parquet"
    for name in ({}, {"x": "label_x"}):  # as any table, and as a run's predictions
        KEYED.assign(**labels).rename(columns=name).to_csv(y, index=False)
        KEYED.assign(**scores, x=np.log(p / (1 - p)) if name else p).iloc[order].rename(
            columns={x: "logit_x" for x in name}
        ).to_parquet(s, index=False)
        got = score(str(y), str(s), samples=9)
        pd.testing.assert_frame_equal(got, evaluate(KEYED["x"], p, names=["x"], groups=[1, 1, 2, 3], samples=9))
    groups = tmp_path / "g.csv"
    KEYED.drop(columns="subject_id").assign(dicom_id=list("abcd")).to_csv(y, index=False)
    KEYED.assign(dicom_id=list("abcd"))[["dicom_id", "subject_id"]].iloc[order].to_csv(groups, index=False)
    pd.DataFrame({"dicom_id": list("abcd"), "x": p}).iloc[order].to_parquet(s, index=False)
    got = score(str(y), str(s), groups=str(groups), samples=50)
    pd.testing.assert_frame_equal(got, evaluate(KEYED["x"], p, names=["x"], groups=[1, 1, 2, 3], samples=50))


def test_rows_that_their_keys_cannot_tell_apart_are_refused_unless_in_the_same_order(tmp_path: Path) -> None:
    y, s = tmp_path / "y.csv", tmp_path / "s.csv"
    KEYED.drop(columns="view").to_csv(y, index=False)
    KEYED.drop(columns="view").assign(x=[0.2, 0.9, 0.4, 0.3]).to_csv(s, index=False)
    assert score(str(y), str(s), samples=0)["value"][0] == 0.75
    for order in ([3, 1, 2, 0], [2, 0, 1, 3]):
        KEYED.drop(columns="view").assign(x=0.5).iloc[order].to_csv(s, index=False)
        with pytest.raises(UserError, match="2 rows share their `subject_id` with another row"):
            score(str(y), str(s), samples=0)


@pytest.mark.parametrize("name", ["image", "number", "fold"])
def test_columns_beside_labels_and_logits_are_keys(tmp_path: Path, name: str) -> None:
    y, s, p = tmp_path / "y.csv", tmp_path / "s.csv", np.array([0.2, 0.9, 0.4, 0.3])
    table = pd.DataFrame({name: list("abcd") if name == "image" else range(4), "label_x": [0, 1, 0, 1]})
    table.to_csv(y, index=False)
    other = table[[name]].assign(logit_x=np.log(p / (1 - p))).iloc[[3, 1, 0, 2]]
    other.to_csv(s, index=False)
    assert score(str(y), str(s), samples=0)["value"][0] == 0.75
    other.assign(**{name: "z"}).to_csv(s, index=False)
    with pytest.raises(UserError, match=f"`{name}`"):
        score(str(y), str(s), samples=0)


@pytest.mark.real
def test_the_arrays_of_the_cases_are_joined_by_subject_and_view(shared: Path) -> None:
    folder = shared / "cases" / "arrays"
    got = score(str(folder / "labels.csv"), str(folder / "scores.csv"), samples=0)
    assert got["value"][0] == pytest.approx(0.9313, abs=5e-5)


def test_the_predictions_of_a_run_are_scored_as_they_are(make_world: World) -> None:
    folder = make_world()
    given = {"features": str(folder / "features"), "store": "memory", "encoder": "pixels", "pixels": 4, "samples": 40}
    out = probe(ProbeConfig.model_validate(given | {"out": str(folder / "runs/probe"), "epochs": 3}))
    path = str(out / "predictions/test.parquet")
    mine = score(path, path, samples=40).set_index(["label", "metric"])
    rows = read_results(out)[1].query("split == 'test'").set_index(["label", "metric"])
    rows = rows.loc[mine.index]
    np.testing.assert_allclose(mine[["value", "low", "high"]].astype(float), rows[["value", "low", "high"]], atol=1e-9)


def begun(run: Path) -> Path:
    """The folder of a pretraining that has not ended."""
    run.mkdir()
    (run / "config.yaml").write_text("seed: 0\n")
    write_json(run / "provenance.json", {})
    return run


def test_watching_ends_with_a_run_that_stopped(
    make_world: World, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refused, killed or stopped: no process holds its lock, and it writes no more."""
    folder = make_world()
    run = begun(folder / "pretrain")
    for path in run.iterdir():
        os.utime(path, (1e9, 1e9))
    given = {"features": str(folder / "features"), "store": "memory", "encoder": str(run), "out": "unused"}
    watch(ProbeConfig.model_validate(given), run)
    assert "stopped before its end" in capsys.readouterr().out
    looks: list[float] = []

    def release(seconds: float) -> None:
        looks.append(seconds)
        if len(looks) == 3:
            os.close(held)

    held = os.open(run / ".lock", os.O_RDWR | os.O_CREAT)
    fcntl.flock(held, fcntl.LOCK_EX)
    os.utime(run / ".lock", (1e9, 1e9))
    monkeypatch.setattr("finetune.probe.watch.time.sleep", release)
    watch(ProbeConfig.model_validate(given), run)
    assert len(looks) == 3


def test_each_exported_encoder_is_probed_once_and_watching_ends_with_the_run(
    make_world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_world()
    run = begun(folder / "pretrain")
    looks: list[int] = []

    def next_export(seconds: float) -> None:  # what the pretraining does while the watcher sleeps
        looks.append(1)
        if len(looks) <= 2:
            tiny(run, step=10 * len(looks), seed=len(looks))
        elif len(looks) == 4:
            write_json(run / "provenance.json", {"finished_at": "now"})

    monkeypatch.setattr("finetune.probe.watch.time.sleep", next_export)
    images = folder / "features/images.parquet"
    table = pd.read_parquet(images)
    given = {"features": str(folder / "features"), "store": "memory", "encoder": str(run), "out": "unused", "epochs": 3}
    config = ProbeConfig.model_validate(given)
    lines = [json.loads(line) for line in watch(config, run).read_text().splitlines()]
    assert [line["step"] for line in lines] == [10, 20] and len(looks) == 4
    assert all(0 <= line[key] <= 1 for line in lines for key in ("linear/auroc", "knn/auroc"))
    findings = ["Edema", "Pneumonia", "Pneumothorax"]
    table.loc[table["split"] == "test", findings] = 1.0
    table.to_parquet(images)  # test labels are not read: other ones change nothing
    (run / "probe.jsonl").unlink()
    again = [json.loads(line) for line in watch(config, run).read_text().splitlines()]
    assert again == lines[1:]
    held = table.loc[table["split"] == "val", ["subject_id"]].drop_duplicates()
    held.to_parquet(run / "seen_subjects.parquet")
    (run / "probe.jsonl").unlink()
    with pytest.raises(UserError, match=r"its pretraining saw .* val or test subjects"):
        watch(config, run)
