"""Labelled films outside MIMIC: NIH ChestX-ray14 and CheXpert as published, and any CSV.

Input: a table in its published layout and the folder of its films. Output: `Films` with a column path.
Official splits are kept; without a val split, an eighth of the train subjects becomes val, by hash. Without an official
split all subjects are split 70 / 10 / 20 by hash, with a warning.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from configs import UserError
from ehr_features.config import Empty
from ehr_features.files import digest, named, new_file, whole_numbers
from ehr_features.raw.remote import user_table
from ehr_features.schema import FINDINGS, FRONTAL, SPLITS, view_names
from ehr_features.splits import by_hash
from finetune.config import TableConfig
from finetune.labelled import Films, read_films
from pretrain.config import ImagesConfig
from pretrain.store import Store, pack
from pretrain.store.decode import film_id
from pretrain.store.listing import by_id, located

if TYPE_CHECKING:
    from finetune.config import ProbeConfig

NIH = (
    "Atelectasis",
    "Cardiomegaly",
    "Effusion",
    "Infiltration",
    "Mass",
    "Nodule",
    "Pneumonia",
    "Pneumothorax",
    "Consolidation",
    "Edema",
    "Emphysema",
    "Fibrosis",
    "Pleural_Thickening",
    "Hernia",
    "No Finding",
)
# NIH's names -> CheXpert's. Infiltration, Emphysema, Fibrosis and Hernia have no counterpart; several of NIH's may map
# to one of CheXpert's.
NIH_AS_CHEXPERT = {
    "Atelectasis": "Atelectasis",
    "Cardiomegaly": "Cardiomegaly",
    "Consolidation": "Consolidation",
    "Edema": "Edema",
    "Effusion": "Pleural Effusion",
    "Mass": "Lung Lesion",
    "Nodule": "Lung Lesion",
    "Pleural_Thickening": "Pleural Other",
    "Pneumonia": "Pneumonia",
    "Pneumothorax": "Pneumothorax",
    "No Finding": "No Finding",
}
VAL_OF_TRAIN = 0.125  # as 10 of 80
CHEXPERT_TESTS = ("test.csv", "test_labels.csv")
AS_CHEXPERT = {"Airspace Opacity": "Lung Opacity"}  # its name in MIMIC-CXR-JPG 2.1.0's file, and in CheXlocalize
AGE = r"^\s*0*(?P<number>\d+(?:\.\d+)?)(?P<unit>[YMD]?)"


# One row per film (dicom_id, study_id, subject_id, split, view, ...), its labels, warnings for readers of the results,
# and the number of rows left out because an id is missing.
Read = tuple[pd.DataFrame, pd.DataFrame, tuple[str, ...], dict[str, int]]


def read_layout(config: TableConfig, *, labels: Sequence[str] = (), seed: int = 0) -> Films:
    """The films of a table.

    Args:
        labels: which; all if empty.
        seed: of the hash split.
    Raises: UserError: columns or files missing, an unknown label, no film found.
    """
    table, found, warnings, left_out = {"nih": _nih, "chexpert": _chexpert, "csv": _csv}[config.layout](config, seed)
    table["view"] = view_names(table["view"])
    if "Support Devices" in found:
        table["support_devices"] = found["Support Devices"] == 1
    if config.names == "chexpert" and config.layout == "nih":
        found = to_chexpert(found)
    if unknown := [name for name in labels if name not in found]:
        raise UserError(f"{config.table}: no label `{unknown[0]}`; there are {', '.join(map(str, found.columns))}")
    empty: Empty = "ignore" if config.layout == "csv" else "zeros"
    wanted = found[list(labels)] if labels else found
    known = (found if empty == "zeros" else wanted).notna().any(axis=1).to_numpy()
    found = wanted
    odd = ~(found.isin([0, 1, -1]) | found.isna())
    if odd.any(axis=None):
        name = str(odd.columns[odd.any()][0])
        raise UserError(
            f"{config.table}: {odd[name].sum()} values of `{name}` are not 1, 0, -1 (uncertain) or empty, the first in "
            f"row {int(odd[name].to_numpy().argmax())}"
        )
    if table["dicom_id"].duplicated().any():
        twice = table["dicom_id"][table["dicom_id"].duplicated()]
        raise UserError(f"{config.table}: {twice.nunique()} films have more than one row, e.g. {twice.iloc[0]}")
    table["path"], why = _paths(table, config)
    films = Films(table, found.astype(np.float64).reset_index(drop=True), left_out, warnings, empty)
    here = table["path"].notna().to_numpy()
    films = films.keep(here, why)
    if not len(films):
        raise UserError(
            f"{config.images}: none of the {len(table)} films of {config.table} is here; was `images` meant?"
        )
    return films.keep(known[here], "no labels")


def to_chexpert(labels: pd.DataFrame) -> pd.DataFrame:
    """NIH's labels under CheXpert's names: positive if any of the mapped labels is."""
    own = {name: [o for o, n in NIH_AS_CHEXPERT.items() if n == name and o in labels] for name in FINDINGS}
    return pd.DataFrame({name: labels[of].max(axis=1) for name, of in own.items() if of})


def _nih(config: TableConfig, seed: int) -> Read:
    """Data_Entry_2017(_v2020).csv; train_val_list.txt and test_list.txt beside it are the official split."""
    columns = ["Image Index", "Finding Labels", "Patient ID", "View Position"]
    raw, left_out = read(config.table, columns, ["Image Index", "Patient ID"])
    findings = raw["Finding Labels"].str.split("|").apply(set)
    labels = pd.DataFrame({name: findings.map(lambda s, name=name: float(name in s)) for name in NIH})
    table = pd.DataFrame(
        {
            "dicom_id": raw["Image Index"].map(film_id),
            "study_id": raw["Image Index"].map(film_id),  # each film is an exam of its own
            "subject_id": _ids(raw["Patient ID"], config.table),
            "view": raw["View Position"],
            "sex": raw.get("Patient Gender"),
            "age_years": _years(raw, "Patient Age"),
        }
    )
    lists = {
        split: Path(config.table).with_name(name)
        for split, name in (("train", "train_val_list.txt"), ("test", "test_list.txt"))
    }
    if absent := [path.name for path in lists.values() if not path.is_file()]:
        table["split"] = [by_hash(subject, seed) for subject in table["subject_id"]]
        says = (
            f"no {' and no '.join(absent)} beside {config.table}: split by hash, not comparable with published numbers"
        )
        return table, labels, (says,), left_out
    official = {film_id(line): split for split, path in lists.items() for line in path.read_text().split()}
    table["split"] = table["dicom_id"].map(official)
    if table["split"].isna().any():
        raise UserError(f"{config.table}: {table['split'].isna().sum()} films are in neither of the lists beside it")
    return _carve(table, seed), labels, (), left_out


def _chexpert(config: TableConfig, seed: int) -> Read:
    """train.csv, with valid.csv and test.csv (or test_labels.csv) beside it; without a test file, valid is the test
    split.

    A `table` other than the train table is a test set, for `method: transfer`.
    """
    given, warnings = Path(config.table), list[str]()
    valid, test = given.with_name("valid.csv"), None
    for name in CHEXPERT_TESTS:
        test = test or (path if (path := given.with_name(name)).is_file() else None)
    parts: dict[str, Path | None] = {"train": given, "val": valid, "test": test}
    if given.name in (valid.name, *CHEXPERT_TESTS):
        parts = {"test": given}
    elif test is None:
        parts |= {"val": None, "test": valid}
        warnings.append(f"no {' or '.join(CHEXPERT_TESTS)} beside {given}: {valid.name} is the test split")
    found = {split: read(path, ["Path"], ["Path"]) for split, path in parts.items() if path is not None}
    frames = [frame.assign(split=split) for split, (frame, _) in found.items()]
    left_out = sum((Counter(dropped) for _, dropped in found.values()), Counter())
    raw = pd.concat([frame.rename(columns=AS_CHEXPERT) for frame in frames], ignore_index=True)
    if missing := [name for name in FINDINGS if name not in raw]:
        raise UserError(f"{given}: columns missing: {', '.join(missing)}; found {', '.join(map(str, frames[0]))}")
    names = raw["Path"].str.extract(r"(?P<patient>patient(?P<number>\d+))/(?P<study>study\d+)/(?P<film>[^/]+)\.\w+$")
    if names.isna().any(axis=None):
        odd = raw["Path"][names["film"].isna()].iloc[0]
        raise UserError(f"{config.table}: a path is not of the form .../patientN/studyN/NAME.jpg: {odd}")
    raw = raw.reindex(
        columns=[*raw.columns, *({"Sex", "Age", "Frontal/Lateral", "AP/PA"} - set(raw))]
    )  # test tables lack
    side = raw["Frontal/Lateral"]
    lateral = names["film"].str.contains("lateral").where(side.isna(), side == "Lateral")
    table = pd.DataFrame(
        {
            "dicom_id": names["patient"] + "_" + names["study"] + "_" + names["film"],
            "study_id": names["patient"] + "_" + names["study"],
            "subject_id": names["number"].astype(np.int64),
            "view": raw["AP/PA"].astype(object).fillna("AP").where(~lateral, "LATERAL"),
            "sex": raw["Sex"].map({"Male": "M", "Female": "F"}),
            "age_years": pd.to_numeric(raw["Age"], errors="coerce"),
            "split": raw["split"],
            "file": raw["Path"],
        }
    )
    table = _carve(table, seed) if parts.get("val", valid) is None else table
    return table, raw[list(FINDINGS)].apply(pd.to_numeric, errors="coerce"), tuple(warnings), dict(left_out)


def _csv(config: TableConfig, seed: int) -> Read:
    """One row per film: path, labels, and, if present, subject, study, split, view, sex, age."""
    asked = {"subject_id": config.subject, "study_id": config.study, "split": config.split, "view": config.view}
    keys = [c for c in (config.path, config.subject) if c]
    wanted = [config.path, *config.columns, *(c for c in asked.values() if c)]
    raw, left_out = read(config.table, wanted, keys, [c for c in (config.study,) if c])
    stem = raw[config.path].map(film_id)
    if stem.duplicated().any():  # e.g. view1_frontal of every patient
        stem = raw[config.path].map(lambda name: (Path(name).parent / film_id(name)).as_posix())
    table = pd.DataFrame({"dicom_id": stem, "file": raw[config.path]})
    table["subject_id"] = _ids(raw[config.subject] if config.subject else stem, config.table)
    table["study_id"] = raw[config.study] if config.study else stem
    table["view"] = raw[config.view] if config.view else "AP"
    for name, column in (("sex", config.sex), ("age_years", config.age)):
        if column:
            table[name] = raw[column] if name == "sex" else pd.to_numeric(raw[column], errors="coerce")
    if config.split:
        names = {"valid": "val", "validate": "val", "validation": "val", "dev": "val", "training": "train"}
        table["split"] = raw[config.split].astype(str).str.strip().str.lower().replace(names)
        if unknown := sorted(set(table["split"].astype(str)) - set(SPLITS)):
            raise UserError(f"{config.table}: `{config.split}` holds {unknown[:3]}; wanted train, val, test")
        if "val" not in set(table["split"]):
            table = _carve(table, seed)
    else:
        table["split"] = [by_hash(subject, seed) for subject in table["subject_id"]]
    try:
        return table, raw[config.columns].astype(np.float64), (), left_out
    except (TypeError, ValueError) as error:
        raise UserError(f"{config.table}: labels are 1, 0, -1 (uncertain) or empty; {error}") from None


def _carve(table: pd.DataFrame, seed: int) -> pd.DataFrame:
    """Move an eighth of the train subjects, by hash, to val."""

    def share(subject: int) -> float:
        return int.from_bytes(hashlib.sha256(f"{seed}:val:{subject}".encode()).digest()[:8], "big") / 2**64

    moved = table["subject_id"].map(share) < VAL_OF_TRAIN
    return table.assign(split=table["split"].where(~(moved & (table["split"] == "train")), "val"))


def _paths(table: pd.DataFrame, config: TableConfig) -> tuple[pd.Series, str]:
    """The file of each film: below `images` by its relative path, else anywhere below it by its id."""
    root, why = Path(config.images), f"no file below {config.images}"
    if not root.is_dir():
        raise UserError(f"{root}: no such folder; `images` is the folder of the films of {config.table}")
    if "file" in table:
        found = located(table["file"], [root, Path(config.table).parent])
        if found.notna().any():
            return found, why
    return by_id(table["dicom_id"], root), why


def _years(raw: pd.DataFrame, column: str) -> pd.Series:
    """Ages as numbers, including the first release's form: 058Y, 011M, 003D."""
    parts = (raw[column] if column in raw else pd.Series("", index=raw.index)).astype(str).str.extract(AGE)
    return pd.to_numeric(parts["number"]) / parts["unit"].map({"M": 12.0, "D": 365.25}).fillna(1.0)


def _ids(values: pd.Series, path: str) -> pd.Series:
    """Subjects as whole numbers; text ids are numbered in the order of their names."""
    numbers = whole_numbers(values)
    if numbers.notna().all():
        return numbers.astype(np.int64)
    return pd.Series(pd.factorize(values, sort=True)[0], index=values.index)


def read(
    path: str | Path, columns: Sequence[str] = (), keys: Sequence[str] = (), texts: Sequence[str] = ()
) -> tuple[pd.DataFrame, dict[str, int]]:
    """Read a table (.csv, .csv.gz, .parquet) with at least `columns`.

    Args:
        keys: ids and paths, which stay text (`00000001`); a row without one, as is a repeated header, is left out.
        texts: other columns that stay text.
    Returns: the table, and how many rows were left out, by reason.
    Raises: UserError.
    """
    table = user_table(path, columns, dict.fromkeys([*keys, *texts], str))
    left_out: dict[str, int] = {}
    for key in keys:
        text = named(table[key])
        if nameless := int(text.isna().sum()):
            left_out[f"row without {key}"] = nameless
        table = table.assign(**{key: text.astype(object)})[text.notna()]
    if table.empty:
        raise UserError(f"{path}: no rows")
    return table.reset_index(drop=True), left_out


# ---- Open the labelled films of a config, and the store of their pixels.


def open_films(config: ProbeConfig) -> tuple[Films, Store | None]:
    """Films with labels that are in the store; the store is None for `encoder: metadata`.

    Raises: UserError: no such table, label or store, or no film of the table in the store.
    """
    if config.features is not None:
        films = read_films(config.features, labels=config.labels, views=config.views)
        return _in_store(config, films)
    assert config.films is not None
    films = read_layout(config.films, labels=config.labels, seed=config.seed)
    if config.method == "transfer":
        films = films.keep((films.table["split"] == "test").to_numpy(), "not of split test")
    if config.views == "frontal":
        films = films.keep(films.table["view"].isin(FRONTAL).to_numpy(dtype=bool), "not frontal")
    return _in_store(config, films)


def _in_store(config: ProbeConfig, films: Films) -> tuple[Films, Store | None]:
    """The films that the store has; all of them where the record alone is read and there is no store."""
    if config.encoder == "metadata" and (config.store is None or not Path(config.store).exists()):
        said = (f"{config.store}: no store there; every labelled film counts",) if config.store else ()
        return replace(films, warnings=(*films.warnings, *said)), None
    store = Store(str(config.store)) if config.store or config.films is None else _packed(config, films)
    return films.in_store(store), store


def _packed(config: ProbeConfig, films: Films) -> Store:
    """The films of a table, packed once into the parent folder of `out`."""
    assert config.films is not None
    where = films.table["path"].map(lambda path: Path(path).resolve().as_posix())
    paths = films.table[["dicom_id"]].assign(path=where)
    key = digest([paths["dicom_id"].tolist(), paths["path"].tolist(), config.films.size])
    cache = Path(config.cache) if config.cache else Path(config.out).parent / "cache"
    listed = cache / f"films_{key}.csv"
    if not listed.is_file():
        with new_file(listed) as part:
            paths.to_csv(part, index=False)
    folder = cache / f"store_{key}"
    if not (folder / "store.json").is_file():
        given = {"films": str(listed), "out": str(folder), "size": config.films.size}
        pack(ImagesConfig.model_validate(given))
    return Store(folder)


def radiologists(path: str, films: Films) -> Films:
    """The test films of studies read by radiologists, with their labels; `row`: the position in `films`.

    Raises: UserError: another file, or none of its studies is among the test films.
    """
    theirs, left_out = read(path, ["study_id"], ["study_id"])
    theirs = theirs.rename(columns=AS_CHEXPERT).assign(study_id=whole_numbers(theirs["study_id"]))
    if not set(films.names) & set(theirs):
        raise UserError(
            f"{path}: wanted study_id and findings, found {', '.join(map(str, theirs.columns))}; "
            "it is mimic-cxr-2.1.0-test-set-labeled.csv of MIMIC-CXR-JPG 2.1.0"
        )
    if theirs["study_id"].duplicated().any():
        raise UserError(f"{path}: {theirs['study_id'].duplicated().sum()} studies have two rows; wanted one each")
    rows = films.rows("test")
    rows = rows[films.table["study_id"].iloc[rows].isin(theirs["study_id"]).to_numpy()]
    if not len(rows):
        raise UserError(f"{path}: none of its {len(theirs)} studies is among the test films; is it of these films?")
    table = films.table.iloc[rows].reset_index(drop=True).assign(row=rows)
    common = [name for name in films.names if name in theirs]
    labels = theirs.set_index("study_id")[common].loc[table["study_id"]].reset_index(drop=True)
    return Films(table, labels.astype(np.float64), left_out)
