"""Read run folders and the features they were made from, for the report and for `runs`.

Input: folders of design section 4 (a run, or a folder of runs). Output: `Run` records; what a run does not have
is empty, what is damaged is named in a UserError. Nothing is computed here but what the files say.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import pandas as pd

from configs import UserError
from configs.commands import command_line
from ehr_features.typed import read_json, read_lines, read_yaml
from ehr_features.typed.shapes import Provenance, RunConfig
from finetune.config.shapes import GridJson, Logged, Probed
from finetune.results import COLUMNS, each_training, predictions, read_results
from pretrain.shapes import EncoderJson

MARK = "config.yaml"
ON_A_PAGE = 30  # runs that a `next:` line still shows on a page


@dataclass(frozen=True)
class Run:
    """One run folder, read."""

    folder: Path
    name: str
    config: dict[str, Any]
    provenance: dict[str, Any]
    metrics: pd.DataFrame  # a row per step that was logged
    watched: pd.DataFrame  # probe.jsonl: a row per probed encoder
    encoder: dict[str, Any]  # encoder/encoder.json
    result: dict[str, Any]  # results.json: run
    rows: pd.DataFrame  # results.json: rows
    called: str  # the model's name for a reader, by `names.named`

    @property
    def kind(self) -> str:
        """`evaluation` (has results), `pretraining` (has an encoder or curves), `unfinished`."""
        if not self.rows.empty:
            return "evaluation"
        evaluates = "optim" not in self.config and ("method" in self.config or "model" in self.config)
        return "unfinished" if evaluates or (not self.encoder and self.metrics.empty) else "pretraining"

    @property
    def task(self) -> str:
        return str(self.result.get("task", ""))

    @cached_property
    def features(self) -> Path | None:
        """The features folder of the config, resolved from the working directory or the run's parents."""
        return self.find(self.config.get("features"), "provenance.json")

    @cached_property
    def store(self) -> Path | None:
        """The store of films that the config names."""
        return self.find(self.config.get("store"), "store.json")

    @cached_property
    def notes(self) -> Path | None:
        """The folder of notes that the config names, for a fusion or for the EHR group `text`."""
        ehr = self.config.get("ehr")
        return self.find(
            self.config.get("notes") or (ehr.get("notes") if isinstance(ehr, dict) else None), "notes.parquet"
        )

    def find(self, given: Any, file: str) -> Path | None:
        """A folder of the config, from here or from a folder above the run, that holds `file`."""
        places = [place / str(given) for place in (Path(), *self.folder.resolve().parents) if given]
        return next((place for place in places if (place / file).is_file()), None)

    @property
    def predicted(self) -> bool:
        """Whether the run has test predictions; reads none."""
        return (self.folder / "predictions" / "test.parquet").is_file()

    @property
    def predictions(self) -> pd.DataFrame | None:
        """The run's test predictions: id, subject_id, label_*, logit_*; None where there are none."""
        return self._read_test()[0] if self.predicted else None

    @property
    def by_row(self) -> pd.DataFrame | None:
        """`predictions` indexed by sample_id, study_id or dicom_id, the first that is unique; None if none is."""
        return self._read_test()[1] if self.predicted else None

    def _read_test(self) -> tuple[pd.DataFrame, pd.DataFrame | None]:
        return _read_test(self.folder, (self.folder / "predictions" / "test.parquet").stat().st_mtime_ns)

    def row(
        self, label: str = "macro", metric: str = "auroc", subset: str = "all", split: str = "test"
    ) -> dict[str, Any] | None:
        """One number, with all training subjects; None where it is absent or has no value."""
        rows = plain(self.rows, subset, split)
        rows = (
            rows[(rows["label"] == label) & (rows["metric"] == metric) & rows["value"].notna()] if len(rows) else rows
        )
        return None if rows.empty else {str(key): value for key, value in rows.iloc[0].items()}

    @cached_property
    def labels(self) -> list[str]:
        """The labels of the test split, without the means over several."""
        rows = self.rows[self.rows["split"] == "test"]
        return [str(label) for label in dict.fromkeys(rows["label"]) if not is_macro(str(label))]

    @property
    def main(self) -> str:
        """The label that stands for the run: its only one, or the macro."""
        return self.labels[0] if len(self.labels) == 1 else "macro"

    def headline(self, metric: str = "auroc", subset: str = "all", split: str = "test") -> dict[str, Any] | None:
        """The main label's number."""
        return self.row(self.main, metric, subset, split)


@lru_cache(maxsize=8)  # the runs of a figure of curves: a report of many runs does not hold all their predictions
def _read_test(folder: Path, changed: int) -> tuple[pd.DataFrame, pd.DataFrame | None]:
    """`Run.predictions` and `Run.by_row`. `changed`: when the file was, so that an older table is not returned."""
    table = predictions(folder, "test")
    unique = [key for key in ("sample_id", "study_id", "dicom_id") if key in table and table[key].is_unique]
    return table, table.set_index(unique[0]) if unique and "subject_id" in table else None


SEED = re.compile(r"(^|[-_/])s(eed)?[-_=]?\d+(?=$|[-_/])")  # a part of a run's name


def methods(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Runs that differ by their seed alone: by the axes of their grid, or by their names, which hold it.

    A run that was read alone, or whose seed and encoder another of its name has too, is a method by itself.
    """
    found: dict[str, list[Run]] = {}
    for run in runs:
        found.setdefault(_method(run), []).append(run)
    alone: dict[str, list[Run]] = {}
    for name, group in found.items():
        trained = {(run.result.get("seed"), (run.result.get("compared_by") or {}).get("hash")) for run in group}
        same = len({(run.result.get("model"), run.task, run.kind) for run in group}) == 1
        one = len(group) > 1 and len(trained) == len(group) and same
        alone |= {name: group} if one else {run.name: [run] for run in group}
    return alone


def _method(run: Run) -> str:
    """The run's name without its seed."""
    grid = read_object(run.folder.parent.parent / "grid.json", GridJson).get("methods", {})
    if (name := grid.get(run.folder.parent.name)) is not None:
        return f"{name}/{run.folder.name}"
    return SEED.sub("", run.name).lstrip("-_/") or run.name


def trainings_of(run: Run) -> list[Run]:
    """The trainings of a run of several seeds, each with its own predictions; else the run."""
    folders = [folder for folder in each_training([run.folder]) if Path(folder) != run.folder]
    return [replace(run, folder=Path(f), result={**run.result, **read_results(f)[0]}) for f in folders] or [run]


def common_rows(runs: Sequence[Run]) -> pd.Index | None:
    """The test rows that all these runs scored; None if a run has no unique row id."""
    common: pd.Index | None = None
    for run in runs:
        if run.by_row is None:
            return None
        common = run.by_row.index if common is None else common.intersection(run.by_row.index)
    return common


def is_macro(label: str) -> bool:
    """Whether a label is a mean over labels: `macro`, `macro CheXpert-5`."""
    return label.split()[0] == "macro" if label else False


def plain(rows: pd.DataFrame, subset: str = "all", split: str = "test") -> pd.DataFrame:
    """Rows of one split and subset, with the most training subjects there were."""
    rows = rows[(rows["split"] == split) & (rows["subset"] == subset)]
    return rows[rows["fraction"] == rows["fraction"].max()]


def read_runs(folders: Sequence[str | Path]) -> list[Run]:
    """Read runs, in the order given; a folder that holds run folders stands for all of them.

    Raises: UserError: no such folder, not a run, or a damaged file.
    """
    found = find_runs(folders)
    return [read_run(path, name) for path, name in zip(found, _names(found), strict=True)]


def find_runs(folders: Sequence[str | Path]) -> list[Path]:
    """The run folders among these, or one or two levels below them, each once. Raises: UserError: none."""
    found: dict[Path, Path] = {}
    for folder in map(Path, folders):
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder; give run folders, e.g. runs/pretrain runs/probe")
        inside = (
            [folder]
            if (folder / MARK).is_file()
            else [p.parent for p in [*folder.glob(f"*/{MARK}"), *folder.glob(f"*/*/{MARK}")]]
        )
        if not inside:
            raise UserError(
                f"{folder}: neither a run ({MARK} beside results.json or metrics.jsonl) nor a folder of runs"
            )
        found |= {path.resolve(): path for path in sorted(inside) if path.resolve() not in found}
    return list(found.values())


def report_line(folder: Path) -> str:
    """The command that shows a run: with those beside it, if they are few enough for a page."""
    beside = len(list(folder.parent.glob(f"*/{MARK}")))
    return command_line("report", folder.parent if 1 < beside <= ON_A_PAGE else folder)


def _names(folders: Sequence[Path]) -> list[str]:
    """The folders' names, with as many parents as make them unique."""
    parts = [folder.resolve().parts for folder in folders]
    for depth in range(1, max((len(p) for p in parts), default=1) + 1):
        names = ["/".join(p[-depth:]) for p in parts]
        if len(set(names)) == len(names):
            return names
    return [folder.as_posix() for folder in folders]


def read_run(folder: Path, name: str) -> Run:
    """Read one run. Raises: UserError: a file in it is damaged."""
    result, rows = read_results(folder) if (folder / "results.json").is_file() else ({}, pd.DataFrame(columns=COLUMNS))
    path = folder / MARK
    config = read_yaml(path, RunConfig) if path.is_file() else {}
    said = read_object(folder / "provenance.json", Provenance)
    if (first := said.get("config")) and first != config:
        keys = [key for key in {**first, **config} if first.get(key) != config.get(key)]
        print(f"warning: {path}: differs from provenance.json in {', '.join(keys[:5])}", file=sys.stderr)
    return Run(
        folder=folder,
        name=name,
        called=name,
        config=config,
        provenance=said,
        metrics=as_table(folder / "metrics.jsonl", Logged),
        watched=as_table(folder / "probe.jsonl", Probed),
        encoder=read_object(folder / "encoder" / "encoder.json", EncoderJson),
        result=result,
        rows=rows,
    )


def read_object(path: Path, shape: Any) -> dict[str, Any]:
    """A JSON object; {} where the file is absent. Raises: UserError: damaged, or of another shape."""
    value: dict[str, Any] = read_json(path, shape) if path.is_file() else {}
    return value


def as_table(path: Path, shape: Any) -> pd.DataFrame:
    """JSON lines as a table, an object a row; nested objects become `a/b`. The last line may be cut short by a kill."""
    records = read_lines(path, shape) if path.is_file() else []
    return pd.json_normalize(records, sep="/") if records else pd.DataFrame()


def part(of: dict[str, Any], key: str) -> dict[str, Any]:
    """An object inside another; {} where there is none."""
    value = of.get(key)
    return value if isinstance(value, dict) else {}


def column(metrics: pd.DataFrame, *names: str) -> str | None:
    """The column whose path ends in one of the names, the first that is there."""
    for name in names:
        for key in metrics.columns:
            if str(key) == name or str(key).split("/")[-1] == name or str(key).endswith("/" + name):
                return str(key)
    return None
