"""The reference of `benchmarks.notes`, written film by film in pandas, gives the same notes as the product."""

from pathlib import Path

import pandas as pd
import pytest

from benchmarks.notes import enlarge, hospital, ours, reference


@pytest.mark.slow
def test_the_reference_writes_the_same_notes_of_a_multiplied_hospital(tmp_path: Path) -> None:
    hospital(tmp_path, subjects=70)
    enlarge(tmp_path, k=2)
    assert ours(tmp_path)["notes"] > 100
    written = pd.read_parquet(tmp_path / "notes/unfiltered.parquet")
    films = pd.read_parquet(tmp_path / "features/images.parquet").set_index("dicom_id", drop=False)
    for indexed in (False, True):
        _, notes = reference(tmp_path, films.loc[written["dicom_id"]], indexed)
        assert notes == written["note"].tolist()
