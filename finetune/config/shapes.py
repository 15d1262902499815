"""The files that the commands of finetune/ write, as data; `typed` refuses what is of another shape.

results.json has its own models in results.py, which also write it.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, Field, model_validator

from ehr_features.schema import Column
from ehr_features.typed import Shape
from ehr_features.typed.shapes import Count, Word


class Head(Shape):
    """head.json of a linear probe."""

    labels: Annotated[list[Word], Field(min_length=1)]
    pools: Annotated[list[Word], Field(min_length=1)]
    encoder: str
    encoder_hash: str
    unlearned: dict[str, str] = {}
    thresholds: list[Annotated[float, Field(ge=0, le=1)] | None]

    @model_validator(mode="after")
    def _fits(self) -> Head:
        if len(self.thresholds) != len(self.labels) or len(set(self.labels)) != len(self.labels):
            raise ValueError("labels of different names, and a threshold for each")
        return self


class GridJson(Shape):
    """grid.json: combinations of a grid, each with the method that it is a training of."""

    methods: Annotated[dict[str, str], Field(min_length=1)]
    axes: dict[str, dict[str, str]] = {}
    steps: Annotated[list[Word], Field(min_length=1)] = ["probe"]


class DemoSettings(Shape):
    subjects: Count
    seed: int
    shuffled: bool


class DemoStep(Shape):
    words: str
    seconds: Annotated[float, Field(ge=0)]


class DemoJson(Shape):
    """demo.json: the steps that are done."""

    settings: DemoSettings
    steps: dict[str, DemoStep]


class Trial(Shape):
    """trial.json of a search."""

    val_auroc: Annotated[float, Field(ge=0, le=1)] | None
    val_loss: float


def _logged(value: Any) -> Any:
    if not isinstance(value, dict) or type(value.get("step", 0)) is not int:
        raise ValueError("an object with a whole number as `step`")
    if odd := [key for key, one in value.items() if type(one) not in (int, float, type(None))]:
        raise ValueError(f"a number or null as `{odd[0]}`")
    return value


Logged = Annotated[Any, AfterValidator(_logged)]  # a line of metrics.jsonl


class Probed(Shape):
    """A line of probe.jsonl."""

    step: Count


class Embedded(Shape):
    """What `embed` notes in its file."""

    encoder: str
    key: str
    pool: Word
    left_out: Count
    content: Word | None = None


class ComparedBy(Shape):
    """What every row of a comparison carries about an encoder."""

    hash: str | None = None
    parameters: Count | None = None
    image_size: Count | None = None
    step: Count | None = None
    arch: str | None = None
    films_seen: Count | None = None
    films_trained: Count | None = None
    processor_seconds: Annotated[float, Field(ge=0)] | None = None
    weights: str | None = None
    method: str | None = None
    record: list[str] | None = None
    record_use: str | None = None
    permuted: bool | None = None


class Guard(Shape):
    """Numbers of subjects by which the guard against leaks judged an encoder."""

    held_out: Count
    seen: Count
    both: Count


class Shift(Shape):
    """A probe that was trained on some groups and tested on others."""

    says: str = ""


PREDICTION = {  # of predictions/SPLIT.parquet, by the beginning of a column's name
    "label_": Column("float64", among=(0, 1)),
    "logit_": Column("float64"),
}
PREDICTED = {  # its other columns
    "subject_id": Column("id", null=False),
    "sample_id": Column("id"),
    "study_id": Column("id"),
    "dicom_id": Column("id"),
}
ROW_IDS = ("sample_id", "dicom_id", "study_id")  # one of them tells the rows apart
