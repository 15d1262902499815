"""The tables of features/, written with exactly their declared columns."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ibis
import ibis.expr.types as ir
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from ibis import _
from safetensors import safe_open

from ehr_features import cohort, labels, linking, schema
from ehr_features.config import FeaturesConfig
from ehr_features.engine import batches, hold
from ehr_features.files import new_file
from ehr_features.schema import Column
from ehr_features.source import Source

ARROW = {
    "int64": pa.int64(),
    "string": pa.string(),
    "float64": pa.float64(),
    "timestamp": pa.timestamp("us"),
    "date": pa.date32(),
    "boolean": pa.bool_(),
}


def tables(
    con: Any, part: Path, stays: ir.Table, films: ir.Table | None, stay_films: ir.Table | None, split: ir.Table
) -> dict[str, Any]:
    """Write stays, images and stay_films; returns their entries of schema.json."""
    write_table(con, stays.order_by("stay_id"), part / "stays.parquet", schema.STAYS)
    tables = {"stays": schema.described(schema.STAYS)}
    if films is not None and stay_films is not None:
        films = films.join(split, "subject_id")
        write_table(con, films.order_by("dicom_id"), part / "images.parquet", schema.IMAGES)
        ordered = stay_films.order_by("stay_id", "hours_from_intime", "dicom_id")
        write_table(con, ordered, part / "stay_films.parquet", schema.STAY_FILMS)
        tables |= {"images": schema.described(schema.IMAGES), "stay_films": schema.described(schema.STAY_FILMS)}
    return tables


def with_death(stays: ir.Table) -> ir.Table:
    return stays.mutate(death_hours=(_.death_at.epoch_seconds() - _.intime.epoch_seconds()) / 3600)


def first_hours(source: Source, binned: Path, config: FeaturesConfig) -> ir.Table:
    """stay_id, first_hour: where the first bin with a measurement begins; stays with one only."""
    with safe_open(binned, "numpy") as file:
        stay, offsets = file.get_tensor("stay_id"), file.get_tensor("offsets")
        seen = np.flatnonzero(file.get_tensor("observed").any(1))
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
    for task in cohort_.config.tasks:
        columns = {**schema.SAMPLES, **labels.label_columns(task)}
        path = part / "samples" / f"{task}.parquet"
        if task == "findings":
            names = ["dicom_id", "stay_id", "subject_id", "split", *schema.FINDINGS]
            images = pd.read_parquet(part / "images.parquet", columns=names)
            write_table(con, labels.finding_samples(images, cohort_.config.findings, attrition), path, columns)
        else:
            samples = labels.TASKS[task](cohort_, attrition)
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
