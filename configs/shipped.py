"""The YAML files that are shipped, by name: `probe_linear`, `demo/features`."""

from __future__ import annotations

import difflib
from pathlib import Path

from configs.commands import command_line

FOLDER = Path(__file__).parent


def names() -> dict[str, Path]:
    """Name -> file."""
    paths = sorted(FOLDER.rglob("*.yaml"))
    return {path.relative_to(FOLDER).with_suffix("").as_posix(): path for path in paths}


def title(path: Path) -> str:
    """The first line of a YAML's header that is for a reader."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return next(line.strip("# ") for line in lines if not line.startswith("# yaml-language-server"))


def find(config: str | Path) -> Path:
    """The file of a config: the shipped one of this name, else the path; `./NAME` is always a path."""
    return names().get(str(config), Path(config))


def hint(config: str | Path) -> str:
    """How an error about a config that does not exist goes on."""
    path = Path(config)
    siblings = [sibling.as_posix() for sibling in path.parent.glob("*.yaml")]
    asked = path.with_suffix("").as_posix().removeprefix("configs/")
    near = difflib.get_close_matches(path.as_posix(), siblings, n=1, cutoff=0.5)
    near = near or difflib.get_close_matches(asked, names(), n=1, cutoff=0.6)
    return f"; did you mean {near[0]}?" if near else f"; the shipped ones: {command_line('config')}"
