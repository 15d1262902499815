"""Every command against Ctrl-C, SIGTERM, a second command, full and read-only disks, code in files, and told values.

Commands get the words that a user types, and run in a process of their own; it is forked from one that has imported
the libraries, which saves seconds each. kills.py does the same at random moments, from the first line on.
"""

import contextlib
import json
import multiprocessing
import os
import pickle
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from ehr_features import progress
from tests.hardening import kills

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "demo"
LIBRARIES = [
    "finetune.__main__",
    "finetune.probe.main",
    "finetune.fusion.train",
    "finetune.report.page",
    "finetune.embed",
    "pretrain.store.write",
]
LIBRARIES += [
    "pretrain.train",
    "pretrain.text.knowledge",
    "ehr_features.build",
    "ehr_features.notes.write",
    "ehr_features.audit.claims",
]
LIBRARIES += ["ehr_features.demo.generate", "ehr_features.check", "sentence_transformers"]
COMMAND = """
import multiprocessing, os, runpy, sys, warnings
warnings.filterwarnings("ignore", message=".*found in sys.modules")  # by runpy: loaded before, for speed
multiprocessing.set_start_method(None, force=True)
os.setsid()
os.chdir(folder)
file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
os.dup2(file, 1), os.dup2(file, 2)
sys.argv = words
runpy.run_module(words[0], run_name="__main__", alter_sys=True)
"""


@dataclass
class Command:
    """What to type, what it writes, and a file that tells that its work has begun (None: what it prints tells)."""

    words: list[str]
    out: Path
    begun: Path | None = None
    resumes: bool = True

    def working(self, log: Path) -> bool:
        return self.begun.exists() if self.begun else log.exists() and log.stat().st_size > 0


def commands(world: Path, own: Path) -> dict[str, Command]:
    """Every command, on what lies in `world`; it writes below `own`."""
    data, features, store, encoder = world / "data", world / "features", world / "store", world / "runs/pretrain"
    tables = [f"mimic_iv={data}/mimic-iv", f"mimic_cxr={data}/mimic-cxr", f"mimic_ed={data}/mimic-iv-ed"]
    inputs = [f"features={features}", f"store={store}"]
    small = ["optim.batch_size=16", "log_every=1", "save_every_minutes=0.01", f"out={own}/run"]

    def config(name: str) -> str:
        return str(CONFIGS / f"{name}.yaml")

    build, run = [config("features"), *tables, f"out={own}/features"], own / "run"
    pretrain = ["pretrain", "train", config("pretrain_vit_tiny"), *inputs, *small, "optim.steps=4000"]
    fuse = ["finetune", "fuse", config("fuse_mortality"), *inputs, f"encoder={encoder}", f"out={run}", "samples=20"]
    evaluated = [str(world / "runs" / name) for name in ("pretrain", "probe", "fuse")]
    knowledge = ["pretrain", "knowledge", str(own / "notes"), str(own / "texts"), "--text-encoder", str(own / "tiny")]
    return {
        "demo data": Command(["ehr_features", "demo", f"{own}/data", "--subjects", "400"], own / "data"),
        "features": Command(["ehr_features", "build", *build], own / "features", own / "features.cache"),
        "check": Command(["ehr_features", "check", *build], own / "none", resumes=False),
        "audit": Command(["ehr_features", "audit", str(features), str(encoder)], own / "none", resumes=False),
        "notes": Command(
            ["ehr_features", "notes", config("notes"), *inputs[:1], tables[0], tables[2], f"out={own}/notes"],
            own / "notes",
        ),
        "images": Command(
            ["pretrain", "images", config("images"), tables[1], f"out={own}/store", "workers=2", "size=512"],
            own / "store",
            own / "store/packing.json",
        ),
        "pretrain": Command(pretrain, run, run / "metrics.jsonl"),
        "pretrain by two": Command(
            ["configs.launch", "--processes", "2", "--", *pretrain, "--processes", "2"], run, run / "metrics.jsonl"
        ),
        "probe": Command(
            ["finetune", "probe", config("probe_linear"), *inputs, f"encoder={encoder}", f"out={run}", "samples=5000"],
            run,
            run / "log.txt",
        ),
        "fuse": Command([*fuse, "epochs=4000", "patience=4000", "workers=2"], run, run / "metrics.jsonl"),
        "embed": Command(
            ["finetune", "embed", str(encoder), f"{data}/mimic-cxr/files", f"{own}/films.parquet"],
            own / "films.parquet",
        ),
        "report": Command(["finetune", "report", *evaluated, "--out", f"{own}/report.html"], own / "report.html"),
        "grid": Command(["finetune", "grid", f"{own}/grid.yaml"], own / "grid", own / "grid/a/fuse/metrics.jsonl"),
        "demo": Command(
            ["finetune", "demo", f"{own}/demo", "--subjects", "400"], own / "demo", own / "demo/logs/data.txt"
        ),
        "knowledge": Command(knowledge, own / "notes"),
    }


NAMES = list(commands(Path(), Path()))
Start = Callable[[Command], ForkServerProcess]


@pytest.fixture(scope="module")
def server() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(LIBRARIES)
    return context


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, server: ForkServerContext) -> Path:
    """A small hospital, its features, notes and store, a pretrained encoder and two evaluations."""
    world = tmp_path_factory.mktemp("world")
    for name, command in kills.commands(world).items():
        if name not in ("embed", "report", "grid"):
            process = begin(server, command.words, world, world / "log.txt")
            process.join()
            assert process.exitcode == 0, (world / "log.txt").read_text()
    return world


def begin(server: ForkServerContext, words: list[str], folder: Path, log: Path) -> ForkServerProcess:
    process = server.Process(target=exec, args=(COMMAND, {"words": list(words), "folder": folder, "log": log}))
    process.start()
    return process


@dataclass
class Room:
    """Commands that write below `own`, one after another or at once."""

    server: ForkServerContext
    world: Path
    own: Path
    logs: Path

    def command(self, name: str) -> Command:
        if name == "knowledge":
            shutil.copytree(self.world / "notes", self.own / "notes")
            (self.own / "texts").mkdir()
            (self.own / "texts/one.txt").write_text("a woman with fever and cough")
        if name == "grid":
            fuse = commands(self.world, self.own)["fuse"].words[1:-1]
            kills.write_json(
                self.own / "grid.yaml",
                {
                    "out": str(self.own / "grid"),
                    "steps": {"fuse": fuse},
                    "axes": {"x": {"a": {}, "b": {"fuse": ["seed=1"]}}},
                },
            )
        return commands(self.world, self.own)[name]

    def start(self, command: Command) -> tuple[ForkServerProcess, Path]:
        log = self.logs / f"{len(list(self.logs.iterdir()))}.txt"
        return begin(self.server, command.words, self.logs, log), log

    def end(self, process: ForkServerProcess, log: Path) -> tuple[int, str]:
        """The exit code, and what was printed; no process of it may be left."""
        process.join(500)  # a grid is six commands
        assert process.exitcode is not None and process.pid is not None, "it does not end"
        assert not kills.left(process.pid), log.read_text()
        return process.exitcode, log.read_text() if log.exists() else ""

    def run(self, command: Command) -> tuple[int, str]:
        return self.end(*self.start(command))


@pytest.fixture
def room(
    server: ForkServerContext, world: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> Iterator[Callable[..., Room]]:
    made: list[Room] = []

    def make(own: Path, name: str = "") -> Room:
        own.mkdir(exist_ok=True)
        if name == "knowledge":
            shutil.copytree(request.getfixturevalue("make_text_model")(), own / "tiny")
        (tmp_path / "logs").mkdir(exist_ok=True)
        made.append(Room(server, world, own, tmp_path / "logs"))
        return made[-1]

    yield make


def wait_for(ready: Callable[[], bool], process: ForkServerProcess, log: Path) -> None:
    deadline = time.monotonic() + 120
    while not ready():
        assert process.is_alive() and time.monotonic() < deadline, log.read_text()
        time.sleep(0.01)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 75)], ids=["SIGINT", "SIGTERM"])
@pytest.mark.parametrize("name", NAMES)
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


WRITES = [name for name in NAMES if name not in ("check", "audit", "pretrain by two", "demo")]
SHORT = {
    "pretrain": ["optim.steps=2"],
    "fuse": ["epochs=1", "patience=1"],
    "probe": ["samples=20"],
    "images": ["size=64"],
}


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("may not mount a small tmpfs here")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def short(here: Room, name: str) -> Command:
    """The command with as little to do as there is."""
    command = here.command(name)
    return Command([*command.words, *SHORT.get(name, [])], command.out)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "free"), [(name, (4_096, 150_000)[i % 2]) for i, name in enumerate(WRITES)])
def test_a_full_disk_is_named_and_the_same_command_goes_on_when_there_is_space(
    room: Callable[..., Room], disk: Path, name: str, free: int
) -> None:
    here = room(disk, name)
    command = short(here, name)
    ballast = disk / "ballast"
    left = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
    ballast.write_bytes(bytes(left - free))
    code, text = here.run(command)
    if code == 0:
        assert free > 4_096, "it wrote nothing"  # what it writes is smaller
        return
    lines = 2 if name == "grid" else 1  # each of its runs says so
    assert code == 2 and "Traceback" not in text and text.count("error:") == lines, text
    assert str(disk) in text.split("error:")[1], text
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


# ---- files that somebody may have sent ------------------------------------------------------------------------------
class Bomb:
    """Pickled, it makes a file where it is unpickled by a reader that runs what it reads."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return os.mkdir, (str(self.mark),)


def plant(path: Path, mark: Path) -> None:
    """Write a file with code in it, in the form that its name promises."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix in (".pth", ".pt", ".bin"):
        torch.save({"state_dict": {"a": Bomb(mark)}}, path)
    elif path.suffix == ".npy":
        np.save(path, np.array([[Bomb(mark)], [0]], object), allow_pickle=True)
    elif path.suffix == ".parquet" and path.name == "extension.parquet":  # as pyarrow before 14.0.1 unpickled it
        about = {
            "ARROW:extension:name": "arrow.py_extension_type",
            "ARROW:extension:metadata": pickle.dumps(Bomb(mark)),
        }
        field = pa.field("a", pa.int64(), metadata=about)
        pq.write_table(pa.table([pa.array([0, 1])], schema=pa.schema([field])), path)
    elif path.suffix == ".yaml":
        path.write_text(f"out: !!python/object/apply:os.mkdir ['{mark}']\n")
    else:
        path.write_bytes(pickle.dumps(Bomb(mark)))


TAKES: dict[str, tuple[str, str]] = {  # what is planted -> the command that reads it; {} is its path
    "init.pth": ("pretrain", "encoder.init={}"),
    "init.pt": ("pretrain", "encoder.init={}"),
    "init.safetensors": ("pretrain", "encoder.init={}"),
    "run/checkpoints/step_000000009.pt": ("pretrain", ""),
    "weights.pth": ("probe", "encoder={} weights.arch=vit_tiny_patch16_224 weights.image_size=32"),
    "encoder/encoder.safetensors": ("probe", "encoder={parent}"),
    "stage/model.safetensors": ("fuse", "film_weights={parent}"),
    "features/series.safetensors": ("fuse", "features={parent}"),
    "labels.npy": ("score", "{} {}"),
    "labels.parquet": ("score", "{} {}"),
    "extension.parquet": ("score", "{} {}"),
    "labels.pkl": ("score", "{} {}"),
    "labels.csv": ("score", "{} {}"),
    "embeddings.parquet": ("nearest", "{} film"),
    "features.yaml": ("check", "{}"),
    "tiny/pytorch_model.bin": ("knowledge", ""),
    "run2/predictions/test.parquet": ("compare", "{run} --with {run}"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", TAKES)
def test_code_in_a_file_is_refused_and_not_run(room: Callable[..., Room], tmp_path: Path, name: str) -> None:
    reader, words = TAKES[name]
    here = room(tmp_path / "own", reader)
    path, mark = here.own / name, tmp_path / "it_ran"
    if name.startswith("encoder/"):
        shutil.copytree(here.world / "runs/pretrain/encoder", path.parent)
    elif name.startswith("run2/"):
        shutil.copytree(here.world / "runs/probe", here.own / "run2")
    elif name.startswith("tiny/"):
        (here.own / "tiny/model.safetensors").unlink()
    elif name.startswith("stage/"):
        shutil.copytree(here.world / "runs/fuse", path.parent)
    elif name.startswith("features/"):
        shutil.copytree(here.world / "features", path.parent)
    given = words.replace("{parent}", str(path.parent)).replace("{run}", f"{here.own}/run2").replace("{}", str(path))
    if reader in ("score", "nearest", "compare", "check"):
        module = "ehr_features" if reader == "check" else "finetune"
        command = Command([module, reader, *given.split()], here.own)
    else:
        command = here.command(reader)
        command.words.extend(given.split())
    if name.startswith("run/"):  # a run of the same config that has begun
        process, log = here.start(command)
        wait_for(lambda: command.working(log), process, log)
        os.killpg(process.pid, signal.SIGKILL)
        here.end(process, log)
        shutil.rmtree(path.parent)
    plant(path, mark)
    code, text = here.run(command)
    wanted = 0 if name == "extension.parquet" else 2  # read as the numbers that it also is
    assert code == wanted and "Traceback" not in text and not mark.exists(), text


# ---- what is printed and passed on ----------------------------------------------------------------------------------
MARK, ODD = "Qx7Marker", "7654321"  # no such word, and no such number, is anywhere else
NEVER = {"dicom_id", "split", "path", "itemid", "language"}


def with_markers(data: Path) -> int:
    """Plant a word in each raw column that holds words, and odd numbers in those that hold numbers."""
    planted = 0
    for path in data.glob("*/**/*.csv.gz"):
        table = pd.read_csv(path, dtype=str, keep_default_na=False)
        if len(table) < 10 or path.name.startswith("d_") or "chexpert" in path.name:
            continue
        for i, column in enumerate(c for c in table if not c.endswith("_id") and c not in NEVER):
            if table[column].str.match(r"\d{4}-").any():
                continue  # a damaged time is refused by some tables
            numbers = pd.to_numeric(table[column].replace("", "0"), errors="coerce").notna().all()
            table.loc[table.index[(3 * i + 1) % len(table)], column] = ODD if numbers else f"{MARK}{column}"
            planted += 1
        table.to_csv(path, index=False)
    return planted


@pytest.mark.slow
def test_no_value_of_a_patient_is_printed_or_passed_on(room: Callable[..., Room], tmp_path: Path) -> None:
    here = room(tmp_path / "own")
    data = here.own / "data"
    shutil.copytree(here.world / "data", data)
    assert with_markers(data) > 60
    known = commands(here.world, here.own)
    texts = []
    for name in ("check", "features", "notes", "images"):
        words = [w.replace(f"{here.world}/data", str(data)) for w in known[name].words]
        words = [w.replace(f"{here.world}/features", f"{here.own}/features") for w in words]
        code, text = here.run(Command([*words, *SHORT.get(name, [])], known[name].out))
        texts.append(text)
        assert code == 0, text
    inputs = [f"features={here.own}/features", f"store={here.own}/store", f"notes={here.own}/notes"]
    for name, run in (("pretrain", "runs/a"), ("probe", "runs/b"), ("fuse", "runs/c")):
        words = [w for w in known[name].words if not w.startswith(("features=", "store=", "encoder=", "out="))]
        more = ["allow_leak=true", "encoder=random:" + str(here.world / "runs/pretrain")] if name != "pretrain" else []
        command = Command([*words, *inputs[:2], *more, *SHORT[name], f"out={here.own}/{run}"], here.own / run)
        code, text = here.run(command)
        texts.append(text)
        assert code == 0, text
    for words in (
        ["ehr_features", "audit", "features", "runs/a", "notes"],
        ["finetune", "report", "runs/a", "runs/b", "runs/c", "--out", "report.html"],
        ["finetune", "runs", "runs"],
    ):
        absolute = [str(here.own / w) if (here.own / w).exists() or w.endswith(".html") else w for w in words]
        code, text = here.run(Command(absolute, here.own))
        texts.append(text)
        assert "Traceback" not in text and code in (0, 2), text
    found = [text for text in texts if MARK in text or ODD in text]
    assert not found, found
    for path in here.own.rglob("*"):
        if path.suffix in (".json", ".jsonl", ".html", ".txt", ".md", ".yaml"):
            lines = path.read_text(errors="replace").splitlines()
            assert not [line[:300] for line in lines if MARK in line or ODD in line], path


# ---- the clock ------------------------------------------------------------------------------------------------------
def put_ahead(folder: Path) -> None:
    """All that is there was written in ten years: the clock was put back since."""
    ahead = time.time() + 10 * 365 * 86_400
    for path in [folder, *folder.rglob("*")]:
        os.utime(path, (ahead, ahead))


@pytest.mark.slow
def test_a_run_goes_on_where_its_files_are_of_the_future(room: Callable[..., Room], tmp_path: Path) -> None:
    here = room(tmp_path / "own")
    command = here.command("pretrain")

    def steps() -> list[int]:
        lines = (command.out / "metrics.jsonl").read_text().splitlines(keepends=True)
        return [json.loads(line)["step"] for line in lines if line.endswith("\n")]

    first, log = here.start(command)
    wait_for(lambda: command.working(log) and len(steps()) > 5, first, log)
    os.kill(first.pid, signal.SIGTERM)
    assert here.end(first, log)[0] == 75
    before = steps()
    put_ahead(command.out)
    second, log = here.start(command)
    wait_for(lambda: len(steps()) > len(before) + 5, second, log)
    os.kill(second.pid, signal.SIGTERM)
    assert here.end(second, log)[0] == 75
    assert steps() == list(range(1, steps()[-1] + 1)) and steps()[: len(before)] == before
    newest = max((command.out / "checkpoints").glob("step_*.pt"))
    assert int(newest.stem.removeprefix("step_")) == steps()[-1]


@pytest.mark.slow
def test_a_table_that_became_older_is_read_again(room: Callable[..., Room], tmp_path: Path) -> None:
    here = room(tmp_path / "own")
    shutil.copytree(here.world / "data", here.own / "data")
    command = here.command("features")
    command.words[:] = [word.replace(f"{here.world}/data", f"{here.own}/data") for word in command.words]
    put_ahead(here.own / "data")
    assert here.run(command)[0] == 0
    assert "up to date" in here.run(command)[1]
    table = next((here.own / "data").rglob("labevents.csv.gz"))
    os.utime(table, (1e9, 1e9))
    code, text = here.run(command)
    assert code == 0 and "up to date" not in text, text


def test_no_time_left_is_below_zero_when_the_clock_is_put_back(monkeypatch, capsys) -> None:
    clock = iter(range(10**6, 0, -1000))
    monkeypatch.setattr(time, "time", lambda: float(next(clock)))
    monkeypatch.setattr(progress, "QUIET_SECONDS", 0.0)
    with progress.Bar("packing", 100, "films") as bar:
        for _ in range(99):
            bar.advance()
    said = re.findall(r"([-\d.]+)/s, ([-\d]+) s left", capsys.readouterr().err)
    assert len(said) > 90 and all(float(rate) >= 0 and int(left) >= 0 for rate, left in said)
