"""The report on synthetic run folders."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from html import unescape
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml

from configs import UserError
from finetune.metrics import evaluate
from finetune.report.page import report
from finetune.report.runs import show
from finetune.report.training import hidden_figure
from finetune.results import predictions, write_predictions, write_results
from finetune.run_folders import _read_test, find_runs, read_runs

HOSTILE = "<script>alert('x')</script>"


def make_run(folder: Path, config: dict[str, str]) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def html(report_runs: list[Path]) -> str:
    return report(report_runs, report_runs[0].parents[1] / "report.html").read_text(encoding="utf-8")


def figures(html: str) -> list[str]:
    return re.findall(r'<figure id="figure-([^"]+)">', html)


def test_every_part_of_a_full_set_of_runs_is_there(html: str) -> None:
    wanted = {"splits", "flow", "missing", "pretraining", "hidden"}
    wanted |= {
        f"{kind}-findings"
        for kind in ("overview", "pairs", "labels", "curves", "fractions", "subgroups", "shift", "measures")
    }
    wanted |= {"overview-findings-the-radiologists-own-labels", "overview-mortality-test-stays-with-a-film"}
    wanted |= {f"{kind}-mortality" for kind in ("overview", "pairs", "curves", "poorer", "measures", "adds")}
    assert set(figures(html)) == wanted
    assert len(figures(html)) == len(set(figures(html)))


def test_each_figure_has_its_numbers_as_a_table(html: str) -> None:
    for body in html.split("<figure")[1:]:
        assert "<tbody>" in body.split("</figure>")[0]


def test_nothing_is_loaded_and_no_script_runs(html: str) -> None:
    assert "default-src 'none'" in unescape(html)
    assert not re.search(r"<(script|link|iframe|object)\b", html)
    assert not re.search(r"""(src|href)=["'](?!#|data:)""", html) and "@import" not in html


def test_the_largest_gap_is_named_with_its_interval(html: str) -> None:
    assert "<td>EHR-conditioned MSN, ViT-Tiny</td><td>0.070 (0.010–0.130) between F and M (sex)</td>" in html


def test_what_the_film_adds_stands_against_each_control(html: str) -> None:
    figure = unescape(html.split('<figure id="figure-adds-mortality">')[1].split("</figure>")[0])
    for control in ("Gradient boosting on the record", "no pixels", "another patient's film"):
        assert (
            f'<td>Film and record, MedFuse</td><td>{control}</td><td class="n">0.040 (−0.010 to 0.090)</td>' in figure
        )


def test_text_from_data_is_escaped(html: str) -> None:
    assert HOSTILE not in html and "&lt;script&gt;" in html


def test_numbers_are_those_of_results_json(report_runs: list[Path], html: str) -> None:
    for run in read_runs(report_runs):
        if head := run.headline():
            assert f"{head['value']:.3f} ({head['low']:.3f}–{head['high']:.3f})" in html


def test_warnings_stand_above_every_section(html: str) -> None:
    top = html[: html.index("<section")]
    assert "allow_leak" in top and "collapsed" in top


def test_a_page_with_films_of_patients_says_that_it_must_stay(report_runs: list[Path], tmp_path: Path) -> None:
    real = tmp_path / "truth.json"
    real.write_text("{}", encoding="utf-8")
    for films in (True, False):
        html = report(report_runs[:1], tmp_path / "r.html", with_films=films, truth=real).read_text(encoding="utf-8")
        assert ("must not be passed on" in html[: html.index("<section")]) == films


def test_without_rank_and_prototypes_a_collapse_is_not_known(report_runs: list[Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(report_runs[0], tmp_path / report_runs[0].name))
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    kept = [{k: v for k, v in line.items() if "rank" not in k and "prototypes" not in k} for line in lines]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept))
    html = report([folder], tmp_path / "r.html").read_text(encoding="utf-8")
    assert "No sign of collapse" not in html and "whether it collapsed is not known" in html


def test_a_healthy_run_has_no_warning_of_collapse(report_runs: list[Path], tmp_path: Path) -> None:
    html = report(report_runs[:1], tmp_path / "r.html").read_text(encoding="utf-8")
    assert "No warnings" in html and "No sign of collapse" in html


def test_a_part_without_data_says_so_or_is_left_out(tmp_path: Path) -> None:
    run = make_run(tmp_path / "empty", {"features": "nowhere"})
    html = report([run], tmp_path / "r.html").read_text(encoding="utf-8")
    assert "is not here" in html and not figures(html) and "no results yet" in html


def test_a_folder_of_runs_stands_for_its_runs(report_runs: list[Path]) -> None:
    assert {run.folder.name for run in read_runs([report_runs[0].parent])} == {run.name for run in report_runs}


def test_runs_of_the_same_name_are_told_apart(tmp_path: Path) -> None:
    made = [make_run(tmp_path / seed / "probe", {}) for seed in ("a", "b")]
    assert [run.name for run in read_runs(made)] == ["a/probe", "b/probe"]


@pytest.mark.parametrize(
    ("file", "content"), [("results.json", "{"), ("metrics.jsonl", "x\n{}\n"), ("config.yaml", "a: [")]
)
def test_a_damaged_file_is_named(tmp_path: Path, file: str, content: str) -> None:
    run = make_run(tmp_path / "run", {})
    (run / file).write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=file):
        report([run], tmp_path / "r.html")
    assert not (tmp_path / "r.html").exists()


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="neither a run"):
        report([tmp_path], tmp_path / "r.html")
    with pytest.raises(UserError, match="no such folder"):
        report([tmp_path / "none"], tmp_path / "r.html")


def test_a_line_cut_short_by_a_kill_is_passed_over(tmp_path: Path, report_runs: list[Path]) -> None:
    run = make_run(tmp_path / "run", {})
    (run / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo', encoding="utf-8")
    assert len(read_runs([run])[0].metrics) == 1


def test_runs_of_a_grid_are_found_two_levels_down(tmp_path: Path) -> None:
    made = [make_run(tmp_path / "grid" / name, {}) for name in ("a", "b")]
    assert find_runs([tmp_path]) == made


def test_the_list_of_runs_has_their_numbers_and_no_colours_when_piped(
    report_runs: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    show(report_runs[0].parent)
    printed = capsys.readouterr().out
    for run in read_runs(report_runs):
        assert run.name in printed
        if head := run.headline():
            assert f"{head['value']:.3f} ({head['low']:.3f}–{head['high']:.3f})" in printed
    assert "\x1b" not in printed


def test_a_damaged_run_does_not_hide_the_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(tmp_path / "whole", {})
    (make_run(tmp_path / "broken", {}) / "results.json").write_text("{", encoding="utf-8")
    make_run(tmp_path / "lr=[bold]", {})
    show(tmp_path)
    printed = capsys.readouterr().out
    assert "damaged" in printed and "whole" in printed and "lr=[bold]" in printed


def test_the_summary_is_on_the_rows_of_the_main_result_and_each_difference_has_the_higher_first(html: str) -> None:
    summary = html.split('<section id="summary"')[1].split("</section>")[0]
    assert ": test stays with a film" in summary and ": all test stays" not in summary
    assert ": all test stays" in html.split("</section>", 2)[2]
    for task in ("findings", "mortality"):
        figure = unescape(html.split(f'<figure id="figure-pairs-{task}">')[1].split("</figure>")[0])
        pairs = re.findall(r"<td>[^<]+ − [^<]+</td>(?:<td[^>]*>[^<]*</td>){2}<td[^>]*>([^<]+)</td>", figure)
        assert pairs and not [pair for pair in pairs if pair.startswith("−")]


def test_of_many_columns_of_the_record_the_most_readable_values_are_drawn(report_runs: list[Path]) -> None:
    run = next(run for run in read_runs(report_runs) if run.kind == "pretraining")
    columns = {f"labs_{i:02d}": {"metric": "r2", "value": i / 100} for i in range(40)}
    columns |= {"labs_01_missing": {"metric": "auroc", "value": 0.99, "chance": 0.5}}
    several = replace(run, called="a", encoder={"readability": columns, "ehr": {"use": "contrast"}})
    page = str(hidden_figure([several]))
    drawn = page.split("<figcaption")[0]
    assert "What the features tell of the record" in page and "labs 39" in drawn and "labs 28" in drawn
    assert "labs 27" not in drawn and "missing" not in drawn and "labs_01_missing" in page
    assert "The 12 most readable values of 41 columns" in page


def test_a_report_reads_the_predictions_of_what_it_shows_and_holds_few(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twelve runs: none is read to list them; afterwards those of one figure of curves at most are in memory."""
    folders = [evaluated(tmp_path / f"runs/m{i:02d}", seed=i, model=f"model_{i}") for i in range(12)]
    reads: list[str] = []

    def counted(folder: Path, split: str) -> pd.DataFrame:
        reads.append(folder.name)
        return predictions(folder, split)

    monkeypatch.setattr("finetune.run_folders.predictions", counted)
    runs = read_runs(folders)
    assert all(run.predicted for run in runs) and not reads
    for run in runs:
        assert run.by_row is not None and run.predictions is not None
    assert len(reads) == 12 and _read_test.cache_info().currsize <= 8


def test_a_report_that_is_made_again_draws_no_resample_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = [evaluated(tmp_path / f"runs/m{i}", seed=i, model=f"model_{i}") for i in range(3)]
    report(folders, tmp_path / "a.html")
    kept = sorted((tmp_path / "runs/cache").glob("resamples_*.npz"))
    assert len(kept) == 3
    monkeypatch.setattr("finetune.compare.distribution", None)
    report(folders, tmp_path / "b.html")
    a, b = (re.sub("Made .* by", "", (tmp_path / name).read_text()) for name in ("a.html", "b.html"))
    assert a == b
    kept[0].write_bytes(kept[0].read_bytes()[:100])  # a damaged file counts as absent
    with pytest.raises(TypeError):
        report(folders, tmp_path / "c.html")


def evaluated(folder: Path, *, seed: int, model: str) -> Path:
    """A run of one task as `fuse` leaves it."""
    rng = np.random.default_rng(seed)
    y = (np.random.default_rng(0).random((60, 2)) < 0.4).astype(float)
    logits = rng.normal(size=y.shape) + y
    ids = pd.DataFrame({"sample_id": np.arange(60).astype(str), "subject_id": np.arange(60) // 2, "has_image": True})
    write_predictions(folder, "test", ids, pd.DataFrame(y, columns=["a", "b"]), logits)
    table = evaluate(y, 1 / (1 + np.exp(-logits)), names=["a", "b"], samples=20).assign(split="test")
    about = {"task": "phenotypes", "model": model, "encoder": None, "seed": 0, "allow_leak": False, "warnings": []}
    write_results(folder, about, table)
    (folder / "config.yaml").write_text(f"model: {model}\n")
    return folder
