"""Commands: the module of each name, its number of processes, and its printed form."""

import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from configs import __main__, commands, launch, shipped

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What would be started: the words after `python -m` in this process, or a job and the words of its processes."""
    ran: list[Any] = []

    class Room:
        def __init__(self, module: str) -> None:
            self.main = lambda: ran.append(" ".join([module.removesuffix(".__main__"), *sys.argv[1:]]))

    monkeypatch.setattr(__main__.importlib, "import_module", Room)
    monkeypatch.setattr(launch, "run", lambda job, words: ran.append((job, " ".join(words))) or 75)
    for name in [name for name in os.environ if name.startswith("SLURM")]:
        monkeypatch.delenv(name)
    return ran


def start(monkeypatch: pytest.MonkeyPatch, words: str) -> int | None:
    monkeypatch.setattr(sys, "argv", ["ehr-msn", *shlex.split(words)])
    with pytest.raises(SystemExit) as left:
        __main__.start()
    return left.value.code


@pytest.mark.parametrize(
    ("words", "runs"),
    [
        ("features a.yaml out=b", "ehr_features build a.yaml out=b"),
        ("features check a.yaml", "ehr_features check a.yaml"),
        ("hospital demo/data --seed 1", "ehr_features demo demo/data --seed 1"),
        ("images a.yaml --shard 1/2", "pretrain images a.yaml --shard 1/2"),
        ("pretrain a.yaml seed=1", "pretrain train a.yaml seed=1"),
        ("probe a.yaml --processes 1", "finetune probe a.yaml --processes 1"),
        ("fuse a.yaml --processes=2 --help", "finetune fuse a.yaml --processes=2 --help"),
        ("grid a.yaml --processes 4", "finetune grid a.yaml --processes 4"),
        ("report runs/a --out b.html", "finetune report runs/a --out b.html"),
        ("config demo/images", "configs config demo/images"),
    ],
)
def test_one_process_runs_the_command_here(
    monkeypatch: pytest.MonkeyPatch, started: list[Any], words: str, runs: str
) -> None:
    assert not start(monkeypatch, words) and started == [runs]


@pytest.mark.parametrize(
    ("words", "job"),
    [
        ("--processes 2", launch.Job(processes=2)),
        ("--processes=2", launch.Job(processes=2)),
        ("--machines 2 --machine-rank 1 --main-address a:1", launch.Job(1, 2, 1, "a:1")),
        ("--accelerate-config acc.yaml", launch.Job(2, 2, 0, "b", {"ACCELERATE_USE_CPU": "true"})),
        ("--accelerate-config acc.yaml --machine-rank 1", launch.Job(2, 2, 1, "b", {"ACCELERATE_USE_CPU": "true"})),
    ],
)
def test_several_processes_go_through_the_launcher(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, started: list[Any], words: str, job: launch.Job
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("acc.yaml").write_text("distributed_type: MULTI_CPU\nnum_processes: 4\nnum_machines: 2\nmain_process_ip: b\n")
    assert start(monkeypatch, f"pretrain a.yaml {words} seed=1") == 75  # the launcher's code is the command's
    assert started == [(job, f"pretrain train a.yaml {words} seed=1")]


def test_slurm_gives_machines_rank_processes_and_address(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, started: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "scontrol").write_text("#!/bin/sh\necho node07; echo node08\n")
    (tmp_path / "scontrol").chmod(0o755)
    (tmp_path / "acc.yaml").write_text("num_processes: 2\nnum_machines: 2\nmain_process_ip: other\n")
    job = {"JOB_ID": "123", "STEP_ID": "0", "NNODES": "2", "NTASKS": "2", "NODEID": "1", "GPUS_ON_NODE": "4"}
    for name, value in (job | {"JOB_NODELIST": "node[07-08]"}).items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    for words, settled in (
        ("", launch.Job(4, 2, 1, "node07:20123")),
        ("--processes 2 --main-address me", launch.Job(2, 2, 1, "me")),
        (f"--accelerate-config {tmp_path}/acc.yaml", launch.Job(1, 2, 1, "node07:20123")),
    ):
        assert start(monkeypatch, f"pretrain a.yaml {words}") == 75 and started.pop()[0] == settled
    monkeypatch.setenv("SLURM_NTASKS", "8")
    assert start(monkeypatch, "pretrain a.yaml") == 2 and "--ntasks-per-node=1" in capsys.readouterr().err
    (tmp_path / "scontrol").write_text("#!/bin/sh\nexit 1\n")
    monkeypatch.setenv("SLURM_NTASKS", "2")
    assert start(monkeypatch, "pretrain a.yaml") == 2 and "add --main-address" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("probe a --processes two", "invalid int value: 'two'"),
        ("probe a --processes 0", "must be at least 1"),
        ("probe a --processes 1000000", "1,024 on a machine at most"),
        ("fuse a --machines 2", "--main-address HOST[:PORT]"),
        ("fuse a --machine-rank 1", "--machine-rank from 0"),
        ("pretrian a", "unknown command 'pretrian'; did you mean pretrain?"),
        ("help pretrian", "unknown command 'pretrian'"),
    ],
)
def test_a_mistake_exits_with_2_before_anything_starts(
    monkeypatch: pytest.MonkeyPatch, started: list[Any], capsys: pytest.CaptureFixture[str], words: str, says: str
) -> None:
    assert start(monkeypatch, words) == 2 and not started and says in capsys.readouterr().err


def test_the_help_names_every_command_and_needs_no_library(tmp_path: Path) -> None:
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); sys.argv[1:] = []\n"
    code += "from configs import __main__\n__main__.start()"
    done = subprocess.run([sys.executable, "-S", "-P", "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(f"    {name} {row.takes}" in done.stdout for name, row in commands.COMMANDS.items())
    assert max(map(len, done.stdout.splitlines())) <= 120


@pytest.mark.parametrize("columns", ["60", "80", "200"])
def test_the_help_fits_the_terminal_and_cuts_no_word(monkeypatch: pytest.MonkeyPatch, columns: str) -> None:
    monkeypatch.setenv("COLUMNS", "500")
    whole = commands.usage()
    monkeypatch.setenv("COLUMNS", columns)
    assert max(map(len, commands.usage().splitlines())) <= int(columns)
    assert commands.usage().split() == whole.split()


@pytest.mark.parametrize(
    ("environment", "orig_argv", "typed"),
    [
        ({commands.PROGRAM: "../main/launch.sh"}, ["python", "-P", "-m", "configs"], "../main/launch.sh probe x 'a b'"),
        ({commands.PROGRAM: "ehr-msn"}, ["python", "-m", "finetune", "probe"], "ehr-msn probe x 'a b'"),
        ({}, [".venv/bin/python", "-P", "-m", "pretrain"], ".venv/bin/python -P -m finetune probe x 'a b'"),
        ({}, ["python", "-m", "ipykernel_launcher"], "ehr-msn probe x 'a b'"),
        ({}, ["python", "notebook.py"], "ehr-msn probe x 'a b'"),
    ],
)
def test_the_next_command_is_typed_as_this_one_was(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, environment: dict[str, str], orig_argv: list[str], typed: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(commands.PROGRAM, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "orig_argv", orig_argv)
    assert commands.command_line("probe", "x", "a b") == typed


def test_the_shipped_configs_are_listed_printed_and_read_by_name(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(commands.PROGRAM, "ehr-msn")
    (tmp_path / "demo/features").mkdir(parents=True)  # what the demo leaves has the name of a shipped config
    assert not start(monkeypatch, "config")
    names = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert names == sorted(
        p.relative_to(ROOT / "configs").with_suffix("").as_posix() for p in ROOT.glob("configs/**/*.yaml")
    )
    for name in names:
        assert not start(monkeypatch, f"config {name}")
        text = capsys.readouterr().out
        assert text == (ROOT / f"configs/{name}.yaml").read_text().replace("./launch.sh", "ehr-msn")
        assert shipped.find(name) == ROOT / f"configs/{name}.yaml" and shipped.find(f"./{name}") == Path(name)
    assert start(monkeypatch, "config demo/feature") == 2 and "did you mean demo/features?" in capsys.readouterr().err


THEIRS = ("pretrain.py", "finetune.py", "ehr_features.py", "torch.py", "yaml.py", "socket.py", "configs/__init__.py")


@pytest.mark.parametrize(
    "words",
    [
        "script images a.yaml",  # its decoders are spawned
        pytest.param("script probe probe_linear features=none --processes 2", marks=pytest.mark.slow),
        pytest.param("script grid g.yaml", marks=pytest.mark.slow),  # its runs are child processes
        "script pretrain pretrain_vit_tiny features=none",
        "script config demo/images",
        "-P -m configs check features mimic_iv=none",
        "-P -m configs.launch --processes 2 -- finetune runs .",
        "-P -m finetune score none.csv none.csv",
    ],
)
def test_no_file_of_the_working_folder_is_imported(tmp_path: Path, words: str) -> None:
    script = tmp_path / "bin/ehr-msn"  # as pip writes it
    script.parent.mkdir()
    script.write_text("from configs.__main__ import script\nif __name__ == '__main__':\n    script()\n")
    for name in THEIRS:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("raise SystemExit('a file of the user was imported')")
    (tmp_path / "a.yaml").write_text("mimic_cxr: null\nfilms: films\nout: store\nsize: 64\nworkers: 2\n")
    (tmp_path / "g.yaml").write_text(
        "out: grid\nsteps: {fuse: [fuse, fuse_mortality, features=none]}\naxes: {a: {b: {fuse: [seed=1]}}}\n"
    )
    (tmp_path / "films").mkdir()
    for i in range(4):
        Image.linear_gradient("L").rotate(90 * i).save(tmp_path / f"films/{i}.png")
    clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *words.replace("script", str(script)).split()],
        cwd=tmp_path,
        env=clean,
        capture_output=True,
        text=True,
    )
    assert "a file of the user" not in done.stdout + done.stderr
    assert done.returncode in (0, 2) and "Traceback" not in done.stderr, done.stderr
    if "a.yaml" in words:
        assert (tmp_path / "store/store.json").is_file()
