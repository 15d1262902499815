"""Several processes: check of the world size, one writer, a common stop, connection between machines."""

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from configs import UserError
from ehr_features.files import write_json
from pretrain.run import check_world, processes
from tests.hardening import kills

# A run in small: 2 processes add up a number, step by step, and can be stopped and gone on with.
LOOP = """
import argparse, sys, time
import torch, torch.distributed as dist
from configs import Settings, cli
from configs.signals import Stopped
from pretrain import run

class Config(Settings):
    out: str
    seed: int = 0

def work(args):
    run.accelerator(args, cpu=True, limit=args.limit)
    folder = run.open_run(args.out, Config(out=args.out, seed=args.seed))
    if args.seen_by is None or args.seen_by == dist.get_rank():
        run.needs("source", None)
    if run.complete(folder):
        return 0
    log, state = run.Log(folder), run.load_checkpoint(folder) or {"step": 0, "total": 0}
    log.cut(state["step"])
    total = state["total"]
    with run.stopping() as stop:
        for step in range(state["step"] + 1, args.steps + 1):
            number = torch.tensor(step)
            dist.all_reduce(number)
            total += int(number)
            log.log({"total": total}, step)
            time.sleep(args.wait)
            if stop.agreed(step):
                run.save_checkpoint(folder, {"total": total}, step)
                raise Stopped(run.go_on(folder, step, stop.gone))
    run.finish(folder, total=total)

top, commands = cli.parser("loop", "")
train = commands.add_parser("train")
for flag in ("--processes", "--machines", "--seed", "--steps", "--seen-by"):
    train.add_argument(flag, type=int)
train.add_argument("--out")
train.add_argument("--wait", type=float, default=0.0)
train.add_argument("--limit", type=float, default=60.0)
train.set_defaults(run=work)
cli.main(top)
"""


class Runs:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "loop.py").write_text(LOOP)

    def start(self, *words: str, launch: str = "--processes 2", seed: int = 0) -> subprocess.Popen[str]:
        flags = [*words, "--seed", str(seed), "--out", "x"]
        command = [sys.executable, "-m", "configs.launch", *launch.split(), "--", "loop", "train", *flags]
        env = os.environ | {"PYTHONPATH": str(self.folder), "OMP_NUM_THREADS": "1"}
        pipe = subprocess.PIPE
        return subprocess.Popen(
            command, stdout=pipe, stderr=pipe, text=True, env=env, cwd=self.folder, start_new_session=True
        )

    def totals(self) -> list[int]:
        lines = (self.folder / "x/metrics.jsonl").read_text().splitlines()
        return [json.loads(line)["total"] for line in lines]

    def wait_for(self, lines: int) -> None:
        for _ in range(6000):
            if (self.folder / "x/metrics.jsonl").exists() and len(self.totals()) >= lines:
                return
            time.sleep(0.05)
        raise TimeoutError


@pytest.fixture
def runs(tmp_path: Path) -> Runs:
    return Runs(tmp_path)


def ended(child: subprocess.Popen[str], code: int) -> tuple[str, str]:
    out, err = child.communicate(timeout=400)
    assert child.returncode == code, err
    return out, err


@pytest.mark.slow
def test_sigterm_saves_leaves_with_75_and_the_same_command_goes_on(runs: Runs) -> None:
    first = runs.start("--processes", "2", "--steps", "400", "--wait", "0.02")
    runs.wait_for(3)
    first.send_signal(signal.SIGTERM)
    _, err = ended(first, 75)
    assert "saved; go on with" in err and "--steps 400" in err and "Traceback" not in err
    reached = len(runs.totals())
    assert 3 <= reached < 400
    with (runs.folder / "x/metrics.jsonl").open("a") as file:
        file.write('{"step": 9999, "total": 0}\n')  # as if it had gone on without saving
    ended(runs.start("--processes", "2", "--steps", "400"), 0)
    assert runs.totals() == [step * (step + 1) for step in range(1, 401)]
    out, _ = ended(runs.start("--processes", "2", "--steps", "400"), 0)
    assert out.count("complete since") == 1
    _, err = ended(runs.start("--processes", "2", "--steps", "400", seed=1), 2)
    assert err.count("seed: 0 there, 1 now") == 1 and "Traceback" not in err  # one process speaks for both


@pytest.mark.slow
@pytest.mark.parametrize("seen", [[], ["--seen-by", "1"]], ids=["all see it", "process 1 alone sees it"])
def test_a_source_moved_under_a_run_ends_it_with_a_sentence_and_put_back_it_goes_on(
    runs: Runs, seen: list[str]
) -> None:
    write_json(runs.folder / "source/provenance.json", {})
    first = runs.start("--processes", "2", "--steps", "900", "--wait", "0.02", *seen)
    runs.wait_for(3)
    (runs.folder / "source").rename(runs.folder / "elsewhere")
    _, err = ended(first, 75)
    assert (
        f"{runs.folder}/source/provenance.json: it is no longer there, moved or deleted under the run; put it back"
        in err
    )
    assert err.count("saved; go on with") == 1 and "Traceback" not in err
    assert len(runs.totals()) < 900
    (runs.folder / "elsewhere").rename(runs.folder / "source")
    ended(runs.start("--processes", "2", "--steps", "900"), 0)
    assert runs.totals() == [step * (step + 1) for step in range(1, 901)]


@pytest.mark.slow
def test_ctrl_c_ends_all_processes_with_130(runs: Runs) -> None:
    child = runs.start("--processes", "2", "--steps", "4000", "--wait", "0.02")
    runs.wait_for(2)
    os.killpg(child.pid, signal.SIGINT)  # a terminal sends it to the whole group
    _, err = ended(child, 130)
    assert "Traceback" not in err and err.count("interrupted") == 1


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_stops_answering_is_named_and_the_same_command_goes_on(runs: Runs, rank: int) -> None:
    words = ["--processes", "2", "--steps", "300", "--limit", "2"]
    first = runs.start(*words, "--wait", "0.02")
    runs.wait_for(60)  # more than a second: it has told its step
    os.kill(kills.ranks([first])[rank], signal.SIGSTOP)
    _, err = ended(first, 75)
    assert f"process {rank} on {socket.gethostname()} has not answered for" in err and "(last at step" in err
    assert err.count("the same command goes on from the last checkpoint") == 1 and "Traceback" not in err
    assert not kills.left(first.pid)
    ended(runs.start(*words), 0)
    assert runs.totals() == [step * (step + 1) for step in range(1, 301)]


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_process_ends_the_run_on_both_machines_in_a_line(runs: Runs, rank: int) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    words = ["--processes", "1", "--machines", "2", "--steps", "300"]
    flags = [f"--processes 1 --machines 2 --machine-rank {i} --main-address {address}" for i in (0, 1)]
    machines = [runs.start(*words, "--wait", "0.02", launch=each) for each in flags]
    runs.wait_for(3)
    os.kill(kills.ranks(machines)[rank], signal.SIGKILL)
    said = [ended(machine, 1)[1] for machine in machines]
    assert "Traceback" not in "".join(said) and f"process {rank} was ended by SIGKILL" in said[rank]
    assert f"process {1 - rank} has lost another process" in said[1 - rank]
    assert not [pid for machine in machines for pid in kills.left(machine.pid)]
    for machine in [runs.start(*words, launch=each) for each in flags]:
        ended(machine, 0)
    assert runs.totals() == [step * (step + 1) for step in range(1, 301)]


@pytest.mark.slow
def test_a_hang_up_saves_and_leaves_with_75(runs: Runs) -> None:
    child = runs.start("--processes", "2", "--steps", "400", "--wait", "0.02")
    runs.wait_for(3)
    os.killpg(child.pid, signal.SIGHUP)
    _, err = ended(child, 75)
    assert "saved; go on with" in err and "Traceback" not in err and err.count("go on with") == 1
    ended(runs.start("--processes", "2", "--steps", "400"), 0)
    assert runs.totals() == [step * (step + 1) for step in range(1, 401)]


@pytest.mark.slow
def test_another_world_size_than_asked_for_is_refused(runs: Runs) -> None:
    _, err = ended(runs.start("--processes", "3", "--steps", "2"), 2)
    assert "asked for 3 processes" in err and "found 2" in err and "Traceback" not in err
    assert not (runs.folder / "x").exists()


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["configs.launch", "torchrun"])
def test_two_machines_on_loopback_are_one_run(runs: Runs, launcher: str) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ["--processes", "1", "--machines", "2", "--steps", "3"]
    machines = []
    for rank in (0, 1):
        if launcher == "torchrun":
            torchrun = f"--nnodes 2 --nproc_per_node 1 --node_rank {rank} --master_addr 127.0.0.1 --master_port {port}"
            command = [sys.executable, "-m", "torch.distributed.run", *torchrun.split(), "loop.py", "train", *words]
            env = os.environ | {"OMP_NUM_THREADS": "1"}
            machines.append(
                subprocess.Popen([*command, "--seed", "0", "--out", "x"], env=env, cwd=runs.folder, text=True)
            )
        else:
            launch = f"--processes 1 --machines 2 --machine-rank {rank} --main-address 127.0.0.1:{port}"
            machines.append(runs.start(*words, launch=launch))
    for machine in machines:
        ended(machine, 0)
    assert runs.totals() == [2, 6, 12]


def env(monkeypatch: pytest.MonkeyPatch, **variables: object) -> None:
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "RANK", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)


def flags(processes: int | None = None, machines: int | None = None) -> argparse.Namespace:
    return argparse.Namespace(processes=processes, machines=machines)


@pytest.mark.parametrize(
    ("found", "asked"),
    [
        ({}, flags()),
        ({}, flags(1, 1)),
        ({"WORLD_SIZE": 4, "LOCAL_WORLD_SIZE": 2}, flags()),
        ({"WORLD_SIZE": 4, "LOCAL_WORLD_SIZE": 2}, flags(2)),
        ({"WORLD_SIZE": 4, "LOCAL_WORLD_SIZE": 2}, flags(2, 2)),
        ({"WORLD_SIZE": 4, "LOCAL_WORLD_SIZE": 2}, flags(None, 2)),
        ({"WORLD_SIZE": 4}, flags(2, 2)),
        ({"SLURM_STEP_NUM_TASKS": 4}, flags(1)),
    ],
)
def test_the_right_number_of_processes_passes(
    found: dict[str, Any], asked: argparse.Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    env(monkeypatch, **found)
    assert check_world(asked) == found.get("WORLD_SIZE", 1)


@pytest.mark.parametrize(
    ("found", "asked", "says"),
    [
        ({}, flags(2), r"asked for 2 processes \(--processes 2;.*found 1"),
        ({"WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}, flags(2, 2), "asked for 4 processes.*found 2"),
        ({"WORLD_SIZE": 4, "LOCAL_WORLD_SIZE": 2}, flags(4), "asked for 8 processes.*found 4"),
        ({"WORLD_SIZE": 4, "LOCAL_WORLD_SIZE": 2}, flags(None, 1), "asked for 2 processes.*found 4"),
        ({"SLURM_STEP_NUM_TASKS": 8}, flags(), "SLURM started 8 tasks.*--ntasks-per-node=1"),
        ({}, flags(0), "--processes 0: wanted at least 1"),
    ],
)
def test_the_wrong_number_of_processes_is_refused(
    found: dict[str, Any], asked: argparse.Namespace, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    env(monkeypatch, **found)
    with pytest.raises(UserError, match=says):
        check_world(asked)


@pytest.mark.parametrize("variable", ["ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_MIXED_PRECISION"])
def test_what_accelerate_offers_and_we_do_not_use_is_refused(monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    monkeypatch.setenv(variable, "fp8" if variable.endswith("PRECISION") else "true")
    with pytest.raises(UserError, match=r"accelerate: (FSDP shards|DeepSpeed replaces|fp8 scales)"):
        processes.accelerator()


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    env(monkeypatch, WORLD_SIZE=4, LOCAL_WORLD_SIZE=4)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    with pytest.raises(UserError, match="4 processes on a machine with 2 GPUs"):
        check_world(flags(4))


def test_an_accelerate_config_that_starts_fewer_processes_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """accelerate silently starts one process if its config says MULTI_CPU."""
    env(monkeypatch)
    path = tmp_path / "acc.yaml"
    asked = argparse.Namespace(accelerate_config=str(path))
    path.write_text("distributed_type: MULTI_CPU\nnum_processes: 2\n")
    with pytest.raises(UserError, match="num_processes 2, found 1"):
        check_world(asked)
    path.write_text("num_processes: 1\n")
    assert check_world(asked) == 1
    path.write_text("- no config")
    with pytest.raises(UserError, match="no accelerate config"):
        check_world(asked)


@pytest.mark.parametrize("where", [("127.0.0.1", "1"), ("no.such.host.invalid", "29500"), ("127.0.0.1", "port")])
def test_a_main_process_that_does_not_answer_is_named(where: tuple[str, str]) -> None:
    with pytest.raises(UserError, match=f"process 0 does not answer at {where[0]}:{where[1]}"):
        processes._reach(*where, patience=0.3)


@pytest.mark.parametrize(("code", "requeued"), [(0, False), (2, False), (75, True)])
def test_the_sbatch_file_queues_itself_again_after_75_only(tmp_path: Path, code: int, requeued: bool) -> None:
    for name, does in (("srun", f"echo srun $*; exit {code}"), ("scontrol", "echo scontrol $*")):
        (tmp_path / name).write_text(f"#!/bin/sh\n{does}\n")
        (tmp_path / name).chmod(0o755)
    sbatch = Path(__file__).resolve().parents[2] / "docs/slurm.sbatch"
    path = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "12"}
    done = subprocess.run(
        ["bash", str(sbatch), "a.yaml", "seed=1"], capture_output=True, text=True, env=os.environ | path
    )
    assert done.returncode == code and "./launch.sh pretrain a.yaml seed=1" in done.stdout
    assert ("scontrol requeue 12" in done.stdout) == requeued
