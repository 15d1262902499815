"""The rules of the house that can be checked by reading the code."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ["configs", "ehr_features", "pretrain", "finetune"]  # imports go to the left only


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.add(node.module or "")
    return {name.partition(".")[0] for name in found}


@pytest.mark.parametrize("room", ROOMS)
def test_imports_go_one_way(room: str) -> None:
    right_of_it = set(ROOMS[ROOMS.index(room) + 1 :])
    files = list((ROOT / room).rglob("*.py"))
    assert files
    for path in files:
        assert not imports(path) & right_of_it, f"{path.relative_to(ROOT)} imports from the right"


def test_the_features_import_no_torch() -> None:
    for path in [*(ROOT / "ehr_features").rglob("*.py"), *(ROOT / "configs").rglob("*.py")]:
        assert not imports(path) & {"torch", "torchvision", "timm", "lightly", "accelerate"}, path


@pytest.mark.parametrize("room", ["ehr_features", "pretrain", "finetune"])
def test_help_imports_no_torch(room: str) -> None:
    code = f"import sys, {room}.__main__; sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_shipped_configs_start_with_a_header() -> None:
    paths = sorted((ROOT / "configs").rglob("*.yaml"))
    assert paths
    for path in paths:
        head = path.read_text(encoding="utf-8").split("\n\n")[0].splitlines()
        assert len(head) >= 3 and all(line.startswith("#") for line in head), f"{path}: wanted a header of comments"
        assert any("./launch.sh" in line for line in head), f"{path}: the header names no command"
