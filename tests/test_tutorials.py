"""The notebooks of docs/tutorials: executed from top to bottom in an empty folder, and kept without outputs."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import duckdb
import pytest

from ehr_features.series import events

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "docs/tutorials").glob("*.ipynb"))
SMALLER = {
    "SUBJECTS = 200": "SUBJECTS = 80",
    "samples=200": "samples=20",
    "STEPS = 40": "STEPS = 4",
    "STEPS = 20": "STEPS = 4",
}


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_runs_in_an_empty_folder(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbclient = pytest.importorskip("nbclient", reason="extra tutorials")
    nbformat = pytest.importorskip("nbformat", reason="extra tutorials")
    for name in ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "jupyter"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        for long, short in SMALLER.items():
            cell.source = cell.source.replace(long, short)
    kernel = {"argv": [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"], "language": "python"}
    spec = tmp_path / "jupyter/kernels/python3/kernel.json"
    spec.parent.mkdir(parents=True)
    spec.write_text(json.dumps({**kernel, "display_name": "Python 3"}))
    work = tmp_path / "empty"
    work.mkdir()
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(work)}}).execute()
    encoder = next(work.rglob("encoder.safetensors"))
    assert encoder.stat().st_size and (work / "work/report.html").is_file()
    shown = [out for cell in notebook.cells if cell.cell_type == "code" for out in cell.outputs]
    assert any("image/png" in out.get("data", {}) for out in shown), "no film is shown"
    assert any("value" in out.get("data", {}).get("text/plain", "") for out in shown), "no table of scores is shown"


def test_notebooks_are_kept_without_outputs() -> None:
    assert len(NOTEBOOKS) == 2
    for path in NOTEBOOKS:
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            assert not cell.get("outputs") and cell.get("execution_count") is None, f"{path.name}: clear its outputs"


def test_features_need_no_ipywidgets_in_a_notebook(capsys: pytest.CaptureFixture[str]) -> None:
    class Engine:
        name = "duckdb"

        @property
        def con(self) -> Engine:
            return self

        def execute(self, query: str) -> None:
            raise duckdb.InvalidInputException("required package 'ipywidgets' is missing")

    with events.progress(Engine(), "reading"):
        pass
    assert capsys.readouterr().err == "  reading ...\n"
