"""Text encoders from a local folder, and their notes."""

from __future__ import annotations

import builtins
import json
import pickle
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs import UserError
from pretrain.text import encoder as text
from pretrain.text.encoder import TextEncoder, by_length, embed, embed_tokens
from pretrain.text.notes import check_notes, note_tokens, note_vectors, read_notes

Make = Callable[..., Path]
NOTES = ["woman with cough", "man with chest pain and leg swelling", "fever", "the old man of the woman " * 9]


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Block the network."""

    def refuse(*args: object, **more: object) -> None:
        raise AssertionError("something reached for the network")

    for name in ("getaddrinfo", "create_connection"):
        monkeypatch.setattr(socket, name, refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.mark.parametrize("safe", [True, False])
def test_a_hugging_face_folder_gives_the_mean_of_its_tokens(make_text_model: Make, offline: None, safe: bool) -> None:
    encoder = TextEncoder(make_text_model(safe=safe))
    vectors, tokens = encoder.vectors(NOTES), encoder.tokens(NOTES)
    assert vectors.shape == (4, 16)
    for vector, states in zip(vectors, tokens, strict=True):
        np.testing.assert_allclose(vector, states.astype(np.float32).mean(0), atol=2e-3)


def test_each_distinct_text_is_embedded_once_and_kept(
    make_text_model: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, seen = make_text_model(), []
    real = TextEncoder.vectors
    monkeypatch.setattr(TextEncoder, "vectors", lambda self, t: seen.extend(t) or real(self, t))
    first, cut = embed(TextEncoder(folder), NOTES * 3, tmp_path / "cache")
    assert sorted(seen) == sorted(NOTES) and cut == 1
    np.testing.assert_array_equal(first[:4], first[4:8])
    monkeypatch.setattr(TextEncoder, "model", property(lambda self: pytest.fail("the weights were read again")))
    again, cut = embed(TextEncoder(folder), NOTES[::-1], tmp_path / "cache")
    np.testing.assert_array_equal(again, first[:4][::-1])
    assert cut == 1 and len(seen) == 4


def test_a_stopped_embedding_goes_on_with_its_next_part(
    word_encoder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text, "PART", {"vectors": 3, "tokens": 2})
    texts = [f"text {i}" for i in range(8)]
    real = word_encoder.vectors

    def fail_at_the_second(self: Any, given: list[str]) -> Any:
        if word_encoder.embedded:
            raise KeyboardInterrupt
        return real(self, given)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(word_encoder, "vectors", fail_at_the_second)
        embed(word_encoder("a"), texts, tmp_path)
    assert len(list(tmp_path.glob("text_*"))) == 1 and not list(tmp_path.glob(".*"))
    found, _ = embed(word_encoder("a"), texts, tmp_path)
    assert sorted(word_encoder.embedded) == sorted(texts)
    np.testing.assert_array_equal(found, word_encoder("a").vectors(texts))


def test_other_notes_embed_only_the_texts_that_are_new(word_encoder: Any, tmp_path: Path) -> None:
    embed(word_encoder("a"), NOTES[:3], tmp_path)
    before = list(word_encoder.embedded)
    found, _ = embed(word_encoder("a"), [*NOTES[1:], "a new one", NOTES[1]], tmp_path)
    assert sorted(word_encoder.embedded) == sorted([*before, *NOTES[3:], "a new one"])
    np.testing.assert_array_equal(found, word_encoder("a").vectors([*NOTES[1:], "a new one", NOTES[1]]))


def test_a_damaged_file_of_the_cache_is_written_again(word_encoder: Any, tmp_path: Path) -> None:
    first, _ = embed(word_encoder("a"), NOTES, tmp_path)
    path = next(tmp_path.glob("text_*"))
    path.write_bytes(path.read_bytes()[:50])
    np.testing.assert_array_equal(embed(word_encoder("a"), NOTES, tmp_path)[0], first)


def test_another_encoder_has_another_key(make_text_model: Make) -> None:
    folder = make_text_model()
    before = TextEncoder(folder).key
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"hidden_act": "relu"}))
    assert TextEncoder(folder).key != before


def test_token_states_are_read_from_disk_in_any_order(make_text_model: Make, tmp_path: Path) -> None:
    encoder = TextEncoder(make_text_model())
    tokens, cut = embed_tokens(encoder, NOTES, tmp_path / "cache")
    tokens = pickle.loads(pickle.dumps(tokens))
    states, lengths = tokens.read(np.array([2, -1, 3, 0]))
    assert lengths.tolist() == [3, 0, 16, 5] and states.shape == (4, 16, 16) and cut == 1
    np.testing.assert_allclose(states[3, :5], encoder.tokens([NOTES[0]])[0], atol=2e-3)
    assert not states[1].any() and not states[0, 3:].any()


@given(st.lists(st.integers(1, 600), min_size=1, max_size=300))
def test_batches_hold_each_text_once_and_like_lengths(lengths: list[int]) -> None:
    sizes = np.array(lengths)
    batches = by_length(sizes, most=16)
    assert sorted(np.concatenate(batches).tolist()) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) <= 16 and sizes[batch].max() <= 1.5 * max(sizes[batch].min(), 8)


def test_code_that_comes_with_a_folder_is_never_run(make_text_model: Make, tmp_path: Path) -> None:
    folder = make_text_model()
    (folder / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Mine: ...\n")
    (folder / "modules.json").write_text(json.dumps([{"idx": 0, "name": "0", "path": "", "type": "mine.Mine"}]))
    with pytest.raises(UserError, match=r"mine\.Mine.*never run"):
        TextEncoder(folder)
    (folder / "modules.json").unlink()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModel": "mine.Mine"}}))
    with pytest.raises(UserError, match="auto_map"):
        TextEncoder(folder)
    (folder / "config.json").write_text(json.dumps(config))
    TextEncoder(folder)
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer | {"auto_map": {"AutoTokenizer": "mine.Mine"}}))
    with pytest.raises(UserError, match=r"tokenizer_config\.json.*auto_map"):
        TextEncoder(folder)
    assert not (tmp_path / "ran").exists()


def test_a_pickle_that_runs_code_is_refused(make_text_model: Make, tmp_path: Path) -> None:
    folder = make_text_model(safe=False)

    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path(tmp_path / "ran").write_text, ("x",))

    with (folder / "pytorch_model.bin").open("wb") as file:
        pickle.dump({"embeddings": Bomb()}, file, protocol=2)
    with pytest.raises(UserError, match="cannot be opened"):
        _ = TextEncoder(folder).model
    assert not (tmp_path / "ran").exists()


def test_what_is_no_encoder_is_refused_without_a_download(tmp_path: Path, offline: None) -> None:
    with pytest.raises(UserError, match="no such folder"):
        TextEncoder("sentence-transformers/all-MiniLM-L6-v2")
    with pytest.raises(UserError, match="not a text encoder"):
        TextEncoder(tmp_path)


def test_without_the_extra_its_name_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text("{}")
    real = builtins.__import__

    def fail(name: str, *args: Any, **more: Any) -> Any:
        if name.startswith("sentence_transformers"):
            raise ImportError(name)
        return real(name, *args, **more)

    monkeypatch.setattr(builtins, "__import__", fail)
    with pytest.raises(UserError, match=r"ehr-msn\[text\]"):
        TextEncoder(tmp_path).vectors(["a"])


def test_the_packaged_minilm_knows_what_is_alike(minilm: Path, offline: None) -> None:
    encoder = TextEncoder(minilm)
    vectors = encoder.vectors(["The patient is short of breath.", "She has dyspnea.", "He broke his ankle."])
    assert vectors.shape == (3, 384) and encoder.max_tokens == 256
    alike = vectors @ vectors.T
    assert alike[0, 1] > alike[0, 2] + 0.2


def test_a_film_without_a_note_has_zeros_and_a_mask(word_encoder: Any, write_notes: Make, tmp_path: Path) -> None:
    notes = read_notes(write_notes({"a": "cough and fever", "b": "fall", "c": "  ", "d": "cough and fever"}))
    vectors, has, about = note_vectors(notes, "words", ["b", "x", "a", "c", None, "d"], tmp_path / "cache")
    assert has.tolist() == [True, False, True, False, False, True]
    assert not vectors[~has].any() and np.array_equal(vectors[2], vectors[5])
    np.testing.assert_array_equal(vectors[0], word_encoder("words").vectors(["fall"])[0])
    assert about["films_with_note"] == 3 and about["distinct_notes_truncated"] == 0
    tokens, rows, _ = note_tokens(notes, "words", ["b", "x", "a"], tmp_path / "cache")
    assert tokens.read(rows)[1].tolist() == [1, 0, 3]


def test_notes_of_another_type_are_refused_by_their_column(write_notes: Make) -> None:
    folder = write_notes({"a": "cough", "b": "fall"})
    path, films = folder / "notes.parquet", pd.Series(pd.Timestamp("2200-01-01"), index=["a", "b"])
    table = pd.read_parquet(path)
    for column, value, says in (
        ("available_at", "x7", "got (large_)?string, wanted times"),
        ("available_at", pd.NaT, "2 rows, the first row 1: wanted a value in every row"),
        ("note", 7, "got int64, wanted text"),
        ("dicom_id", None, "wanted a value in every row"),
    ):
        table.assign(**{column: value}).to_parquet(path)
        for read in (read_notes, check_notes):
            with pytest.raises(UserError, match=rf"notes\.parquet: column `{column}`.*{says}"):
                read(folder, films)
    table.drop(columns="note").to_parquet(path)
    with pytest.raises(UserError, match="columns missing: note"):
        check_notes(folder, films)


def test_a_note_from_after_its_film_is_refused(write_notes: Make) -> None:
    folder = write_notes({"a": "cough", "b": "fall"}, known=["2150-01-01 10:00", "2150-01-01 12:00"])
    films = pd.Series(pd.to_datetime(["2150-01-01 11:00"] * 2), index=["a", "b"])
    with pytest.raises(UserError, match="1 notes hold what was known only after their film"):
        read_notes(folder, films)
    assert len(read_notes(folder, films + pd.Timedelta(hours=1)).table) == 2


def test_notes_that_cannot_be_used_are_refused(write_notes: Make, tmp_path: Path, word_encoder: Any) -> None:
    with pytest.raises(UserError, match="not a folder of notes"):
        read_notes(tmp_path)
    folder = write_notes({"a": "cough"})
    with pytest.raises(UserError, match="none of 2 films has a note"):
        note_vectors(read_notes(folder), "words", ["x", "y"], tmp_path / "cache")
    pd.DataFrame({"dicom_id": ["a", "a"], "note": "x", "available_at": pd.Timestamp(0)}).to_parquet(
        folder / "notes.parquet"
    )
    with pytest.raises(UserError, match="`dicom_id`, row 2: wanted each value once"):
        read_notes(folder)
    pd.DataFrame({"dicom_id": ["a"]}).to_parquet(folder / "notes.parquet")
    with pytest.raises(UserError, match="columns missing: available_at, note"):
        read_notes(folder)
