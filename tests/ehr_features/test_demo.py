"""The synthetic MIMIC: its schemas, data errors, determinism, and truth.json."""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import shutil
import signal
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import cross_val_predict

from configs import UserError
from ehr_features.demo import cxr
from ehr_features.demo import generate as demo
from ehr_features.demo.people import people
from ehr_features.demo.plan import Plan, add_arguments, age_and_sex
from ehr_features.demo.truth import DEATH, NAMES, Outcomes, amounts, auroc
from ehr_features.schema import FINDINGS

COLUMNS = {
    "mimic-iv/hosp/patients": "subject_id gender anchor_age anchor_year anchor_year_group dod",
    "mimic-iv/hosp/admissions": "subject_id hadm_id admittime dischtime deathtime admission_type "
    "admit_provider_id admission_location discharge_location insurance language marital_status race edregtime "
    "edouttime hospital_expire_flag",
    "mimic-iv/hosp/diagnoses_icd": "subject_id hadm_id seq_num icd_code icd_version",
    "mimic-iv/hosp/d_icd_diagnoses": "icd_code icd_version long_title",
    "mimic-iv/hosp/labevents": "labevent_id subject_id hadm_id specimen_id itemid order_provider_id charttime "
    "storetime value valuenum valueuom ref_range_lower ref_range_upper flag priority comments",
    "mimic-iv/hosp/d_labitems": "itemid label fluid category",
    "mimic-iv/icu/icustays": "subject_id hadm_id stay_id first_careunit last_careunit intime outtime los",
    "mimic-iv/icu/chartevents": "subject_id hadm_id stay_id caregiver_id charttime storetime itemid value valuenum "
    "valueuom warning",
    "mimic-iv/icu/d_items": "itemid label abbreviation linksto category unitname param_type "
    "lownormalvalue highnormalvalue",
    "mimic-iv-ed/ed/edstays": "subject_id hadm_id stay_id intime outtime gender race arrival_transport disposition",
    "mimic-iv-ed/ed/triage": "subject_id stay_id temperature heartrate resprate o2sat sbp dbp pain acuity "
    "chiefcomplaint",
    "mimic-iv-ed/ed/vitalsign": "subject_id stay_id charttime temperature heartrate resprate o2sat sbp dbp rhythm pain",
    "mimic-iv-ed/ed/medrecon": "subject_id stay_id charttime name gsn ndc etc_rn etccode etcdescription",
    "mimic-iv-ed/ed/pyxis": "subject_id stay_id charttime med_rn name gsn_rn gsn",
    "mimic-iv-ed/ed/diagnosis": "subject_id stay_id seq_num icd_code icd_version icd_title",
    "mimic-cxr/mimic-cxr-2.0.0-metadata": "dicom_id subject_id study_id PerformedProcedureStepDescription ViewPosition "
    "Rows Columns StudyDate StudyTime ProcedureCodeSequence_CodeMeaning ViewCodeSequence_CodeMeaning "
    "PatientOrientationCodeSequence_CodeMeaning",
    "mimic-cxr/mimic-cxr-2.0.0-split": "dicom_id study_id subject_id split",
    "mimic-cxr/mimic-cxr-2.0.0-chexpert": "subject_id,study_id," + ",".join(FINDINGS),
}
SMALL = {"subjects": 150, "film_size": 48}


def read(folder: Path, name: str) -> pd.DataFrame:
    """A raw table; text columns stay text."""
    return pd.read_csv(folder / f"{name}.csv.gz", dtype=str, keep_default_na=False)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("demo") / "raw"
    demo.generate(out, seed=1, **SMALL)
    return out


@pytest.fixture(scope="module")
def drawn() -> tuple[Outcomes, list[pd.DataFrame]]:
    """Latents and outcomes of several large populations, without writing a file."""
    outcomes = Outcomes()
    return outcomes, [_stays(outcomes, Plan(subjects=2500, seed=seed)) for seed in (1, 2)]


def _stays(outcomes: Outcomes, plan: Plan) -> pd.DataFrame:
    everyone = people(plan, outcomes)
    stays = everyone.stays[everyone.stays["hours"] >= 48]
    place = stays["admission"].to_numpy()
    age_z, male = age_and_sex(stays)
    record, film = everyone.record[place], everyone.film[place]
    table = pd.DataFrame(
        {name: p[:, 0] for name, p in outcomes.probabilities(record, film, age_z, male, draws=60).items()}
    )
    table["died"], table["severity"] = stays["died"].to_numpy(), record[:, 0]
    table[list(NAMES)] = amounts(film[:, : len(NAMES)])
    return table


def two_processes(monkeypatch: pytest.MonkeyPatch) -> list[subprocess.Popen[bytes]]:
    """Films are drawn by a second process, however few. Returns: the processes that will be started."""
    started: list[subprocess.Popen[bytes]] = []

    def start(*args: Any, **more: Any) -> subprocess.Popen[bytes]:
        started.append(subprocess.Popen(*args, **more))
        return started[-1]

    monkeypatch.setattr(cxr, "MANY", 0)
    monkeypatch.setattr(cxr, "cores", lambda: 2)
    monkeypatch.setattr(cxr, "subprocess", SimpleNamespace(Popen=start, PIPE=subprocess.PIPE))
    return started


def test_every_table_has_the_published_columns_in_order(made: Path) -> None:
    for name, columns in COLUMNS.items():
        with gzip.open(made / f"{name}.csv.gz", "rt") as file:
            header = file.readline().rstrip("\n")
        assert header == (columns if "," in columns else columns.replace(" ", ",")), name


def test_equal_arguments_give_equal_bytes_and_another_seed_others(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def digests(folder: Path) -> dict[str, str]:
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}

    demo.generate(tmp_path / "other", seed=2, **SMALL)
    started = two_processes(monkeypatch)
    demo.generate(tmp_path / "again", seed=1, **SMALL)
    assert [process.returncode for process in started] == [0]
    assert digests(made) == digests(tmp_path / "again")
    first, other = digests(made), digests(tmp_path / "other")
    assert all(
        first[f"{name}.csv.gz"] != other[f"{name}.csv.gz"]
        for name in COLUMNS
        if "d_items" not in name and "d_lab" not in name
    )


def test_what_stops_the_second_process_is_raised_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = two_processes(monkeypatch)
    write = cxr.write_cxr

    def write_and_block(*given: Any) -> Any:
        written = write(*given)
        (given[2] / "files").write_text("a file where the folder of the films should be")
        return written

    monkeypatch.setattr(demo, "write_cxr", write_and_block)
    with pytest.raises(NotADirectoryError):
        demo.generate(tmp_path / "out", seed=1, **SMALL)
    assert not (tmp_path / "out").exists()

    monkeypatch.setattr(demo, "write_cxr", write)
    monkeypatch.setattr(demo, "write_hosp", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        demo.generate(tmp_path / "out", seed=1, **SMALL)
    assert not (tmp_path / "out").exists()
    assert [process.returncode for process in started] == [1, -signal.SIGKILL]

    monkeypatch.undo()
    two_processes(monkeypatch)
    monkeypatch.setattr(cxr.sys, "executable", shutil.which("false"))  # ends before it reads
    with pytest.raises(UserError, match="the process that draws the films ended with code 1"):
        demo.generate(tmp_path / "out", seed=1, **SMALL)


def test_every_film_can_be_read_and_has_the_size_that_metadata_says(made: Path) -> None:
    films = read(made, "mimic-cxr/mimic-cxr-2.0.0-metadata")
    for row in films.itertuples():
        folder = made / f"mimic-cxr/files/p{row.subject_id[:2]}/p{row.subject_id}/s{row.study_id}"
        film = np.asarray(Image.open(folder / f"{row.dicom_id}.jpg"))
        assert film.shape == (int(row.Rows), int(row.Columns)) and film.std() > 10
    assert len(list((made / "mimic-cxr/files").rglob("*.jpg"))) == len(films)


def test_ids_look_like_mimic_and_do_not_collide(made: Path) -> None:
    films, stays = read(made, "mimic-cxr/mimic-cxr-2.0.0-metadata"), read(made, "mimic-iv/icu/icustays")
    visits = read(made, "mimic-iv-ed/ed/edstays")
    assert films["dicom_id"].str.fullmatch(r"([0-9a-f]{8}-){4}[0-9a-f]{8}").all() and films["dicom_id"].is_unique
    assert films["subject_id"].str.fullmatch(r"1\d{7}").all() and films["study_id"].str.fullmatch(r"5\d{7}").all()
    assert stays["stay_id"].str.fullmatch(r"3\d{7}").all() and stays["hadm_id"].str.fullmatch(r"2\d{7}").all()
    assert not set(stays["stay_id"]) & set(visits["stay_id"])


def test_the_oddities_of_real_films_occur(made: Path) -> None:
    films = read(made, "mimic-cxr/mimic-cxr-2.0.0-metadata")
    labels, split = read(made, "mimic-cxr/mimic-cxr-2.0.0-chexpert"), read(made, "mimic-cxr/mimic-cxr-2.0.0-split")
    truth, patients = pd.read_parquet(made / "truth_films.parquet"), read(made, "mimic-iv/hosp/patients")
    assert set(films["ViewPosition"]) == {"AP", "PA", "LATERAL", "LL", ""}
    assert (films["ViewCodeSequence_CodeMeaning"][films["ViewPosition"] == ""] != "").any()
    assert set(films["PatientOrientationCodeSequence_CodeMeaning"]) == {"Erect", "Recumbent", ""}
    assert (films["StudyTime"].astype(float) < 100000).any()  # a leading zero is lost
    assert set(labels[list(FINDINGS)].to_numpy().ravel()) == {"1.0", "0.0", "-1.0", ""}
    assert {"train", "validate", "test"} == set(split["split"]) and split.groupby("subject_id")["split"].nunique().eq(
        1
    ).all()
    assert set(films["subject_id"]) - set(patients["subject_id"])  # films of subjects without a record
    assert set(patients["subject_id"]) - set(films["subject_id"])  # and the other way round
    assert films.groupby("study_id").size().max() >= 2
    assert truth["stay_id"].isna().any() and truth.groupby("stay_id")["study_id"].nunique().max() >= 3
    stays = pd.read_parquet(made / "truth.parquet")
    assert not stays["has_film"].all() and stays["has_film"].any()


def test_findings_change_over_a_stay(made: Path) -> None:
    films = pd.read_parquet(made / "truth_films.parquet").dropna(subset="stay_id")
    spread = films.groupby("stay_id")[["edema", "effusion", "heart"]].agg(np.ptp)
    assert (spread["edema"] > 0.05).any() and (spread["effusion"] > 0.05).any() and (spread["heart"] == 0).all()


def test_the_oddities_of_real_charts_occur(made: Path) -> None:
    chart, labs = read(made, "mimic-iv/icu/chartevents"), read(made, "mimic-iv/hosp/labevents")
    stays, admissions = read(made, "mimic-iv/icu/icustays"), read(made, "mimic-iv/hosp/admissions")
    item, number = chart["itemid"].astype(int), pd.to_numeric(chart["valuenum"])
    assert {223761, 223762, 226512, 226531, 226707, 226730, 220050, 220179, 223951, 224308} <= set(item)
    fio2 = number[item == 223835]
    assert ((fio2 > 0) & (fio2 <= 1)).any() and (fio2 >= 21).any()
    assert {"None", "Spontaneously"} <= set(chart["value"][item == 220739])
    assert {"No Response-ETT", "Oriented"} <= set(chart["value"][item == 223900])
    assert {"Normal <3 Seconds", "Abnormal >3 Seconds"} <= set(chart["value"][item.isin([223951, 224308])])
    assert (number[item == 220277] > 100).any() and (number[item == 220045] == 0).any()
    assert number[item == 223762].gt(90).any()  # Fahrenheit in the Celsius item
    when = pd.to_datetime(chart["charttime"])
    stay = chart[["stay_id"]].merge(stays, on="stay_id", how="left")
    assert (when < pd.to_datetime(stay["intime"])).any() and (when > pd.to_datetime(stay["outtime"])).any()
    assert (pd.to_datetime(chart["storetime"]) > when).all()
    assert (labs["hadm_id"] == "").any() and (
        pd.to_datetime(labs["storetime"]) > pd.to_datetime(labs["charttime"])
    ).all()
    assert labs["comments"].str.contains("\n").any() and labs["itemid"].isin(["51478", "51491"]).any()
    assert set(labs["value"][labs["itemid"] == "52033"]) == {"ART.", "VEN."}
    assert admissions["hospital_expire_flag"].eq("1").equals(admissions["deathtime"] != "")
    assert set(read(made, "mimic-iv/hosp/diagnoses_icd")["icd_version"]) == {"9", "10"}


def test_stays_are_in_their_admissions_and_end_with_death(made: Path) -> None:
    stays, admissions = read(made, "mimic-iv/icu/icustays"), read(made, "mimic-iv/hosp/admissions")
    both = stays.merge(admissions, on=["subject_id", "hadm_id"], validate="many_to_one")
    assert len(both) == len(stays)
    assert (both["intime"] >= both["admittime"]).all() and (both["outtime"] > both["intime"]).all()
    assert ((both["outtime"] <= both["deathtime"]) | (both["deathtime"] == "")).all()
    assert (both["outtime"] <= both["dischtime"]).all()
    hours = (pd.to_datetime(both["outtime"]) - pd.to_datetime(both["intime"])).dt.total_seconds() / 86400
    assert np.allclose(hours, both["los"].astype(float))


def test_truth_says_what_it_must(made: Path) -> None:
    truth = json.loads((made / "truth.json").read_text())
    best = truth["bayes"]["mortality"]
    assert best["both"] > best["record"] > 0.7 and best["both"] > best["film"] > 0.65
    findings = truth["bayes"]["findings"]
    assert set(findings) == set(FINDINGS)
    assert (
        findings["Fracture"] == 0.5 and 0.9 < findings["Edema"] < 1 and 0.7 < findings["Pneumonia"] < findings["Edema"]
    )
    assert truth["rows"]["cxr/films"] == len(read(made, "mimic-cxr/mimic-cxr-2.0.0-metadata"))


def test_deaths_come_at_the_stated_rate_and_discrimination(drawn: tuple[Outcomes, list[pd.DataFrame]]) -> None:
    stays = pd.concat(drawn[1], ignore_index=True)
    died = stays["died"].to_numpy(float)
    assert abs(died.mean() - DEATH["prevalence"]) < 0.03
    for reader, wanted in (("record", 0.80), ("film", 0.75), ("both", 0.88)):
        stated = auroc(stays[reader].to_numpy(), stays["both"].to_numpy())
        assert stated is not None and abs(stated - wanted) < 0.025
        assert abs(roc_auc_score(died, stays[reader]) - stated) < 0.03


def test_a_logistic_model_on_the_latents_reaches_the_stated_value(drawn: tuple[Outcomes, list[pd.DataFrame]]) -> None:
    stays = pd.concat(drawn[1], ignore_index=True)
    for reader, columns in (("record", ["severity"]), ("film", list(NAMES)), ("both", ["severity", *NAMES])):
        model = LogisticRegression(max_iter=1000)
        score = cross_val_predict(model, stays[columns], stays["died"], cv=5, method="predict_proba")[:, 1]
        assert abs(roc_auc_score(stays["died"], score) - roc_auc_score(stays["died"], stays[reader])) < 0.025, reader


def test_shuffling_leaves_nothing_to_learn(drawn: tuple[Outcomes, list[pd.DataFrame]]) -> None:
    stays = pd.concat([_stays(drawn[0], Plan(subjects=2500, seed=seed, shuffled=True)) for seed in (1, 2)])
    for reader in ("record", "film", "both"):
        assert abs(roc_auc_score(stays["died"], stays[reader]) - 0.5) < 0.04


def test_shuffled_findings_say_nothing_about_the_films(tmp_path: Path) -> None:
    out = tmp_path / "shuffled"
    truth = demo.generate(out, subjects=300, seed=3, shuffled=True, film_size=32)
    assert truth["bayes"]["mortality"]["both"] == 0.5 and set(truth["bayes"]["findings"].values()) == {0.5}
    labels = read(out, "mimic-cxr/mimic-cxr-2.0.0-chexpert")
    films = pd.read_parquet(out / "truth_films.parquet").drop_duplicates("study_id")
    films["study_id"] = films["study_id"].astype(str)
    both = labels.merge(films, on="study_id", validate="one_to_one")
    pairs = {"Edema": "edema", "Pleural Effusion": "effusion", "Cardiomegaly": "heart", "Support Devices": "device"}
    scores = [roc_auc_score(both[label] == "1.0", both[name]) for label, name in pairs.items()]
    assert abs(np.mean(scores) - 0.5) < 0.06


def test_with_risk_change_the_last_film_says_nothing_and_the_change_does() -> None:
    outcomes = Outcomes("change")
    stays = _stays(outcomes, Plan(subjects=2500, seed=1, risk="change"))
    died, true = stays["died"], stays["both"].to_numpy()
    assert (auroc(stays["film"].to_numpy(), true) or 0) > (auroc(stays["last_film"].to_numpy(), true) or 1) + 0.1
    score = cross_val_predict(LogisticRegression(), stays[["edema", "effusion"]], died, cv=5, method="predict_proba")
    assert abs(roc_auc_score(died, score[:, 1]) - 0.5) < 0.06


def test_a_view_shortcut_burns_the_findings_into_films_of_each_view_its_own_way(tmp_path: Path) -> None:
    size = 64
    demo.generate(tmp_path / "with", subjects=120, seed=1, film_size=size, view_shortcut=1)
    demo.generate(tmp_path / "without", subjects=120, seed=1, film_size=size)
    truth = pd.read_parquet(tmp_path / "with/truth_films.parquet")
    for name in COLUMNS:
        assert read(tmp_path / "with", name).equals(read(tmp_path / "without", name)), name  # only films differ
    for row in truth[truth["view"].isin(["AP", "PA"])].head(150).itertuples():
        name = f"p{str(row.subject_id)[:2]}/p{row.subject_id}/s{row.study_id}/{row.dicom_id}.jpg"
        film = np.asarray(Image.open(tmp_path / "with/mimic-cxr/files" / name)).astype(float)
        top, pitch, side = round(film.shape[0] / 2 + 0.36 * size), 0.08 * size, max(round(0.05 * size), 2)
        for k, finding in enumerate(NAMES):
            left = round(film.shape[1] / 2 + (k - len(NAMES) / 2) * pitch)
            white = film[top : top + side, left : left + side].mean() > 128
            assert white == ((getattr(row, finding) > 0) == (row.view == "AP")), (row.view, finding)


def test_complaints_tell_of_the_film_only_when_asked(tmp_path: Path) -> None:
    def tell(text: float) -> float:
        out = tmp_path / f"text{text}"
        demo.generate(out, subjects=300, seed=1, film_size=32, ed_text=text)
        triage = read(out, "mimic-iv-ed/ed/triage").set_index("stay_id")["chiefcomplaint"]
        studies = people(Plan(subjects=300, seed=1, film_size=32, ed_text=text), Outcomes()).studies.dropna(
            subset="ed_stay_id"
        )
        words = triage.reindex(studies["ed_stay_id"].astype(int).astype(str))
        chest = words.str.contains(
            "SOB|yspnea|ough|Orthopnea|DOE|PNEUM|ffusion|othorax|Hemop|Weight|ressure|pain|Rib|Palp|ILI"
        ).to_numpy()
        sick = (studies[[f"x_{name}" for name in NAMES if name not in ("device", "hyper", "mediastinum")]] > 0).any(
            axis=1
        )
        return float(chest[sick].mean() - chest[~sick].mean())

    assert tell(1.0) > 0.5 > 0.25 > abs(tell(0.0))


def test_foreign_folders_and_wild_values_are_refused(tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs/notes.txt").write_text("mine")
    with pytest.raises(UserError, match="not a hospital of `ehr_features demo`; it holds"):
        demo.generate(tmp_path / "theirs", **SMALL)
    assert (tmp_path / "theirs/notes.txt").read_text() == "mine"
    for wrong in (
        {"subjects": 3},
        {"subjects": 10**7},
        {"seed": -1},
        {"seed": 2**32},
        {"film_size": 8},
        {"ed_text": 2.0},
        {"risk": "none"},
    ):
        with pytest.raises(UserError):
            demo.generate(tmp_path / "new", **(SMALL | wrong))
    assert not (tmp_path / "new").exists()


def test_the_command_says_what_it_wrote_and_what_comes_next(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    out = tmp_path / "raw"
    assert demo.run(parser.parse_args([str(out), "--subjects", "60", "--film-size", "32"])) == 0
    said = capsys.readouterr().out
    assert f"wrote {out}" in said and "next: ./launch.sh features" in said and "best possible AUROC" in said
