"""The films of the metadata table: path, time, view and position; impossible values are removed and counted.

Film times have a resolution of one second (the fraction of StudyTime is dropped). Excluded rows are listed by id: of a
film listed twice one row is kept, a study of two subjects is left out, and an impossible date becomes null.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import ibis
from ibis import _

from configs import UserError
from ehr_features.raw.engine import kept, release
from ehr_features.schema import VIEW_CODES

if TYPE_CHECKING:
    from ehr_features.cohort import Attrition
    from ehr_features.raw.source import Source

YEARS = (1950, 2300)  # shifted MIMIC dates are in 2100-2215, those of other data sets in real years
AGES = (0, 120)


def read_films(source: Source, attrition: Attrition, preset: str) -> ibis.Table:
    """One row per film: dicom_id, study_id, subject_id, path, taken_at, view, view_source, position.

    Args:
        preset: `medfuse` takes the view from ViewPosition alone; `default` fills an empty one from ViewCodeSequence.
    """
    return _possible(source, _films(source, preset), attrition)


def held(source: Source, table: ibis.Table, *, instead_of: ibis.Table | None = None) -> ibis.Table:
    """Compute a table of at most one row per film and keep it; `instead_of`, kept before, is released."""
    computed = kept(source.con, table)
    if instead_of is not None:
        release(source.con, instead_of)
    return computed


def first(table: ibis.Table, by: Sequence[str], order: Sequence) -> ibis.Table:
    """The first row of each group."""
    return table.mutate(_at=ibis.row_number().over(group_by=list(by), order_by=order)).filter(_._at == 0).drop("_at")


def hours(start: ibis.Value, end: ibis.Value) -> ibis.Value:
    """Hours from one timestamp to another (to the second)."""
    return (end.epoch_seconds() - start.epoch_seconds()) / 3600.0


def where(condition: ibis.Value, value: ibis.Value) -> ibis.Value:
    """The value where the condition holds, else null."""
    return ibis.cases((condition, value))


def timestamp(date: ibis.Value, time: ibis.Value) -> ibis.Value:
    """StudyDate YYYYMMDD (int64) and StudyTime HHMMSS.fff (500.0 is 00:05:00) -> timestamp; null if impossible."""
    day, clock = date, time.cast("string").re_extract(r"^\d+", 0).try_cast("int64")  # NaN becomes null too

    def two(value: ibis.Value) -> ibis.Value:
        return value.cast("string").lpad(2, "0")

    ymd = (day // 10000).cast("string") + "-" + two(day // 100 % 100) + "-" + two(day % 100)
    hms = two(clock // 10000) + ":" + two(clock // 100 % 100) + ":" + two(clock % 100)
    possible = (day // 10000).between(*YEARS) & (clock < 240000)
    return where(possible, (ymd + " " + hms).try_cast("timestamp"))


def _films(source: Source, preset: str) -> ibis.Table:
    """The metadata table with a path, a time, a view and a position for each film."""
    raw = source.table("cxr_metadata")
    named = raw.ViewPosition.strip().upper().nullif("")  # as schema.view_names, on the engine
    meaning = raw.ViewCodeSequence_CodeMeaning.strip().upper()
    code = ibis.cases(*((meaning == text, view) for text, view in VIEW_CODES.items()))
    if preset == "medfuse":
        code = ibis.null("string")
    lying = raw.PatientOrientationCodeSequence_CodeMeaning.strip()
    subject, study, film = raw.subject_id.cast("string"), raw.study_id.cast("string"), raw.dicom_id.strip()
    return raw.select(
        "study_id",
        "subject_id",
        dicom_id=film.nullif(""),
        path="files/p" + subject.substr(0, 2) + "/p" + subject + "/s" + study + "/" + film + ".jpg",
        taken_at=timestamp(raw.StudyDate, raw.StudyTime),
        view=named.coalesce(code),
        view_source=ibis.cases((named.notnull(), "ViewPosition"), (code.notnull(), "ViewCodeSequence")),
        position=(lying.substr(0, 1).upper() + lying.substr(1).lower()).nullif(""),
    )


def _possible(source: Source, films: ibis.Table, attrition: Attrition) -> ibis.Table:
    """Drop films without ids or listed twice and studies of two subjects; set impossible times to null."""
    patients = source.table("patients").group_by("subject_id").agg(born=(_.anchor_year - _.anchor_age).min())
    films = films.left_join(patients, "subject_id").drop("subject_id_right")
    age = films.taken_at.year() - films.born
    true = films.taken_at.notnull() & age.between(*AGES).fill_null(True)
    films = every = held(source, films.mutate(taken_at=where(true, films.taken_at)).drop("born"))
    rows = films.count().execute()
    named = films.dicom_id.notnull() & films.study_id.notnull() & films.subject_id.notnull()
    nameless = films.filter(~named)
    listed = rows - nameless.count().execute()
    why = "no dicom_id, study_id or subject_id (the ids are studies)"
    attrition.add("films", why, rows, listed, ids_of(nameless.study_id) if listed < rows else ())
    films = films.filter(named)
    twice = ids_of(films.group_by("dicom_id").agg(n=_.count()).filter(_.n > 1).dicom_id)
    once = listed
    if twice:
        films = first(films, ["dicom_id"], [_.subject_id, _.study_id, _.taken_at, _["view"], _.view_source, _.position])
        once = films.count().execute()
    attrition.add("films", "listed twice in the metadata; one row kept", listed, once, twice)
    torn = ids_of(
        films.group_by("study_id")
        .agg(one=_.subject_id.min(), other=_.subject_id.max())
        .filter(_.one != _.other)
        .study_id
    )
    whole = once
    if torn:
        films = films.filter(_.study_id.notin(torn))
        whole = films.count().execute()
    attrition.add("films", "study of two subjects (the ids are studies)", once, whole, torn)
    if not whole:
        path = source.files.get("cxr_metadata", "cxr_metadata")
        raise UserError(f"{path}: {rows} rows, none a film that can be used; mimic_cxr=null builds the record alone")
    films = held(source, films, instead_of=every) if whole < rows else every
    untimed = ids_of(films.filter(_.taken_at.isnull()).dicom_id)
    why = "impossible StudyDate or StudyTime; the film stays in images.parquet, without time or link"
    attrition.add("films with a time", why, whole, whole - len(untimed), untimed)
    return films


def ids_of(column: ibis.Value) -> list:
    """The distinct ids of a column, without nulls, in no order."""
    return column.to_pyarrow().drop_null().to_pylist()
