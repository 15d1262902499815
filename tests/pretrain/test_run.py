"""The run folder: refused configs, kept files, and its state after a kill or a full disk."""

import json
import os
import resource
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from configs import Settings, UserError
from configs.cli import guard
from ehr_features import files as lock
from ehr_features.files import write_json
from ehr_features.typed import read_json, read_lines
from pretrain import run
from pretrain.run import processes
from pretrain.run.heartbeat import Heartbeat


class Inner(Settings):
    lr: float = 0.1


class Config(Settings):
    out: str = "runs/x"
    seed: int = 0
    workers: int = 2
    optim: Inner = Inner()


def in_child(work: Callable[[], Any]) -> int:
    """Run in a forked process. Returns: its pid; the child leaves with 0, or 1 after an exception."""
    pid = os.fork()
    if pid == 0:
        code = 1
        torch.set_num_threads(1)  # threads do not survive a fork
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return pid


def code_of(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


# ---- the folder -----------------------------------------------------------------------------------------------------
def test_a_run_folder_holds_config_and_provenance(tmp_path: Path) -> None:
    source = tmp_path / "table.csv"
    source.write_text("a\n1\n")
    folder = run.open_run(tmp_path / "x", Config(seed=3), sources=[source])
    assert "seed: 3" in (folder / "config.yaml").read_text()
    made = json.loads((folder / "provenance.json").read_text())
    assert made["versions"]["torch"] and made["sources"][source.as_posix()]["bytes"] == 4


def test_the_same_config_goes_on_and_another_is_refused_by_key(tmp_path: Path) -> None:
    folder = tmp_path / "x"
    run.open_run(folder, Config(out="a"), may_differ=["workers"])
    run.Log(folder).log({"train/loss": 1.0}, 1)
    run.open_run(folder, Config(out="b", workers=9), may_differ=["workers"])
    with pytest.raises(UserError) as error:
        run.open_run(folder, Config(seed=7, optim=Inner(lr=0.5)))
    says = str(error.value)
    assert "seed: 0 there, 7 now" in says and "optim.lr: 0.1 there, 0.5 now" in says and "out=" in says
    assert "workers" not in says


def test_a_finished_run_is_sealed_and_its_log_of_probes_is_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run.open_run(tmp_path / "x", Config())
    run.Log(folder).log({"train/loss": 1.0}, 1)
    (folder / "probe.jsonl").write_text('{"step": 1}\n')
    run.finish(folder)
    (folder / "probe.jsonl").write_text('{"step": 1}\n{"step": 2}\n')
    for name in ("probe.jsonl", "metrics.jsonl"):
        read_lines(folder / name)
    assert run.complete(folder) and "changed" not in capsys.readouterr().err
    write_json(folder / "provenance.json", read_json(folder / "provenance.json") | {"seconds": 1})
    assert run.complete(folder)
    assert f"{folder}/provenance.json: changed since it was written" in capsys.readouterr().err


def test_a_run_that_never_began_makes_way_for_a_mended_config(tmp_path: Path) -> None:
    run.open_run(tmp_path / "x", Config(seed=1))
    run.open_run(tmp_path / "x", Config(seed=2))
    assert "seed: 2" in (tmp_path / "x/config.yaml").read_text()
    run.save_checkpoint(tmp_path / "x", {"a": torch.zeros(1)}, 1)
    with pytest.raises(UserError, match="seed: 2 there, 3 now"):
        run.open_run(tmp_path / "x", Config(seed=3))


def test_a_changed_input_is_refused(tmp_path: Path) -> None:
    source = tmp_path / "table.csv"
    source.write_text("1")
    run.open_run(tmp_path / "x", Config(), sources=[source])
    run.Log(tmp_path / "x").log({"train/loss": 1.0}, 1)
    os.utime(source, (1, 1))  # another time, the same content
    run.open_run(tmp_path / "x", Config(), sources=[source])
    source.write_text("2")
    with pytest.raises(UserError, match=r"input has changed.*table\.csv"):
        run.open_run(tmp_path / "x", Config(), sources=[source])


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(UserError, match="not a run folder"):
        run.open_run(tmp_path, Config())
    with pytest.raises(UserError, match="a file of that name exists"):
        run.open_run(tmp_path / "thesis.tex", Config())
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_damaged_config_is_named(tmp_path: Path) -> None:
    run.Log(run.open_run(tmp_path / "x", Config())).log({"train/loss": 1.0}, 1)
    (tmp_path / "x/config.yaml").write_text("[")
    with pytest.raises(UserError, match=r"config\.yaml: line 1: not valid YAML"):
        run.open_run(tmp_path / "x", Config())


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    folder = run.open_run(tmp_path / "x", Config())
    stale = [folder / ".metrics.partial-999999.jsonl", folder / "checkpoints/.step_000000001.partial-999999.pt"]
    for path in stale:
        path.write_text("half")
    run.open_run(folder, Config())
    assert not any(path.exists() for path in stale)


def test_a_finished_run_says_so_and_how_to_redo_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run.open_run(tmp_path / "x", Config())
    assert not run.complete(folder)
    run.finish(folder, films=12)
    assert run.complete(folder)
    assert "remove the folder" in capsys.readouterr().out
    assert json.loads((folder / "provenance.json").read_text())["films"] == 12


def test_a_second_command_in_the_folder_is_refused_until_the_first_dies(tmp_path: Path) -> None:
    folder = tmp_path / "x"
    ready, wait = os.pipe()

    def hold() -> None:
        run.open_run(folder, Config())
        os.write(wait, b"1")
        time.sleep(60)

    pid = in_child(hold)
    os.read(ready, 1)
    with pytest.raises(UserError, match=f"another command works in this folder.*process {pid}"):
        run.open_run(folder, Config())
    os.kill(pid, signal.SIGKILL)
    code_of(pid)
    run.open_run(folder, Config())


def test_a_file_system_without_locks_is_no_obstacle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(lock.fcntl, "flock", refuse)
    run.open_run(tmp_path / "x", Config())
    assert "cannot be locked" in capsys.readouterr().err


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become a user without rights")
def test_a_read_only_folder_ends_with_a_message(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for folder in [tmp_path, *tmp_path.parents]:
        if folder.stat().st_uid == 0 and folder.name.startswith(("pytest", "test")):
            folder.chmod(0o755)

    def try_it() -> None:
        os.setuid(65534)
        os._exit(guard(lambda: (run.open_run(tmp_path / "x", Config()), 0)[1]))

    assert code_of(in_child(try_it)) == 2
    assert "permission denied: choose another folder" in capfd.readouterr().err


# ---- log ------------------------------------------------------------------------------------------------------------
def test_metrics_are_json_lines_and_what_is_not_finite_is_null(tmp_path: Path) -> None:
    log = run.Log(tmp_path)
    log.log({"train/loss": torch.tensor(1.5), "train/rank": float("nan")}, 1)
    line = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert (line["step"], line["train/loss"], line["train/rank"]) == (1, 1.5, None)


def test_going_on_cuts_later_and_half_written_metrics(tmp_path: Path) -> None:
    log = run.Log(tmp_path)
    for step in range(5):
        log.log({"a": 1}, step)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 1, "a')  # the process was killed while it wrote
    log.cut(2)
    log.log({"a": 2}, 3)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2, 3]


def test_say_prints_and_keeps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run.Log(tmp_path).say("hello")
    assert capsys.readouterr().out == "hello\n" and (tmp_path / "log.txt").read_text().endswith(" hello\n")


# ---- checkpoints ----------------------------------------------------------------------------------------------------
def steps(folder: Path) -> list[int]:
    return sorted(int(p.stem.removeprefix("step_")) for p in (folder / "checkpoints").glob("*.pt"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return run.open_run(tmp_path / "x", Config())


def test_a_checkpoint_comes_back(folder: Path) -> None:
    assert run.load_checkpoint(folder) is None
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    run.save_checkpoint(folder, {"model": model.state_dict(), "optim": optimizer.state_dict(), "seen": ("a", 1)}, 7)
    state = run.load_checkpoint(folder)
    assert state is not None and state["step"] == 7 and state["seen"] == ("a", 1)
    assert torch.equal(state["model"]["weight"], model.state_dict()["weight"])
    optimizer.load_state_dict(state["optim"])


def test_what_could_not_be_loaded_is_not_saved(folder: Path) -> None:
    with pytest.raises(TypeError, match=r"state\['a'\]\[1\] is a PosixPath"):
        run.save_checkpoint(folder, {"a": [1, Path()]}, 1)
    assert steps(folder) == []


def test_no_code_in_a_checkpoint_is_run(folder: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(folder / "owned"),)

    torch.save({"a": Evil()}, folder / "checkpoints/step_000000001.pt")
    with pytest.raises(UserError, match="none of 1 can be read"):
        run.load_checkpoint(folder)
    assert not (folder / "owned").exists()


def test_the_newest_are_kept_whatever_the_clock_says(folder: Path) -> None:
    for step in (1, 2, 3, 4):
        run.save_checkpoint(folder, {}, step, keep=2)
        path = folder / f"checkpoints/step_{step:09d}.pt"
        os.utime(path, (1e9 - step * 1e6,) * 2)  # the clock goes back all the time
    assert steps(folder) == [3, 4]
    state = run.load_checkpoint(folder)
    assert state is not None and state["step"] == 4


def test_one_old_checkpoint_stays_for_each_span(folder: Path) -> None:
    for hour in range(10):
        run.save_checkpoint(folder, {}, hour, keep=2, every_hours=3)
        os.utime(folder / f"checkpoints/step_{hour:09d}.pt", (hour * 3600.0,) * 2)
    assert steps(folder) == [0, 3, 6, 8, 9]


def test_a_future_that_was_given_up_is_removed(folder: Path) -> None:
    for step in (10, 20, 15):
        run.save_checkpoint(folder, {}, step)
    assert steps(folder) == [10, 15]


@pytest.mark.parametrize("damage", ["cut", "empty", "zeros", "flipped"])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(
    folder: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for step in (1, 2):
        run.save_checkpoint(folder, {"a": torch.full((1000,), float(step))}, step)
    path = folder / "checkpoints/step_000000002.pt"
    data = bytearray(path.read_bytes())
    middle = data.find(torch.full((8,), 2.0).numpy().tobytes()) + 40
    flipped = data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]
    path.write_bytes(
        {"cut": data[: len(data) // 2], "empty": b"", "zeros": bytes(len(data)), "flipped": flipped}[damage]
    )
    state = run.load_checkpoint(folder)
    assert state is not None and state["step"] == 1
    assert "step_000000002.pt: damaged" in capsys.readouterr().out
    (folder / "checkpoints/step_000000001.pt").write_bytes(b"")
    with pytest.raises(UserError, match="none of 2 can be read"):
        run.load_checkpoint(folder)


def test_kill_at_any_moment_leaves_a_checkpoint_that_loads(folder: Path) -> None:
    run.save_checkpoint(folder, {"a": torch.zeros(200_000)}, 0)
    last = 0
    for moment in range(12):
        ready, tell = os.pipe()

        def work(tell: int = tell, first: int = last + 1) -> None:
            for step in range(first, first + 10_000):
                run.save_checkpoint(folder, {"a": torch.full((200_000,), float(step))}, step)
                os.write(tell, b"1")

        pid = in_child(work)
        os.read(ready, 1)  # one is saved; the kill comes somewhere in the next ones
        time.sleep(0.003 * moment)
        os.kill(pid, signal.SIGKILL)
        assert code_of(pid) == -signal.SIGKILL
        state = run.load_checkpoint(folder)
        assert state is not None and state["step"] > last and bool((state["a"] == state["step"]).all())
        last = state["step"]
        os.close(ready)
        os.close(tell)


def full(state: dict[str, Any], folder: Path) -> None:
    with pytest.raises(UserError, match=r"could not be written.*the checkpoints before it are whole"):
        run.save_checkpoint(folder, state, 2)


def test_a_file_limit_while_saving_loses_nothing(folder: Path) -> None:
    run.save_checkpoint(folder, {"a": torch.zeros(10)}, 1)

    def work() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        full({"a": torch.zeros(1_000_000)}, folder)

    assert code_of(in_child(work)) == 0
    state = run.load_checkpoint(folder)
    assert state is not None and state["step"] == 1 and len(list((folder / "checkpoints").iterdir())) == 1


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("may not mount a small tmpfs here")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk_while_saving_loses_nothing(small_disk: Path) -> None:
    folder = small_disk / "x"

    def work() -> None:  # in a child, so that no lock keeps the disk busy
        run.open_run(folder, Config())
        run.save_checkpoint(folder, {"a": torch.zeros(10)}, 1)
        full({"a": torch.zeros(1_000_000)}, folder)
        state = run.load_checkpoint(folder)
        assert state is not None and state["step"] == 1 and len(list((folder / "checkpoints").iterdir())) == 1

    assert code_of(in_child(work)) == 0


def test_files_are_made_by_all_processes_and_each_waits_for_all_of_them(tmp_path: Path) -> None:
    """Two processes: each makes its share, the damaged file too; none waits in a collective call."""
    files = [tmp_path / f"part_{i}" for i in range(5)]
    files[0].write_text("whole")
    files[3].write_text("damaged")

    def work(rank: int) -> None:
        dist.init_process_group("gloo", f"file://{tmp_path}/group", rank=rank, world_size=2)
        heartbeat = Heartbeat(dist.FileStore(f"{tmp_path}/store", 2), rank, 2, limit=60)
        processes._heartbeats.append(heartbeat)

        def make(number: int, bar: object) -> None:
            time.sleep(0.3 * rank)
            files[number].write_text(f"whole by {rank}")

        run.divide(files, make, "parts", "files", [1] * 5, lambda path: path.is_file() and "whole" in path.read_text())
        assert all(path.is_file() for path in files)
        heartbeat.end()
        dist.destroy_process_group()

    children = [in_child(partial(work, rank)) for rank in range(2)]
    assert [code_of(child) for child in children] == [0, 0]
    assert [path.read_text() for path in files] == ["whole", *(f"whole by {i % 2}" for i in range(1, 5))]


def test_a_file_that_never_comes_ends_the_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pretrain.run.processes.PATIENCE_HOURS", 0.0)
    with pytest.raises(UserError, match="another process has not written it"):
        run.divide([tmp_path / "x"], lambda *_: None, "parts", "files")
