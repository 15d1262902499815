"""Open the labelled films that a config names, and the store of their pixels."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from configs import UserError
from ehr_features.files import digest, new_file
from finetune.films import FRONTAL, Films, read_films
from finetune.layouts import AS_CHEXPERT, read, read_layout
from pretrain.config import ImagesConfig
from pretrain.store import Store, pack

if TYPE_CHECKING:
    from finetune.config import ProbeConfig


def open_films(config: ProbeConfig) -> tuple[Films, Store | None]:
    """Films with labels that are in the store; the store is None for `encoder: metadata`.

    Raises: UserError: no such table, label or store, or no film of the table in the store.
    """
    if config.features is not None:
        films = read_films(config.features, labels=config.labels, views=config.views)
        if config.encoder == "metadata" and config.store is None:
            return films, None
        store = Store(str(config.store))
        return films.in_store(store), store
    assert config.films is not None
    films = read_layout(config.films, labels=config.labels, seed=config.seed)
    if config.method == "transfer":
        films = films.keep((films.table["split"] == "test").to_numpy(), "not of split test")
    if config.views == "frontal":
        films = films.keep(films.table["view"].isin(FRONTAL).to_numpy(dtype=bool), "not frontal")
    if config.encoder == "metadata" and config.store is None:
        return films, None
    store = Store(config.store) if config.store else _packed(config, films)
    return films.in_store(store), store


def _packed(config: ProbeConfig, films: Films) -> Store:
    """The films of a table, packed once beside `out`."""
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
    """The test films whose study radiologists have read, with the labels that they gave; `row`: where it is in `films`.

    Raises: UserError: another file, or none of its studies is among the test films.
    """
    theirs = read(path).rename(columns=AS_CHEXPERT)
    if "study_id" not in theirs or not set(films.names) & set(theirs):
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
    return Films(table, labels.astype(np.float64), {})
