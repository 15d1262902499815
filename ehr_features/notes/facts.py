"""The fields of a note's template: facts of the record that were known when a film was taken, as text.

Input: films with their links, and the record's tables. Output: one row per film with a column `NAME` for each field
(text; null if missing), `at_NAME` (when it was known) and `from_NAME` (its table).
No fact is from after the film: vital signs, drugs and home medication count from their own charttime, diagnoses from
the end of the admission for which they were coded.

All joins are on named keys and run on both engines.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ibis
import ibis.expr.types as ir
import pandas as pd
import pyarrow as pa
from ibis import _
from ibis.util import gen_name

from configs import UserError, first_line
from ehr_features.films.metadata import first, held, hours, where
from ehr_features.films.record import TRIAGE, over
from ehr_features.raw.engine import hold
from ehr_features.raw.source import Source
from ehr_features.series.channels import celsius

SIGNS = {name.removeprefix("ed_"): rule for name, rule in TRIAGE.items() if name != "ed_acuity"}
SIGNS["temperature"] = SIGNS.pop("temperature_c")
ITEMS = "; "  # separates the items of a list
SEEN = ("temperature", "heart_rate", "resp_rate", "o2sat", "blood_pressure")
FIELDS = (
    *("age", "sex", "arrival_transport", "ed_hours_ago", "admission_hours_ago", "chief_complaint"),
    *("triage_acuity", *(f"triage_{name}" for name in SEEN), "triage_pain", "vitals_hours_ago", *SEEN),
    *("drugs_given", "home_medication", "num_prior_admissions", "prior_diagnoses"),
)


def complaints(source: Source, abbreviations: dict[str, str]) -> ir.Table | None:
    """Map each distinct chiefcomplaint to its text with abbreviations expanded, chief_complaint."""
    if not source.has("triage"):
        return None
    texts = source.table("triage").select("chiefcomplaint").distinct().to_pyarrow()["chiefcomplaint"].drop_null()
    pattern = expander(abbreviations)
    full = [complaint(text, abbreviations, pattern) for text in texts.to_pylist()]
    table = pa.table({"chiefcomplaint": texts.cast(pa.string()), "chief_complaint": pa.array(full, pa.string())})
    return hold(source.con, gen_name("complaints"), table)


def facts(source: Source, films: ir.Table, words: ir.Table | None) -> ir.Table:
    """Compute every field for every film.

    Args:
        films: dicom_id, subject_id, split, taken_at, hadm_id, ed_stay_id, age_years, age_capped, sex; with a time.
        words: the result of `complaints`.
    Returns: dicom_id, subject_id, split, taken_at, hadm_id, ed_stay_id (the visit described: the film's own, else the
        one that led to its admission), and NAME, at_NAME, from_NAME of each of FIELDS.
    """
    triage = functools.partial(_triage, words=words)
    table = held(source, _visit(source, films))
    given, home = (functools.partial(_drugs, *of) for of in (("pyxis", "drugs_given"), ("medrecon", "home_medication")))
    for step in (_admission, triage, _vitals, given, home, _history):
        table = held(source, step(source, table), instead_of=table)
    return held(source, _person(table), instead_of=table)


def _known(**fields: tuple[Any, Any, Any]) -> dict[str, Any]:
    """The columns NAME, at_NAME, from_NAME for fields given as (value, time, table)."""
    columns: dict[str, Any] = {}
    for name, (value, at, table) in fields.items():
        columns |= {name: value, f"at_{name}": where(value.notnull(), at)}
        columns[f"from_{name}"] = where(value.notnull(), ibis.literal(table) if isinstance(table, str) else table)
    return columns


def _nothing(films: ir.Table, *names: str) -> ir.Table:
    """Null columns for the fields of a missing table."""
    text, time = ibis.null("string"), ibis.null("timestamp")
    return films.mutate(**{c: v for n in names for c, v in {n: text, f"at_{n}": time, f"from_{n}": text}.items()})


def _with(films: ir.Table, found: ir.Table, key: str = "dicom_id") -> ir.Table:
    return films.left_join(found, key).drop(f"{key}_right")


def whole(number: Any) -> Any:
    """A number as text without decimals."""
    return number.round().cast("int64").cast("string")


def tenths(number: Any) -> Any:
    """A number of 0 or more as text with one decimal, equal on both engines."""
    scaled = (number * 10).round().cast("int64")
    return (scaled // 10).cast("string") + "." + (scaled % 10).cast("string")


def _visit(source: Source, films: ir.Table) -> ir.Table:
    """The emergency visit that began before the film: the film's own, else that of its admission."""
    if not source.has("edstays"):
        empty = {"ed_stay_id": ibis.null("int64"), "ed_at": ibis.null("timestamp"), "gender": ibis.null("string")}
        return _nothing(films.mutate(**empty), "arrival_transport")
    visits = source.table("edstays").select(
        "gender", visit=_.stay_id, ed_at=_.intime, transport=plain(_.arrival_transport).lower(), of_hadm=_.hadm_id
    )
    visits = first(visits.filter(_.visit.notnull()), ["visit"], [_.ed_at, _.of_hadm])
    own = films.join(visits, [films.ed_stay_id == visits.visit, films.taken_at >= visits.ed_at])
    of_admission = films.join(visits, [films.hadm_id == visits.of_hadm, films.taken_at >= visits.ed_at])
    columns = ["dicom_id", "gender", "visit", "ed_at", "transport"]
    both = own.select(*columns, rank=0).union(of_admission.select(*columns, rank=1))
    best = first(both, ["dicom_id"], [_["rank"], _.ed_at.desc(), _.visit.desc()]).drop("rank")
    films = _with(films, best).drop("ed_stay_id").rename(ed_stay_id="visit")
    return films.mutate(**_known(arrival_transport=(films.transport, films.ed_at, "edstays"))).drop("transport")


def _admission(source: Source, films: ir.Table) -> ir.Table:
    """The times of arrival in the emergency department and of hospital admission."""
    came = source.table("admissions").select("hadm_id", "admittime", "edregtime")
    came = first(came.filter(_.hadm_id.notnull()), ["hadm_id"], [_.admittime, _.edregtime])
    films = _with(films, came, "hadm_id")
    admitted = where(films.admittime <= films.taken_at, films.admittime)
    registered = where(films.edregtime <= films.taken_at, films.edregtime)
    arrived = films.ed_at.coalesce(registered)
    films = films.mutate(
        **_known(
            ed_hours_ago=(
                tenths(hours(arrived, films.taken_at)),
                arrived,
                ibis.cases((films.ed_at.notnull(), "edstays"), else_="admissions"),
            ),
            admission_hours_ago=(tenths(hours(admitted, films.taken_at)), admitted, "admissions"),
        )
    )
    return films.drop("admittime", "edregtime")


def _pressure(systolic: Any, diastolic: Any) -> Any:
    both = whole(systolic) + "/" + whole(diastolic)
    return both.coalesce("systolic " + whole(systolic), "diastolic " + whole(diastolic))


def _plausible(table: ir.Table) -> dict[str, Any]:
    """The vital signs of a row in this project's units; implausible values become null."""
    values = {name: table[column] for name, (column, *_limits) in SIGNS.items()}
    values["temperature"] = celsius(values["temperature"])
    return {name: where(value.between(*SIGNS[name][1:]), value) for name, value in values.items()}


def _texts(values: ir.Table) -> dict[str, Any]:
    """Vital signs as text."""
    return {
        "temperature": tenths(values.temperature),
        **{name: whole(values[name]) for name in ("heart_rate", "resp_rate", "o2sat")},
        "blood_pressure": _pressure(values.sbp, values.dbp),
    }


def _triage(source: Source, films: ir.Table, words: ir.Table | None) -> ir.Table:
    """Triage and chief complaint of the visit. Triage has no time of its own; the time of arrival is used."""
    signs = ("acuity", *SEEN, "pain")
    if words is None:
        return _nothing(films, "chief_complaint", *(f"triage_{name}" for name in signs))
    triage = source.table("triage")
    pain = triage.pain.try_cast("float64")
    rows = triage.select(
        "chiefcomplaint",
        **_plausible(triage),
        visit=_.stay_id,
        acuity=where(_.acuity.between(*TRIAGE["ed_acuity"][1:]), _.acuity),
        pain=where(pain.between(0, 10), pain),
    )
    order = [column for column in rows.columns if column != "visit"]
    rows = first(rows.filter(_.visit.notnull()), ["visit"], order).left_join(words, "chiefcomplaint")
    texts = {**_texts(rows), "acuity": whole(rows.acuity), "pain": whole(rows.pain)}
    rows = rows.select("visit", "chief_complaint", **{f"triage_{name}": texts[name] for name in signs})
    films = films.left_join(rows, films.ed_stay_id == rows.visit).drop("visit")
    names = ("chief_complaint", *(f"triage_{name}" for name in signs))
    return films.mutate(**_known(**{name: (films[name], films.ed_at, "triage") for name in names}))


def _during(source: Source, films: ir.Table, name: str) -> ir.Table:
    """Rows of an emergency table charted up to the film, with its dicom_id."""
    rows, moments = source.table(name).drop("subject_id"), films.select("dicom_id", "ed_stay_id", "taken_at")
    return moments.join(rows, [moments.ed_stay_id == rows.stay_id, rows.charttime <= moments.taken_at])


def _vitals(source: Source, films: ir.Table) -> ir.Table:
    """The last plausible value of each vital sign up to the film; of values at the same time, the larger."""
    names = ("vitals_hours_ago", *SEEN)
    if not source.has("vitalsign"):
        return _nothing(films, *names)
    rows = _during(source, films, "vitalsign")
    rows = rows.select("dicom_id", "charttime", **_plausible(rows))
    last = {n: ibis.struct({"at": rows.charttime, "value": rows[n]}).max(where=rows[n].notnull()) for n in SIGNS}
    best = rows.group_by("dicom_id").agg(**last)
    times = [best[name]["at"] for name in SIGNS]
    best = best.select("dicom_id", vitals_at=latest(times), **{name: best[name]["value"] for name in SIGNS})
    films = _with(films, best.select("dicom_id", "vitals_at", **_texts(best)))
    films = films.mutate(vitals_hours_ago=tenths(hours(films.vitals_at, films.taken_at)))
    return films.mutate(**_known(**{n: (films[n], films.vitals_at, "vitalsign") for n in names})).drop("vitals_at")


def latest(times: list[Any]) -> Any:
    """The latest of several times; null if all are null."""
    early = ibis.literal("1000-01-01 00:00:00").cast("timestamp")
    return ibis.greatest(*(time.coalesce(early) for time in times)).nullif(early)


def _drugs(table: str, field: str, source: Source, films: ir.Table) -> ir.Table:
    """The drugs in an emergency table up to the film; each name once, even with several rows and classes."""
    if not source.has(table):
        return _nothing(films, field)
    rows = _during(source, films, table)
    rows = rows.select("dicom_id", "charttime", item=plain(rows["name"])).filter(_["item"].notnull())
    each = rows.group_by("dicom_id", key=_["item"].lower()).agg(item=_["item"].min(), since=_.charttime.min())
    return _listed(films, each.mutate(order=_.key), field, table)


def _listed(films: ir.Table, each: ir.Table, field: str, table: str, key: str = "dicom_id") -> ir.Table:
    """Join a list into one text, sorted by `order`. each: `key`, item, order (text without tabs), since."""
    lists = each.group_by(key).agg(items=(_.order + "\t" + _["item"]).collect(), since=_.since.max())
    text = lists["items"].sort().map(lambda pair: pair.split("\t")[1]).join(ITEMS)
    films = _with(films, lists.select(key, "since", listed=text), key)
    return films.mutate(**_known(**{field: (films.listed, films.since, table)})).drop("listed", "since")


def _history(source: Source, films: ir.Table) -> ir.Table:
    """The number of earlier admissions and their diagnoses: the latest admission first, diagnoses in coded order."""
    ended = held(source, over(source))
    timed = films.select("dicom_id", "subject_id", "taken_at")
    pairs = timed.join(ended, [timed.subject_id == ended.subject_id, ended.over_at < timed.taken_at])
    films = _with(films, pairs.group_by("dicom_id").agg(n=_.count(), last_end=_.over_at.max()))
    number = (films["n"].cast("string"), films.last_end, "admissions")
    films = films.mutate(**_known(num_prior_admissions=number)).drop("n")
    if not (source.has("diagnoses_icd") and source.has("d_icd_diagnoses")):
        return _nothing(films.drop("last_end"), "prior_diagnoses")
    # films with the same last end of an admission have the same history
    films = films.mutate(past=films.subject_id.cast("string") + " " + films.last_end.epoch_seconds().cast("string"))
    pasts = films.filter(_.past.notnull()).select("past", "subject_id", "last_end").distinct()
    earlier = pasts.join(ended, [pasts.subject_id == ended.subject_id, ended.over_at <= pasts.last_end])
    coded = source.table("diagnoses_icd").select(
        "seq_num", "icd_version", of_hadm=_.hadm_id, icd_code=_.icd_code.strip().upper()
    )
    earlier = earlier.select("past", "over_at", of_hadm="hadm_id")
    rows = earlier.join(coded, "of_hadm")
    titles = source.table("d_icd_diagnoses")
    titles = titles.select("icd_version", icd_code=titles.icd_code.strip().upper(), title=plain(titles.long_title))
    titles = first(titles.filter(_.title.notnull()), ["icd_code", "icd_version"], [_.title])
    rows = rows.join(titles, ["icd_code", "icd_version"])
    last = ibis.struct({"at": rows.over_at.epoch_seconds(), "seq": -rows.seq_num.coalesce(9999)}).max()
    each = rows.group_by("past", "title").agg(last=last, since=rows.over_at.min())
    order = (9_999_999_999 - each["last"]["at"]).cast("string").lpad(12, "0") + (
        (-each["last"]["seq"]).cast("string").lpad(4, "0") + each.title.lower()
    )
    each = each.select("past", "since", item=_.title, order=order)
    return _listed(films, each, "prior_diagnoses", "diagnoses_icd", key="past").drop("past", "last_end")


def _person(films: ir.Table) -> ir.Table:
    """Age and sex, known from arrival on. Ages above 89 are stored as 91, so only a lower bound is known."""
    sex = films.sex.upper().coalesce(films.gender.upper())
    age = films.age_years.round().cast("int64")
    capped = films.age_capped.fill_null(False)
    years = ibis.cases((capped, "over " + ibis.least(age - 2, 89).cast("string")), else_=age.cast("string"))
    at = films.at_ed_hours_ago.coalesce(films.at_admission_hours_ago, films.taken_at)
    source = ibis.cases((films.sex.notnull(), "patients"), else_="edstays")
    films = films.mutate(
        **_known(
            age=(where(films.age_years.notnull(), years), at, "patients"),
            sex=(ibis.cases((sex == "M", "male"), (sex == "F", "female")), at, source),
        )
    )
    return films.drop("gender", "age_years", "age_capped", "ed_at")


# ---- Cleaning of free text: chief complaints with their abbreviations expanded, names, titles.

SHIPPED = Path(__file__).with_name("abbreviations.csv")
NOTHING = (
    "",
    "nan",
    "nat",
    "none",
    "null",
    "n/a",
    "na",
    "unknown",
    "unknown-cc",
    "unknown/na",
    "unk",
    "other",
    "___",
    "?",
    "-",
    ".",
)  # words without information


def read_abbreviations(path: Path | None) -> dict[str, str]:
    """abbreviation (lower case) -> expansion.

    Raises: UserError: no such table, a column or a value missing, one abbreviation with two expansions.
    """
    path = path or SHIPPED
    try:
        table = pd.read_csv(path, dtype=str, keep_default_na=False, comment="#")
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as a table of abbreviations ({first_line(error)})") from None
    if missing := {"abbreviation", "expansion"} - set(table):
        raise UserError(f"{path}: column {sorted(missing)} missing; found {list(table)}")
    table = table.assign(abbreviation=table["abbreviation"].str.strip().str.lower())
    empty = table.index[(table["abbreviation"] == "") | (table["expansion"].str.strip() == "")]
    if len(empty):
        raise UserError(f"{path}, line {empty[0] + 2}: the abbreviation or its expansion is empty; both are needed")
    if len(twice := table.loc[table["abbreviation"].duplicated(), "abbreviation"]):
        raise UserError(f"{path}: `{twice.iloc[0]}` has two rows; keep one")
    return dict(zip(table["abbreviation"], table["expansion"].str.strip(), strict=True))


def expander(abbreviations: Mapping[str, str]) -> re.Pattern[str]:
    """One pattern for all abbreviations, longer ones first. A single letter must stand alone, also without - / & '."""
    names = sorted(abbreviations, key=lambda name: (-len(name), name))
    ways = []
    for name in names:
        text = r"\s+".join(map(re.escape, name.split()))
        edge = r"[\w\-/&'.]" if len(name) == 1 else r"\w"
        ways.append(f"(?<!{edge}){text}" + ("" if name.endswith("/") else f"(?!{edge})"))
    return re.compile("|".join(ways) or r"(?!)", re.IGNORECASE)


def complaint(text: str, abbreviations: Mapping[str, str], pattern: re.Pattern[str]) -> str | None:
    """A chief complaint in lower case with its abbreviations expanded; None if it has no content.

    Parts without content (`unknown`, de-identified `___`) and repeated parts are removed.
    """

    def full(found: re.Match[str]) -> str:
        name = re.sub(r"\s+", " ", found[0].lower())
        return abbreviations[name] + (" " if name.endswith("/") else "")

    parts = []
    for part in re.split(r"\s*[,;\n]\s*", text.replace("___", " ").lower()):
        part = re.sub(r"\s+", " ", pattern.sub(full, part)).strip(" .:")
        part = re.sub(r"^-+\s+|[\s\-]+$", "", part)  # keep the minus of `-LOC`
        if part not in NOTHING:
            parts.append(part)
    return ", ".join(dict.fromkeys(parts)) or None


def plain(text: Any) -> ir.StringValue:
    """A name or title (an expression) on one line, without the semicolons that separate items; null if it has no
    content."""
    text = text.re_replace(r"\s+", " ").replace(";", ",").strip()
    return where(~text.lower().isin(NOTHING), text)
