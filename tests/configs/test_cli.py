"""Exit codes after a signal, at any stage of a command."""

import errno
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from configs import amounts, cli

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


PRINTED = [
    "help",
    "pretrain --keys",
    "fuse --keys",
    "probe --help",
    "probe demo/probe_linear --print-config",
    "config",
    "--completion bash",
]


@pytest.mark.parametrize("words", [line.split() for line in PRINTED], ids=PRINTED)
def test_a_reader_that_takes_a_line_and_leaves_sees_no_traceback(words: list[str]) -> None:
    command = [sys.executable, "-m", "configs", *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None and child.stderr is not None
        child.stdout.close()  # as `| head -0`: before anything is printed
        said = child.stderr.read()
    assert said == "" and child.returncode == 0


def test_a_reader_that_leaves_does_not_change_the_exit_code() -> None:
    script = "import sys; from configs import cli; sys.exit(cli.guard(lambda: print('refuted') or 2))"
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    command, pipe = [sys.executable, "-c", script], subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, env=buffered) as child:
        assert child.stdout is not None and child.stderr is not None
        child.stdout.close()
        assert child.stderr.read() == b""
    assert child.returncode == 2


def test_a_name_that_is_too_long_is_said_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.guard(lambda: (tmp_path / ("y" * 300)).mkdir()) == 2
    assert capsys.readouterr().err.strip().endswith("the name is too long: choose a shorter one")


def test_a_full_disk_is_named_with_what_it_has_free(tmp_path, monkeypatch, capsys):
    def full():
        raise OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "run/results.json"))

    monkeypatch.setattr(
        amounts.shutil, "disk_usage", lambda place: SimpleNamespace(free=4096 if place == tmp_path else 0)
    )
    assert cli.guard(full) == 2
    said = capsys.readouterr().err
    assert said == (
        f"error: {tmp_path}/run/results.json: the disk is full: free some space and run the same command again "
        "(4.1 KB are free)\n"
    )


@pytest.mark.parametrize(
    ("number", "says"),
    [(0, "0 bytes"), (999, "999 bytes"), (4096, "4.1 KB"), (45_678, "46 KB"), (3.4e6, "3.4 MB"), (1.25e13, "12 TB")],
)
def test_an_amount_of_bytes_is_never_rounded_to_nothing(number, says):
    assert amounts.amount(number) == says


def test_a_file_that_is_deleted_under_a_command_ends_it_in_a_sentence(tmp_path, capsys):
    assert cli.guard(lambda: (tmp_path / "series.json").read_text() and 0) == 2
    assert "series.json: no longer there; was it moved or deleted" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        ("[gloo/transport/tcp/pair.cc:553] Connection closed by peer [10.0.0.7]:4", 1, "has lost another process"),
        ("[gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 1800000ms for recv", 75, "has waited too long"),
    ],
)
def test_a_lost_process_is_a_line_and_no_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: str, code: int, says: str
) -> None:
    def fail() -> int:
        raise RuntimeError(error)

    monkeypatch.setattr("configs.launch.LOST_SECONDS", 0.0)
    monkeypatch.setattr("configs.launch.signal.signal", lambda *_: None)
    for rank, local, lines in (("2", "0", 1), ("3", "1", 0)):  # one speaks on each machine
        for name, value in {"RANK": rank, "LOCAL_RANK": local, "WORLD_SIZE": "4"}.items():
            monkeypatch.setenv(name, value)
        assert cli.guard(fail) == code
        said = capsys.readouterr().err
        assert len(said.splitlines()) == lines and (not lines or f"process 2 {says}" in said)
    monkeypatch.setenv("WORLD_SIZE", "1")
    with pytest.raises(RuntimeError):
        cli.guard(fail)
