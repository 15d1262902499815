"""Run folders are found and named."""

from pathlib import Path

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
