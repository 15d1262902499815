"""Raw tables -> features/: every step in order.

Comes in: a FeaturesConfig. Goes out: the folder of features, written aside and renamed when it is complete. The
events, the linked films and the unnormalised series are kept in the cache folder under a key of what they depend on,
so that a changed config redoes only what depends on it, and an unchanged one nothing.
"""

from __future__ import annotations

import contextlib
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ibis.expr.types as ir
import pyarrow as pa
import pyarrow.parquet as pq

from configs import UserError
from ehr_features import (
    channels,
    cohort,
    events,
    film_attrition,
    film_record,
    labels,
    linking,
    medfuse,
    outputs,
    release,
    series,
    series_file,
    splits,
)
from ehr_features.config import FeaturesConfig
from ehr_features.engine import hold, named_by_the_engine
from ehr_features.files import code_digest, digest, file_digest, new_file, new_folder, provenance, read_json, write_json
from ehr_features.lock import alone
from ehr_features.remote import fingerprint
from ehr_features.schema import FOR_NOTES
from ehr_features.source import EVENTS, Source, mixed, open_source, roots

NO_EFFECT = {"out", "cache", "memory", "threads", "storage"}  # keys that change no result


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


@named_by_the_engine()
def build(config: FeaturesConfig) -> Path:
    """Write features/.

    Returns: the folder. Raises: UserError: anything about the raw tables or the config that the user can mend.
    """
    out = config.out
    _may_write(out)
    splits.check(config.split)
    steps = Steps()
    with steps("opening the tables"):
        source = open_source(config)
        prints = {name: fingerprint(path) for name, path in source.files.items()}
        used = {k: v for k, v in config.model_dump(mode="json").items() if k not in NO_EFFECT}
        key = digest([used, prints, _extra_files(config), code_digest("*.py", "*.yaml", "*.csv")])
    if is_current(out, key):
        print(f"{out} is up to date with its tables and config", file=sys.stderr)
        return out
    with alone(out):
        _extract(config, source, prints, steps, key)
    return out


def _extract(config: FeaturesConfig, source: Source, prints: Mapping[str, Any], steps: Steps, key: str) -> None:
    """Write the folder, step by step."""
    attrition = cohort.Attrition()
    declared = channels.read_channels(config.channels)
    absent = channels.check_items(source, declared, config.preset, config.channels)
    attrition.note("itemids that the dictionaries of this release lack", absent)
    with steps("choosing the stays"):
        stays = cohort.stays(source, config.preset, attrition)
    with steps("reading the events"):
        found = events.selected(source, declared, config.cache_folder)
    with steps("binning the series"):
        binned, fates = series_file.cached(source, found, stays, declared, config)
    columns = medfuse.layout(declared) if config.preset == "medfuse" else series.layout(declared)
    with new_folder(config.out) as part:
        with steps("linking the films"):
            films = _films(source, attrition, config, prints)
            split = _split(source, stays, films, config)
            stays = stays.join(split, "subject_id")
            stay_films = None if films is None else linking.stay_films(films, stays)
            tables = outputs.tables(source.con, part, stays, films, stay_films, split)
        with steps("writing the samples"):
            shutil.copyfile(binned, part / "series.safetensors")
            status = labels.code_status(found["chartevents"][0], stays)
            cohort_ = labels.Cohort(
                source, outputs.with_death(stays), outputs.first_hours(source, binned, config), config
            )
            tables |= outputs.samples(part, cohort_, stay_films, status, attrition)
        with steps("fitting the normaliser"):
            about = series_file.about(part / "series.safetensors", stays, columns, config, fates)
            write_json(part / "series.json", about)
        write_json(part / "schema.json", tables)
        write_json(part / "attrition.json", attrition.as_json())
        write_json(part / "provenance.json", _provenance(config, source, prints, found, part, steps, key))


def is_current(out: Path, key: str) -> bool:
    """Whether a folder was written from these tables, this config and this code."""
    with contextlib.suppress(UserError):
        return read_json(out / "provenance.json").get("key") == key
    return False


def _may_write(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: is a file; out=... is a folder")
    if out.is_dir() and any(out.iterdir()) and not (out / "provenance.json").is_file():
        raise UserError(f"{out}: holds files that are no features; choose another folder with out=...")


def _extra_files(config: FeaturesConfig) -> list[str]:
    named = [config.channels, Path(config.split) if Path(config.split).is_file() else None]
    return [file_digest(path) for path in named if path is not None and path.is_file()]


def _films(
    source: Source, attrition: cohort.Attrition, config: FeaturesConfig, prints: Mapping[str, Any]
) -> ir.Table | None:
    """Every film with its links and its record, from the cache if what they depend on has not changed."""
    if config.mimic_cxr is None:
        return None
    read = {source.files[name]: stat for name, stat in prints.items() if name not in EVENTS}
    code = code_digest("film*.py", "linking.py", "phenotypes.*", "source.py", "schema.py", "engine.py")
    key = digest([read, config.preset, config.ed_tolerance_hours, config.engine, code])
    path = config.cache_folder / f"films-{key}.parquet"
    facts = path.with_suffix(".json")
    if not (path.is_file() and facts.is_file()):
        own = cohort.Attrition()
        films = linking.link_films(source, own, preset=config.preset, ed_tolerance_hours=config.ed_tolerance_hours)
        films = film_record.add_record(source, films)
        with new_file(path) as part:
            pq.write_table(films.to_pyarrow(), part, compression="zstd")
        write_json(facts, own.as_json())
    attrition.extend(read_json(facts))
    films = source.con.read_parquet(str(path))
    film_attrition.note_files(films, config.mimic_cxr, attrition)
    return films


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


def _provenance(
    config: FeaturesConfig,
    source: Source,
    prints: Mapping[str, Any],
    found: Mapping[str, tuple[ir.Table, int]],
    part: Path,
    steps: Steps,
    key: str,
) -> dict[str, Any]:
    read = [name for name in source.files if name not in found and name not in FOR_NOTES]
    raw = {name: int(source.table(name).count().execute()) for name in read}
    raw |= {name: rows for name, (_table, rows) in found.items()}
    releases, warnings = release.told(roots(config), raw, source.layout)
    warnings += mixed(source.columns)
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
