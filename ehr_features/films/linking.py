"""Link films to their study, hospital admission, ICU stay and emergency stay.

Input: the film tables and the record's tables. Output: one row per film of the metadata table, with the linked ids, the
kind of each link and its gap; and the films of each ICU stay.

All joins are range joins on named keys and run on both engines.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import ibis
import pyarrow as pa
from ibis import _

from ehr_features.cohort import deaths, smallest
from ehr_features.films.metadata import first, held, hours, ids_of, read_films
from ehr_features.raw.engine import gathered, release

if TYPE_CHECKING:
    from ehr_features.cohort import Attrition
    from ehr_features.raw.source import Source

KEYS = {"hadm_id": "admissions", "stay_id": "icustays", "ed_stay_id": "edstays"}
KEYED = {"patients": "subject_id", "admissions": "hadm_id", "icustays": "stay_id", "edstays": "stay_id"}
KEYED |= {"triage": "stay_id", "cxr_chexpert": "study_id"}


def link_films(
    source: Source, attrition: Attrition, *, preset: str = "default", ed_tolerance_hours: float = 6.0
) -> ibis.Table:
    """Link every film of the metadata table to the record.

    Args:
        source: the raw tables.
        attrition: receives the counts.
        preset: `medfuse` takes the view from ViewPosition alone; `default` fills an empty one from ViewCodeSequence.
        ed_tolerance_hours: largest gap between a film and an emergency visit.
    Returns: dicom_id, study_id, subject_id, path, taken_at, view, view_source, position; hadm_id, stay_id, ed_stay_id,
        each with *_link (inside | before | after | null) and *_gap_hours (0 inside). stay_id may be a stay outside the
        cohort. hadm_id_link `icustays` or `edstays`: the film is in no admission's times, and hadm_id is that of the
        ICU stay that contains it, or of the emergency visit that contains it or ended just before.
    """
    films = read_films(source, attrition, preset)
    spans = intervals(source)
    for key, rows in spans.items():
        _note_impossible(key, rows, attrition)
    found = find_intervals(source, films, spans, ed_tolerance_hours)
    linked = films
    for table in found.values():
        linked = linked.left_join(table, "dicom_id").drop("dicom_id_right")
    linked = held(source, _named(source, linked, found), instead_of=films)
    for table in found.values():
        release(source.con, table)
    _count(source, linked, attrition)
    note_links(linked, {k: s for k, s in spans.items() if k != "ed_stay_id" or source.has("edstays")}, attrition)
    _repeated_keys(source, attrition)
    return linked.drop(*(f"{key}_candidates" for key in KEYS))


def find_intervals(
    source: Source, films: ibis.Table, spans: Mapping[str, ibis.Table], ed_tolerance_hours: float
) -> dict[str, ibis.Table]:
    """The interval of each film, of each kind: KEY -> the rows of `nearest`, kept."""
    tolerance = {"ed_stay_id": ed_tolerance_hours}
    return {
        key: held(source, nearest(films, rows, key, tolerance_hours=tolerance.get(key, 0.0)))
        for key, rows in spans.items()
    }


def stay_films(films: ibis.Table, stays: ibis.Table) -> ibis.Table:
    """Every film taken in [intime, outtime] of a stay.

    Args:
        films: dicom_id, subject_id, taken_at, view, ...
        stays: the cohort: stay_id, subject_id, intime, outtime, ...
    Returns: stay_id, dicom_id, hours_from_intime, view. A film of two overlapping stays is listed with both.
    """
    films = films.select("dicom_id", "subject_id", "taken_at", "view")
    stays = stays.select("stay_id", "subject_id", "intime", "outtime")
    pairs = films.join(
        stays,
        [films.subject_id == stays.subject_id, films.taken_at >= stays.intime, films.taken_at <= stays.outtime],
    )
    return pairs.select("stay_id", "dicom_id", hours_from_intime=hours(_.intime, _.taken_at), view=_["view"])


def last_film(samples: ibis.Table, stay_films: ibis.Table, *, views: Sequence[str] = ("AP",)) -> ibis.Table:
    """The last film of an eligible view at or before each prediction.

    Args:
        samples: sample_id, stay_id, predict_at_hours, ...
        stay_films: the result of `stay_films`.
    Returns: sample_id, dicom_id; samples without such a film have no row. Of films at the same time, the largest
        dicom_id.
    """
    films = stay_films.filter(stay_films["view"].isin(views)).select("stay_id", "dicom_id", "hours_from_intime")
    samples = samples.select("sample_id", "stay_id", "predict_at_hours")
    pairs = samples.join(films, [samples.stay_id == films.stay_id, films.hours_from_intime <= samples.predict_at_hours])
    order = [_.hours_from_intime.desc(), _.dicom_id.desc()]
    return first(pairs, ["sample_id"], order).select("sample_id", "dicom_id")


def nearest(films: ibis.Table, spans: ibis.Table, key: str, *, tolerance_hours: float = 0.0) -> ibis.Table:
    """The interval that contains each film, else the nearest within a tolerance.

    Of several: the smallest gap, then one that began before the film, then the latest start, then the largest id.

    Args:
        films: dicom_id, subject_id, taken_at, ...
        spans: `key`, subject_id, start, end (timestamps; rows that end before they start contain no film).
    Returns: dicom_id, KEY, KEY_link (inside | before | after), KEY_gap_hours, KEY_candidates (how many have that gap);
        linked films only.
    """
    films = films.select("dicom_id", "subject_id", at=_.taken_at.epoch_seconds())
    spans = spans.select("subject_id", key, start=_.start.epoch_seconds(), end=_.end.epoch_seconds())
    spans = spans.filter(_.end >= _.start).distinct()  # repeated rows are not several candidates
    margin = round(tolerance_hours * 3600)
    pairs = films.join(
        spans,
        [films.subject_id == spans.subject_id, films.at >= spans.start - margin, films.at <= spans.end + margin],
    ).mutate(gap=ibis.greatest(_.start - _.at, _.at - _.end, 0), begun=(_.start <= _.at).cast("int64"))
    order = ibis.struct({"begun": _.begun, "start": _.start, "id": _[key]})  # the largest is the best: no sorting
    near = pairs.group_by("dicom_id", "gap").agg(candidates=_.count(), best=order.max())
    order = ibis.struct({"near": -_.gap, "candidates": _.candidates, "best": _.best})
    best = near.group_by("dicom_id").agg(best=order.max()).mutate(gap=-_.best["near"])
    link = ibis.cases((_.gap == 0, "inside"), (_.best["best"]["begun"] == 1, "after"), else_="before")
    columns = {f"{key}_link": link, f"{key}_gap_hours": _.gap / 3600.0, f"{key}_candidates": _.best["candidates"]}
    return best.select("dicom_id", **{key: _.best["best"]["id"]}, **columns)


def intervals(source: Source) -> dict[str, ibis.Table]:
    """subject_id, id, start, end of admissions, ICU stays and emergency stays."""
    admissions = source.table("admissions").select(
        "subject_id",
        "hadm_id",
        start=ibis.least(_.admittime, _.edregtime.coalesce(_.admittime)),
        end=_.dischtime,
    )
    stays = source.table("icustays").select("subject_id", "stay_id", start=_.intime, end=_.outtime)
    if source.has("edstays"):
        visits = source.table("edstays").select("subject_id", ed_stay_id=_.stay_id, start=_.intime, end=_.outtime)
    else:
        visits = stays.filter(ibis.literal(False)).rename(ed_stay_id="stay_id")
    return {"hadm_id": admissions, "stay_id": stays, "ed_stay_id": visits}


def _named(source: Source, films: ibis.Table, found: Mapping[str, ibis.Table]) -> ibis.Table:
    """Link films outside all admissions to the admission of their ICU stay or emergency visit."""
    admissions = source.table("admissions").filter(_.hadm_id.notnull())
    start, end = ibis.least(_.admittime, _.edregtime.coalesce(_.admittime)), _.dischtime
    admissions = admissions.select("subject_id", "hadm_id", start=start.epoch_seconds(), end=end.epoch_seconds())
    at = films.taken_at.epoch_seconds()
    for key, table in (("stay_id", "icustays"), ("ed_stay_id", "edstays")):
        if not source.has(table):
            continue
        alone = (
            found[key].anti_join(found["hadm_id"].filter(_.hadm_id.notnull()), "dicom_id").select(of=_[key]).distinct()
        )
        named = source.table(table).select("subject_id", "hadm_id", of="stay_id").semi_join(alone, "of")
        named = named.join(admissions, ["subject_id", "hadm_id"])
        named = first(named, ["of"], [_.hadm_id, _.start, _.end]).select("of", "start", "end", by="hadm_id")
        films = films.left_join(named, films[key] == named.of)
        fits = films.hadm_id.isnull() & films.by.notnull() & (films[f"{key}_link"] != "before")
        outside = ibis.greatest(films.start - at, at - films.end, 0) / 3600.0
        gap = ibis.cases((films.end >= films.start, outside))
        films = films.mutate(
            hadm_id=ibis.ifelse(fits, films.by, films.hadm_id),
            hadm_id_link=ibis.ifelse(fits, table, films.hadm_id_link),
            hadm_id_gap_hours=ibis.ifelse(fits, gap, films.hadm_id_gap_hours),
        ).drop("of", "by", "start", "end")
    return films


def _note_impossible(key: str, spans: ibis.Table, attrition: Attrition) -> None:
    """Record the rows to which no film is linked, because they lack an end or end before they begin."""
    n = spans.count().execute()
    bad = ids_of(spans.filter((_.end >= _.start).fill_null(False) == ibis.literal(False))[key])
    why = "no begin or no end, or ends before it begins; it holds no film"
    why += " and is no history" if key == "hadm_id" else ""
    attrition.add(KEYS[key], why, n, n - len(bad), bad)


def _count(source: Source, linked: ibis.Table, attrition: Attrition) -> None:
    """Count the linked films, and those with several candidates."""
    sums = {f"{key}_linked": _[key].notnull().sum() for key in KEYS}
    sums |= {f"{key}_ambiguous": (_[f"{key}_candidates"] > 1).sum() for key in KEYS}
    sums |= {f"hadm_id_by_{name}": (_.hadm_id_link == name).sum() for name in ("icustays", "edstays")}
    sums["view_from_ViewCodeSequence"] = (_.view_source == "ViewCodeSequence").sum()
    sums["without_view"] = _["view"].isnull().sum()
    sums["taken_after_death"] = (_.taken_at >= _.death_at).sum()
    linked = linked.left_join(deaths(source), "subject_id")
    counts = linked.agg(films=_.count(), **sums).to_pyarrow().to_pylist()[0]
    attrition.note("linking", {name: int(n or 0) for name, n in counts.items()})


def _repeated_keys(source: Source, attrition: Attrition) -> None:
    """Record keys with several rows in tables of one row per key; a film takes the first row (films/record.py)."""
    for name, key in KEYED.items():
        if not source.has(name):
            continue
        several = source.table(name).group_by(key).agg(n=_.count()).filter(_.n > 1)
        rows = several.agg(n=_.n.sum(), ids=_.count()).to_pyarrow().to_pylist()[0]
        if rows["ids"]:
            why = f"{key} in several rows; one kept for films"
            attrition.add(name, why, rows["n"], rows["ids"], ids_of(several[key]))


# ---- Films without an admission, ICU stay, emergency visit or image file, with the reason.

NAMES = {"hadm_id": "hospital admission", "stay_id": "ICU stay", "ed_stay_id": "emergency visit"}
READERS, SIZE = 16, 1000  # threads that look for files, and files per batch


def note_links(linked: ibis.Table, spans: Mapping[str, ibis.Table], attrition: Attrition) -> None:
    """Record for each kind of link which films have none, and which had several candidates.

    Args:
        linked: dicom_id, subject_id, taken_at, and KEY, KEY_candidates of each kind.
        spans: KEY -> subject_id, KEY, start, end: the candidates.
    """
    for key, candidates in spans.items():
        name, article = NAMES[key], "a" if key == "hadm_id" else "an"
        table = f"films with a link to {article} {name}"
        known = candidates.filter(_.end >= _.start).select("subject_id").distinct()
        known = known.mutate(known=ibis.literal(True))
        rows = linked.left_join(known, "subject_id").select(
            "dicom_id",
            timed=_.taken_at.notnull(),
            known=_.known.fill_null(False),
            linked=_[key].notnull(),
            several=(_[f"{key}_candidates"] > 1).fill_null(False),
        )
        films = gathered(rows)
        ids = films["dicom_id"]
        timed, known_, linked_, several = (films[c].to_numpy() for c in ("timed", "known", "linked", "several"))
        left = len(films)
        for why, gone in (
            ("no time of its own", ~timed),
            (f"the subject has no {name}", timed & ~known_ & ~linked_),
            (f"taken outside of every {name} of the subject", timed & known_ & ~linked_),
        ):
            num = int(gone.sum())
            attrition.add(table, why, left, left - num, smallest(ids.filter(pa.array(gone))), num)
            left -= num
        why = f"ambiguous: several {name}s fit equally; one that had begun, the last of them, is taken"
        attrition.add(table, why, left, left, smallest(ids.filter(pa.array(several))), int(several.sum()))


def note_files(films: ibis.Table, root: str, attrition: Attrition) -> None:
    """Record which films have no image file below `root`; skipped if `root` is a URL or has no files/ folder."""
    folder = Path(root.removeprefix("file://"))
    if "://" in str(folder) or not (folder / "files").is_dir():
        attrition.note("image files", f"not looked for: no folder files/ in {root}")
        return
    rows = gathered(films.select("dicom_id", "path"))
    paths = rows["path"].to_pylist()

    def absent(start: int) -> list[int]:
        return [k for k in range(start, min(start + SIZE, len(paths))) if not os.path.exists(folder / paths[k])]

    with ThreadPoolExecutor(READERS) as pool:
        gone = [rows["dicom_id"][k].as_py() for part in pool.map(absent, range(0, len(paths), SIZE)) for k in part]
    why = "missing file: there is no such image file below mimic_cxr"
    attrition.add("films with an image file", why, len(paths), len(paths) - len(gone), gone)
