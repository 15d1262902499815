"""Read a config: YAML file + `key=value` overrides -> a frozen, validated object of a pydantic schema.

Input: a schema (a subclass of `Settings`), a YAML path, overrides such as `ehr.groups=[sex,age]`.
Output: an instance of the schema; or one UserError that lists every fault, each with file, full key, nearest valid
key.
"""

from __future__ import annotations

import difflib
import functools
import os
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, TypeVar

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf._utils import get_yaml_loader
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

from configs import shipped

LONGEST, KEPT = 1000, 300  # characters of a line of an error; a longer one holds a value, of which the start is kept


class UserError(ValueError):
    """A mistake that the user can mend: its message says what, where, and what to do. Commands exit with 2."""

    def __init__(self, message: object = "") -> None:
        super().__init__("\n".join(_cut(line) for line in str(message).split("\n")))


def _cut(line: str) -> str:
    return line if len(line) <= LONGEST else f"{line[:KEPT]} ... ({len(line):,} characters)"


class BooleanWord(str):
    """A plain `yes`, `no`, `on`, `off`, `true` or `false` of a YAML file, before the field's type says what it is."""


MOST_BYTES, MOST_VALUES, DEEPEST = 2**20, 100_000, 50  # of a YAML file; values: with its aliases written out


class _Bounded(yaml.SafeLoader):
    """A file of very many values or levels is refused before any alias is written out."""

    def add_indent(self, column: int) -> bool:
        self._refuse_depth()
        return bool(super().add_indent(column))

    def fetch_flow_collection_start(self, token: type[yaml.Token]) -> None:
        self._refuse_depth()
        super().fetch_flow_collection_start(token)

    def _refuse_depth(self) -> None:
        if self.flow_level + len(self.indents) > DEEPEST:
            raise yaml.scanner.ScannerError(None, None, f"nested deeper than {DEEPEST} levels", self.get_mark())

    def get_single_node(self) -> yaml.Node | None:
        node: yaml.Node | None = super().get_single_node()
        if node is not None and _values(node, {}) > MOST_VALUES:
            says = f"more than {MOST_VALUES:,} values, with its aliases written out"
            raise yaml.composer.ComposerError(None, None, says, node.start_mark)
        return node


class Yaml(_Bounded, get_yaml_loader()):  # type: ignore[misc]
    """OmegaConf's YAML (1e-3 is a number, a key stands once), in which boolean words stay words."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> Any:
        for key, _ in node.value:
            key.tag = key.tag.replace(":bool", ":str")
        return super().construct_mapping(node, deep=deep)


class PlainYaml(_Bounded):
    """YAML as `yaml.safe_dump` writes it; a key stands once."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> Any:
        found = super().construct_mapping(node, deep=deep)
        if len(found) != len(node.value):
            says = f"a key stands twice among {', '.join(map(str, list(found)[:5]))}"
            raise yaml.constructor.ConstructorError(None, None, says, node.start_mark)
        return found


def _values(node: yaml.Node, counted: dict[int, int], level: int = 0) -> int:
    """The number of values of a node. Raises: yaml.YAMLError: nested too deep, as an alias of itself is."""
    if level > DEEPEST:
        says = f"nested deeper than {DEEPEST} levels"
        raise yaml.composer.ComposerError(None, None, says, node.start_mark)
    if id(node) not in counted:
        inner = [part for pair in node.value for part in pair] if isinstance(node, yaml.MappingNode) else node.value
        own = 0 if isinstance(node, yaml.ScalarNode) else sum(_values(part, counted, level + 1) for part in inner)
        counted[id(node)] = 1 + own
    return counted[id(node)]


Yaml.add_constructor("tag:yaml.org,2002:bool", lambda _, node: BooleanWord(node.value))


Seed = Annotated[int, Field(ge=0, lt=2**32)]  # what NumPy takes
Beta = Annotated[float, Field(ge=0, lt=1)]


class Settings(BaseModel):
    """The base of every config schema: unknown keys are refused, instances are frozen, each key has a description."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, validate_default=True)
    renamed: ClassVar[dict[str, str]] = {}  # a key of an earlier release -> its name now

    @field_validator("*", mode="before")
    @classmethod
    def _boolean_words(cls, value: Any, info: ValidationInfo) -> Any:
        """A text field gets the word as it was typed, a bool field reads it, and a field of any type gets the bool."""
        types = _leaves(cls.model_fields[info.field_name or ""].annotation)
        return _resolved(value, as_bool=bool in types if str in types else Any in types)


RESOLVER = re.compile(r"\$\{[^}]*(?::|\$\{)")
S = TypeVar("S", bound=Settings)
Given = Mapping[str, Any] | str | Path  # what a config is made of
WANTED = {  # in the words of YAML, where pydantic's are those of Python
    "missing": "is not given, and has no default",
    "path_type": "is a path; a name that reads as a number is written ./2024",
    "tuple_type": "is a list, such as [a, b]",
}


def load(schema: type[S], path: S | Given, overrides: Sequence[str] = ()) -> S:
    """Read and validate a config.

    Args:
        schema: a pydantic model; nested models are nested sections of the YAML.
        path: a YAML file, the name of a shipped one (`demo/features`), a dict of keys, or an instance.
        overrides: `key=value` each, dots between sections, the value written as in YAML; the last of two wins.
    Returns: an instance of `schema`.
    Raises: UserError: the file cannot be read, or any key or value is wrong; the message lists all faults.
    """
    if isinstance(path, BaseModel):
        if isinstance(path, schema) and not overrides:
            return path
        path = path.model_dump()
    if isinstance(path, Mapping):
        merged, path = OmegaConf.create(dict(path), flags={"allow_objects": True}), "the dict"
    else:
        merged = _read(shipped.find(path))
    faults: list[str] = []
    given: set[str] = set()
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            faults.append(f"command line: `{override}` is not of the form key=value")
            continue
        try:
            value = yaml.load(f"value: {text}" if text else "value: null", Yaml)["value"]
            OmegaConf.update(merged, key, value, merge=False, force_add=True)
        except (OmegaConfBaseException, yaml.YAMLError, ValueError, TypeError, AttributeError) as error:
            faults.append(f"command line: `{override}` cannot be read: {first_line(error)}")
            continue
        given.add(key)
    try:
        _refuse_resolvers(OmegaConf.to_container(merged, resolve=False), path)
        data = typing.cast(dict[str, Any], OmegaConf.to_container(merged, resolve=True))
    except OmegaConfBaseException as error:
        raise UserError(f"{path}: {first_line(error)}") from None

    data = _at_home(data)

    def where(key: str) -> str:
        return "command line" if any(key == g or key.startswith(g + ".") for g in given) else str(path)

    keys, renamed = list(_keys(schema)), dict(_renamed(schema))
    faults += [f"{where(key)}: `{key}` {says}" for key, says in _too_long(data)]
    for key in _unknown(schema, data):
        says = (
            f"`{key}` is now called `{renamed[key]}`" if key in renamed else f"unknown key `{key}`{_nearest(key, keys)}"
        )
        faults.append(f"{where(key)}: {says}")
    try:
        config = schema.model_validate(data)
    except ValidationError as error:
        for fault in error.errors():
            in_list = any(isinstance(part, int) for part in fault["loc"])
            if fault["type"] == "extra_forbidden" and not in_list:  # named above, with the nearest key
                continue
            key = ".".join(str(part) for part in fault["loc"] if not str(part).startswith("function-"))
            says = WANTED.get(fault["type"]) or fault["msg"].removeprefix("Value error, ")
            missing = fault["type"] == "missing"
            got = "" if missing or not key or isinstance(fault["input"], dict) else f", got {fault['input']!r}"
            faults.append(f"{where(key)}: `{key}` {says}{got}" if key else f"{path}: {says}")
        config = None
    if faults or config is None:
        count = "1 fault" if len(faults) == 1 else f"{len(faults)} faults"
        raise UserError(f"{count} in the config:\n" + "\n".join(f"  {fault}" for fault in dict.fromkeys(faults)))
    return config


@functools.cache
def fragment(preset: str) -> dict[str, Any]:
    """The keys of a shipped preset, configs/presets/PRESET.yaml."""
    path = Path(__file__).parent / "presets" / f"{preset}.yaml"
    given: dict[str, Any] = yaml.load(path.read_text(encoding="utf-8"), Yaml)
    return given


def _read(path: Path) -> DictConfig:
    try:
        with path.open("rb") as file:
            text = file.read(MOST_BYTES + 1)
        if len(text) > MOST_BYTES:
            raise UserError(f"{path}: longer than {MOST_BYTES:,} bytes; wanted a config, which is some lines of YAML")
        given = yaml.load(text.decode("utf-8"), Yaml)
        given = {} if given is None else given
        config = OmegaConf.create(given, flags={"allow_objects": True}) if isinstance(given, dict) else None
    except FileNotFoundError:
        raise UserError(f"{path}: no such config file{shipped.hint(path)}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not a text file (UTF-8); a config is a YAML file") from None
    except (yaml.YAMLError, OmegaConfBaseException, ValueError, RecursionError, AssertionError) as error:
        mark = getattr(error, "problem_mark", None)
        at = f" line {mark.line + 1}, column {mark.column + 1}:" if mark else ""
        problem = getattr(error, "problem", None) or first_line(error)
        raise UserError(f"{path}:{at} not valid YAML: {problem}") from None
    if config is None or not all(isinstance(key, str) for key in config):
        raise UserError(f"{path}: wanted `key: value` lines at the top, found something else")
    return config


def _refuse_resolvers(value: Any, path: S | Given) -> None:
    """`${other.key}` copies a value of the file; `${oc.env:HOME}` and the like read what is not in it."""
    for part in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        _refuse_resolvers(part, path)
    if isinstance(value, str) and (found := RESOLVER.search(value)):
        raise UserError(f"{path}: `{found[0]}`: a config reads no environment; only ${{other.key}} is filled in")


MOST_TEXT, MOST_NAME, MOST_ITEMS = 4096, 255, 1000  # characters of a text, bytes of a file's name, items of a list


def _too_long(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """(key, what is wrong) of each text and list that no config of ours can mean."""
    if isinstance(value, (dict, list)):
        if len(value) > MOST_ITEMS:
            yield key, f"has {len(value):,} items; wanted {MOST_ITEMS:,} or fewer"
            return
        for name, part in value.items() if isinstance(value, dict) else ():
            yield from _too_long(part, f"{key}.{name}" if key else str(name))
        for part in value if isinstance(value, list) else ():
            yield from _too_long(part, key)
    elif isinstance(value, str) and not key.startswith("storage."):  # which holds keys and tokens
        if len(value) > MOST_TEXT:
            yield key, f"has {len(value):,} characters; wanted {MOST_TEXT:,} or fewer"
        elif "://" not in value and (part := max(value.split("/"), key=len)) and len(part.encode()) > MOST_NAME:
            yield key, f"has {len(part):,} characters in one name; no file has a name above {MOST_NAME}"


def _resolved(value: Any, *, as_bool: bool) -> Any:
    """The boolean words in a value, as booleans or as plain text."""
    if isinstance(value, dict):
        return {key: _resolved(inner, as_bool=as_bool) for key, inner in value.items()}
    if isinstance(value, list):
        return [_resolved(inner, as_bool=as_bool) for inner in value]
    if not isinstance(value, BooleanWord):
        return value
    return yaml.SafeLoader.bool_values[value.lower()] if as_bool else str(value)


def _leaves(annotation: Any) -> set[Any]:
    """The scalar types that a field takes, also inside its lists and as the values of its mappings."""
    inner = typing.get_args(annotation)
    if typing.get_origin(annotation) is typing.Literal:
        return {type(value) for value in inner}
    if typing.get_origin(annotation) in (dict, typing.Annotated):
        inner = inner[-1:] if typing.get_origin(annotation) is dict else inner[:1]
    return {leaf for part in inner for leaf in _leaves(part)} if inner else {annotation}


def _at_home(value: Any) -> Any:
    """`~/` at the beginning of a path, as a shell reads it: no folder is to be called `~`."""
    if isinstance(value, dict):
        return {key: _at_home(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_at_home(inner) for inner in value]
    if isinstance(value, Path):
        return str(value)
    return os.path.expanduser(value) if isinstance(value, str) and value.startswith("~/") else value


def _models(annotation: Any) -> list[type[Settings]]:
    """The models in an annotation: `M`, `M | None`, `Annotated[M, ...]`."""
    if isinstance(annotation, type) and issubclass(annotation, Settings):
        return [annotation]
    if typing.get_origin(annotation) in (typing.Union, types.UnionType, typing.Annotated):
        return [model for part in typing.get_args(annotation) for model in _models(part)]
    return []


def _keys(schema: type[Settings], prefix: str = "") -> Iterator[str]:
    """Every valid key, with dots between sections."""
    for name, field in schema.model_fields.items():
        yield prefix + (field.alias or name)
        for model in _models(field.annotation):
            yield from _keys(model, f"{prefix}{name}.")


def _renamed(schema: type[Settings], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Keys of earlier releases and their names now, with dots between sections."""
    yield from ((prefix + old, prefix + new) for old, new in schema.renamed.items())
    for name, field in schema.model_fields.items():
        for model in _models(field.annotation):
            yield from _renamed(model, f"{prefix}{name}.")


def _unknown(schema: type[Settings], data: dict[str, Any], prefix: str = "") -> Iterator[str]:
    fields = {field.alias or name: field for name, field in schema.model_fields.items()}
    for key, value in data.items():
        if key not in fields:
            yield f"{prefix}{key}"
        elif isinstance(value, dict) and (models := _models(fields[key].annotation)):
            faults = [list(_unknown(model, value, f"{prefix}{key}.")) for model in models]
            yield from min(faults, key=len)


def _nearest(key: str, keys: Sequence[str]) -> str:
    """`; did you mean ...?` by the full key, else by its last part anywhere in the schema."""
    near = difflib.get_close_matches(key, keys, n=1, cutoff=0.6)
    if not near:
        last = {k: k.rpartition(".")[2] for k in keys}
        names = difflib.get_close_matches(key.rpartition(".")[2], list(last.values()), n=1, cutoff=0.6)
        near = [k for k, name in last.items() if names and name == names[0]]
    if near:
        return f"; did you mean `{near[0]}`?"
    section = key.rpartition(".")[0]
    valid = [k for k in keys if k.rpartition(".")[0] == section]
    return f"; valid keys here: {', '.join(valid)}" if valid else ""


def first_line(error: Exception) -> str:
    """The first line of an error's message, or the name of its class where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
