"""The keys of `python -m ehr_features build CONFIG`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from configs import Settings

Task = Literal[
    "mortality", "phenotypes", "phenotypes_early", "decompensation", "length_of_stay", "findings"
]  # each writes samples/TASK.parquet
Storage = dict[str, dict[str, str | int | float | bool]]  # see ehr_features/raw/remote.py


def _memory(text: str) -> str:
    if not re.fullmatch(r"\d+(\.\d+)?\s*[MGT]B", text):
        raise ValueError("is a number and a unit, such as 4GB or 800MB")
    return text


class Findings(Settings):
    """How CheXpert's -1 (uncertain) and empty (not mentioned) become labels; the evaluation has its own policy."""

    uncertain: Literal["zeros", "ones", "ignore"] = "zeros"
    empty: Literal["zeros", "ignore"] = "zeros"
    eval_uncertain: Literal["zeros", "ones", "ignore"] = "ignore"
    eval_empty: Literal["zeros", "ignore"] = "zeros"


class FeaturesConfig(Settings):
    """Raw tables -> features/. Folders may be local or fsspec URLs; `out` and `cache` are local."""

    mimic_iv: Annotated[str, Field(min_length=1)]  # the folder that holds hosp/ and icu/ (and core/ in 1.0)
    mimic_cxr: str | None = None  # the folder of mimic-cxr-2.0.0-metadata.csv.gz; none: no films
    mimic_ed: str | None = None  # the folder that holds ed/; none: no emergency stays
    out: Path
    cache: Path | None = None  # filtered events and unnormalised series; default: OUT.cache beside `out`
    preset: Literal["default", "medfuse"] = "default"
    step_hours: Annotated[int, Field(ge=1, le=24)] = 1
    channels: Path | None = None  # your own channels.yaml in place of the shipped one
    tasks: tuple[Task, ...] = ("mortality", "phenotypes")
    landmark_hours: Annotated[int, Field(ge=1)] = 48  # mortality and phenotypes_early see the stay up to here
    gap_hours: Annotated[int, Field(ge=0)] = 0  # mortality: still alive and in the ICU this much later
    findings: Findings = Findings()
    ed_tolerance_hours: Annotated[float, Field(ge=0)] = 6.0  # film -> nearest emergency visit, outside of it
    split: str = "hash"  # hash | official | temporal | a file (csv, parquet) with subject_id, split
    seed: Annotated[int, Field(ge=0)] = 0
    engine: Literal["duckdb", "pyspark"] = "duckdb"
    memory: Annotated[str, AfterValidator(_memory)] = "4GB"
    threads: Annotated[int, Field(ge=1)] = 2
    storage: Storage = {}  # of URLs: protocol -> options of its file system, e.g. {gs: {requester_pays: my-project}}

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


# ---- The keys of `python -m ehr_features notes CONFIG`.

Filter = Literal["none", "standard", "aggressive"]


class NotesConfig(Settings):
    """features/ and the raw tables -> a folder with a note for each film that has a visit or an admission."""

    features: Path  # the extracted folder: films, links, age, sex, split
    mimic_iv: Annotated[str, Field(min_length=1)]  # the folder that holds hosp/; the one the features were made from
    mimic_ed: str | None = None  # the folder that holds ed/; none: admissions only
    out: Path
    filter: Filter = "standard"  # what the leak filter takes out; none: nothing
    template: Path | None = None  # your own in place of notes/template.txt
    abbreviations: Path | None = None  # your own in place of notes/abbreviations.csv
    engine: Literal["duckdb", "pyspark"] = "duckdb"
    memory: Annotated[str, AfterValidator(_memory)] = "4GB"
    threads: Annotated[int, Field(ge=1)] = 2
    storage: Storage = {}  # of URLs: protocol -> options of its file system, e.g. {gs: {requester_pays: my-project}}
    seed: Annotated[int, Field(ge=0)] = 0  # of the audit's resampling; the notes themselves have nothing random
