"""NIH, CheXpert and any CSV."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from configs import UserError
from ehr_features.own_films.config import TableConfig
from ehr_features.schema import FINDINGS
from finetune.compare import compare_runs
from finetune.config import ProbeConfig
from finetune.labelled import check_splits
from finetune.layouts import read_layout
from finetune.probe.main import probe
from finetune.results import read_results
from pretrain import encoder as encoders
from pretrain.store import Store

World = Callable[..., Path]


def films(folder: Path, names: list[str]) -> None:
    for i, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(i).integers(0, 255, (24, 24), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name)


def table(**given: object) -> TableConfig:
    return TableConfig.model_validate(given)


def nih(folder: Path) -> TableConfig:
    rows = {
        "Image Index": ["00000001_000.png", "00000001_001.png", "00000002_000.png", "00000003_000.png"],
        "Finding Labels": ["Mass|Effusion", "No Finding", "Nodule", "Infiltration"],
        "Patient ID": [1, 1, 2, 3],
        "View Position": ["PA", "AP", "PA", "AP"],
        "Patient Gender": ["F", "F", "M", "M"],
        "Patient Age": ["060Y", "061Y", "018M", "45"],  # the first release's form, and the later one's
        "Unnamed: 11": None,  # each line of the published file ends with a comma
    }
    pd.DataFrame(rows).to_csv(folder / "Data_Entry_2017.csv", index=False)
    films(folder / "images_001/images", [name.replace(".png", ".jpg") for name in rows["Image Index"]])
    return table(layout="nih", table=str(folder / "Data_Entry_2017.csv"), images=str(folder))


def test_nih_in_its_published_layout(tmp_path: Path) -> None:
    found = read_layout(nih(tmp_path))
    assert len(found) == 4 and len(found.names) == 15
    assert found.labels.loc[0, ["Mass", "Effusion", "Nodule", "No Finding"]].tolist() == [1, 1, 0, 0]
    assert found.labels.loc[1].sum() == 1 and found.labels.loc[1, "No Finding"] == 1
    assert found.table["path"].str.endswith(".jpg").all()  # found by stem, whatever the suffix and folder
    assert found.table.groupby("subject_id")["split"].nunique().max() == 1
    assert found.table["age_years"].tolist() == [60, 61, 1.5, 45]
    assert "split by hash" in found.warnings[0]


def test_nih_keeps_its_official_split_and_carves_val_by_subject(tmp_path: Path) -> None:
    config = nih(tmp_path)
    (tmp_path / "test_list.txt").write_text("00000003_000.png\n")
    (tmp_path / "train_val_list.txt").write_text("00000001_000.png\n00000001_001.png\n00000002_000.png\n")
    splits = {seed: read_layout(config.model_copy(update={"seed": seed})).table for seed in range(40)}
    assert all(t["split"].tolist()[3] == "test" and t["split"][0] == t["split"][1] for t in splits.values())
    assert {t["split"][0] for t in splits.values()} == {"train", "val"}


def test_views_are_known_in_any_case(tmp_path: Path) -> None:
    nih(tmp_path)
    table_ = pd.read_csv(tmp_path / "Data_Entry_2017.csv")
    table_.assign(**{"View Position": ["pa", " AP", "Pa", "ap"]}).to_csv(tmp_path / "Data_Entry_2017.csv", index=False)
    given = {"table": str(tmp_path / "Data_Entry_2017.csv"), "images": str(tmp_path)}
    assert read_layout(table(layout="nih", **given)).table["view"].tolist() == ["PA", "AP", "PA", "AP"]
    rows = {"path": [f"images_001/images/0000000{i}.jpg" for i in (1, 2)], "sick": [0, 1], "side": ["Lateral", "ap"]}
    pd.DataFrame(rows).to_csv(tmp_path / "my.csv", index=False)
    films(tmp_path, rows["path"])
    mine = table(layout="csv", columns=["sick"], view="side", **given | {"table": str(tmp_path / "my.csv")})
    assert read_layout(mine).table["view"].tolist() == ["LATERAL", "AP"]


def test_nih_labels_under_chexperts_names(tmp_path: Path) -> None:
    found = read_layout(nih(tmp_path).model_copy(update={"names": "chexpert"}))
    assert set(found.names) < set(FINDINGS)
    assert found.labels["Lung Lesion"].tolist() == [1, 0, 1, 0]  # Mass or Nodule
    assert found.labels["Pleural Effusion"].tolist() == [1, 0, 0, 0]
    assert "Lung Opacity" not in found.names  # Infiltration has no counterpart


# the header of CheXpert-v1.0-small/train.csv
CHEXPERT = [
    "Path", "Sex", "Age", "Frontal/Lateral", "AP/PA", "No Finding", "Enlarged Cardiomediastinum", "Cardiomegaly",
    "Lung Opacity", "Lung Lesion", "Edema", "Consolidation", "Pneumonia", "Atelectasis", "Pneumothorax",
    "Pleural Effusion", "Pleural Other", "Fracture", "Support Devices",
]  # fmt: skip


def chexpert(folder: Path, *, test: str | None, train: int = 30) -> TableConfig:
    """CheXpert-v1.0-small in its published form; edema brightens a film's upper half."""
    root = folder / "CheXpert-v1.0-small"
    parts = {"train": range(1, train), "valid": (64540, 64541)} | ({"test": range(70000, 70030)} if test else {})
    for part, patients in parts.items():
        rows = []
        for p in patients:
            lateral = [("view2_lateral", "Lateral", None)] * (p % 3 == 0)
            for view, side, ap in [("view1_frontal", "Frontal", "PA" if p % 2 else "AP"), *lateral]:
                name = f"{part}/patient{p:05d}/study1/{view}.jpg"
                labels = np.resize([1.0, 0.0, np.nan, -1.0], 14)[::-1] if p == 2 else np.resize([1.0, 0.0, np.nan], 14)
                labels = np.roll(labels, p)
                rows.append([f"CheXpert-v1.0-small/{name}", "Female", 50, side, ap, *labels])
                pixels = np.random.default_rng(p).integers(60, 100, (24, 24), dtype=np.uint8)
                pixels[:12] += np.uint8(80 * (labels[5] == 1))
                (root / name).parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(root / name)
        frame = pd.DataFrame(rows, columns=CHEXPERT)
        if part == "test" and test == "test_labels.csv":  # CheXlocalize's: other paths, no sex, another name
            frame["Path"] = frame["Path"].str.removeprefix("CheXpert-v1.0-small/")
            frame = frame.drop(columns=["Sex", "Age", "Frontal/Lateral", "AP/PA"])
            frame = frame.rename(columns={"Lung Opacity": "Airspace Opacity"})
        frame.to_csv(root / (test if part == "test" else f"{part}.csv"), index=False)
    return table(layout="chexpert", table=str(root / "train.csv"), images=str(root))


@pytest.mark.parametrize("test", ["test.csv", "test_labels.csv"])
@pytest.mark.parametrize("above", [False, True])
def test_chexpert_in_its_published_layout(tmp_path: Path, test: str, above: bool) -> None:
    config = chexpert(tmp_path, test=test)
    found = read_layout(config.model_copy(update={"images": str(tmp_path)}) if above else config)
    assert found.names == list(FINDINGS) and found.table["dicom_id"].is_unique and found.left_out == {}
    frontal = found.table["view"] != "LATERAL"
    assert found.table["split"][frontal].value_counts().to_dict() == {"train": 29, "val": 2, "test": 30}
    assert (~frontal).sum() == (found.table["subject_id"] % 3 == 0).sum() // 2 > 0
    one = found.table.index[found.table["subject_id"] == 2][0]
    assert set(found.labels.loc[one].dropna()) == {1.0, 0.0, -1.0} and found.labels.loc[one].isna().any()
    assert found.table.loc[one, ["dicom_id", "study_id", "view", "sex", "age_years"]].tolist() == [
        "patient00002_study1_view1_frontal",
        "patient00002_study1",
        "AP",
        "F",
        50,
    ]
    assert found.labels["Lung Opacity"][found.table["split"] == "test"].notna().any() and found.warnings == ()


def test_chexpert_without_its_test_takes_valid_for_it_and_says_so(tmp_path: Path) -> None:
    found = read_layout(chexpert(tmp_path, test=None))
    assert set(found.table.loc[found.table["subject_id"] > 60000, "split"]) == {"test"}
    assert "valid.csv is the test split" in found.warnings[0]
    check_splits(found)


def test_a_mimic_head_is_scored_on_chexpert_without_training(
    make_world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_world()  # edema brightens a corner there, the upper half here
    given = {"encoder": "pixels", "pixels": 2, "samples": 40, "method": "logistic"}
    mimic = given | {"features": str(folder / "features"), "store": "memory", "out": str(folder / "runs/mimic")}
    head = probe(ProbeConfig.model_validate(mimic))
    monkeypatch.setattr("finetune.layouts.Store", Store)
    layout = chexpert(folder, test="test.csv").model_dump() | {"size": 24}
    there = {"films": layout, "method": "transfer", "head": str(head), "out": str(folder / "runs/chexpert")}
    about, rows = read_results(probe(ProbeConfig.model_validate(given | there)))
    assert about["transfer"]["labels"] == ["Edema", "Pneumonia", "Pneumothorax"] and set(rows["split"]) == {"test"}
    edema = rows.query("label == 'Edema' and metric == 'auroc'").iloc[0]
    assert edema["value"] > 0.95 and edema["n"] == 30 and about["left_out"]["not frontal"] == 10
    assert about["splits"].keys() == {"test"} and about["left_out"]["not of split test"] == 40
    only = layout | {"table": layout["table"].replace("train.csv", "valid.csv")}  # the official validation set alone
    alone = there | {"films": only, "out": str(folder / "runs/valid")}
    assert read_results(probe(ProbeConfig.model_validate(given | alone)))[0]["splits"]["test"]["films"] == 2
    with pytest.raises(UserError, match="not the encoder that the head"):
        probe(ProbeConfig.model_validate(given | there | {"pixels": 4, "out": str(folder / "runs/other")}))


def test_any_csv_is_probed_from_one_small_config(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    names = [f"film{i}.png" for i in range(150)]
    sick = rng.integers(2, size=150)
    for name, y in zip(names, sick, strict=True):
        pixels = rng.integers(60, 120, (24, 24), dtype=np.uint8)
        pixels[:12] += np.uint8(80 * y)
        Image.fromarray(pixels).save(tmp_path / name)
    pd.DataFrame({"file": names, "sick": sick, "who": [f"p{i // 2}" for i in range(150)]}).to_csv(tmp_path / "my.csv")
    (tmp_path / names[0]).write_bytes(b"not a film")
    (tmp_path / names[1]).unlink()
    given = {"layout": "csv", "table": str(tmp_path / "my.csv"), "images": str(tmp_path), "path": "file", "size": 24}
    given |= {"columns": ["sick"], "subject": "who"}
    out = str(tmp_path / "runs/probe")
    config = {"films": given, "encoder": "pixels", "pixels": 4, "out": out, "samples": 40, "epochs": 10, "unit": "film"}
    about, rows = read_results(probe(ProbeConfig.model_validate(config)))
    assert rows.query("label == 'macro' and metric == 'auroc' and split == 'test'")["value"].item() > 0.95
    assert sum(about["left_out"].values()) == 2 and "not in the store" in about["left_out"]


def test_films_of_equal_names_in_other_folders_are_not_mixed_up(tmp_path: Path) -> None:
    names = [f"p{i}/view1.png" for i in range(4)]
    films(tmp_path, names)
    pd.DataFrame({"path": names, "sick": [1, 0, 1, 0], "who": list("abab")}).to_csv(tmp_path / "my.csv", index=False)
    config = table(layout="csv", table=str(tmp_path / "my.csv"), images=str(tmp_path), columns=["sick"], subject="who")
    found = read_layout(config).table
    assert found["dicom_id"].tolist() == [f"p{i}/view1" for i in range(4)]
    assert [Path(path).parent.name for path in found["path"]] == ["p0", "p1", "p2", "p3"]
    assert found["subject_id"].tolist()[:2] == found["subject_id"].tolist()[2:] and found["subject_id"].nunique() == 2
    (tmp_path / "deep").mkdir()
    (tmp_path / "p0").rename(tmp_path / "deep/p0")  # elsewhere now: not taken for another film of that name
    assert read_layout(config).left_out == {f"no file below {tmp_path}": 1}


@pytest.mark.parametrize("suffix", ["", ".png", ".PNG"])
@pytest.mark.parametrize("names", [["00000001", "00000002"], ["1.2.840.3.0", "1.2.840.3.1"], ["007", "a.b.7"]])
def test_numeric_ids_and_paths_stay_text_and_films_are_found_whatever_their_suffix(
    tmp_path: Path, names: list[str], suffix: str
) -> None:
    for n, name in enumerate(names):
        films(tmp_path / "films", [f"{n}.png"])
        (tmp_path / "films" / f"{n}.png").rename(tmp_path / "films" / f"{name}{suffix}")
    rows = pd.DataFrame({"path": names, "sick": [1, 0], "who": ["0012", "0013"], "exam": ["01", "02"]})
    rows.to_csv(tmp_path / "my.csv", index=False)
    given = {"layout": "csv", "table": str(tmp_path / "my.csv"), "images": str(tmp_path / "films"), "columns": ["sick"]}
    found = read_layout(table(**given, subject="who", study="exam")).table
    assert found["dicom_id"].tolist() == names and found["study_id"].tolist() == ["01", "02"]
    assert [Path(p).name for p in found["path"]] == [name + suffix for name in names]
    assert found["subject_id"].tolist() == [12, 13]


JUNK = {"blank": lambda columns: [None] * len(columns), "header": list}


@pytest.mark.parametrize("junk", JUNK)
@pytest.mark.parametrize("layout", ["nih", "chexpert", "csv"])
def test_rows_without_an_id_and_repeated_headers_are_left_out_and_counted(
    tmp_path: Path, layout: str, junk: str
) -> None:
    if layout == "csv":
        films(tmp_path, [f"{i}.png" for i in range(4)])
        rows = pd.DataFrame({"path": [f"{i}.png" for i in range(4)], "sick": [1, 0, 1, 0], "who": list("abcd")})
        rows.to_csv(tmp_path / "my.csv", index=False)
        given = {"table": str(tmp_path / "my.csv"), "images": str(tmp_path), "columns": ["sick"], "subject": "who"}
        config, key = table(layout="csv", **given), "path"
    else:
        config = nih(tmp_path) if layout == "nih" else chexpert(tmp_path, test="test.csv")
        key = "Image Index" if layout == "nih" else "Path"
    clean = read_layout(config)
    raw = pd.read_csv(config.table, dtype=str)
    middle = pd.DataFrame([JUNK[junk](raw.columns)], columns=raw.columns)
    pd.concat([raw[:2], middle, raw[2:]]).to_csv(config.table, index=False)
    found = read_layout(config)
    pd.testing.assert_frame_equal(found.table, clean.table, check_dtype=False)
    pd.testing.assert_frame_equal(found.labels, clean.labels)
    assert found.left_out == {**clean.left_out, f"row without {key}": 1}


@pytest.mark.parametrize(
    ("values", "says"), [([1, 0, 2, 0], r"1 values of `sick` are not 1, 0, -1.* line 4"), (list("ynyn"), "1, 0, -1")]
)
def test_labels_that_are_none_are_refused_before_any_work(tmp_path: Path, values: list, says: str) -> None:
    names = [f"{i}.png" for i in range(4)]
    films(tmp_path, names)
    pd.DataFrame({"path": names, "sick": values}).to_csv(tmp_path / "my.csv", index=False)
    config = table(layout="csv", table=str(tmp_path / "my.csv"), images=str(tmp_path), columns=["sick"])
    with pytest.raises(UserError, match=says):
        read_layout(config)
    pd.DataFrame({"path": [names[0]] * 2, "sick": [1, 0]}).to_csv(tmp_path / "my.csv", index=False)
    with pytest.raises(UserError, match="1 films have more than one row"):
        read_layout(config)


def test_an_empty_label_of_a_csv_is_unknown_and_one_of_a_report_negative(tmp_path: Path) -> None:
    names = [f"{i}.png" for i in range(4)]
    films(tmp_path, names)
    labels = pd.DataFrame({"path": names, "a": [1, 0, None, None], "b": [1, None, -1, None]})
    labels.to_csv(tmp_path / "my.csv", index=False)
    given = {"layout": "csv", "table": str(tmp_path / "my.csv"), "images": str(tmp_path), "columns": ["a", "b"]}
    found = read_layout(table(**given))
    assert len(found) == 3 and found.left_out == {"no labels": 1}
    nan, rows = np.nan, np.arange(3)
    np.testing.assert_array_equal(found.evaluated(rows), [[1, 1], [0, nan], [nan, nan]])
    np.testing.assert_array_equal(found.trained(rows, "ones", None), [[1, 1], [0, nan], [nan, 1]])
    np.testing.assert_array_equal(found.trained(rows, "ignore", "zeros"), [[1, 1], [0, 0], [0, nan]])
    assert len(read_layout(table(**given), labels=["a"])) == 2
    reports = read_layout(chexpert(tmp_path, test=None), labels=["Edema"])
    np.testing.assert_array_equal(
        reports.evaluated(np.arange(len(reports)))[:, 0], reports.labels["Edema"].fillna(0).replace(-1, nan)
    )


@pytest.mark.parametrize("words", [["train", "valid", "test"], ["Train", "VAL", "Test"], ["training", "dev", "test"]])
def test_a_tables_own_split_is_kept(tmp_path: Path, words: list[str]) -> None:
    names = [f"{i}.png" for i in range(3)]
    films(tmp_path, names)
    pd.DataFrame({"path": names, "sick": [1, 0, 1], "part": words}).to_csv(tmp_path / "my.csv", index=False)
    given = {"layout": "csv", "table": str(tmp_path / "my.csv"), "images": str(tmp_path), "columns": ["sick"]}
    assert read_layout(table(**given, split="part")).table["split"].tolist() == ["train", "val", "test"]


def test_faults_of_a_table_are_named(tmp_path: Path) -> None:
    config = nih(tmp_path)
    with pytest.raises(UserError, match="no label `Edma`"):
        read_layout(config, labels=["Edma"])
    with pytest.raises(UserError, match="none of the 4 films"):
        (tmp_path / "empty").mkdir()
        read_layout(config.model_copy(update={"images": str(tmp_path / "empty")}))
    with pytest.raises(UserError, match="columns missing: Image Index"):
        pd.DataFrame({"x": [1]}).to_csv(tmp_path / "odd.csv")
        read_layout(config.model_copy(update={"table": str(tmp_path / "odd.csv")}))


@pytest.mark.real
@pytest.mark.slow
def test_nih_end_to_end_on_real_films(shared: Path, tmp_path: Path) -> None:
    folder = shared / "data/nih_dev_256"
    given = {"layout": "nih", "table": str(folder / "Data_Entry_subset.csv"), "images": str(folder / "images")}
    common = {"samples": 200, "cache": str(tmp_path / "cache"), "subgroups": ["sex", "age", "view"]}
    torch.manual_seed(0)
    small = {"depth": 2, "embed_dim": 48, "num_heads": 3, "patch_size": 8}
    made = encoders.create("vit_tiny_patch16_224", image_size=64, model_args=small)
    encoder = encoders.save(tmp_path / "encoder", made, {"ehr_groups": {}})
    runs = {
        "pixels": {"encoder": "pixels", "fraction": [0.1, 1.0], "repeats": 2, "shift": {"field": "view"}},
        "frozen": {"encoder": str(encoder), "method": "knn"},
        "record": {"encoder": "metadata", "method": "boosting", "groups": ["sex", "age", "view"]},
        "attentive": {"encoder": str(encoder), "method": "attentive", "tune": {"epochs": 1}},
    }
    for name, more in runs.items():
        films = given | {"names": "chexpert" if name == "frozen" else "own"}
        out = str(tmp_path / "runs" / name)
        about, rows = read_results(probe(ProbeConfig.model_validate(common | more | {"films": films, "out": out})))
        assert sum(split["films"] for split in about["splits"].values()) == 538, name
        assert {"sex=F", "sex=M", "view=AP", "view=PA"} < set(rows["subset"]), name
        finding = rows.query("label == 'No Finding' and metric == 'auroc' and split == 'test' and subset == 'all'")
        assert len(finding) == (2 if name == "pixels" else 1) and finding["value"].between(0, 1).all(), name
        if name == "pixels":
            assert finding["low"].iloc[-1] > 0.6 and "view: AP -> PA" in set(rows["subset"])
        assert ("macro CheXpert-5" in set(rows["label"])) == (name == "frozen")
    table = compare_runs([tmp_path / "runs/pixels"], [tmp_path / "runs/record"], samples=100)
    assert table["label"].iloc[0] == "macro" and table["low"].iloc[0] < table["high"].iloc[0]
