"""Events of one stay, and the resulting series."""

from __future__ import annotations

import itertools
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
from safetensors.numpy import load_file

from ehr_features.raw.engine import batches, hold
from ehr_features.raw.source import Source
from ehr_features.series import bins
from ehr_features.series import file as series_file
from ehr_features.series.channels import Channel, read_channels

IN = pd.Timestamp("2150-01-01 10:00:00")
CHANNELS = read_channels()
NAMES = [c.name for c in CHANNELS]
CHART = ["subject_id", "hadm_id", "stay_id", "itemid", "charttime", "storetime", "value", "valuenum"]


def at(hours: float) -> pd.Timestamp:
    return IN + pd.Timedelta(seconds=round(hours * 3600))


def chart(*rows: tuple[Any, ...], stay: int = 1) -> pd.DataFrame:
    """(itemid, hours, value[, text[, stored hours]])"""
    full = [(*row, *[None] * (5 - len(row))) for row in rows]
    out = [
        (
            7,
            5,
            stay,
            item,
            at(h),
            pd.NaT if stored is None else at(stored),
            text if text is not None else str(value),
            value,
        )
        for item, h, value, text, stored in full
    ]
    return pd.DataFrame(out, columns=CHART).astype({"valuenum": float})


def labs(*rows: tuple[Any, ...]) -> pd.DataFrame:
    """(itemid, drawn hours, value, stored hours or None[, hadm_id[, specimen_id]]); a text has no valuenum"""
    out = []
    for item, drawn, value, stored, *more in rows:
        hadm, specimen = (*more, *(5, None)[len(more) :])
        when = (at(drawn), pd.NaT if stored is None else at(stored))
        out.append((7, hadm, specimen, item, *when, str(value), None if isinstance(value, str) else value))
    columns = ["subject_id", "hadm_id", "specimen_id", "itemid", "charttime", "storetime", "value", "valuenum"]
    return pd.DataFrame(out, columns=columns).astype({"valuenum": float, "specimen_id": "Int64"})


def stay(los: float = 6.0, stay_id: int = 1, begins: float = 0.0) -> pd.DataFrame:
    row = {"stay_id": stay_id, "subject_id": 7, "hadm_id": 5, "intime": at(begins), "outtime": at(begins + los)}
    return pd.DataFrame([row | {"los_hours": los}])


def run(
    events: pd.DataFrame | None,
    lab_events: pd.DataFrame | None = None,
    stays: pd.DataFrame | None = None,
    step: int = 1,
    preset: Any = bins,
    channels: tuple[Channel, ...] = CHANNELS,
) -> tuple[dict[int, pd.DataFrame], pd.DataFrame, dict[int, np.ndarray]]:
    """stay_id -> its values by column, the fates of events, stay_id -> observed."""
    stays = stay() if stays is None else stays
    events = chart() if events is None else events
    lab_events = labs() if lab_events is None else lab_events
    source = Source.from_frames({"chartevents": events, "labevents": lab_events, "icustays": stays})
    los = pd.DataFrame({"stay_id": stays["stay_id"], "los_hours": stays["los_hours"].astype(float)})
    los["death_at"] = stays["death_at"] if "death_at" in stays else pd.Series(pd.NaT, los.index, "datetime64[us]")
    los = hold(source.con, "los", pa.Table.from_pandas(los, preserve_index=False))
    cohort = source.table("icustays").join(los, "stay_id")
    binned, fates = preset.extract(
        source, source.table("chartevents"), source.table("labevents"), cohort, channels, step
    )
    columns = preset.layout(channels)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "series.safetensors"
        ids = np.sort(stays["stay_id"].to_numpy())
        hours = stays.set_index("stay_id").loc[ids, "los_hours"].to_numpy()
        num = preset.lengths(hours, step)
        ordered = batches(source.con, binned.select(*series_file.BINS).order_by("stay_id"))
        standing = series_file.write(path, ordered, ids, num, columns)
        tensors = load_file(path)
    fates = series_file.fates(fates, standing, exact=preset is bins)
    edges = tensors["offsets"].tolist()
    spans = {int(i): slice(*edge) for i, edge in zip(ids, itertools.pairwise(edges), strict=True)}
    values = {i: pd.DataFrame(tensors["values"][s], columns=list(columns.values)) for i, s in spans.items()}
    return values, fates, {i: tensors["observed"][s] for i, s in spans.items()}


def value(events: pd.DataFrame | None, column: str, lab_events: pd.DataFrame | None = None, **more: Any) -> list[float]:
    return run(events, lab_events, **more)[0][1][column].astype(float).round(4).tolist()


def fates_of(fates: pd.DataFrame, column: str = "n") -> dict[str, int]:
    return {str(fate): int(n) for fate, n in fates.groupby("fate")[column].sum().items() if n}


def arterial(*rows: tuple[Any, ...], kind: str | None = "ART.") -> pd.DataFrame:
    """Laboratory rows of one specimen, with its kind."""
    rows = tuple((*row, 5, 99) for row in rows)
    return labs(*rows, *([(52033, rows[0][1], kind, rows[0][3], 5, 99)] if rows and kind else []))
