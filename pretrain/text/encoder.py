"""Texts -> vectors or token states by a frozen text encoder in a local folder (extra `text`).

Input: a Hugging Face or sentence-transformers folder, and texts. Output: (N, D) float32, one vector a text; or a
sequence of token states a text. Each distinct text is embedded once: safetensors under a hash of the encoder's files
list the hashes of their texts, so that a stopped run goes on with its next file and other notes embed new texts alone.

Nothing is downloaded, no code of the folder is run: modules outside sentence-transformers and `auto_map` are refused,
and weights in a pickle are read with `weights_only`.
"""

from __future__ import annotations

import math
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from configs import UserError, first_line
from ehr_features.files import digest, file_digest, new_file
from ehr_features.progress import Bar
from ehr_features.typed import read_json
from pretrain.run.cache import complete, header
from pretrain.shapes import Module

PART = {"vectors": 8192, "tokens": 2048}  # texts of a file of the cache
MADE_OF = (".safetensors", ".bin", ".json", ".txt", ".model")  # files on which an encoder's output depends
INSTALL = "pip install 'ehr-msn[text]' (in a checkout: pip install -e '.[text]')"


class TextEncoder:
    """A frozen text encoder; its weights are read when the first text is embedded.

    Attributes:
        folder: its folder. key: 16 hex digits of its files.
    Raises: UserError: no such folder, not an encoder, or one that wants its own code to run.
    """

    def __init__(self, folder: str | Path, device: str | torch.device | None = None) -> None:
        self.folder = Path(folder)
        self.device = str(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        _check(self.folder)
        files = sorted(p for p in self.folder.rglob("*") if p.is_file() and p.suffix in MADE_OF)
        self.key = digest([[p.relative_to(self.folder).as_posix(), file_digest(p)] for p in files])

    @cached_property
    def model(self) -> Any:
        """The sentence-transformers model; a bare Hugging Face folder gets the mean over its tokens."""
        try:
            from sentence_transformers import SentenceTransformer
            from transformers.utils import logging
        except ImportError as error:
            raise UserError(f"text needs the extra `text`: {INSTALL} ({first_line(error)})") from None
        logging.disable_progress_bar()  # of reading the weights
        safe = any(self.folder.glob("*.safetensors"))
        weights: dict[str, Any] = {"use_safetensors": True} if safe else {"weights_only": True}
        try:
            model = SentenceTransformer(
                str(self.folder), device=self.device, local_files_only=True, trust_remote_code=False,
                model_kwargs=weights,
            )  # fmt: skip
        except (OSError, ValueError, KeyError, RuntimeError, pickle.UnpicklingError, SafetensorError) as error:
            raise UserError(f"{self.folder}: cannot be opened as a text encoder: {first_line(error)}") from None
        return model.eval()

    @property
    def max_tokens(self) -> int | None:
        """The encoder's context length; longer texts are truncated and counted."""
        return self.model.max_seq_length

    def lengths(self, texts: Sequence[str]) -> list[int]:
        """Number of tokens of each text, special tokens included, before truncation."""
        found = self.model.tokenizer(list(texts), truncation=False, padding=False, verbose=False)
        return [len(ids) for ids in found["input_ids"]]

    def vectors(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """(N, D) of one batch: the encoder's own pooling."""
        found = self.model.encode(list(texts), batch_size=len(texts), show_progress_bar=False, convert_to_numpy=True)
        return np.asarray(found, np.float32).reshape(len(texts), -1)

    def tokens(self, texts: Sequence[str]) -> list[NDArray[np.float16]]:
        """The last layer's states of each text's tokens, special ones too, of one batch: N arrays (T, D)."""
        found = self.model.encode(
            list(texts), batch_size=len(texts), show_progress_bar=False, output_value="token_embeddings"
        )
        return [states.detach().float().cpu().numpy().astype(np.float16) for states in found]


def _check(folder: Path) -> None:
    """Refuse a folder that is not an encoder or that needs its own code."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; a text encoder is read from a local folder, nothing is downloaded")
    modules = folder / "modules.json"
    if not modules.is_file() and not (folder / "config.json").is_file():
        raise UserError(f"{folder}: not a text encoder: neither modules.json nor config.json is there")
    for module in read_json(modules, list[Module]) if modules.is_file() else []:
        if not module["type"].startswith("sentence_transformers."):
            raise UserError(f"{modules}: the module {module['type']!r} is code of its own, which is never run")
    for path in sorted(folder.rglob("*config*.json")):
        config = read_json(path, dict[str, Any] | list[Any])
        if isinstance(config, dict) and config.get("auto_map"):
            raise UserError(f"{path}: `auto_map` asks for code of its own, which is never run; take another encoder")


@dataclass(frozen=True)
class Tokens:
    """Token states of N texts on disk; a batch reads its own only. Picklable: files are opened in each process.

    Attributes:
        paths: files of the cache. part, start, length: (N,) where each text's states are; length 0: no text.
        width: D.
    """

    paths: tuple[Path, ...]
    part: NDArray[np.int64]
    start: NDArray[np.int64]
    length: NDArray[np.int64]
    width: int

    def read(self, rows: NDArray[np.int64], least: int = 1) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """rows (B,), -1 for no text -> states (B, T, D), T at least `least`, zero after a text's end; lengths (B,)."""
        lengths = np.where(rows >= 0, self.length[rows], 0)
        out = np.zeros((len(rows), max(least, int(lengths.max(initial=0))), self.width), np.float32)
        for part in np.unique(self.part[rows[lengths > 0]]):
            with safe_open(self.paths[part], "numpy") as file:
                values = file.get_slice("values")
                for at in np.flatnonzero((lengths > 0) & (self.part[rows] == part)):
                    start = int(self.start[rows[at]])
                    out[at, : lengths[at]] = values[start : start + int(lengths[at])]
        return out, lengths


def embed(encoder: TextEncoder, texts: Sequence[str], cache: Path) -> tuple[NDArray[np.float32], int]:
    """Vectors of texts, and how many distinct ones the encoder cut short.

    Args:
        texts: N, repeats are fine. cache: folder for what was embedded.
    Returns: (N, D) float32, rows as `texts`; the number of texts that were truncated.
    """
    paths, part, row, which = _places(encoder, texts, cache, "vectors")
    out, cut = np.empty((len(part), 0), np.float32), 0
    for number, path in enumerate(paths):
        own = np.flatnonzero(part == number)
        with safe_open(path, "numpy") as file:
            values = file.get_tensor("values")
            cut += int(file.get_tensor("truncated")[row[own]].sum())
        out = out if out.shape[1] else np.empty((len(part), values.shape[1]), np.float32)
        out[own] = values[row[own]]
    return out[which], cut


def embed_tokens(encoder: TextEncoder, texts: Sequence[str], cache: Path) -> tuple[Tokens, int]:
    """Token states of texts, left on disk, and how many distinct ones the encoder cut short."""
    paths, part, row, which = _places(encoder, texts, cache, "tokens")
    start, length, width, cut = np.zeros_like(part), np.zeros_like(part), 0, 0
    for number, path in enumerate(paths):
        own = np.flatnonzero(part == number)
        with safe_open(path, "numpy") as file:
            offsets, width = file.get_tensor("offsets"), file.get_slice("values").get_shape()[1]
            cut += int(file.get_tensor("truncated")[row[own]].sum())
        start[own], length[own] = offsets[row[own]], np.diff(offsets)[row[own]]
    return Tokens(tuple(paths), part[which], start[which], length[which], width), cut


def _places(
    encoder: TextEncoder, texts: Sequence[str], cache: Path, kind: str
) -> tuple[list[Path], NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Where the texts' states are; those that are in no file of the cache are embedded now.

    Args:
        kind: vectors | tokens.
    Returns: the files; of each distinct text the number of its file, and its row in there; (N,) which one a text is.
    """
    assert len(texts), "there are texts"
    distinct = sorted(set(texts))
    names = {digest(text): text for text in distinct}  # a cache lists no text

    def make(part: list[str], path: Path, bar: Bar) -> None:
        _write(encoder, part, [names[name] for name in part], path, kind, bar)

    what = f"embedding texts with {encoder.folder.name}"
    found = complete(cache, f"text_{digest([encoder.key, kind])}", list(names), PART[kind], make, what, "texts")
    paths = sorted({path for path, _ in found.values()})
    number = {path: i for i, path in enumerate(paths)}
    part, row = np.array([(number[found[name][0]], found[name][1]) for name in names], np.int64).T
    place = {text: i for i, text in enumerate(distinct)}
    return paths, part, row, np.array([place[text] for text in texts], np.int64)


def _write(encoder: TextEncoder, names: Sequence[str], texts: Sequence[str], path: Path, kind: str, bar: Bar) -> None:
    """Embed texts in batches of similar length and store them in the given order."""
    lengths = np.array(encoder.lengths(texts))
    limit = math.inf if encoder.max_tokens is None else encoder.max_tokens
    found: list[NDArray[Any]] = [np.empty(0)] * len(texts)
    for rows in by_length(np.minimum(lengths, limit)):
        given = [texts[i] for i in rows]
        states = encoder.vectors(given) if kind == "vectors" else encoder.tokens(given)
        for i, state in zip(rows, states, strict=True):
            found[i] = state
        bar.advance(len(rows))
    arrays = {"values": np.stack(found) if kind == "vectors" else np.concatenate(found), "truncated": lengths > limit}
    if kind == "tokens":
        arrays["offsets"] = np.cumsum([0, *(len(states) for states in found)]).astype(np.int64)
    about = {"encoder": encoder.folder.name, **header(names)}
    with new_file(path) as part:
        save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, part, metadata=about)


def by_length(lengths: NDArray[Any], most: int = 64) -> list[NDArray[np.int64]]:
    """Row numbers in batches of at most `most`, the longest first; none is 1.5 times as long as a batch mate."""
    order = np.argsort(-lengths, kind="stable")
    batches: list[list[int]] = []
    for row in order.tolist():
        if not batches or len(batches[-1]) == most or lengths[batches[-1][0]] > 1.5 * max(lengths[row], 8):
            batches.append([])
        batches[-1].append(row)
    return [np.array(batch, np.int64) for batch in batches]
