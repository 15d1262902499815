"""The audit of notes: planted leaks are found before the filter and not after it; wrong notes are refuted."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import roc_auc_score

from configs import UserError
from ehr_features.__main__ import main
from ehr_features.audit import notes as notes_audit
from ehr_features.audit.notes import audit_notes, predictions, weighted_auroc
from ehr_features.audit.verdict import PROVED, REFUTED, UNKNOWN
from ehr_features.build import build
from ehr_features.config import FeaturesConfig, NotesConfig
from ehr_features.demo import generate as demo
from ehr_features.notes.write import write_notes
from ehr_features.schema import FINDINGS


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A synthetic MIMIC whose complaints name every finding of the visit's film, its features, and its notes."""
    root = tmp_path_factory.mktemp("audit")
    demo.generate(root / "raw", subjects=450, seed=3, film_size=32, leak=1.0)
    raw = {"mimic_iv": str(root / "raw/mimic-iv"), "mimic_ed": str(root / "raw/mimic-iv-ed")}
    cxr = str(root / "raw/mimic-cxr")
    build(FeaturesConfig(**raw, mimic_cxr=cxr, out=root / "features", tasks=("mortality",), memory="1GB"))
    for mode in ("none", "standard"):
        write_notes(NotesConfig(features=root / "features", **raw, out=root / mode, filter=mode, memory="1GB"))
    return root


@pytest.fixture
def notes(world: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(world / "standard", tmp_path / "notes"))


def outcomes(folder: Path, world: Path) -> dict[str, str]:
    return {v.claim.partition(": ")[2]: v.outcome for v in audit_notes(folder, world / "features")[0]}


def told(world: Path, mode: str) -> dict[str, notes_audit.Predicted | str]:
    """How well the notes of films in their own visit predict the findings, on halves of the subjects."""
    films = pd.read_parquet(world / "features/images.parquet")
    table = pd.read_parquet(world / mode / "notes.parquet")[["dicom_id", "note"]].merge(films, on="dicom_id")
    table = table[table["ed_stay_id_link"] == "inside"].reset_index(drop=True)
    train = (table["subject_id"] % 2 == 0).to_numpy()
    labels = table[list(FINDINGS)].where(table[list(FINDINGS)] != -1)
    labels = labels.mask(labels.isna() & (table[list(FINDINGS)] != -1), 0.0).astype("Float64")
    return predictions(table["note"], labels, table["subject_id"], train, ~train, 0)


def test_a_planted_leak_is_found_and_gone_after_the_filter(world: Path) -> None:
    before, after = told(world, "none"), told(world, "standard")
    for name in ("Pleural Effusion", "Cardiomegaly"):
        leaky, clean = before[name], after[name]
        assert not isinstance(leaky, str) and not isinstance(clean, str)
        assert leaky.low > 0.6 and leaky.auroc > clean.auroc + 0.15 and clean.low < 0.55
        said = " ".join(word for word, _ in leaky.words)
        assert name.lower().split()[-1] in said
        assert name.lower().split()[-1] not in " ".join(word for word, _ in clean.words)
    assert outcomes(world / "none", world)["no note names a finding"] == REFUTED
    assert set(outcomes(world / "standard", world).values()) == {PROVED}


def test_the_command_prints_verdicts_and_the_table(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def command(*words: str) -> tuple[int, str]:
        with pytest.raises(SystemExit) as left, pytest.MonkeyPatch.context() as patch:
            patch.setattr("sys.argv", ["ehr_features", "audit", *words])
            main()
        return int(str(left.value.code)), capsys.readouterr().out

    code, said = command(str(world / "standard"))
    assert code == 0 and "all 3 claims are proved" in said
    assert all(any(line.startswith(name) for line in said.splitlines()) for name in FINDINGS)
    row = next(line for line in said.splitlines() if line.startswith("Pleural Effusion"))
    assert "effusion*" in row.partition(" | ")[0] and "*" not in row.partition(" | ")[2]
    code, said = command(str(world / "features"), str(world / "none"))
    assert code == 2 and "refuted" in said and "no subject is in two splits" in said


def test_small_batches_say_the_same_and_the_table_takes_a_draw_of_many_films(
    world: Path, notes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = audit_notes(notes, world / "features")
    table = pd.read_parquet(notes / "notes.parquet")
    table.sample(frac=1, random_state=0).to_parquet(notes / "notes.parquet")  # in another order than unfiltered.parquet
    monkeypatch.setattr(notes_audit, "BATCH", 50)
    assert audit_notes(notes, world / "features")[1] == whole[1]
    assert {v.outcome for v in audit_notes(notes, world / "features")[0]} == {PROVED}
    changed = table.assign(note=table["note"].where(table.index != len(table) - 1, "cough"))  # in the last batch
    changed.to_parquet(notes / "notes.parquet")
    assert outcomes(notes, world)["the leak filter depends on each note alone"] == REFUTED
    table[:0].to_parquet(notes / "notes.parquet")
    assert all("too few words" in line for line in audit_notes(notes, world / "features")[1][4:])
    table.to_parquet(notes / "notes.parquet")
    monkeypatch.setattr(notes_audit, "FILMS", 100)
    lines = audit_notes(notes, world / "features")[1]
    assert "100 films drawn from" in lines[1] and lines[4:] != whole[1][4:]


def test_what_does_not_belong_is_refuted(world: Path, notes: Path) -> None:
    def change(**columns: object) -> dict[str, str]:
        table = pd.read_parquet(world / "standard/notes.parquet")
        table = table.assign(**{c: v(table[c]) if callable(v) else v for c, v in columns.items()})
        table.to_parquet(notes / "notes.parquet")
        return outcomes(notes, world)

    own, again = (
        "every note belongs to its film and has no later fact",
        "the leak filter depends on each note alone",
    )
    assert change(available_at=lambda t: t + pd.Timedelta(days=4000))[own] == REFUTED
    assert change(split="train")[own] == REFUTED
    assert change(subject_id=lambda s: np.roll(s, 5))[own] == REFUTED
    assert change(dicom_id=lambda d: d.iloc[0])[own] == REFUTED
    dropped = change(note=lambda n: n.str.replace(r"\nTriage[^\n]*", "", regex=True))
    assert dropped[again] == REFUTED and dropped[own] == PROVED
    assert change(note=lambda n: n + " PTX.")["no note names a finding"] == REFUTED
    shutil.copy(world / "standard/notes.parquet", notes / "notes.parquet")
    (notes / "unfiltered.parquet").unlink()
    assert outcomes(notes, world)[again] == UNKNOWN and audit_notes(notes, world / "features")[1] == []


def test_notes_whose_features_are_gone_ask_for_them(world: Path, notes: Path) -> None:
    text = (notes / "provenance.json").read_text()
    (notes / "provenance.json").write_text(text.replace(str(world / "features"), str(world / "gone")))
    with pytest.raises(UserError, match=r"its features .*gone do not exist"):
        notes_audit.split_folders([notes])
    assert notes_audit.split_folders([world / "features", notes]) == (world / "features", [], [notes])


def test_the_weighted_auroc_is_that_of_repeated_rows() -> None:
    rng = np.random.default_rng(0)
    score, label, weight = rng.integers(0, 9, 60).astype(float), rng.integers(0, 2, 60), rng.integers(0, 4, 60)
    repeated = np.repeat(np.arange(60), weight)
    assert weighted_auroc(score, label, weight) == pytest.approx(roc_auc_score(label[repeated], score[repeated]))
    assert weighted_auroc(score, np.ones(60), weight) is None


def test_notes_without_words_or_with_one_class_say_so() -> None:
    subjects, half = pd.Series(range(40)), np.arange(40) < 20
    labels = pd.DataFrame({"a": [0.0, 1.0] * 20, "b": 0.0}).astype("Float64")
    assert predictions(pd.Series(["1.0 2"] * 40), labels, subjects, half, ~half, 0) == dict.fromkeys(
        "ab", "too few words"
    )
    found = predictions(pd.Series(["cough", "fever"] * 20), labels, subjects, half, ~half, 0)
    assert found["b"] == "one class only" and not isinstance(found["a"], str) and found["a"].auroc == 1.0
