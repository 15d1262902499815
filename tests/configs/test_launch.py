"""The launcher: ranks of processes, their exit codes and signals."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

RANKS = """
import os, sys
line = " ".join(os.environ[k] for k in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR")) + "\\n"
os.write(1, line.encode())  # at once: the processes share the pipe
sys.exit(int(sys.argv[1]) if os.environ["RANK"] == "1" else 0)
"""
WAITS = """
import os, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
os.write(1, b"ready\\n")
time.sleep(60)
"""


@pytest.fixture
def launch(tmp_path: Path):
    def launch(code: str, *flags: str, args: tuple[str, ...] = ()) -> subprocess.Popen:
        (tmp_path / "worker.py").write_text(code)
        command = [sys.executable, "-m", "configs.launch", *flags, "--", "worker", *args]
        env = os.environ | {"PYTHONPATH": str(tmp_path)}
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)

    return launch


def test_each_process_gets_its_rank_and_the_world_size(launch) -> None:
    out, _ = launch(RANKS, "--processes", "2", args=("0",)).communicate()
    assert sorted(out.splitlines()) == ["0 0 2 127.0.0.1", "1 1 2 127.0.0.1"]


def test_the_second_machine_counts_on_from_the_first(launch) -> None:
    flags = ("--processes", "2", "--machines", "2", "--machine-rank", "1", "--main-address", "localhost:2345")
    out, _ = launch(RANKS, *flags, args=("0",)).communicate()
    assert sorted(out.splitlines()) == ["2 0 4 localhost", "3 1 4 localhost"]


def test_the_exit_code_of_a_process_is_the_exit_code_of_the_run(launch) -> None:
    child = launch(RANKS, "--processes", "2", args=("2",))
    child.communicate()
    assert child.returncode == 2


def test_sigterm_reaches_every_process_and_75_comes_back(launch) -> None:
    child = launch(WAITS, "--processes", "2")
    assert [child.stdout.readline(), child.stdout.readline()] == ["ready\n", "ready\n"]
    child.send_signal(signal.SIGTERM)
    _, err = child.communicate(timeout=90)
    assert child.returncode == 75 and "Traceback" not in err


def test_a_killed_process_takes_the_others_down_and_is_named(launch) -> None:
    code = "import os, signal, time\nif os.environ['RANK'] == '1': os.kill(os.getpid(), signal.SIGKILL)\ntime.sleep(60)"
    start = time.monotonic()
    child = launch(code, "--processes", "2")
    _, err = child.communicate(timeout=90)
    assert child.returncode == 1 and "process 1 was ended by SIGKILL" in err
    assert time.monotonic() - start < 90


def test_a_signal_that_comes_before_a_process_listens_is_no_crash(launch) -> None:
    child = launch("import os, time\nos.write(1, b'ready\\n')\ntime.sleep(60)", "--processes", "2")
    assert [child.stdout.readline(), child.stdout.readline()] == ["ready\n", "ready\n"]
    child.send_signal(signal.SIGTERM)
    _, err = child.communicate(timeout=90)
    assert child.returncode == 75 and err.count("stopped by SIGTERM") == 1 and "Traceback" not in err


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process of its parent's death")
def test_a_killed_launcher_takes_its_processes_along(launch) -> None:
    child = launch("import os, time\nos.write(1, b'ready\\n')\ntime.sleep(600)", "--processes", "2")
    assert [child.stdout.readline(), child.stdout.readline()] == ["ready\n", "ready\n"]
    child.kill()
    out, _ = child.communicate(timeout=90)  # the pipes close when the last of them is gone, long before they have slept
    assert child.returncode == -signal.SIGKILL and out == ""


def test_an_accelerate_config_says_what_no_flag_does(launch, tmp_path: Path) -> None:
    path = tmp_path / "acc.yaml"
    said = "distributed_type: MULTI_CPU\nnum_processes: 4\nnum_machines: 2\nmain_process_ip: localhost\n"
    path.write_text(said + "main_process_port: 2345\n")
    flags = ("--accelerate-config", str(path), "--machine-rank", "1")
    out, _ = launch(RANKS, *flags, args=("0",)).communicate()
    assert sorted(out.splitlines()) == ["2 0 4 localhost", "3 1 4 localhost"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (None, "no accelerate config"),
        ("num_machines: 1", "no accelerate config"),
        ("num_processes: 3\nnum_machines: 2", "do not divide"),
        (
            "num_processes: 2\ndistributed_type: FSDP",
            "FSDP shards weights, but a process of DDP holds those of a ViT-L",
        ),
        ("num_processes: 2\ndistributed_type: DEEPSPEED", "DeepSpeed replaces optimizer, precision and checkpoints"),
        ("num_processes: 2\nmixed_precision: fp8", "fp8 scales values by their history"),
        ("num_processes: 2\ndistributed_type: XLA", "XLA cannot be used here"),
    ],
)
def test_an_accelerate_config_that_cannot_be_followed_is_refused(launch, tmp_path: Path, text: str, says: str) -> None:
    if text is not None:
        (tmp_path / "acc.yaml").write_text(text)
    child = launch(RANKS, "--accelerate-config", str(tmp_path / "acc.yaml"), args=("0",))
    _, err = child.communicate()
    assert child.returncode == 2 and says in err and "Traceback" not in err
