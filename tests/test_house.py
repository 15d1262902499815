"""Rules of the code base that can be checked by reading the code."""

import ast
import graphlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from configs.commands import NAMES
from ehr_features import schema

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ["configs", "ehr_features", "pretrain", "finetune"]  # imports go to the left only


def imports(path: Path, whole: bool = False) -> set[str]:
    """The packages that a file imports; `whole`: the modules, and the names taken from them."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found if whole else {name.partition(".")[0] for name in found}


@pytest.mark.parametrize("room", ROOMS)
def test_imports_go_one_way(room: str) -> None:
    right_of_it = set(ROOMS[ROOMS.index(room) + 1 :])
    files = list((ROOT / room).rglob("*.py"))
    assert files
    for path in files:
        assert not imports(path) & right_of_it, f"{path.relative_to(ROOT)} imports from the right"


def _modules() -> dict[str, Path]:
    paths = [path for room in ROOMS for path in (ROOT / room).rglob("*.py")]
    return {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in paths}


def _unit(module: str) -> str:
    """A sub-package, or a file at the top of a package."""
    return ".".join(module.split(".")[:2])


def test_no_circle_of_imports_between_the_files_and_sub_packages_of_the_rooms() -> None:
    known = _modules()
    graph: dict[str, set[str]] = {}
    for module, path in known.items():
        if module not in ROOMS:
            named = {name if name in known else name.rpartition(".")[0] for name in imports(path, whole=True)}
            graph.setdefault(_unit(module), set()).update(
                {_unit(name) for name in named & set(known)} - {_unit(module)}
            )
    list(graphlib.TopologicalSorter(graph).static_order())  # CycleError names the circle


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_opens_on_a_screen_and_its_faces_are_short(room: str) -> None:
    shown = [path for path in (ROOT / room).iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()]
    assert len(shown) <= 22
    for face in (ROOT / room).glob("*/__init__.py"):
        assert len(face.read_text(encoding="utf-8").splitlines()) <= 16, face


@pytest.mark.parametrize("fact", [schema.SPLITS, schema.HELD_OUT, schema.FRONTAL, schema.FINDINGS], ids=lambda f: f[0])
def test_a_fact_of_the_schema_is_written_once(fact: tuple[str, ...]) -> None:
    written = [
        path.relative_to(ROOT).as_posix()
        for path in _modules().values()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Tuple | ast.List | ast.Set)
        and {getattr(element, "value", None) for element in node.elts} == set(fact)
        and all(isinstance(element, ast.Constant) for element in node.elts)
    ]
    assert written == ["ehr_features/schema.py"]


def test_the_public_functions_stand_where_the_pages_say() -> None:
    import ehr_features.series
    import ehr_features.static
    import finetune.fusion
    import finetune.metrics
    import finetune.probe
    import finetune.report
    import pretrain.encoder
    import pretrain.loss
    import pretrain.store

    public = [ehr_features.series.load, ehr_features.static.encode, pretrain.loss.msn_loss, pretrain.encoder.load]
    public += [pretrain.encoder.embed, pretrain.store.Store, finetune.metrics.evaluate, finetune.fusion.MODELS.get]
    assert all(map(callable, [*public, finetune.probe.probe, finetune.report.report]))


def test_the_features_import_no_torch() -> None:
    for path in [*(ROOT / "ehr_features").rglob("*.py"), *(ROOT / "configs").rglob("*.py")]:
        assert not imports(path) & {"torch", "torchvision", "timm", "lightly", "accelerate"}, path


LIGHT = "finetune.compare, finetune.report.page, finetune.report.runs, finetune.score, pretrain.store.write"


def test_commands_on_tables_wait_for_no_library_that_they_do_not_use() -> None:
    code = f"import sys, {LIGHT}\nprint(*{{'torch', 'sklearn', 'scipy.stats', 'ibis', 'duckdb'}} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and not done.stdout.strip(), done.stdout + done.stderr
    for path in (ROOT / "pretrain").rglob("*.py"):  # nor a training, before it needs one
        top = [node for node in ast.parse(path.read_text(encoding="utf-8")).body if isinstance(node, ast.ImportFrom)]
        assert not {str(node.module).partition(".")[0] for node in top} & {"sklearn", "ibis"}, path


HELPS = """
import argparse, json, sys
from configs import cli
from {room}.__main__ import main
def show(top, argv=None):
    commands = next(a for a in top._actions if isinstance(a, argparse._SubParsersAction)).choices
    loaded = [name for name in ("torch", "pandas", "rich") if name in sys.modules]
    print(json.dumps([loaded, {{name: command.format_help() for name, command in commands.items()}}]))
cli.main = show
main()
"""


@pytest.mark.parametrize("room", ["ehr_features", "pretrain", "finetune"])
def test_the_help_of_each_command_fits_a_screen_has_an_example_and_waits_for_no_library(room: str) -> None:
    code, screen = HELPS.format(room=room), {**os.environ, "COLUMNS": "100"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=screen)
    assert done.returncode == 0, done.stderr
    loaded, helps = json.loads(done.stdout)
    assert not loaded and len(helps) >= 3
    for name, text in helps.items():
        lines = text.splitlines()
        assert len(lines) <= 24 and max(map(len, lines)) <= 100, f"{room} {name}"
        assert f"  ./launch.sh {NAMES[room, name]} " in text, f"{room} {name} shows no example"


def test_shipped_configs_start_with_a_header() -> None:
    paths = sorted((ROOT / "configs").rglob("*.yaml"))
    assert paths
    for path in paths:
        head = path.read_text(encoding="utf-8").split("\n\n")[0].splitlines()
        assert len(head) >= 3 and all(line.startswith("#") for line in head), f"{path}: wanted a header of comments"
        assert any("./launch.sh" in line for line in head), f"{path}: the header names no command"


SHIPPED = ["features", "images", "pretrain_vit_tiny", "pretrain_vit_small", "pretrain_densenet121", "probe_linear"]
SHIPPED += ["fuse_mortality", "fuse_phenotypes", "notes"]


def test_the_promised_configs_are_shipped_large_and_small() -> None:
    for folder in (ROOT / "configs", ROOT / "configs" / "demo"):
        assert set(SHIPPED) <= {path.stem for path in folder.glob("*.yaml")}


def test_no_absolute_path_and_no_registry_is_named() -> None:
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    for name in files:
        if Path(name).suffix in (".py", ".md", ".yaml", ".toml", ".sh"):
            text = (ROOT / name).read_text(encoding="utf-8")
            for word in ("/" + "root/", "/" + "work/main", "pypi." + "org", "download.py" + "torch"):
                assert word not in text, f"{name} names {word}"
