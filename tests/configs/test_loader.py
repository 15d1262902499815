"""configs.load: typed, frozen, all faults in one message."""

from pathlib import Path
from typing import Literal

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import Field, ValidationError

from configs import Settings, UserError, first_line, load


class Encoder(Settings):
    arch: str = "vit_tiny"
    depth: int = Field(12, ge=1)


class Config(Settings):
    out: str
    lr: float = 1e-3
    groups: list[str] = []
    preset: Literal["default", "paper"] = "default"
    encoder: Encoder = Encoder()
    warmup: Encoder | None = None


@pytest.fixture
def write(tmp_path: Path):
    def write(text: str | bytes) -> Path:
        path = tmp_path / "config.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


def test_yaml_and_overrides_give_typed_values(write) -> None:
    config = load(Config, write("out: runs/a\nlr: 1e-4\n"), ["encoder.depth=4", "groups=[sex,age]", "out=b"])
    assert config == Config(out="b", lr=1e-4, groups=["sex", "age"], encoder=Encoder(depth=4))


def test_a_config_is_frozen(write) -> None:
    config = load(Config, write("out: a"))
    with pytest.raises(ValidationError, match="frozen"):
        config.out = "b"
    with pytest.raises(ValidationError, match="frozen"):
        config.encoder.depth = 3


def test_every_fault_is_named_at_once_with_file_key_and_nearest_key(write) -> None:
    path = write("ot: a\npreset: papre\nencoder: {dept: 3, depth: deep}\n")
    with pytest.raises(UserError) as caught:
        load(Config, path, ["grups=[sex]", "nonsense", "encoder.depth=-1"])
    lines = str(caught.value).splitlines()
    assert lines[0] == "7 faults in the config:"
    text = "\n".join(lines)
    for expected in (
        f"{path}: unknown key `ot`; did you mean `out`?",
        f"{path}: unknown key `encoder.dept`; did you mean `encoder.depth`?",
        "command line: unknown key `grups`; did you mean `groups`?",
        "command line: `nonsense` is not of the form key=value",
        f"{path}: `out` is not given, and has no default",
        f"{path}: `preset` Input should be 'default' or 'paper', got 'papre'",
        "command line: `encoder.depth` Input should be greater than or equal to 1, got -1",
    ):
        assert expected in text


def test_a_key_without_its_section_is_found(write) -> None:
    with pytest.raises(UserError, match=r"unknown key `dpth`; did you mean `encoder.depth`"):
        load(Config, write("out: a\ndpth: 3\n"))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("out: [1, 2", "line 1"),
        ("out: a\nout: b\n", "duplicate"),
        ("- a\n- b\n", "key: value"),
        ("just words", "key: value"),
        (b"\xff\xfe\x00", "not a text file"),
        ("out: ${nowhere}", "nowhere"),
    ],
)
def test_what_is_no_config_is_said(write, text: str | bytes, says: str) -> None:
    with pytest.raises(UserError, match=says):
        load(Config, write(text))


def test_a_missing_file_names_the_nearest_one(write, tmp_path: Path) -> None:
    write("out: a")
    with pytest.raises(UserError, match=r"no such config file; did you mean .*config\.yaml"):
        load(Config, tmp_path / "confg.yaml")
    with pytest.raises(UserError, match="cannot be read"):
        load(Config, tmp_path)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=60), st.lists(st.text(max_size=12), max_size=3))
def test_damaged_bytes_and_odd_overrides_never_give_a_traceback(
    tmp_path: Path, data: bytes, overrides: list[str]
) -> None:
    path = tmp_path / "damaged.yaml"
    path.write_bytes(data)
    try:
        load(Config, path, overrides)
    except UserError as error:
        assert str(error)


def test_the_home_folder_in_a_path_is_no_folder_called_tilde(write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    config = load(Config, write("out: ~/runs\n"), ["groups=[~/a,a~b]"])
    assert config.out == "/home/me/runs" and config.groups == ["/home/me/a", "a~b"]


def test_an_error_without_words_is_named_by_its_class() -> None:
    assert first_line(ValueError("a\nb")) == "a" and first_line(EOFError()) == first_line(EOFError("\n")) == "EOFError"
