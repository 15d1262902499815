"""Configs: YAML files, and `load`, which turns one into a frozen, validated object."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from configs.loader import Settings, UserError, first_line, load

__version__ = "0.3.0"
__all__ = ["Settings", "UserError", "first_line", "load"]


def __getattr__(name: str) -> Any:
    """Import the loader when it is asked for: a command listens for Ctrl-C before that (configs/signals.py)."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from configs import loader

    return getattr(loader, name)
