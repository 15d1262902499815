"""Trackers beside metrics.jsonl: TensorBoard, Weights & Biases, MLflow, CSV. Process 0 alone writes.

Input: the metrics of each training of a run, by step. Output: RUN/trackers/NAME/, for the tracker's own reader.
A resumed run goes on in the same tracker's run: what was logged after its checkpoint is dropped or not logged again.
"""

from __future__ import annotations

import csv
import importlib.util
import json
import math
import os
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from configs import UserError
from ehr_features.files import new_file
from ehr_features.typed import read_json
from pretrain.shapes import TrackerState

NAMES = ("tensorboard", "wandb", "mlflow", "csv")
FOLDER = "trackers"


class Tracker(Protocol):
    """What a tracker does; `part` names one training of a run with several, e.g. a fold; the main one is ""."""

    def begin(self, part: str, step: int) -> None:
        """A training starts or goes on: its metrics after `step` come again."""

    def log(self, part: str, values: Mapping[str, float], step: int) -> None: ...

    def close(self) -> None: ...


def check_trackers(names: Sequence[str]) -> None:
    """Raises: UserError: a tracker that is not installed."""
    absent = [name for name in names if name != "csv" and importlib.util.find_spec(name) is None]
    if absent:
        packages = " ".join({"mlflow": "mlflow-skinny"}.get(name, name) for name in absent)
        raise UserError(
            f"trackers: {', '.join(absent)} not installed: pip install {packages}; or leave them out of trackers="
        )


def open_trackers(
    names: Sequence[str], folder: Path, project: str, name: str | None, config: Mapping[str, Any]
) -> list[Tracker]:
    """The trackers of a run.

    Args:
        folder: the run folder; its name is the run's, unless there is a `name`.
        config: flat keys of the config, shown beside the curves.
    """
    made: dict[str, type[Any]] = {"tensorboard": TensorBoard, "wandb": Wandb, "mlflow": Mlflow, "csv": Csv}
    out = []
    for each in dict.fromkeys(names):
        place = folder / FOLDER / each
        place.mkdir(parents=True, exist_ok=True)
        out.append(made[each](place, project, name or folder.resolve().name, config))
    return out


def key_of(part: str, name: str) -> str:
    return f"{part}/{name}" if part else name


class Csv:
    """RUN/trackers/csv/metrics.csv: part, step, name, value."""

    HEADER = ("part", "step", "name", "value")

    def __init__(self, folder: Path, project: str, name: str, config: Mapping[str, Any]) -> None:
        self.path = folder / "metrics.csv"
        with new_file(folder / "run.json") as part:
            part.write_text(json.dumps({"project": project, "run": name, "config": dict(config)}), encoding="utf-8")

    def begin(self, part: str, step: int) -> None:
        rows = []
        if self.path.is_file():
            with self.path.open(newline="", encoding="utf-8") as file:
                found = [row for row in csv.reader(file) if len(row) == len(self.HEADER)]
            rows = [row for row in found[1:] if row[0] != part or int(row[1]) <= step]
        with new_file(self.path) as whole, whole.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([self.HEADER, *rows])

    def log(self, part: str, values: Mapping[str, float], step: int) -> None:
        with self.path.open("a", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([part, step, key, value] for key, value in values.items())

    def close(self) -> None:
        pass


class TensorBoard:
    """RUN/trackers/tensorboard/PROJECT/NAME/, each further part of the run in a folder of its own under it."""

    def __init__(self, folder: Path, project: str, name: str, config: Mapping[str, Any]) -> None:
        self.folder, self.config = folder / _as_folder(project) / _as_folder(name), config
        self.writers: dict[str, Any] = {}

    def begin(self, part: str, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writers[part] = SummaryWriter(str(self.folder / part), purge_step=step + 1)
        if not part and step == 0:
            rows = "".join(f"    {key}: {value}\n" for key, value in self.config.items())
            self.writers[part].add_text("config", rows)

    def log(self, part: str, values: Mapping[str, float], step: int) -> None:
        for key, value in values.items():
            self.writers[part].add_scalar(key, value, step)
        self.writers[part].flush()  # a killed run loses nothing that metrics.jsonl has

    def close(self) -> None:
        for writer in self.writers.values():
            writer.close()


class Mlflow:
    """A run in RUN/trackers/mlflow, or at MLFLOW_TRACKING_URI if that is set."""

    def __init__(self, folder: Path, project: str, name: str, config: Mapping[str, Any]) -> None:
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # a folder, not a database, travels with the run
        from mlflow import MlflowClient

        self.client = MlflowClient(os.environ.get("MLFLOW_TRACKING_URI") or folder.resolve().as_uri())
        kept = folder / "run_id.txt"
        if kept.is_file():
            self.run = kept.read_text(encoding="utf-8")
            self.client.update_run(self.run, "RUNNING")
        else:
            known = self.client.get_experiment_by_name(project)
            experiment = self.client.create_experiment(project) if known is None else known.experiment_id
            self.run = self.client.create_run(experiment, run_name=name).info.run_id
            for key, value in config.items():
                self.client.log_param(self.run, key, str(value)[:500])
            kept.write_text(self.run, encoding="utf-8")
        self.last: dict[str, int] = {}  # metric -> its last step; MLflow would keep a step twice

    def begin(self, part: str, step: int) -> None:
        for key in self.client.get_run(self.run).data.metrics:
            history = self.client.get_metric_history(self.run, key)
            self.last[key] = max(entry.step for entry in history)

    def log(self, part: str, values: Mapping[str, float], step: int) -> None:
        from mlflow.entities import Metric

        new = {key_of(part, key): value for key, value in values.items()}
        new = {key: value for key, value in new.items() if step > self.last.get(key, -1)}
        self.last |= dict.fromkeys(new, step)
        now = int(1000 * time.time())
        self.client.log_batch(self.run, metrics=[Metric(key, value, now, step) for key, value in new.items()])

    def close(self) -> None:
        self.client.set_terminated(self.run)


class Wandb:
    """A run of Weights & Biases in RUN/trackers/wandb; offline if WANDB_MODE says so, or without a login."""

    def __init__(self, folder: Path, project: str, name: str, config: Mapping[str, Any]) -> None:
        import wandb

        self.kept = folder / "run.json"
        state = read_json(self.kept, TrackerState) if self.kept.is_file() else {}
        self.id, self.last = state.get("id") or uuid.uuid4().hex[:8], dict[str, int](state.get("last", {}))
        login = bool(os.environ.get("WANDB_API_KEY")) or (Path.home() / ".netrc").is_file()
        mode: Any = os.environ.get("WANDB_MODE") or ("online" if login else "offline")
        self.run = wandb.init(
            project=project, name=name, id=self.id, dir=str(folder), resume="allow", mode=mode, config=dict(config),
            reinit="create_new", settings=wandb.Settings(silent=True, console="off"),
        )  # fmt: skip
        self.run.define_metric("*", step_metric="step")

    def begin(self, part: str, step: int) -> None:
        self._keep()

    def log(self, part: str, values: Mapping[str, float], step: int) -> None:
        if step <= self.last.get(part, -1):  # logged before the run was stopped
            return
        self.run.log({"step": step, **{key_of(part, key): value for key, value in values.items()}})
        self.last[part] = step
        self._keep()

    def _keep(self) -> None:
        with new_file(self.kept) as part:
            part.write_text(json.dumps({"id": self.id, "last": self.last}), encoding="utf-8")

    def close(self) -> None:
        self.run.finish()


def finite(values: Mapping[str, Any]) -> dict[str, float]:
    """The numbers among values."""
    plain = {key: value.item() if hasattr(value, "item") else value for key, value in values.items()}
    numbers = {key: float(value) for key, value in plain.items() if isinstance(value, int | float)}
    return {key: value for key, value in numbers.items() if math.isfinite(value)}


def _as_folder(name: str) -> str:
    return "".join(c if c.isalnum() or c in "-_. " else "_" for c in name).strip(". ") or "run"
