"""The keys of a config schema, for `COMMAND --keys`, for docs/config.md and for editors, all from its JSON Schema."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import yaml

from configs.loader import Settings

WIDTH = 100  # columns of a terminal
BOUNDS = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
TYPES = {"integer": "whole number", "number": "number", "string": "text", "boolean": "true | false", "null": "null"}


@dataclass(frozen=True)
class Key:
    """A key, with dots between sections; `default` is written as in YAML, or `required`; a section has neither."""

    name: str
    type: str
    default: str
    description: str

    @property
    def is_section(self) -> bool:
        return not self.type


def keys(schema: type[Settings]) -> list[Key]:
    """Every section and key of a schema, in its order."""
    whole = json_schema(schema)
    return list(_keys(whole, whole.get("$defs", {}), ""))


def json_schema(schema: type[Settings]) -> dict[str, Any]:
    """JSON Schema of the YAML files of a schema, without pydantic's titles."""
    return _untitled(schema.model_json_schema())


def show(schema: type[Settings]) -> str:
    """The keys as text of at most 100 columns."""
    out = []
    for key in keys(schema):
        head = f"{key.name}:" if key.is_section else f"{key.name}: {key.type}, {key.default}"
        out += textwrap.wrap(head, WIDTH, subsequent_indent="        ", break_on_hyphens=False)
        out += textwrap.wrap(key.description, WIDTH, initial_indent="    ", subsequent_indent="    ")
    return "\n".join(out)


def table(schema: type[Settings]) -> str:
    """The keys as a Markdown table."""
    rows = ["| key | type | default | description |", "|---|---|---|---|"]
    for key in keys(schema):
        default = key.default.removeprefix("default ")
        rows.append(
            "| "
            + " | ".join(x.replace("|", "\\|") for x in (f"`{key.name}`", key.type, default, key.description))
            + " |"
        )
    return "\n".join(rows)


def _keys(node: dict[str, Any], defs: dict[str, Any], prefix: str) -> Iterator[Key]:
    for name, field in node["properties"].items():
        options = field.get("anyOf", [field])
        section = next((defs[o["$ref"].rpartition("/")[2]] for o in options if "$ref" in o), None)
        required = name in node.get("required", ())
        default = "required" if required else f"default {_yaml(field.get('default'))}"
        if section is not None and "anyOf" not in field:
            yield Key(prefix + name, "", "", field.get("description", section["description"]))
        else:
            yield Key(prefix + name, " | ".join(map(_type, options)), default, field["description"])
        if section is not None:
            yield from _keys(section, defs, f"{prefix}{name}.")


def _type(field: dict[str, Any]) -> str:
    """The type of a field in plain words, e.g. `whole number >= 1`."""
    if "$ref" in field:
        return "section"
    if "enum" in field or "const" in field:
        return " | ".join(map(str, field.get("enum", [field.get("const")])))
    if "anyOf" in field:
        return " or ".join(map(_type, field["anyOf"]))
    if field.get("type") == "array":
        if "prefixItems" in field:
            return "[" + ", ".join(map(_type, field["prefixItems"])) + "]"
        return f"list of {_type(field['items'])}"
    if field.get("type") == "object":
        inner = field.get("additionalProperties")
        return "mapping of " + (_type(inner) if isinstance(inner, dict) else "any values")
    bounds = ", ".join(f"{sign} {_yaml(field[bound])}" for bound, sign in BOUNDS.items() if bound in field)
    return f"{TYPES[field['type']]} {bounds}".strip() if "type" in field else "any values"


def _yaml(value: Any) -> str:
    """A default as one would type it in a YAML file."""
    if isinstance(value, str):
        return value or '""'
    text = yaml.safe_dump(value, default_flow_style=True, width=1000).replace("\n...", "").strip()
    return re.sub(r"(\d)(?:\.0)?e([+-])0*", r"\1e\2", text).replace("e+", "e")


def _untitled(node: Any) -> Any:
    if isinstance(node, dict):
        return {key: _untitled(value) for key, value in node.items() if not (key == "title" and isinstance(value, str))}
    return [_untitled(value) for value in node] if isinstance(node, list) else node
