"""The files that the commands of pretrain/ write, as data; `typed` refuses what is of another shape.

Keys that this version does not read, and those that only other versions write, are optional or not named.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from ehr_features.schema import INT, SPLITS, TEXT, Column, Split
from ehr_features.typed import Shape
from ehr_features.typed.shapes import Count, Word

Side = Annotated[int, Field(ge=1, le=16_384)]  # pixels
Encoding = Literal["raw", "jpeg"]
Dicom = Literal["mimic-jpg", "window"]


class SquareJson(Shape):
    """How a film's file becomes a square of the store."""

    resize: Side
    dicom: Dicom
    encoding: Encoding = "raw"


class Plan(Shape):
    """packing.json, and `plan` of store.json: settings that must be equal to go on."""

    format: int
    size: Side | None = None
    encoding: Encoding = "raw"
    num_films: Count | None = None


def _framed(value: list[Any]) -> list[Any]:
    start, stop, sha = value
    if not (type(start) is int and type(stop) is int and 0 <= start <= stop and isinstance(sha, str)):
        raise ValueError("where a shard's films begin and end, and a hash")
    return value


Frame = Annotated[list[Any], Field(min_length=3, max_length=3), AfterValidator(_framed)]


class StoreJson(Shape):
    """store.json."""

    format: int
    size: Side
    hash: Word
    preprocess: SquareJson
    shards: dict[Annotated[str, Field(pattern=r"^shard-\d{5}\.arrow$")], Count]
    frames: dict[str, Frame] = {}
    num_films: Count | None = None
    num_rejected: Count | None = None
    plan: Plan = Plan(format=1)

    @model_validator(mode="after")
    def _fits(self) -> StoreJson:
        if sorted(self.shards) != [f"shard-{i:05d}.arrow" for i in range(len(self.shards))] or not self.shards:
            raise ValueError("the shards 00000, 00001, ... without a gap")
        if self.preprocess.resize != self.size:
            raise ValueError(f"preprocess.resize as size, {self.size}")
        return self


INDEX: dict[str, Column] = {  # index.parquet of a store
    "dicom_id": Column(TEXT, null=False, unique=True),
    "shard": Column(INT, null=False, low=0),
    "row": Column(INT, null=False, low=0),
    "height": Column(INT, null=False, low=1),
    "width": Column(INT, null=False, low=1),
}
SEEN: dict[str, Column] = {  # seen_subjects.parquet of a run
    "subject_id": Column("id", null=False),
    "split": Column(TEXT, group="split", among=SPLITS),
}


def _numbers(value: Any) -> Any:
    parts = value if isinstance(value, list) and value else [value]
    if value is not None and not all(isinstance(p, (int, float)) and not isinstance(p, bool) for p in parts):
        raise ValueError("a number, or one for each channel")
    return value


def _positive(value: Any) -> Any:
    if value is not None and min(value if isinstance(value, list) else [value]) <= 0:
        raise ValueError("more than 0")
    return value


Numbers = Annotated[Any, AfterValidator(_numbers)]


class PreprocessJson(Shape):
    """How a film becomes an encoder's input."""

    resize: Side
    normalise: Literal["crop", "film", "dataset"] = "crop"
    mean: Numbers = None
    std: Annotated[Any, AfterValidator(_numbers), AfterValidator(_positive)] = None
    store: SquareJson | None = None

    @model_validator(mode="after")
    def _complete(self) -> PreprocessJson:
        if self.normalise == "dataset" and (self.mean is None or self.std is None):
            raise ValueError("mean and std, by which `normalise` of dataset divides")
        return self


def _arguments(value: Any) -> Any:
    """Of timm's constructors: no number of them is larger than `MOST`, so that none builds for hours."""
    for part in value.values() if isinstance(value, dict) else value if isinstance(value, list) else [value]:
        if isinstance(part, (dict, list)):
            _arguments(part)
        elif isinstance(part, (int, float)) and not -MOST <= part <= MOST:
            raise ValueError(f"no number above {MOST:,}")
    return value


MOST = 65_536


def _when(value: Any) -> Any:
    at = value.get("available_at") if isinstance(value, dict) else value
    if at not in ("study", "admission", "discharge"):
        raise ValueError("study, admission or discharge")
    return value


class Readable(Shape):
    """How well a column of the record can be read from frozen features."""

    metric: Literal["auroc", "r2"]
    value: float
    chance: float


class Before(Shape):
    """The weights from which a run started."""

    weights: str
    films: Literal["known", "unknown"]
    card: str = ""


class EncoderJson(Shape):
    """encoder.json."""

    arch: Word
    model_args: Annotated[dict[str, Any], AfterValidator(_arguments)]
    in_chans: Annotated[int, Field(ge=1, le=64)]
    width: Annotated[int, Field(ge=1, le=MOST)]
    image_size: Side
    pool: Word
    preprocess: PreprocessJson
    norm_eps: Annotated[float, Field(gt=0, lt=1)] | None = None
    step: Count | None = None
    branch: Literal["target", "anchor"] | None = None
    method: Word | None = None
    ehr_groups: dict[str, Annotated[Any, AfterValidator(_when)]] | None = None
    ehr: dict[str, Any] | None = None
    splits_seen: list[Split] | None = None
    num_films: Count | None = None
    num_subjects: Count | None = None
    films_trained: Count | None = None
    processor_seconds: Annotated[float, Field(ge=0)] | None = None
    precision: Literal["no", "bf16", "fp16"] | None = None
    datasets: list[str] | None = None
    config_hash: str | None = None
    features_hash: str | None = None
    store_hash: str | None = None
    readability: dict[str, Readable] | None = None
    supervised_by: str | None = None
    started_from: Before | None = None
    text: dict[str, Any] | None = None


class ProbeRun(Shape):
    """What a probe's results.json says of its run."""

    task: Word | None = None
    model: Word | None = None
    encoder: str | None = None


class ProbeRow(Shape):
    """A number of a probe's results.json."""

    metric: Word
    value: float | None = None
    low: float | None = None
    high: float | None = None


class ProbeResults(Shape):
    """results.json of a probe, as model cards cite it."""

    run: ProbeRun = ProbeRun()
    rows: list[ProbeRow] = []


class Budget(Shape):
    """budget.json: the steps that a run can afford."""

    processor_seconds: Annotated[float, Field(gt=0)]
    seconds_of_a_step: Annotated[float, Field(gt=0)]
    steps: Annotated[int, Field(gt=0)]


class Knowledge(Shape):
    """knowledge.json of a folder of notes."""

    filter: str
    passages: Count
    passages_changed_by_filter: Count
    passages_emptied: Count
    passages_truncated: Count
    notes: Count
    notes_with_passages: Count


class Module(Shape):
    """A module of a sentence-transformers folder."""

    type: Word


class WeightIndex(Shape):
    """model.safetensors.index.json: which file holds a tensor."""

    weight_map: Annotated[dict[str, Word], Field(min_length=1)]


class TrackerState(Shape):
    """run.json of a tracker: its id, and the last step of each part that was logged."""

    id: str | None = None
    last: dict[str, Count] = {}
