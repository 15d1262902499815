"""What `features` prints at its end, and progress bars, on a terminal of 80 columns."""

from __future__ import annotations

import io
import re
import sys
from pathlib import Path

import pandas as pd
import pytest

from ehr_features.files import write_json
from ehr_features.films.summary import summary
from ehr_features.progress import Bar, _fit


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_features_ends_with_stays_films_samples_and_what_fell_out(tmp_path: Path) -> None:
    split = ["train", "train", "val", "test"]
    people = pd.DataFrame({"subject_id": [1, 1, 2, 3], "split": split})
    people.assign(stay_id=[1, 2, 3, 4]).to_parquet(tmp_path / "stays.parquet")
    people.assign(stay_id=pd.array([1, None, 3, None], dtype="Int64")).to_parquet(tmp_path / "images.parquet")
    (tmp_path / "samples").mkdir()
    write_json(tmp_path / "provenance.json", {})
    people.assign(dicom_id=["a", None, "b", "c"]).to_parquet(tmp_path / "samples" / "mortality.parquet")
    rules = [
        {"table": "stays", "why": "younger than 18 at intime, or of unknown age", "before": 9, "after": 4},
        {"table": "films", "why": "listed twice", "before": 4, "after": 4},
        *({"table": "films", "why": f"rule {i}", "before": 100, "after": 99} for i in range(9)),
    ]
    write_json(tmp_path / "attrition.json", {"exclusions": rules})
    lines = summary(tmp_path)
    text = " ".join(" ".join(lines).split())
    assert "4 stays of 3 subjects (2 train, 1 val, 1 test)" in text
    assert "4 films of 3 subjects, 2 taken in a stay (2 train, 1 val, 1 test)" in text
    assert "4 samples of mortality, 3 with a film (2 train, 1 val, 1 test)" in text
    assert "fell out: 5 of 9 stays: younger than 18" in text and "listed twice" not in text
    assert "and by 2 more rules" in text and max(map(len, lines[:-2])) <= 80


@pytest.mark.parametrize("what", ["pretraining", "features of /a/very/long/path/of/some/runs/pretrain_ehr/encoder"])
def test_a_bar_shows_count_and_eta_whatever_the_note(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    with Bar(what, 30000, "steps") as bar:
        bar.advance(12345, "loss 5.638 rank 33.1 prototypes 128 target 0.11 entropy 2.3")
        assert bar._rich is not None
        bar._rich.refresh()
    lines = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", terminal.getvalue()).replace("\r", "\n").splitlines()
    drawn = [line for line in lines if "12345/30000" in line]
    assert drawn and all(len(line) <= 80 and re.search(r"30000 (\d+|-):(\d\d|--):(\d\d|--)", line) for line in drawn)
    assert all(line.strip() == "" or line in drawn or "/30000" in line for line in lines), "it takes more than one line"


def test_the_note_of_a_bar_loses_whole_parts_and_slow_units_have_seconds() -> None:
    note = "5.1 steps/s loss 4.527, rank 17.9, 7 films/s"
    assert [_fit(note, room) for room in (44, 43, 33, 24)] == [note, note[:33], note[:33], "5.1 steps/s loss 4.527"]
    slow, quick = (Bar("pretraining", 10, "steps", shown=False) for _ in range(2))
    slow.done, slow._began = 2, slow._began - 8
    quick.done, quick._began = 9, quick._began - 3
    assert slow._speed() == "4.0 s each" and quick._speed() == "3.0 steps/s" and quick._speed(short=True) == "3.0/s"


def test_a_bar_of_short_work_is_not_shown_and_one_of_long_work_moves(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`after`: nothing before that many seconds; then count, rate and time left."""
    now = [0.0]
    monkeypatch.setattr("ehr_features.progress.time.monotonic", lambda: now[0])
    with Bar("fitting", 10, "heads", after=5) as bar:
        for _ in range(4):
            now[0] += 1
            bar.advance()
        assert capsys.readouterr().err == ""
        now[0] = 40.0
        bar.advance()
    assert "fitting: 5 of 10 heads, 8.0 s each, 40 s left" in capsys.readouterr().err
