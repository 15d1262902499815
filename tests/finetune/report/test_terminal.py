"""What the terminal prints is what the page shows: names of models, numbers, intervals, rows, sentences."""

from __future__ import annotations

import io
import re
import shutil
from html import unescape
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from ehr_features.files import write_json
from ehr_features.typed import read_json
from finetune import compare
from finetune.demo import RUNS, table
from finetune.names import named
from finetune.report.html import fixed, interval
from finetune.report.page import report
from finetune.report.runs import show
from finetune.report.verdict import verdicts
from finetune.run_folders import read_runs

OF_DEMO = dict(
    zip(
        ("vanilla", "ehr", "pixels", "random", "probe_vanilla", "probe_ehr", "record_lstm", "film_only", "medfuse"),
        RUNS,
        strict=True,
    )
)


@pytest.fixture(scope="module")
def demo(report_runs: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runs of the tests under the names and the folders of a demo, with its page."""
    out = tmp_path_factory.mktemp("demo")
    for run in report_runs:
        shutil.copytree(run, out / "runs" / OF_DEMO[run.name])
    shutil.copytree(report_runs[0].parents[1] / "data", out / "data")
    report([out / "runs" / name for name in RUNS], out / "report.html", truth=out / "data" / "truth.json")
    return out


def text(of: str) -> str:
    return " ".join(unescape(re.sub(r"<[^>]+>", " ", of)).split())


def tiles(page: str) -> list[dict[str, Any]]:
    """The large numbers of the page: name, value, interval with the possible value, rows, baselines."""
    found = []
    for tile in page.split('<div class="tile">')[1:]:
        of = {key: text(re.search(rf'class="{key}">(.*?)</span>', tile)[1]) for key in ("of", "name", "rows")}  # type: ignore[index]
        beside = dict(re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", tile.split("</dl>")[0]))
        found.append({**of, "value": re.search(r"<b>(.*?)</b>", tile)[1], "beside": beside})  # type: ignore[index]
    return found


def printed(demo: Path, width: int) -> str:
    console = Console(width=width, file=io.StringIO())
    runs = named(read_runs([demo / "runs" / name for name in RUNS]))
    console.print(table(runs, read_json(demo / "data" / "truth.json")))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_the_table_of_the_demo_has_the_names_values_intervals_and_rows_of_the_tiles(demo: Path) -> None:
    said = printed(demo, 120)
    lines = {re.split(r"  +", line.strip())[0]: line for line in said.splitlines() if re.match(r" {2,4}\S.*0\.", line)}
    found = tiles((demo / "report.html").read_text(encoding="utf-8"))
    assert len(found) == 2 and len(lines) == 7
    for tile in found:
        between, _, possible = tile["of"].partition(" · possible ")
        numbers = re.findall(r"\d\.\d{3}", lines[tile["name"]])
        assert [tile["value"], *between.split(" to ")] == numbers[:3] and numbers[-1] == possible
        assert len(tile["beside"]) >= 2
        for name, value in tile["beside"].items():
            assert f" {value} " in lines[name]
        rows = re.search(r"[\d,]+ \w+(?: with a film)?$", tile["rows"])
        assert rows and rows[0] in " ".join(said.split())


def test_the_sentences_of_the_demo_are_the_title_and_the_first_lines_of_the_page(demo: Path) -> None:
    page = text((demo / "report.html").read_text(encoding="utf-8").partition("<header>")[2])
    said = verdicts(read_runs([demo / "runs" / name for name in RUNS]), read_json(demo / "data" / "truth.json"))
    assert len(said) >= 3
    for sentence in said:
        what, _, on = re.sub(r"-(?=\d\.)", "−", sentence).removesuffix(".").rpartition(" (")
        assert what in page and on.removesuffix(")") in page


def test_the_list_of_runs_has_the_names_and_the_numbers_of_the_page(demo: Path, capsys: Any) -> None:
    show(demo / "runs")
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line.strip()}
    page = text((demo / "report.html").read_text(encoding="utf-8"))
    for run in named(read_runs([demo / "runs"])):
        assert f" {run.called} · " in lines[run.name] and run.called in page
        if head := run.headline():
            values = interval(head["value"], head["low"], head["high"])
            assert values in lines[run.name] and values in page


def test_compare_has_the_names_and_the_difference_of_the_page(demo: Path, capsys: Any) -> None:
    page = text((demo / "report.html").read_text(encoding="utf-8"))
    runs = {run.name: run for run in named(read_runs([demo / "runs"]))}
    for a, b, unit in (("probe_ehr", "probe_films", "films"), ("mortality_medfuse", "mortality_film_only", "stays")):
        folders = [[str(demo / "runs" / name)] for name in (a, b)]
        row = compare.show(*folders, split="test", samples=1000, seed=0).iloc[0]
        said = capsys.readouterr().out
        assert f"AUROC on test, {row['n']} {unit}" in said
        for side, name in (("a", a), ("b", b)):
            assert f"  {side} = {runs[name].called}: " in said and f"[{demo / 'runs' / name}]" in said
        numbers = [fixed(row["a"]), fixed(row["b"]), interval(*row[["difference", "low", "high"]])]
        pairs = [f"{runs[a].called} − {runs[b].called} {' '.join(numbers)} "]
        gap = interval(*(-row[key] for key in ("difference", "high", "low")))
        pairs.append(f"{runs[b].called} − {runs[a].called} {numbers[1]} {numbers[0]} {gap} ")
        assert any(pair in page for pair in pairs)
        assert f"{row['difference']:.4f}" in said and f"{row['low']:.4f}" in said


def test_compare_names_what_differs_between_two_runs_of_one_model(demo: Path, tmp_path: Path, capsys: Any) -> None:
    for seed in (1, 2):
        path = Path(shutil.copytree(demo / "runs" / "mortality_medfuse", tmp_path / f"run{seed}"))
        about = read_json(path / "results.json")
        write_json(path / "results.json", about | {"run": about["run"] | {"seed": seed}})
        (path / "config.yaml").unlink()  # as a run that holds its results alone
    one, two = (str(tmp_path / f"run{seed}") for seed in (1, 2))
    compare.show([one], [two], split="test", samples=20, seed=0)
    said = capsys.readouterr().out
    assert "a = Film and record, MedFuse, seed 1: " in said and "b = Film and record, MedFuse, seed 2: " in said
    compare.show([one, two], [two, one], split="test", samples=20, seed=0)
    assert f"a = Film and record, MedFuse: unknown parameters, unknown px, unknown films seen  [{one}, {two}]" in (
        capsys.readouterr().out
    )


def test_nothing_of_the_table_is_cut_at_80_columns(demo: Path) -> None:
    narrow, broad = printed(demo, 80), printed(demo, 120)
    assert max(map(len, narrow.splitlines())) <= 80 and "…" not in narrow
    assert sorted(re.findall(r"\d\.\d{3}", narrow)) == sorted(re.findall(r"\d\.\d{3}", broad))
    assert sorted(narrow.split()) == sorted(broad.split())
