"""benchmarks.full_size at a five-hundredth of a hospital: what it makes up is read, and its parts run to their ends."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import full_size
from finetune.fusion.samples import load
from finetune.results import read_results
from pretrain.config import FilmsConfig
from pretrain.data import select_films
from pretrain.store import Store

SHARE = 0.002


def test_the_made_up_hospital_is_read(tmp_path: Path) -> None:
    folder = full_size.hospital(tmp_path, SHARE)
    assert load(folder, "mortality").has_image.any()
    hourly = load(folder, "decompensation", max_hours=48)
    assert len(hourly) > 1000 and hourly.length.max() == 48
    store = Store(full_size.store(folder, SHARE))
    films = select_films(folder, store, FilmsConfig(), ["sex", "age", "ed_triage"], "default", 0)
    assert len(store) == int(full_size.FILMS * SHARE) and 0 < len(films) < len(store)
    full_size.write_runs(tmp_path / "runs", 1, 40)
    assert read_results(tmp_path / "runs/model_000")[0]["task"] == "phenotypes"


@pytest.mark.parametrize("part", ["control", "knn", "intervals"])
def test_a_part_prints_its_rows(part: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    full_size.PARTS[part](tmp_path, SHARE)
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert rows and all(line.count("|") == 3 for line in rows)
