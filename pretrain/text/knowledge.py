"""Retrieve, for each film's note, the nearest of a user's own passages.

Input: a folder of notes, a folder of passages (.txt: one each; .md: one a heading; .jsonl: lines of id and text), a
text encoder. Output, beside notes.parquet: knowledge.parquet (dicom_id, passage_ids, scores), passages.parquet (id,
text as it was embedded, source) and knowledge.json. Notes are not changed; passages pass the leak filter of the notes.

Differs from the published retrieval: the query is the film's note (there, one constant sentence for all films).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from configs import UserError
from ehr_features.files import alone, digest, new_file, write_json, write_seal
from ehr_features.notes import leak_filter
from ehr_features.typed import read_json
from ehr_features.typed.read import json_of
from ehr_features.typed.shapes import Provenance
from pretrain.text import notes as film_notes
from pretrain.text.encoder import embed

BLOCK = 16_384  # notes compared at a time


def retrieve(
    notes: str | Path, passages: str | Path, encoder: str | Path, *, top: int = 3, threshold: float = 0.3
) -> Path:
    """Find the passages nearest to each note by the cosine of their vectors.

    Args:
        notes: a folder of notes. passages: a folder. encoder: the text encoder's folder.
        top: most passages of a note. threshold: least cosine.
    Returns: knowledge.parquet, a row for each note.
    Raises: UserError: no notes, no passage, two passages of one id, a line that is no passage.
    """
    if top < 1 or not -1 <= threshold <= 1:
        raise UserError(f"top {top}, threshold {threshold}: wanted 1 or more passages, a cosine between -1 and 1")
    held, opened = film_notes.read_notes(notes), film_notes.TextEncoder(encoder)
    with alone(held.folder):
        return _retrieve(held, passages, opened, top, threshold, held.folder.resolve().parent / "cache")


def _retrieve(
    held: film_notes.Notes,
    passages: str | Path,
    opened: film_notes.TextEncoder,
    top: int,
    threshold: float,
    where: Path,
) -> Path:
    mode = str((read_json(held.folder / "provenance.json", Provenance).get("config") or {}).get("filter", "standard"))
    known, about = filtered(read_passages(passages), mode)
    table, cut = embed(opened, known["text"].tolist(), where)
    distinct, which = np.unique(held.table["note"].to_numpy(object).astype(str), return_inverse=True)
    queries, _ = embed(opened, distinct.tolist(), where)
    rows, scores = nearest(queries, table, top, threshold)
    ids = known["id"].to_numpy(object)
    own = [[ids[i] for i in row if i >= 0] for row in rows]
    found = pa.table(
        {
            "dicom_id": held.table["dicom_id"],
            "passage_ids": pa.array([own[i] for i in which], pa.list_(pa.string())),
            "scores": pa.array([scores[i][rows[i] >= 0] for i in which], pa.list_(pa.float32())),
        }
    )
    out = held.folder / "knowledge.parquet"
    with new_file(held.folder / "passages.parquet") as part:
        known.to_parquet(part, index=False)
    about |= {"encoder": str(opened.folder), "encoder_hash": opened.key, "notes_hash": held.hash, "filter": mode}
    about |= {"top": top, "threshold": threshold, "passages_hash": digest(known.to_dict("records"))}
    about |= {
        "passages_truncated": cut,
        "notes": len(held.table),
        "notes_with_passages": sum(bool(own[i]) for i in which),
    }
    write_json(held.folder / "knowledge.json", about)
    with new_file(out) as part:
        pq.write_table(found, part)
    write_seal(held.folder, "knowledge.*", "passages.parquet")
    return out


def nearest(
    queries: NDArray[np.float32], passages: NDArray[np.float32], top: int, threshold: float
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Rows of the nearest passages (N, K), -1 where fewer reach the threshold, and their cosines, falling.

    Equal cosines go by the order of the passages.
    """
    top = min(top, len(passages))
    rows, cosines = np.empty((len(queries), top), np.int64), np.empty((len(queries), top), np.float32)
    unit = _unit(passages).T
    for start in range(0, len(queries), BLOCK):
        score = _unit(queries[start : start + BLOCK]) @ unit
        order = np.argsort(-score, axis=1, kind="stable")[:, :top]
        best = np.take_along_axis(score, order, 1)
        rows[start : start + BLOCK] = np.where(best >= threshold, order, -1)
        cosines[start : start + BLOCK] = best
    return rows, cosines


def read_passages(folder: str | Path) -> pd.DataFrame:
    """id, text, source of each passage of a folder, sorted by id. Raises: UserError: none, damaged, an id twice."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder of passages (.txt, .md, .jsonl)")
    read = {".txt": _text, ".md": _markdown, ".jsonl": _lines}
    files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in read and not p.name.startswith("."))
    found: list[dict[str, str]] = []
    for path in files:
        name = path.relative_to(folder).as_posix()
        try:
            content = path.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise UserError(f"{path}: not UTF-8 text ({error})") from None
        stem = name.removesuffix(path.suffix)
        found += [
            {"id": i, "text": t, "source": name} for i, t in read[path.suffix.lower()](path, stem, content) if t.strip()
        ]
    if not found:
        raise UserError(f"{folder}: no passage; wanted .txt (one each), .md (one a heading), .jsonl (id and text)")
    table = pd.DataFrame(found).sort_values("id", ignore_index=True)
    if (twice := table["id"].duplicated()).any():
        raise UserError(f"{folder}: two passages have the id {table['id'][twice].iat[0]!r}; wanted one each")
    return table.assign(text=table["text"].str.split().str.join(" "))


def filtered(passages: pd.DataFrame, mode: str) -> tuple[pd.DataFrame, dict[str, Any]]:
    """The passages after the leak filter; empty ones are dropped and counted."""
    clean = leak_filter.remove_all(passages["text"].tolist(), mode)
    table = passages.assign(text=clean)
    changed = int((table["text"] != passages["text"]).sum())
    kept = table[table["text"].str.strip() != ""].reset_index(drop=True)
    if kept.empty:
        raise UserError(f"the leak filter ({mode}) leaves nothing of {len(passages)} passages")
    return kept, {
        "passages": len(kept),
        "passages_changed_by_filter": changed,
        "passages_emptied": len(table) - len(kept),
    }


def _unit(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


def _text(path: Path, stem: str, content: str) -> Iterator[tuple[str, str]]:
    yield stem, content


def _markdown(path: Path, stem: str, content: str) -> Iterator[tuple[str, str]]:
    """A passage for each heading with text under it, and one for the text before the first heading."""
    parts = re.split(r"(?m)^#+[ \t]+(.+)$", content)
    yield stem, parts[0]
    for heading, body in zip(parts[1::2], parts[2::2], strict=True):
        yield f"{stem}#{heading.strip()}", body and f"{heading.strip()}. {body}" if body.strip() else ""


def _lines(path: Path, stem: str, content: str) -> Iterator[tuple[str, str]]:
    for number, line in enumerate(content.splitlines(), 1):
        if not line.strip():
            continue
        try:
            passage = json_of(line, path)
            name, text = passage["id"], passage["text"]
        except (UserError, KeyError, TypeError):
            name, text = None, None
        if not isinstance(name, (str, int)) or not isinstance(text, str):
            raise UserError(f'{path}, line {number}: wanted {{"id": ..., "text": ...}}')
        yield str(name), text
