"""The report draws why films found no admission, stay, visit or file, and names the ambiguous ones."""

from pathlib import Path

from ehr_features.files import write_json
from finetune.report_cohort import flow_figure


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
