"""Tables with every fault in docs/features.md: each file and key named there is written."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from ehr_features.build import build
from ehr_features.typed import read_json
from finetune.config import ProbeConfig
from finetune.probe.main import probe
from pretrain.config import ImagesConfig
from pretrain.store import pack

PAGE = Path(__file__).parents[2] / "docs/features.md"
TABLE = PAGE.read_text().partition("| kind | rule | counted in |")[2].partition("\n\n")[0]
PLACES = sorted(set(re.findall(r"`(\w+\.(?:json|parquet)): ([^`]+)`", TABLE)))
HOUR = pd.Timedelta(hours=1)


def faulty(frames: dict[str, pd.DataFrame]) -> dict[str, pd.DataFrame]:
    """Tables of eight patients with each fault of the page; the stays last whole hours."""
    stays, rate = frames["icustays"], frames["chartevents"].query("itemid == 220045")
    row, intime, outtime = rate.iloc[0], stays.intime[0], stays.outtime[0]
    dead = rate[rate.stay_id == 30_000_004].iloc[0]  # at hour 90 of 100
    chart = [row.to_dict() | changed for changed in (
        {"charttime": pd.NaT, "storetime": pd.NaT}, {"charttime": pd.NaT},
        {"charttime": intime - HOUR}, {"charttime": outtime + HOUR}, {"charttime": outtime},
        {"value": "high", "valuenum": None}, {"value": "900", "valuenum": 900.0},
        {"stay_id": None}, {"stay_id": 39_999_999},
        dict.fromkeys(row.index),
    )]  # fmt: skip
    chart.append(dead.to_dict() | {"charttime": stays.intime[3] + 95 * HOUR})
    draw = {"subject_id": row.subject_id, "hadm_id": row.hadm_id, "charttime": intime + 5 * HOUR, "valuenum": 70.0}
    known = draw | {"storetime": intime + 6 * HOUR}
    copy = draw | {"stay_id": row.stay_id, "itemid": 220621}
    labs = [
        known | {"itemid": 50931}, draw | {"itemid": 50931, "charttime": intime + 7 * HOUR},
        known | {"itemid": 50817, "specimen_id": 1}, known | {"itemid": 52033, "specimen_id": 1, "value": "MIX."},
        known | {"itemid": 50817, "specimen_id": 2}, dict.fromkeys(draw),
    ]  # fmt: skip
    frames["chartevents"] = pd.concat([frames["chartevents"], pd.DataFrame([*chart, copy])], ignore_index=True)
    frames["labevents"] = pd.concat([frames["labevents"], pd.DataFrame(labs)], ignore_index=True)
    frames["patients"].loc[1, "anchor_age"] = 12
    donor = {"subject_id": 10_000_004, "hadm_id": 29, "stay_id": 39, "intime": stays.outtime[3] + HOUR}
    donor |= {"outtime": stays.outtime[3] + 9 * HOUR, "los": 0.3}
    frames["icustays"] = pd.concat([stays, pd.DataFrame([donor, dict.fromkeys(donor)])], ignore_index=True)
    later = {"subject_id": 10_000_004, "hadm_id": 29, "admittime": donor["intime"], "dischtime": donor["outtime"]}
    early = {"subject_id": 10_000_003, "hadm_id": 28, "admittime": intime, "dischtime": intime - HOUR}
    again = frames["admissions"].iloc[[0]]
    frames["admissions"] = pd.concat([frames["admissions"], again, pd.DataFrame([later, early])], ignore_index=True)
    codes = [("389", 9), ("J1282", 10), ("E11A", 10)]
    codes = pd.DataFrame(codes, columns=["icd_code", "icd_version"]).assign(subject_id=10_000_001, hadm_id=20_000_001)
    frames["diagnoses_icd"] = pd.concat([frames["diagnoses_icd"], codes], ignore_index=True)
    return frames


@pytest.fixture
def written(tmp_path: Path, frames: Any, write: Callable, config: Callable) -> dict[str, Any]:
    """What features, images and probe write about them."""
    write(tmp_path / "mimic", faulty(frames))
    columns = "dicom_id subject_id study_id ViewPosition StudyDate StudyTime ViewCodeSequence_CodeMeaning"
    films = pd.DataFrame([["a", 10_000_001, 1, "AP", 21500301, 90000, ""], ["b"]], columns=columns.split())
    films["PatientOrientationCodeSequence_CodeMeaning"] = "Erect"
    for name in (f"cxr/files/p10/p10000001/s1/{n}.jpg" for n in "ab"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.arange(1024, dtype=np.uint8).reshape(32, 32)).save(tmp_path / name)
    films.to_csv(tmp_path / "cxr/mimic-cxr-2.0.0-metadata.csv", index=False)
    out = build(config(mimic_cxr=str(tmp_path / "cxr")))
    found = {path.name: read_json(path) for path in out.glob("*.json")}
    counts = {}
    folder = tmp_path / "cxr/files"
    for name, text in (("note.txt", "no film"), ("cut.jpg", "")):
        (folder / name).write_text(text)
    for key, place in (("mimic_cxr", tmp_path / "cxr"), ("films", folder)):
        pack(ImagesConfig.model_validate({"mimic_cxr": None, key: str(place), "out": str(tmp_path / key), "size": 16}))
        counts |= read_json(tmp_path / key / "store.json")["counts"]
    found |= {
        "store.json": {"counts": counts},
        "rejected.parquet": pd.read_parquet(tmp_path / "films/rejected.parquet"),
    }
    return found | {"results.json": read_json(_probed(tmp_path) / "results.json")}


def _probed(folder: Path) -> Path:
    """A probe of a table of labels with a repeated header."""
    rows = pd.DataFrame([(f"{i}.png", i, i % 2) for i in range(60)], columns=["path", "who", "sick"], dtype=object)
    pixels = np.arange(1024, dtype=np.uint8).reshape(32, 32)
    (folder / "labelled").mkdir()
    for name, _who, sick in rows.itertuples(index=False):
        Image.fromarray(pixels[:: 1 - 2 * sick]).save(folder / "labelled" / name)
    rows.loc[len(rows)] = ["path", "who", ""]
    rows.to_csv(folder / "labels.csv", index=False)
    films = {"layout": "csv", "table": str(folder / "labels.csv"), "images": str(folder / "labelled"), "size": 24}
    given = {"films": films | {"columns": ["sick"], "subject": "who"}, "encoder": "pixels", "pixels": 2}
    return probe(ProbeConfig.model_validate(given | {"samples": 5, "epochs": 2, "out": str(folder / "probe")}))


def holds(found: Any, keys: list[str]) -> bool:
    """Whether JSON has a path of keys; the last may be the beginning of a key, a text, or an exclusion's `why`."""
    first, *rest = keys
    if first == "exclusions":
        mine = [e for e in found[first] if e["table"] == rest[0] and e["why"].startswith(rest[1])]
        return any(e["before"] > e["after"] for e in mine)
    if first == "events":
        return any(rest == [e["fate"]] or (rest == ["unstored"] and e["unstored"]) for e in found[first])
    if isinstance(found, list):
        return any(first in text for text in found)
    below = [found[key] for key in found if key == first or (not rest and key.startswith(first))]
    return bool(below) and (not rest or holds(below[0], rest))


def test_every_place_that_the_page_names_is_written(written: dict[str, Any]) -> None:
    assert len(PLACES) > 35
    absent = [f"{file}: {keys}" for file, keys in PLACES if not holds(written[file], keys.split(" > "))]
    assert absent == []
