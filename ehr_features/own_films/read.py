"""Read a table of films: the one reader of `images`, `pretrain`, `probe` and `fuse`.

Input: the keys of a table (`films.table=...`) and its layout. Output: `FilmsTable`: a row per film under our names, its
other columns, and its labels if they are asked for. Ids and split depend on the table alone, never on the command.

Official splits are kept; without a val split, an eighth of the train subjects becomes val, by hash. Without an official
split all subjects are split 70 / 10 / 20 by hash.
"""

from __future__ import annotations

import difflib
import hashlib
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd

from configs import UserError
from ehr_features.config import Empty
from ehr_features.files import digest, named
from ehr_features.own_films import values
from ehr_features.own_films.config import Layout, TableConfig, find_layout
from ehr_features.own_films.ids import film_id, film_ids, subject_numbers
from ehr_features.own_films.labels import label_columns, labels_of, of_all_readers
from ehr_features.raw.remote import is_url, user_table
from ehr_features.splits import by_hash

ROLES = ("path", "film", "subject", "study", "split", "view", "sex", "age", "birth_year", "taken_at")
GIVEN = ("path", "subject", "study", "split", "view", "sex", "age", "taken_at")  # roles that films.ROLE= names too
NONE = "none"  # films.ROLE=none: the table has no such column, whatever its names
VAL_OF_TRAIN = 0.125  # as 10 of 80


@dataclass(frozen=True)
class FilmsTable:
    """N films.

    Attributes:
        films: dicom_id, study_id, subject_id, split, view, taken_at, file (the path as the table has it), and
            sex and age_years where the table has them; index 0 .. N - 1.
        columns: the table's columns, as they are, N rows; the index counts the lines of the file.
        labels: (N, L) 1, 0, -1, NaN; no column unless they were asked for.
        roles: role -> the table's column that was taken for it.
        held_back: columns that are no record: paths, ids, the split, labels.
        sources: the files that were read.
        left_out: reason -> number of rows.
        warnings: for readers of results. said: for the log.
        empty: the meaning of an empty label in evaluation.
    """

    films: pd.DataFrame
    columns: pd.DataFrame
    labels: pd.DataFrame
    roles: dict[str, str]
    held_back: frozenset[str]
    sources: tuple[str, ...]
    left_out: dict[str, int]
    warnings: tuple[str, ...] = ()
    said: tuple[str, ...] = ()
    empty: Empty = "ignore"

    def by_id(self) -> FilmsTable:
        """The same films, sorted by dicom_id."""
        order = self.films["dicom_id"].argsort(kind="stable").to_numpy()
        films, labels = (part.iloc[order].reset_index(drop=True) for part in (self.films, self.labels))
        return replace(self, films=films, columns=self.columns.iloc[order], labels=labels)

    @property
    def digest(self) -> str:
        """16 hex digits of the films, their subjects and their split: equal for every command on this table."""
        rows = self.films[["dicom_id", "subject_id", "split"]].sort_values("dicom_id")
        return digest(rows.to_csv(index=False))


def read_films_table(config: TableConfig, *, labels: bool) -> FilmsTable:
    """Read a table of films.

    Args:
        labels: read the labels too; pretraining never does.
    Raises: UserError: files or columns missing, words that are not understood, a film in two rows, a subject in two
        splits, a path that leads out of its folder.
    """
    layout = find_layout(config.layout)
    raw, official, sources, warnings = _files(config, layout)
    roles = _roles(raw, config, layout)
    raw, official, left_out = _with_ids(raw, official, roles, ("path", "film", "subject"), config)
    films = _films(raw, roles, config, layout)
    found = labels_of(raw, roles.values(), config, layout) if labels else pd.DataFrame(index=raw.index)
    if layout.labels.readers != "one":
        first = ~films["dicom_id"].duplicated().to_numpy()
        found = of_all_readers(found, films["dicom_id"], layout.labels.readers) if labels else found[first]
        raw, films, official = raw[first], films[first], official[first]
    _refuse_repeated(films, config)
    said = ["columns: " + ", ".join(f"{role}={column}" for role, column in roles.items())]
    if labels:
        said.append(f"labels: {', '.join(map(str, found.columns))}")
    said += _add_person(films, raw, roles, config, layout)
    films["split"], more = _split(films, raw, official, roles, config, layout)
    held_back = {*(roles[r] for r in ("path", "film", "subject", "study", "split") if r in roles)}
    held_back |= {name for name in label_columns(config, layout) if name in raw}
    return FilmsTable(
        films=films.reset_index(drop=True),
        columns=raw,
        labels=found.reset_index(drop=True),
        roles=roles,
        held_back=frozenset(held_back),
        sources=sources,
        left_out=left_out,
        warnings=(*warnings, *more),
        said=tuple(said),
        empty=layout.labels.empty,
    )


def read_paths(config: TableConfig) -> tuple[pd.DataFrame, dict[str, int]]:
    """dicom_id and file of each film, as `read_films_table` has them, and how many rows were left out, by reason.

    Raises: UserError: files or columns missing, a film in two rows, a path that leads out of its folder.
    """
    layout = find_layout(config.layout)
    raw, official, _, _ = _files(config, layout)
    roles = _roles(raw, config, layout)
    raw, _, left_out = _with_ids(raw, official, roles, ("path", "film"), config)
    films = _films(raw, roles, config, layout)[["dicom_id", "file"]]
    if layout.labels.readers != "one":
        films = films.drop_duplicates("dicom_id")
    _refuse_repeated(films, config)
    return films.reset_index(drop=True), left_out


def _refuse_repeated(films: pd.DataFrame, config: TableConfig) -> None:
    if (twice := films["dicom_id"][films["dicom_id"].duplicated()]).size:
        raise UserError(
            f"{config.table}: {twice.nunique()} films have more than one row, e.g. {twice.iloc[0]} in line "
            f"{int(twice.index[0]) + 2}; wanted one row each"
        )


def _files(config: TableConfig, layout: Layout) -> tuple[pd.DataFrame, pd.Series, tuple[str, ...], list[str]]:
    """All rows, their official split (NA: none), the files that were read, warnings.

    A table other than the train table is a test set, for `method: transfer`.
    """
    given = Path(config.table)
    parts: dict[str, Path] = {"": given}
    warnings = []
    if layout.files and config.split is None:
        beside = {
            split: next((path for name in names if (path := given.with_name(name)).is_file()), None)
            for split, names in layout.files.items()
            if split != "train"
        }
        if given.name in [name for split, names in layout.files.items() if split != "train" for name in names]:
            parts = {"test": given}
        else:
            known: dict[str, Path] = {split: path for split, path in beside.items() if path is not None}
            lacking = " or ".join(layout.files.get("test", []))
            if "test" not in known and "val" in known:
                known = {"test": known["val"]}
                warnings.append(f"no {lacking} beside {given}: {known['test'].name} is the test split")
            elif not known:
                warnings.append(f"no {lacking} beside {given}: split by hash, not comparable with published numbers")
            parts = {"train": given, **known} if known else parts
    frames = {split: _table(path.as_posix() if split else config.table) for split, path in parts.items()}
    other_names = layout.labels.other_names
    raw = pd.concat([frame.rename(columns=other_names) for frame in frames.values()])
    official = pd.concat([pd.Series(split or None, frame.index, dtype=object) for split, frame in frames.items()])
    return raw, official, tuple(path.as_posix() for path in parts.values()), warnings


def _table(path: str) -> pd.DataFrame:
    table = user_table(path, dtype=str)
    table.columns = table.columns.map(str).str.strip()
    if twice := table.columns[table.columns.duplicated()].tolist():
        raise UserError(f"{path}: two columns are called `{twice[0]}`; rename one")
    if len(table.columns) == 1 and (mark := next((m for m in (";", "\t") if m in table.columns[0]), None)):
        raise UserError(f"{path}: its columns are separated by {'tabs' if mark != ';' else mark}; save it with commas")
    return table


def _roles(raw: pd.DataFrame, config: TableConfig, layout: Layout) -> dict[str, str]:
    """Role -> column. Raises: UserError: a column that the user named is missing, or there is none of paths."""
    have = {str(name).lower(): str(name) for name in raw}
    out = {}
    for role in ROLES:
        asked = getattr(config, role) if role in GIVEN else None
        if asked == NONE and NONE not in raw and role != "path":
            continue
        if asked is not None and asked not in raw:
            near = difflib.get_close_matches(asked, list(map(str, raw)), n=1)
            hint = f"; did you mean `{near[0]}`?" if near else ""
            raise UserError(
                f"{config.table}: columns missing: {asked} (films.{role}=); found {', '.join(map(str, raw))}{hint}"
            )
        column = asked or next((have[name.lower()] for name in getattr(layout, role) if name.lower() in have), None)
        if column is not None:
            out[role] = column
    if "path" not in out:
        raise UserError(
            f"{config.table}: columns missing: {' or '.join(layout.path)}, the path of each film; name yours with "
            f"films.path=COLUMN; found {', '.join(map(str, raw))}"
        )
    return out


def _with_ids(
    raw: pd.DataFrame, official: pd.Series, roles: dict[str, str], wanted: Sequence[str], config: TableConfig
) -> tuple[pd.DataFrame, pd.Series, dict[str, int]]:
    """The rows with the wanted ids; a row without one, as is a repeated header, is counted. Raises: UserError: none."""
    left_out: Counter[str] = Counter()
    for role in wanted:
        if role not in roles:
            continue
        column = roles[role]
        text = named(values.text(raw[column]).rename(column))
        if nameless := int(text.isna().sum()):
            left_out[f"row without {column}"] = nameless
        keep = text.notna().to_numpy()
        raw, official = raw.assign(**{column: text.astype(object)})[keep], official[keep]
    if raw.empty:
        says = ", ".join(f"{number} {why}" for why, number in left_out.items())
        raise UserError(f"{config.table}: no film is left ({says})")
    return raw, official, dict(left_out)


def _films(raw: pd.DataFrame, roles: dict[str, str], config: TableConfig, layout: Layout) -> pd.DataFrame:
    """dicom_id, study_id, subject_id, file. Raises: UserError: a path of another form, or out of its folder."""
    paths = raw[roles["path"]]
    _check_inside(paths, config)
    inside = pd.DataFrame(index=raw.index)
    if layout.pattern is not None:
        inside = paths.str.extract(layout.pattern)
        if (odd := inside.isna().any(axis=1)).any():
            raise UserError(
                f"{config.table}: {odd.sum()} paths are not of the layout's form, e.g. {paths[odd].iloc[0]} in line "
                f"{values.row_of(odd)}; wanted {layout.pattern}"
            )
    groups = {name: column.str.replace("/", "_") for name, column in inside.items()}
    film = raw[roles["film"]] if "film" in roles else groups["film"] if "film" in groups else film_ids(paths)
    subject = raw[roles["subject"]] if "subject" in roles else groups.get("subject", film)
    study = values.text(raw[roles["study"]]) if "study" in roles else groups.get("study", film)
    study = study.astype(object).where(study.notna(), film)
    columns = {"dicom_id": film, "study_id": study, "subject_id": subject_numbers(subject), "file": paths}
    out = pd.DataFrame({name: column.to_numpy(object) for name, column in columns.items()}, index=raw.index)
    return out.astype({"subject_id": "int64"})


def _check_inside(paths: pd.Series, config: TableConfig) -> None:
    """Refuse a path that leads out of the folder in which it begins."""
    root = None if config.images is None else os.path.abspath(config.images)

    def outside(path: str) -> bool:
        if is_url(path):
            return False
        if os.path.isabs(path):
            return root is not None and os.path.relpath(os.path.normpath(path), root).startswith("..")
        return ".." in path and os.path.normpath(path).split(os.sep)[0] == ".."

    if (odd := paths.map(outside)).any():
        raise UserError(
            f"{config.table}: {odd.sum()} paths lead out of {config.images or 'the folder of the table'}, the first in "
            f"line {values.row_of(odd)}; name the folder that holds all films with films.images= (images: root=), and "
            "write paths relative to it"
        )


def _add_person(
    films: pd.DataFrame, raw: pd.DataFrame, roles: dict[str, str], config: TableConfig, layout: Layout
) -> list[str]:
    """Add view, taken_at, sex and age_years; returns what is to be said of them."""
    said: list[str] = []
    if "view" in roles:
        found = values.views(raw[roles["view"]], layout)
        films["view"] = found.fillna(layout.view_default) if layout.view_default else found
    else:
        films["view"] = layout.view_default or "AP"
    silent = pd.Series(True, index=films.index)
    for column, word in layout.lateral.items():
        if column in raw:
            side = values.text(raw[column])
            films.loc[(side.str.lower() == word.lower()).fillna(False), "view"] = "LATERAL"
            silent &= side.isna()
    if layout.lateral_path is not None:
        lateral = films["file"].str.contains(layout.lateral_path, regex=False)
        films.loc[silent & lateral, "view"] = "LATERAL"
    films["taken_at"] = pd.Series(pd.NaT, index=films.index, dtype="datetime64[ns]")
    if "taken_at" in roles:
        films["taken_at"], more = values.times(raw[roles["taken_at"]], config)
        said += more
    if "sex" in roles:
        films["sex"] = values.sexes(raw[roles["sex"]], config, layout)
    if "age" in roles:
        films["age_years"], more = values.ages(raw[roles["age"]], config, layout)
        said += more
    elif "birth_year" in roles and "taken_at" in roles:
        films["age_years"] = values.ages_at(raw[roles["birth_year"]], films["taken_at"], config, layout)
    return said


def _split(
    films: pd.DataFrame,
    raw: pd.DataFrame,
    official: pd.Series,
    roles: dict[str, str],
    config: TableConfig,
    layout: Layout,
) -> tuple[pd.Series, list[str]]:
    """The split of each film, by subject, and warnings. Raises: UserError: a subject in two splits."""
    said: list[str] = []
    if "split" in roles:
        split = values.splits(raw[roles["split"]], config)
    elif layout.lists:
        split, said = _listed(films, config, layout)
    else:
        split = official
    if "subject" not in roles and layout.pattern is None and "split" not in roles:
        said.append(f"{config.table}: no column of the subject: each film counts as a person; films.subject= names it")
    if split.isna().all():
        distinct = films["subject_id"].drop_duplicates()
        hashed = {subject: by_hash(subject, config.seed) for subject in distinct.tolist()}
        return films["subject_id"].map(hashed), said
    subjects = pd.DataFrame({"subject_id": films["subject_id"], "split": split})
    splits = subjects.drop_duplicates()["subject_id"]
    if (both := splits[splits.duplicated()].unique()).size:
        shown = films["dicom_id"][films["subject_id"] == both[0]].iloc[0]
        raise UserError(
            f"{config.table}: {both.size} subjects are in two splits, e.g. that of film {shown}; split by subject"
        )
    if "val" not in set(split) and "train" in set(split):
        split = _carve(subjects, config.seed)
    return split, said


def _listed(films: pd.DataFrame, config: TableConfig, layout: Layout) -> tuple[pd.Series, list[str]]:
    """The split that text files beside the table give, and a warning where they are absent."""
    none = pd.Series(None, index=films.index, dtype=object)
    paths = {split: Path(config.table).with_name(name) for split, name in layout.lists.items()}
    if absent := [path.name for path in paths.values() if not path.is_file()]:
        says = (
            f"no {' and no '.join(absent)} beside {config.table}: split by hash, not comparable with published numbers"
        )
        return none, [says]
    official = {film_id(line): split for split, path in paths.items() for line in path.read_text().split()}
    split = films["dicom_id"].map(official)
    if split.isna().any():
        raise UserError(f"{config.table}: {split.isna().sum()} films are in neither of the lists beside it")
    return split, []


def _carve(subjects: pd.DataFrame, seed: int) -> pd.Series:
    """The splits, with an eighth of the train subjects, by hash, moved to val."""

    def moves(subject: int) -> bool:
        drawn = int.from_bytes(hashlib.sha256(f"{seed}:val:{subject}".encode()).digest()[:8], "big") / 2**64
        return drawn < VAL_OF_TRAIN

    moved = {subject: moves(subject) for subject in subjects["subject_id"].drop_duplicates().tolist()}
    return subjects["split"].where(~(subjects["subject_id"].map(moved) & (subjects["split"] == "train")), "val")
