"""The audit of films: when they were taken, and whether their rows use only the past.

Input: the tables of a features/ folder and, if they are unchanged since the build, the raw tables.
"""

from __future__ import annotations

from collections.abc import Mapping

import ibis.expr.types as ir
import numpy as np

from ehr_features import cohort, schema
from ehr_features.audit.verdict import Verdict, decide
from ehr_features.audit.written import Written, quoted, sql_type
from ehr_features.config import FeaturesConfig
from ehr_features.films import linking, record
from ehr_features.raw.source import Source

SLACK_HOURS = 1e-6
TAKEN = """
WITH timed AS (SELECT * FROM {view} WHERE predict_at_hours IS NOT NULL AND NOT isnan(predict_at_hours::DOUBLE)),
placed AS (
    SELECT s.subject_id, s.predict_at_hours, i.subject_id AS of_film, t.subject_id AS of_stay,
        (epoch(i.taken_at::TIMESTAMP) - epoch(t.intime::TIMESTAMP)) / 3600 AS hours
    FROM timed s LEFT JOIN images i ON i.dicom_id = s.dicom_id LEFT JOIN stays t ON t.stay_id = s.stay_id
    WHERE s.dicom_id IS NOT NULL)
SELECT count(*) FILTER (hours > predict_at_hours + {slack}), count(*) FILTER (hours < -{slack}),
    count(*) FILTER (NOT coalesce(of_film = subject_id, false)),
    count(*) FILTER (NOT coalesce(of_stay = subject_id, false)), count(*) FILTER (hours IS NULL),
    (SELECT count(*) FROM timed), count(*), 1
FROM placed
"""
OF_STAYS = """
WITH placed AS (
    SELECT f.hours_from_intime, t.los_hours, i.subject_id AS of_film, t.subject_id AS of_stay,
        (epoch(i.taken_at::TIMESTAMP) - epoch(t.intime::TIMESTAMP)) / 3600 AS hours
    FROM stay_films f LEFT JOIN images i ON i.dicom_id = f.dicom_id LEFT JOIN stays t ON t.stay_id = f.stay_id)
SELECT count(*) FILTER (NOT coalesce(abs(hours - hours_from_intime) <= 1e-3 + 1e-5 * abs(hours_from_intime), false)),
    count(*) FILTER (hours < -{slack} OR hours > los_hours + {slack}),
    count(*) FILTER (NOT coalesce(of_film = of_stay, false)), count(*)
FROM placed
"""
HELD = """
SELECT count(*) FROM images i JOIN stays t USING (stay_id)
WHERE NOT coalesce(i.taken_at BETWEEN t.intime AND t.outtime, false)
"""
HISTORY = """
SELECT count(*) FILTER ({early}), count(*) FILTER (coalesce(hours_since_ed_arrival < 0, true) AND ({told})), count(*)
FROM images
"""
STUDIES = """
WITH studies AS (SELECT subject_id, study_id, min(taken_at) AS began FROM images GROUP BY ALL),
ranked AS (
    SELECT subject_id, study_id, rank() OVER (PARTITION BY subject_id ORDER BY began) - 1 AS n
    FROM studies WHERE began IS NOT NULL)
SELECT count(*) FILTER (i.num_prior_studies > r.n) FROM images i JOIN ranked r USING (subject_id, study_id)
"""
RECORD = "each film's row has only values that the raw tables held when it was taken"
STAYS = "stays equal the raw tables"


def check_films(written: Written) -> Verdict:
    """No sample has a film from after its prediction, or of another subject."""
    counts = np.zeros(8, np.int64)
    for task in written.tasks:
        counts += written.numbers(TAKEN.format(view=quoted(f"samples/{task}"), slack=SLACK_HOURS))
    names = (
        "films from after their sample's prediction",
        "films from before their stay",
        "films of another subject",
        "samples of another subject's stay",
        "films without a time",
    )
    *bad, rows, paired, timed = counts.tolist()
    proof = f"{rows} samples of {timed} tasks, {paired} with a film"
    return decide("no film is from after its sample's prediction", dict(zip(names, bad, strict=True)), proof)


def check_stay_films(written: Written) -> Verdict:
    """The films of stays have their own hour, in their own stay."""
    names = (
        "films with another hour than that at which they were taken",
        "films from before or after their stay",
        "films of another subject",
    )
    *bad, rows = written.numbers(OF_STAYS.format(slack=SLACK_HOURS))
    return decide(
        "films of stays have the hour at which they were taken",
        dict(zip(names, bad, strict=True)),
        f"{rows} films of stays",
    )


def check_history(written: Written) -> Verdict:
    """Arrivals, triage and earlier studies of a film are from before it."""
    hours = [c for c in schema.IMAGES if c.startswith("hours_since_")]
    triage = [c for c, s in schema.IMAGES.items() if s.group == "ed_triage"]
    early, told = " OR ".join(f"{c} < 0" for c in hours), " OR ".join(f"{c} IS NOT NULL" for c in triage)
    (held,) = written.numbers(HELD)
    late, triaged, rows = written.numbers(HISTORY.format(early=early, told=told))
    (earlier,) = written.numbers(STUDIES)
    bad = {
        "films linked to an ICU stay that does not contain them": held,
        "arrivals or studies from after the film": late,
        "films with the triage of a visit that began later": triaged,
        "films with too many earlier studies": earlier,
    }
    return decide("triage, arrivals and earlier studies are from before the film", bad, f"{rows} films")


def check_record(source: Source, written: Written, config: FeaturesConfig) -> Verdict:
    """Each column of a film's row equals what the raw tables held when it was taken."""
    counted = cohort.Attrition()
    linked = linking.link_films(source, counted, preset=config.preset, ed_tolerance_hours=config.ed_tolerance_hours)
    told = record.add_record(source, linked)
    return _compared(RECORD, "films", source, written, "images", told, "dicom_id", schema.IMAGES)


def check_stays(source: Source, written: Written, config: FeaturesConfig) -> Verdict:
    """Each column of a stay's row equals the raw tables."""
    told = cohort.stays(source, config.preset, cohort.Attrition())
    return _compared(STAYS, "stays", source, written, "stays", told, "stay_id", schema.STAYS)


def _compared(
    claim: str,
    what: str,
    source: Source,
    written: Written,
    view: str,
    told: ir.Table,
    key: str,
    columns: Mapping[str, schema.Column],
) -> Verdict:
    names = [name for name in columns if name not in ("split", key)]
    written.expression(source, "expected", told.select(key, *names))
    counts = [f"count(*) FILTER ({_differ(name, columns[name].type)})" for name in names]
    sql = f"SELECT count(*), count(*) FILTER (t.{key} IS NULL), {', '.join(counts)} FROM {view} o "
    rows, absent, *differing = written.numbers(f"{sql} LEFT JOIN expected t ON o.{key} = t.{key}")
    bad = {f"{what} that are not in the raw tables": absent}
    bad |= {f"{what} whose {name} differs from the raw tables": n for name, n in zip(names, differing, strict=True)}
    return decide(claim, bad, f"{len(names)} columns of {rows} {what}")


def _differ(name: str, kind: str) -> str:
    """The SQL of a difference between a written value `o` and an expected one `t`."""
    if kind in ("int64", "float64"):
        a, b = (f"nullif({table}.{quoted(name)}::DOUBLE, 'nan'::DOUBLE)" for table in ("o", "t"))
        return f"{a} IS DISTINCT FROM {b} AND NOT coalesce(abs({a} - {b}) <= 1e-6 + 1e-9 * abs({b}), false)"
    a, b = (f"{table}.{quoted(name)}::{sql_type(kind)}" for table in ("o", "t"))
    return f"{a} IS DISTINCT FROM {b}"
