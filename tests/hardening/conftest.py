"""Finished runs on small data, and a folder for each test."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.forked import begin
from tests.hardening import kills
from tests.hardening.rooms import Room


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small hospital, its features, notes and store, a pretrained encoder and two evaluations."""
    world = tmp_path_factory.mktemp("world")
    for name, command in kills.commands(world).items():
        if name not in ("embed", "report", "grid"):
            process = begin(command.words, world, world / "log.txt")
            process.join()
            assert process.exitcode == 0, (world / "log.txt").read_text()
    return world


@pytest.fixture
def room(world: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Callable[..., Room]]:
    made: list[Room] = []

    def make(own: Path, name: str = "") -> Room:
        own.mkdir(exist_ok=True)
        if name == "knowledge":
            shutil.copytree(request.getfixturevalue("make_text_model")(), own / "tiny")
        (tmp_path / "logs").mkdir(exist_ok=True)
        made.append(Room(world, own, tmp_path / "logs"))
        return made[-1]

    yield make
