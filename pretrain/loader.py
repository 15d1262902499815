"""Batches in order, on the device: workers read films; on a GPU they are cut there, while the next ones are read."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from configs.signals import held
from ehr_features import files as lock
from pretrain.batches import Steps
from pretrain.msn import Batch


def batches(steps: Steps, start: int, end: int, workers: int, device: torch.device) -> Iterator[Batch]:
    """The batches of steps `start` to `end` - 1."""
    options: dict[str, Any] = {"persistent_workers": True, "prefetch_factor": 2, "worker_init_fn": begin_worker}
    loader = DataLoader(
        steps,
        batch_size=None,
        sampler=range(start, end),
        num_workers=workers,
        pin_memory=device.type == "cuda",  # so that copies need not be waited for
        collate_fn=_as_it_is,
        **(options if workers else {}),
    )
    with held():  # while the workers start
        items = iter(loader)
    for item in items:
        yield item if isinstance(item, Batch) else steps.cutter.cut(to_device(item, device))


def to_device(raw: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Copy what are tensors, without waiting for the copy."""
    return {key: x.to(device, non_blocking=True) if isinstance(x, Tensor) else x for key, x in raw.items()}


def _as_it_is(item: Any) -> Any:
    return item


def begin_worker(_: int) -> None:
    """Signals are for the process that saves, also where all of a job are sent one; so is the folder's lock."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    lock.forget()
