"""The shipped YAMLs, the keys of the schemas, and the files generated from them."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from benchmarks.pages import SCHEMAS, generated
from configs import Settings, UserError, load, shipped
from configs.keys import keys, show
from finetune.config import FuseConfig, ProbeConfig
from pretrain.config import PretrainConfig

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "configs"
PATHS = sorted({*CONFIGS.rglob("*.yaml")} - {*CONFIGS.glob("presets/*")})
RUNS = [path for path in PATHS if not path.stem.startswith("grid_")]
PLACES = r"\s*(features|store|encoder|out|mimic_\w+|head|table|images|record_weights): \S+$"  # paths need no reason
RESOLVED = json.loads((Path(__file__).parent / "resolved.json").read_text(encoding="utf-8"))  # by release 0.2.0


def schema_of(path: Path) -> type[Settings]:
    return SCHEMAS[path.stem.partition("_")[0]]


def leaves(section: dict[str, Any]) -> Iterator[tuple[dict[str, Any], str]]:
    """Each key of a YAML file, with the section that holds it."""
    for key, value in section.items():
        if isinstance(value, dict) and key != "model_args":
            yield from leaves(value)
        else:
            yield section, key


def resolved(path: Path, given: dict[str, Any], folder: Path) -> dict[str, Any] | None:
    """The config of a YAML file's content; None where it is refused."""
    copy = folder / path.name
    copy.write_text(yaml.safe_dump(given), encoding="utf-8")
    try:
        return load(schema_of(path), copy).model_dump(mode="json")
    except UserError:
        return None


@pytest.mark.parametrize("path", RUNS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_a_shipped_yaml_repeats_no_default_of_schema_or_preset(path: Path, tmp_path: Path) -> None:
    given = yaml.safe_load(path.read_text(encoding="utf-8"))
    whole = resolved(path, given, tmp_path)
    for section, key in list(leaves(given)):
        value = section.pop(key)
        assert resolved(path, given, tmp_path) != whole, f"{path.name}: {key} repeats the default"
        section[key] = value


@pytest.mark.parametrize("path", RUNS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_a_shipped_yaml_gives_a_reason_beside_each_key_that_is_no_path(path: Path) -> None:
    for line in path.read_text(encoding="utf-8").splitlines():
        if re.match(r"\s*\w+: \S", line) and not re.match(PLACES, line):
            assert " # " in line, f"{path.name}: {line}"


def test_the_shipped_yamls_resolve_as_in_release_0_2_0() -> None:
    def kept(now: Any, then: Any) -> Any:
        return {key: kept(now[key], then[key]) for key in then} if isinstance(then, dict) else now

    for name, then in RESOLVED.items():
        now = load(schema_of(CONFIGS / name), CONFIGS / name).model_dump(mode="json")
        assert kept(now, then) == then, name  # keys that came later are not compared


def test_a_preset_runs_by_its_name_as_by_its_key() -> None:
    paths = ["features=features", "store=store", "out=runs/x"]
    by_name = load(PretrainConfig, shipped.find("presets/paper"), paths)
    by_key = load(PretrainConfig, {"preset": "paper"}, paths)
    assert by_name.model_dump() == by_key.model_dump() | {"preset": "default"}


@pytest.mark.parametrize("path", [*PATHS, *CONFIGS.glob("presets/*.yaml")], ids=lambda path: path.stem)
def test_the_first_line_of_a_yaml_names_the_schema_that_it_follows(path: Path) -> None:
    first = path.read_text(encoding="utf-8").splitlines()[0]
    named = re.fullmatch(r"# yaml-language-server: \$schema=(\S+)", first)
    assert named is not None
    schema = (path.parent / named[1]).resolve()
    assert schema.is_file() and schema.stem == (
        "preset" if path.parent.name == "presets" else path.stem.partition("_")[0]
    )
    jsonschema = pytest.importorskip("jsonschema")
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    validator = jsonschema.Draft202012Validator(json.loads(schema.read_text(encoding="utf-8")))
    assert not list(validator.iter_errors(content))
    assert list(validator.iter_errors(content | {"no_such_key": 1}))


@pytest.mark.parametrize("name", SCHEMAS)
def test_every_key_has_a_sentence_and_a_default_and_fits_the_screen(name: str) -> None:
    for key in keys(SCHEMAS[name]):
        assert re.fullmatch(r"\S.*\.", key.description), key
        assert key.is_section or key.default == "required" or key.default.startswith("default "), key
    assert max(map(len, show(SCHEMAS[name]).splitlines())) <= 100


@pytest.mark.parametrize(
    "words", [["ehr_features", "build"], ["ehr_features", "notes"], ["pretrain", "images"], ["pretrain", "train"],
              ["finetune", "probe"], ["finetune", "fuse"], ["finetune", "grid"]], ids=" ".join
)  # fmt: skip
def test_keys_are_printed_without_a_config_and_without_heavy_libraries(words: list[str]) -> None:
    code = f"import sys, runpy; sys.argv = {[words[0], words[1], '--keys']!r}\n"
    code += f"try: runpy.run_module({words[0] + '.__main__'!r}, run_name='__main__')\n"
    code += "finally: print([name for name in ('torch', 'pandas') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=os.environ)
    *lines, loaded = done.stdout.splitlines()
    assert done.returncode == 0 and loaded == "[]" and any(line.startswith("out: text") for line in lines), done.stderr


def test_what_is_generated_is_current() -> None:
    for path, text in generated().items():
        assert path.read_text(encoding="utf-8") == text, f"{path.name} is old: python -m benchmarks.pages"


@pytest.mark.parametrize(
    ("schema", "name", "word", "says"),
    [
        (PretrainConfig, "pretrain_vit_tiny", "precision=fp32", "fp32 is called `no` here"),
        (ProbeConfig, "probe_linear", "precision=16-mixed", "16-mixed is called `fp16` here"),
        (FuseConfig, "fuse_mortality", "precision=bfloat16", "bfloat16 is called `bf16` here"),
        (FuseConfig, "fuse_mortality", "precision=32", "32 is called `no` here"),
        (ProbeConfig, "probe_linear", "missing=zeros", "`missing` is now called `empty`"),
    ],
)
def test_a_word_of_before_is_refused_with_its_name_now(schema: type[Settings], name: str, word: str, says: str) -> None:
    with pytest.raises(UserError, match=re.escape(says)):
        load(schema, CONFIGS / f"{name}.yaml", [word])


def test_one_precision_has_one_word_in_all_commands() -> None:
    for name in ("pretrain_vit_tiny", "probe_nih", "fuse_mortality"):
        path = CONFIGS / f"{name}.yaml"
        for word in ("no", "bf16", "fp16"):
            assert load(schema_of(path), path, [f"precision={word}"]).model_dump()["precision"] == word


def test_a_key_that_is_given_wins_over_the_preset() -> None:
    path = CONFIGS / "pretrain_cxr_ehr_msn.yaml"
    config = load(PretrainConfig, path, ["optim.lr=0.5", "views.flip=0"])
    assert (config.optim.lr, config.views.flip, config.optim.batch_size, config.head.hidden) == (0.5, 0, 64, None)
