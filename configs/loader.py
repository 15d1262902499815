"""Read a config: YAML file + `key=value` overrides -> a frozen, validated object of a pydantic schema.

Comes in: a schema (a subclass of `Settings`), a YAML path, overrides such as `ehr.groups=[sex,age]`.
Goes out: an instance of the schema; or one UserError that lists every fault, each with file, full key, nearest valid
key.
"""

from __future__ import annotations

import difflib
import os
import types
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ConfigDict, ValidationError


class UserError(ValueError):
    """A mistake that the user can mend: its message says what, where, and what to do. Commands exit with 2."""


class Settings(BaseModel):
    """The base of every config schema: unknown keys are refused and instances are frozen."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, validate_default=True)


S = TypeVar("S", bound=BaseModel)
WANTED = {  # in the words of YAML, where pydantic's are those of Python
    "missing": "is not given, and has no default",
    "path_type": "is a path; a name that reads as a number is written ./2024",
    "tuple_type": "is a list, such as [a, b]",
}


def load(schema: type[S], path: str | Path, overrides: Sequence[str] = ()) -> S:
    """Read and validate a config.

    Args:
        schema: a pydantic model; nested models are nested sections of the YAML.
        path: a YAML file.
        overrides: `key=value` each, dots between sections, the value written as in YAML; the last of two wins.
    Returns: an instance of `schema`.
    Raises: UserError: the file cannot be read, or any key or value is wrong; the message lists all faults.
    """
    merged = OmegaConf.create(_read(Path(path)))
    faults: list[str] = []
    given: set[str] = set()
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            faults.append(f"command line: `{override}` is not of the form key=value")
            continue
        try:
            value = OmegaConf.create(f"value: {text}" if text else "value: null").value
            OmegaConf.update(merged, key, value, merge=False, force_add=True)
        except (OmegaConfBaseException, yaml.YAMLError, ValueError, TypeError, AttributeError) as error:
            faults.append(f"command line: `{override}` cannot be read: {_first_line(error)}")
            continue
        given.add(key)
    try:
        data = typing.cast(dict[str, Any], OmegaConf.to_container(merged, resolve=True))
    except OmegaConfBaseException as error:
        raise UserError(f"{path}: {_first_line(error)}") from None

    data = _at_home(data)

    def where(key: str) -> str:
        return "command line" if any(key == g or key.startswith(g + ".") for g in given) else str(path)

    keys = list(_keys(schema))
    for key in _unknown(schema, data):
        faults.append(f"{where(key)}: unknown key `{key}`{_nearest(key, keys)}")
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


def _read(path: Path) -> DictConfig:
    try:
        with path.open("rb") as file:
            config = OmegaConf.create(file.read().decode("utf-8"))
    except FileNotFoundError:
        siblings = sorted(p.as_posix() for p in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
        near = difflib.get_close_matches(path.as_posix(), siblings, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]}?" if near else "; the shipped ones are in configs/"
        raise UserError(f"{path}: no such config file{hint}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not a text file (UTF-8); a config is a YAML file") from None
    except (yaml.YAMLError, OmegaConfBaseException, ValueError, RecursionError, AssertionError) as error:
        mark = getattr(error, "problem_mark", None)
        at = f" line {mark.line + 1}, column {mark.column + 1}:" if mark else ""
        problem = getattr(error, "problem", None) or _first_line(error)
        raise UserError(f"{path}:{at} not valid YAML: {problem}") from None
    if not isinstance(config, DictConfig) or not all(isinstance(key, str) for key in config):
        raise UserError(f"{path}: wanted `key: value` lines at the top, found something else")
    return config


def _at_home(value: Any) -> Any:
    """`~/` at the beginning of a path, as a shell reads it: no folder is to be called `~`."""
    if isinstance(value, dict):
        return {key: _at_home(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_at_home(inner) for inner in value]
    return os.path.expanduser(value) if isinstance(value, str) and value.startswith("~/") else value


def _models(annotation: Any) -> list[type[BaseModel]]:
    """The models in an annotation: `M`, `M | None`, `Annotated[M, ...]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if typing.get_origin(annotation) in (typing.Union, types.UnionType, typing.Annotated):
        return [model for part in typing.get_args(annotation) for model in _models(part)]
    return []


def _keys(schema: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Every valid key, with dots between sections."""
    for name, field in schema.model_fields.items():
        yield prefix + (field.alias or name)
        for model in _models(field.annotation):
            yield from _keys(model, f"{prefix}{name}.")


def _unknown(schema: type[BaseModel], data: dict[str, Any], prefix: str = "") -> Iterator[str]:
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


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
