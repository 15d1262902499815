"""Tasks: samples, prediction times and labels."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from ehr_features import labels, phenotypes
from ehr_features.cohort import Attrition, stays
from ehr_features.config import FeaturesConfig, Findings, Policy
from ehr_features.raw.engine import hold
from ehr_features.raw.source import Source
from ehr_features.schema import FINDINGS

FIRST = 30_000_001


@pytest.fixture
def samples(frames, tmp_path):
    """TASK, more config keys -> the task's table, and its attrition."""

    def make(task: str, **keys):
        import pyarrow as pa

        config = FeaturesConfig(mimic_iv="x", out=tmp_path, **keys)
        source, attrition = Source.from_frames(frames), Attrition()
        table = stays(source, config.preset, attrition)
        hours = (table.death_at.epoch_seconds() - table.intime.epoch_seconds()) / 3600
        table = table.mutate(death_hours=hours)
        seen = pa.table({"stay_id": pa.array(frames["icustays"].stay_id), "first_hour": pa.array(np.zeros(8, int))})
        cohort = labels.Cohort(source, table, hold(source.con, "seen", seen), config)
        got = labels.TASKS[task](cohort, attrition).to_pandas().sort_values(["stay_id", "predict_at_hours"])
        return got.reset_index(drop=True), attrition

    return make


def test_mortality_needs_the_patient_alive_and_in_the_icu_at_the_landmark(samples, frames):
    frames["admissions"].loc[6, "deathtime"] = frames["icustays"].loc[6, "intime"] + pd.Timedelta(hours=48)
    got, attrition = samples("mortality")
    assert got.stay_id.tolist() == [
        FIRST,
        FIRST + 1,
        FIRST + 3,
        FIRST + 4,
        FIRST + 7,
    ]  # 30 h, 20 h, and the dead are out
    assert got.mortality.tolist() == [0, 0, 1, 0, 0] and set(got.predict_at_hours) == {48.0}
    gone = {
        e["why"]: (e["before"], e["after"], e["ids"]) for e in attrition.exclusions if e["table"].startswith("samples")
    }
    assert gone == {
        "left the ICU before hour 48": (8, 6, [FIRST + 2, FIRST + 5]),
        "dead by hour 48": (6, 5, [FIRST + 6]),
    }


def test_mortality_at_24_hours_and_with_a_gap(samples):
    assert len(samples("mortality", landmark_hours=24)[0]) == 7
    assert samples("mortality", gap_hours=6)[0].stay_id.tolist() == [FIRST, FIRST + 3, FIRST + 6]


def test_decompensation_is_death_within_a_day_every_hour_of_life(samples):
    got, _ = samples("decompensation")
    dying = got[got.stay_id == FIRST + 3]
    assert dying.predict_at_hours.tolist() == [float(h) for h in range(5, 90)]  # dead at hour 90
    assert dying.predict_at_hours[dying.decompensation == 1].tolist() == [float(h) for h in range(66, 90)]
    assert got[got.stay_id != FIRST + 3].decompensation.sum() == 0
    assert got.sample_id.is_unique and got[got.stay_id == FIRST + 5].predict_at_hours.max() == 20


def test_decompensation_is_of_the_person_also_where_another_admission_tells_the_death(samples, frames):
    admissions, end = frames["admissions"], frames["icustays"].loc[4, "outtime"]  # after 49 hours
    home = pd.Timedelta(hours=6)
    again = admissions.iloc[[4]].assign(hadm_id=29, admittime=end + home, dischtime=end + 2 * home)
    frames["admissions"] = pd.concat([admissions, again.assign(deathtime=end + 2 * home, hospital_expire_flag=1)])
    got = samples("decompensation")[0]
    got = got[got.stay_id == FIRST + 4]
    assert got.predict_at_hours[got.decompensation == 1].tolist() == [float(h) for h in range(37, 50)]
    assert samples("mortality")[0].set_index("stay_id").mortality[FIRST + 4] == 0


def test_length_of_stay_in_hours_and_ten_bins(samples, frames):
    frames["icustays"].loc[0, "outtime"] = frames["icustays"].loc[0, "intime"] + pd.Timedelta(days=16)
    got, _ = samples("length_of_stay")
    long = got[got.stay_id == FIRST]
    assert (long.los_remaining_hours == 384 - long.predict_at_hours).all()
    days = long.los_remaining_hours / 24
    want = pd.cut(days, [-1, 1, 2, 3, 4, 5, 6, 7, 8, 14, 99], right=False, labels=False)
    assert (long.los_bin == want).all() and set(long.los_bin) == set(range(10))


@pytest.mark.parametrize(("dies", "outtime"), [(84.0, 120), (84.5, 85), (100, 90), (84.0, 84)])
def test_a_stay_ends_at_death(samples, frames, dies, outtime):
    begin = frames["icustays"].loc[3, "intime"]
    frames["icustays"].loc[3, ["outtime", "los"]] = begin + pd.Timedelta(hours=outtime), outtime / 24
    frames["admissions"].loc[3, "deathtime"] = begin + pd.Timedelta(hours=dies)
    end = min(dies, outtime)
    left = samples("length_of_stay")[0].query(f"stay_id == {FIRST + 3}")
    assert (left.los_remaining_hours + left.predict_at_hours == end).all() and left.predict_at_hours.max() <= end
    dying = samples("decompensation")[0].query(f"stay_id == {FIRST + 3}")
    assert (dying.decompensation == (dying.predict_at_hours >= dies - 24)).all() and dying.decompensation.sum() >= 14
    assert samples("phenotypes")[0].set_index("stay_id").predict_at_hours[FIRST + 3] == end
    early = samples("phenotypes_early", landmark_hours=84)[0].stay_id
    assert (FIRST + 3 in set(early)) == (end >= 84)
    published = samples("length_of_stay", preset="medfuse")[0].query(f"stay_id == {FIRST + 3}")
    assert (published.los_remaining_hours + published.predict_at_hours).round(6).eq(outtime).all()


def test_phenotypes_come_from_the_stays_admission(samples, frames):
    frames["diagnoses_icd"].loc[0, ["icd_code", "icd_version"]] = ["J9601", 10]
    got, attrition = samples("phenotypes")
    columns = [c for c in got if c.startswith("phenotype_")]
    assert len(columns) == 25 and columns[0] == "phenotype_2" and columns[-1] == "phenotype_249"
    assert got.loc[0, columns].to_dict() == {c: int(c == "phenotype_131") for c in columns}
    assert (
        got.phenotype_108.tolist() == [0] + [1] * 7
        and got.predict_at_hours.tolist()
        == [
            *got.los_hours[:3],
            90,  # dead at hour 90
            *got.los_hours[4:],
        ]
    )
    assert attrition.counts["phenotype prevalence in 4 admissions coded in ICD-9"]["phenotype_108"] == 1.0
    early, _ = samples("phenotypes_early")
    assert early.stay_id.tolist() == [FIRST + i for i in (0, 1, 3, 4, 6, 7)] and set(early.predict_at_hours) == {48.0}


def test_a_stay_without_coded_diagnoses_has_no_phenotypes(samples, frames):
    frames["diagnoses_icd"] = frames["diagnoses_icd"].astype({"icd_version": "Int64"}).iloc[1:]
    frames["diagnoses_icd"].loc[1, "icd_version"] = pd.NA  # coded, in a version that is not said
    got, attrition = samples("phenotypes")
    assert got.stay_id.tolist() == [FIRST + i for i in range(1, 8)]
    assert {e["why"]: e["ids"] for e in attrition.exclusions}["no diagnosis coded"] == [FIRST]
    assert got.phenotype_108.tolist() == [0] + [1] * 6
    published, _ = samples("phenotypes", preset="medfuse")  # absent there, and by code alone
    assert published.phenotype_108.tolist() == [0] + [1] * 7


def test_hourly_tasks_of_a_cohort_in_which_nothing_was_measured_are_empty(samples, frames):
    frames["icustays"]["outtime"] = frames["icustays"]["intime"] + pd.Timedelta(hours=4)
    assert len(samples("decompensation")[0]) == len(samples("length_of_stay")[0]) == 0


@pytest.mark.parametrize(
    ("code", "version", "group", "how"),
    [
        ("4280", 9, 108, "exact"),
        ("I5020", 10, 108, "exact"),
        ("4280", 10, None, "unmapped"),  # by version: no ICD-10 code
        (" i50.20 ", 10, 108, "exact"),
        ("I4819", 10, 106, "prefix"),  # since 2019; I481 is known
        ("N1831", 10, 158, "prefix"),  # since 2020; N183 is known
        ("J1282", 10, 122, "prefix"),  # since 2021; J128 is no code, J1281 and J1289 are
        ("I25112", 10, 101, "prefix"),  # since 2022; I2511 is no code
        ("K7682", 10, 151, "prefix"),
        ("J12.82 ", 10, 122, "prefix"),
        ("I5A", 10, None, "unmapped"),  # under I5 are heart failure and others
        ("E11A", 10, None, "unmapped"),  # with and without complications
        ("U071", 10, None, "unmapped"),  # nothing under U is known
        ("J45909", 10, None, "other"),  # asthma, although all known J4 codes are COPD
        ("D6481", 10, 238, "exact"),
        ("D649", 10, None, "other"),  # known, of another group, although D6481 is a complication
        ("D6960", 10, None, "other"),  # newer, under the known D696 of another group
        ("Z87891", 10, None, "other"),
        ("B009", 10, None, "other"),
        ("Z0000", 10, None, "other"),
    ],
)
def test_icd_codes_find_their_group(code, version, group, how):
    found = phenotypes.group_codes(pd.DataFrame({"icd_code": [code], "icd_version": [version]}), "default").iloc[0]
    assert (None if pd.isna(found.ccs) else int(found.ccs), found.how) == (group, how)


def test_branches_agree_with_the_codes_of_the_groups():
    codes = pd.read_csv(phenotypes.PHENOTYPES, dtype=str).query(
        "icd_version == '10' and presets.str.contains('default')"
    )
    branches = pd.read_csv(phenotypes.BRANCHES, dtype=str)
    for prefix, group in branches.itertuples(index=False):
        assert set(codes.ccs[codes.icd_code.str.startswith(prefix)]) == ({group} - {"0"}), prefix


def test_a_code_that_no_group_can_be_told_for_is_counted_by_name(samples, frames):
    frames["diagnoses_icd"]["icd_version"] = 10
    frames["diagnoses_icd"]["icd_code"] = ["J1282", "U071", "E11A", "U071", "D649", "I5020", "I25112", "N1831"]
    got, attrition = samples("phenotypes")
    assert got.phenotype_122.tolist() == [1] + [0] * 7 and got.phenotype_101.tolist() == [0] * 6 + [1, 0]
    assert attrition.counts["unmapped ICD-10 codes"] == {"E11A": 1, "U071": 2}


@pytest.mark.parametrize("dictionary", [None, ["0389", "3899", "0088", "4280"], ["389", "3899", "88", "4280"]])
def test_codes_that_lost_their_leading_zeros_are_a_warning_with_the_count(frames, dictionary):
    """The dictionary is absent, whole, or lost them too."""
    if dictionary:
        frames["d_icd_diagnoses"] = pd.DataFrame({"icd_code": dictionary, "icd_version": 9})
    frames["diagnoses_icd"] = frames["diagnoses_icd"].assign(icd_code="4280", icd_version=9)
    assert phenotypes.lost_zeros(Source.from_frames(frames)) == []
    frames["diagnoses_icd"].loc[:3, "icd_code"] = ["389", "3899", "88", "389"]
    (said,) = phenotypes.lost_zeros(Source.from_frames(frames))
    assert said.startswith(f"diagnoses_icd: {3 if dictionary and '0389' in dictionary else 2} rows have ICD-9 codes")
    frames["diagnoses_icd"].loc[:3, "icd_code"] = ["0389", "3899", "0088", "0389"]
    assert phenotypes.lost_zeros(Source.from_frames(frames)) == []
    assert phenotypes.lost_zeros(Source.from_frames({})) == []


def test_medfuse_groups_ignore_the_icd_version():
    found = phenotypes.group_codes(pd.DataFrame({"icd_code": ["4280"], "icd_version": [10]}), "medfuse")
    assert found.ccs.tolist() == [108]


@pytest.mark.parametrize(
    ("uncertain", "empty", "wanted"),
    [("zeros", "zeros", [1, 0, 0, 0]), ("ones", "zeros", [1, 0, 1, 0]), ("ignore", "ignore", [1, 0, None, None])],
)
def test_finding_policies(uncertain, empty, wanted):
    raw = pd.DataFrame([[1.0, 0.0, -1.0] + [None] * 11], columns=list(FINDINGS))
    got = labels.findings(raw, Policy(uncertain, empty)).iloc[0, :4].tolist()
    assert [None if pd.isna(v) else v for v in got] == wanted


def test_evaluation_keeps_its_own_finding_policy_whatever_training_takes():
    images = pd.DataFrame([[-1.0] + [None] * 13] * 2 + [[None] * 14], columns=list(FINDINGS))
    images = images.assign(dicom_id=list("abc"), stay_id=pd.array([1, None, None], "Int64"), subject_id=[1, 2, 3])
    images["split"] = ["train", "test", "test"]
    attrition = Attrition()
    got = labels.finding_samples(images, Findings(uncertain="ones"), attrition).set_index("dicom_id")
    assert got.Atelectasis.tolist()[0] == 1 and pd.isna(got.loc["b", "Atelectasis"])
    assert got.Cardiomegaly.tolist() == [0, 0] and "c" not in got.index  # no findings at all: no sample
    assert [(e["before"], e["after"], e["ids"]) for e in attrition.exclusions] == [(3, 2, ["c"])]


def test_code_status_is_the_last_one_before_the_prediction():
    con = Source.from_frames({}).con
    import pyarrow as pa

    moments = {"sample_id": ["a", "b", "c"], "stay_id": [1, 1, 2], "predict_at_hours": [48.0, 5.0, 48.0]}
    said = {"stay_id": [1, 1, 1], "hours": [2.0, 10.0, 50.0], "code_status": ["Full code", "DNR", "Comfort"]}
    got = labels.latest(hold(con, "m", pa.table(moments)), hold(con, "s", pa.table(said)), "code_status").to_pandas()
    told = got.set_index("sample_id").code_status
    assert told["a"] == "DNR" and told["b"] == "Full code" and pd.isna(told["c"])
