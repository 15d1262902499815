"""The audit of subjects: deaths, and which admissions were history when a film was taken.

Input: the tables of a features/ folder and the raw tables. The expected values come from SQL on the raw tables alone;
no code of the extraction is imported.
"""

from __future__ import annotations

from importlib.resources import files as resources

import pandas as pd

from ehr_features.audit.verdict import Verdict, decide
from ehr_features.audit.written import Written
from ehr_features.raw.source import Source

PEOPLE = "no stay begins after death, and no death in hospital is labelled as survival"
LABELLED = "no death in hospital is labelled as survival"  # of preset medfuse
PRIOR = "earlier admissions and their diagnoses ended before the film"
KEYS = ("subject_id", "hadm_id")
TABLES = {
    "patients": ("subject_id", "anchor_age", "anchor_year", "dod"),
    "admissions": (*KEYS, "admittime", "dischtime", "deathtime", "hospital_expire_flag"),
    "icustays": (*KEYS, "stay_id", "intime", "outtime"),
    "edstays": (*KEYS, "stay_id", "intime", "outtime"),
    "diagnoses_icd": (*KEYS, "icd_code", "icd_version"),
}
DEATHS = """
CREATE OR REPLACE TEMP TABLE deaths AS
WITH days AS (SELECT subject_id, min(dod) + INTERVAL 1 DAY AS midnight FROM patients GROUP BY ALL),
told AS (
    SELECT a.subject_id, CASE WHEN a.deathtime IS NOT NULL THEN a.deathtime
        WHEN a.hospital_expire_flag = 1 AND d.midnight > a.admittime THEN least(a.dischtime, d.midnight)
        WHEN a.hospital_expire_flag = 1 THEN a.dischtime END AS at
    FROM admissions a LEFT JOIN days d USING (subject_id))
SELECT subject_id, coalesce(min(t.at), any_value(d.midnight)) AS death_at
FROM days d FULL JOIN told t USING (subject_id) GROUP BY ALL;
CREATE OR REPLACE TEMP TABLE ends AS
SELECT a.hadm_id, max(a.hospital_expire_flag) AS flag, max(a.hospital_expire_flag = 1 OR a.deathtime IS NOT NULL
    OR d.death_at <= a.dischtime OR d.death_at <= a.admittime) AS died, max(a.dischtime) AS left_at
FROM admissions a LEFT JOIN deaths d USING (subject_id) GROUP BY ALL
"""
LATE = """
SELECT count(*) FILTER (s.intime >= d.death_at), count(*) FILTER (d.death_at <= s.outtime) FROM stays s
JOIN deaths d USING (subject_id)
"""
SAMPLES = """
SELECT count(*) FILTER (epoch(d.death_at) - epoch(s.intime) <= m.predict_at_hours * 3600),
    count(*) FILTER (m.mortality IS DISTINCT FROM coalesce(e.died OR d.death_at <= s.outtime, false)::INT)
FROM "samples/mortality" m JOIN stays s USING (stay_id) LEFT JOIN deaths d ON d.subject_id = s.subject_id
LEFT JOIN ends e ON e.hadm_id = s.hadm_id
"""
FILMS = """
SELECT count(*) FROM images i LEFT JOIN ends e USING (hadm_id)
WHERE i.died_in_hospital IS DISTINCT FROM CASE WHEN e.died THEN 1 WHEN e.flag IS NOT NULL THEN 0 END
"""
HISTORY = """
CREATE OR REPLACE TEMP TABLE history AS
WITH impossible AS (
    SELECT DISTINCT hadm_id FROM admissions WHERE NOT coalesce(admittime <= dischtime, false) AND hadm_id IS NOT NULL),
moments AS (
    SELECT subject_id, hadm_id, unnest([dischtime, deathtime]) AS at FROM admissions
    UNION ALL SELECT subject_id, hadm_id, unnest([intime, outtime]) FROM icustays
    UNION ALL SELECT subject_id, hadm_id, unnest([intime, outtime]) FROM edstays)
SELECT m.subject_id, m.hadm_id, max(m.at) AS over_at
FROM moments m SEMI JOIN admissions a ON m.hadm_id = a.hadm_id AND m.subject_id = a.subject_id
ANTI JOIN impossible n ON m.hadm_id = n.hadm_id GROUP BY ALL;
CREATE OR REPLACE TEMP TABLE groups AS
WITH codes AS (
    SELECT DISTINCT hadm_id, icd_version, upper(replace(trim(icd_code), '.', '')) AS code FROM diagnoses_icd),
listed AS (SELECT * FROM phenotypes WHERE list_contains(string_split(presets, ' '), 'default')),
stems AS (SELECT prefix, ccs FROM branches UNION ALL SELECT icd_code, ccs FROM listed WHERE icd_version = 10),
exact AS (SELECT c.*, l.ccs FROM codes c LEFT JOIN listed l ON l.icd_code = c.code AND l.icd_version = c.icd_version),
newer AS (
    SELECT e.hadm_id, e.code, arg_max(s.ccs, n.n) AS ccs FROM exact e, range(1, 9) n(n)
    JOIN stems s ON s.prefix = left(e.code, n.n) WHERE e.ccs IS NULL AND e.icd_version = 10 AND n.n <= length(e.code)
    GROUP BY ALL)
SELECT hadm_id, ccs FROM exact WHERE ccs > 0 UNION SELECT hadm_id, ccs FROM newer WHERE ccs > 0;
CREATE OR REPLACE TEMP TABLE told AS
SELECT i.dicom_id, count(DISTINCT h.hadm_id) AS num,
    coalesce(list(DISTINCT g.ccs) FILTER (g.ccs IS NOT NULL), []) AS ccs
FROM images i LEFT JOIN history h ON h.subject_id = i.subject_id AND h.over_at < i.taken_at
LEFT JOIN groups g ON g.hadm_id = h.hadm_id GROUP BY ALL;
CREATE OR REPLACE TEMP TABLE own AS
WITH held AS (
    SELECT dicom_id, hadm_id FROM images
    UNION SELECT i.dicom_id, s.hadm_id FROM images i JOIN icustays s ON s.subject_id = i.subject_id
        AND i.taken_at BETWEEN s.intime AND s.outtime)
SELECT dicom_id, list(DISTINCT ccs) AS ccs FROM held JOIN groups USING (hadm_id) GROUP BY ALL
"""
COUNTS = """
WITH written AS (
    SELECT *, coalesce(string_split(nullif(prior_phenotypes, ''), ' ')::BIGINT[], []) AS said,
        EXISTS (FROM patients p WHERE p.subject_id = i.subject_id AND p.anchor_age + p.anchor_year IS NOT NULL)
            AND taken_at IS NOT NULL AS known
    FROM images i)
SELECT count(*) FILTER (w.num_prior_admissions IS DISTINCT FROM CASE WHEN w.known THEN t.num END),
    count(*) FILTER (list_sort(w.said) != CASE WHEN w.known THEN list_sort(t.ccs) ELSE [] END),
    count(*) FILTER (len(list_intersect(o.ccs, w.said)) > len(list_intersect(list_intersect(o.ccs, w.said), t.ccs)))
FROM written w JOIN told t USING (dicom_id) LEFT JOIN own o USING (dicom_id)
"""


def check_people(source: Source, written: Written, preset: str) -> Verdict:
    """Recompute who died when, from dod, deathtime and hospital_expire_flag, and compare the written tables.

    Args:
        preset: `medfuse` keeps stays and samples after a death, as published: they are counted, not refuted.
    """
    _name_tables(source, written)
    written.con.execute(DEATHS)
    late, dying = written.numbers(LATE)
    bad = {"stays that begin after the subject's death": late}
    if "mortality" in written.tasks:
        names = ("mortality samples after death", "mortality labels that differ from the raw tables")
        bad |= dict(zip(names, written.numbers(SAMPLES), strict=True))
    proof = f"{written.rows('stays')} stays, {dying} of them with a death"
    kept = list(bad)[:2] if preset == "medfuse" else []
    if kept:
        proof += f"; kept as published: {', '.join(f'{bad.pop(what)} {what}' for what in kept)}"
    (bad["films whose died_in_hospital differs from the raw tables"],) = written.numbers(FILMS)
    (dead,) = written.numbers("SELECT count(death_at) FROM deaths")
    return decide(LABELLED if kept else PEOPLE, bad, f"{proof}; {dead} subjects with a death")


def check_prior(source: Source, written: Written) -> Verdict:
    """Recompute num_prior_admissions and prior_phenotypes; no code of the film's own admission may be among them."""
    _name_tables(source, written)
    for name in ("phenotypes", "icd10_branches"):
        path = resources("ehr_features") / f"{name}.csv"
        written.con.register(
            name.removeprefix("icd10_"), pd.read_csv(str(path), dtype={"icd_code": str, "prefix": str})
        )
    written.con.execute(HISTORY)
    names = (
        "films with another number of earlier admissions",
        "films with other diagnoses of earlier admissions",
        "films with codes of their own admission as history",
    )
    bad = dict(zip(names, written.numbers(COUNTS), strict=True))
    (earlier,) = written.numbers("SELECT count(*) FILTER (num > 0) FROM told")
    return decide(PRIOR, bad, f"{written.rows('images')} films, {earlier} with an earlier admission")


def _name_tables(source: Source, written: Written) -> None:
    for name, columns in TABLES.items():
        written.view(source, name, *columns)
