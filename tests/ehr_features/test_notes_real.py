"""Notes of the open MIMIC-IV demo, which has no emergency tables: admissions and their earlier diagnoses."""

from __future__ import annotations

import re

import pandas as pd
import pytest

from ehr_features.build import build
from ehr_features.config import FeaturesConfig, NotesConfig
from ehr_features.notes.write import write_notes
from ehr_features.typed import read_json

pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def folders(shared, tmp_path_factory):
    root, iv = tmp_path_factory.mktemp("real"), str(shared / "data/mimic-iv-demo-2.2")
    cxr = str(shared / "data/mimic-cxr-linked")
    features = build(FeaturesConfig(mimic_iv=iv, mimic_cxr=cxr, out=root / "features", memory="1GB"))
    return features, write_notes(NotesConfig(features=features, mimic_iv=iv, out=root / "notes", memory="1GB"))


def test_each_film_of_an_admission_has_a_note(folders) -> None:
    films, notes = (pd.read_parquet(f / n) for f, n in zip(folders, ("images.parquet", "notes.parquet"), strict=True))
    assert set(notes["dicom_id"]) == set(films.loc[films["hadm_id"].notna(), "dicom_id"]) and len(notes) > 50
    assert (notes["available_at"] <= notes["taken_at"]).all()
    assert set().union(*notes["sources"]) == {"patients", "admissions", "diagnoses_icd"}
    assert not notes["note"].str.contains(r"\b(?:nan|none|null|nat|unknown)\b", case=False).any()


def test_earlier_diagnoses_are_those_of_admissions_that_had_ended(folders, shared) -> None:
    root = shared / "data/mimic-iv-demo-2.2/hosp"
    notes, before = (pd.read_parquet(folders[1] / f"{n}.parquet") for n in ("notes", "unfiltered"))
    admissions = pd.read_csv(root / "admissions.csv.gz", parse_dates=["admittime", "dischtime", "edregtime"])
    text = {"icd_code": str}
    codes = pd.read_csv(root / "diagnoses_icd.csv.gz", dtype=text).merge(
        pd.read_csv(root / "d_icd_diagnoses.csv.gz", dtype=text), on=["icd_code", "icd_version"]
    )
    some = 0
    for row, note in zip(notes.itertuples(), before["note"], strict=True):
        ended = admissions[(admissions["subject_id"] == row.subject_id) & (admissions["dischtime"] < row.taken_at)]
        ended = ended[(ended["hadm_id"] != row.hadm_id) & (ended["dischtime"] > ended["admittime"])]
        wanted = codes.loc[codes["hadm_id"].isin(ended["hadm_id"]), "long_title"]
        wanted = {re.sub(r"\s+", " ", title).replace(";", ",").strip() for title in wanted}
        listed = re.search(r"Diagnoses of earlier admissions: ([^\n]*)\.$", note, re.MULTILINE)
        assert (set(listed[1].split("; ")) if listed else set()) == wanted
        some += bool(wanted)
    assert some > 20


def test_the_filter_empties_no_item_halfway(folders) -> None:
    """A title that names a finding is removed whole: the list keeps only complete titles."""
    notes, before = (pd.read_parquet(folders[1] / f"{n}.parquet") for n in ("notes", "unfiltered"))
    told = read_json(folders[1] / "attrition.json")["counts"]["terms taken out by the leak filter (standard)"]
    assert told["Edema"] > 0 and told["Pneumonia"] > 0  # heart failure is what CheXpert takes for edema

    def items(note: str) -> list[str]:
        listed = re.search(r"Diagnoses of earlier admissions: ([^\n]*)\.$", note, re.MULTILINE)
        return listed[1].split("; ") if listed else []

    for note, whole in zip(notes["note"], before["note"], strict=True):
        left = items(note)
        assert left == [item for item in items(whole) if item in left]
