"""Notes of a demo hospital, compared with a simple reading of its tables; independent of labels, threads and chunks."""

from __future__ import annotations

import itertools
import json
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs import UserError
from ehr_features.build import build
from ehr_features.config import FeaturesConfig, NotesConfig
from ehr_features.demo import generate as demo
from ehr_features.notes import facts as notes_words
from ehr_features.notes import write as notes
from ehr_features.notes.write import write_notes
from ehr_features.schema import FINDINGS, NOTES
from ehr_features.typed import read_json

WRITTEN = ("notes.parquet", "unfiltered.parquet", "schema.json", "attrition.json")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A raw synthetic MIMIC with leaky complaints, and its features."""
    root = tmp_path_factory.mktemp("notes")
    demo.generate(root / "raw", subjects=160, seed=3, film_size=32, leak=0.5)
    raw = {f"mimic_{name}": str(root / "raw" / folder) for name, folder in (("iv", "mimic-iv"), ("cxr", "mimic-cxr"))}
    build(FeaturesConfig(**raw, mimic_ed=str(root / "raw/mimic-iv-ed"), out=root / "features", tasks=("mortality",)))
    return root


def config(root: Path, out: Path, **more: Any) -> NotesConfig:
    raw = {"mimic_iv": str(root / "raw/mimic-iv"), "mimic_ed": str(root / "raw/mimic-iv-ed")}
    return NotesConfig(**{"features": root / "features", **raw, "out": out, "memory": "1GB"} | more)


@pytest.fixture(scope="module")
def made(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_notes(config(world, tmp_path_factory.mktemp("made") / "notes"))


def raw(root: Path, name: str) -> pd.DataFrame:
    times = ["intime", "charttime", "admittime", "dischtime", "edregtime"]
    frame = pd.read_csv(root / "raw" / f"{name}.csv.gz", dtype={"icd_code": str})
    return frame.assign(**{c: pd.to_datetime(frame[c]) for c in times if c in frame})


def section(row: pd.Series, name: str) -> str:
    return next((s["text"] for s in row["sections"] if s["name"] == name), "")


def test_each_linked_film_has_a_note_and_the_others_are_counted(world: Path, made: Path) -> None:
    films, table = pd.read_parquet(world / "features/images.parquet"), pd.read_parquet(made / "notes.parquet")
    linked = films[films["hadm_id"].notna() | films["ed_stay_id"].notna()]
    assert set(table["dicom_id"]) == set(linked["dicom_id"]) and table["dicom_id"].is_unique
    assert 0 < len(linked) < len(films)
    steps = read_json(made / "attrition.json")["exclusions"]
    assert steps[0]["before"] == len(films) and steps[-1]["after"] == len(table)
    assert all(a["after"] == b["before"] for a, b in itertools.pairwise(steps))
    both = table.merge(films[["dicom_id", "split", "subject_id"]], on=["dicom_id", "split", "subject_id"])
    assert len(both) == len(table)


def test_the_columns_are_those_of_the_schema(made: Path) -> None:
    described = read_json(made / "schema.json")["notes"]
    table = pq.read_schema(made / "notes.parquet")
    assert table.names == list(described) == list(NOTES)
    types = {"int64": "int64", "string": "string", "timestamp": "timestamp[us]"}
    assert all(str(table.field(n).type) == types[c.type] for n, c in NOTES.items() if c.type in types)


def test_a_note_is_its_sections_and_names_nothing_that_is_missing(made: Path) -> None:
    table = pd.read_parquet(made / "notes.parquet")
    for note, sections in zip(table["note"], table["sections"], strict=True):
        assert note == "\n".join(s["text"] for s in sections) != ""
        assert not re.search(r"\b(nan|none|null|nat|unknown)\b|___|[:,;] other[.,;]", note, re.IGNORECASE), note
        assert not re.search(r"[:,;]\s*[.,;]|\s[.,;]|\.\.|\(\)|  |^\s|\s$|: *$", note, re.MULTILINE), note


def test_no_fact_is_from_after_its_film(made: Path) -> None:
    table = pd.read_parquet(made / "notes.parquet")
    assert (table["available_at"] <= table["taken_at"]).all() and table["available_at"].notna().all()


def test_notes_say_what_a_plain_reading_of_the_tables_says(world: Path, made: Path) -> None:
    """Every film, with pandas alone: visit, vital signs, drugs, home medication, earlier diagnoses."""
    table = pd.read_parquet(made / "notes.parquet")
    before = pd.read_parquet(made / "unfiltered.parquet").set_index("dicom_id")["note"]
    films = pd.read_parquet(world / "features/images.parquet").set_index("dicom_id")
    stays, triage = raw(world, "mimic-iv-ed/ed/edstays"), raw(world, "mimic-iv-ed/ed/triage").set_index("stay_id")
    tables = {name: raw(world, f"mimic-iv-ed/ed/{name}") for name in ("vitalsign", "medrecon", "pyxis")}
    admissions, codes = raw(world, "mimic-iv/hosp/admissions"), raw(world, "mimic-iv/hosp/diagnoses_icd")
    codes = codes.merge(raw(world, "mimic-iv/hosp/d_icd_diagnoses"), on=["icd_code", "icd_version"])
    told = dict.fromkeys(("visit", "drugs", "home", "history", "later"), 0)
    for row in table.itertuples():
        film, note = films.loc[row.dicom_id], before[row.dicom_id]
        at = film["taken_at"]
        own = stays[(stays["stay_id"] == film["ed_stay_id"]) & (stays["intime"] <= at)]
        theirs = stays[(stays["hadm_id"] == film["hadm_id"]) & (stays["intime"] <= at)]
        visit = (own if len(own) else theirs.sort_values("intime"))["stay_id"].tolist()[-1:]
        assert visit == ([] if pd.isna(row.ed_stay_id) else [row.ed_stay_id])
        if visit:
            told["visit"] += 1
            first = triage.loc[visit[0]]
            if pd.notna(first["heartrate"]) and 10 <= first["heartrate"] <= 300:
                assert f"heart rate {first['heartrate']:.0f} per minute" in note
            if 77 <= first["temperature"] <= 113:
                assert re.search(rf"temperature {(first['temperature'] - 32) / 1.8:.1f} C", note) or (
                    abs((first["temperature"] - 32) / 1.8 * 10 % 1 - 0.5) < 1e-6
                )
        seen = {n: t[t["stay_id"].isin(visit) & (t["charttime"] <= at)] for n, t in tables.items()}
        for name, label in (("pyxis", "Given in the emergency department"), ("medrecon", "Home medication")):
            wanted = "; ".join(sorted(set(seen[name]["name"]), key=str.lower))
            assert (f"{label}: {wanted}." in note) if wanted else (label not in note)
            told["drugs" if name == "pyxis" else "home"] += bool(wanted)
        rates = seen["vitalsign"].dropna(subset="heartrate").sort_values(["charttime", "heartrate"])
        rates = rates[rates["heartrate"].between(10, 300)]
        if len(rates):
            later = re.search(r"Latest vital signs[^\n]*heart rate (\d+) per", note)
            assert later and int(later[1]) == rates["heartrate"].iloc[-1]
            told["later"] += 1
        ended = admissions[(admissions["subject_id"] == film["subject_id"]) & (admissions["dischtime"] < at)]
        wanted = set(codes.loc[codes["hadm_id"].isin(ended["hadm_id"]), "long_title"])
        listed = re.search(r"Diagnoses of earlier admissions: ([^\n]*)\.$", note, re.MULTILINE)
        assert (set(listed[1].split("; ")) if listed else set()) == wanted
        told["history"] += bool(wanted)
        assert ("male." in note) and (f"{film['age_years']:.0f} years old" in note or film["age_capped"])
    assert min(told.values()) > 5, told


def test_the_filter_leaves_no_term_and_is_the_only_difference(world: Path, made: Path, tmp_path: Path) -> None:
    table, before = pd.read_parquet(made / "notes.parquet"), pd.read_parquet(made / "unfiltered.parquet")
    leaky = before["note"].str.contains("pneumonia|pneumothorax|effusion|cardiomegaly", case=False)
    assert leaky.sum() > 5 and not table["note"].str.contains("pneumonia|pneumothorax|effusion|cardiomegaly").any()
    assert (table["num_removed"] > 0).sum() >= leaky.sum()
    assert "productive cough" in "".join(table["note"])
    none = write_notes(config(world, tmp_path / "none", filter="none"))
    whole = pd.read_parquet(none / "notes.parquet")
    assert not (none / "unfiltered.parquet").exists() and (whole["num_removed"] == 0).all()
    pd.testing.assert_frame_equal(whole[["dicom_id", "note"]], before)
    gone = read_json(made / "attrition.json")["counts"]["terms taken out by the leak filter (standard)"]
    assert sum(gone.values()) == table["num_removed"].sum() and gone["Pneumonia"] > 0
    harder = write_notes(config(world, tmp_path / "hard", filter="aggressive"))
    assert pd.read_parquet(harder / "notes.parquet")["num_removed"].sum() > table["num_removed"].sum()


@given(st.integers(0, 2**32 - 1), st.booleans())
@settings(max_examples=4, deadline=None)
def test_permuting_the_labels_changes_no_byte(world: Path, made: Path, seed: int, alone: bool) -> None:
    """Findings and deaths, all moved together or each column in an order of its own."""
    with tempfile.TemporaryDirectory() as name:
        features = Path(shutil.copytree(world / "features", Path(name) / "features"))
        films, rng = pd.read_parquet(features / "images.parquet"), np.random.default_rng(seed)
        order = rng.permutation(len(films))
        for column in (*FINDINGS, "died_in_hospital"):
            films[column] = films[column].to_numpy()[rng.permutation(len(films)) if alone else order]
        films.to_parquet(features / "images.parquet", index=False)
        again = write_notes(config(world, Path(name) / "notes", features=features))
        for file in WRITTEN:
            assert (again / file).read_bytes() == (made / file).read_bytes(), file


@pytest.mark.slow
def test_threads_and_the_size_of_a_chunk_change_nothing(
    world: Path, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = write_notes(config(world, tmp_path / "threads", threads=1))
    for name in WRITTEN:
        assert (other / name).read_bytes() == (made / name).read_bytes(), name
    monkeypatch.setattr(notes, "CHUNK", 150)
    small = write_notes(config(world, tmp_path / "small", threads=3))
    assert pq.read_table(small / "notes.parquet").equals(pq.read_table(made / "notes.parquet"))
    assert (small / "attrition.json").read_bytes() == (made / "attrition.json").read_bytes()


def test_an_unchanged_config_writes_nothing_again_and_a_changed_template_does(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    template = tmp_path / "mine.txt"
    template.write_text("[who]\nA {sex} of {age}.\n")
    for _ in range(2):
        out = write_notes(config(world, tmp_path / "notes", template=template))
    assert "up to date" in capsys.readouterr().err
    table = pd.read_parquet(out / "notes.parquet")
    assert table["note"].str.fullmatch(r"A (fe)?male of (over )?\d+\.").all()
    assert {tuple(s) for s in table["sources"]} == {("patients",)}
    template.write_text("[who]\n{sex}\n")
    write_notes(config(world, tmp_path / "notes", template=template))
    assert set(pd.read_parquet(out / "notes.parquet")["note"]) == {"male", "female"}


# ---- what is refused ------------------------------------------------------------------------------------------------
def test_features_without_visits_are_refused_for_notes_of_visits(world: Path, tmp_path: Path) -> None:
    shutil.copytree(world / "features", tmp_path / "features")
    films = pd.read_parquet(tmp_path / "features/images.parquet").assign(ed_stay_id=pd.NA)
    films.astype({"ed_stay_id": "Int64"}).to_parquet(tmp_path / "features/images.parquet")
    about = read_json(tmp_path / "features/provenance.json")
    about["config"]["mimic_ed"] = None
    (tmp_path / "features/provenance.json").write_text(json.dumps(about))
    with pytest.raises(UserError, match="built without mimic_ed"):
        write_notes(config(world, tmp_path / "notes", features=tmp_path / "features"))
    out = write_notes(config(world, tmp_path / "notes", features=tmp_path / "features", mimic_ed=None))
    assert set().union(*pd.read_parquet(out / "notes.parquet")["sources"]) == {
        "patients",
        "admissions",
        "diagnoses_icd",
    }


def test_tables_of_other_people_are_refused(world: Path, tmp_path: Path) -> None:
    demo.generate(tmp_path / "raw", subjects=60, seed=99, film_size=32)
    with pytest.raises(UserError, match=r"has none of the \d+ hadm_ids"):
        write_notes(config(world, tmp_path / "notes", mimic_iv=str(tmp_path / "raw/mimic-iv")))
    assert not (tmp_path / "notes").exists()


def test_a_table_that_is_not_there_is_named_and_without_visits_nothing_is_written(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(world / "raw/mimic-iv-ed", tmp_path / "ed")
    (pyxis,) = (tmp_path / "ed").rglob("pyxis.csv.gz")
    pyxis.unlink()
    out = write_notes(config(world, tmp_path / "notes", mimic_ed=str(tmp_path / "ed")))
    assert "notes leave out their facts: pyxis\n" in capsys.readouterr().err
    assert "pyxis" not in set().union(*pd.read_parquet(out / "notes.parquet")["sources"])
    pyxis.with_name("edstays.csv.gz").unlink()
    with pytest.raises(UserError, match=r"edstays.*no such file"):
        write_notes(config(world, tmp_path / "other", mimic_ed=str(tmp_path / "ed")))


def test_a_folder_of_something_else_is_not_written_over(world: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="not a folder of notes; it holds"):
        write_notes(config(world, tmp_path))
    with pytest.raises(UserError, match="no such folder"):
        write_notes(config(world, tmp_path / "notes", features=tmp_path / "nowhere"))
    assert (tmp_path / "mine.txt").read_text() == "mine"


def test_ones_own_abbreviations_replace_the_shipped_ones(world: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine.csv"
    mine.write_text("abbreviation,expansion\nSyncope,fainting\n")
    table = pd.read_parquet(write_notes(config(world, tmp_path / "notes", abbreviations=mine)) / "notes.parquet")
    text = "".join(table["note"])
    assert "fainting" in text and "syncope" not in text and "sob" in text
    for broken, says in (
        ("a,b\n1,2\n", "missing"),
        ("abbreviation,expansion\nsob,\n", "line 2"),
        ("", "cannot be read"),
    ):
        mine.write_text(broken)
        with pytest.raises(UserError, match=says):
            notes_words.read_abbreviations(mine)
