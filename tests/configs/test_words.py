"""A word that YAML reads as a boolean reaches every field of every schema in the field's type."""

import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import create_model

from configs import Settings, UserError, load
from ehr_features.config import FeaturesConfig, NotesConfig
from ehr_features.series.channels import Channels
from finetune.config import FuseConfig, GridConfig, ProbeConfig
from pretrain.config import ImagesConfig, PretrainConfig

SCHEMAS = [FeaturesConfig, NotesConfig, ImagesConfig, PretrainConfig, ProbeConfig, FuseConfig, GridConfig, Channels]
YES, NO = ("true", "yes", "on", "y"), ("false", "no", "off", "n")
WORDS = [form(word) for word in YES + NO for form in (str.lower, str.title, str.upper)]


def parts(annotation: Any) -> Iterator[Any]:
    """An annotation and everything inside it."""
    yield annotation
    if typing.get_origin(annotation) is not typing.Literal:
        for inner in typing.get_args(annotation):
            yield from parts(inner)


def sections(schema: type[Settings]) -> set[type[Settings]]:
    """The schema and its sections."""
    inner = [p for field in schema.model_fields.values() for p in parts(field.annotation)]
    return {schema}.union(*(sections(p) for p in inner if isinstance(p, type) and issubclass(p, Settings)))


FIELDS = [
    pytest.param(name, field, id=f"{section.__name__}.{name}")
    for section in sorted(set().union(*map(sections, SCHEMAS)), key=lambda s: s.__name__)
    for name, field in section.model_fields.items()
    if name != "spark"  # its keys are names of settings: below
    and not any(isinstance(p, type) and issubclass(p, Settings) for p in parts(field.annotation))
]


def shaped(annotation: Any, word: Any) -> Any:
    """A value of the annotation's shape that holds the word."""
    origin, inner = typing.get_origin(annotation), [a for a in typing.get_args(annotation) if a is not type(None)]
    if origin in (list, tuple):
        return [shaped(a, word) for a in inner if a is not ...]
    if origin is dict:
        return {word: shaped(inner[1], word)}
    return shaped(inner[0], word) if inner and origin is not typing.Literal else word


def leaves(value: Any) -> list[Any]:
    inner = [*value.keys(), *value.values()] if isinstance(value, dict) else value
    return [leaf for part in inner for leaf in leaves(part)] if isinstance(inner, list | tuple) else [inner]


def read(folder: Path, name: str, field: Any, text: str, *, override: bool) -> Any:
    """The value that a schema with that field alone reads from the text; or the error message."""
    one = create_model("One", __base__=Settings, **{name: (field.annotation, field)})
    path = folder / "one.yaml"
    path.write_text("" if override else f"{name}: {text}")
    try:
        return getattr(load(one, path, [f"{name}={text}"] if override else []), name)
    except UserError as error:
        return str(error)


@pytest.mark.parametrize(("name", "field"), FIELDS)
@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(word=st.sampled_from(WORDS), override=st.booleans())
def test_a_boolean_word_is_text_for_text_and_a_boolean_for_bool(
    tmp_path: Path, name: str, field: Any, word: str, override: bool
) -> None:
    text = yaml.safe_dump(shaped(field.annotation, "WORD"), default_flow_style=True).replace("WORD", word)
    got = read(tmp_path, name, field, text.splitlines()[0], override=override)
    types = {p for p in parts(field.annotation) if isinstance(p, type)}
    if types & {str, Path} and not types & {bool, Any} and "in the config" not in str(got):
        assert {str(leaf) for leaf in leaves(got)} == {word}
    elif bool in types and str not in types:
        assert got is (word.lower() in YES)
    elif bool in types or Any in types:  # either would do: what YAML says
        booleans = {} if word.lower() in "yn" else {word.lower() in YES}
        assert set(leaves(got)) - {word} == set(booleans) and word in leaves(got)
    else:  # numbers and choices: refused, with the word as it was typed, or taken as a choice
        assert got == word or f"got {word!r}" in got


def test_a_quoted_word_stays_text_where_a_boolean_would_do_too(tmp_path: Path) -> None:
    field = FeaturesConfig.model_fields["storage"]
    got = read(tmp_path, "storage", field, '{gs: {token: "no", requester_pays: no, on: on}}', override=True)
    assert got == {"gs": {"token": "no", "requester_pays": False, "on": True}}
    field = FeaturesConfig.model_fields["spark"]
    got = read(tmp_path, "spark", field, '{spark.ui.enabled: no, spark.app.name: "no"}', override=True)
    assert got == {"spark.ui.enabled": False, "spark.app.name": "no"}


def test_words_are_names_in_a_grid(tmp_path: Path) -> None:
    path = tmp_path / "grid.yaml"
    path.write_text(
        "out: yes\nsteps: {fuse: [fuse, no, precision=no]}\naxes: {on: {off: {fuse: [off]}, no: {fuse: [on, y]}}}\n"
    )
    config = load(GridConfig, path, ["steps.fuse=[fuse,off,yes]"])
    assert config.out == "yes" and config.steps == {"fuse": ["fuse", "off", "yes"]}
    assert config.axes == {"on": {"off": {"fuse": ["off"]}, "no": {"fuse": ["on", "y"]}}}
    path.write_text("out: a\nsteps: {fuse: [fuse, b]}\naxes: {a: {on: {}, on: {}}}\n")
    with pytest.raises(UserError, match="duplicate key on"):
        load(GridConfig, path)
