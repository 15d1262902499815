"""The page's first sentences: each from the difference that `compare` gives, with the verb that its interval allows."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from ehr_features.files import write_json
from ehr_features.typed import read_json
from finetune.compare import compare_runs
from finetune.report.verdict import Gap, _adds, _against, difference, lead, verdicts
from finetune.results import predictions
from finetune.run_folders import Run, read_runs


@pytest.fixture
def runs(report_runs: list[Path], tmp_path: Path) -> dict[str, Run]:
    """Probes of pixels, random weights, a pretraining on films and one on films and records; fusion and its parts."""
    names = ("pixels", "random", "probe_vanilla", "probe_ehr", "record_lstm", "film_only", "medfuse")
    folders = [Path(shutil.copytree(path, tmp_path / path.name)) for path in report_runs if path.name in names]
    for folder in folders:
        about = read_json(folder / "results.json")
        record = ["age", "sex"] if folder.name == "probe_ehr" else []
        if folder.name.startswith("probe"):
            about["run"]["compared_by"] = {"weights": "step 10", "record": record}
        write_json(folder / "results.json", about)
    table = predictions(tmp_path / "medfuse", "test")
    table.assign(has_image=np.arange(len(table)) < 63).to_parquet(tmp_path / "medfuse/predictions/test.parquet")
    return {run.name: run for run in read_runs(folders)}


def numbers(sentence: str) -> list[float]:
    return [float(x) for x in re.findall(r"[+-]?\d\.\d{3}", sentence)]


def test_each_sentence_has_the_difference_and_the_interval_of_compare(runs: dict[str, Run]) -> None:
    said = verdicts(list(runs.values()))
    film = next(line for line in said if line.startswith("The film"))
    table = runs["medfuse"].by_row
    assert table is not None
    within = table.index[table["has_image"]]
    wanted = difference([runs["medfuse"]], [runs["record_lstm"]], within=within)
    assert (
        wanted is not None and numbers(film)[:3] == pytest.approx(wanted[:3], abs=5e-4) and f"{wanted.n} stays" in film
    )
    main = next(line for line in said if line.startswith("Pretraining "))
    for name, run in (("random weights", "random"), ("pixels", "pixels")):
        row = compare_runs([runs["probe_ehr"].folder], [runs[run].folder]).iloc[0]
        ends = sorted((abs(row["low"]), abs(row["high"])))
        assert name in main and f"{ends[0]:.3f} to {ends[1]:.3f}" in main.replace("+", "").replace("-", "")
    assert any(line.startswith("The record") and "films alone" in line for line in said)


def test_the_main_result_is_on_all_stays_where_those_with_a_film_are_too_few_for_an_interval(
    runs: dict[str, Run],
) -> None:
    fusions = [runs[name] for name in ("record_lstm", "film_only", "medfuse")]
    found = lead("mortality", fusions)
    assert found is not None and found.subset == "paired"
    rows = found.run.rows.copy()
    rows.loc[rows["subset"] == "paired", ["low", "high"]] = np.nan
    few = lead("mortality", [*fusions[:2], replace(found.run, rows=rows)])
    assert few is not None and few.subset == "all"


def test_a_fusion_is_compared_on_the_stays_with_a_film(runs: dict[str, Run]) -> None:
    table = runs["medfuse"].by_row
    assert table is not None
    for line in verdicts(list(runs.values())):
        if "death in hospital" in line:
            assert f"{int(table['has_image'].sum())} stays with a film)" in line


@pytest.mark.parametrize(
    ("gap", "against", "adds"),
    [
        (
            (0.06, 0.04, 0.08),
            "beats x by 0.060 (0.040 to 0.080)",
            "A adds 0.060 (0.040 to 0.080) to b (AUROC, 94 films).",
        ),
        (
            (0.01, -0.01, 0.03),
            "is level with x (+0.010, -0.010 to +0.030)",
            "A adds nothing that shows here to b: +0.010, ",
        ),
        (
            (0.01, 0.0, 0.02),
            "is level with x (+0.010, +0.000 to +0.020)",
            "A adds nothing that shows here to b: +0.010, ",
        ),
        (
            (-0.05, -0.07, -0.03),
            "stays behind x by 0.050 (0.030 to 0.070)",
            "A takes away from b: -0.050, -0.070 to -0.030 (AUROC, 94 films).",
        ),
    ],
)
def test_the_interval_decides_the_verb(gap: tuple[float, float, float], against: str, adds: str) -> None:
    assert _against([("x", Gap(*gap, 94))]) == against
    assert _adds("A", "b", Gap(*gap, 94), "films").startswith(adds)


def test_few_labels_are_compared_draw_by_draw(runs: dict[str, Run]) -> None:
    ours, other = runs["probe_ehr"], runs["pixels"]
    assert difference([ours], [other], share=0.1) is None  # runs of earlier versions hold no draws
    gaps = []
    for run, skill in ((ours, 2.0), (other, 0.0)):
        table = predictions(run.folder, "test")
        labels = [c for c in table if str(c).startswith("label_")]
        for draw in range(3):
            noise = np.random.default_rng(draw).standard_normal((len(table), len(labels)))
            made = table.copy()
            made[[c.replace("label_", "logit_") for c in labels]] = skill * table[labels].to_numpy() + noise
            path = run.folder / "fraction_0.1" / f"draw_{draw}" / "predictions" / "test.parquet"
            path.parent.mkdir(parents=True)
            pd.DataFrame(made).to_parquet(path)
    found = difference([ours], [other], share=0.1)
    assert found is not None and found[1] > 0.2
    gaps = [line for line in verdicts(list(runs.values())) if "10% of the labelled subjects" in line]
    assert len(gaps) == 1 and f"beats raw 16x16 pixels by {found[0]:.3f}" in gaps[0]


def test_runs_without_a_baseline_say_nothing(runs: dict[str, Run]) -> None:
    assert verdicts([runs["probe_ehr"]]) == [] and verdicts([]) == []
    assert verdicts([runs["medfuse"]]) == []


def told(run: Run, **about: object) -> Run:
    compared = {**(run.result.get("compared_by") or {}), **about}
    return replace(run, result={**run.result, "compared_by": compared})


def test_a_control_is_no_result(runs: dict[str, Run]) -> None:
    """Another patient's record in pretraining; no pixels, or another patient's film, in a fusion."""
    permuted = {**runs, "probe_ehr": told(runs["probe_ehr"], permuted=True)}
    found = lead("findings", [run for run in permuted.values() if run.task == "findings"])
    assert found is not None and found.run.name == "probe_vanilla"
    assert not any("films alone" in line for line in verdicts(list(permuted.values())))
    for control in ("context", "another"):
        medfuse = runs["medfuse"]
        fused = replace(medfuse, result={**medfuse.result, "control": control})
        assert lead("mortality", [fused, runs["record_lstm"], runs["film_only"]]) is None


def test_pretraining_on_films_alone_is_of_the_same_method_and_network(runs: dict[str, Run]) -> None:
    for about in ({"method": "simclr"}, {"arch": "resnet18"}):
        others = {**runs, "probe_vanilla": told(runs["probe_vanilla"], **about)}
        assert not any("films alone" in line for line in verdicts(list(others.values())))
    assert any("films alone" in line for line in verdicts(list(runs.values())))


def test_heads_of_other_kinds_are_not_compared(runs: dict[str, Run]) -> None:
    """A fine-tuned encoder is compared with one trained from scratch, not with frozen pixels."""
    tuned = [replace(runs[name], result={**runs[name].result, "model": "finetune"}) for name in ("probe_ehr", "random")]
    said = [line for line in verdicts([*tuned, runs["pixels"]]) if line.startswith("Pretraining")]
    assert len(said) == 1 and "training from scratch" in said[0] and "pixels" not in said[0]


def test_a_share_of_the_subjects_is_said_and_never_compared_with_all(runs: dict[str, Run]) -> None:
    few = {name: replace(run, rows=run.rows.assign(fraction=0.1)) for name, run in runs.items()}
    said = [line for line in verdicts(list(few.values())) if line.startswith("Pretraining")]
    assert said and all("with 10% of the labelled subjects" in line for line in said)
    assert not any(line.startswith("Pretraining") for line in verdicts([*[*runs.values()][2:], few["pixels"]]))


def test_too_few_subjects_for_an_interval_are_no_result() -> None:
    gap = Gap(-0.015, float("nan"), float("nan"), 3)
    assert _against([("x", gap)]) == "has too few test subjects to be compared with x (-0.015)"
    assert _adds("A", "b", gap, "films") == (
        "A and b: -0.015, with too few test subjects for an interval (AUROC, 3 films)."
    )


def test_a_fusion_is_said_with_its_auroc_and_what_is_possible(runs: dict[str, Run]) -> None:
    truth = {"bayes": {"mortality": {"both": 0.9, "record": 0.8, "film": 0.7}}}
    film = next(line for line in verdicts(list(runs.values()), truth) if line.startswith("The film"))
    head = runs["medfuse"].headline(subset="paired")
    assert head is not None and f"(AUROC {head['value']:.3f}, possible 0.900; {head['n']} stays with a film)" in film
