"""The keys of `python -m ehr_features notes CONFIG`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from configs import Settings
from ehr_features.config import Storage, _memory

Filter = Literal["none", "standard", "aggressive"]


class NotesConfig(Settings):
    """features/ and the raw tables -> a folder with a note for each film that has a visit or an admission."""

    features: Path  # the extracted folder: films, links, age, sex, split
    mimic_iv: Annotated[str, Field(min_length=1)]  # the folder that holds hosp/; the one the features were made from
    mimic_ed: str | None = None  # the folder that holds ed/; none: admissions only
    out: Path
    filter: Filter = "standard"  # what the leak filter takes out; none: nothing
    template: Path | None = None  # your own in place of notes_template.txt
    abbreviations: Path | None = None  # your own in place of abbreviations.csv
    engine: Literal["duckdb", "pyspark"] = "duckdb"
    memory: Annotated[str, AfterValidator(_memory)] = "4GB"
    threads: Annotated[int, Field(ge=1)] = 2
    storage: Storage = {}  # of URLs: protocol -> options of its file system, e.g. {gs: {requester_pays: my-project}}
    seed: Annotated[int, Field(ge=0)] = 0  # of the audit's resampling; the notes themselves have nothing random
