"""What `import ehr_features, pretrain, finetune` shows: names that are imported when they are used."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any


class CallableModule(ModuleType):
    """A module that is called like its function of the same name."""

    def __call__(self, *args: Any, **options: Any) -> Any:
        return getattr(self, self.__name__.rpartition(".")[2])(*args, **options)


def callable_module(name: str) -> None:
    """Let `pretrain.train(config)` be `pretrain.train.train(config)`: a module and its function share the name."""
    sys.modules[name].__class__ = CallableModule


def lazy(package: str, names: Mapping[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """`__getattr__` and `__dir__` of a package.

    Args:
        names: a public name -> the module that it is, or `module:name` inside one.
    """

    def get(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        module, _, inner = names[name].partition(":")
        found = importlib.import_module(f"{package}.{module}")
        return getattr(found, inner) if inner else found

    return get, lambda: ["__version__", *names]
