"""NIH, CheXpert and any CSV."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from configs import UserError
from ehr_features.schema import FINDINGS
from finetune.config import ProbeConfig, TableConfig
from finetune.films import check_splits
from finetune.layouts import read_layout
from finetune.probe import probe
from finetune.results import read_results


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
        "Patient Age": [60, 61, 30, 45],
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


def test_nih_keeps_its_official_split_and_carves_val_by_subject(tmp_path: Path) -> None:
    config = nih(tmp_path)
    (tmp_path / "test_list.txt").write_text("00000003_000.png\n")
    (tmp_path / "train_val_list.txt").write_text("00000001_000.png\n00000001_001.png\n00000002_000.png\n")
    splits = {seed: read_layout(config, seed=seed).table for seed in range(40)}
    assert all(t["split"].tolist()[3] == "test" and t["split"][0] == t["split"][1] for t in splits.values())
    assert {t["split"][0] for t in splits.values()} == {"train", "val"}


def test_nih_labels_under_chexperts_names(tmp_path: Path) -> None:
    found = read_layout(nih(tmp_path).model_copy(update={"names": "chexpert"}))
    assert set(found.names) < set(FINDINGS)
    assert found.labels["Lung Lesion"].tolist() == [1, 0, 1, 0]  # Mass or Nodule
    assert found.labels["Pleural Effusion"].tolist() == [1, 0, 0, 0]
    assert "Lung Opacity" not in found.names  # Infiltration has no counterpart


def chexpert(folder: Path, *, test: bool) -> TableConfig:
    root = folder / "CheXpert-v1.0-small"
    for part, patients in (
        ("train", range(1, 30)),
        ("valid", (64540, 64541)),
        *((("test", (70000,)),) if test else ()),
    ):
        names = [f"CheXpert-v1.0-small/{part}/patient{p:05d}/study1/view1_frontal.jpg" for p in patients]
        frame = pd.DataFrame({"Path": names, "Sex": "Female", "Age": 50, "Frontal/Lateral": "Frontal", "AP/PA": "PA"})
        for name in FINDINGS:
            frame[name] = 0.0 if name == "Fracture" else np.resize([1.0, -1.0, np.nan], len(names))
        films(folder, names)
        frame.to_csv(root / f"{part}.csv", index=False)
    return table(layout="chexpert", table=str(root / "train.csv"), images=str(root))


def test_chexpert_in_its_published_layout(tmp_path: Path) -> None:
    found = read_layout(chexpert(tmp_path, test=True))
    assert found.names == list(FINDINGS) and found.table["dicom_id"].is_unique
    assert found.table["split"].value_counts().to_dict() == {"train": 29, "val": 2, "test": 1}
    assert found.labels["Edema"].tolist()[:2] == [1.0, -1.0] and np.isnan(found.labels["Edema"][2])
    assert found.table["subject_id"].tolist()[0] == 1 and found.table["sex"].unique().tolist() == ["F"]


def test_chexpert_without_its_test_takes_valid_for_it(tmp_path: Path) -> None:
    found = read_layout(chexpert(tmp_path, test=False))
    assert set(found.table.loc[found.table["subject_id"] > 60000, "split"]) == {"test"}
    check_splits(found)


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
def test_nih_end_to_end_on_real_films(shared: Path, tmp_path: Path) -> None:
    folder = shared / "data/nih_dev_256"
    given = {"layout": "nih", "table": str(folder / "Data_Entry_subset.csv"), "images": str(folder / "images")}
    config = {"films": given, "encoder": "pixels", "out": str(tmp_path / "runs/nih"), "subgroups": ["sex", "view"]}
    about, rows = read_results(probe(ProbeConfig.model_validate(config | {"samples": 200})))
    assert sum(split["films"] for split in about["splits"].values()) == 538
    finding = rows.query("label == 'No Finding' and metric == 'auroc' and split == 'test' and subset == 'all'").iloc[0]
    assert finding["low"] > 0.6
    assert {"sex=F", "sex=M", "view=AP", "view=PA"} < set(rows["subset"])
