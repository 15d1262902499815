"""The keys of a table of films (`films.table=...`), and of a layout: the meaning of its columns, as a YAML file.

Imports no pandas, so that `--help` is quick.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from configs import Settings, UserError, load
from configs.loader import Seed
from ehr_features.config import Empty
from ehr_features.schema import Split

LAYOUTS = Path(__file__).parent / "layouts"
Names = list[str]  # columns, of which a table's first is taken; of a table, one is enough
Word = float | str | None


def _as_text(given: Any) -> Any:
    """Words that YAML reads as numbers, as text: {0: F, 1: M}."""
    return {str(word): meaning for word, meaning in given.items()} if isinstance(given, dict) else given


SexWords = Annotated[dict[str, Literal["M", "F"] | None], BeforeValidator(_as_text)]


def _pattern(text: str) -> str:
    try:
        groups = set(re.compile(text).groupindex)
    except re.error as error:
        raise ValueError(f"is no regular expression ({error})") from None
    if not groups or groups - {"film", "subject", "study"}:
        raise ValueError("names none but the groups (?P<film>), (?P<subject>) and (?P<study>), and at least one")
    return text


class Columns(Settings):
    """A table of films that are not in a features/ folder, one row a film, and what its columns mean.

    `none` in place of a column: the table has no such column, whatever the names of its columns are.
    """

    layout: str = Field(
        default="csv",
        description="Layout of the table: csv (any table), chexpert, padchest, vindr, rsna, nih, brax, or a YAML "
        "file of your own (docs/your_own_films.md).",
    )
    table: str | None = Field(
        default=None, description="The table (.csv, .csv.gz, .parquet); official splits are looked for beside it."
    )
    images: str | None = Field(
        default=None, description="The folder that the films' paths begin in; null: the folder of the table."
    )
    size: int = Field(
        default=256, ge=16, le=4096, description="Side in pixels of the packed films, where `store` is not given."
    )
    names: Literal["own", "chexpert"] = Field(
        default="own", description="Labels: the table's own, or those that CheXpert has too, under CheXpert's names."
    )
    path: str | None = Field(default=None, description="Column of the films' paths; null: the layout's.")
    columns: list[str] = Field(
        default=[],
        description="Label columns: 1, 0, -1 (uncertain) or empty; []: the layout's, else every column of 1, 0, -1.",
    )
    subject: str | None = Field(
        default=None,
        description="Column of the subject; null: the layout's; without any, each film is a subject of its own.",
    )
    study: str | None = Field(
        default=None, description="Column of the study; null: the layout's; without any, each film is one."
    )
    split: str | None = Field(
        default=None,
        description="Column of train, val and test; null: the layout's; without any, 70 / 10 / 20 by hash of the "
        "subject.",
    )
    view: str | None = Field(
        default=None, description="Column of the view; null: the layout's; without any, all films are frontal."
    )
    sex: str | None = Field(default=None, description="Column of the sex; null: the layout's.")
    age: str | None = Field(
        default=None, description="Column of the age in years, or as DICOM has it (058Y); null: the layout's."
    )
    taken_at: str | None = Field(default=None, description="Column of the film's date or time; null: the layout's.")
    sex_words: SexWords = Field(
        default={}, description="Meaning of the words for sex beside M, F, male and female, e.g. {m: M, w: F, d: null}."
    )
    categories: list[str] = Field(
        default=[], description="Columns of numbers that are codes: as EHR groups one-hot, not scaled."
    )
    outcomes: list[str] = Field(
        default=[],
        description="Columns that are known only after the film, e.g. died: the encoder is named outcome-supervised.",
    )
    seed: Seed = Field(
        default=0, description="Seed of the split by hash; keep it the same in pretrain, probe and fuse."
    )


class TableConfig(Columns):
    """Films that are not in a features/ folder: a table of them, and what its columns mean."""

    table: str = Field(description="The table (.csv, .csv.gz, .parquet); official splits are looked for beside it.")


class LabelsOf(Settings):
    """Where a layout's labels stand: in columns of their own, or as words in one column."""

    columns: list[str] = Field(default=[], description="One column a label: 1, 0, -1 (uncertain) or empty.")
    values: Annotated[dict[str, Word], BeforeValidator(_as_text)] = Field(
        default={}, description="Other values of those columns, e.g. {yes: 1, u: -1}."
    )
    words_in: str | None = Field(default=None, description="Instead: a column that names the labels of a film.")
    separator: str = Field(default="|", description="Between the words of that column.")
    around: str = Field(default="", description="Characters around a word that are no part of it.")
    words: dict[str, Names] = Field(
        default={}, description="Label -> the words that mean it; a film with none of them is negative."
    )
    empty: Empty = Field(
        default="zeros", description="What an empty label means in evaluation: zeros (not named) or ignore (unknown)."
    )
    readers: Literal["one", "any", "majority"] = Field(
        default="one",
        description="Rows of a film: one; several boxes or readers, positive if any or the majority says so.",
    )
    other_names: dict[str, str] = Field(default={}, description="A label column's name in some files -> its name here.")
    as_chexpert: dict[str, str] = Field(default={}, description="Label -> the one of CheXpert's that it is part of.")


class Layout(Settings):
    """What the columns of a table of films mean: a role is a list of columns, of which the first present is taken."""

    path: Names = Field(min_length=1, description="Columns of the film's path, or of its id.")
    film: Names = Field(default=[], description="Columns of the film's id; without any, the path's file name.")
    pattern: Annotated[str, AfterValidator(_pattern)] | None = Field(
        default=None, description="Regular expression of the path with groups (?P<film>), (?P<subject>), (?P<study>)."
    )
    subject: Names = Field(default=[], description="Columns of the subject.")
    study: Names = Field(default=[], description="Columns of the study.")
    split: Names = Field(default=[], description="Columns of train, val and test.")
    view: Names = Field(default=[], description="Columns of the view.")
    view_words: Annotated[dict[str, str | None], BeforeValidator(_as_text)] = Field(
        default={}, description="Views as the table names them -> AP, PA, ..."
    )
    view_default: str | None = Field(default=None, description="View where none is named; null: unknown.")
    lateral: dict[str, str] = Field(
        default={}, description="Column -> the word by which a film is lateral, whatever the view's column says."
    )
    lateral_path: str | None = Field(
        default=None, description="Part of a path by which a film is lateral, where those columns say nothing."
    )
    sex: Names = Field(default=[], description="Columns of the sex.")
    sex_words: SexWords = Field(
        default={}, description="Meaning of the words for sex beside M, F, male and female; null: unknown."
    )
    age: Names = Field(default=[], description="Columns of the age in years, or as DICOM has it (058Y).")
    age_words: Annotated[dict[str, float], BeforeValidator(_as_text)] = Field(
        default={}, description="Ages that are no number, e.g. {85 or more: 85}."
    )
    birth_year: Names = Field(default=[], description="Columns of the year of birth; with taken_at they give the age.")
    odd_ages: Literal["refuse", "missing"] = Field(
        default="refuse", description="Ages that are no number, or not from 0 to 120 years: refused, or missing."
    )
    taken_at: Names = Field(default=[], description="Columns of the date or time of the film.")
    files: dict[Split, Names] = Field(
        default={}, description="Split -> the names of its table; the first that lies beside the given one is read."
    )
    lists: dict[Literal["train", "test"], str] = Field(
        default={}, description="Split -> a text file beside the table that lists its films."
    )
    labels: LabelsOf = LabelsOf()

    @model_validator(mode="after")
    def _one_form(self) -> Layout:
        if self.labels.columns and self.labels.words_in:
            raise ValueError("labels: wanted one of `columns` and `words_in`")
        if bool(self.labels.words_in) != bool(self.labels.words):
            raise ValueError("labels: `words_in` (the column) and `words` (label -> words) go together")
        return self


def layouts() -> dict[str, Path]:
    """The shipped layouts: name -> file."""
    return {path.stem: path for path in sorted(LAYOUTS.glob("*.yaml"))}


def find_layout(name: str) -> Layout:
    """A shipped layout by its name, or a file. Raises: UserError: neither, or a fault in the file."""
    if (path := layouts().get(name)) is None:
        if not name.endswith((".yaml", ".yml")):
            raise UserError(f"films.layout={name}: wanted {', '.join(layouts())}, or a YAML file of your own")
        path = Path(name)
    return load(Layout, path)
