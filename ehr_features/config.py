"""The keys of the commands `features` and `notes`, and the types that other commands share with them."""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Annotated, Literal, NamedTuple, get_args

from pydantic import AfterValidator, Field, field_validator, model_validator

from configs import Settings
from configs.loader import Seed
from configs.plugin import is_file

Task = Literal["mortality", "phenotypes", "phenotypes_early", "decompensation", "length_of_stay", "findings"]
Filter = Literal["none", "standard", "aggressive"]
Uncertain = Literal["zeros", "ones", "ignore"]
Empty = Literal["zeros", "ignore"]


class Policy(NamedTuple):
    """What -1 (uncertain) and an empty finding become; `ignore` leaves the label out."""

    uncertain: Uncertain
    empty: Empty


SAMPLES = Policy("zeros", "zeros")  # train rows of samples/findings, unless `features` is told otherwise
TRAINING = Policy("ignore", "zeros")  # `probe` (unless its table's layout has another `empty`), `fuse`, `Records`
EVALUATION = Policy("ignore", "zeros")  # val and test, everywhere

TEXT_GROUP = "text"  # the EHR group that pretraining reads from a film's note (pretrain/text/notes.py)


LEAST_MB = 500  # Python and its libraries take 300 of it
MOST_MB = 1_000_000_000


def limit(text: str) -> str:
    """A limit of memory, as written."""
    if megabytes(text) < LEAST_MB:
        raise ValueError(f"is {LEAST_MB}MB or more: Python and its libraries take 300MB of it")
    if megabytes(text) > MOST_MB:
        raise ValueError("is 1000TB or less")
    return text


def megabytes(text: str) -> float:
    """`4GB` -> 4000."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([MGT]B)", text)
    if found is None:
        raise ValueError("is a number and a unit, such as 4GB or 800MB")
    return float(found[1]) * {"MB": 1, "GB": 1000, "TB": 1_000_000}[found[2]]


def _of_spark(settings: dict[str, str | int | float | bool]) -> dict[str, str | int | float | bool]:
    if other := [name for name in settings if not name.startswith("spark.")]:
        raise ValueError(f"holds settings of Spark, such as spark.master; got {', '.join(other)}")
    return settings


Engine = Annotated[
    Literal["duckdb", "pyspark"],
    Field(description="Engine of the tables: duckdb in this process, or pyspark when one machine is not enough."),
]
Memory = Annotated[
    str,
    AfterValidator(limit),
    Field(
        description="Memory limit of the engine, a number and MB, GB or TB (500MB or more); it spills to disk beyond."
    ),
]
Threads = Annotated[int, Field(ge=1, le=1024, description="Threads of the engine.")]
Spark = Annotated[
    dict[str, str | int | float | bool],
    AfterValidator(_of_spark),
    Field(description="Settings of Spark, e.g. {spark.master: yarn}; others are those of the cluster."),
]
Storage = Annotated[
    dict[str, dict[str, str | int | float | bool]],
    Field(description="Options of each URL protocol's file system, e.g. {gs: {requester_pays: my-project}}."),
]


class Findings(Settings):
    """How CheXpert's -1 (uncertain) and empty (not mentioned) become the labels of samples/findings."""

    uncertain: Uncertain = Field(
        default=SAMPLES.uncertain,
        description="What -1 becomes in training: ignore leaves the label out, zeros and ones make it 0 or 1.",
    )
    empty: Empty = Field(
        default=SAMPLES.empty,
        description="What an empty finding becomes in training: ignore leaves it out, zeros makes it 0.",
    )
    eval_uncertain: Uncertain = Field(
        default=EVALUATION.uncertain, description="What -1 becomes in the val and test splits."
    )
    eval_empty: Empty = Field(
        default=EVALUATION.empty, description="What an empty finding becomes in the val and test splits."
    )


class FeaturesConfig(Settings):
    """Raw tables -> features/. Folders may be local or fsspec URLs; `out` and `cache` are local."""

    mimic_iv: str = Field(min_length=1, description="Folder of MIMIC-IV that holds hosp/ and icu/ (and core/ in 1.0).")
    mimic_cxr: str | None = Field(
        default=None, description="Folder of MIMIC-CXR-JPG that holds mimic-cxr-2.0.0-metadata.csv.gz; null: no films."
    )
    mimic_ed: str | None = Field(
        default=None, description="Folder of MIMIC-IV-ED that holds ed/; null: no emergency department stays."
    )
    out: Path = Field(description="The features/ folder to write.")
    cache: Path | None = Field(
        default=None, description="Folder of filtered events and unnormalised series; null: OUT.cache beside `out`."
    )
    preset: Literal["default", "medfuse"] = Field(
        default="default",
        description="Cohort, series, labels and linking: ours (default), or MedFuse's as published (medfuse).",
    )
    step_hours: int = Field(default=1, ge=1, le=24, description="Hours in a bin of the series.")
    channels: Path | None = Field(default=None, description="Your own channels.yaml in place of the shipped one.")
    tasks: tuple[str, ...] = Field(
        default=("mortality", "phenotypes"),
        description=f"Tasks to write, each becomes samples/TASK.parquet: {', '.join(get_args(Task))}, or one of your "
        "own, FILE.py:Class (docs/plug_ins.md).",
    )
    landmark_hours: int = Field(
        default=48,
        ge=1,
        le=10**5,
        description="Hours of a stay that the tasks mortality and phenotypes_early may read.",
    )
    gap_hours: int = Field(
        default=0,
        ge=0,
        le=10**5,
        description="Hours after the landmark for which a mortality sample is still alive and in the ICU.",
    )
    findings: Findings = Findings()
    ed_tolerance_hours: float = Field(
        default=6.0,
        ge=0,
        le=1e4,
        description="Largest gap in hours between a film and the emergency visit it is linked to.",
    )
    record_window_hours: float = Field(
        default=24,
        ge=0,
        le=8760,
        description="How many hours before its film the last vital sign or laboratory value may lie, for the EHR "
        "groups vitals and labs; 0: no such columns in images.parquet.",
    )
    split: str = Field(
        default="hash",
        description="How subjects are split: hash, official, temporal, or a file (csv, parquet) of subject_id, split.",
    )
    seed: Seed = Field(default=0, description="Seed of the hash split.")
    engine: Engine = "duckdb"
    memory: Memory = "4GB"
    threads: Threads = 2
    spark: Spark = {}
    storage: Storage = {}

    @field_validator("tasks")
    @classmethod
    def _known_tasks(cls, tasks: tuple[str, ...]) -> tuple[str, ...]:
        for task in tasks:
            if task not in get_args(Task) and not is_file(task):
                near = difflib.get_close_matches(task, get_args(Task), n=1)
                hint = f"did you mean `{near[0]}`? " if near else ""
                raise ValueError(f"`{task}`: {hint}wanted {', '.join(get_args(Task))}, or FILE.py:Class")
        return tasks

    @model_validator(mode="after")
    def _consistent(self) -> FeaturesConfig:
        if self.preset == "medfuse" and self.step_hours != 1:
            raise ValueError("preset `medfuse` is defined for step_hours=1; drop step_hours or use preset=default")
        if self.preset == "medfuse" and self.channels is not None:
            raise ValueError("preset `medfuse` has its own 17 variables; drop channels or use preset=default")
        if self.landmark_hours % self.step_hours:
            raise ValueError("`landmark_hours` is a multiple of `step_hours`, or the last bin would run past it")
        if "findings" in self.tasks and self.mimic_cxr is None:
            raise ValueError("task `findings` needs mimic_cxr")
        return self

    @property
    def cache_folder(self) -> Path:
        return self.cache or self.out.with_name(self.out.name + ".cache")


class NotesConfig(Settings):
    """features/ and the raw tables -> a folder with a note for each film that has a visit or an admission."""

    features: Path = Field(description="The features/ folder: films, links, age, sex and split.")
    mimic_iv: str = Field(
        min_length=1, description="Folder of MIMIC-IV that holds hosp/; the one that the features were made from."
    )
    mimic_ed: str | None = Field(
        default=None, description="Folder of MIMIC-IV-ED that holds ed/; null: admissions only."
    )
    out: Path = Field(description="The folder of notes to write.")
    filter: Filter = Field(
        default="standard", description="What the leak filter takes out of the notes; none: nothing."
    )
    template: Path | None = Field(
        default=None, description="Your own text file in place of ehr_features/notes/template.txt."
    )
    abbreviations: Path | None = Field(
        default=None, description="Your own table in place of ehr_features/notes/abbreviations.csv."
    )
    engine: Engine = "duckdb"
    memory: Memory = "4GB"
    threads: Threads = 2
    spark: Spark = {}
    storage: Storage = {}
    seed: Seed = Field(
        default=0,
        description="Seed of the audit's resampling; the notes themselves have nothing random.",
    )
