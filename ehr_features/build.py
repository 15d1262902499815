"""Extract features/ from raw tables, step by step.

Input: a FeaturesConfig. Output: the folder of features, written under a temporary name and renamed when complete. The
events, the linked films and the unnormalised series are cached under a key of their inputs, so a changed config
recomputes only what depends on it.
"""

from __future__ import annotations

import contextlib
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import ibis
import ibis.expr.types as ir
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from ibis import _
from safetensors import safe_open

from configs import UserError, load
from configs.face import callable_module
from configs.loader import Given
from ehr_features import check, cohort, labels, plug_ins, schema, splits
from ehr_features.config import FeaturesConfig
from ehr_features.files import (
    alone,
    check_ours,
    check_settings,
    code_digest,
    digest,
    file_digest,
    new_file,
    new_folder,
    provenance,
    write_json,
    write_seal,
)
from ehr_features.films import linking, record, values
from ehr_features.phenotypes import lost_zeros
from ehr_features.raw.engine import batches, hold, named_by_the_engine, read, save
from ehr_features.raw.remote import fingerprint
from ehr_features.raw.source import EVENTS, Source, mixed, open_source, roots, without_ids
from ehr_features.schema import FOR_NOTES, Column
from ehr_features.series import bins, channels, coverage, events, medfuse
from ehr_features.series import file as series_file
from ehr_features.series.mapped import by_stays
from ehr_features.typed import read_json, shapes

SEALED = ("*.json", "*.parquet", "samples/*.parquet", "series.safetensors")
NO_EFFECT = {"out", "cache", "memory", "threads", "spark", "storage"}  # keys that change no result


class Steps:
    """How long each step took; says each when it is done."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        begun = time.monotonic()
        yield
        self.seconds[name] = round(time.monotonic() - begun, 3)
        print(f"  {name}: {self.seconds[name]:.1f} s", file=sys.stderr, flush=True)


callable_module(__name__)


@named_by_the_engine()
def build(config: FeaturesConfig | Given) -> Path:
    """Write features/.

    Args:
        config: a FeaturesConfig, its keys in a dict, a YAML file, or the name of a shipped one.
    Returns: the folder. Raises: UserError: anything about the raw tables or the config that the user can mend.
    """
    config = load(FeaturesConfig, config)
    out = config.out
    check_ours(out, "a features folder", ["provenance.json"])
    splits.check(config.split)
    check_same(config)
    own_tables(out, [plug_ins.task_name(task) for task in config.tasks])
    steps = Steps()
    with steps("opening the tables"):
        source = open_source(config)
        prints = {name: fingerprint(path) for name, path in source.files.items()}
        used = {k: v for k, v in config.model_dump(mode="json").items() if k not in NO_EFFECT}
        key = digest([used, prints, _extra_files(config), code_digest(sys.modules[__name__])])
    if is_current(out, key):
        print(f"{out} is up to date with its tables and config", file=sys.stderr)
        return out
    with alone(out):
        _extract(config, source, prints, steps, key)
    return out


def _extract(config: FeaturesConfig, source: Source, prints: Mapping[str, Any], steps: Steps, key: str) -> None:
    """Write the folder, step by step."""
    attrition = cohort.Attrition()
    declared, variables = channels.read_channels(config.channels), channels.read_variables(config.channels)
    absent = channels.check_items(source, variables, config.preset, config.channels)
    attrition.note("itemids that the dictionaries of this release lack", absent)
    warnings = lost_zeros(source)
    with steps("choosing the stays"):
        stays = cohort.stays(source, config.preset, attrition)
    with steps("reading the events"):
        found = events.selected(source, variables, config.cache_folder)
    with steps("binning the series"):
        binned, fates = series_file.cached(source, found, stays, declared, config)
    charted_in = coverage.charted_stays(source, found["chartevents"][0], stays, declared, config.preset)
    warnings += coverage.check(binned, declared, config.preset, fates, charted_in)
    columns = medfuse.layout(declared) if config.preset == "medfuse" else bins.layout(declared)
    with new_folder(config.out) as part:
        with steps("linking the films"):
            films = _films(source, attrition, config, prints)
        own = values.columns(variables) if films is not None and config.record_window_hours else {}
        with steps("looking up the last values before films"):
            films = _with_values(source, films, found, variables, config) if own else films
        with steps("writing stays and films"):
            split = _split(source, stays, films, config)
            stays = stays.join(split, "subject_id")
            stay_films = None if films is None else linking.stay_films(films, stays)
            about = tables(source.con, part, stays, films, stay_films, split, own)
        with steps("writing the samples"):
            shutil.copyfile(binned, part / "series.safetensors")
            status = labels.code_status(found["chartevents"][0], stays)
            dying = stays.mutate(death_hours=(_.death_at.epoch_seconds() - _.intime.epoch_seconds()) / 3600)
            cohort_ = labels.Cohort(source, dying, first_hours(source, binned, config), config)
            about |= samples(part, cohort_, stay_films, status, attrition)
        with steps("fitting the normaliser"):
            write_json(
                part / "series.json", series_file.about(part / "series.safetensors", stays, columns, config, fates)
            )
        write_json(part / "schema.json", about)
        rows = _rows(source, found, attrition)
        write_json(part / "attrition.json", attrition.as_json())
        write_json(part / "provenance.json", _provenance(config, source, prints, rows, part, steps, key, warnings))
        write_seal(part, *SEALED)
        for path in own_tables(config.out, [plug_ins.task_name(task) for task in config.tasks]):
            whole = path.is_dir() and not path.is_symlink()
            copy = partial(shutil.copytree, symlinks=True) if whole else partial(shutil.copy2, follow_symlinks=False)
            copy(path, part / "samples" / path.name)


def own_tables(out: Path, tasks: Sequence[str]) -> list[Path]:
    """What a user has put into samples/ of an earlier features folder: files and folders that schema.json does not
    list. Raises: UserError: one has the name of a task that will be written."""
    described = read_json(out / "schema.json", shapes.SchemaJson) if (out / "schema.json").is_file() else {}
    found = sorted((out / "samples").glob("*"))
    own = [path for path in found if path.suffix != ".parquet" or f"samples/{path.stem}" not in described]
    for path in own:
        if path.suffix == ".parquet" and path.stem in tasks:
            raise UserError(f"{path}: a table of your own with the name of a task that is written now; rename it")
    return own


def check_same(config: FeaturesConfig) -> None:
    """Refuse a folder that was made with another config; one made from other contents of the same tables is made again.

    Not compared: `tasks`, which change no other table, and keys that the version that made it did not have.
    Raises: UserError.
    """
    old: Any = {}
    with contextlib.suppress(UserError):  # absent or damaged: it is made again
        old = read_json(config.out / "provenance.json").get("config")
    new = config.model_dump(mode="json")
    same = [key for key in new if isinstance(old, dict) and key in old and key not in {*NO_EFFECT, "tasks"}]
    check_settings(config.out, "features", {key: old[key] for key in same}, {key: new[key] for key in same})


def is_current(out: Path, key: str) -> bool:
    """Whether a folder was written from these tables, this config and this code."""
    with contextlib.suppress(UserError):
        return bool(read_json(out / "provenance.json", shapes.Provenance).get("key") == key)
    return False


def _extra_files(config: FeaturesConfig) -> list[str]:
    tasks = [plug_ins.file_of(task) for task in config.tasks if plug_ins.is_file(task)]
    named = [*tasks, config.channels, Path(config.split) if Path(config.split).is_file() else None]
    return [file_digest(path) for path in named if path is not None and path.is_file()]


def _films(
    source: Source, attrition: cohort.Attrition, config: FeaturesConfig, prints: Mapping[str, Any]
) -> ir.Table | None:
    """Every film with its links and its record, from the cache if what they depend on has not changed."""
    if config.mimic_cxr is None:
        return None
    tables = {source.files[name]: stat for name, stat in prints.items() if name not in EVENTS}
    key = digest([tables, config.preset, config.ed_tolerance_hours, config.engine, code_digest(linking, record)])
    path = config.cache_folder / f"films-{key}.parquet"
    facts = path.with_suffix(".json")
    if not (path.is_file() and facts.is_file()):
        own = cohort.Attrition()
        films = linking.link_films(source, own, preset=config.preset, ed_tolerance_hours=config.ed_tolerance_hours)
        films = record.add_record(source, films)
        with new_file(path) as part:
            save(source.con, films, part)
        write_json(facts, own.as_json())
    attrition.extend(read_json(facts, shapes.AttritionJson))
    films = read(source.con, str(path))
    linking.note_files(films, config.mimic_cxr, attrition)
    return films


def _with_values(
    source: Source,
    films: ir.Table,
    found: Mapping[str, tuple[ir.Table, int]],
    variables: tuple[channels.Channel, ...],
    config: FeaturesConfig,
) -> ir.Table:
    """The films with the last known value of each variable."""
    last = values.last_values(source, films, found, variables, config.record_window_hours)
    return films.left_join(last, "dicom_id").drop("dicom_id_right")


def _split(source: Source, stays: ir.Table, films: ir.Table | None, config: FeaturesConfig) -> ir.Table:
    """subject_id -> split, of everyone who has a stay in the cohort or a film."""
    subjects = stays.select("subject_id").distinct()
    if films is not None:
        subjects = subjects.union(films.select("subject_id"), distinct=True)
    years = source.table("patients").select("subject_id", "anchor_year_group").distinct()
    frame = subjects.left_join(years, "subject_id").select("subject_id", "anchor_year_group").to_pandas()
    official = source.table("cxr_split").to_pandas() if source.has("cxr_split") else None
    assigned = splits.assign(frame, official, method=config.split, seed=config.seed)
    return hold(
        source.con, "subject_split", pa.Table.from_pandas(assigned.astype({"split": "string"}), preserve_index=False)
    )


def _rows(source: Source, found: Mapping[str, tuple[ir.Table, int]], attrition: cohort.Attrition) -> dict[str, int]:
    """Count the rows of each raw table that was read, and the rows dropped because an id is missing."""
    read = [name for name in source.files if name not in found and name not in FOR_NOTES]
    rows = {name: source.rows(name) for name in read} | {name: n for name, (_table, n) in found.items()}
    note_dropped(source, {name: n for name, n in rows.items() if name != "icustays"}, attrition)  # cohort.py counts it
    return rows


def note_dropped(source: Source, rows: Mapping[str, int], attrition: cohort.Attrition) -> None:
    """Put down the rows of each raw table that were dropped because an id is missing."""
    for name, n in rows.items():
        if source.dropped[name]:
            attrition.add(name, without_ids(name), n, n - source.dropped[name])


def _provenance(
    config: FeaturesConfig,
    source: Source,
    prints: Mapping[str, Any],
    raw: Mapping[str, int],
    part: Path,
    steps: Steps,
    key: str,
    warnings: list[str],
) -> dict[str, Any]:
    releases, told = check.releases(roots(config), raw, source.layout)
    warnings = [*warnings, *told, *mixed(source.columns), *check.dropped_rows(source)]
    warnings += [f"{source.files[name]}: has a header and no rows" for name, rows in raw.items() if rows == 0]
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)
    written = {p.relative_to(part).as_posix(): pq.read_metadata(p).num_rows for p in sorted(part.rglob("*.parquet"))}
    record = provenance(
        config.model_dump(mode="json"),
        key=key,
        seed=config.seed,
        layout=source.layout,
        release=releases["mimic_iv"]["release"],
        releases=releases,
        rows_read=raw,
        rows_written=written,
        warnings=warnings,
        seconds=steps.seconds,
    )
    record["sources"] = {source.files[name]: {"table": name, **stat} for name, stat in prints.items()}
    return record


# ---- The tables of features/, written with exactly their declared columns.

ARROW = {
    "int64": pa.int64(),
    "string": pa.string(),
    "float64": pa.float64(),
    "timestamp": pa.timestamp("us"),
    "date": pa.date32(),
    "boolean": pa.bool_(),
}


def tables(
    con: Any,
    part: Path,
    stays: ir.Table,
    films: ir.Table | None,
    stay_films: ir.Table | None,
    split: ir.Table,
    own: Mapping[str, Column] = MappingProxyType({}),
) -> dict[str, Any]:
    """Write stays, images (with further columns of its `own`) and stay_films; returns their entries of schema.json."""
    write_table(con, stays.order_by("stay_id"), part / "stays.parquet", schema.STAYS)
    tables = {"stays": schema.described(schema.STAYS)}
    if films is not None and stay_films is not None:
        films = films.join(split, "subject_id")
        write_table(con, films.order_by("dicom_id"), part / "images.parquet", {**schema.IMAGES, **own})
        ordered = stay_films.order_by("stay_id", "hours_from_intime", "dicom_id")
        write_table(con, ordered, part / "stay_films.parquet", schema.STAY_FILMS)
        tables |= {
            "images": schema.described({**schema.IMAGES, **own}),
            "stay_films": schema.described(schema.STAY_FILMS),
        }
    return tables


def first_hours(source: Source, binned: Path, config: FeaturesConfig) -> ir.Table:
    """stay_id, first_hour: where the first bin with a measurement begins; stays with one only."""
    with safe_open(binned, "numpy") as file:
        stay, offsets = file.get_tensor("stay_id"), file.get_tensor("offsets")
    parts = [offsets[part.stays.start] + np.flatnonzero(part.observed.any(1)) for part in by_stays(binned)]
    seen = np.concatenate([np.zeros(0, np.int64), *parts])
    at = np.searchsorted(seen, offsets[:-1])
    first = np.append(seen, offsets[-1])[at]
    has = first < offsets[1:]
    table = {"stay_id": stay[has], "first_hour": ((first - offsets[:-1]) * config.step_hours)[has]}
    return hold(source.con, "first_hours", pa.table(table))


def samples(
    part: Path, cohort_: labels.Cohort, stay_films: ir.Table | None, status: ir.Table, attrition: cohort.Attrition
) -> dict[str, Any]:
    """Write samples/TASK.parquet of each task; returns their entries of schema.json."""
    tables, con = {}, cohort_.source.con
    for word in cohort_.config.tasks:
        task = plug_ins.task_name(word)
        columns = {**schema.SAMPLES, **labels.label_columns(word)}
        path = part / "samples" / f"{task}.parquet"
        if task == "findings":
            names = ["dicom_id", "stay_id", "subject_id", "split", *schema.FINDINGS]
            images = pd.read_parquet(part / "images.parquet", columns=names)
            write_table(con, labels.finding_samples(images, cohort_.config.findings, attrition), path, columns)
        else:
            made = labels.TASKS.get(word)
            samples = labels.own_task(cohort_, word) if made is None else made(cohort_, attrition)
            samples = labels.latest(samples, status, "code_status")
            samples = _with_film(samples, stay_films)
            write_table(con, samples.order_by("stay_id", "predict_at_hours"), path, columns)
        attrition.note(f"samples/{task}", pq.read_metadata(path).num_rows)
        tables[f"samples/{task}"] = schema.described(columns)
    return tables


def _with_film(samples: ir.Table, stay_films: ir.Table | None) -> ir.Table:
    if stay_films is None:
        return samples.mutate(dicom_id=ibis.null("string"))
    return samples.left_join(linking.last_film(samples, stay_films), "sample_id").drop("sample_id_right")


def write_table(con: Any, table: ir.Table | pd.DataFrame, path: Path, columns: Mapping[str, Column]) -> None:
    """Write a table of features/ with exactly its declared columns and types."""
    want = pa.schema([(name, ARROW[column.type]) for name, column in columns.items()])
    with new_file(path) as part, pq.ParquetWriter(part, want, compression="zstd") as writer:
        if isinstance(table, pd.DataFrame):
            writer.write_table(pa.Table.from_pandas(table[want.names], preserve_index=False).cast(want))
            return
        for batch in batches(con, table.select(*want.names)):
            writer.write_table(pa.Table.from_batches([batch]).cast(want))
