"""Labels for readers, and colours that all readers can distinguish."""

from __future__ import annotations

import re
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from ehr_features.phenotypes import groups
from finetune.fusion.samples import macros
from finetune.report import html as report_html
from finetune.report.figures import COLOURS, tick_text
from finetune.report.html import PHENOTYPES, told

APART = 14.0  # distance in CIELAB; about 2 can just be seen
VISION = {  # of linear RGB. Source: Machado, Oliveira and Fernandes 2009, severity 1
    "all cones": np.eye(3),
    "no L cones": np.array([[0.152, 1.053, -0.205], [0.115, 0.786, 0.099], [-0.004, -0.048, 1.052]]),
    "no M cones": np.array([[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]]),
    "no S cones": np.array([[1.256, -0.077, -0.179], [-0.078, 0.931, 0.148], [0.005, 0.691, 0.304]]),
}


def linear(colour: str) -> np.ndarray:
    c = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)


def lab(rgb: np.ndarray) -> np.ndarray:
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    xyz = to_xyz @ np.clip(rgb, 0, 1) / np.array([0.9505, 1, 1.089])
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize("vision", VISION)
def test_no_two_colours_are_alike_however_one_sees(vision: str) -> None:
    style = (Path(report_html.__file__).parent / "report.css").read_text(encoding="utf-8")
    palettes = re.findall(r"--c0:.*", style)
    assert len(palettes) == 3  # light, dark, paper
    for palette in palettes:
        colours = re.findall(r"#[0-9a-f]{6}", palette)
        assert len(colours) == COLOURS
        seen = [lab(VISION[vision] @ linear(colour)) for colour in colours]
        assert min(float(np.linalg.norm(a - b)) for a, b in combinations(seen, 2)) > APART


def test_each_phenotype_has_a_name_and_all_names_differ() -> None:
    assert sorted(PHENOTYPES) == groups() and len(set(PHENOTYPES.values())) == 25
    assert told("phenotype_122") == "Pneumonia" and told("los_bin_9") == "14 days or more"
    assert {told(name) for name in macros([f"phenotype_{g}" for g in groups()])} == {
        "Mean, acute", "Mean, mixed", "Mean, chronic",
    }  # fmt: skip


@pytest.mark.parametrize(
    "label", ["phenotype_", "phenotype_x", "phenotype_9999", "los_bin_44", "", "_", "macro_economy"]
)
def test_an_unknown_label_keeps_its_words(label: str) -> None:
    assert told(label).lower() == label.replace("_", " ").lower()


def test_ticks_of_small_steps_are_exact() -> None:
    assert [tick_text(v, 0.00025) for v in (0.0, 0.00025, 0.0005, 0.001)] == ["0", "2.5e−4", "5.0e−4", "1.00e−3"]
    assert [tick_text(v, 2.5) for v in (15.0, 17.5)] == ["15.0", "17.5"]
    assert tick_text(-0.25, 0.25) == "−0.25" and tick_text(20000, 10000) == "20k"
