"""Find a method's class by its name in a config."""

from __future__ import annotations

import importlib

from configs.plugin import load_class
from pretrain.methods.base import Method
from pretrain.options import METHODS


def find(name: str) -> type[Method]:
    """The class of a method: ours by its name, or one of a user's file, `my_method.py:MyMethod`.

    Raises: UserError: there is no such file or class, or it is not a `Method`.
    """
    if name not in METHODS:
        return load_class(name, Method, "method")
    module, _, made = METHODS[name].partition(":")
    found: type[Method] = getattr(importlib.import_module(f"pretrain.methods.{module}"), made)
    return found
