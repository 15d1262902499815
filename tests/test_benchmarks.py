"""Parts of the benchmarks: their rows are collected, their tables inserted. No measured value is asserted."""

from pathlib import Path

import pytest

from benchmarks import pages, run
from tests import forked

ROOT = Path(__file__).resolve().parents[1]
MODULES = sorted(path.stem for path in (ROOT / "benchmarks").glob("*.py") if "def main" in path.read_text())


@pytest.mark.parametrize("name", MODULES)
def test_every_benchmark_says_what_it_measures(name: str) -> None:
    done = forked.run([f"benchmarks.{name}", "--help"])
    assert done.returncode == 0 and "usage" in done.stdout, done.stderr


def test_rows_of_a_benchmark_get_their_command() -> None:
    printed = "noise\n| 12 views | 2.1 ms | lightly 9.7 ms | 4.6x |\n| not | a | row |\n|---|---|---|---|\n"
    assert run.rows(printed, "benchmarks.x A") == [
        "| 12 views | 2.1 ms | lightly 9.7 ms | 4.6x | `./launch.sh python -m benchmarks.x A` |"
    ]


def test_a_table_takes_its_place_in_a_page_and_nothing_else_changes() -> None:
    page = "a\n<!-- t -->\nold\n<!-- end -->\nb\n<!-- u -->\n<!-- end -->\n"
    assert pages.fill(page, "t", "new") == "a\n<!-- t -->\nnew\n<!-- end -->\nb\n<!-- u -->\n<!-- end -->\n"
    with pytest.raises(ValueError, match="no <!-- x -->"):
        pages.fill(page, "x", "new")


def test_every_benchmark_of_the_table_exists() -> None:
    assert {command.split()[0].partition(".")[2] for command in run.COMMANDS.values()} <= set(MODULES)


def test_the_generated_table_of_the_features_page_is_current() -> None:
    page = (ROOT / "docs/features.md").read_text(encoding="utf-8")
    assert pages.fill(page, "features", pages.features_table()) == page, "run python -m benchmarks.pages"
