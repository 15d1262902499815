"""Tasks: which stays are predicted at which hour, and their labels.

Input: the cohort (with deaths), the films of stays, diagnoses, code status. Output: an ibis table per task, with the
columns of schema.SAMPLES and its labels. A sample uses nothing from after `predict_at_hours`.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ibis
import ibis.expr.types as ir
import numpy as np
import pandas as pd
import pyarrow as pa
from ibis import _

from ehr_features import plug_ins
from ehr_features.cohort import Attrition
from ehr_features.config import FeaturesConfig, Findings, Policy
from ehr_features.phenotypes import groups, with_phenotypes
from ehr_features.raw.engine import hold
from ehr_features.raw.source import Source
from ehr_features.schema import FINDINGS, SAMPLES, Column
from ehr_features.series.events import CODE_STATUS

FIRST_HOUR = 5  # decompensation and length of stay begin after four hours
WITHIN_HOURS = 24  # decompensation: death within 24 hours
LOS_DAYS = (1, 2, 3, 4, 5, 6, 7, 8, 14)  # inner edges of the ten bins


@dataclass(frozen=True)
class Cohort:
    """Tables that the tasks read. stays: from cohort.stays, with split; observed: stay_id, first_hour (of
    any measurement).
    """

    source: Source
    stays: ir.Table
    observed: ir.Table
    config: FeaturesConfig


def mortality(cohort: Cohort, attrition: Attrition) -> ir.Table:
    """Death in hospital, predicted after the first hours of a stay whose patient is then alive and in the ICU."""
    config, at = cohort.config, float(cohort.config.landmark_hours)
    name = f"mortality ({config.landmark_hours} h)"
    if config.preset == "medfuse":
        stays = _keep(cohort.stays, _.los_hours >= at - 1e-6, attrition, name, f"shorter than {at:.0f} h")
        seen = cohort.observed.filter(_.first_hour < at).select("stay_id")
        stays = _keep(stays.semi_join(seen, "stay_id"), None, attrition, name, "nothing measured", before=stays)
    else:
        until = at + config.gap_hours
        stays = _keep(cohort.stays, _.los_hours >= until, attrition, name, f"left the ICU before hour {until:.0f}")
        alive = _.death_hours.isnull() | (_.death_hours > until)
        stays = _keep(stays, alive, attrition, name, f"dead by hour {until:.0f}")
    return stays.mutate(sample_id=_.stay_id.cast("string"), predict_at_hours=at, mortality=_.died.cast("int64"))


def phenotypes(cohort: Cohort, attrition: Attrition) -> ir.Table:
    """25 groups of diagnoses, from the whole stay."""
    stays = _coded(cohort, _with_end(cohort), attrition, "phenotypes")
    stays = stays.mutate(sample_id=_.stay_id.cast("string"), predict_at_hours=_.end_hours)
    return with_phenotypes(cohort.source, stays, cohort.config.preset, attrition)


def phenotypes_early(cohort: Cohort, attrition: Attrition) -> ir.Table:
    """25 groups of diagnoses, from the first hours of stays of at least that length."""
    at = float(cohort.config.landmark_hours)
    stays = _keep(_with_end(cohort), _.end_hours >= at, attrition, "phenotypes_early", f"shorter than {at:.0f} h")
    stays = _coded(cohort, stays, attrition, "phenotypes_early")
    stays = stays.mutate(sample_id=_.stay_id.cast("string"), predict_at_hours=ibis.literal(at))
    return with_phenotypes(cohort.source, stays, cohort.config.preset, attrition)


def decompensation(cohort: Cohort, attrition: Attrition) -> ir.Table:
    """Death within 24 hours, predicted every hour."""
    hourly = _hourly(cohort, attrition, "decompensation")
    left = _.death_hours - _.predict_at_hours
    return hourly.mutate(decompensation=(left <= WITHIN_HOURS).fill_null(False).cast("int64"))


def length_of_stay(cohort: Cohort, attrition: Attrition) -> ir.Table:
    """Hours left in the ICU, predicted every hour; `los_bin` 0-9: under a day, seven bins of a day, 8-14 days, more."""
    hourly = _hourly(cohort, attrition, "length_of_stay").mutate(los_remaining_hours=_.end_hours - _.predict_at_hours)
    passed = [(hourly.los_remaining_hours >= 24 * day).cast("int64") for day in LOS_DAYS]
    return hourly.mutate(los_bin=functools.reduce(operator.add, passed))


TASKS: dict[str, Callable[[Cohort, Attrition], ir.Table]] = {
    "mortality": mortality,
    "phenotypes": phenotypes,
    "phenotypes_early": phenotypes_early,
    "decompensation": decompensation,
    "length_of_stay": length_of_stay,
}


def own_task(cohort: Cohort, word: str) -> ir.Table:
    """The samples of a task of the user's own file, FILE.py:Class."""
    names = ["stay_id", "hadm_id", "subject_id", "intime", "outtime", "los_hours", "death_hours", "age_years", "sex"]
    stays = cohort.stays.select(*names, "split").to_pandas()
    rows = plug_ins.task_rows(word, stays, lambda name: cohort.source.table(name).to_pandas())
    rows["sample_id"] = rows["stay_id"].astype(str)
    if rows["stay_id"].duplicated().any():
        rows["sample_id"] += "-" + rows["predict_at_hours"].map("{:g}".format)
    held = hold(cohort.source.con, f"own_{plug_ins.task_name(word)}", pa.Table.from_pandas(rows, preserve_index=False))
    return held.join(cohort.stays.select("stay_id", "subject_id", "split"), "stay_id")


def label_columns(task: str) -> dict[str, Column]:
    """The label columns of a task."""
    if plug_ins.is_file(task):
        return {name: Column("int64", "", "outcome", "discharge") for name in plug_ins.load_task(task).labels}
    if task.startswith("phenotypes"):
        return {f"phenotype_{g}": Column("int64", "", "phenotype", "discharge") for g in groups()}
    if task == "length_of_stay":
        return {
            "los_remaining_hours": Column("float64", "hours", "outcome", "discharge"),
            "los_bin": Column("int64", "bin", "outcome", "discharge"),
        }
    if task == "findings":
        return {name: Column("int64", "", "finding", "study") for name in FINDINGS}
    return {task: Column("int64", "", "outcome", "discharge")}


def _keep(
    stays: ir.Table, rule: Any, attrition: Attrition, task: str, why: str, *, before: ir.Table | None = None
) -> ir.Table:
    kept = stays if rule is None else stays.filter(rule)
    ids = [
        set((stays if before is None else before).stay_id.to_pyarrow().to_pylist()),
        set(kept.stay_id.to_pyarrow().to_pylist()),
    ]
    attrition.add(f"samples: {task}", why, len(ids[0]), len(ids[1]), ids[0] - ids[1])
    return kept


def _coded(cohort: Cohort, stays: ir.Table, attrition: Attrition, task: str) -> ir.Table:
    """Keep stays whose admission has diagnoses; without any, no phenotype is known to be absent."""
    if cohort.config.preset == "medfuse":  # as published: absent diagnoses are negative
        return stays
    diagnoses = cohort.source.table("diagnoses_icd")
    coded = stays.semi_join(diagnoses.filter(_.icd_code.notnull()), "hadm_id")
    return _keep(coded, None, attrition, task, "no diagnosis coded", before=stays)


def _with_end(cohort: Cohort) -> ir.Table:
    """The stays with `end_hours`: death or outtime; with preset `medfuse` outtime."""
    end = ibis.least(_.los_hours, _.death_hours.coalesce(_.los_hours))
    return cohort.stays.mutate(end_hours=_.los_hours if cohort.config.preset == "medfuse" else end)


def _hourly(cohort: Cohort, attrition: Attrition, task: str) -> ir.Table:
    """One row per whole hour from FIRST_HOUR to the end of the stay or death, after the first measurement."""
    stays = _with_end(cohort).join(cohort.observed, "stay_id")
    stays = stays.mutate(lived=ibis.least(_.end_hours, _.death_hours.coalesce(_.end_hours)))
    stays = _keep(stays, None, attrition, task, "nothing measured", before=cohort.stays)
    stays = _keep(stays, _.lived >= FIRST_HOUR, attrition, task, f"shorter than {FIRST_HOUR} h, or dead by then")
    longest = int(stays.lived.max().coalesce(0).execute())
    hours = pa.table({"hour": pa.array(range(FIRST_HOUR, longest + 1), pa.int64())})
    clock = hold(cohort.source.con, "sample_hours", hours)
    rows = stays.join(clock, [clock.hour <= stays.lived, clock.hour >= stays.first_hour + cohort.config.step_hours])
    rows = rows.filter(_.death_hours.isnull() | (_.death_hours > _.hour))
    return rows.mutate(
        sample_id=_.stay_id.cast("string") + "-" + _.hour.cast("string"), predict_at_hours=_.hour.cast("float64")
    )


def as_labels(findings: pd.DataFrame, policy: Policy) -> pd.DataFrame:
    """Turn findings of the source, 1, 0, -1 (uncertain) or empty, into labels 1, 0 or missing (float)."""
    becomes: Any = {"zeros": 0.0, "ones": 1.0, "ignore": np.nan}
    raw = findings.astype("float64")
    return raw.mask(raw == -1, becomes[policy.uncertain]).mask(raw.isna(), becomes[policy.empty])


def findings(images: pd.DataFrame, policy: Policy) -> pd.DataFrame:
    """The 14 findings of films as labels, Int64; a study without a row in the findings table stays null."""
    raw = images[list(FINDINGS)].astype("float64")
    return as_labels(raw, policy).where(raw.notna().any(axis=1)).astype("Int64")


def finding_samples(images: pd.DataFrame, policy: Findings, attrition: Attrition) -> pd.DataFrame:
    """One sample per film that has findings; val and test use the evaluation policy, whatever the training policy."""
    train = (images["split"] == "train").to_numpy()
    trained = findings(images, Policy(policy.uncertain, policy.empty))
    of_train = np.broadcast_to(train[:, None], trained.shape)
    labels = trained.where(of_train, findings(images, Policy(policy.eval_uncertain, policy.eval_empty)))
    about = images[["dicom_id", "stay_id", "subject_id", "split"]].reset_index(drop=True)
    about = about.assign(sample_id=about["dicom_id"], predict_at_hours=np.nan, code_status=None)
    about = about.astype({"code_status": "string"})[list(SAMPLES)]
    samples = pd.concat([about, labels.reset_index(drop=True)], axis=1)
    known = labels.notna().any(axis=1).to_numpy()
    gone = samples.loc[~known, "dicom_id"]
    attrition.add("samples: findings", "no finding of the study is known", len(samples), int(known.sum()), gone)
    return samples[known]


def code_status(events: ir.Table, stays: ir.Table) -> ir.Table:
    """Code status charts of stays: stay_id, hours, code_status."""
    said = events.filter(_.itemid.isin(CODE_STATUS) & _.value.notnull() & _.charttime.notnull())
    said = said.join(stays.select("stay_id", "intime"), "stay_id")
    hours = (_.charttime.epoch_seconds() - _.intime.epoch_seconds()) / 3600
    return said.select("stay_id", hours=hours, code_status=_.value).distinct()


def latest(samples: ir.Table, facts: ir.Table, column: str) -> ir.Table:
    """Add the last value of a timed column at or before each prediction (null if there is none).

    Args:
        samples: sample_id, stay_id, predict_at_hours, ... facts: stay_id, hours, and `column`.
    """
    facts = facts.rename(fact_stay="stay_id")
    moments = samples.select("sample_id", "stay_id", "predict_at_hours")
    pairs = moments.join(facts, [moments.stay_id == facts.fact_stay, facts.hours <= moments.predict_at_hours])
    last = pairs.group_by("sample_id").agg(last=ibis.struct({"hours": _.hours, "fact": _[column]}).max())
    last = last.select("sample_id", **{column: _["last"]["fact"]})
    return samples.left_join(last, "sample_id").drop("sample_id_right")
