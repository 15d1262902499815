"""Notes of films (`ehr-msn notes`) -> a vector, or token states, for each film.

Input: a folder with notes.parquet and a text encoder's folder. Output: rows as the films asked for; a film without
a note has a row of zeros and False in the mask. A note written after its film stops the run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from configs import UserError
from ehr_features.files import file_digest
from ehr_features.schema import NOTES
from ehr_features.static import fit_scale
from ehr_features.typed import read_parquet
from pretrain.text.encoder import TextEncoder, Tokens, embed, embed_tokens

COLUMNS = ("dicom_id", "available_at")
WAY = "write them with the command `notes`"


@dataclass(frozen=True)
class Notes:
    """The notes of a folder: `table` has dicom_id (each once), note, available_at."""

    folder: Path
    table: pd.DataFrame

    def rows(self, films: Sequence[str | None] | pd.Series) -> NDArray[np.int64]:
        """Row of `table` for each film, -1 where it has no note (or is None)."""
        return pd.Index(self.table["dicom_id"]).get_indexer(pd.Index(films)).astype(np.int64)

    @property
    def hash(self) -> str:
        return file_digest(self.folder / "notes.parquet")


def read_notes(folder: str | Path, taken_at: pd.Series | None = None) -> Notes:
    """Read notes.parquet; empty notes count as none.

    Args:
        taken_at: dicom_id -> when the film was taken; a note that was not known by then is refused.
    Raises: UserError: as `check_notes`; no note at all.
    """
    table = check_notes(folder, taken_at, [*COLUMNS, "note"])
    table = table[table["note"].fillna("").str.strip() != ""].reset_index(drop=True)
    if table.empty:
        raise UserError(f"{folder}/notes.parquet: no note; its attrition.json says why")
    return Notes(Path(folder), table)


def check_notes(
    folder: str | Path, taken_at: pd.Series | None = None, columns: Sequence[str] = COLUMNS
) -> pd.DataFrame:
    """Columns of notes.parquet, in its order.

    Raises: UserError: no such folder, damaged, a film with two notes, a note from after its film.
    """
    path = Path(folder) / "notes.parquet"
    if not path.is_file() or not (path.parent / "provenance.json").is_file():
        raise UserError(f"{folder}: not a folder of notes (notes.parquet, provenance.json); {WAY}")
    table = read_parquet(path, NOTES, WAY, names=lambda have: [*columns, *{"note"} - {*have}])  # not read: it is long
    if taken_at is not None:
        late = table["available_at"] > pd.to_datetime(table["dicom_id"].map(taken_at))
        if late.any():
            raise UserError(f"{path}: {late.sum()} notes hold what was known only after their film; {WAY} again")
    return table


def note_vectors(
    notes: Notes, encoder: str | Path, films: Sequence[str | None] | pd.Series, cache: Path
) -> tuple[NDArray[np.float32], NDArray[np.bool_], dict[str, Any]]:
    """A vector for each film's note.

    Args:
        encoder: the text encoder's folder. films: M dicom_ids. cache: folder for what was embedded.
    Returns: (M, D), zero where there is no note; (M,) whether there is one; what encoder.json and results.json say.
    Raises: UserError: none of the films has a note.
    """
    rows, opened = _rows(notes, films), TextEncoder(encoder)
    distinct, which = np.unique(rows[rows >= 0], return_inverse=True)
    vectors, cut = embed(opened, notes.table["note"].iloc[distinct].tolist(), cache)
    out = np.zeros((len(rows), vectors.shape[1]), np.float32)
    out[rows >= 0] = vectors[which]
    return out, rows >= 0, _about(notes, opened, rows, cut)


def note_tokens(
    notes: Notes, encoder: str | Path, films: Sequence[str | None] | pd.Series, cache: Path
) -> tuple[Tokens, NDArray[np.int64], dict[str, Any]]:
    """The token states of each film's note, left on disk.

    Returns: states; (M,) row of the states for each film, -1 where there is no note; what results.json says.
    """
    rows, opened = _rows(notes, films), TextEncoder(encoder)
    distinct, which = np.unique(rows[rows >= 0], return_inverse=True)
    tokens, cut = embed_tokens(opened, notes.table["note"].iloc[distinct].tolist(), cache)
    at = np.full(len(rows), -1, np.int64)
    at[rows >= 0] = which
    return tokens, at, _about(notes, opened, rows, cut)


def _rows(notes: Notes, films: Sequence[str | None] | pd.Series) -> NDArray[np.int64]:
    rows = notes.rows(films)
    if not (rows >= 0).any():
        raise UserError(f"{notes.folder}: none of {len(rows)} films has a note there; are the notes of these features?")
    return rows


def _about(notes: Notes, encoder: TextEncoder, rows: NDArray[np.int64], cut: int) -> dict[str, Any]:
    """What was read: the notes, the encoder, the number of truncated notes."""
    return {
        "encoder": encoder.folder.as_posix(),
        "encoder_hash": encoder.key,
        "notes_hash": notes.hash,
        "films": len(rows),
        "films_with_note": int((rows >= 0).sum()),
        "distinct_notes_truncated": cut,
    }


@dataclass(frozen=True)
class TextSource:
    """Folders of the EHR group `text`: the notes, the text encoder, the cache of embeddings."""

    notes: str
    encoder: str
    cache: Path


def text_columns(
    source: TextSource, films: pd.DataFrame, used: NDArray[np.bool_]
) -> tuple[NDArray[np.float32], list[str], dict[str, Any]]:
    """The EHR group `text`: each dimension with mean 0 and deviation 1 over the notes of train, and a mask.

    Args:
        films: N rows: dicom_id, taken_at, split. used: (N,) the films whose notes are wanted; the others, but for
            those of train, on which the scale is fitted, are not embedded and count as without a note.
    Returns: (N, D + 1), zeros and text_missing = 1 where there is no note; names; what encoder.json says.
    """
    notes = read_notes(source.notes, films.set_index("dicom_id")["taken_at"])
    train = (films["split"] == "train").to_numpy()
    wanted = films["dicom_id"].where(pd.Series(train | used, index=films.index), None)
    vectors, has, about = note_vectors(notes, source.encoder, wanted, source.cache)
    if not (train & has).any():
        raise UserError(f"{source.notes}: no train film has a note, so the group `text` cannot be fitted")
    mean, std = fit_scale(vectors[train & has])  # two of MiniLM's columns hold 0 and values about 1e-33: constant
    scaled = np.where(has[:, None], (vectors - mean) / std, 0)
    array = np.concatenate([scaled, ~has[:, None]], axis=1).astype(np.float32)
    names = [*(f"text_{i}" for i in range(vectors.shape[1])), "text_missing"]
    of = notes.rows(films["dicom_id"][used])
    about |= {"films": int(used.sum()), "films_with_note": int((of >= 0).sum())}
    return array, names, about


def summary(about: dict[str, Any]) -> str:
    """One line for a log."""
    cut = about["distinct_notes_truncated"]
    return (
        f"text: {about['films_with_note']} of {about['films']} films have a note, read by {about['encoder']}; "
        f"{cut} distinct notes are longer than it reads, and cut"
    )
