"""`./launch.sh demo`: every step once, resuming in the same folder, refusing another demo; with short trainings."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

import pytest
import yaml

from configs import UserError
from ehr_features.files import write_json
from ehr_features.typed import read_json
from finetune import demo as demos
from finetune.demo import RUNS, demo
from tests import forked

SHORT = {"pretrain": {"optim.steps": 4, "log_every": 2}, "probe": {"epochs": 2, "samples": 50}, "fuse": {"epochs": 2}}


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's configs, with trainings of a few steps."""
    folder = tmp_path_factory.mktemp("configs")
    for path in demos.CONFIGS.glob("*.yaml"):
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
        for key, value in SHORT.get(path.stem.partition("_")[0], {}).items():
            section, _, name = key.rpartition(".")
            (config[section] if section else config)[name] = value
        (folder / path.name).write_text(yaml.safe_dump(config), encoding="utf-8")
    return folder


def start(words: list[str], *, stdout: IO[bytes], env: dict[str, str], **more: Any) -> Any:
    """subprocess.Popen for the steps on tables; the steps that would import torch for seconds are forked."""
    if words[2] == "ehr_features":
        return subprocess.Popen(words, stdout=stdout, env=env, **more)
    return forked.Popen(words[2:], Path.cwd(), Path(stdout.name), env)


@pytest.fixture(scope="module")
def done(short: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("demo") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demos, "CONFIGS", short)
        patch.setattr(demos, "subprocess", SimpleNamespace(Popen=start))
        demo(out, subjects=120, seed=3)
    return out


@pytest.mark.slow
def test_every_step_leaves_its_result_and_the_page_shows_every_run(done: Path) -> None:
    page = (done / "report.html").read_text(encoding="utf-8")
    assert page.rstrip().endswith("</html>") and all(name in page for name in RUNS)
    assert "Quality: linear probe, val AUROC" in page  # of the encoders on the way
    assert set(read_json(done / "demo.json")["steps"]) == {step.name for step in demos.plan(done, 120, 3, False)}


@pytest.mark.slow
def test_what_is_done_is_not_done_again(done: Path, short: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(demos, "CONFIGS", short)
    started: list[str] = []
    monkeypatch.setattr(demos, "_start", lambda step, out, alone: started.append(step.name))
    demo(done, subjects=120, seed=3)
    assert started == [] and "report.html" in capsys.readouterr().out


@pytest.mark.slow
def test_a_demo_that_was_stopped_goes_on_with_the_step_that_was_not_done(done: Path, short: Path, monkeypatch) -> None:
    monkeypatch.setattr(demos, "CONFIGS", short)
    about = read_json(done / "demo.json")
    kept = {name: step for name, step in about["steps"].items() if name != "report"}
    write_json(done / "demo.json", about | {"steps": kept})
    (done / "report.html").unlink()
    started: list[str] = []
    real = demos._start
    monkeypatch.setattr(
        demos, "_start", lambda step, out, alone: (started.append(step.name), real(step, out, alone=alone))
    )
    demo(done, subjects=120, seed=3)
    assert started == ["report"] and (done / "report.html").is_file()


def test_a_running_step_says_what_is_left(tmp_path: Path) -> None:
    step = demos.plan(tmp_path, 120, 3, False)[3]
    assert demos._left(step, tmp_path) == ""
    (tmp_path / "logs").mkdir()
    lines = [f"pretraining: {n} of 3000 steps, 4.9/s, {3000 - n} s left loss 2.7, rank 94.4\n" for n in (20, 780)]
    (tmp_path / "logs" / f"{step.name}.txt").write_text("".join(lines))
    assert demos._left(step, tmp_path) == "780 of 3000 steps, 2220 s left"


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match="not a folder of the demo; it holds"):
        demo(tmp_path, subjects=120, seed=4)


def test_a_folder_is_known_as_a_demo_from_its_first_file_on_and_another_demo_in_it_is_refused(
    tmp_path: Path, short: Path, monkeypatch
) -> None:
    def stop(path: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(demos, "CONFIGS", short)
    monkeypatch.setattr(demos, "make_folder", stop)  # of the logs
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            demo(tmp_path / "demo", subjects=40, seed=1)
    assert [path.name for path in (tmp_path / "demo").iterdir() if path.name[0] != "."] == ["demo.json"]
    with pytest.raises(UserError, match="give another folder"):
        demo(tmp_path / "demo", subjects=40, seed=2)


@pytest.mark.slow
def test_a_step_that_fails_names_its_log(tmp_path: Path, short: Path, monkeypatch) -> None:
    broken = Path(shutil.copytree(short, tmp_path / "configs"))
    (broken / "features.yaml").write_text("nothing: true\n")
    monkeypatch.setattr(demos, "CONFIGS", broken)
    with pytest.raises(UserError, match=r"step `features` failed with exit code 2; its log is .*features\.txt"):
        demo(tmp_path / "out", subjects=60, seed=3)
