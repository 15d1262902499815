"""Every number of every config has bounds, so that a slip of the keyboard is refused before any work."""

import itertools
import typing

import pytest
from pydantic import BaseModel

from configs import UserError, load
from ehr_features.config import FeaturesConfig, NotesConfig
from finetune.__main__ import main
from finetune.config import FuseConfig, GridConfig, ProbeConfig
from pretrain.config import ImagesConfig, PretrainConfig


def numbers(annotation, metadata=()):
    """Each int or float of a type, with whether it is bounded below and above."""
    if typing.get_origin(annotation) is typing.Annotated:
        inner, *more = typing.get_args(annotation)
        yield from numbers(inner, (*metadata, *more))
    elif annotation in (int, float):
        flat = [part for each in metadata for part in (each, *getattr(each, "metadata", ()))]
        yield tuple(
            any(getattr(part, name, None) is not None for part in flat for name in pair)
            for pair in (("ge", "gt"), ("le", "lt"))
        )
    elif typing.get_origin(annotation) is dict:
        return  # free words: storage options and arguments of timm, which have checks of their own
    elif isinstance(annotation, type) and issubclass(annotation, BaseModel):
        for name, field in annotation.model_fields.items():
            yield from ((f"{annotation.__name__}.{name}", each) for each in numbers(field.annotation, field.metadata))
    else:
        for each in typing.get_args(annotation):
            yield from numbers(each, metadata if typing.get_origin(annotation) not in (list, tuple) else ())


def leaves(schema):
    for name, found in numbers(schema):
        while isinstance(found[0], str):
            name, found = found
        yield name, found


@pytest.mark.parametrize("schema", [FeaturesConfig, ImagesConfig, NotesConfig, PretrainConfig, ProbeConfig, FuseConfig])
def test_each_number_is_bounded_on_both_sides(schema):
    found = dict(leaves(schema))
    assert len(found) > 3 or schema is NotesConfig
    assert not [name for name, (low, high) in found.items() if not (low and high)]


@pytest.mark.parametrize(
    ("schema", "word"),
    [
        (PretrainConfig, "seed=-1"),
        (PretrainConfig, f"seed={2**32}"),
        (ProbeConfig, "seed=-5"),
        (FuseConfig, "seeds=[0,-1]"),
        (ProbeConfig, "samples=1000000000"),
        (FuseConfig, "layers=100000"),
        (FuseConfig, "hidden=100000000"),
        (FuseConfig, "lr=1e300"),
        (PretrainConfig, "views.num_focal=1000000"),
        (PretrainConfig, "optim.lr=1e300"),
        (PretrainConfig, "films.size=100000000"),
        (PretrainConfig, "head.hidden=100000000"),
        (PretrainConfig, "encoder.image_size=100000000"),
        (ProbeConfig, "labels=[]"),
        (ProbeConfig, f"labels=[{','.join('a' * 1001)}]"),
        (PretrainConfig, f"features={'x/' * 3000}"),
        (PretrainConfig, f"encoder.init={'x' * 300}"),
        (FuseConfig, f"notes={'x' * 300}"),
    ],
)
def test_what_cannot_be_meant_is_refused_by_its_key(schema, word):
    with pytest.raises(UserError, match=word.split("=")[0].replace(".", r"\.")) as caught:
        load(
            schema,
            {"features": "x", "store": "y", "out": "z", "encoder": {} if schema is PretrainConfig else "e"},
            [word],
        )
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("score a b --samples 1000000000", "1000000000 is above 100,000"),
        ("compare a --with b --samples 100001", "100001 is above 100,000"),
        ("score a b --seed 99999999999", "99999999999 is above 4,294,967,295"),
        ("nearest a b --number 99999999999", "99999999999 is above 4,294,967,295"),
        ("score a b --samples -1", "-1 is below 0"),
    ],
)
def test_a_number_of_a_command_line_is_bounded_too(words, says, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(words.split())
    assert says in capsys.readouterr().err


BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{b}: &{b} [{','.join([f'*{a}'] * 9)}]\n" for a, b in itertools.pairwise("abcdefghij")
)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (BOMB, "more than 100,000 values"),
        ("a: &a [*a]\n", "nested deeper|not valid"),
        ("labels: " + "[" * 10_000 + "]" * 10_000, "nested deeper than 50"),
        ("labels: " + "[" * 60 + "]" * 60, "nested deeper than 50"),
        ("features: ${oc.env:HOME}\n", "reads no environment"),
        ("out: oc\nfeatures: ${${out}.env:HOME}\n", "reads no environment"),
        ("features: ${oc.decode:x}\n", "reads no environment"),
        ("- " * 10_000 + "x", "nested deeper than 50"),
        (f"seed: {'x' * 50_000_000}\n", "longer than 1,048,576 bytes"),
        (f"seed: {'x' * 5_000}\n", r"characters\)"),
    ],
    ids=["bomb", "itself", "deep", "deeper", "environment", "nested", "decode", "dashes", "large", "long"],
)
def test_a_config_that_somebody_sent_does_no_harm(tmp_path, text, says):
    path = tmp_path / "sent.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=says) as caught:
        load(ProbeConfig, path)
    assert max(map(len, str(caught.value).splitlines())) < 1000


def test_a_grid_of_very_many_combinations_is_refused(tmp_path):
    axes = {f"axis{i}": {f"choice{j}": {} for j in range(10)} for i in range(10)}
    with pytest.raises(UserError, match="`axes` are 10,000,000,000 combinations; wanted 10,000 or fewer"):
        load(GridConfig, {"out": "x", "steps": {"probe": ["probe", "y"]}, "axes": axes})


def test_tokens_and_addresses_may_be_long(tmp_path):
    given = {"mimic_iv": f"https://a.b/{'x' * 300}", "storage": {"https": {"token": "x" * 9000}}, "out": str(tmp_path)}
    assert load(FeaturesConfig, given).mimic_iv == given["mimic_iv"]


def test_a_key_may_copy_another(tmp_path):
    (tmp_path / "copy.yaml").write_text("features: f\nstore: s\nencoder: e\nout: ${features}/of:${encoder}\n")
    assert load(ProbeConfig, tmp_path / "copy.yaml").out == "f/of:e"
