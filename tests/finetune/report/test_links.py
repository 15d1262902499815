"""The report shows why films have no admission, stay, visit, file or note, and lists the ambiguous ones."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from ehr_features.files import write_json
from finetune.report.cohort import cohort_section, flow_figure
from finetune.run_folders import read_runs


def test_links_and_their_ambiguities_are_drawn(tmp_path: Path) -> None:
    table, why = "films with a link to an ICU stay", "ambiguous: several ICU stays fit equally"
    steps = [
        {"table": table, "why": "the subject has no ICU stay", "before": 900, "after": 700, "num_ids": 200, "ids": []},
        {"table": table, "why": why, "before": 700, "after": 700, "num_ids": 17, "ids": []},
        {
            "table": "films with an image file",
            "why": "missing file",
            "before": 900,
            "after": 893,
            "num_ids": 7,
            "ids": [],
        },
    ]
    write_json(tmp_path / "attrition.json", {"exclusions": steps, "counts": {}})
    page = str(flow_figure(tmp_path, ""))
    assert "−200 the subject has no ICU stay" in page and "−7 missing file" in page
    assert f"17 {table} ({why})" in page


@pytest.mark.parametrize("named", ["fusion", "pretraining"])
def test_films_without_a_note_are_drawn_for_a_run_that_reads_notes(tmp_path: Path, named: str) -> None:
    features, notes, run = (tmp_path / name for name in ("features", "notes", "run"))
    for folder in (features, notes, run):
        folder.mkdir()
    why = "no emergency visit and no admission at that time"
    steps = [{"table": "notes", "why": why, "before": 994, "after": 831, "num_ids": 163, "ids": []}]
    write_json(notes / "attrition.json", {"exclusions": steps, "counts": {}})
    (notes / "notes.parquet").touch()
    write_json(features / "provenance.json", {})
    read: dict[str, Any] = {"notes": str(notes)} if named == "fusion" else {"ehr": {"notes": str(notes)}}
    (run / "config.yaml").write_text(yaml.safe_dump({"features": str(features)} | read))
    page = str(cohort_section(read_runs([run])))
    assert "Films without a note, and why" in page and f"−163 {why}" in page
    (run / "config.yaml").write_text(yaml.safe_dump({"features": str(features), "ehr": {"notes": None}}))
    assert "without a note" not in str(cohort_section(read_runs([run])))
