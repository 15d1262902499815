"""The typed reader of JSON, YAML and tables: what is not of its declared shape is refused in one line.

Shapes are data: `Shape` models for JSON and YAML (shapes.py here, pretrain/shapes.py, finetune/config/shapes.py), and
`schema.Column` for tables. A message names the file, the place, what was found and what was wanted. It holds no value
of a table, because that may be a patient's.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError
from safetensors import SafetensorError

from configs import UserError, first_line
from configs.loader import MOST_BYTES, PlainYaml
from ehr_features.schema import Column
from ehr_features.typed.seal import check_seal

DEEPEST = 50  # levels of a JSON file
LARGEST = 2**63  # of a whole number
SHOWN = 60  # characters of a value in a message


class Shape(BaseModel):
    """The base of the shapes: types are exact, numbers are finite, keys of other versions are kept."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False, frozen=True)


# ---- JSON and YAML


def read_json(path: str | Path, shape: Any = dict[str, Any]) -> Any:
    """Read JSON.

    Args:
        shape: a `Shape`, or any type that pydantic checks; an object if not given.
    Returns: the file's plain value, which has that shape.
    Raises: UserError: absent, damaged, nested too deep, a key twice, or of another shape.
    """
    value = checked(json_of(text_of(path), path), shape, path)
    check_seal(path)
    return value


def read_yaml(path: str | Path, shape: Any = dict[str, Any]) -> Any:
    """Read YAML that a command wrote, e.g. a run's config.yaml; as `read_json`."""
    text = text_of(path)
    if len(text) > MOST_BYTES:
        raise UserError(f"{path}: longer than {MOST_BYTES:,} characters; wanted some lines of YAML")
    try:
        value = yaml.load(text, PlainYaml)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        at = f"line {mark.line + 1}: " if mark else ""
        raise UserError(f"{path}: {at}not valid YAML: {getattr(error, 'problem', None) or first_line(error)}") from None
    checked(value, shape, path)
    check_seal(path)
    return value


def read_lines(path: str | Path, shape: Any = dict[str, Any]) -> list[Any]:
    """Read JSON lines; the last one may be cut short by a kill. Raises: UserError: as `read_json`."""
    lines = [(i, line) for i, line in enumerate(text_of(path).splitlines(), 1) if line.strip()]
    found = []
    for i, line in lines:
        try:
            found.append(checked(json_of(line, f"{path}, line {i}"), shape, f"{path}, line {i}"))
        except _Cut:
            if i != lines[-1][0]:
                raise
    check_seal(path)
    return found


def text_of(path: str | Path) -> str:
    """The text of a file. Raises: UserError: absent, or no text."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise UserError(f"{path}: a folder, wanted a file") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not a text file ({error}); was it copied whole?") from None


class _Cut(UserError):
    """The text is no JSON."""


def json_of(text: str, path: str | Path) -> Any:
    """The value of a JSON text. Raises: UserError: as `read_json`."""
    try:
        value = json.loads(
            text, object_pairs_hook=_distinct, parse_constant=_refused, parse_float=_finite, parse_int=_bounded
        )
    except RecursionError:
        raise UserError(f"{path}: nested deeper than {DEEPEST} levels") from None
    except json.JSONDecodeError as error:
        raise _Cut(f"{path}: not valid JSON ({error}); was it copied whole?") from None
    except _Odd as error:
        raise UserError(f"{path}: {error}; was it copied whole?") from None
    if _deeper(value):
        raise UserError(f"{path}: nested deeper than {DEEPEST} levels")
    if "\\u" in text and not _printable(value):
        raise UserError(f"{path}: a text in it holds characters that are none (half a surrogate pair, or NUL)")
    return value


class _Odd(ValueError):
    """A value that JSON allows and our files never hold."""


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        keys = [key for key, _ in pairs]
        raise _Odd(f"the key `{next(key for key in keys if keys.count(key) > 1)[:SHOWN]}` stands twice")
    return found


def _refused(word: str) -> float:
    raise _Odd(f"got {word}, wanted a finite number")


def _finite(word: str) -> float:
    if not math.isfinite(number := float(word)):
        raise _Odd(f"got the number {word[:SHOWN]}, which is too large")
    return number


def _bounded(word: str) -> int:
    if len(word) > 20 or not -LARGEST <= (number := int(word)) < LARGEST:
        raise _Odd(f"got a number of {len(word)} digits, which is too large")
    return number


def _deeper(value: Any) -> bool:
    """Whether a value is nested deeper than `DEEPEST` levels."""
    level = [value]
    for _ in range(DEEPEST + 1):
        inner: list[Any] = []
        for one in level:
            inner += one.values() if isinstance(one, dict) else one if isinstance(one, list) else ()
        level = [one for one in inner if isinstance(one, (dict, list))]
        if not level:
            return False
    return True


def _printable(value: Any) -> bool:
    text = json.dumps(value, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return "\\u0000" not in text


@functools.cache
def _adapter(shape: Any) -> TypeAdapter[Any]:
    return TypeAdapter(shape)


def checked(value: Any, shape: Any, path: str | Path) -> Any:
    """The value itself. Raises: UserError: it has another shape; one line names the first place."""
    try:
        _adapter(shape).validate_python(value, strict=True)
    except ValidationError as error:
        fault = error.errors()[0]
        place = ".".join(str(part) for part in fault["loc"])
        if fault["type"] == "missing":
            raise UserError(f"{path}: `{place}` is missing; was it copied whole?") from None
        at = f"`{place}`: " if place else ""
        raise UserError(f"{path}: {at}got {got(fault['input'])}, wanted {_wanted(fault)}") from None
    return value


def _wanted(fault: Any) -> str:
    context = fault.get("ctx", {})
    match fault["type"].removesuffix("_type"):
        case "int":
            return "a whole number"
        case "float":
            return "a number"
        case "string":
            return "text"
        case "bool":
            return "true or false"
        case "list":
            return "a list"
        case "dict" | "model" | "model_attributes":
            return "an object"
        case "finite_number":
            return "a finite number"
        case "literal_error":
            return str(context["expected"])
        case "greater_than_equal":
            return f"{context['ge']} or more"
        case "greater_than":
            return f"more than {context['gt']}"
        case "less_than_equal":
            return f"{context['le']} or less"
        case "less_than":
            return f"less than {context['lt']}"
        case "too_short":
            return f"{context['min_length']} or more of them"
        case "string_too_short":
            return "a text that is not empty"
        case _:
            return str(fault["msg"]).removeprefix("Value error, ").removeprefix("Input should be ")


def got(value: Any) -> str:
    """A value of JSON in a message."""
    if value is None:
        return "null"
    if isinstance(value, dict):
        return f"an object of {len(value)} keys"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    text = repr(value) if isinstance(value, str) else str(value).lower()
    text = text if len(text) <= SHOWN else f"{text[:SHOWN]} ..."
    return f"the text {text}" if isinstance(value, str) else text


# ---- Tables

KINDS: dict[str, tuple[str, Any]] = {  # a declared type -> its name in a message, and whether an Arrow type suits it
    "int64": ("whole numbers", lambda kind: pa.types.is_integer(kind) or pa.types.is_floating(kind)),
    "float64": ("numbers", lambda kind: pa.types.is_integer(kind) or pa.types.is_floating(kind)),
    "string": ("text", lambda kind: pa.types.is_string(kind) or pa.types.is_large_string(kind)),
    "id": ("ids", lambda kind: not pa.types.is_nested(kind) and not pa.types.is_boolean(kind)),
    "timestamp": ("times", pa.types.is_timestamp),
    "date": ("dates", lambda kind: pa.types.is_date(kind) or pa.types.is_timestamp(kind)),
    "boolean": ("true or false", pa.types.is_boolean),
    "list": ("lists", pa.types.is_list),
}


# What pandas, pyarrow and safetensors raise on damaged bytes; some come from pandas' metadata in the file
UNREADABLE = (OSError, EOFError, ValueError, LookupError, TypeError, AttributeError, pa.ArrowException, SafetensorError)


@contextlib.contextmanager
def undamaged(path: str | Path, advice: str) -> Iterator[None]:
    """Name a Parquet or safetensors file that cannot be read, or that changed since it was written (a warning).

    Raises: UserError.
    """
    try:
        yield
        check_seal(path)
    except UserError:
        raise
    except UNREADABLE as error:
        kind = "safetensors" if str(path).endswith(".safetensors") else "Parquet"
        raise UserError(f"{path}: damaged {kind} file ({first_line(error)}); {advice}") from None


def read_parquet(
    path: str | Path,
    declared: Mapping[str, Column],
    advice: str,
    *,
    names: Sequence[str] | Callable[[list[str]], Sequence[str]],
    more: bool = False,
    values: bool = True,
) -> pd.DataFrame:
    """Read a Parquet table.

    Args:
        declared: what its columns hold. advice: what to do about a damaged one.
        names: columns that it must have, or a function of those that it has. more: read its other columns too.
        values: check them too, not only their types.
    Raises: UserError: damaged, a column that is absent or of another type, a value that its column may not hold.
    """
    with undamaged(path, advice):
        there = _columns(path, declared, advice, names)
        table = pd.read_parquet(path, columns=None if more else there)
    if not values:
        return table
    check_values(table, declared, path, advice)
    floats = [name for name, column in declared.items() if column.type == "int64" and name in table]
    floats = [name for name in floats if table[name].dtype.kind == "f" and table[name].notna().all()]
    for name in floats:  # as another writer left them
        table[name] = table[name].astype("int64")
    return table


def read_arrow(path: str | Path, declared: Mapping[str, Column], advice: str, names: Sequence[str]) -> pa.Table:
    """As `read_parquet`, without its check of values, as an Arrow table: whole numbers with gaps stay whole."""
    with undamaged(path, advice):
        return pq.read_table(path, columns=_columns(path, declared, advice, names))


def check_parquet(path: str | Path, declared: Mapping[str, Column], advice: str, names: Sequence[str]) -> None:
    """Refuse a table by its columns, as `read_parquet` does; no row is read. Raises: UserError."""
    with undamaged(path, advice):
        _columns(path, declared, advice, names)


def _columns(
    path: str | Path,
    declared: Mapping[str, Column],
    advice: str,
    names: Sequence[str] | Callable[[list[str]], Sequence[str]],
) -> list[str]:
    """The names, which are all there, of their types. Raises: UserError."""
    kinds = pq.read_schema(path)
    check_types(kinds, declared, path, advice)
    wanted = list(names(kinds.names) if callable(names) else names)
    if missing := [name for name in wanted if name not in kinds.names]:
        found = ", ".join(kinds.names) or "none"
        raise UserError(f"{path}: columns missing: {', '.join(missing)}; found {found}; {advice}")
    return wanted


def check_types(kinds: pa.Schema, columns: Mapping[str, Column], path: str | Path, advice: str) -> None:
    """Refuse a table whose columns are of another type than declared, or stand in it twice. Raises: UserError."""
    names = kinds.names
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"{path}: two columns are called `{twice}`; {advice}")
    for name in names:
        if name not in columns or pa.types.is_null(kind := _plain(kinds.field(name).type)):
            continue
        wanted, suits = KINDS[columns[name].type.partition("<")[0]]
        if not suits(kind):
            raise UserError(f"{path}: column `{name}`: got {kind}, wanted {wanted}; {advice}")


def _plain(kind: pa.DataType) -> pa.DataType:
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def check_values(table: pd.DataFrame, columns: Mapping[str, Column], path: str | Path, advice: str) -> None:
    """Refuse a value that its column may not hold: an absent or repeated id, a number out of range, an unknown word.

    Raises: UserError: it names the first row, counted from 1, and never the value.
    """
    for name, column in columns.items():
        if name not in table:
            continue
        for bad, wanted in _faults(table[name], column):
            if (rows := np.flatnonzero(bad)).size:
                some = f"{len(rows)} rows, the first row {rows[0] + 1}" if len(rows) > 1 else f"row {rows[0] + 1}"
                raise UserError(f"{path}: column `{name}`, {some}: wanted {wanted}; {advice}")


def _faults(values: pd.Series, column: Column) -> Iterable[tuple[np.ndarray, str]]:
    """(rows that break a rule, the rule) for each rule of a column."""
    absent = values.isna().to_numpy()
    if not column.null:
        yield absent, "a value in every row"
    if column.type in ("int64", "float64") and len(values) > absent.sum():
        numbers = values.to_numpy(np.float64, na_value=np.nan) if values.dtype.kind not in "iu" else values.to_numpy()
        yield np.isinf(numbers), "finite numbers"
        if column.type == "int64" and numbers.dtype.kind == "f":
            yield ~absent & (np.floor(numbers) != numbers), "whole numbers"
        if column.low is not None:
            yield ~absent & (numbers < column.low), f"{column.low:g} or more"
        if column.high is not None:
            yield ~absent & (numbers > column.high), f"{column.high:g} or less"
    if column.among:
        yield ~absent & ~values.isin(column.among).to_numpy(), f"one of {', '.join(map(str, column.among))}"
    if column.type == "string" and not column.null:
        yield (values == "").to_numpy(bool), "a text that is not empty"
    if column.unique:
        yield ~absent & values.duplicated().to_numpy(), "each value once"


def check_keys(table: pd.DataFrame, keys: Sequence[str], path: str | Path, advice: str) -> None:
    """Refuse two rows with the same keys. Raises: UserError."""
    if (twice := np.flatnonzero(table.duplicated(list(keys)).to_numpy())).size:
        raise UserError(
            f"{path}: {len(twice)} rows have the {', '.join(keys)} of an earlier row, the first is row "
            f"{twice[0] + 1}; wanted each once; {advice}"
        )
