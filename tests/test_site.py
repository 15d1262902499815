"""The site of docs/: it builds without a warning, and its pages load nothing from elsewhere."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from finetune.report import screenshot
from tests.test_docs import ROOT

LOADS = re.compile(
    r'<(?:script|img|source|iframe)[^>]*\s(?:src|srcset)="([^"]+)"|<link rel="(?:stylesheet|icon)"[^>]*>'
)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("mkdocs", reason="extra docs")
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(out)]
    env = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and "WARNING" not in done.stderr, done.stderr[-3000:]
    return out


@pytest.mark.slow
def test_the_site_has_every_page_and_finds_it(site: Path) -> None:
    names = {path.with_suffix(".html").name for path in (ROOT / "docs").glob("*.md")}
    names |= {"index.html", "changelog.html", "contributing.html"}
    names |= {f"tutorials/{path.stem}.html" for path in (ROOT / "docs/tutorials").glob("*.ipynb")}
    found = {
        entry["location"].partition("#")[0]
        for entry in json.loads((site / "search/search_index.json").read_text())["docs"]
    }
    for name in sorted(names):
        assert (site / name).is_file(), name
        assert name in found, f"{name} is not in the search index"
    start = (site / "index.html").read_text(encoding="utf-8")
    assert all(f'href="{name}"' in start for name in names - {"index.html"}), (
        "a page that the navigation does not reach"
    )


@pytest.mark.slow
def test_the_site_loads_nothing_from_elsewhere(site: Path) -> None:
    for page in site.rglob("*.html"):
        for found in LOADS.finditer(page.read_text(encoding="utf-8")):
            assert "://" not in found[0] and '"//' not in found[0], f"{page.name}: {found[0]}"
    for sheet in site.rglob("*.css"):
        assert not re.search(r"url\(\s*[\"']?https?:|@import", sheet.read_text(encoding="utf-8")), sheet.name


@pytest.mark.slow
@pytest.mark.browser
@pytest.mark.skipif(screenshot.browser() is None, reason="no Chromium here")
def test_the_search_works_on_pages_opened_from_a_folder(site: Path, tmp_path: Path) -> None:
    flags = [*screenshot.FLAGS, f"--user-data-dir={tmp_path}", "--host-resolver-rules=MAP * ~NOTFOUND"]
    flags += ["--virtual-time-budget=20000", "--dump-dom", f"{(site / 'index.html').as_uri()}?q=msn_loss"]
    dom = subprocess.run([str(screenshot.browser()), *flags], capture_output=True, text=True, timeout=180).stdout
    assert "matching document" in dom and "api.html#pretrain.loss.msn_loss" in dom


@pytest.mark.slow
def test_the_reference_shows_docstrings(site: Path) -> None:
    page = re.sub(r"<[^>]+>", "", (site / "api.html").read_text(encoding="utf-8"))
    for words in ("msn_loss", "prototypes", "evaluate", "preprocess", "Returns", "Raises"):
        assert words in page, words
