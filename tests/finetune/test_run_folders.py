"""Run folders are found and named."""

from pathlib import Path

import pandas as pd
import pytest

from finetune.results import write_table
from finetune.run_folders import MARK, ON_A_PAGE, report_line


def test_the_next_line_shows_a_run_with_those_beside_it(tmp_path: Path) -> None:
    def line(count: int) -> str:
        for i in range(count):
            (tmp_path / f"run_{i}").mkdir(exist_ok=True)
            (tmp_path / f"run_{i}" / MARK).touch()
        return report_line(tmp_path / "run_0")

    assert line(1).endswith(f" report {tmp_path / 'run_0'}")
    assert line(2).endswith(f" report {tmp_path}")
    assert line(ON_A_PAGE + 1).endswith(f" report {tmp_path / 'run_0'}")


@pytest.mark.parametrize("sign", ["=", "+", "-", "@", "\t"])
def test_a_cell_that_a_spreadsheet_would_run_is_written_as_text(tmp_path, sign):
    evil = f"{sign}HYPERLINK(1)"
    table = pd.DataFrame({"model": [evil, "MSN"], evil: [-0.5, 1.0], "mixed": [-3, evil]})
    write_table(tmp_path / "runs.csv", table)
    found = pd.read_csv(tmp_path / "runs.csv", dtype=str)
    assert list(found) == ["model", f"'{evil}", "mixed"]
    assert found["model"].tolist() == [f"'{evil}", "MSN"] and found[f"'{evil}"].tolist() == ["-0.5", "1.0"]
    assert found["mixed"].tolist() == ["-3", f"'{evil}"]
