"""Finished runs on small data, a server that forks commands, and a folder for each test."""

import multiprocessing
import shutil
from collections.abc import Callable, Iterator
from multiprocessing.context import ForkServerContext
from pathlib import Path

import pytest

from tests.hardening import kills
from tests.hardening.rooms import LIBRARIES, Room, begin


@pytest.fixture(scope="session")
def server() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(LIBRARIES)
    return context


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory, server: ForkServerContext) -> Path:
    """A small hospital, its features, notes and store, a pretrained encoder and two evaluations."""
    world = tmp_path_factory.mktemp("world")
    for name, command in kills.commands(world).items():
        if name not in ("embed", "report", "grid"):
            process = begin(server, command.words, world, world / "log.txt")
            process.join()
            assert process.exitcode == 0, (world / "log.txt").read_text()
    return world


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
