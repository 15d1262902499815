"""The page of a grid: axes x results, with the numbers of `compare GRID --table`."""

from __future__ import annotations

import json
import re
from html import unescape
from pathlib import Path

import numpy as np
import pytest
import yaml

from finetune.compare import against
from finetune.report.grids import axes_of, grid_figures, grid_folders
from finetune.report.html import fixed, interval
from finetune.run_folders import read_runs
from tests.finetune.test_compare import sample, write_run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two axes, and three seeds of each combination."""
    out = tmp_path_factory.mktemp("grid")
    y, a, b, _ = sample(better=0.5)
    axes = {}
    for i, (size, record) in enumerate((s, r) for s in ("tiny", "small") for r in ("none", "sex")):
        for seed in range(3):
            name = f"{size}-{record}-s{seed}"
            axes[name] = {"size": size, "record": record, "seed": f"s{seed}"}
            noisy = (a if record == "sex" else b) + np.random.default_rng([i, seed]).normal(0, 0.02, y.shape)
            by = {"hash": name, "weights": "step 9"}
            run = write_run(out / name / "probe", y, np.clip(noisy, 0.001, 0.999), seed, compared_by=by, unit="study")
            (run / "config.yaml").write_text(yaml.safe_dump({"method": "linear", "seed": seed}), encoding="utf-8")
    methods = {name: name.rpartition("-")[0] for name in axes}
    about = {"methods": methods, "axes": axes, "steps": ["probe"]}
    (out / "grid.json").write_text(json.dumps(about), encoding="utf-8")
    return out


def test_the_page_of_a_grid_has_each_method_once_with_its_axes_and_the_numbers_of_compare(folder: Path) -> None:
    runs, found = read_runs([folder]), against(folder, samples=50)
    assert grid_folders(runs) == [folder]
    html = unescape(" ".join(grid_figures(folder, runs, found)))
    table = html.split("<tbody>")[-1].split("</tbody>")[0]
    cells = [re.findall(r"<td[^>]*>(.*?)</td>", row) for row in table.split("<tr>")[1:]]
    assert [row[:3] for row in cells] == [[f"{s}-{r}", s, r] for s in ("tiny", "small") for r in ("none", "sex")]
    for row, numbers in zip(cells, found.to_dict("records"), strict=True):
        gap = interval(numbers["difference"], numbers["low"], numbers["high"])
        assert row[3:5] == [fixed(numbers["auroc"]), "baseline" if row[0] == "tiny-none" else gap] and row[-1] == "3"
    assert "on 300 test studies" in html and "all 3 comparisons" in html and "fewer than three" not in html


def test_a_grid_of_an_older_version_has_no_axes_and_seeds_are_none() -> None:
    methods = {"a-s0": "a", "a-s1": "a", "b-s0": "b"}
    assert axes_of({"methods": methods}, list(methods)) == {"a": {}, "b": {}}
    axes = {name: dict(zip(("arm", "seed"), name.split("-"), strict=True)) for name in methods}
    assert axes_of({"methods": methods, "axes": axes}, list(methods)) == {"a": {"arm": "a"}, "b": {"arm": "b"}}
