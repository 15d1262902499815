"""Two kills of each command at seeded moments, of its group and of it alone, three of two processes; kills.py: 50."""

from pathlib import Path

import pytest

from tests.hardening import kills

NAMES = list(kills.commands(Path("nowhere")))  # no folder: it writes nothing


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> dict[str, kills.Command]:
    known = kills.commands(tmp_path_factory.mktemp("kills"))
    return known | kills.several(known)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_kill_loses_nothing_and_leaves_nothing_half_written(known: dict[str, kills.Command], name: str) -> None:
    command = known[name]
    for before in NAMES[: NAMES.index(name)]:  # also where a test is run by itself
        if not known[before].out.exists():
            kills.finish(known[before], command.out.parent / "before.txt")
    logs = known[NAMES[0]].out.parent / "logs"
    assert kills.torment(command, 2, 1, logs) == []


@pytest.mark.slow
def test_a_kill_of_one_of_two_processes_ends_both_without_a_traceback(known: dict[str, kills.Command]) -> None:
    command, logs = known["pretrain, 2 processes"], known["demo data"].out.parent / "logs"
    logs.mkdir(exist_ok=True)
    for before in ("demo data", "features", "images"):
        if not known[before].out.exists():
            kills.finish(known[before], logs / "before.txt")
    assert kills.torment(command, 3, 1, logs) == []


def test_a_half_written_file_is_found(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    command = kills.Command("x", [], tmp_path / "out", ("*.json",))
    (tmp_path / "out/a.json").write_text('{"a": 1}')
    assert kills.damaged(command) == []
    (tmp_path / "out/a.json").write_text('{"a": ')
    (tmp_path / "out/b.parquet").write_bytes(b"PAR1")
    (tmp_path / "out/.c.partial-1.json").write_text("{")
    assert [fault.split(":")[0] for fault in kills.damaged(command)] == ["a.json", "b.parquet"]
