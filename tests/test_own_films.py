"""docs/your_own_films.md, run as it stands: from films and a table to a report, on made and on real films."""

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from tests import forked
from tests.ehr_features.test_own_films import chexpert_train
from tests.test_docs import ROOT, Block, blocks, environment, execute

PAGE = ROOT / "docs/your_own_films.md"
SHORTER = {  # the page's trainings take hours; these words make them short
    "images": "size=32 workers=1",
    "pretrain": "encoder.image_size=32 'encoder.model_args={patch_size: 8, embed_dim: 24, depth: 1, num_heads: 2}' "
    "views.num_focal=1 views.focal_size=16 loss.prototypes=16 head.hidden=16 head.out=8 optim.batch_size=8 "
    "optim.steps=4",
    "probe": "epochs=2 samples=20",
    "fuse": "epochs=2 samples=20 hidden=8 joint=8",
    "report": "",
}


def page_block(language: str, word: str) -> Block:
    return next(b for b in blocks(PAGE) if b.language == language and word in b.text)


def made(folder: Path) -> None:
    """The page's example with 120 films of 60 people: pneumonia whitens the lower half, the view may be lower-case."""
    head = page_block("csv", "path").text.splitlines()[0].split(",")
    rng, rows = np.random.default_rng(0), []
    for i in range(120):
        person, sick = i // 2, i % 4 == 0
        pixels = rng.integers(40, 90, (32, 32), dtype=np.uint8)
        pixels[16:] += np.uint8(120 * sick)
        name = f"p{person:03d}/{'ab'[i % 2]}.png"
        (folder / "films" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / "films" / name)
        ward = ["icu", "er", None][person % 3]
        rows.append([name, f"P-{person:03d}", "MF"[person % 2], 30 + person % 50, ["ap", "PA"][i % 2], ward, int(sick)])
    pd.DataFrame(rows, columns=head).to_csv(folder / "my.csv", index=False)


def real(folder: Path) -> None:
    """Every twelfth person of ../shared/data/films_real: NIH's adults and Guangzhou's children."""
    source = ROOT.parent / "shared/data/films_real"
    table = pd.read_csv(source / "films.csv")
    table = table[table["patient"].isin(table["patient"].drop_duplicates()[::12])]
    table = table.assign(
        pneumonia=table["findings"].str.contains("Pneumonia").astype(int),
        ward=table["source"].map({"nih": "adults", "guangzhou": "children"}),
    )
    table.drop(columns=["findings", "follow_up", "pixels"]).to_csv(folder / "my.csv", index=False)
    (folder / "films").symlink_to(source)


def hannover(folder: Path) -> None:
    """41 patients with m, f, ap, pa, and laboratory values; no age: the page's words take C-reactive protein for it."""
    source = ROOT.parent / "shared/data/hannover_dev_320"
    table = pd.read_csv(source / "data.csv")
    table = table.assign(
        path=table["image_id"] + ".jpg",
        ward=table["modality"],
        damage=table["ldh_val"] > 250,
    )
    columns = {"patient_id": "patient", "projection": "view", "crp_val": "crp"}
    table.rename(columns=columns)[["path", "patient", "sex", "crp", "view", "ward", "damage"]].to_csv(
        folder / "my.csv", index=False
    )
    (folder / "films").symlink_to(source / "images")


WORDS = {hannover: {"age": "crp", "pneumonia": "damage"}}  # the page's columns -> the table's


@pytest.mark.parametrize("films", [made, *(pytest.param(f, marks=pytest.mark.real) for f in (real, hannover))])
def test_the_five_commands_of_the_page_go_from_a_folder_to_a_report(
    tmp_path: Path, films: Callable[[Path], None], request: pytest.FixtureRequest
) -> None:
    if films is not made:
        request.getfixturevalue("shared")
    films(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    page = page_block("sh", "runs/fuse")
    assert [words[1] for words in page.commands()] == list(SHORTER)
    script = [f"{line} {SHORTER[line.split()[1]]}" for line in page.text.splitlines()]
    words = WORDS.get(films, {})
    for theirs, own in words.items():
        script = [re.sub(rf"\b{theirs}\b", own, line) for line in script]
    execute(tmp_path, "\n".join(script).replace("./launch.sh ", f"bash {ROOT}/launch.sh "))

    for run in ("probe", "fuse"):  # the split of the pretraining, and the guard's count
        said = json.loads((tmp_path / f"runs/{run}/results.json").read_text())["run"]
        assert said["guard"]["both"] == 0 < said["guard"]["held_out"], run
        assert not any("other source" in warning for warning in said["warnings"]), said["warnings"]
    seen = set(pd.read_parquet(tmp_path / "runs/msn/seen_subjects.parquet")["subject_id"])
    parts = {
        s: set(pd.read_parquet(tmp_path / f"runs/probe/predictions/{s}.parquet")["subject_id"]) for s in ("val", "test")
    }
    assert seen and parts["test"] and not seen & (parts["val"] | parts["test"])
    meta = json.loads((tmp_path / "runs/msn/encoder/encoder.json").read_text())
    number = words.get("age", "age")
    assert meta["ehr_groups"] == {number: "study", "sex": "study", "ward": "study"}
    scaled = {"age": "age_years"}.get(number, number)
    assert {scaled, f"{scaled}_missing", "sex_m", "ward_other", "ward_missing"} <= set(meta["ehr"]["columns"])
    assert (tmp_path / "report.html").stat().st_size > 10_000


def test_the_pages_layout_and_table_are_read(tmp_path: Path) -> None:
    from ehr_features.own_films.config import TableConfig, find_layout
    from ehr_features.own_films.read import read_films_table

    (tmp_path / "clinic.yaml").write_text(page_block("yaml", "datei").text)
    assert find_layout(str(tmp_path / "clinic.yaml")).labels.values == {"ja": 1, "nein": 0, "unklar": -1}
    (tmp_path / "my.csv").write_text(page_block("csv", "path").text)
    found = read_films_table(TableConfig(table=str(tmp_path / "my.csv")), labels=True)
    assert list(found.labels) == ["pneumonia"] and found.films["dicom_id"].tolist() == ["p001/a", "p001/b", "p002/a"]


def test_the_pages_table_of_usual_names_is_that_of_the_layout() -> None:
    from ehr_features.own_films.config import find_layout

    layout, text = find_layout("csv"), PAGE.read_text(encoding="utf-8")
    for role in ("path", "subject", "study", "split", "view", "sex", "age", "taken_at"):
        row = next(line for line in text.splitlines() if line.startswith(f"| `films.{role}=`"))
        assert row.split("|")[2].strip() == ", ".join(getattr(layout, role)), role
    named = set(re.findall(r"^\| `(\w+)` \| \S", text, re.MULTILINE))
    assert named == {p.stem for p in (ROOT / "ehr_features/own_films/layouts").glob("*.yaml")} - {"csv"}


@pytest.mark.slow
def test_chexperts_whole_train_table_pretrains_and_probes_with_no_table_of_ones_own(tmp_path: Path) -> None:
    table = chexpert_train()
    table.to_csv(tmp_path / "train.csv", index=False)
    rng, rows = np.random.default_rng(0), table[table["Frontal/Lateral"] == "Frontal"].iloc[:400]
    names = rows["Path"].str.split("/", n=2).str[2].str.removesuffix(".jpg").str.replace("/", "_")
    (tmp_path / "films").mkdir()
    for name in names:
        Image.fromarray(rng.integers(0, 255, (32, 32), dtype=np.uint8)).save(tmp_path / f"films/{name}.png")
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    own = "films.table=train.csv films.layout=chexpert store=store"
    lines = [
        f"images configs/images.yaml mimic_cxr=null films=films out=store {SHORTER['images']}",
        f"pretrain configs/own_films/pretrain.yaml {own} 'ehr.groups=[age,sex,view]' {SHORTER['pretrain']}",
        f"probe configs/own_films/probe.yaml {own} encoder=runs/msn labels=[Edema] {SHORTER['probe']}",
    ]
    for line in lines:
        done = forked.run(["configs", *shlex.split(line)], tmp_path, environment())
        assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
    log = (tmp_path / "runs/msn/log.txt").read_text()
    assert "columns: path=Path, view=AP/PA, sex=Sex, age=Age" in log and "not in the store" in log
    said = json.loads((tmp_path / "runs/probe/results.json").read_text())["run"]
    assert said["guard"]["both"] == 0 and said["pretraining_films"] == "train"
    assert sum(part["films"] for part in said["splits"].values()) == 400
