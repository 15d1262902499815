"""The JSON files of features/ and of notes, as data; `typed.read_json` refuses what is of another shape.

Keys that this version does not read, and those that only other versions write, are optional or not named.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from ehr_features.schema import DEATHS
from ehr_features.typed import Shape

Count = Annotated[int, Field(ge=0)]
Word = Annotated[str, Field(min_length=1)]
Number = float | None


def _text_or_object(value: Any) -> Any:
    weights = value.get("init") if isinstance(value, dict) else value
    if weights is not None and not isinstance(weights, str):
        raise ValueError("text, an object whose `init` is text or null, or null")
    return value


TextOrObject = Annotated[Any, AfterValidator(_text_or_object)]


class Given(Shape):
    """The keys of a saved config that other commands read; a config of another command has some of them."""

    features: str | None = None
    store: str | None = None
    notes: str | None = None
    mimic_iv: str | None = None
    mimic_ed: str | None = None
    mimic_cxr: str | None = None
    filter: str = "standard"
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0


class Ehr(Shape):
    """Section `ehr` of a pretraining's config."""

    groups: list[str] = []
    preset: Literal["default", "msn"] = "default"
    use: str | None = None
    notes: str | None = None


class Loss(Shape):
    """Section `loss` of a pretraining's config."""

    prototypes: Annotated[int, Field(gt=0)] | None = None


class OwnFilms(Shape):
    """Section `films` of a config."""

    layout: str | None = None
    table: str | None = None


class RunConfig(Given):
    """config.yaml of a run: the keys that other commands read."""

    encoder: TextOrObject = None
    model: str | None = None
    method: str | None = None
    ehr: Ehr | None = None
    loss: Loss | None = None
    films: OwnFilms | None = None
    optim: dict[str, Any] | None = None
    groups: list[str] | None = None
    freeze: bool | None = None


class OfRecord(Shape):
    """encoder.json: the groups of the record that its pretraining had, and when each is known."""

    ehr_groups: dict[str, Any] | None = None


class Source(Shape):
    """A raw table that was read."""

    table: str | None = None
    bytes: Count | None = None


class Provenance(Shape):
    """provenance.json of a features folder, notes or a run."""

    written_at: str | None = None
    finished_at: str | None = None
    versions: dict[str, str] = {}
    sources: dict[str, Source] = {}
    digests: dict[str, str] = {}
    config: Given | None = None
    key: str | None = None
    command: str | None = None
    rows_read: dict[str, Count] = {}
    rows_written: dict[str, Count] = {}
    warnings: list[str] = []


class Normaliser(Shape):
    mean: list[Number]
    std: list[Annotated[float, Field(gt=0)] | None]


class Imputation(Shape):
    normal: list[float]


class Fate(Shape):
    """What became of the events of a variable."""

    channel: str
    fate: str
    n: Count


class Series(Shape):
    """series.json: the columns of series.safetensors; the F values come before the marks of what was observed."""

    preset: Literal["default", "medfuse"] = "default"
    step_hours: Annotated[float, Field(gt=0, le=24)]
    columns: Annotated[list[Word], Field(min_length=1)]
    num_values: Annotated[int, Field(gt=0)]
    units: list[str]
    observed_of: list[Count]
    imputation: Imputation
    normaliser: Normaliser
    events: list[Fate] = []

    @model_validator(mode="after")
    def _fits(self) -> Series:
        lengths = {
            "observed_of": len(self.observed_of),
            "imputation.normal": len(self.imputation.normal),
            "normaliser.mean": len(self.normaliser.mean),
            "normaliser.std": len(self.normaliser.std),
        }
        if odd := [name for name, length in lengths.items() if length != self.num_values]:
            raise ValueError(f"as many numbers in {odd[0]} as num_values says, {self.num_values}")
        marks = len(self.columns) - self.num_values
        if len(self.units) != len(self.columns) or len(set(self.columns)) != len(self.columns):
            raise ValueError("columns of different names, and a unit for each")
        if marks <= max(self.observed_of):
            raise ValueError("in observed_of numbers of columns that mark what was observed")
        if any((m is None) != (s is None) for m, s in zip(self.normaliser.mean, self.normaliser.std, strict=True)):
            raise ValueError("a mean and a deviation for each column that is normalised")
        return self


class ColumnSaid(Shape):
    type: Annotated[str, Field(pattern=r"^(int64|string|float64|timestamp|date|boolean|list<.+>)$")]
    unit: str
    group: str
    available_at: Literal["study", "admission", "discharge"]


SchemaJson = dict[str, dict[str, ColumnSaid]]  # schema.json: table -> column


class Exclusion(Shape):
    table: str
    why: str
    before: Count
    after: Count
    num_ids: Count | None = None

    @model_validator(mode="after")
    def _falls(self) -> Exclusion:
        if self.after > self.before:
            raise ValueError("no more rows after a rule than before it")
        return self


class Scan(Shape):
    """A cache of events: the rows of the raw table, and those without an id."""

    rows_read: Count
    dropped: Count


def _counts(value: dict[str, Any]) -> dict[str, Any]:
    deaths = value.get(DEATHS, {})
    if not isinstance(deaths, dict) or not all(type(n) is int and n >= 0 for n in deaths.values()):
        raise ValueError(f"whole numbers under `{DEATHS}`")
    if odd := [key for key, n in value.items() if n is None or (isinstance(n, (int, float)) and n < 0)]:
        raise ValueError(f"0 or more as `{odd[0]}`")
    return value


class AttritionJson(Shape):
    exclusions: list[Exclusion]
    counts: Annotated[dict[str, Any], AfterValidator(_counts)] = {}


def _rates(value: Any) -> Any:
    for part in value.values() if isinstance(value, dict) else [value]:
        if isinstance(part, dict):
            _rates(part)
        elif part is not None and (isinstance(part, bool) or not isinstance(part, (int, float)) or part < 0):
            raise ValueError("numbers of 0 or more at every leaf")
    return value


class Truth(Shape):
    """truth.json of the synthetic hospital: the best possible AUROC of each task, and counts."""

    bayes: Annotated[dict[str, Any], AfterValidator(_rates)] = {}
    seed: int | None = None
    shuffled: bool = False
