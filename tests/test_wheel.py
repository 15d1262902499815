"""The wheel: built, installed in a new environment, and used from an empty folder."""

import importlib.util
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from ehr_features.demo.generate import generate

ROOT = Path(__file__).resolve().parents[1]
DATA = {".yaml", ".csv", ".txt", ".css", ".html", ".j2", ".json", ".typed"}
STEPS = [
    "features demo/features mimic_iv=../hospital/mimic-iv mimic_cxr=../hospital/mimic-cxr mimic_ed=null out=features",
    "images demo/images mimic_cxr=../hospital/mimic-cxr out=store workers=2",
    "pretrain demo/pretrain_vit_tiny features=features store=store out=runs/msn optim.steps=2 optim.batch_size=8 "
    "log_every=1 --processes 2",
    "probe demo/probe_linear features=features store=store encoder=runs/msn out=runs/probe epochs=2 patience=1 "
    "samples=9",
    "report runs/msn runs/probe --out report.html",
]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    for name in files:
        if name.startswith(("configs/", "ehr_features/", "pretrain/", "finetune/")) or "/" not in name:
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", str(out), str(source)]
    isolated = [] if importlib.util.find_spec("setuptools") is None else ["--no-build-isolation"]
    subprocess.run([*command, *isolated], check=True, capture_output=True)
    return next(out.glob("*.whl"))


def test_every_data_file_is_in_the_wheel(wheel: Path) -> None:
    packages = [ROOT / name for name in ("configs", "ehr_features", "pretrain", "finetune")]
    want = {path.relative_to(ROOT).as_posix() for room in packages for path in room.rglob("*") if path.suffix in DATA}
    inside = set(zipfile.ZipFile(wheel).namelist())
    assert len(want) > 30 and want <= inside, want - inside


@pytest.mark.slow
def test_the_pipeline_runs_from_the_wheel_in_an_empty_folder(tmp_path: Path, wheel: Path) -> None:
    generate(tmp_path / "hospital", subjects=60, seed=3, film_size=64)
    python = tmp_path / "env/bin/python"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "env")], check=True)
    site = next((tmp_path / "env/lib").glob("python*/site-packages"))
    torch = importlib.util.find_spec("torch")
    assert torch is not None and torch.origin is not None
    (site / "dependencies.pth").write_text(f"{Path(torch.origin).parents[1]}\n")  # nothing is downloaded
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps", "--no-index", str(wheel)]
    subprocess.run(install, check=True, capture_output=True)
    work = tmp_path / "work"
    work.mkdir()
    keep = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    env = keep | {"OMP_NUM_THREADS": "1", "PATH": f"{python.parent}:{os.environ['PATH']}"}
    for step in STEPS:
        done = subprocess.run(["ehr-msn", *step.split()], cwd=work, env=env, capture_output=True, text=True)
        assert done.returncode == 0, f"{step}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
        if not step.startswith("report"):
            assert "next: ehr-msn " in done.stdout and str(ROOT) not in done.stdout
    assert (work / "report.html").stat().st_size > 10_000
    where = [python, "-P", "-c", "import pretrain.train; print(pretrain.train.__file__)"]
    assert str(site) in subprocess.run(where, cwd=work, env=env, capture_output=True, text=True, check=True).stdout
