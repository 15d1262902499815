"""Labelled films outside MIMIC: a table in a published layout, or any, and the folder of its films.

Input: the keys of a table (ehr_features/own_films/). Output: `Films` with a column path.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from configs import UserError
from ehr_features.files import digest, named, new_file, whole_numbers
from ehr_features.own_films.config import TableConfig, find_layout
from ehr_features.own_films.read import read_films_table
from ehr_features.raw.remote import user_table
from ehr_features.schema import FRONTAL
from finetune.labelled import Films, read_films
from pretrain import run
from pretrain.config import ImagesConfig
from pretrain.store import Store, pack
from pretrain.store.listing import film_files

if TYPE_CHECKING:
    from finetune.config import ProbeConfig


def read_layout(config: TableConfig, *, labels: Sequence[str] = (), find: bool = True) -> Films:
    """The films of a table.

    Args:
        labels: which; all if empty.
        find: find the file of each film, as a column path; films without one are left out.
    Raises: UserError: columns or files missing, an unknown label, no film found.
    """
    own = read_films_table(config, labels=True)
    table, found = own.films.assign(row=np.arange(len(own.films))), own.labels
    extra = [name for name in own.columns if name not in own.held_back and name not in table]
    for name in extra:  # by any of them results can be shown for subgroups
        table[name] = own.columns[name].to_numpy(object)
    if "Support Devices" in found:
        table["support_devices"] = found["Support Devices"] == 1
    if unknown := [name for name in labels if name not in found]:
        raise UserError(f"{config.table}: no label `{unknown[0]}`; there are {', '.join(map(str, found.columns))}")
    wanted = found[list(labels)] if labels else found
    known = (found if own.empty == "zeros" else wanted).notna().any(axis=1).to_numpy()
    films = Films(table, wanted, own.left_out, own.warnings, own.empty, own)
    if find:
        films.table["path"], why = film_files(table, config)
        here = films.table["path"].notna().to_numpy()
        films = films.keep(here, why)
        if not len(films):
            raise UserError(
                f"{config.images or Path(config.table).parent}: none of the {len(table)} films of {config.table} is "
                "here; was `images` meant?"
            )
        known = known[here]
    return films.keep(known, "no labels")


# ---- Open the labelled films of a config, and the store of their pixels.


def open_films(config: ProbeConfig) -> tuple[Films, Store | None]:
    """Films with labels that are in the store; the store is None for `encoder: metadata`.

    Raises: UserError: no such table, label or store, or no film of the table in the store.
    """
    if config.features is not None:
        films = read_films(config.features, labels=config.labels or (), views=config.views)
        return _in_store(config, films)
    assert config.films is not None
    needs_files = config.store is None and config.encoder != "metadata"
    films = read_layout(config.films, labels=config.labels or (), find=needs_files)
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
    given = {"films": str(listed), "out": str(folder), "size": config.films.size}

    def make(*_: object) -> None:
        pack(ImagesConfig.model_validate(given))

    run.divide([folder / "store.json"], make, "packing", "films")
    return Store(folder)


def radiologists(path: str, films: Films) -> Films:
    """The test films of studies read by radiologists, with their labels; `row`: the position in `films`.

    Raises: UserError: another file, or none of its studies is among the test films.
    """
    theirs = user_table(path, ["study_id"], {"study_id": str})
    there = named(theirs["study_id"]).notna()
    left_out = {} if there.all() else {"row without study_id": int((~there).sum())}
    theirs = theirs[there].rename(columns=find_layout("chexpert").labels.other_names)
    theirs = theirs.assign(study_id=whole_numbers(theirs["study_id"]))
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
