"""What structure.py does to a file, and what it calls each outcome."""

import json
import random
from pathlib import Path

import pyarrow as pa
import pytest

from configs import UserError
from ehr_features.typed import read_json
from tests.hardening import structure
from tests.hardening.places import Place, places


def test_each_way_of_damage_is_drawn_and_changes_the_file() -> None:
    value = {"a": [1, {"b": None}], "c": "x"}
    made = {structure.damaged_json(json.dumps(value).encode(), random.Random(i)) for i in range(300)}
    assert len({words for _, words in made}) > 60 and len({data for data, _ in made}) > 60
    table = pa.table({"a": [1, 2, 3], "b": ["x", None, "z"]})
    words = {structure.damaged_table(table, random.Random(i))[1].rpartition(": ")[2] for i in range(600)}
    assert words == {*structure.COLUMNS, *structure.ROWS}


def test_an_exception_and_a_file_that_is_not_named_are_told(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('{"a": 1}')

    whole = structure.Undamaged(b'{"a": 1}', "1", frozenset())

    def outcome(read: structure.Callable[[], str], ours: bool = True) -> str:
        return structure.outcome(Place("a", path, read, ours), b"[1]", whole)[0]

    def fails() -> str:
        raise KeyError("x")

    def unnamed() -> str:
        raise UserError("no")

    assert outcome(fails) == "fault" and outcome(unnamed) == "refused, the file is not named"
    assert outcome(lambda: str(read_json(path))) == "refused" and outcome(lambda: "1") == "same"
    assert outcome(lambda: "2") == "another result without a word" and path.read_text() == '{"a": 1}'
    assert outcome(lambda: "2", ours=False) == "taken"


def test_a_warning_that_was_there_before_is_none_of_the_damage(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('{"a": 1}')

    def read() -> str:
        print("warning: an old one")
        print("warning: a new one" if "b" in path.read_text() else "")
        return path.read_text()

    place = Place("a", path, read)
    whole = structure.undamaged(place)
    assert structure.outcome(place, b'{"a": 2}', whole)[0] == "another result without a word"
    assert structure.outcome(place, b'{"b": 1}', whole)[0] == "warned"


@pytest.mark.slow
def test_damage_that_parses_is_refused_by_its_file_or_told_or_without_effect(world: Path, tmp_path: Path) -> None:
    told: list[str] = []
    counts: dict[str, structure.Counter[str]] = {}
    structure.torment(places(tmp_path, world), 190, 7, counts, told=told.append)
    assert not told and sum(row.total() for row in counts.values()) == 190, told
    every = sum(counts.values(), start=structure.Counter())
    assert min(every[kind] for kind in structure.KINDS) > 0
