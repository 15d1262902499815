"""launch.sh: what it starts for which flags, and that it installs nothing unasked."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FAKE_PYTHON = '#!/bin/sh\n[ "$1" = -m ] && [ "$3" = install ] && [ -n "$PIP_FAILS" ] && exit 1\necho "$@"\n'


@pytest.fixture
def house(tmp_path: Path) -> Path:
    """A copy of launch.sh with an environment that is set up, whose python prints what it is asked to run."""
    for name in ("launch.sh", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path / name)
    fake = tmp_path / ".venv/bin/python"
    fake.parent.mkdir(parents=True)
    fake.write_text(FAKE_PYTHON)
    fake.chmod(0o755)
    toml = (tmp_path / "pyproject.toml").read_text()
    stamp = subprocess.run(["cksum"], input=toml, capture_output=True, text=True, check=True)
    (tmp_path / ".venv/ehr-msn-run.stamp").write_text(stamp.stdout)
    return tmp_path


def launch(house: Path, *words: str, **env: str) -> subprocess.CompletedProcess[str]:
    clean = {
        k: v for k, v in os.environ.items() if not k.startswith("SLURM") and k not in ("VIRTUAL_ENV", "CONDA_PREFIX")
    }
    return subprocess.run(["bash", str(house / "launch.sh"), *words], capture_output=True, text=True, env=clean | env)


@pytest.mark.parametrize(
    ("words", "runs"),
    [
        ("features a.yaml out=b", "-m ehr_features build a.yaml out=b"),
        ("features check a.yaml", "-m ehr_features check a.yaml"),
        ("images a.yaml", "-m pretrain images a.yaml"),
        ("pretrain a.yaml seed=1", "-m pretrain train a.yaml seed=1"),
        ("probe a.yaml --processes 1", "-m finetune probe a.yaml --processes 1"),
        (
            "pretrain a.yaml --processes 2",
            "-m configs.launch --processes 2 --machines 1 --machine-rank 0 -- "
            "pretrain train a.yaml --processes 2 --machines 1",
        ),
        ("fuse a.yaml --processes=2 --help", "-m finetune fuse a.yaml --processes=2 --help"),
        (
            "pretrain a.yaml --accelerate-config c.yaml",
            "-m configs.launch --accelerate-config c.yaml -- pretrain train a.yaml --accelerate-config c.yaml",
        ),
        ("report runs/a --out b.html", "-m finetune report runs/a --out b.html"),
    ],
)
def test_commands_start_the_right_processes(house: Path, words: str, runs: str) -> None:
    done = launch(house, *words.split())
    assert (done.returncode, done.stdout.strip()) == (0, runs), done.stderr


def test_slurm_gives_machines_rank_processes_and_address(house: Path, tmp_path: Path) -> None:
    scontrol = tmp_path / "scontrol"
    scontrol.write_text("#!/bin/sh\necho node07; echo node08\n")
    scontrol.chmod(0o755)
    job = {"SLURM_JOB_ID": "123", "SLURM_STEP_ID": "0", "SLURM_NNODES": "2", "SLURM_NTASKS": "2", "SLURM_NODEID": "1"}
    more = {"SLURM_GPUS_ON_NODE": "4", "SLURM_JOB_NODELIST": "node[07-08]", "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = launch(house, "pretrain", "a.yaml", **job, **more)
    assert done.stdout.startswith(
        "-m configs.launch --processes 4 --machines 2 --machine-rank 1 --main-address node07:20123 -- "
        "pretrain train a.yaml"
    )
    done = launch(house, "pretrain", "a.yaml", "--accelerate-config", "c.yaml", **job, **more)
    assert "--accelerate-config c.yaml --machine-rank 1 --main-address node07:20123 -- " in done.stdout
    done = launch(house, "pretrain", "a.yaml", **job | {"SLURM_NTASKS": "8"}, **more)
    assert done.returncode == 2 and "--ntasks-per-node=1" in done.stderr


def test_an_active_environment_without_the_package_is_left_alone(house: Path, tmp_path: Path) -> None:
    active = tmp_path / "active"
    subprocess.run(["python3", "-m", "venv", "--without-pip", str(active)], check=True)
    done = launch(house, "report", "runs/a", VIRTUAL_ENV=str(active))
    assert done.returncode == 2
    assert "Nothing was installed" in done.stderr and "pip install -e" in done.stderr


def test_a_failed_installation_is_not_taken_for_a_finished_one(house: Path) -> None:
    (house / ".venv/ehr-msn-run.stamp").unlink()
    for _ in range(2):
        done = launch(house, "report", "runs/a", PIP_FAILS="1")
        assert done.returncode == 2 and "once that is mended" in done.stderr
    done = launch(house, "report", "runs/a")
    assert done.returncode == 0 and "GB" in done.stdout
    assert launch(house, "report", "runs/a").stdout.strip() == "-m finetune report runs/a"


def test_an_unknown_command_shows_the_list(house: Path) -> None:
    done = launch(house, "pretrian")
    assert done.returncode == 2 and "unknown command 'pretrian'" in done.stderr and "./launch.sh demo" in done.stderr
