"""The report in a browser: no console error, no request, each figure complete, on a page and a phone."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from finetune.report.page import report
from finetune.report.screenshot import browser, screenshot

pytestmark = [pytest.mark.browser, pytest.mark.skipif(browser() is None, reason="no Chromium here")]


@pytest.fixture(scope="module")
def page(report_runs: list[Path]) -> Path:
    """All runs, and two with very long names without breaks."""
    long = [report_runs[0].parents[1] / "long" / f"{path.name}_{'x' * 90}" for path in report_runs[-3:-1]]
    for path, copy in zip(report_runs[-3:-1], long, strict=True):
        shutil.copytree(path, copy, dirs_exist_ok=True)
    return report([*report_runs, *long], report_runs[0].parents[1] / "browser.html")


def test_the_page_opens_without_error_or_request(page: Path, tmp_path: Path, chromium: Any) -> None:
    dom, console, asked = chromium.visit(page, tmp_path / "profile", 1280)
    assert "figure-overview-findings" in dom and not console and not asked


def test_a_fault_would_be_seen(tmp_path: Path, chromium: Any) -> None:
    bad = tmp_path / "bad.html"
    bad.write_text("<script>console.error('x')</script><img src='http://example.invalid/a.png'>", encoding="utf-8")
    _, console, asked = chromium.visit(bad, tmp_path / "profile", 1280)
    assert console and asked == ["http://example.invalid/a.png"]


@pytest.mark.parametrize("width", [1280, 390])
def test_every_figure_is_drawn_and_fits(page: Path, tmp_path: Path, width: int, chromium: Any) -> None:
    seen = chromium.measure(page, tmp_path / "profile", width)
    assert seen["width"] == width and seen["wide"] <= width, "the page scrolls sideways"
    assert len(seen["figures"]) > 12
    for figure in seen["figures"]:
        assert figure["drawn"] and figure["marks"] and figure["height"] > 40, f"{figure['id']} is empty"
        assert figure["right"] <= width, f"{figure['id']} is cut off"


@pytest.mark.parametrize("width", [1280, 390])
def test_no_word_is_cut(page: Path, tmp_path: Path, width: int, chromium: Any) -> None:
    assert chromium.measure(page, tmp_path / "profile", width)["cut"] == []


def test_a_cut_word_would_be_seen(tmp_path: Path, chromium: Any) -> None:
    bad = tmp_path / "bad.html"
    style = "width:90px;overflow:hidden;white-space:nowrap"
    drawn = '<svg width="390" height="20"><text x="300" y="12">a name wider than its drawing</text></svg>'
    bad.write_text(
        f'<main><p style="{style}">words that are too wide</p>{drawn}<p>fits</p></main></body>', encoding="utf-8"
    )
    assert chromium.measure(bad, tmp_path / "profile", 390)["cut"] == [
        "words that are too wide",
        "a name wider than its drawing",
    ]


def test_a_screenshot_has_the_size_that_was_asked_for(page: Path, tmp_path: Path) -> None:
    from PIL import Image

    with Image.open(screenshot(page, tmp_path / "shot.png", width=800, height=600)) as picture:
        assert picture.size == (800, 600) and len(picture.convert("L").getcolors()) > 20
