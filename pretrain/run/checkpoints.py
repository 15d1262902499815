"""checkpoints/step_N.pt of a run folder: written atomically, read with weights_only, pruned by count and age."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from configs import UserError, first_line
from ehr_features.files import new_file
from pretrain.run.log import Log
from pretrain.run.processes import distributed, on_main


def save_checkpoint(
    folder: Path, state: Mapping[str, Any], step: int, *, keep: int = 2, every_hours: float | None = None
) -> None:
    """Write checkpoints/step_N.pt beside its place, rename it, then remove old ones. All processes call this.

    Args:
        state: tensors and plain values in dicts, lists and tuples; `step` is added to it.
        keep: how many of the newest stay.
        every_hours: of the older ones, one stays for each such span of time; None: none stays.
    Raises: UserError: the disk is full; the checkpoints before this one are untouched.
    """

    def save() -> None:
        _plain({**state}, "state")
        path = folder / "checkpoints" / f"step_{step:09d}.pt"
        try:
            with new_file(path) as part, part.open("wb") as file:
                torch.save({**state, "step": step}, file)
        except OSError as error:
            raise UserError(
                f"{path}: could not be written ({error.strerror or error}); nothing is lost: the checkpoints before "
                f"it are whole. Free some space and run the same command again"
            ) from None
        _prune(path, keep, every_hours)

    on_main(save)


def _plain(value: Any, where: str) -> None:
    """Refuse values that weights_only=True could not load."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            _plain(item, f"{where}[{key!r}]")
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            _plain(item, f"{where}[{index}]")
    elif not (value is None or isinstance(value, torch.Tensor) or type(value) in (bool, int, float, str, bytes)):
        raise TypeError(f"{where} is a {type(value).__name__}; a checkpoint holds tensors and plain values only")


def _prune(newest: Path, keep: int, every_hours: float | None) -> None:
    """Prune by step, not by clock; later steps belong to a run that was restarted from an earlier one."""
    paths = sorted(newest.parent.glob("step_*.pt"), reverse=True)
    for path in [p for p in paths if p.name > newest.name]:
        path.unlink(missing_ok=True)
    kept_at: float | None = None
    for path in reversed([p for p in paths if p.name <= newest.name][keep:]):  # the oldest first
        at = path.stat().st_mtime
        if every_hours is not None and (kept_at is None or abs(at - kept_at) >= every_hours * 3600):
            kept_at = at
        else:
            path.unlink(missing_ok=True)


def load_checkpoint(folder: Path) -> dict[str, Any] | None:
    """Read the newest checkpoint that is whole, on the CPU; None if there is none. All processes call this.

    Raises: UserError: there are some and none can be read, or the processes do not see the same ones.
    """
    paths = sorted((Path(folder) / "checkpoints").glob("step_*.pt"), reverse=True)
    state: dict[str, Any] | None = None
    for path in paths:
        try:
            state = _read(path)
            break
        except Exception as error:  # torch raises many types on damaged bytes
            Log(folder).say(f"{path}: damaged ({first_line(error)[:120]}); the one before it is tried")
    if distributed():
        steps: list[int] = [0] * dist.get_world_size()
        dist.all_gather_object(steps, -1 if state is None else state["step"])
        if len(set(steps)) > 1:
            raise UserError(
                f"{folder}: the processes see checkpoints of steps {sorted(set(steps))} (-1: none); "
                f"all machines need the same {folder}, on a shared file system"
            )
    if paths and state is None:
        raise UserError(f"{folder}/checkpoints: none of {len(paths)} can be read; remove them to start from step 0")
    return state


def _read(path: Path) -> dict[str, Any]:
    with zipfile.ZipFile(path) as archive:  # torch writes checksums but does not verify them
        if damaged := archive.testzip():
            raise ValueError(f"the check sum of {damaged} is wrong")
    return dict(torch.load(path, map_location="cpu", weights_only=True))
