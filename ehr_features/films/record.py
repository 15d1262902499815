"""Columns of the record for each film: the raw columns of images.parquet that static.py encodes.

Input: linked films. Output: the same rows with sex, age, ICU, outcome, triage, arrival and history columns.
All values are from before the film, except those that schema.py marks `available_at: discharge`.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from typing import TYPE_CHECKING

import ibis
import pyarrow as pa
from ibis import _
from ibis.util import gen_name

from ehr_features import phenotypes
from ehr_features.cohort import outcomes
from ehr_features.films.metadata import first, held, hours, where
from ehr_features.raw.engine import hold
from ehr_features.schema import FINDINGS
from ehr_features.series.channels import celsius

if TYPE_CHECKING:
    from ehr_features.raw.source import Source

TRIAGE = {  # our name: name in MIMIC-IV-ED, plausible range
    "ed_acuity": ("acuity", 1, 5),
    "ed_temperature_c": ("temperature", 25, 45),
    "ed_heart_rate": ("heartrate", 10, 300),
    "ed_resp_rate": ("resprate", 2, 100),
    "ed_o2sat": ("o2sat", 30, 100),
    "ed_sbp": ("sbp", 30, 320),
    "ed_dbp": ("dbp", 10, 250),
}


def add_record(source: Source, films: ibis.Table) -> ibis.Table:
    """Add the record's columns to linked films.

    Args:
        films: the result of `linking.link_films`.
    Returns: the same rows with the columns listed in schema.IMAGES; null if the record has no value.
    """
    n = films.count().execute()
    steps = (_person, _stay, _emergency, earlier_admissions, _by_date, _findings)
    films = held(source, earlier_studies(films))
    for step in steps:  # step by step, because engines plan a dozen joins at once badly
        films = held(source, step(source, films), instead_of=films)
    assert films.count().execute() == n, "a lookup multiplied the films"
    return films


def _lookup(films: ibis.Table, table: ibis.Table, key: str) -> ibis.Table:
    """Left join on a key; of several rows with the same key, take the first in order of the other columns."""
    order = [column for column in table.columns if column != key]
    return films.left_join(first(table, [key], order), key).drop(f"{key}_right")


def _person(source: Source, films: ibis.Table) -> ibis.Table:
    patients = source.table("patients").select(
        "subject_id", "anchor_year_group", "anchor_age", "anchor_year", sex=_.gender
    )
    films = _lookup(films, patients, "subject_id")
    age = films.anchor_age + films.taken_at.year() - films.anchor_year
    return films.mutate(age_years=age.cast("float64"), age_capped=_.anchor_age >= 91).drop("anchor_age", "anchor_year")


def _stay(source: Source, films: ibis.Table) -> ibis.Table:
    """Add demographics and outcome of the admission, ICU membership, and hours since arrival."""
    columns = ["race", "insurance", "language"]
    came = ibis.least(_.admittime, _.edregtime.coalesce(_.admittime))
    admissions = outcomes(source).select("hadm_id", *columns, died_in_hospital=_.died, arrived=came)
    films = _lookup(films, admissions, "hadm_id")
    if source.has("edstays"):  # edregtime is empty in some releases
        visits = source.table("edstays").filter(_.hadm_id.notnull()).group_by("hadm_id").agg(came=_.intime.min())
        films = _lookup(films, visits, "hadm_id").mutate(arrived=ibis.least(_.arrived, _.came)).drop("came")
    stays = source.table("icustays").select("stay_id", "intime", icu_los_days=_.los, of_hadm=_.hadm_id)
    films = _lookup(films, stays, "stay_id")
    known = films.age_years.notnull()  # if age and time are known, a film outside every stay was not taken in the ICU
    arrived = ibis.least(films.arrived, where(films.of_hadm == films.hadm_id, films.intime))
    return films.mutate(
        hours_since_hospital_arrival=where(arrived <= films.taken_at, hours(arrived, films.taken_at)),
        hours_since_icu_arrival=hours(films.intime, films.taken_at),
        in_icu=ibis.cases((films.stay_id.notnull(), 1), (known, 0)).cast("int64"),
    ).drop("intime", "of_hadm", "arrived")


def _emergency(source: Source, films: ibis.Table) -> ibis.Table:
    """Triage and arrival of the linked emergency stay, if it began before the film."""
    nothing = {name: ibis.null("float64") for name in TRIAGE}
    if not source.has("edstays"):
        return films.mutate(
            hours_since_ed_arrival=ibis.null("float64"), arrival_transport=ibis.null("string"), **nothing
        )
    visits = source.table("edstays").select("arrival_transport", "intime", ed_stay_id=_.stay_id)
    films = _lookup(films, visits, "ed_stay_id")
    began = (films.intime <= films.taken_at).fill_null(False)
    films = films.mutate(
        hours_since_ed_arrival=where(began, hours(_.intime, _.taken_at)),
        arrival_transport=where(began, _.arrival_transport),
    ).drop("intime")
    if not source.has("triage"):
        return films.mutate(**nothing)
    triage = source.table("triage")
    values = {name: triage[column] for name, (column, *_limits) in TRIAGE.items()}
    values["ed_temperature_c"] = celsius(values["ed_temperature_c"])
    values = {n: where(v.between(*TRIAGE[n][1:]), v) for n, v in values.items()}
    films = _lookup(films, triage.select(ed_stay_id=triage.stay_id, **values), "ed_stay_id")
    known = films.hours_since_ed_arrival.notnull()
    return films.mutate(**{name: where(known, films[name]) for name in TRIAGE})


def earlier_studies(films: ibis.Table) -> ibis.Table:
    """Number of the subject's studies that began before this one, and the hours since the last of them."""
    studies = films.filter(_.taken_at.notnull()).group_by("subject_id", "study_id").agg(began=_.taken_at.min())
    times = studies.group_by("subject_id", "began").agg(n=_.count())
    by_time = ibis.window(group_by="subject_id", order_by="began")
    before = ibis.window(group_by="subject_id", order_by="began", preceding=(None, 1))
    times = times.mutate(
        num_prior_studies=_.n.sum().over(before).fill_null(0).cast("float64"), previous=_.began.lag().over(by_time)
    ).drop("n")
    studies = studies.join(times, ["subject_id", "began"]).select("study_id", "num_prior_studies", "previous")
    films = _lookup(films, studies, "study_id")
    timed = films.taken_at.notnull()
    return films.mutate(
        num_prior_studies=where(timed, _.num_prior_studies),
        hours_since_prior_study=where(timed, hours(_.previous, _.taken_at)),
    ).drop("previous")


def over(source: Source) -> ibis.Table:
    """When each admission became history: subject_id, hadm_id, over_at.

    The latest of its discharge, its death, and the ends of its ICU and emergency stays. An admission that lacks a time
    or ends before it begins is never history. Several rows of one admission count as one, which ends when all of them
    have.
    """
    keys = ["subject_id", "hadm_id"]
    true = (_.dischtime >= _.admittime).fill_null(False).cast("int64")
    spans = source.table("admissions").select(*keys, true=true, end=ibis.greatest(_.dischtime, _.deathtime))
    for name in ("icustays", "edstays"):
        if source.has(name):
            inside = source.table(name).select(*keys, true=ibis.null("int64"), end=ibis.greatest(_.intime, _.outtime))
            spans = spans.union(inside)
    ends = spans.filter(_.subject_id.notnull() & _.hadm_id.notnull()).group_by(keys)
    return ends.agg(true=_.true.min(), over_at=_.end.max()).filter(_.true == 1).drop("true")


def earlier_admissions(source: Source, films: ibis.Table) -> ibis.Table:
    """Number and diagnoses of the subject's admissions that had ended before the film."""
    ended = held(source, over(source))
    timed = films.select("dicom_id", "subject_id", "taken_at")
    pairs = timed.join(ended, [timed.subject_id == ended.subject_id, ended.over_at < timed.taken_at])
    films = _lookup(films, pairs.group_by("dicom_id").agg(n=_.count()), "dicom_id")
    known = films.age_years.notnull()
    films = films.mutate(num_prior_admissions=where(known, _.n.fill_null(0).cast("float64"))).drop("n")
    if not source.has("diagnoses_icd"):
        return films.mutate(prior_phenotypes=ibis.null("string"))
    groups = phenotypes.groups()
    films = _lookup(films, _first_coded(source, ended, groups), "subject_id")
    names = [ibis.cases((films[f"since_{g}"] < films.taken_at, f"{g} "), else_="") for g in groups]
    listed = functools.reduce(operator.add, names).strip()
    return films.mutate(prior_phenotypes=where(known, listed)).drop(*(f"since_{g}" for g in groups))


def _first_coded(source: Source, ended: ibis.Table, groups: Sequence[int]) -> ibis.Table:
    """subject_id, since_GROUP: the end of the first admission with a diagnosis of each group."""
    diagnoses = source.table("diagnoses_icd").select("hadm_id", "icd_code", "icd_version").filter(_.icd_code.notnull())
    codes = phenotypes.group_codes(diagnoses.select("icd_code", "icd_version").distinct().to_pandas(), "default")
    codes = codes.dropna(subset="ccs").astype({"ccs": "int64", "icd_version": "int64", "icd_code": "string"})
    table = pa.Table.from_pandas(codes[["icd_code", "icd_version", "ccs"]], preserve_index=False)
    mapped = diagnoses.join(hold(source.con, gen_name("codes"), table), ["icd_code", "icd_version"])
    coded = mapped.select("hadm_id", "ccs").distinct().join(ended, "hadm_id")
    return coded.group_by("subject_id").agg(**{f"since_{g}": _.over_at.min(where=_.ccs == g) for g in groups})


def _by_date(source: Source, films: ibis.Table) -> ibis.Table:
    """The flags of the published notebooks, by calendar date; of several admissions the one that began last."""
    timed = films.select("dicom_id", "subject_id", day=_.taken_at.date())
    for name, table, start, end, value in (
        ("msn_died", "admissions", "admittime", "dischtime", "hospital_expire_flag"),
        ("msn_in_icu", "icustays", "intime", "outtime", None),
    ):
        spans = source.table(table)
        flag = spans[value] if value else ibis.literal(1, "int64")
        spans = spans.select("subject_id", start=spans[start], end=spans[end], flag=flag)
        days = [timed.subject_id == spans.subject_id, spans.start.date() <= timed.day, spans.end.date() >= timed.day]
        last = first(timed.join(spans, days), ["dicom_id"], [_.start.desc(), _.flag.desc()])
        films = _lookup(films, last.select("dicom_id", "flag"), "dicom_id")
        known = films.age_years.notnull()
        films = films.mutate(**{name: where(known, _.flag.fill_null(0))}).drop("flag")
    return films


def _findings(source: Source, films: ibis.Table) -> ibis.Table:
    if not source.has("cxr_chexpert"):
        return films.mutate(**{name: ibis.null("float64") for name in FINDINGS})
    return _lookup(films, source.table("cxr_chexpert").select("study_id", *FINDINGS), "study_id")
