"""Every command against Ctrl-C, SIGTERM, a second command, full and read-only disks.

kills.py does the same at random moments, from the first line on.
"""

import contextlib
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import pytest

from tests.hardening import kills
from tests.hardening.disk import fill, refused, small_disk
from tests.hardening.rooms import (
    NAMES,
    WRITES,
    Command,
    Room,
    short,
    wait_for,
)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 75)], ids=["SIGINT", "SIGTERM"])
@pytest.mark.parametrize("name", [name for name in NAMES if name != "export"])  # which is done within a second
def test_a_signal_ends_a_command_with_one_line_and_no_process_left(
    room: Callable[..., Room], tmp_path: Path, name: str, number: signal.Signals, code: int
) -> None:
    here = room(tmp_path / "own", name)
    command = here.command(name)
    process, log = here.start(command)
    wait_for(lambda: kills.catches(process.pid), process, log)
    if command.resumes:
        wait_for(lambda: command.working(log), process, log)
    said = log.read_text() if log.exists() else ""
    # Ctrl-C goes to the whole group, as from a terminal; SIGTERM to the command, as from a scheduler
    (os.killpg if number == signal.SIGINT else os.kill)(process.pid, number)
    got, text = here.end(process, log)
    assert got == code and "Traceback" not in text, text
    last = [line for line in text.removeprefix(said).splitlines() if line.startswith(("interrupted", "stopped"))]
    assert last or "stopped at step" in text, text
    goes_on = "go on with" in text or "the same command goes on" in text  # the latter before its work has begun
    assert number == signal.SIGINT or not command.resumes or goes_on, text
    assert kills.damaged(kills.Command(name, [], command.out, ())) == []


LOCKS = {"demo data": ".data.lock", "features": ".features.lock", "notes": ".notes.lock", "knowledge": ".notes.lock"}
LOCKS |= {"images": "store/.lock-1-of-1", "demo": "demo/.lock", "grid": "grid/.lock-*"}
LOCKS |= {name: "run/.lock" for name in ("pretrain", "probe", "fuse")}


@pytest.mark.slow
@pytest.mark.parametrize("name", LOCKS)
def test_the_second_command_in_a_folder_is_refused_until_the_first_is_gone(
    room: Callable[..., Room], tmp_path: Path, name: str
) -> None:
    here = room(tmp_path / "own", name)
    command = here.command(name)

    def holds(process: ForkServerProcess) -> bool:
        return any(f"process {process.pid} " in path.read_text() for path in here.own.glob(LOCKS[name]))

    first, log = here.start(command)
    wait_for(lambda: holds(first), first, log)
    os.killpg(first.pid, signal.SIGSTOP)  # so that it is still there
    code, text = here.run(command)
    assert code == 2 and "another command works in this folder" in text and str(command.out) in text, text
    assert text.count("error:") == 1 and "Traceback" not in text, text
    os.kill(first.pid, signal.SIGKILL)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(first.pid, signal.SIGCONT)  # what it started, which would stay stopped for ever
    here.end(first, log)
    second, log = here.start(command)
    wait_for(lambda: holds(second), second, log)
    os.kill(second.pid, signal.SIGKILL)
    here.end(second, log)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    try:
        with small_disk(tmp_path / "disk", 64) as disk:
            yield disk
    except PermissionError as error:
        pytest.skip(str(error))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "free"), [(name, (4_096, 150_000)[i % 2]) for i, name in enumerate(WRITES)])
def test_a_full_disk_is_named_and_the_same_command_goes_on_when_there_is_space(
    room: Callable[..., Room], disk: Path, name: str, free: int
) -> None:
    here = room(disk, name)
    command = short(here, name)
    ballast = fill(disk, free)
    code, text = here.run(command)
    if code == 0:
        assert free > 4_096, "it wrote nothing"  # what it writes is smaller
        return
    named = refused(text, disk, lines=2 if name == "grid" else 1)  # each of its runs says so
    assert code == 2 and named[0] != "!", named
    assert kills.damaged(kills.Command(name, [], command.out, ())) == []
    ballast.unlink()
    code, text = here.run(command)
    assert code == 0, text


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "place"),
    [
        *((name, "a read-only disk") for name in WRITES),
        *((name, "below a file") for name in ("demo data", "features", "images", "probe", "report", "grid")),
    ],
)
def test_a_folder_that_cannot_be_written_is_named(room: Callable[..., Room], disk: Path, name: str, place: str) -> None:
    here = room(disk, name)
    command = short(here, name)
    if place == "below a file":
        (disk / "file").touch()
        words = [word.replace(str(command.out), f"{disk}/file/{command.out.name}") for word in command.words]
        if name == "grid":
            config = (disk / "grid.yaml").read_text()
            (disk / "grid.yaml").write_text(config.replace(f'"{command.out}"', f'"{disk}/file/grid"'))
        command = Command(words, command.out)
    else:
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    code, text = here.run(command)
    assert code == 2 and "Traceback" not in text and text.count("error:") == 1, text
    assert str(disk) in text.split("error:")[1], text
