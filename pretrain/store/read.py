"""Read store/: films in memory-mapped shards of equal squares, without decoding or copying.

store/: shard-NNNNN.arrow (Arrow IPC, one record batch: dicom_id, height, width, encoding raw | jpeg, bytes),
index.parquet (dicom_id, shard, row, height, width), rejected.parquet (dicom_id, path, reason), store.json.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from configs import UserError, first_line
from configs.commands import command_line
from ehr_features.schema import Column
from ehr_features.typed import read_json, read_parquet
from ehr_features.typed.read import check_keys, check_values
from pretrain.shapes import INDEX, StoreJson
from pretrain.store.decode import Square

FORMAT = 1


class Store:
    """Reads a store/; cheap to pickle and to fork: each process maps the shards at its first read.

    Attributes:
        index: DataFrame dicom_id, shard, row, height, width.
        size: side of the squares; hash: 16 hex digits of the content; square: the preprocessing of the films.
    Raises: UserError: not a store, unfinished, or damaged.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if not (self.folder / "store.json").is_file():
            if (self.folder / "packing.json").is_file():
                raise UserError(f"{self.folder}: not all films are packed; run the same `images` command again")
            raise UserError(
                f"{self.folder}: not a store; write one with {command_line('images', 'images', f'out={self.folder}')}"
            )
        about = read_json(self.folder / "store.json", StoreJson)
        if about["format"] != FORMAT:
            raise UserError(
                f"{self.folder}/store.json: store format {about['format']}, this version reads {FORMAT}; pack it again"
            )
        for name, size in about["shards"].items():
            path = self.folder / name
            held = f"{path.stat().st_size:,} bytes" if path.is_file() else "absent"
            if not path.is_file() or path.stat().st_size != size:
                raise UserError(f"{path}: {held}, store.json says {size:,} bytes; was the store copied whole?")
        self.size: int = about["size"]
        self.hash: str = about["hash"]
        encoding = about.get("plan", {}).get("encoding", "raw")  # `preprocess` of version 0.2.0 leaves it out
        self.square = Square.from_json({"encoding": encoding, **about["preprocess"]}, f"{self.folder}/store.json")
        self.index = _read_index(self.folder / "index.parquet", about)
        self._places = dict(zip(self.index.dicom_id, zip(self.index.shard, self.index.row, strict=True), strict=True))
        self._frames: dict[str, Any] = about.get("frames", {})  # unknown for older stores
        self._shards: dict[int, Any] = {}

    def __len__(self) -> int:
        return len(self.index)

    def __contains__(self, dicom_id: object) -> bool:
        return dicom_id in self._places

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_shards": {}}  # memory maps cannot be pickled

    def __getitem__(self, dicom_id: str) -> np.ndarray:
        """One film, (size, size) uint8; from a raw shard a read-only view of the file."""
        try:
            shard, row = self._places[dicom_id]
        except KeyError:
            raise UserError(f"{self.folder}: film {dicom_id} is not in this store (see its rejected.parquet)") from None
        films = self._shards.get(shard)
        if films is None:
            path = self.folder / shard_name(shard)
            if path.name in self._frames:
                _check_frame(path, self._frames[path.name])
            films = self._shards[shard] = self._map(path, shard)
        return films[row] if isinstance(films, np.ndarray) else self.square.unpack(films[row].as_buffer())

    def _map(self, path: Path, shard: int) -> Any:
        """A raw shard as an array (n, size, size) over the mapped file; a jpeg shard as its column of bytes.

        Raises: UserError: damaged, or the index has other films at its places.
        """
        try:
            batch = pa.ipc.open_file(pa.memory_map(str(path))).get_batch(0)
        except (pa.ArrowInvalid, OSError) as error:
            raise UserError(f"{path}: damaged ({first_line(error)}); was the store copied whole?") from None
        mine = self.index[self.index["shard"] == shard].sort_values("row")
        if batch.column("dicom_id").to_pylist() != mine["dicom_id"].tolist() or not _counted(mine["row"]):
            raise UserError(
                f"{self.folder}/index.parquet: has other films, or films in another order, than {path.name}; was the "
                "store copied whole?"
            )
        column, kinds = batch.column("bytes"), set(batch.column("encoding").to_pylist())
        if odd := kinds - {self.square.encoding}:
            raise UserError(f"{path}: holds films as {odd.pop()}, store.json says {self.square.encoding}")
        if self.square.encoding == "raw":
            assert column.offset == 0
            pixels = np.frombuffer(column.buffers()[2], np.uint8)
            if pixels.size != len(batch) * self.size**2:
                raise UserError(f"{path}: its films are not of the {self.size} px that store.json says")
            return pixels.reshape(len(batch), self.size, self.size)
        return column

    def read(self, dicom_ids: Sequence[str]) -> np.ndarray:
        """Films in the given order: (N, size, size) uint8, a copy."""
        if absent := [i for i in dicom_ids if i not in self._places]:
            raise UserError(
                f"{self.folder}: {len(absent)} of {len(dicom_ids)} films are not in this store, e.g. {absent[0]}; "
                f"its rejected.parquet says why, or it was packed with other views"
            )
        films = np.empty((len(dicom_ids), self.size, self.size), np.uint8)
        for place, dicom_id in enumerate(dicom_ids):
            films[place] = self[dicom_id]
        return films


def _check_frame(path: Path, frame: Any) -> None:
    """Refuse a shard with changed framing before Arrow reads it, because that can crash the process."""
    start, stop, wanted = frame
    if stop > path.stat().st_size or frame_hash(path, start, stop) != wanted:
        raise UserError(f"{path}: damaged (outside its films, by store.json); was the store copied whole?")


def _counted(rows: pd.Series) -> bool:
    """Whether sorted rows are 0, 1, 2, ..."""
    return bool((rows.to_numpy() == np.arange(len(rows))).all())


def _read_index(path: Path, about: dict[str, Any]) -> pd.DataFrame:
    """index.parquet, which fits store.json. Raises: UserError."""
    advice = "was the store copied whole?"
    index = read_parquet(path, INDEX, advice, names=list(INDEX))
    if len(index) != about.get("num_films", len(index)) or index.empty:
        raise UserError(f"{path}: {len(index)} films, store.json says {about.get('num_films')}; {advice}")
    limits = {"shard": Column("int64", high=len(about["shards"]) - 1)}
    limits |= {side: Column("int64", among=(about["size"],)) for side in ("height", "width")}
    check_values(index, limits, path, advice)
    check_keys(index, ("shard", "row"), path, advice)
    return index


def shard_name(number: int) -> str:
    """shard-00000.arrow and so on."""
    return f"shard-{number:05d}.arrow"


def frame_hash(path: Path, start: int, stop: int) -> str:
    """sha256 of a file without its bytes from `start` to `stop`."""
    with path.open("rb") as file:
        sha = hashlib.sha256(file.read(start))
        file.seek(stop)
        sha.update(file.read())
    return sha.hexdigest()
