"""results.json and predictions/: the output of a probe or fusion run.

results.json = {run: {task, model, encoder, seed, allow_leak, warnings, ...}, rows: [...]}; a row is one metric of one
label, of a split, of a subset of its subjects (`all`, or `sex=F`), of a fraction of the training subjects.
results.schema.json is its JSON Schema; `python -m finetune.results` prints it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple, Self

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, Field, model_validator

from configs import UserError
from ehr_features.files import check_new_file, new_file, write_json
from ehr_features.typed import read_json, read_parquet, undamaged
from finetune.config.shapes import PREDICTED, PREDICTION, ROW_IDS, ComparedBy, Guard, Shift

COLUMNS = ["split", "label", "subset", "fraction", "metric", "value", "low", "high", "n", "positives", "reason"]


TRACKING = ("trackers", "project", "run_name", "process_timeout")  # keys that may change when a run is resumed


def headline(rows: pd.DataFrame) -> dict[str, float]:
    """The test metrics of all subjects and all training data, for trackers: `test/METRIC/LABEL` -> value."""
    kept = rows[(rows["split"] == "test") & rows["subset"].isin(["all"]) & rows["value"].notna()]
    if "fraction" in kept:
        kept = kept[kept["fraction"].isna() | (kept["fraction"] == 1)]
    return {f"test/{r['metric']}/{r['label']}": float(r["value"]) for r in kept.to_dict("records")}


UNIT = (  # metrics between 0 and 1
    "auroc",
    "auprc",
    "brier",
    "prevalence",
    "calibration_error",
    "f1",
    "sensitivity",
    "specificity",
    "sensitivity_at_specificity_90",
)


class Gap(BaseModel):
    """The largest difference of AUROC between two groups of a field."""

    model_config = ConfigDict(extra="allow")

    field: str
    higher: str
    lower: str
    difference: float | None
    low: float | None = None
    high: float | None = None


class Run(BaseModel):
    """Description of the run; commands add their own keys. Keys with a default may be missing in files of other
    versions."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)

    task: str
    model: str = "unknown"
    encoder: str | None = None
    seed: Annotated[int, Field(ge=0)] = 0
    allow_leak: bool = False
    warnings: list[str] = []
    seeds: Annotated[int, Field(ge=1)] = 1
    supervision: str = "unknown"
    control: str = "none"
    gaps: list[Gap] = []
    shift: Shift | None = None
    compared_by: ComparedBy = ComparedBy()
    guard: Guard | None = None
    prevalence: dict[str, Annotated[float, Field(ge=0, le=1)]] | None = None
    fractions: list[dict[str, Any]] | None = None


class Row(BaseModel):
    """One value. `reason` explains a null `value` or interval."""

    model_config = ConfigDict(allow_inf_nan=False)

    split: str
    label: str
    subset: str = "all"
    fraction: Annotated[float, Field(gt=0, le=1)] = 1.0
    metric: Annotated[str, Field(min_length=1)]
    value: float | None
    low: float | None = None
    high: float | None = None
    n: Annotated[int, Field(ge=0)]
    positives: Annotated[int, Field(ge=0)]
    reason: str | None = None

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.low is not None and self.high is not None and self.low > self.high:
            raise ValueError("an interval that begins below its end")
        numbers = [one for one in (self.value, self.low, self.high) if one is not None]
        if self.metric in UNIT and not all(0 <= one <= 1 for one in numbers):
            raise ValueError(f"{self.metric} between 0 and 1")
        if self.positives > self.n and not self.label.startswith("macro"):
            raise ValueError("no more positives than rows")
        return self


class Results(BaseModel):
    """Schema for reading: results.json of this and of other versions."""

    model_config = ConfigDict(allow_inf_nan=False)

    run: Run
    rows: list[Row]

    @model_validator(mode="after")
    def _once(self) -> Self:
        seen: set[tuple[Any, ...]] = set()
        for i, row in enumerate(self.rows):
            if (key := (row.split, row.label, row.subset, row.fraction, row.metric)) in seen:
                raise ValueError(f"each number once; `rows.{i}` is of the split, label, subset and metric of another")
            seen.add(key)
        return self


class WrittenRun(Run):
    """Description of the run; commands add their own keys."""

    model: str
    encoder: str | None
    seed: int
    allow_leak: bool
    warnings: list[str]


class WrittenRow(Row):
    """One value. `reason` explains a null `value` or interval."""

    model_config = ConfigDict(extra="forbid")

    subset: str
    fraction: float
    low: float | None
    high: float | None
    reason: str | None

    @model_validator(mode="after")
    def _said(self) -> WrittenRow:
        if self.value is None and not self.reason:
            raise ValueError("`value` is null without a `reason`")
        return self


class Written(BaseModel):
    """Schema for writing results.json."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    run: WrittenRun
    rows: list[WrittenRow]


def write_results(folder: str | Path, run: Mapping[str, Any], rows: pd.DataFrame) -> Path:
    """Write FOLDER/results.json.

    Args:
        run: at least task, model, encoder, seed, allow_leak, warnings.
        rows: `metrics.evaluate`'s columns plus split, and subset (else `all`) and fraction (else 1).
    """
    table = rows.copy()
    for column, value in (("subset", "all"), ("fraction", 1.0)):
        if column not in table:
            table[column] = value
    records = [{key: _plain(value) for key, value in row.items()} for row in table[COLUMNS].to_dict("records")]
    results = Written.model_validate({"run": _plain(dict(run)), "rows": records})
    path = Path(folder) / "results.json"
    write_json(path, results.model_dump(mode="json", exclude_unset=True))
    return path


def read_results(folder: str | Path) -> tuple[dict[str, Any], pd.DataFrame]:
    """Read FOLDER/results.json: run, rows. Raises: UserError: absent, or not of the schema."""
    results = Results.model_validate(read_json(Path(folder) / "results.json", Results))
    rows = pd.DataFrame([row.model_dump() for row in results.rows], columns=COLUMNS)
    always = results.run.model_dump(include={"task", "model", "encoder", "seed", "allow_leak", "warnings"})
    return results.run.model_dump(exclude_unset=True) | always, rows.astype(
        {"value": float, "low": float, "high": float}
    )


class Tables(NamedTuple):
    """The result of `read`."""

    run: dict[str, Any]  # task, model, encoder, seed, warnings, ...
    rows: pd.DataFrame  # split, label, subset, fraction, metric, value, low, high, n, positives, reason
    predictions: dict[str, pd.DataFrame]  # `val`, `test`: sample_id or dicom_id, subject_id, label_*, logit_*


def read(folder: str | Path) -> Tables:
    """The results of a finished probe or fusion run, as DataFrames.

    Args:
        folder: runs/X/.
    Raises: UserError: no results there, or a file is damaged.
    """
    paths = sorted((Path(folder) / "predictions").glob("*.parquet"))
    return Tables(*read_results(folder), {path.stem: predictions(folder, path.stem) for path in paths})


def write_predictions(
    folder: str | Path, split: str, ids: pd.DataFrame, labels: pd.DataFrame, logits: np.ndarray
) -> Path:
    """Write FOLDER/predictions/SPLIT.parquet.

    Args:
        ids: (N, ...) sample_id or dicom_id, and subject_id; other columns are kept.
        labels: (N, L), 0, 1 or missing; the columns' names are the labels.
        logits: (N, L), before the sigmoid.
    """
    assert len(ids) == len(labels) == len(logits) and labels.shape == logits.shape, (
        "rows of ids, labels and logits differ"
    )
    table = ids.reset_index(drop=True).copy()
    for i, name in enumerate(labels.columns):
        table[f"label_{name}"] = labels.iloc[:, i].to_numpy(dtype=np.float32)
        table[f"logit_{name}"] = np.asarray(logits[:, i], dtype=np.float64)
    path = Path(folder) / "predictions" / f"{split}.parquet"
    with new_file(path) as part:
        table.to_parquet(part, index=False)
    return path


def predictions(folder: str | Path, split: str) -> pd.DataFrame:
    """FOLDER/predictions/SPLIT.parquet: ids, label_*, logit_*. Raises: UserError: absent, or damaged."""
    path = Path(folder) / "predictions" / f"{split}.parquet"
    if not path.is_file():
        raise UserError(f"{path}: no such predictions; a finished probe or fusion run has them")
    again = "evaluate the run again"
    with undamaged(path, again):
        have = pq.read_schema(path).names
    values = {c: PREDICTION[c[:6]] for c in have if c.startswith(("label_", "logit_"))}
    labels = dict.fromkeys(c[6:] for c in values)
    needed = ["subject_id", *(f"{kind}_{label}" for label in labels for kind in ("label", "logit"))]
    table = read_parquet(path, PREDICTED | values, again, names=needed, more=True)
    if table.empty or not values:
        raise UserError(f"{path}: no predictions in it; {again}")
    keys = [key for key in ROW_IDS if key in table]
    if not any(table[key].notna().all() and table[key].is_unique for key in keys):
        raise UserError(f"{path}: rows stand twice by their {' and '.join(keys) or 'ids'}; wanted each once; {again}")
    for name in (c for c in values if c.startswith("logit_")):
        if table[name].isna().any() and table[name].notna().any():
            raise UserError(f"{path}: column `{name}`: some rows have no number; {again}")
    return table


def read_predictions(folder: str | Path, split: str) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """`predictions` as three tables: ids, labels (N, L), logits (N, L), named by label."""
    table = predictions(folder, split)
    columns = [str(c) for c in table.columns]
    names = [c.removeprefix("label_") for c in columns if c.startswith("label_")]
    ids = table[[c for c in columns if not c.startswith(("label_", "logit_"))]]
    labels, logits = (table[[f"{kind}_{n}" for n in names]].set_axis(names, axis=1) for kind in ("label", "logit"))
    return ids, labels, logits


def each_training(runs: Sequence[str | Path]) -> list[str | Path]:
    """The runs, with a fusion of several seeds replaced by the folders of its trainings."""
    found: list[str | Path] = []
    for run in runs:
        found += sorted(Path(run).glob("seed_*/")) or [run]
    return found


TABLES = (".csv", ".md", ".tex")


def check_table(path: str | Path) -> None:
    """Check that `write_table` can write there. Raises: UserError, OSError."""
    check_new_file(path)
    if Path(path).suffix not in TABLES:
        raise UserError(f"{path}: wanted a file that ends in {', '.join(TABLES)}: CSV, Markdown or LaTeX")


FORMULA = ("=", "+", "-", "@", "\t", "\r")


def as_text(table: pd.DataFrame) -> pd.DataFrame:
    """A table for spreadsheets: a text cell or heading that a program would run as a formula begins with `'`."""

    def quoted(value: Any) -> Any:
        return f"'{value}" if isinstance(value, str) and value.startswith(FORMULA) else value

    return table.apply(lambda column: column.map(quoted)).rename(columns=quoted)


def write_table(path: str | Path, table: pd.DataFrame) -> None:
    """Write a table as CSV, Markdown or LaTeX, by the file's suffix; the latter two with four decimals."""
    shown = table.apply(lambda column: column.map(_cell))
    head = [[str(name) for name in table], ["---"] * table.shape[1]]
    with new_file(path) as part:
        if Path(path).suffix == ".csv":
            as_text(table).to_csv(part, index=False)
        elif Path(path).suffix == ".md":
            lines = [[cell.replace("|", "\\|") for cell in row] for row in [*head, *shown.to_numpy().tolist()]]
            part.write_text("".join(f"| {' | '.join(line)} |\n" for line in lines), encoding="utf-8")
        else:
            part.write_text(shown.to_latex(index=False, escape=True), encoding="utf-8")


def _cell(value: Any) -> str:
    if value is None or value is pd.NA or (isinstance(value, float) and math.isnan(value)):
        return ""
    return decimals(value) if isinstance(value, float) else str(value)


def decimals(value: float) -> str:
    """Four decimals; a value that they would show as zero in powers of ten: 7.8e-07."""
    return f"{value:.1e}" if 0 < abs(value) < 5e-5 else f"{value:.4f}"


def _plain(value: Any) -> Any:
    """Convert numpy values and NaN for JSON."""
    if isinstance(value, Mapping):
        return {str(key): _plain(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    value = value.item() if isinstance(value, np.generic) else value
    return None if value is pd.NA or (isinstance(value, float) and math.isnan(value)) else value


if __name__ == "__main__":
    print(json.dumps(Written.model_json_schema(), indent=1))
