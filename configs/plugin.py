"""A class of the user's own file, named in a config as `FILE.py:Class`."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from typing import TypeVar

from configs.loader import UserError

T = TypeVar("T")
FORM = re.compile(r"(?P<file>.+\.py):(?P<name>[A-Za-z_]\w*)")


def is_file(word: str) -> bool:
    """Whether the word is of the form FILE.py:Class."""
    return FORM.fullmatch(word) is not None


def load_class(word: str, base: type[T], key: str) -> type[T]:
    """The class that `FILE.py:Class` names; the file is run once in a process.

    Args:
        base: what it must inherit from.
        key: of the config, for errors.
    Raises: UserError: no such file or class, or another kind of class. What the file itself raises is not caught.
    """
    match = FORM.fullmatch(word)
    if match is None:
        raise UserError(f"{key}: `{word}` is neither a name of ours nor of the form FILE.py:Class")
    path = Path(match["file"]).expanduser().resolve()
    if not path.is_file():
        raise UserError(f"{key}: {path}: no such file")
    module_name = f"ehr_msn_plugin_{path.stem}_{abs(hash(path))}"
    if module_name not in sys.modules:
        spec = importlib.util.spec_from_file_location(module_name, path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[module_name] = module  # dataclasses look their module up
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[module_name]
            raise
    found = getattr(sys.modules[module_name], match["name"], None)
    if found is None:
        raise UserError(f"{key}: {path} has no class `{match['name']}`")
    if not (isinstance(found, type) and issubclass(found, base)):
        raise UserError(
            f"{key}: `{match['name']}` of {path} is no {base.__module__}.{base.__qualname__}; inherit from it"
        )
    return found
