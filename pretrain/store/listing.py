"""The films of a store, from the metadata table of MIMIC-CXR, a folder, or a list: one row per film."""

from __future__ import annotations

import io
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import fsspec
import pandas as pd

from configs import UserError
from ehr_features.files import digest, named, whole_numbers
from ehr_features.own_films.config import TableConfig
from ehr_features.own_films.ids import SUFFIXES, film_id
from ehr_features.own_films.read import read_paths
from ehr_features.raw.remote import explained, find_table, is_url, user_table
from ehr_features.schema import FRONTAL, READ, view_names
from pretrain.config import ImagesConfig
from pretrain.draws import within_cap
from pretrain.store.decode import HEAD, film_kind


def list_films(config: ImagesConfig) -> tuple[pd.DataFrame, dict[str, int]]:
    """List the films to pack, in packing order.

    Returns: one row per film (dicom_id, path), and the number of films by outcome, e.g. `packed AP`.
    Raises: UserError: no such folder or table, columns missing, two films of one dicom_id, nothing left.
    """
    if config.mimic_cxr is not None:
        films, counts = _mimic(config.mimic_cxr.removeprefix("file://").rstrip("/"), config)
    elif config.layout is not None or config.root is not None or config.path is not None:
        films, others = _of_table(config)
        counts = {"packed": len(films)} | others
    else:
        films, others = films_of(str(config.films).removeprefix("file://"))
        counts = {"packed": len(films)} | others
    if films.empty:
        raise UserError(f"{config.mimic_cxr or config.films}: no film to pack ({_say(counts)})")
    twice = films[films.dicom_id.duplicated(keep=False)].sort_values("dicom_id", kind="stable")
    if len(twice):
        first, second = twice.path.iloc[0], twice.path.iloc[1]
        raise UserError(
            f"{twice.dicom_id.nunique()} dicom_ids have more than one film, e.g. {twice.dicom_id.iloc[0]}: "
            f"{first} and {second}; a film's id is its file name: rename one, or give a list with a column dicom_id"
        )
    return films.reset_index(drop=True), counts


def _say(counts: dict[str, int]) -> str:
    return ", ".join(f"{number} {what}" for what, number in counts.items()) or "none found"


def _mimic(root: str, config: ImagesConfig) -> tuple[pd.DataFrame, dict[str, int]]:
    table, nameless = _with_ids(_metadata(root))
    view = view_names(table.ViewPosition, table.ViewCodeSequence_CodeMeaning).fillna("unknown view")
    keep = view.isin(FRONTAL) if config.views == "frontal" else pd.Series(True, index=table.index)
    capped = pd.Series(False, index=table.index)
    if config.per_subject_cap is not None:
        capped = keep & ~within_cap(table, keep.to_numpy(), config.per_subject_cap, config.seed)
    counts = {f"packed {name}": int(n) for name, n in view[keep & ~capped].value_counts().items()}
    counts |= {f"left out {name} (views: frontal)": int(n) for name, n in view[~keep].value_counts().items()}
    if capped.any():
        counts[f"left out by per_subject_cap: {config.per_subject_cap}"] = int(capped.sum())
    if nameless:
        counts["left out (row without dicom_id, subject_id or study_id)"] = nameless
    films = table[keep & ~capped].sort_values(["subject_id", "study_id", "dicom_id"])
    inside = "" if not is_url(root) and Path(root, f"p{films.subject_id.str[:2].min()}").is_dir() else "files/"
    folder = inside + "p" + films.subject_id.str[:2] + "/p" + films.subject_id + "/s" + films.study_id + "/"
    return pd.DataFrame({"dicom_id": films.dicom_id, "path": f"{root}/" + folder + films.dicom_id + ".jpg"}), counts


def _metadata(root: str) -> pd.DataFrame:
    columns = ["dicom_id", "subject_id", "study_id", "ViewPosition", "ViewCodeSequence_CodeMeaning"]
    path = find_table(root, READ["cxr_metadata"])  # supports the same releases and files as `features`
    if path is None:
        raise UserError(
            f"{root}: no {' or '.join(READ['cxr_metadata'].places)} (.csv.gz, .csv, .parquet) here; mimic_cxr is the "
            "folder of MIMIC-CXR-JPG that holds files/"
        )
    return _as_text(user_table(path, columns, str))[columns].fillna("")


def _as_text(table: pd.DataFrame) -> pd.DataFrame:
    return table.astype("string").astype(object)


def _with_ids(table: pd.DataFrame) -> tuple[pd.DataFrame, int]:
    """The rows with all ids, as text without blanks or decimals, and the number of rows without one."""
    ids = {name: whole_numbers(table[name]).astype("string") for name in ("subject_id", "study_id")}
    ids["dicom_id"] = table.dicom_id.str.strip().replace("", None)
    table = table.assign(**ids)
    whole = table[list(ids)].notna().all(axis=1)
    return table[whole].astype(object), int((~whole).sum())


def films_of(place: str) -> tuple[pd.DataFrame, dict[str, int]]:
    """The films of a folder or of a list (.txt, .csv, .parquet; paths are relative to the list's folder).

    Returns: one row per film (dicom_id, path), and the number of files or rows left out, by kind.
    Raises: UserError: no such folder or list, no column `path`.
    """
    found = _files_below(place)
    if found is not None:
        paths, others = films_among(found)
        return pd.DataFrame({"dicom_id": [film_id(p) for p in paths], "path": paths}, dtype=str), others
    if place.endswith(".txt"):
        with explained(place), fsspec.open(place, "rt", encoding="utf-8") as file:
            lines = file.read().splitlines()
        table = pd.DataFrame({"path": [line.strip() for line in lines if line.strip()]}, dtype=str)
    else:
        table = _as_text(user_table(place, dtype=str))
    if "path" not in table:
        raise UserError(f"{place}: no column `path`; found {', '.join(table.columns)}")
    asked = table.columns.intersection(["path", "dicom_id"])
    whole = table[asked].apply(named).notna().all(axis=1)
    table, nameless = table[whole], int((~whole).sum())
    ids = table.dicom_id if "dicom_id" in table else table.path.map(film_id)
    films = pd.DataFrame({"dicom_id": ids, "path": _places(place, table.path)})
    return films, {f"left out (row without {' or '.join(asked)})": nameless} if nameless else {}


def _of_table(config: ImagesConfig) -> tuple[pd.DataFrame, dict[str, int]]:
    """The films of a table, by its layout. An absent film keeps its path, so that it is listed as rejected."""
    given = {"table": config.films, "images": config.root, "path": config.path, "layout": config.layout or "csv"}
    table = TableConfig.model_validate(given)
    films, left_out = read_paths(table)
    found, why = film_files(films, table)
    if found.isna().all():
        raise UserError(f"{table.table}: {why} for any of its {len(films)} films; name their folder with root=FOLDER")
    root = Path(table.images or Path(table.table).parent)
    absent = films["file"].map(lambda name: (root / name).as_posix())
    counts = {f"left out ({reason})": number for reason, number in left_out.items()}
    if missing := int(found.isna().sum()):
        counts[f"of them absent ({why})"] = missing
    return films[["dicom_id"]].assign(path=found.fillna(absent)), counts


def film_files(films: pd.DataFrame, config: TableConfig) -> tuple[pd.Series, str]:
    """The file of each film (dicom_id, file) of a table: by its path below its folder, else anywhere below by its name.

    Returns: None for an absent film; and what an absent one is called.
    Raises: UserError: no such folder.
    """
    root = Path(config.images or Path(config.table).parent)
    if not root.is_dir():
        raise UserError(f"{root}: no such folder; films.images= (in `images`: root=) is the folder of the films")
    found = located(films["file"], [root, Path(config.table).parent])
    if not found.notna().any():
        found = by_id(films["file"].map(film_id), root)
    return found, f"no file below {root}"


def films_among(files: Iterable[str]) -> tuple[list[str], dict[str, int]]:
    """The films among files, sorted, and the number of other files of each kind.

    A file is a film by its suffix or, without such a suffix, by its content.
    """
    names = {path: Path(path).name for path in sorted(files)}
    odd = [p for p, n in names.items() if not n.lower().endswith(SUFFIXES) and n[0] != "." and n.upper() != "DICOMDIR"]
    heads = dict(zip(odd, _heads(odd), strict=True))
    others: Counter[str] = Counter()
    films = []
    for path, name in names.items():
        if name[0] != "." and (name.lower().endswith(SUFFIXES) or film_kind(heads.get(path, b"")) is not None):
            films.append(path)
            continue
        suffix = Path(name).suffix.lower()
        kind = "hidden file" if name[0] == "." else suffix if suffix[1:2].isalpha() else "file without a suffix"
        others[f"left out {'DICOMDIR' if name.upper() == 'DICOMDIR' else kind} (no film)"] += 1
    return films, dict(others)


def _heads(paths: list[str]) -> list[bytes]:
    """The first bytes of files; empty for a file that cannot be read."""
    if paths and is_url(paths[0]):
        filesystem = fsspec.url_to_fs(paths[0])[0]
        found = filesystem.cat_ranges(paths, [0] * len(paths), [HEAD] * len(paths), on_error="return")
        return [head if isinstance(head, bytes) else b"" for head in found]
    heads = []
    for path in paths:
        try:
            with open(path, "rb") if os.path.isfile(path) else io.BytesIO() as file:  # opening a pipe would block
                heads.append(file.read(HEAD))
        except OSError:
            heads.append(b"")
    return heads


def _files_below(place: str) -> list[str] | None:
    """The files of a folder; None if it is a file. Raises: UserError: neither."""
    if is_url(place):
        with explained(place):
            filesystem, inner = fsspec.url_to_fs(place)
            if filesystem.isfile(inner):
                return None
            found = [filesystem.unstrip_protocol(p) for p in filesystem.find(inner)]
    elif Path(place).is_file():
        return None
    else:
        found = [Path(folder, name).as_posix() for folder, _, names in os.walk(place) for name in names]
    if not found and not Path(place).is_dir():
        raise UserError(
            f"{place}: no such folder or file; films is a folder of films, or a list (.txt, .csv, .parquet)"
        )
    return found


def _beside(place: str, path: str) -> str:
    """A path of a list, relative to the list's folder."""
    if is_url(place) and not is_url(path):
        return f"{place.rpartition('/')[0]}/{path}"
    return path if is_url(path) else (Path(place).parent / path).as_posix()


def _places(place: str, paths: pd.Series) -> pd.Series:
    """Where the films of a list are: relative to its folder, else to the working directory, else by name below its
    folder."""
    beside = paths.map(lambda path: _beside(place, path))
    if beside.head(100).map(lambda path: is_url(path) or os.path.exists(path)).any():
        return beside
    folder = Path(place).parent
    found = located(paths, [folder, Path()])
    return (by_id(paths.map(film_id), folder) if found.isna().all() else found).fillna(beside)


def located(files: pd.Series, roots: Sequence[Path]) -> pd.Series:
    """The file of each film by its relative path below a root, with or without the first folder; None: absent."""
    found = pd.Series(None, index=files.index, dtype=object)
    inside = files.str.split("/", n=1).str[-1]  # CheXpert's paths begin with the name of its own folder
    for root, names in ((root, names) for root in roots for names in (files, inside)):
        missing = found.isna()  # each root is searched only for missing films: there may be 224,000 on a slow disk
        tried = names[missing].map(lambda name, at=root: at / name)
        found[missing] = tried.map(lambda path: path.as_posix() if path.is_file() else None)
    return found


def by_id(ids: pd.Series, root: Path) -> pd.Series:
    """The file of each film anywhere below a folder, by its id; None: absent or ambiguous."""
    there = films_of(root.as_posix())[0].drop_duplicates("dicom_id", keep=False)  # ambiguous ids are dropped
    return ids.map(there.set_index("dicom_id")["path"]).astype(object)


def films_digest(films: pd.DataFrame) -> str:
    """16 hex digits of the ids in their order."""
    return digest(films.dicom_id.tolist())
