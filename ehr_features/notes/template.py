"""Parse a note's template and render it as an ibis expression.

The format is in template.txt. A template is data: fields are looked up by name in a fixed list, nothing is
evaluated.
"""

from __future__ import annotations

import difflib
import functools
import operator
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ibis
import ibis.expr.types as ir

from configs import UserError

SHIPPED = Path(__file__).with_name("template.txt")
SECTION = re.compile(r"\[(\w+)\]")
FIELD = re.compile(r"\{([^{}]*)\}")


@dataclass(frozen=True)
class Part:
    """Alternating texts and fields: texts[0] {fields[0]} texts[1] ..."""

    texts: tuple[str, ...]
    fields: tuple[str, ...]


@dataclass(frozen=True)
class Line:
    """A row: required parts, and lists of alternatives of which one is required."""

    items: tuple[Part | tuple[Part, ...], ...]

    @property
    def parts(self) -> list[Part]:
        return [part for item in self.items for part in (item if isinstance(item, tuple) else (item,))]


Template = dict[str, tuple[Line, ...]]  # section -> its lines


def read_template(path: Path | None, known: Collection[str]) -> Template:
    """Read a template.

    Args:
        path: of the file; None: the shipped one. known: the valid fields.
    Raises: UserError: no such file, no section, an unknown field, an unbalanced bracket or brace; all faults at once,
        each with file and line.
    """
    path = path or SHIPPED
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: the template cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: the template is not a text file (UTF-8)") from None
    sections: dict[str, list[Line]] = {}
    faults: list[str] = []
    for number, row in enumerate(text.splitlines(), 1):
        row, where = row.strip(), f"{path}, line {number}"
        if not row or row.startswith("#"):
            continue
        if named := SECTION.fullmatch(row):
            if named[1] in sections:
                faults.append(f"{where}: section [{named[1]}] occurs twice")
            sections[named[1]] = []
        elif not sections:
            faults.append(f"{where}: text before the first section; begin with a line such as [person]")
        else:
            line, wrong = _line(row, known)
            faults += [f"{where}: {fault}" for fault in wrong]
            sections[next(reversed(sections))].append(line)
    if not faults and not any(sections.values()):
        faults.append(f"{path}: the template has no section with a line; see the shipped one, {SHIPPED.name}")
    if faults:
        raise UserError("\n  ".join([f"{len(faults)} faults in the template:" if faults[1:] else "template:", *faults]))
    return {name: tuple(lines) for name, lines in sections.items() if lines}


def _line(row: str, known: Collection[str]) -> tuple[Line, list[str]]:
    """A row as a line, and its faults."""
    items: list[Part | tuple[Part, ...]] = []
    faults: list[str] = []
    for k, piece in enumerate(re.split(r"\[([^\[\]]*)\]", row)):  # text, inside of brackets, text, ...
        if k % 2 == 0 and not piece:
            continue
        parts = tuple(_part(text.strip() if k % 2 else text) for text in (piece.split("|") if k % 2 else [piece]))
        left = "".join(text for part in parts for text in part.texts)
        faults += [f"`{c}` without its partner" for c in "[]{}" if c in left]
        faults += [_unknown(name, known) for part in parts for name in part.fields if name not in known]
        items.append(parts if k % 2 else parts[0])
    line = Line(tuple(items))
    if not any(part.fields for part in line.parts):
        faults.append("no {field}: a constant line tells nothing about a patient")
    faults += [
        f"the part `{part.texts[0]}` in brackets has no {{field}}, so it would always be printed"
        for item in items
        if isinstance(item, tuple)
        for part in item
        if not part.fields
    ]
    return line, faults


def _part(text: str) -> Part:
    pieces = FIELD.split(text)
    return Part(tuple(pieces[::2]), tuple(name.strip() for name in pieces[1::2]))


def _unknown(name: str, known: Collection[str]) -> str:
    near = difflib.get_close_matches(name, list(known), 1)
    hint = f"; did you mean {{{near[0]}}}?" if near else ""
    return f"unknown field {{{name}}}{hint} Known: {', '.join(sorted(known))}"


def fields_of(template: Template) -> list[str]:
    """The fields that a template uses, each once."""
    lines = [line for lines in template.values() for line in lines]
    return list(dict.fromkeys(name for line in lines for part in line.parts for name in part.fields))


def render(template: Template, facts: ir.Table) -> ir.Table:
    """Put facts into a template.

    Args:
        facts: a column for each field that the template uses: the fact as text, null where it is missing.
    Returns: the same rows with a column `section_NAME` for each section (null if all its lines are empty), and
        `shown_FIELD` for each field: whether the note contains it.
    """
    lines = [(section, line) for section, several in template.items() for line in several]
    facts = facts.mutate(**{f"line_{i}": _render_line(line, facts) for i, (_, line) in enumerate(lines)})
    texts, shown = {}, {}
    for section in template:
        own = [facts[f"line_{i}"] for i, (name, _) in enumerate(lines) if name == section]
        texts[f"section_{section}"] = ibis.literal(" ").join(own).nullif("")
    for field in fields_of(template):
        uses = [(i, part) for i, (_, line) in enumerate(lines) for part in line.parts if field in part.fields]
        there = [
            functools.reduce(operator.and_, [facts[f"line_{i}"].notnull(), *(facts[f].notnull() for f in part.fields)])
            for i, part in uses
        ]
        shown[f"shown_{field}"] = functools.reduce(operator.or_, there)
    return facts.mutate(**texts, **shown).drop(*(f"line_{i}" for i in range(len(lines))))


def _render_line(line: Line, facts: ir.Table) -> Any:
    """The text of a line; null if it is left out."""
    pieces = [
        ibis.literal(", ").join([_render_part(p, facts) for p in item]).nullif("")
        if isinstance(item, tuple)
        else _render_part(item, facts)
        for item in line.items
    ]
    return functools.reduce(operator.add, pieces)  # null if any of them is null


def _render_part(part: Part, facts: ir.Table) -> Any:
    text: Any = ibis.literal(part.texts[0])
    for name, after in zip(part.fields, part.texts[1:], strict=True):
        text = text + facts[name] + after
    return text
