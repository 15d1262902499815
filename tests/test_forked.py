"""A forked command ends, prints and is killed like one that an interpreter of its own runs."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests import forked

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        ["configs", "nonsense"],
        ["ehr_features", "build", "nowhere.yaml"],
        ["-c", "import os, sys; print(__name__, os.getcwd(), os.environ['OWN']); sys.exit(7)"],
        ["-c", "import sys; print('x', file=sys.stderr)"],
    ],
)
def test_code_and_output_are_those_of_an_own_interpreter(tmp_path: Path, words: list[str]) -> None:
    env = os.environ | {"OWN": "a word", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *([] if words[0] == "-c" else ["-m"]), *words]
    wanted = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    done = forked.run(list(words), tmp_path, env)
    assert (done.returncode, done.stdout, done.stderr) == (wanted.returncode, wanted.stdout, wanted.stderr)


@pytest.mark.slow
def test_an_exception_is_a_code_and_a_traceback() -> None:
    done = forked.run(["-c", "raise KeyError('odd')"])
    assert done.returncode == 1 and "Traceback" in done.stderr and "KeyError: 'odd'" in done.stderr


@pytest.mark.slow
def test_its_group_is_killed_from_its_start_on(tmp_path: Path) -> None:
    process = forked.Popen(["-c", "import time; time.sleep(600)"], tmp_path, tmp_path / "log.txt")
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait(60) == -signal.SIGKILL
    with pytest.raises(TimeoutError):
        forked.run(["-c", "import time; time.sleep(600)"], timeout=0.5)
