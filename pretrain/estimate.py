"""Measure the cost of a step on this machine, with a temporary network."""

from __future__ import annotations

import argparse
import dataclasses
import resource
import time
from pathlib import Path
from typing import Any

import torch

from ehr_features.files import read_json, write_json
from pretrain import build, run
from pretrain.accumulate import backward
from pretrain.config import PretrainConfig
from pretrain.data import Steps, batches, select_films
from pretrain.schedule import Schedule
from pretrain.store import Store

FIRST, MEASURED = 4, 16  # warm-up steps, and measured steps


@dataclasses.dataclass(frozen=True)
class Cost:
    """Seconds of a step: wall-clock time, and processor time of all processes together."""

    wall: float
    processor: float


def processor_seconds() -> float:
    """Processor time of this process and its ended children."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(of.ru_utime + of.ru_stime for of in used)


def step_cost(config: PretrainConfig, steps: Steps, accelerator: Any) -> Cost:
    """Mean of `MEASURED` steps, including reading and cutting films. The run's generators are not changed."""
    optim, device = config.optim, accelerator.device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        method = build.method(config, steps.films).to(device)
        if not method.anchor.is_vit:
            method.to(memory_format=torch.channels_last)
        optimizer, began = build.optimizer(optim, method), (0.0, 0.0)
        for i, batch in enumerate(batches(steps, 0, FIRST + MEASURED, 0, device)):
            if i == FIRST:
                _wait(device)
                began = time.monotonic(), processor_seconds()
            method.before_step(i)
            with accelerator.autocast():
                out = backward(method, method, batch, accelerator, optim.accumulate, optim.accumulate_mode == "exact")
            optimizer.zero_grad(set_to_none=True)
            method.after_step(0.99)
            del out
        _wait(device)
    spent = torch.tensor([time.monotonic() - began[0], processor_seconds() - began[1]], device=device)
    every = accelerator.gather(spent[None])  # (processes, 2)
    return Cost(float(every[:, 0].max()) / MEASURED, float(every[:, 1].sum()) / MEASURED)


def affordable_steps(config: PretrainConfig, steps: Steps, folder: Path, accelerator: Any) -> int:
    """Number of steps within `optim.processor_seconds`; determined once and kept in the run's budget.json."""
    seconds, path = config.optim.processor_seconds, folder / "budget.json"
    assert seconds is not None
    if not path.is_file():
        cost = step_cost(config, steps, accelerator)
        said = {"processor_seconds": seconds, "seconds_of_a_step": cost.processor}
        run.on_main(lambda: write_json(path, said | {"steps": max(1, int(seconds / cost.processor))}))
    return int(read_json(path)["steps"])


def estimate(config: PretrainConfig, args: argparse.Namespace | None = None) -> str:
    """Estimate how long a run of this config takes on this machine; nothing is written.

    Raises: UserError: the config does not fit the films, the store or the machine.
    """
    accelerator, store, text, ehr = build.accelerator(config, args), Store(config.store), build.text(config), config.ehr
    films = select_films(config.features, store, config.films, ehr.groups, ehr.preset, config.seed, text)
    steps = build.steps(config, films, store, build.method(config, films), accelerator)
    cost, plan, optim = (
        step_cost(config, steps, accelerator),
        Schedule(config.optim, steps.steps_per_epoch),
        config.optim,
    )
    total = plan.total if optim.processor_seconds is None else max(1, int(optim.processor_seconds / cost.processor))
    return (
        f"{MEASURED} steps of {optim.batch_size} films, {accelerator.num_processes} x {accelerator.device.type}, "
        f"without compile and workers: {optim.batch_size / cost.wall:.0f} films/s, {cost.wall:.3g} s a step\n"
        f"the run: {total} steps ({total / steps.steps_per_epoch:.1f} epochs of {len(films)} films), "
        f"about {total * cost.wall / 3600:.2g} h, {total * cost.processor / 3600:.2g} processor hours"
    )


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
