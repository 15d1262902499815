"""EHR groups and tasks of a user's own file, named in a config as FILE.py:Class.

Input: a class that inherits from `Group` or `Task`. Output: what the shipped ones give, after checks: a group declares
the columns it reads and when it is known, and gets no others; a task's rows stay within their stays.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import pandas as pd

from configs import UserError
from configs.plugin import FORM, is_file, load_class
from ehr_features import schema
from ehr_features.schema import Column

__all__ = ["Group", "Scale", "Task", "file_of", "is_file", "load_group", "load_task", "task_name"]
ORDER = ("study", "admission", "discharge")
Scale = Callable[[str, np.ndarray], dict[str, np.ndarray]]  # name, (N,) values -> the column and its mask
NO_INPUT = ("finding", "id", "split", "subgroup", "link")  # groups of columns that are no record of a patient


class Group(ABC):
    """Columns of the record of a film, from columns of images.parquet."""

    reads: ClassVar[tuple[str, ...]]
    available_at: ClassVar[Literal["study", "admission", "discharge"]]  # not earlier than that of any column it reads

    @abstractmethod
    def columns(self, images: pd.DataFrame, scale: Scale) -> dict[str, np.ndarray]:
        """Name -> (N,) numbers without missing ones.

        Args:
            images: the columns in `reads`, a row per film.
            scale: `scale(name, values)` gives a column of mean 0 and deviation 1 on the train films, and
                NAME_missing.
        """


class Task(ABC):
    """Yes-or-no labels of ICU stays at hours of them: samples/NAME.parquet."""

    name: ClassVar[str]
    labels: ClassVar[tuple[str, ...]]

    @abstractmethod
    def rows(self, stays: pd.DataFrame, table: Callable[[str], pd.DataFrame]) -> pd.DataFrame:
        """A row per prediction: stay_id, predict_at_hours (since intime), and the labels: 1, 0 or missing.

        Args:
            stays: stay_id, hadm_id, subject_id, intime, outtime, los_hours, death_hours, age_years, sex, split.
            table: a raw table by its name, e.g. table("transfers").
        """


def file_of(word: str) -> Path:
    """The file of FILE.py:Class."""
    match = FORM.fullmatch(word)
    assert match is not None, "checked with is_file"
    return Path(match["file"]).expanduser()


def load_group(word: str) -> Group:
    """The group that FILE.py:Class names. Raises: UserError: it declares too little, or reads what it may not."""
    made = load_class(word, Group, "EHR group")  # type: ignore[type-abstract]
    for key in ("reads", "available_at"):
        if not hasattr(made, key):
            raise UserError(f"EHR group {word}: it does not declare `{key}`; see docs/plug_ins.md")
    if made.available_at not in ORDER:
        raise UserError(f"EHR group {word}: available_at is {made.available_at!r}; wanted {', '.join(ORDER)}")
    if isinstance(made.reads, str) or not made.reads:
        raise UserError(f"EHR group {word}: reads is {made.reads!r}; wanted a tuple of columns, e.g. ('age_years',)")
    for name in made.reads:
        column = _column(name)
        if column is None:
            raise UserError(f"EHR group {word}: reads `{name}`, which is no column of images.parquet (schema.json)")
        if column.group in NO_INPUT:
            raise UserError(
                f"EHR group {word}: reads `{name}` ({column.group}), which may not be an input: labels, ids and what "
                "is for subgroup reporting only"
            )
        if ORDER.index(column.available_at) > ORDER.index(made.available_at):
            raise UserError(
                f"EHR group {word}: declares available_at = {made.available_at!r}, but reads `{name}`, known at "
                f"{column.available_at} only"
            )
    return made()


def _column(name: str) -> Column | None:
    """A column of images.parquet; those of the last values before a film depend on channels.yaml."""
    if name.startswith(("vitals_", "labs_")):
        return Column("float64", group="record")
    return schema.IMAGES.get(name)


def encode_group(word: str, images: pd.DataFrame, scale: Scale) -> dict[str, np.ndarray]:
    """The columns of a group. Raises: UserError: none, not one number per film, or a missing number."""
    group = load_group(word)
    out = {name: np.asarray(values, float) for name, values in group.columns(images[list(group.reads)], scale).items()}
    if not out:
        raise UserError(f"EHR group {word}: columns() gave none")
    for name, values in out.items():
        if values.shape != (len(images),):
            raise UserError(f"EHR group {word}: column `{name}` has shape {values.shape}, wanted ({len(images)},)")
        if not np.isfinite(values).all():
            raise UserError(
                f"EHR group {word}: column `{name}` has {int((~np.isfinite(values)).sum())} missing values; use "
                "scale(), which adds a mask, or fill them"
            )
    return out


def load_task(word: str) -> Task:
    """The task that FILE.py:Class names. Raises: UserError: it declares too little."""
    made = load_class(word, Task, "tasks")  # type: ignore[type-abstract]
    for key in ("name", "labels"):
        if not getattr(made, key, None):
            raise UserError(f"tasks: {word} does not declare `{key}`; see docs/plug_ins.md")
    if not str(made.name).isidentifier():
        raise UserError(f"tasks: {word}: name is {made.name!r}; wanted letters, digits and _")
    if isinstance(made.labels, str):
        raise UserError(f"tasks: {word}: labels is {made.labels!r}; wanted a tuple of names, e.g. ('{made.labels}',)")
    if clash := sorted({*made.labels} & {*schema.SAMPLES}):
        raise UserError(f"tasks: {word}: labels {', '.join(clash)} are names of other columns")
    return made()


def task_name(word: str) -> str:
    """The name of samples/NAME.parquet."""
    return load_task(word).name if is_file(word) else word


def task_rows(word: str, stays: pd.DataFrame, table: Callable[[str], pd.DataFrame]) -> pd.DataFrame:
    """The rows of a task, sorted. Raises: UserError: a stay outside the cohort, an hour outside its stay, a row twice,
    a label other than 1, 0 or missing."""
    task = load_task(word)
    keys = ["stay_id", "predict_at_hours"]
    given = task.rows(stays.copy(), table)
    if missing := [name for name in [*keys, *task.labels] if name not in given]:
        raise UserError(f"tasks: {word}: rows() has no column {', '.join(missing)}; found {', '.join(map(str, given))}")
    rows = given[[*keys, *task.labels]].astype({"predict_at_hours": float}).reset_index(drop=True)
    if not len(rows):
        raise UserError(f"tasks: {word}: rows() gave no row")
    if len(alien := set(rows["stay_id"]) - set(stays["stay_id"])):
        raise UserError(f"tasks: {word}: {len(alien)} stay_id are not in the cohort; take them from `stays`")
    end = rows["stay_id"].map(stays.set_index("stay_id")["los_hours"])
    late = ~((rows["predict_at_hours"] >= 0) & (rows["predict_at_hours"] <= end))
    if late.any():
        raise UserError(
            f"tasks: {word}: {int(late.sum())} of {len(rows)} rows have predict_at_hours outside their stay, "
            "0 to los_hours"
        )
    if rows.duplicated(keys).any():
        raise UserError(f"tasks: {word}: {int(rows.duplicated(keys).sum())} rows repeat a stay_id and predict_at_hours")
    for name in task.labels:
        if not rows[name].dropna().isin([0, 1]).all():
            raise UserError(f"tasks: {word}: label `{name}` has values other than 1, 0 and missing")
    return rows.astype(dict.fromkeys(task.labels, "Int64")).sort_values(keys, ignore_index=True)
