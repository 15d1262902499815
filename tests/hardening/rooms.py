"""Every command as a user types it, each in its own process."""

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess
from pathlib import Path

from tests.forked import begin
from tests.hardening import kills

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "demo"


@dataclass
class Command:
    """A command line, its output, and a file that shows that its work has begun (None: its messages show it)."""

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
        "export": Command(["pretrain", "export", str(encoder), f"{own}/exported"], own / "exported"),
        "report": Command(["finetune", "report", *evaluated, "--out", f"{own}/report.html"], own / "report.html"),
        "grid": Command(["finetune", "grid", f"{own}/grid.yaml"], own / "grid", own / "grid/a/fuse/metrics.jsonl"),
        "demo": Command(
            ["finetune", "demo", f"{own}/demo", "--subjects", "400"], own / "demo", own / "demo/logs/data.txt"
        ),
        "knowledge": Command(knowledge, own / "notes"),
    }


NAMES = list(commands(Path(), Path()))
WRITES = [name for name in NAMES if name not in ("check", "audit", "pretrain by two", "demo")]
Start = Callable[[Command], ForkServerProcess]


@dataclass
class Room:
    """A folder for commands that write below `own`, one after another or at once."""

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
        return begin(command.words, self.logs, log), log

    def end(self, process: ForkServerProcess, log: Path) -> tuple[int, str]:
        """The exit code, and the printed text; no process of it may be left."""
        process.join(500)  # a grid is six commands
        assert process.exitcode is not None and process.pid is not None, "it does not end"
        assert not kills.left(process.pid), log.read_text()
        return process.exitcode, log.read_text() if log.exists() else ""

    def run(self, command: Command) -> tuple[int, str]:
        return self.end(*self.start(command))


def wait_for(ready: Callable[[], bool], process: ForkServerProcess, log: Path) -> None:
    deadline = time.monotonic() + 120
    while not ready():
        assert process.is_alive() and time.monotonic() < deadline, log.read_text()
        time.sleep(0.01)


SHORT = {
    "pretrain": ["optim.steps=2"],
    "fuse": ["epochs=1", "patience=1"],
    "probe": ["samples=20"],
    "images": ["size=64"],
}


def short(here: Room, name: str) -> Command:
    """The command with as little work as possible."""
    command = here.command(name)
    if name == "grid":  # its words stand in its file
        path = here.own / "grid.yaml"
        path.write_text(path.read_text().replace("=4000", "=1"))
    return Command([*command.words, *SHORT.get(name, [])], command.out)
