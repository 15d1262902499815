"""`embed` and `nearest`: features of any films by an exported encoder, without a record.

Input: encoder/ and a folder of films, a list of paths (.txt, .csv with a column path), or one film. Output:
Parquet with dicom_id, path and columns f0 ... f(D-1); films that cannot be read are set aside, named and counted.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from configs import UserError
from configs.commands import command_line
from ehr_features.files import check_new_file, new_file
from ehr_features.own_films.ids import SUFFIXES, film_id
from ehr_features.progress import Bar
from ehr_features.schema import Column
from ehr_features.typed import read_parquet, undamaged
from ehr_features.typed.read import checked, json_of
from finetune.config.shapes import Embedded
from finetune.encoders import Frozen, open_encoder
from pretrain import encoder as encoders
from pretrain.store.decode import BadFilm
from pretrain.store.listing import films_of


def embed(encoder: str, films: str, out: str, *, pool: str | None = None, batch_size: int = 64) -> Path:
    """Write features of `films` to `out`.

    Args:
        pool: of the encoder; its own if None.
    Raises: UserError: no encoder, no films, or none that can be read.
    """
    check_new_file(out)
    frozen, made = _opened(encoder)
    listed = _films(films)
    print(f"{len(listed):,} films by {encoder}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    kept: list[int] = []
    bad: list[tuple[str, str]] = []
    parts: list[np.ndarray] = []
    with Bar("embedding", len(listed), "films") as bar:
        for start in range(0, len(listed), batch_size):
            batch = []
            for row, path in enumerate(listed["path"][start : start + batch_size], start):
                try:
                    batch.append(made.preprocess.read(path))
                    kept.append(row)
                except BadFilm as error:
                    bad.append((path, str(error)))
            if batch:
                names = listed["path"].iloc[kept[-len(batch) :]].tolist()
                found = encoders.embed(made, batch, pool=pool, batch_size=batch_size, device=device, names=names)
                parts.append(found.numpy())
            bar.advance(len(listed[start : start + batch_size]))
    if not kept:
        raise UserError(f"{films}: none of {len(listed)} films can be read; the first: {bad[0][0]}: {bad[0][1]}")
    for why, paths in _reasons(bad).items():
        print(f"left out: {paths[0]}{f' and {len(paths) - 1} more' if len(paths) > 1 else ''}: {why}")
    features = np.concatenate(parts)
    about = {"encoder": encoder, "key": frozen.key, "pool": pool or made.meta["pool"], "left_out": len(bad)}
    about["content"] = content(listed.iloc[kept], features)
    table = pa.table(
        {
            **{name: listed[name].iloc[kept].tolist() for name in ("dicom_id", "path")},
            **{f"f{i}": features[:, i] for i in range(features.shape[1])},
        },
        metadata={"ehr_msn": json.dumps(about)},
    )
    with new_file(out) as part:
        pq.write_table(table, part)
    print(f"wrote {out}: {len(kept):,} films x {features.shape[1]} features" + f", {len(bad)} left out" * bool(bad))
    print(f"next: {command_line('nearest', out)}")
    return Path(out)


def _reasons(bad: list[tuple[str, str]]) -> dict[str, list[str]]:
    """Films that cannot be read, by the reason."""
    found: dict[str, list[str]] = {}
    for path, why in bad:
        found.setdefault(why.replace(path, "it"), []).append(path)
    return found


def _opened(encoder: str) -> tuple[Frozen, encoders.Encoder]:
    """An encoder that takes films. Raises: UserError: there is none."""
    frozen = open_encoder(encoder)
    if frozen.encoder is None:
        raise UserError(f"{encoder}: no encoder; give an encoder/ folder or a run that has one")
    if frozen.said:
        print(frozen.said)
    return frozen, frozen.encoder


def _films(place: str) -> pd.DataFrame:
    """One row per film (dicom_id, path) of a folder, a list, or a file. Raises: UserError: no film."""
    path = Path(place)
    if path.is_file() and path.suffix not in (".txt", ".csv", ".parquet"):
        return pd.DataFrame({"dicom_id": [film_id(path)], "path": [place]})
    films, others = films_of(place)
    for what, number in others.items():
        print(f"{number:,} {what}")
    if films.empty:
        raise UserError(f"{place}: no film here (wanted {', '.join(SUFFIXES)}, or files with such content)")
    return films.reset_index(drop=True)


def read_embeddings(path: str) -> tuple[pd.DataFrame, dict[str, Any]]:
    """A file that `embed` wrote: its rows, and what it notes of its making. Raises: UserError."""
    again = "run `embed` again"
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file")
    with undamaged(path, again):
        kinds = pq.read_schema(path)
    said = (kinds.metadata or {}).get(b"ehr_msn")
    if said is None:
        raise UserError(f"{path}: not a file that `embed` wrote; {again}")
    about = checked(json_of(said.decode(errors="replace"), path), Embedded, path)
    number = sum(name.startswith("f") and name[1:].isdigit() for name in kinds.names)
    wanted = {f"f{i}": Column("float64", null=False) for i in range(max(number, 1))}
    wanted |= {name: Column("string", null=False) for name in ("dicom_id", "path")}
    frame = read_parquet(path, wanted, again, names=list(wanted))
    if frame.empty:
        raise UserError(f"{path}: no rows; {again}")
    features = frame.drop(columns=["dicom_id", "path"]).to_numpy(np.float32)
    if about.get("content") not in (None, content(frame, features)):
        print(f"warning: {path}: changed since `embed` wrote it, and read as it is now", file=sys.stderr)
    return frame, about


def content(films: pd.DataFrame, features: np.ndarray) -> str:
    """16 hex digits of rows: ids, paths, features."""
    sha = hashlib.sha256("\0".join([*films["dicom_id"], *films["path"]]).encode())
    sha.update(np.ascontiguousarray(features, np.float32).tobytes())
    return sha.hexdigest()[:16]


def nearest(embeddings: str, film: str | None = None, *, number: int = 10, encoder: str | None = None) -> pd.DataFrame:
    """Print the films most similar to one, by the cosine of centred features.

    Args:
        embeddings: a file that `embed` wrote.
        film: an id or a path in it, or another film's file (then its encoder is needed); None: the first film in it.
        encoder: instead of the one that the file names.
    Raises: UserError: not such a file, no such film.
    """
    frame, about = read_embeddings(embeddings)
    x = frame.drop(columns=["dicom_id", "path"]).to_numpy(np.float32)
    centre = x.mean(0)
    own = np.flatnonzero(frame["path"] == film) if film is not None else np.array([0])
    own = own if len(own) else np.flatnonzero(frame["dicom_id"] == film)
    if len(own) > 1:
        raise UserError(f"{film}: {len(own)} films of {embeddings} have this name; give the path of one")
    if len(own):
        query = x[own[0]]
    elif film is not None and Path(film).is_file():
        frozen, made = _opened(encoder or about["encoder"])
        if about.get("key") != frozen.key:
            raise UserError(
                f"{embeddings}: made by other weights than {frozen.name} has now, or from films prepared otherwise; "
                "run `embed` again"
            )
        try:
            pixels = made.preprocess.read(film)
        except BadFilm as error:
            raise UserError(f"{film}: {error}") from None
        query = encoders.embed(made, pixels, pool=about["pool"], names=[film]).numpy()[0]
    else:
        raise UserError(f"{film}: neither a film of {embeddings} nor a file")
    a, b = x - centre, query - centre
    cosine = a @ b / np.maximum(np.linalg.norm(a, axis=1) * np.linalg.norm(b), 1e-12)
    if len(own):
        cosine[own] = -np.inf
    order = np.argsort(-cosine)[: min(number, len(frame) - len(own))]
    found = frame.iloc[order][["dicom_id", "path"]].assign(cosine=cosine[order]).reset_index(drop=True)
    print(found.to_string(index=False, float_format="{:.3f}".format))
    return found
