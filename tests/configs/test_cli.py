"""Exit codes: what a signal does, wherever it finds a command."""

import subprocess
import sys
from pathlib import Path

import pytest

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
