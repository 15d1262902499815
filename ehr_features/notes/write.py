"""Write a folder with a note for each film that has an emergency visit or an admission.

Input: a NotesConfig with features/ and the raw tables. Output, written atomically: notes.parquet (schema.NOTES);
unfiltered.parquet (dicom_id, and the note before the leak filter: for the audit alone, absent with `filter: none`);
schema.json, attrition.json, provenance.json. Films are processed in chunks, so that memory does not grow with them.
"""

from __future__ import annotations

import contextlib
import functools
import operator
import sys
import time
from pathlib import Path
from typing import Any

import ibis
import ibis.expr.types as ir
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from ibis.util import gen_name

from configs import UserError
from configs.commands import command_line
from ehr_features import schema
from ehr_features.build import NO_EFFECT, Steps, is_current, note_dropped
from ehr_features.cohort import Attrition
from ehr_features.config import FeaturesConfig, NotesConfig
from ehr_features.files import (
    alone,
    check_ours,
    code_digest,
    digest,
    file_digest,
    new_folder,
    provenance,
    write_json,
    write_seal,
)
from ehr_features.films.metadata import where
from ehr_features.notes import leak_filter
from ehr_features.notes.facts import FIELDS, complaints, facts, latest, read_abbreviations
from ehr_features.notes.template import Template, fields_of, read_template, render
from ehr_features.raw.engine import gathered, hold, named_by_the_engine, release
from ehr_features.raw.remote import fingerprint
from ehr_features.raw.source import EVENTS, Source, open_source
from ehr_features.typed import read_arrow, read_json, shapes

CHUNK = 100_000  # films in a chunk
READ = ("admissions", "diagnoses_icd", "d_icd_diagnoses", "edstays", "triage", "vitalsign", "medrecon", "pyxis")
SOURCES = ("patients", *READ)  # tables that a note may use
UNFILTERED = pa.schema([("dicom_id", pa.string()), ("note", pa.string())])
FILMS = ["dicom_id", "subject_id", "split", "taken_at", "hadm_id", "ed_stay_id", "age_years", "age_capped", "sex"]
SECTIONS = pa.list_(pa.struct([("name", pa.string()), ("text", pa.string())]))
WRITTEN = pa.schema(
    [
        ("dicom_id", pa.string()),
        ("subject_id", pa.int64()),
        ("split", pa.string()),
        ("hadm_id", pa.int64()),
        ("ed_stay_id", pa.int64()),
        ("taken_at", pa.timestamp("us")),
        ("note", pa.string()),
        ("sections", SECTIONS),
        ("sources", pa.list_(pa.string())),
        ("available_at", pa.timestamp("us")),
        ("num_removed", pa.int64()),
    ]
)


@named_by_the_engine()
def write_notes(config: NotesConfig) -> Path:
    """Write the folder of notes.

    Returns: the folder. Raises: UserError: faults in the features, the tables, the template or the table of
        abbreviations.
    """
    out, steps = config.out, Steps()
    check_ours(out, "a folder of notes", ["notes.parquet"])
    template = read_template(config.template, FIELDS)
    abbreviations = read_abbreviations(config.abbreviations)
    with steps("opening the tables"):
        films, attrition = linked_films(config)
        source = open_source(_raw(config))
        given = [name for name in READ if config.mimic_ed or schema.READ[name].root != "mimic_ed"]
        if absent := [name for name in given if not source.has(name)]:
            print(f"  tables not found; notes leave out their facts: {', '.join(absent)}", file=sys.stderr)
        used = {name: path for name, path in source.files.items() if name in READ}
        prints = {path: fingerprint(path) for path in used.values()}
        prints |= {str(path): fingerprint(str(path)) for path in [config.features / "images.parquet"]}
        key = _key(config, prints)
    if is_current(out, key):
        print(f"{out} is up to date with its tables and config", file=sys.stderr)
        return out
    _same_tables(source, films, config)
    with alone(out), new_folder(out) as part:
        with steps("writing the notes"):
            written = _write(source, films, template, abbreviations, config, part, attrition)
        note_dropped(source, {name: source.rows(name) for name in used if name not in EVENTS}, attrition)
        write_json(part / "schema.json", {"notes": schema.described(schema.NOTES)})
        write_json(part / "attrition.json", attrition.as_json())
        rows = {"notes": written}
        about = provenance(config.model_dump(mode="json"), key=key, rows_written=rows, seconds=steps.seconds)
        about["sources"] = prints
        write_json(part / "provenance.json", about)
        write_seal(part, "*.json", "*.parquet")
    return out


def _raw(config: NotesConfig) -> FeaturesConfig:
    """The config of the extraction that opens the same raw tables."""
    return FeaturesConfig(
        mimic_iv=config.mimic_iv,
        mimic_ed=config.mimic_ed,
        out=config.out,
        engine=config.engine,
        memory=config.memory,
        threads=config.threads,
        spark=config.spark,
        storage=config.storage,
    )


def _key(config: NotesConfig, prints: dict[str, Any]) -> str:
    """A digest of everything that a note depends on."""
    used = {k: v for k, v in config.model_dump(mode="json").items() if k not in NO_EFFECT}
    own = [file_digest(path) for path in (config.template, config.abbreviations) if path is not None]
    return digest([used, prints, own, code_digest(sys.modules[__name__])])


def linked_films(config: NotesConfig) -> tuple[pa.Table, Attrition]:
    """The films of features/ that have a visit or an admission, by dicom_id, and the excluded ones.

    Raises: UserError: no features folder, no films in it, or features without visits for notes of visits.
    """
    path = config.features / "images.parquet"
    about = read_json(config.features / "provenance.json", shapes.Provenance) if config.features.is_dir() else None
    if about is None:
        raise UserError(f"{config.features}: no such folder; write it with {command_line('features', 'features')}")
    if not path.is_file():
        raise UserError(f"{path}: no such table: the features have no films; build them with mimic_cxr=...")
    films = read_arrow(path, schema.IMAGES, "build the features again", FILMS).sort_by("dicom_id")
    visits = config.mimic_ed and not (about.get("config") or {}).get("mimic_ed")
    if visits and len(films) and films["ed_stay_id"].null_count == len(films):
        raise UserError(
            f"{config.features}: built without mimic_ed, so no film has a visit; build the features again with "
            f"mimic_ed={config.mimic_ed}, or set mimic_ed=null here"
        )
    attrition = Attrition()
    timed = films.filter(pc.is_valid(films["taken_at"]))
    _gone(attrition, "impossible StudyDate or StudyTime", films, timed)
    linked = timed.filter(pc.or_(pc.is_valid(timed["hadm_id"]), pc.is_valid(timed["ed_stay_id"])))
    _gone(attrition, "no emergency visit and no admission at that time", timed, linked)
    return linked, attrition


def _gone(attrition: Attrition, why: str, before: pa.Table, after: pa.Table) -> None:
    lost = before.filter(pc.invert(pc.is_in(before["dicom_id"], after["dicom_id"].combine_chunks())))
    attrition.add("notes", why, len(before), len(after), lost["dicom_id"].to_pylist())


def _same_tables(source: Source, films: pa.Table, config: NotesConfig) -> None:
    """Refuse tables of another release than that of the features: their ids would belong to other patients."""
    for name, column, key in (("admissions", "hadm_id", "hadm_id"), ("edstays", "ed_stay_id", "stay_id")):
        ids = pc.unique(films[column].drop_null())
        if not len(ids) or not source.has(name):
            continue
        held_ids = hold(source.con, f"notes_{name}", pa.table({key: ids}))
        found = int(held_ids.semi_join(source.table(name), key).count().execute())
        if not found:
            raise UserError(
                f"{source.files[name]}: has none of the {len(ids)} {column}s of {config.features}; use the tables "
                "from which the features were built"
            )


def _write(
    source: Source,
    films: pa.Table,
    template: Template,
    abbreviations: dict[str, str],
    config: NotesConfig,
    part: Path,
    attrition: Attrition,
) -> int:
    """Write notes.parquet and unfiltered.parquet; returns the number of notes."""
    words, begun = complaints(source, abbreviations), time.monotonic()
    lost: dict[str, list[str]] = {"nothing was known when the film was taken": [], "nothing passed the leak filter": []}
    removed: dict[str, int] = {}
    missing: dict[str, int] = {}
    written = 0
    with contextlib.ExitStack() as files:
        writer = files.enter_context(pq.ParquetWriter(part / "notes.parquet", WRITTEN, compression="zstd"))
        if config.filter != "none":
            whole = files.enter_context(pq.ParquetWriter(part / "unfiltered.parquet", UNFILTERED, compression="zstd"))
        for start in range(0, len(films), CHUNK):
            chunk = hold(source.con, gen_name("notes_films"), films.slice(start, CHUNK))
            table = rendered(source, chunk, template, words)
            for name in fields_of(template):
                count = len(table) - (pc.sum(table[f"shown_{name}"]).as_py() or 0)
                missing[name] = missing.get(name, 0) + count
            note = joined(table)
            lost["nothing was known when the film was taken"] += _without(table, note)
            table, note = table.filter(pc.is_valid(note)), note.drop_null()
            if config.filter != "none":
                whole.write_table(pa.table([table["dicom_id"], note], schema=UNFILTERED))
            table, counts = filtered(table, config.filter)
            removed |= {name: removed.get(name, 0) + (pc.sum(count).as_py() or 0) for name, count in counts.items()}
            note = joined(table)
            lost["nothing passed the leak filter"] += _without(table, note)
            table, note = table.filter(pc.is_valid(note)), note.drop_null()
            writer.write_table(_finished(table, note))
            written += len(note)
            done, spent = min(start + CHUNK, len(films)), time.monotonic() - begun
            print(f"  {done:,} of {len(films):,} films, {spent:.0f} s", file=sys.stderr, flush=True)
    before = len(films)
    for why, ids in lost.items():
        attrition.add("notes", why, before, before - len(ids), ids)
        before -= len(ids)
    attrition.note("notes without a fact", missing)
    attrition.note(f"terms taken out by the leak filter ({config.filter})", removed)
    return written


def rendered(source: Source, films: ir.Table, template: Template, words: ir.Table | None) -> pa.Table:
    """Render some films: section_NAME, shown_FIELD, sources (comma-separated names) and available_at, by dicom_id."""
    told = facts(source, films, words)
    table = render(template, told)
    fields = fields_of(template)
    tables = {
        name: functools.reduce(operator.or_, [(table[f"from_{f}"] == name) & table[f"shown_{f}"] for f in fields])
        for name in SOURCES
    }
    names = ibis.literal(",").join([where(there.fill_null(False), ibis.literal(n)) for n, there in tables.items()])
    times = latest([where(table[f"shown_{f}"], table[f"at_{f}"]) for f in fields])
    columns = ["dicom_id", "subject_id", "split", "hadm_id", "ed_stay_id", "taken_at"]
    columns += [f"section_{name}" for name in template] + [f"shown_{name}" for name in fields]
    table = table.select(*columns, sources=names, available_at=times).order_by("dicom_id")
    result = gathered(table)
    if source.con.name == "duckdb":
        release(source.con, told)
        source.con.con.unregister(films.get_name())
    return result


def _sections(table: pa.Table) -> dict[str, pa.ChunkedArray]:
    return {c.removeprefix("section_"): table[c] for c in table.column_names if c.startswith("section_")}


def joined(table: pa.Table) -> pa.ChunkedArray:
    """The note: its sections, one per line; null if there is none."""
    texts = [pc.if_else(pc.equal(text, ""), None, text) for text in _sections(table).values()]
    note = pc.binary_join_element_wise(*texts, "\n", null_handling="skip")
    return pa.chunked_array([pc.if_else(pc.equal(note, ""), None, note).combine_chunks()])


def filtered(table: pa.Table, mode: str) -> tuple[pa.Table, dict[str, pa.Array]]:
    """Filter the sections of rows and add `num_removed`; also return the terms removed by group, (N,) each."""
    total: dict[str, Any] = {}
    for name, text in _sections(table).items():
        left, counts = leak_filter.apply(text.combine_chunks(), mode)
        table = table.set_column(table.schema.get_field_index(f"section_{name}"), f"section_{name}", left)
        total = {group: pc.add(total[group], n) if group in total else n for group, n in counts.items()}
    removed = functools.reduce(pc.add, total.values()) if total else pa.nulls(len(table), pa.int64()).fill_null(0)
    return table.append_column("num_removed", removed), total


def _finished(table: pa.Table, note: pa.ChunkedArray) -> pa.Table:
    """The rows of notes.parquet."""
    texts = _sections(table)
    there = np.array([pc.fill_null(pc.not_equal(text, ""), False).to_numpy() for text in texts.values()]).T  # (N, K)
    row, which = np.nonzero(there)
    flat = pa.concat_arrays([text.combine_chunks().cast(pa.string()) for text in texts.values()])
    items = pa.StructArray.from_arrays(
        [pa.array(list(texts), pa.string()).take(pa.array(which)), flat.take(pa.array(which * len(table) + row))],
        fields=list(SECTIONS.value_type),
    )
    ends = pa.array(np.concatenate([[0], there.sum(1).cumsum()]), pa.int32())
    columns = {name: table[name] for name in WRITTEN.names if name in table.column_names}
    columns |= {"note": note, "sections": pa.ListArray.from_arrays(ends, items)}
    columns["sources"] = pc.split_pattern(table["sources"], ",")
    return pa.table([columns[name] for name in WRITTEN.names], names=WRITTEN.names).cast(WRITTEN)


def _without(table: pa.Table, note: pa.ChunkedArray) -> list[str]:
    return table["dicom_id"].filter(pc.is_null(note)).to_pylist()
