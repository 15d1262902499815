"""Passages for notes: each note is its own query, and results stay in a column of their own."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs import UserError
from ehr_features.files import file_digest, write_json
from ehr_features.typed import read_json
from pretrain.__main__ import main
from pretrain.text.knowledge import nearest, read_passages, retrieve

Make = Callable[..., Path]
EXAMPLE = Path(__file__).resolve().parents[2] / "docs" / "knowledge"
NOTES = {
    "film1": "Chief complaint: difficulty in breathing, swollen legs.",
    "film2": "Chief complaint: fall, old age, pain in hip, wrist, ribs.",
    "film3": "Home medication: metformin, insulin.",
    "film4": "Zzz.",
}


def test_the_example_has_ten_passages_that_pass_both_filters() -> None:
    from ehr_features.notes.leak_filter import remove_all

    passages = read_passages(EXAMPLE)
    assert len(passages) == 10 and set(passages["source"].map(lambda s: Path(s).suffix)) == {".md", ".txt", ".jsonl"}
    assert remove_all(passages["text"].tolist(), "standard") == passages["text"].tolist()


def test_different_notes_get_different_passages(word_encoder: Any, write_notes: Make, tmp_path: Path) -> None:
    """With a constant query all rows would be equal."""
    passages = tmp_path / "passages"
    passages.mkdir()
    for name, words in {"a": "breathing swollen legs", "b": "fall hip pain", "c": "metformin insulin sugar"}.items():
        (passages / f"{name}.txt").write_text(words)
    folder = write_notes(NOTES)
    before = file_digest(folder / "notes.parquet")
    table = pd.read_parquet(retrieve(folder, passages, "words", top=1, threshold=0.3)).set_index("dicom_id")
    assert [list(ids) for ids in table["passage_ids"][:3]] == [["a"], ["b"], ["c"]]
    assert list(table.loc["film4", "passage_ids"]) == [] and list(table.loc["film4", "scores"]) == []
    assert file_digest(folder / "notes.parquet") == before, "the notes are as they were"
    about = read_json(folder / "knowledge.json")
    assert about["notes"] == 4 and about["notes_with_passages"] == 3 and about["passages"] == 3


def test_the_packaged_minilm_finds_what_each_note_is_about(minilm: Path, write_notes: Make) -> None:
    folder = write_notes({k: v for k, v in NOTES.items() if k != "film4"})
    options = ["--text-encoder", str(minilm), "--top", "2", "--threshold", "0.2"]
    with pytest.raises(SystemExit) as left:
        main(["knowledge", str(folder), str(EXAMPLE), *options])
    assert left.value.code == 0
    table = pd.read_parquet(folder / "knowledge.parquet").set_index("dicom_id")
    wanted = {"film1": "complaints#Shortness of breath", "film2": "falls", "film3": "drugs/diabetes"}
    assert {film: ids[0] for film, ids in table["passage_ids"].items()} == wanted
    assert all((np.diff(scores) <= 0).all() and (scores >= 0.2).all() for scores in table["scores"])


def test_passages_pass_the_leak_filter_of_the_notes(word_encoder: Any, write_notes: Make, tmp_path: Path) -> None:
    passages = tmp_path / "passages"
    passages.mkdir()
    (passages / "a.txt").write_text("Fever. Pneumonia. Cough and fever.")
    (passages / "b.txt").write_text("Pneumothorax.")
    folder = write_notes({"film": "cough and fever"})
    for mode, text in (("standard", "Fever. Cough and fever."), ("none", "Fever. Pneumonia. Cough and fever.")):
        write_json(folder / "provenance.json", {"config": {"filter": mode}})
        retrieve(folder, passages, "words", threshold=-1)
        assert pd.read_parquet(folder / "passages.parquet").set_index("id").loc["a", "text"] == text
        about = read_json(folder / "knowledge.json")
        assert (about["passages"], about["passages_emptied"]) == ((1, 1) if mode == "standard" else (2, 0))


@given(st.integers(1, 6), st.integers(1, 9), st.floats(-1, 1), st.integers(0, 99))
def test_the_nearest_are_those_of_a_full_sort(top: int, number: int, threshold: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    q, p = rng.normal(size=(5, 4)).astype(np.float32), rng.normal(size=(number, 4)).astype(np.float32)
    rows, scores = nearest(q, p, top, threshold)
    for i in range(5):
        cosine = p @ q[i] / np.linalg.norm(p, axis=1) / np.linalg.norm(q[i])
        wanted = [j for j in np.argsort(-cosine)[:top] if cosine[j] >= threshold + 1e-5]
        found = [j for j in rows[i] if j >= 0]
        assert found[: len(wanted)] == wanted and all(cosine[j] >= threshold - 1e-5 for j in found)
        np.testing.assert_allclose(scores[i][: len(found)], cosine[found], atol=1e-5)


def test_passages_of_windows_are_read_alike(tmp_path: Path) -> None:
    (tmp_path / "A.TXT").write_bytes(b"\xef\xbb\xbfone")
    (tmp_path / "b.MD").write_text("# Two\nthree\n")
    table = read_passages(tmp_path).set_index("id")["text"].to_dict()
    assert table == {"A": "one", "b#Two": "Two. three"}


def test_passages_that_cannot_be_read_are_named(tmp_path: Path, word_encoder: Any, write_notes: Make) -> None:
    with pytest.raises(UserError, match="no such folder"):
        read_passages(tmp_path / "nowhere")
    with pytest.raises(UserError, match="no passage"):
        read_passages(tmp_path)
    (tmp_path / "a.jsonl").write_text(json.dumps({"id": "x", "text": "one"}) + "\n\n{broken\n")
    with pytest.raises(UserError, match=r"a\.jsonl, line 3"):
        read_passages(tmp_path)
    for odd in ({"id": "x", "text": None}, {"id": None, "text": "one"}, {"id": "x", "text": ["one"]}, ["x", "one"]):
        (tmp_path / "a.jsonl").write_text(json.dumps(odd))
        with pytest.raises(UserError, match=r"a\.jsonl, line 1: wanted"):
            read_passages(tmp_path)
    (tmp_path / "a.jsonl").write_text(
        json.dumps({"id": "x", "text": "one"}) + "\n" + json.dumps({"id": "x", "text": "t"})
    )
    with pytest.raises(UserError, match="two passages have the id 'x'"):
        read_passages(tmp_path)
    with pytest.raises(UserError, match="wanted 1 or more"):
        retrieve(write_notes(NOTES), EXAMPLE, "words", top=0)
