"""Exit codes after a signal, at any stage of a command."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from configs import cli

SLOW = """
import os, signal, time
try:
    os.kill(os.getpid(), signal.{name})
    time.sleep(5)
except BaseException:
    pass  # as C extensions and module attributes do with what is raised while they are imported
"""
TWICE = """
import os, signal, sys
from configs import cli
def run():
    try:
        os.kill(os.getpid(), signal.{name})
    finally:
        os.kill(os.getpid(), signal.{name})
sys.exit(cli.guard(run, signals=True))
"""


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 75), ("SIGINT", 130)])
def test_a_signal_in_the_middle_of_an_import_ends_the_command_at_once(tmp_path: Path, name: str, code: int) -> None:
    (tmp_path / "slow.py").write_text(SLOW.format(name=name))
    command = "import sys; from configs import cli; sys.exit(cli.guard(lambda: __import__('slow') and 0, signals=True))"
    run = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); {command}"
    done = subprocess.run([sys.executable, "-c", run], capture_output=True, text=True, timeout=120)
    assert done.returncode == code and "Traceback" not in done.stderr


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 75), ("SIGINT", 130)])
def test_a_signal_that_comes_twice_counts_once(name: str, code: int) -> None:
    done = subprocess.run([sys.executable, "-c", TWICE.format(name=name)], capture_output=True, text=True, timeout=120)
    assert done.returncode == code and "Traceback" not in done.stderr


@pytest.mark.parametrize("room", ["ehr_features", "pretrain", "finetune", "configs.launch"])
@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 75), ("SIGINT", 130)])
def test_a_signal_during_the_first_imports_of_a_command_is_one_line(
    tmp_path: Path, room: str, name: str, code: int
) -> None:
    (tmp_path / "yaml.py").write_text(SLOW.format(name=name))  # the first library that a command imports
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run([sys.executable, "-m", room, "--help"], capture_output=True, text=True, timeout=120, env=env)
    assert done.returncode == code and len(done.stderr.splitlines()) == 1, done.stderr


LATE = """
import os, signal
from configs import cli
cli.guard(lambda: 0, signals=True)
os.kill(os.getpid(), signal.{name})
"""


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_after_the_work_changes_nothing(name: str) -> None:
    done = subprocess.run([sys.executable, "-c", LATE.format(name=name)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stderr == ""


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--print-confg", "seed=1"], "not understood: --print-confg; did you mean --print-config?"),
        (["--seed", "3", "out=x"], "not understood: --seed 3; keys of the config are given as key=value"),
    ],
)
def test_a_flag_that_does_not_exist_is_named_alone_with_what_was_meant(words: list[str], says: str) -> None:
    command = [sys.executable, "-m", "ehr_features", "build", "configs/demo/features.yaml", *words]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and says in done.stderr


def test_a_name_that_is_too_long_is_said_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.guard(lambda: (tmp_path / ("y" * 300)).mkdir()) == 2
    assert capsys.readouterr().err.strip().endswith("the name is too long: choose a shorter one")
