"""Configs: YAML files, and `load`, which turns one into a frozen, validated object."""

from configs.loader import Settings, UserError, load

__all__ = ["Settings", "UserError", "load"]
