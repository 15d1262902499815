"""Damage that still parses: replace each node and column of what the commands read, and see what comes of it.

    python -m tests.hardening.structure OUT [--inputs 10000] [--seed 0] [--world FOLDER]

Input: an empty folder (a small hospital is made in it, unless --world has one). Output: a Markdown table: inputs by
file, how many were refused in one line that names the file, gave the undamaged result, gave another one with a warning,
were taken as the user's own words (in files that users write), or had another outcome: an exception, a message of
several lines, no answer in time, another result without a word.
Damage is a null, text, number, negative, NaN, huge number, list, object or nothing in the place of a node; keys left
out or twice; columns retyped, emptied, left out or twice; rows twice, reversed, swapped, cut.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import yaml

from configs import UserError
from ehr_features.typed.seal import forget
from pretrain.store.decode import BadFilm
from tests.hardening.fuzz import patience
from tests.hardening.kills import command_line
from tests.hardening.places import Place, places

VALUES = {
    "null": None,
    "text": "x7",
    "number": 3.5,
    "whole number": 2,
    "negative": -7,
    "NaN": float("nan"),
    "huge": 10**30,
    "list": [1],
    "object": {"x": 1},
    "empty text": "",
    "empty list": [],
    "empty object": {},
    "true": True,
    "10,000 levels": "@deep@",  # written as such: no writer of Python goes so deep
}
DEEP = "[" * 10_000 + "]" * 10_000
Node = tuple[str | int, ...]


# ---- JSON and YAML
def nodes(value: Any, at: Node = ()) -> Iterator[Node]:
    """The place of every node of a JSON value."""
    yield at
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in inner:
        yield from nodes(part, (*at, key))


class _Twice(dict[str, Any]):
    """An object that is written with one of its keys twice."""

    twice: str = ""

    def items(self) -> Any:
        return [*super().items(), (self.twice, self[self.twice])]


def damaged_value(value: Any, draw: random.Random) -> tuple[Any, str]:
    """A copy with one change, and the change in words."""
    value = copy.deepcopy(value)
    at = draw.choice(list(nodes(value)))
    part = value
    for key in at:
        holder, part = part, part[key]
    ways = list(VALUES)
    if at:
        ways += ["left out"] * 3 if isinstance(holder, dict) else ["left out"]
    if isinstance(part, list) and part:
        ways += ["rows twice", "reversed", "cut"] * 3
    if isinstance(part, dict) and part:
        ways += ["key twice"] * 3
    way = draw.choice(ways)
    words = f"{'.'.join(map(str, at)) or 'all'}: {way}"
    if way == "left out":
        del holder[at[-1]]
        return value, words
    if way == "key twice":
        new: Any = _Twice(part)
        new.twice = draw.choice(list(part))
    else:
        changed = {"rows twice": lambda: part + part, "reversed": lambda: part[::-1], "cut": lambda: part[:-1]}
        new = changed[way]() if way in changed else VALUES[way]
    if not at:
        return new, words
    holder[at[-1]] = new
    return value, words


def damaged_json(data: bytes, draw: random.Random) -> tuple[bytes, str]:
    value, words = damaged_value(json.loads(data), draw)
    return _deep(json.dumps(value, indent=draw.choice((None, 2)))), words


def _deep(text: str) -> bytes:
    return text.replace('"@deep@"', DEEP).replace("'@deep@'", DEEP).encode()


def damaged_lines(data: bytes, draw: random.Random) -> tuple[bytes, str]:
    lines = data.decode().splitlines()
    i = draw.randrange(len(lines))
    value, words = damaged_value(json.loads(lines[i]), draw)
    return _deep("\n".join([*lines[:i], json.dumps(value), *lines[i + 1 :], ""])), f"line {i + 1}: {words}"


def damaged_yaml(data: bytes, draw: random.Random) -> tuple[bytes, str]:
    value, words = damaged_value(yaml.safe_load(data), draw)
    if "twice" in words:  # JSON is YAML, and holds a key twice
        return json.dumps(value).encode(), words
    return _deep(yaml.safe_dump(value, sort_keys=False)), words


# ---- Tables
def damaged_table(table: pa.Table, draw: random.Random) -> tuple[pa.Table, str]:
    """A table with one change, and the change in words."""
    name = draw.choice(table.column_names)
    at, column, rows = table.column_names.index(name), table[name].combine_chunks(), len(table)
    ways = {**COLUMNS, **ROWS}
    way = draw.choice(list(ways))
    if way in ROWS:
        return ROWS[way](table, rows), way
    if way == "left out":
        return table.drop_columns([name]), f"{name}: {way}"
    if way == "twice":
        return table.append_column(name, column), f"{name}: {way}"
    if way == "renamed":
        return table.rename_columns([*table.column_names[:at], "x7", *table.column_names[at + 1 :]]), f"{name}: {way}"
    new = COLUMNS[way](column, draw)
    return table.set_column(at, name, new), f"{name}: {way}"


def _cell(value: Any) -> Callable[[pa.Array, random.Random], pa.Array]:
    """One cell replaced; the column takes the type that this needs."""

    def change(column: pa.Array, draw: random.Random) -> pa.Array:
        cells = column.to_pylist()
        cells[draw.randrange(len(cells))] = value
        try:
            return pa.array(cells, column.type)
        except (pa.ArrowException, ValueError, OverflowError, TypeError):
            with contextlib.suppress(pa.ArrowException, ValueError, OverflowError, TypeError):
                return pa.array(cells)
            return pa.array([None if cell is None else str(cell) for cell in cells])

    return change


def _all(kind: Any, value: Callable[[int], Any]) -> Callable[[pa.Array, random.Random], pa.Array]:
    return lambda column, draw: pa.array([value(i) for i in range(len(column))], kind)


def _cast(kind: pa.DataType) -> Callable[[pa.Array, random.Random], pa.Array]:
    def change(column: pa.Array, draw: random.Random) -> pa.Array:
        try:
            return pc.cast(column, kind)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
            return pa.nulls(len(column), kind)

    return change


def _swapped(column: pa.Array, draw: random.Random) -> pa.Array:
    order = np.arange(len(column))
    a, b = draw.randrange(len(column)), draw.randrange(len(column))
    order[[a, b]] = order[[b, a]]
    return column.take(pa.array(order))


COLUMNS: dict[str, Any] = {
    "left out": None,
    "twice": None,
    "renamed": None,
    "a null": _cell(None),
    "a text": _cell("x7"),
    "a number": _cell(3),
    "a negative": _cell(-7),
    "a NaN": _cell(float("nan")),
    "a huge number": _cell(1e30),
    "an infinite number": _cell(float("inf")),
    "an empty text": _cell(""),
    "all null": _all(None, lambda i: None),
    "all one number": _all(pa.int64(), lambda i: 1),
    "all NaN": _all(pa.float64(), lambda i: float("nan")),
    "all text": _all(pa.string(), lambda i: f"x{i}"),
    "all empty": _all(pa.string(), lambda i: ""),
    "all lists": _all(pa.list_(pa.int64()), lambda i: [i]),
    "all objects": _all(pa.struct([("x", pa.int64())]), lambda i: {"x": i}),
    "all true": _all(pa.bool_(), lambda i: True),
    "as text": _cast(pa.string()),
    "as numbers": _cast(pa.float64()),
    "as times": _cast(pa.timestamp("us")),
    "swapped": _swapped,
    "reversed": lambda column, draw: column[::-1],
}
ROWS: dict[str, Callable[[pa.Table, int], pa.Table]] = {
    "rows twice": lambda table, rows: pa.concat_tables([table, table]),
    "rows reversed": lambda table, rows: table.take(pa.array(range(rows)[::-1])),
    "no rows": lambda table, rows: table.slice(0, 0),
    "half of the rows": lambda table, rows: table.slice(0, rows // 2),
    "the first row twice": lambda table, rows: pa.concat_tables([table.slice(0, 1), table]),
}


def damaged_parquet(data: bytes, draw: random.Random) -> tuple[bytes, str]:
    table, words = damaged_table(pq.read_table(io.BytesIO(data)), draw)
    kept = {k: v for k, v in (table.schema.metadata or {}).items() if k != b"pandas"}  # as another writer leaves it
    file = io.BytesIO()
    pq.write_table(table.replace_schema_metadata(kept if draw.random() < 0.8 else table.schema.metadata), file)
    return file.getvalue(), words


def damaged_csv(data: bytes, draw: random.Random) -> tuple[bytes, str]:
    import pandas as pd

    frame = pd.read_csv(io.BytesIO(data), dtype=str, keep_default_na=False)
    table, words = damaged_table(pa.Table.from_pandas(frame, preserve_index=False), draw)
    columns = [["" if cell is None else str(cell) for cell in column.to_pylist()] for column in table.columns]
    rows = [table.column_names, *zip(*columns, strict=True)]
    return "".join(
        ",".join(f'"{cell}"' if "," in cell else cell for cell in row) + "\n" for row in rows
    ).encode(), words


def damaged_tensors(data: bytes, draw: random.Random) -> tuple[bytes, str]:
    from safetensors.numpy import load, save

    tensors = dict(load(data))
    name = draw.choice(sorted(tensors))
    value = tensors[name].copy()
    way = draw.choice(
        ("NaN", "infinite", "whole numbers", "half", "left out", "another name", "flat", "cut", "reversed")
    )
    if way == "left out":
        del tensors[name]
    elif way == "another name":
        tensors["x7"] = tensors.pop(name)
    elif way in ("NaN", "infinite"):
        value = value.astype(np.float32)
        value.reshape(-1)[:1] = np.nan if way == "NaN" else np.inf
        tensors[name] = value
    else:
        changed: dict[str, Callable[[], np.ndarray]] = {
            "whole numbers": lambda: value.astype(np.int32),
            "half": lambda: value.astype(np.float16),
            "flat": lambda: value.reshape(-1, 1),
            "cut": lambda: value[:-1] if value.ndim else value,
            "reversed": lambda: value[::-1] if value.ndim else value,
        }
        tensors[name] = np.ascontiguousarray(changed[way]())
    return save(tensors), f"{name}: {way}"


WAYS = {
    ".json": damaged_json,
    ".jsonl": damaged_lines,
    ".yaml": damaged_yaml,
    ".parquet": damaged_parquet,
    ".csv": damaged_csv,
    ".safetensors": damaged_tensors,
}


# ---- What comes of it
KINDS = ("refused", "same", "warned", "taken")


@dataclass(frozen=True)
class Undamaged:
    """A file as it was written, and what comes of it."""

    data: bytes
    result: str
    warnings: frozenset[str]


def undamaged(place: Place) -> Undamaged:
    result, warnings = _read(place)
    return Undamaged(place.path.read_bytes(), result, warnings)


def _read(place: Place) -> tuple[str, frozenset[str]]:
    """The result, and the warnings printed on the way."""
    said = io.StringIO()
    forget()  # which changed files were told before
    with patience(), contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        found = place.read()
    return found, frozenset(line for line in said.getvalue().splitlines() if "warning" in line.lower())


def outcome(place: Place, data: bytes, whole: Undamaged) -> tuple[str, str]:
    """`refused`, `same`, `warned`, `taken`, or a fault; and what was said."""
    place.path.write_bytes(data)
    try:
        found, warnings = _read(place)
    except (UserError, BadFilm) as error:
        text = str(error)
        if not text.strip() or ("\n" in text.strip() and "in the config:" not in text):  # its faults are all listed
            return "a message of several lines", text
        return ("refused" if place.path.name in text else "refused, the file is not named"), text
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        return "fault", f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:150]} {_where(error)}"
    finally:
        place.path.write_bytes(whole.data)
    if found == whole.result:
        return "same", ""
    if warnings - whole.warnings:
        return "warned", ""
    return ("another result without a word" if place.ours else "taken"), ""


def _where(error: BaseException) -> str:
    """The innermost line of ours in a traceback."""
    trace, at = error.__traceback__, ""
    while trace is not None:
        code = trace.tb_frame.f_code
        if any(f"/{room}/" in code.co_filename for room in ("configs", "ehr_features", "pretrain", "finetune")):
            at = f"{'/'.join(Path(code.co_filename).parts[-3:])}:{trace.tb_lineno}"
        trace = trace.tb_next
    return at


def torment(
    found: list[Place],
    inputs: int,
    seed: int,
    counts: dict[str, Counter[str]],
    *,
    told: Callable[[str], None] = print,
) -> None:
    """Damage the files in turn. `counts` takes the number of each outcome by file; faults are told as they happen."""
    wholes: dict[int, Undamaged] = {}
    for i in range(inputs):
        place = found[i % len(found)]
        if i % len(found) not in wholes:
            wholes[i % len(found)] = undamaged(place)
        whole = wholes[i % len(found)]
        data, words = WAYS[place.path.suffix](whole.data, random.Random(f"{seed}/{i}"))
        result, text = outcome(place, data, whole)
        counts.setdefault(place.name, Counter())[result] += 1
        if result not in KINDS:
            told(f"{result}: {place.name}, {words}: {text}")


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--inputs", type=int, default=10_000)
    parser.add_argument("--world", type=Path, help="the small hospital of an earlier call")
    parser.add_argument("--only", default="", help="files whose name holds this text")
    args = parser.parse_args()
    log = args.out / "structure.log"
    args.out.mkdir(parents=True, exist_ok=True)
    found = [place for place in places(args.out, args.world) if args.only in place.name]
    with log.open("w", encoding="utf-8") as file:
        counts: dict[str, Counter[str]] = {}
        with contextlib.suppress(KeyboardInterrupt):  # the table of the inputs until then
            torment(found, args.inputs, args.seed, counts, told=lambda line: print(line[:600], file=file, flush=True))
    print("| file | inputs | refused, file named | the undamaged result | a warning | taken | anything else |")
    print("|---|---|---|---|---|---|---|")
    rows: dict[str, Counter[str]] = {}
    for name, row in counts.items():
        for group in (re.split("[/,]", name)[0], "all"):
            rows[group] = rows.get(group, Counter()) + row
    for name in [*(name for name in rows if name != "all"), "all"]:
        row = rows[name]
        rest = [f"{what} ({n})" for what, n in row.items() if what not in KINDS]
        print(f"| {name} | {row.total()} | {' | '.join(str(row[k]) for k in KINDS)} | {'; '.join(rest) or 'none'} |")


if __name__ == "__main__":
    main()
