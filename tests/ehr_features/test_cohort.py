"""The cohort, and the exclusions with their reasons."""

from __future__ import annotations

import pandas as pd
import pytest

from configs import UserError
from ehr_features.cohort import Attrition, stays
from ehr_features.raw.source import Source

DAY = pd.Timedelta(days=1)


def chosen(frames, preset="default"):
    attrition = Attrition()
    table = stays(Source.from_frames(frames), preset, attrition).to_pandas()
    gone = {e["why"]: e["ids"] for e in attrition.exclusions if e["ids"]}
    return table.set_index("stay_id"), gone, attrition


def test_every_adult_stay_is_in(frames):
    table, gone, attrition = chosen(frames)
    assert list(table.index) == sorted(frames["icustays"].stay_id) and not gone
    assert table.los_hours.tolist() == [60, 50, 30, 100, 49, 20, 72, 48]
    assert [e["before"] for e in attrition.exclusions] == [8] * len(attrition.exclusions)


def test_impossible_rows_are_dropped_counted_and_listed(frames):
    icu = frames["icustays"]
    icu.loc[0, "outtime"] = icu.loc[0, "intime"] - DAY  # outtime before intime
    icu.loc[1, "outtime"] = pd.NaT
    frames["admissions"].loc[2, "deathtime"] = icu.loc[2, "intime"]  # dead on arrival
    frames["patients"].loc[4, "anchor_age"] = 17
    twin = icu.iloc[[5]].assign(intime=icu.loc[5, "intime"] + DAY)  # one stay_id, two rows
    same = icu.iloc[[6]]
    frames["icustays"] = pd.concat([icu, twin, same], ignore_index=True)
    table, gone, _ = chosen(frames)
    first = 30_000_001
    assert gone == {
        "the same row of icustays twice; one kept": [first + 6],
        "one stay_id in different rows; none kept": [first + 5],
        "no intime or no outtime": [first + 1],
        "outtime not after intime": [first],
        "not after death: the person had died by intime": [first + 2],
        "younger than 18 at intime, or of unknown age": [first + 4],
    }
    assert list(table.index) == [first + 3, first + 6, first + 7]


def test_age_is_that_at_intime_and_91_is_marked_as_capped(frames):
    frames["patients"].loc[0, ["anchor_age", "anchor_year"]] = [17, 2148]  # 19 in 2150
    frames["patients"].loc[1, "anchor_age"] = 91
    table, gone, _ = chosen(frames)
    assert table.age_years.tolist()[:2] == [19, 91] and not gone
    assert table.age_capped.tolist()[:3] == [False, True, False]


def test_death_comes_from_flag_or_deathtime_and_not_from_dod(frames):
    frames["patients"]["dod"] = frames["admissions"].dischtime.dt.strftime("%Y-%m-%d")
    frames["admissions"].loc[0, "hospital_expire_flag"] = 1  # no deathtime: dead by the end of the admission
    table, _, _ = chosen(frames)
    assert table.died.tolist() == [True, False, False, True, False, False, False, False]
    assert table.death_at.iloc[0] == table.dischtime.iloc[0]
    assert table.death_at.iloc[3] == table.intime.iloc[3] + pd.Timedelta(hours=90)


# dod, the own admission's deathtime (hours from intime) and flag; another admission's begin, end and deathtime (days
# from intime) and flag -> in the cohort, died, death_at (hours from intime)
DEATHS = {
    "alive": ((None, None, 0), None, (True, False, None)),
    "dead by the deathtime of an earlier admission": ((None, None, 0), (-3, -1, -2, 1), (False,)),
    "dead by an earlier deathtime without a flag": ((None, None, 0), (-3, -1, -2, 0), (False,)),
    "dead by the flag of an earlier admission": ((None, None, 0), (-3, -1, None, 1), (False,)),
    "dead by the flag of an admission that goes on, and dod": (("2150-02-27", None, 0), (-3, 2, None, 1), (False,)),
    "dead by dod, whatever its own admission's discharge": (("2150-02-28", None, 0), None, (False,)),
    "dod years before, and a deathtime": (("2148-02-27", 30, 1), None, (True, True, 30)),
    "dod on the day of intime may be later that day": (("2150-03-01", None, 0), None, (True, True, 16)),
    "dod during the stay": (("2150-03-02", None, 0), None, (True, True, 40)),
    "dod on the day of discharge": (("2150-03-04", None, 0), None, (True, False, 88)),
    "dod a year later": (("2151-02-01", None, 0), None, (True, False, 8104)),
    "deathtime without a flag": ((None, 30, 0), None, (True, True, 30)),
    "flag without a deathtime": ((None, None, 1), None, (True, True, 65)),
    "flag without a deathtime, dod before the discharge": (("2150-03-02", None, 1), None, (True, True, 40)),
    "deathtime counts before dod": (("2150-03-02", 60, 1), None, (True, True, 60)),
    "dead in the stay by another admission": ((None, None, 0), (1, 3, 2, 1), (True, True, 48)),
    "dead in the admission that follows": ((None, None, 0), (4, 9, 8, 1), (True, False, 192)),
    "the earlier of two deathtimes": ((None, 60, 1), (1, 3, 2, 1), (True, True, 48)),
}


@pytest.mark.parametrize("name", DEATHS)
def test_a_death_is_one_fact_of_a_person_across_admissions(frames, name):
    (dod, deathtime, flag), another, wanted = DEATHS[name]
    begin, admissions = frames["icustays"].loc[0, "intime"], frames["admissions"]
    frames["patients"].loc[0, "dod"] = dod
    admissions.loc[0, ["deathtime", "hospital_expire_flag"]] = [
        pd.NaT if deathtime is None else begin + pd.Timedelta(hours=deathtime), flag
    ]  # fmt: skip
    if another is not None:
        *days, flag = another
        times = [pd.NaT if day is None else begin + day * DAY for day in days]
        twin = admissions.iloc[[0]].assign(hadm_id=29, hospital_expire_flag=flag)
        frames["admissions"] = pd.concat(
            [admissions, twin.assign(admittime=times[0], dischtime=times[1], deathtime=times[2])]
        )
    table, gone, _ = chosen(frames)
    if wanted == (False,):
        assert gone == {"not after death: the person had died by intime": [30_000_001]}
    else:
        stay = table.loc[30_000_001]
        hours = None if pd.isna(stay.death_at) else (stay.death_at - begin).total_seconds() / 3600
        assert (True, stay.died, hours) == wanted and not gone
    assert table.died.sum() == 1 + (wanted[1:2] == (True,))


def test_deaths_that_the_tables_tell_differently_are_counted(frames):
    admissions, patients = frames["admissions"], frames["patients"]
    patients["dod"] = [None, "2150-03-11", "2150-03-22", "2150-04-08", None, None, None, None]
    admissions.loc[4, "deathtime"] = admissions.loc[4, "dischtime"] + 2 * DAY  # no flag, and outside
    admissions.loc[5, "hospital_expire_flag"] = 1
    twin = admissions.iloc[[3]].assign(hadm_id=29)
    later = twin.assign(admittime=twin.dischtime + DAY, dischtime=twin.dischtime + 2 * DAY, hospital_expire_flag=0)
    frames["admissions"] = pd.concat([admissions, later.assign(deathtime=pd.NaT), later.assign(deathtime=pd.NaT)])
    counts = chosen(frames)[2].counts["admissions whose death the tables tell differently"]
    assert list(counts.values()) == [1, 1, 1, 0, 1, 1, 1, 1]


def test_a_stay_without_its_admission_or_patient_is_listed(frames):
    frames["admissions"] = frames["admissions"].iloc[1:]
    frames["patients"] = frames["patients"].iloc[:-1]
    _, gone, _ = chosen(frames)
    assert list(gone.values()) == [[30_000_001], [30_000_008]]


def test_an_empty_cohort_says_which_rule_emptied_it(frames):
    frames["patients"]["anchor_age"] = 5
    with pytest.raises(UserError, match=r"the cohort is empty: of 8 rows of icustays `younger than 18.*` took"):
        chosen(frames)


def test_an_admission_in_two_different_rows_is_refused(frames):
    twin = frames["admissions"].iloc[[0]].assign(race="ASIAN")
    frames["admissions"] = pd.concat([frames["admissions"], twin])
    with pytest.raises(UserError, match=r"admissions: two different rows of 1 hadm_id, e\.g\. \[20000001\]"):
        chosen(frames)


def test_medfuse_cohort_counts_stays_per_admission_after_dropping_transfers(frames):
    icu = frames["icustays"]
    moved = icu.iloc[[0]].assign(stay_id=39, last_careunit="SICU")  # its admission keeps the other stay
    second = icu.iloc[[1]].assign(stay_id=40)
    frames["icustays"] = pd.concat([icu, moved, second], ignore_index=True)
    table, gone, _ = chosen(frames, "medfuse")
    assert gone["first and last care unit differ"] == [39]
    assert gone["the admission has another such stay"] == [40, 30_000_002]
    assert 30_000_001 in table.index


def test_medfuse_death_comes_from_dod_too(frames):
    frames["patients"].loc[0, "dod"] = str((frames["admissions"].loc[0, "dischtime"]).date())
    table, _, _ = chosen(frames, "medfuse")
    assert table.died.tolist() == [True, False, False, True, False, False, False, False]


def test_medfuse_drops_impossible_rows_too(frames):
    frames["icustays"].loc[0, ["outtime", "los"]] = [frames["icustays"].loc[0, "intime"] - DAY, -1.0]
    table, gone, _ = chosen(frames, "medfuse")
    assert gone == {"outtime not after intime": [30_000_001]} and 30_000_001 not in table.index
