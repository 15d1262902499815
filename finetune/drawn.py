"""Resamples of runs, kept under the digest of what they were drawn from: a report that is made again reads them.

Input: a key over labels, scores, subjects and settings (`compare.paired`). Output: values and resamples of each metric,
in memory and, with a folder, in its files `resamples_DIGEST.npz`, as `probe` and `fuse` keep features in RUNS/cache.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, MutableMapping
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from ehr_features.files import digest, file_digest, new_file
from finetune import metrics, resample
from finetune.resample import Floats

Resampled = tuple[dict[str, Floats], dict[str, Floats]]  # what `metrics.distribution` returns


class Drawn(MutableMapping[bytes, Resampled]):
    """A mapping from digest to resamples.

    Args:
        folder: of the files; None keeps them in memory alone. A folder that cannot be written to does no harm.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder
        self._held: dict[bytes, Resampled] = {}

    def __getitem__(self, key: bytes) -> Resampled:
        if key not in self._held:
            self._held[key] = self._read(key)
        return self._held[key]

    def __setitem__(self, key: bytes, value: Resampled) -> None:
        self._held[key] = value
        if (path := self._path(key)) is None:
            return
        arrays = {f"{kind}_{name}": of for kind, part in zip("vd", value, strict=True) for name, of in part.items()}
        try:
            with new_file(path) as part, part.open("wb") as file:
                np.savez(file, **arrays)  # type: ignore[arg-type]
        except OSError:  # read-only, or full: they are drawn again the next time
            self.folder = None

    def __delitem__(self, key: bytes) -> None:
        del self._held[key]

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._held)

    def __len__(self) -> int:
        return len(self._held)

    def _path(self, key: bytes) -> Path | None:
        return None if self.folder is None else self.folder / f"resamples_{digest([_code(), key.hex()])}.npz"

    def _read(self, key: bytes) -> Resampled:
        """Raises: KeyError: there is no such file, or it is damaged."""
        path = self._path(key)
        if path is None or not path.is_file():
            raise KeyError(key)
        try:
            with path.open("rb") as file, np.load(file) as arrays:
                values, draws = ({n[2:]: arrays[n] for n in arrays if n[:2] == f"{kind}_"} for kind in "vd")
        except (OSError, ValueError, BadZipFile, EOFError):
            raise KeyError(key) from None
        return values, draws


@functools.cache
def _code() -> str:
    """Of the code that draws: another version's resamples are not read."""
    return digest([file_digest(str(module.__file__)) for module in (resample, metrics)])
