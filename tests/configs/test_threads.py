"""The number of threads: cores of the cgroup over processes, chosen once."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from configs import threads


@pytest.fixture(autouse=True)
def unset(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (threads.FIRST, *threads.OTHERS, threads.MARK, "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


def test_a_cgroups_quota_limits_the_cores(tmp_path: Path) -> None:
    bound = threads.cores(tmp_path)
    for said, wanted in (("max 100000", bound), ("100000 100000", 1), ("150000 100000", min(bound, 2)), ("x", bound)):
        (tmp_path / "cpu.max").write_text(said)
        assert threads.cores(tmp_path) == wanted
    (tmp_path / "cpu.max").unlink()
    (tmp_path / "cpu").mkdir()  # version 1
    for name, value in (("quota", 50_000), ("period", 100_000)):
        (tmp_path / f"cpu/cpu.cfs_{name}_us").write_text(f"{value}\n")
    assert threads.cores(tmp_path) == 1


def test_the_cores_are_shared_by_the_processes_and_a_childs_choice_is_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "cores", lambda: 8)
    threads.choose()
    assert os.environ[threads.FIRST] == os.environ["OPENBLAS_NUM_THREADS"] == "8"
    assert threads.of_each(4)["OMP_NUM_THREADS"] == "2"  # of a launcher's child, though its parent chose 8
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "16")
    threads.choose()
    assert threads.said() == "threads: 1 a process (8 cores, 16 processes on this machine)"


def test_what_the_user_has_set_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(threads.FIRST, "3")
    assert {threads.of_each(2)[name] for name in (threads.FIRST, *threads.OTHERS)} == {"3"}
    monkeypatch.setenv("MKL_NUM_THREADS", "5")
    assert threads.of_each(2)["MKL_NUM_THREADS"] == "5"
    for _generation in range(3):  # a command, its child and the child's child, as in a grid
        threads.choose()
        assert [os.environ[name] for name in (threads.FIRST, *threads.OTHERS)] == ["3", "3", "5"]


def test_a_command_chooses_before_numpy_is_imported() -> None:
    code = "from configs.begin import begin; begin(); import os, sys; print('numpy' in sys.modules)"
    code += "; print(os.environ['OMP_NUM_THREADS'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", str(threads.cores())]
