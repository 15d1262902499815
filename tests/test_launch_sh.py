"""launch.sh: set-up; it installs nothing without consent, and passes all arguments to `python -P -m configs`."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FAKE_PYTHON = '#!/bin/sh\n[ "$2" = -m ] && [ "$4" = install ] && [ -n "$PIP_FAILS" ] && exit 1\necho "$@"\n'


@pytest.fixture
def house(tmp_path: Path) -> Path:
    """A copy of launch.sh with an environment that is set up, whose python prints what it is asked to run."""
    for name in ("launch.sh", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    fake = tmp_path / ".venv/bin/python"
    fake.parent.mkdir(parents=True)
    fake.write_text(FAKE_PYTHON)
    fake.chmod(0o755)
    toml = (tmp_path / "pyproject.toml").read_text()
    stamp = subprocess.run(["cksum"], input=toml, capture_output=True, text=True, check=True)
    (tmp_path / ".venv/ehr-msn-run.stamp").write_text(stamp.stdout)
    return tmp_path


def launch(house: Path, *words: str, typed: str = "./launch.sh", **env: str) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if k not in ("VIRTUAL_ENV", "CONDA_PREFIX", "EHR_MSN_PROGRAM")}
    return subprocess.run(["bash", typed, *words], cwd=house, capture_output=True, text=True, env=clean | env)


@pytest.mark.parametrize(
    ("words", "runs"),
    [
        ("pretrain a.yaml seed=1 --processes 2", "-P -m configs pretrain a.yaml seed=1 --processes 2"),
        ("probe --help", "-P -m configs probe --help"),
        ("pretrian a.yaml", "-P -m configs pretrian a.yaml"),
        ("python -m benchmarks.run DEMO", "-m benchmarks.run DEMO"),
    ],
)
def test_every_word_goes_to_the_command(house: Path, words: str, runs: str) -> None:
    done = launch(house, *words.split())
    assert (done.returncode, done.stdout.strip()) == (0, runs), done.stderr


@pytest.mark.parametrize("typed", ["./launch.sh", "launch.sh", ".venv/../launch.sh"])
def test_the_path_of_launch_sh_is_passed_on_as_typed(house: Path, typed: str) -> None:
    (house / ".venv/bin/python").write_text("#!/bin/sh\necho $EHR_MSN_PROGRAM\n")
    done = launch(house, "runs", typed=typed)
    assert done.stdout.strip() == ("./launch.sh" if typed == "launch.sh" else typed)


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
    assert launch(house, "report", "runs/a").stdout.strip() == "-P -m configs report runs/a"


@pytest.mark.parametrize("has", ["java and pip", "java", ""])
def test_pyspark_is_installed_for_the_tests_where_java_is_and_its_absence_stops_nothing(house: Path, has: str) -> None:
    shutil.copy(house / ".venv/ehr-msn-run.stamp", house / ".venv/ehr-msn-dev.stamp")
    fake = house / ".venv/bin/python"
    fake.write_text(FAKE_PYTHON.replace("echo", '[ "$2" = -c ] && exit 1\necho'))
    tools = house / "tools"
    tools.mkdir()
    for name in ("bash", "env", "dirname", "cksum", "flock", "java" if has else "true"):
        (tools / name).symlink_to(shutil.which(name) or shutil.which("true") or "")
    done = launch(house, "test", "-k", "x", PATH=str(tools), PIP_FAILS="" if has == "java and pip" else "1")
    assert done.returncode == 0, done.stderr
    assert ("pyspark (0.4 GB) is installed too" in done.stdout) == bool(has)
    assert ("no pyspark to be had" in done.stdout) == (has == "java")
    assert done.stdout.splitlines()[-1].endswith("-k x")


@pytest.mark.parametrize(("words", "code"), [("", 0), ("help", 0), ("pretrian a.yaml", 2)])
def test_the_help_and_a_mistyped_command_set_nothing_up(house: Path, words: str, code: int) -> None:
    shutil.rmtree(house / ".venv")
    done = launch(house, *words.split())
    assert done.returncode == code and not (house / ".venv").exists()
    assert "features CONFIG" in (done.stdout if code == 0 else done.stderr)
    assert code == 0 or "unknown command 'pretrian'; did you mean pretrain?" in done.stderr
