"""The EHR group `text`: a film's note as a vector beside its record."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from configs import UserError
from pretrain import build, train
from pretrain import data as bt
from pretrain.run import load_checkpoint
from pretrain.store import Store
from tests.pretrain.small import NUM, config

pytestmark = pytest.mark.usefixtures("fresh_accelerator")


TOLD = {
    "f00": "cough and fever",
    "f01": "fall",
    "f02": "chest pain",
    "f03": "fall",
    "f05": "leg swelling",
    "f07": "cough",
}


def text(notes: Path, **more) -> dict:
    groups = ["sex", "text"]
    return {"ehr": {"groups": groups, "notes": str(notes), "text_encoder": "words", **more}}


def test_a_note_conditions_as_a_group_with_zeros_and_a_mask_where_there_is_none(
    data, tmp_path, write_notes, word_encoder
):
    folder = train.train(config(data, tmp_path / "a", **text(write_notes(TOLD), inject="add")))
    meta = json.loads((folder / "encoder/encoder.json").read_text())
    assert meta["ehr_groups"]["text"] == "study"
    assert meta["text"]["films_with_note"] < meta["text"]["films"] and meta["text"]["encoder"] == "words"
    told = [name for name in meta["readability"] if name.startswith("text")]
    assert set(told) <= {"text_missing", "text (mean over its columns)"}
    weight = load_checkpoint(folder)["model"]["record.before_head.weight.weight"]
    assert weight.shape[1] == len(meta["ehr"]["columns"]) == 3 + 17 and weight[:, 3:].any()


def test_columns_of_a_text_encoder_that_say_nothing_are_zero(data, tmp_path, write_notes, minilm):
    """Two columns of MiniLM's vectors are 0 up to 1e-33; dividing by such a deviation would give useless numbers."""
    told = {f"f{i:02d}": f"cough for {i} days" for i in range(NUM)} | TOLD
    given = text(write_notes(told), text_encoder=str(minilm))
    folder = train.train(config(data, tmp_path / "a", "optim.steps=1", **given))
    readable = json.loads((folder / "encoder/encoder.json").read_text())["readability"]
    assert np.isfinite(readable["text (mean over its columns)"]["value"])
    films = bt.select_films(
        data / "features", Store(data / "store"), config(data, tmp_path / "a").films, ["text"], "default", 0,
        build.text(config(data, tmp_path / "a", **given)),
    )  # fmt: skip
    nothing = np.abs(films.static).max(axis=0) < 1e-20
    assert 0 < nothing.sum() < 10 and not films.static[:, nothing].any()


def test_the_text_group_is_fitted_on_train_and_blanked_as_a_whole(data, tmp_path, write_notes, word_encoder):
    source = build.text(config(data, tmp_path / "a", **text(write_notes(TOLD))))
    settings = config(data, tmp_path / "a").films
    films = bt.select_films(data / "features", Store(data / "store"), settings, ["text", "sex"], "default", 0, source)
    assert films.available_at["text"] == "study" and "text_missing" in films.columns
    columns = np.array(films.column_groups) == "text"
    has = films.table["dicom_id"].isin(list(TOLD)).to_numpy()
    vectors = films.static[:, columns]
    assert not vectors[~has, :-1].any() and (vectors[:, -1] == ~has).all()
    np.testing.assert_allclose(vectors[has, :-1].mean(0), 0, atol=1e-5)
    assert "f05" not in films.table["dicom_id"].to_numpy() and "leg swelling" not in word_encoder.embedded
    steps = build.steps(
        config(data, tmp_path / "a", "ehr.dropout=0.5", **text(write_notes(TOLD))),
        films, Store(data / "store"), build.method(config(data, tmp_path / "b")), SimpleNamespace(
            num_processes=1, process_index=0, device=torch.device("cpu")),
    )  # fmt: skip
    rows = np.flatnonzero(has)
    blanked = [steps._record(rows, films.keys[rows], epoch)[0][:, columns] for epoch in range(20)]
    kinds = {bool(x.any()) for epoch in blanked for x in epoch}
    assert kinds == {True, False}
    assert all(not x.any() or np.array_equal(x, y) for e in blanked for x, y in zip(e, vectors[rows], strict=True))


def test_text_and_its_folders_go_together(data, tmp_path, write_notes):
    with pytest.raises(UserError, match=r"needs ehr\.notes"):
        config(data, tmp_path / "a", ehr={"groups": ["text"]})
    with pytest.raises(UserError, match="go with the group `text`"):
        config(data, tmp_path / "a", ehr={"groups": ["sex"], "notes": "n", "text_encoder": "e"})


def test_changed_notes_are_another_run(data, tmp_path, write_notes, word_encoder):
    sections = text(write_notes(TOLD))
    train.train(config(data, tmp_path / "a", **sections))
    write_notes({**TOLD, "f00": "nothing"})
    with pytest.raises(UserError, match="input has changed"):
        train.train(config(data, tmp_path / "a", **sections))
