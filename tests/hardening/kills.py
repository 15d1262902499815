"""Kill each command at random moments: nothing is lost, nothing looks complete that is not, the same command goes on.

    python -m tests.hardening.kills OUT [--signal KILL] [--kills 50] [--seed 0] [--commands features images ...]

Input: an empty folder. Output: a Markdown table (command, kills, seconds undisturbed, what was found).
Every command works on a small synthetic hospital. It is run once undisturbed; then started, killed after a random part
of that time (by turns with all its processes, and alone; of several processes by turns all, the launcher and each), and
looked at: whatever carries a final name must open whole, and no process is left. After at most `CHAIN` kills in one
folder the command is left to finish, and its result must be that of the undisturbed run. SIGTERM and SIGINT must also
end it with their exit codes, and without a traceback.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors import safe_open

from configs.signals import INTERRUPTED, STOPPED
from ehr_features.files import PARTIAL, write_json
from tests import forked

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "configs" / "demo"
CHAIN = 5
CODES = {signal.SIGKILL: -signal.SIGKILL, signal.SIGTERM: STOPPED, signal.SIGINT: INTERRUPTED}
SHORT = ["optim.steps=12", "optim.batch_size=16", "save_every_minutes=0.005", "log_every=1"]


@dataclass
class Command:
    """A command, where it writes, and which files are its result."""

    name: str
    words: list[str]
    out: Path
    result: tuple[str, ...]  # globs below `out`; empty: `out` itself
    beside: tuple[Path, ...] = ()  # caches that go with `out`
    seconds: float = field(default=0.0)  # of the undisturbed run
    processes: int = 1  # on each machine
    machines: int = 1  # launchers, on this one

    @property
    def world(self) -> int:
        return self.processes * self.machines


def commands(world: Path) -> dict[str, Command]:
    """Every command that writes, on the same small hospital."""
    data, features, store, run = world / "data", world / "features", world / "store", world / "runs" / "pretrain"
    tables = [f"mimic_iv={data}/mimic-iv", f"mimic_cxr={data}/mimic-cxr", f"mimic_ed={data}/mimic-iv-ed"]
    inputs = [f"features={features}", f"store={store}"]
    quick = [f"encoder={run}", "epochs=2", "samples=20"]

    def config(name: str) -> str:
        return str(CONFIGS / f"{name}.yaml")

    probe, fuse, grid, notes = world / "runs" / "probe", world / "runs" / "fuse", world / "grid", world / "notes"
    steps = {
        "pretrain": ["pretrain", config("pretrain_vit_tiny"), *inputs, *SHORT, "optim.steps=4"],
        "probe": ["probe", config("probe_linear"), *inputs, "encoder={pretrain}", "epochs=1", "samples=20"],
    }
    axes = {"record": {"sex": {"pretrain": ["ehr.groups=[sex]"]}}}  # two steps: the second needs the first to be whole
    if world.is_dir():
        write_json(world / "grid.yaml", {"out": str(grid), "steps": steps, "axes": axes})  # YAML holds JSON
    made = [
        Command("demo data", ["ehr_features", "demo", str(data), "--subjects", "80", "--seed", "3"], data, ("**/*.*",)),
        Command(
            "features",
            ["ehr_features", "build", config("features"), *tables, f"out={features}"],
            features,
            ("**/*.parquet", "series.safetensors"),
            (world / "features.cache",),
        ),
        Command(
            "notes",
            ["ehr_features", "notes", config("notes"), f"features={features}", tables[0], tables[2], f"out={notes}"],
            notes,
            ("*.parquet",),
        ),
        Command(
            "images",
            ["pretrain", "images", config("images"), tables[1], f"out={store}", "workers=2"],
            store,
            ("index.parquet", "shard-*.arrow"),
        ),
        Command(
            "pretrain",
            ["pretrain", "train", config("pretrain_vit_tiny"), *inputs, f"out={run}", *SHORT],
            run,
            ("encoder/encoder.safetensors",),
        ),
        Command(
            "probe",
            ["finetune", "probe", config("probe_linear"), *inputs, *quick, f"out={probe}"],
            probe,
            ("results.json", "predictions/*.parquet"),
            (world / "runs" / "cache",),
        ),
        Command(
            "fuse",
            ["finetune", "fuse", config("fuse_mortality"), *inputs, *quick, f"out={fuse}", "hidden=8", "joint=8"],
            fuse,
            ("results.json", "predictions/*.parquet"),
            (world / "runs" / "cache",),
        ),
        Command(
            "embed",
            ["finetune", "embed", str(run), str(data / "mimic-cxr" / "files"), str(world / "films.parquet")],
            world / "films.parquet",
            (),
        ),
        Command(
            "report",
            ["finetune", "report", str(run), str(probe), str(fuse), "--out", str(world / "report.html")],
            world / "report.html",
            (),
        ),
        Command(
            "grid",
            ["finetune", "grid", str(world / "grid.yaml")],
            grid,
            ("**/encoder.safetensors", "**/results.json"),
            (world / "runs" / "cache",),
        ),
    ]
    return {command.name: command for command in made}


def several(known: dict[str, Command]) -> dict[str, Command]:
    """Commands by two processes, and by two machines that are both this one."""
    made = [
        replace(
            known[name],
            name=f"{name}, {says}",
            words=[*known[name].words, "process_timeout=30", *["checkpoint_every=1"] * (name == "fuse")],
            seconds=0.0,
            processes=processes,
            machines=machines,
        )
        for name in ("pretrain", "fuse")
        for says, processes, machines in (("2 processes", 2, 1), ("2 machines", 1, 2))
    ]
    return {command.name: command for command in made}


def start(command: Command, log: Path) -> list[forked.Popen]:
    """One process; or the launcher of each machine."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    if command.world == 1:
        return [forked.Popen(command.words, log.parent, log, env)]
    flags, port = ["--processes", str(command.processes), "--machines", str(command.machines)], free_port()
    if command.machines == 1:
        return [forked.Popen(["configs.launch", *flags, "--", *command.words, *flags], log.parent, log, env)]
    flags += ["--main-address", f"127.0.0.1:{port}"]
    ranked = [[*flags, "--machine-rank", str(rank)] for rank in range(command.machines)]
    words = [["configs.launch", *own, "--", *command.words, *own] for own in ranked]
    return [forked.Popen(own, log.parent, log, env) for own in words]


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def finish(command: Command, log: Path) -> None:
    """Run to the end. Raises: RuntimeError: it failed."""
    began = time.monotonic()
    code = max(process.wait() for process in start(command, log))
    command.seconds = command.seconds or time.monotonic() - began
    if code:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-5:])
        raise RuntimeError(f"{command.name}: exit code {code} when it was run again; {log} ends:\n{tail}")


def remove(command: Command) -> None:
    for path in (command.out, *command.beside):
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def result(command: Command) -> dict[str, Any]:
    """The content of the result, without times and versions."""
    if not command.result:
        return {"": content(command.out)} if command.out.exists() else {}
    paths = {path for pattern in command.result for path in command.out.glob(pattern) if path.is_file()}
    return {path.relative_to(command.out).as_posix(): content(path) for path in sorted(paths)}


def content(path: Path) -> Any:
    """A file's content for comparison: tables as tables, results as rows, everything else as bytes."""
    if path.suffix == ".parquet":
        return pd.read_parquet(path)
    if path.name == "results.json":
        return json.loads(path.read_text())["rows"]
    if path.suffix == ".html":
        return path.read_text(encoding="utf-8").rstrip().endswith("</html>")  # it names the moment it was drawn
    return path.read_bytes()


def differences(found: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    names = sorted(set(found) ^ set(wanted))
    out = [f"{name}: {'not in' if name in found else 'missing beside'} the undisturbed result" for name in names]
    for name in sorted(set(found) & set(wanted)):
        a, b = found[name], wanted[name]
        if not (a.equals(b) if isinstance(a, pd.DataFrame) else a == b):
            out.append(f"{name}: differs from the undisturbed result")
    return out


def damaged(command: Command) -> list[str]:
    """Files under their final name that cannot be read completely."""
    faults = []
    paths = [command.out] if command.out.is_file() else sorted(command.out.rglob("*"))
    for path in paths:
        hidden = any(part.startswith(".") for part in path.relative_to(command.out.parent).parts)
        if not path.is_file() or hidden or PARTIAL in path.name:
            continue
        try:
            _open(path)
        except Exception as error:  # whatever a reader raises, the file is not whole
            faults.append(f"{path.name}: {type(error).__name__}: {error}")
    return faults


def _open(path: Path) -> None:
    if path.suffix == ".parquet":
        pq.read_table(path)
    elif path.suffix == ".json":
        json.loads(path.read_text(encoding="utf-8"))
    elif path.suffix == ".safetensors":
        with safe_open(path, framework="np") as file:
            for key in file.keys():  # noqa: SIM118  (not a dict)
                file.get_tensor(key)
    elif path.suffix == ".arrow":
        with pa.memory_map(str(path)) as source:
            pa.ipc.open_file(source).read_all()
    elif path.suffix == ".pt":
        torch.load(path, weights_only=True)
    elif path.suffix == ".html" and not content(path):
        raise ValueError("cut short")


def catches(pid: int) -> bool:
    """Whether a process has a handler for SIGTERM."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError, StopIteration):
        status = Path(f"/proc/{pid}/status").read_text().splitlines()
        caught = next(line.split()[1] for line in status if line.startswith("SigCgt:"))
        return bool(int(caught, 16) >> (signal.SIGTERM - 1) & 1)
    return False


def left(session: int, patience: float = 10.0) -> list[int]:
    """Processes of a session that still run after some time."""
    deadline = time.monotonic() + patience
    while True:
        found = []
        for path in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                words = path.read_text().rpartition(")")[2].split()  # state, parent, group, session
                if int(words[3]) == session and words[0] not in "ZX":
                    found.append(int(path.parent.name))
        if not found or time.monotonic() > deadline:
            return found
        time.sleep(0.1)


def ranks(started: list[forked.Popen]) -> dict[int, int]:
    """Number -> pid of the processes that the launchers have started."""
    sessions, found = {process.pid for process in started}, {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError, PermissionError):
            words = path.read_text().rpartition(")")[2].split()  # state, parent, group, session
            if int(words[3]) in sessions and int(words[1]) in sessions:
                environ = (path.parent / "environ").read_bytes().split(b"\0")
                rank = next((word for word in environ if word.startswith(b"RANK=")), None)
                found |= {} if rank is None else {int(rank[5:]): int(path.parent.name)}
    return found


def hit(command: Command, started: list[forked.Popen], number: signal.Signals, turn: int) -> str:
    """Send the signal to whom it is the turn of. Returns: who that was."""
    whom = turn % (2 if command.world == 1 else 2 + command.world)
    with contextlib.suppress(ProcessLookupError):  # it had ended, and all that it started
        if whom == 1:
            for process in started:
                os.killpg(process.pid, number)
            return "all"
        if whom >= 2 and (pid := ranks(started).get(whom - 2)) is not None:
            os.kill(pid, number)
            return f"process {whom - 2}"
        os.kill(started[turn // 4 % len(started)].pid, number)
    return "it alone" if command.world == 1 else "the launcher"


def kill(command: Command, number: signal.Signals, seconds: float, log: Path, turn: int) -> list[str]:
    """Start it, and kill it, or a part of it, after some seconds. Returns: the faults found."""
    said = log.stat().st_size if log.exists() else 0
    started = start(command, log)
    if number != signal.SIGKILL:
        while started[0].poll() is None and not catches(started[0].pid):
            time.sleep(0.01)
    with contextlib.suppress(subprocess.TimeoutExpired):
        started[0].wait(seconds)
    ended = all(process.poll() is not None for process in started)
    whom = hit(command, started, number, turn)
    try:
        codes = [process.wait(120) for process in started]
    except subprocess.TimeoutExpired:
        for process in started:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        return [f"{whom}: still there 120 s after {number.name}"]
    running = [pid for process in started for pid in left(process.pid)]
    faults = [f"{whom}: {len(running)} processes left"] if running else []
    # with several processes the others end because of the killed one, with a line: 1; 75: it had not begun within the
    # time limit; 2: process 0 never answered
    allowed = {0} if ended else {0, CODES[number]} if command.world == 1 else {0, CODES[number], 1, 2, STOPPED}
    if not set(codes) <= allowed:
        faults.append(f"{whom}: exit code {codes}")
    with log.open("rb") as file:
        file.seek(said)
        if b"Traceback" in file.read():
            faults.append(f"{whom}: a traceback in {log}")
    return faults + damaged(command)


def torment(
    command: Command, kills: int, seed: int, logs: Path, number: signal.Signals = signal.SIGKILL, within: float = 0
) -> list[str]:
    """Kill it `kills` times, within so many seconds (0: those of the undisturbed run). Returns: the faults found."""
    logs.mkdir(parents=True, exist_ok=True)
    log, draw, faults = (
        logs / f"{command.name.replace(' ', '_').replace(',', '')}.txt",
        random.Random(f"{seed}/{command.name}"),
        [],
    )
    remove(command)
    finish(command, log)
    wanted = result(command)
    assert wanted, f"{command.name} wrote nothing"
    remove(command)
    for i in range(1, kills + 1):
        found = kill(command, number, draw.uniform(0.0, 1.0) * (within or command.seconds), log, i)
        faults += [f"kill {i}: {fault}" for fault in found]
        if i % CHAIN == 0 or i == kills:
            finish(command, log)
            faults += [f"after kill {i}: {fault}" for fault in differences(result(command), wanted)]
            if i < kills:
                remove(command)
    return faults


def command_line(says: str | None) -> argparse.ArgumentParser:
    """The options that the programs of this folder share."""
    parser = argparse.ArgumentParser(description=says, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", metavar="OUT", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    return parser


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--commands", nargs="+", metavar="NAME")
    parser.add_argument("--signal", default="KILL", choices=("KILL", "TERM", "INT"))
    parser.add_argument("--within", type=float, default=0, help="seconds; 0: of the undisturbed run")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    known = commands(args.out.resolve())
    known |= several(known)
    print("| command | kills | undisturbed, s | found |\n|---|---|---|---|", flush=True)
    for name, command in known.items():
        if args.commands and name not in args.commands:
            if not command.out.exists() and command.world == 1:
                finish(command, args.out / "log.txt")
            continue
        number = signal.Signals[f"SIG{args.signal}"]
        faults = torment(command, args.kills, args.seed, args.out / "logs", number, args.within)
        says = (
            "; ".join(faults[:5]) + f" and {len(faults) - 5} more" * (len(faults) > 5) or "nothing lost or half-written"
        )
        print(f"| {name} | {args.kills} | {command.seconds:.1f} | {says} |", flush=True)


if __name__ == "__main__":
    main()
