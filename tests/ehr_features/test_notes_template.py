"""The template of notes: it is data, and faults name file, line and field."""

from __future__ import annotations

from pathlib import Path

import pytest

from configs import UserError
from ehr_features.notes.facts import FIELDS
from ehr_features.notes.template import fields_of, read_template


def read(tmp_path: Path, text: str) -> None:
    path = tmp_path / "mine.txt"
    path.write_text(text)
    read_template(path, FIELDS)


def test_the_shipped_template_uses_every_field() -> None:
    assert set(fields_of(read_template(None, FIELDS))) == set(FIELDS)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (
            "[a]\nA {agee}.",
            r"mine.txt, line 2: unknown field \{agee\}; did you mean \{age\}\? Known: admission_hours_ago, ",
        ),
        ("[a]\n# fine\n\nAge {age", "line 4: `{` without its partner"),
        ("[a]\n[x {age}.", r"line 2: `\[` without its partner"),
        ("[a]\nhello", r"line 2: no \{field\}"),
        ("[a]\n[{age} | always].", "line 2: the part `always` in brackets has no"),
        ("{age}", "line 1: text before the first section"),
        ("[a]\n{age}\n[a]\n{sex}", r"line 3: section \[a\] occurs twice"),
        ("[a]\n", "no section with a line"),
        ("", "no section with a line"),
        ("[a]\n{age.__class__}", r"unknown field \{age.__class__\}"),
        ("[a]\n{0}\n{}", r"2 faults in the template:"),
    ],
)
def test_a_fault_names_file_line_and_field(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        read(tmp_path, text)


def test_a_template_that_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not a text file"):
        read_template(tmp_path / "mine.txt", FIELDS)
    with pytest.raises(UserError, match="cannot be read"):
        read_template(tmp_path / "none.txt", FIELDS)
