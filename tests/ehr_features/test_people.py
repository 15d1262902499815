"""Deaths and history from raw tables to the audit, which recomputes them with separate SQL."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ibis
import pandas as pd
import pytest

from ehr_features import audit, cohort
from ehr_features.audit.people import LABELLED, PEOPLE, PRIOR
from ehr_features.audit.verdict import PROVED, REFUTED
from ehr_features.build import build
from ehr_features.files import read_table
from ehr_features.films import record

DAY, HOUR = pd.Timedelta(days=1), pd.Timedelta(hours=1)


@pytest.fixture
def made(
    tmp_path: Path,
    frames: Any,
    write: Callable[..., Path],
    config: Callable[..., Any],
    only: Callable[..., None],
) -> Callable[..., Path]:
    """Features of subjects with contradictory times: dead before a stay, discharged before arrival or before leaving
    the ICU.
    """
    stays, admissions = frames["icustays"], frames["admissions"]
    donor = stays.iloc[[3]].assign(
        hadm_id=29, stay_id=39, intime=stays.outtime[3] + DAY, outtime=stays.outtime[3] + 3 * DAY
    )
    frames["icustays"] = pd.concat([stays, donor])
    again = admissions.iloc[[3]].assign(hadm_id=29, admittime=donor.intime.iloc[0], dischtime=donor.outtime.iloc[0])
    admissions.loc[0, "dischtime"] = admissions.loc[0, "admittime"] - HOUR  # ends before it begins
    admissions.loc[1, "dischtime"] = stays.loc[1, "intime"] + 10 * HOUR  # the stay lasts 50 hours
    frames["patients"].loc[4, "dod"] = str((stays.loc[4, "intime"] + DAY).date())  # in hospital, by dod alone
    earlier = admissions.iloc[[2]].assign(
        hadm_id=28, admittime=stays.intime[2] - 90 * DAY, dischtime=stays.intime[2] - 80 * DAY
    )
    again = again.assign(deathtime=pd.NaT, hospital_expire_flag=0)
    frames["admissions"] = pd.concat([admissions, again, earlier, earlier])
    codes = pd.DataFrame(
        {"subject_id": 10_000_003, "hadm_id": 28, "seq_num": [1, 2], "icd_code": ["J1282", "D649"], "icd_version": 10}
    )
    frames["diagnoses_icd"] = pd.concat([frames["diagnoses_icd"], codes])
    at = stays["intime"] + 19 * HOUR
    films = pd.DataFrame({"dicom_id": [f"film{i}" for i in stays.index], "subject_id": stays.subject_id})
    films = films.assign(study_id=50_000_000 + stays.index, ViewPosition="AP", ViewCodeSequence_CodeMeaning="")
    films = films.assign(StudyDate=at.dt.strftime("%Y%m%d"), StudyTime=at.dt.strftime("%H%M%S"))
    films["PatientOrientationCodeSequence_CodeMeaning"] = "Erect"
    write(tmp_path / "mimic", frames)
    (tmp_path / "cxr").mkdir()
    films.to_csv(tmp_path / "cxr" / "mimic-cxr-2.0.0-metadata.csv", index=False)
    given = {"mimic_cxr": str(tmp_path / "cxr"), "tasks": ("mortality", "decompensation"), "landmark_hours": 24}
    only(PEOPLE, PRIOR)
    return lambda **more: build(config(**{**given, **more}))


def outcomes(folder: Path) -> dict[str, str]:
    return {v.claim: v.outcome for v in audit.audit(folder, [])}


def test_persons_who_are_told_of_badly_are_told_right_and_the_audit_proves_it(made: Callable[[], Path]) -> None:
    folder = made()
    stays = read_table(folder, "stays")
    assert 39 not in set(stays.stay_id) and len(stays) == 8
    mortality = read_table(folder, "samples/mortality").set_index("stay_id").mortality
    assert mortality[mortality == 1].index.tolist() == [30_000_004, 30_000_005]
    films = read_table(folder, "images").set_index("dicom_id")
    assert films.num_prior_admissions.tolist() == [0, 0, 1, 0, 0, 0, 0, 0]
    assert films.prior_phenotypes.tolist() == ["", "", "122", "", "", "", "", ""]
    assert films.hadm_id.tolist() == [20_000_001 + i for i in range(8)] and films.died_in_hospital.tolist() == [
        0,
        0,
        0,
        1,
        1,
        0,
        0,
        0,
    ]
    counts = json.loads((folder / "attrition.json").read_text())["counts"]
    assert (
        counts["admissions whose death the tables tell differently"]["admission that begins after the person's death"]
        == 1
    )
    assert {outcomes(folder)[claim] for claim in (PEOPLE, PRIOR)} == {PROVED}


def test_the_published_preset_keeps_a_stay_after_death_and_the_audit_counts_it(made: Callable[..., Path]) -> None:
    folder = made(preset="medfuse", tasks=("mortality",))
    assert 39 in set(read_table(folder, "stays").stay_id)
    verdict = next(v for v in audit.audit(folder, []) if v.claim == LABELLED)
    assert verdict.outcome == PROVED and "as published: 1 stays that begin after" in verdict.counts


def _as_discharged(source: Any) -> ibis.Table:
    return source.table("admissions").select("subject_id", "hadm_id", over_at="dischtime")


def _of_nobody(source: Any) -> ibis.Table:
    return source.table("admissions").filter(ibis.literal(False)).select("subject_id", death_at="deathtime")


def _at_the_date(source: Any) -> ibis.Table:
    dated = source.table("patients").filter(ibis._.dod.notnull())
    return dated.select("subject_id", death_at=ibis._.dod.cast("timestamp") + ibis.interval(days=400))


@pytest.mark.parametrize(
    ("module", "name", "wrong", "claim"),
    [
        (record, "over", _as_discharged, PRIOR),
        (cohort, "deaths", _of_nobody, PEOPLE),
        (cohort, "deaths", _at_the_date, PEOPLE),
    ],
)
def test_the_audit_refutes_a_rule_that_the_code_has_wrong(
    made: Callable[[], Path], monkeypatch: pytest.MonkeyPatch, module: Any, name: str, wrong: Any, claim: str
) -> None:
    monkeypatch.setattr(module, name, wrong)
    told = outcomes(made())
    assert told[claim] == REFUTED and told[({PEOPLE, PRIOR} - {claim}).pop()] == PROVED


def _set(table: str, column: str, value: Callable[[pd.DataFrame], Any]) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        frame = read_table(folder, table)
        frame.loc[frame.index[-1], column] = value(frame)
        frame.to_parquet(folder / f"{table}.parquet")

    return change


def test_the_audit_refutes_a_changed_row(made: Callable[[], Path], tmp_path: Path) -> None:
    folder = made()
    for n, (change, claim) in enumerate([
        (_set("samples/mortality", "mortality", lambda t: 1 - t.mortality.iloc[-1]), PEOPLE),
        (_set("images", "died_in_hospital", lambda t: 1), PEOPLE),
        (_set("images", "num_prior_admissions", lambda t: 1), PRIOR),
        (_set("images", "prior_phenotypes", lambda t: "108"), PRIOR),
    ]):  # fmt: skip
        copy = Path(shutil.copytree(folder, tmp_path / str(n)))
        change(copy)
        assert outcomes(copy)[claim] == REFUTED
