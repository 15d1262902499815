"""Measure the cost of a step on this machine, with a temporary network."""

from __future__ import annotations

import argparse
import dataclasses
import math
import resource
import time
from pathlib import Path
from typing import Any

import torch

from ehr_features.files import write_json
from ehr_features.typed import read_json
from pretrain import build, run
from pretrain.accumulate import backward
from pretrain.config import PretrainConfig
from pretrain.data import Steps, batches, select_films
from pretrain.schedule import Schedule
from pretrain.shapes import Budget
from pretrain.store import Store

FIRST, MEASURED = 4, 16  # warm-up steps, and measured steps
MOST_SECONDS = 10.0  # for the steps of an estimate, by one process
FEW, PIXELS = 8, 1_500_000  # on a CPU: films of a step at least, and pixels of their views if they are small


@dataclasses.dataclass(frozen=True)
class Cost:
    """Seconds of a step: wall-clock time, and processor time of all processes together; the mean of some steps."""

    wall: float
    processor: float
    steps: int = MEASURED


def processor_seconds(device: torch.device) -> float:
    """Processor time of this process and its ended children; with a GPU the seconds for which it is held."""
    if device.type == "cuda":
        return time.monotonic()
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(of.ru_utime + of.ru_stime for of in used)


def step_cost(config: PretrainConfig, steps: Steps, accelerator: Any, most_seconds: float = math.inf) -> Cost:
    """Mean of `MEASURED` steps, including reading and cutting films. The run's generators are not changed.

    Args:
        most_seconds: one process alone stops after so long.
    """
    optim, device, first, done = config.optim, accelerator.device, FIRST, 0
    most_seconds = most_seconds if accelerator.num_processes == 1 else math.inf  # all must do the same steps
    start = time.monotonic()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        method = build.method(config, steps.films).to(device)
        if not method.anchor.is_vit:
            method.to(memory_format=torch.channels_last)
        optimizer, began = build.optimizer(optim, method), (0.0, 0.0)
        for group in optimizer.param_groups:
            group["lr"] = 0.0
        for i, batch in enumerate(batches(steps, 0, FIRST + MEASURED, 0, device)):
            late = time.monotonic() - start > most_seconds / 4
            if i == first or (0 < i < first and late):
                _wait(device)
                first, began = i, (time.monotonic(), processor_seconds(device))
            method.before_step(i)
            with accelerator.autocast():
                out = backward(method, method, batch, accelerator, optim.accumulate, optim.accumulate_mode == "exact")
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            method.after_step(0.99)
            del out
            done = i + 1 - first
            if done > 0 and time.monotonic() - start > most_seconds:
                break
        _wait(device)
    spent = torch.tensor([time.monotonic() - began[0], processor_seconds(device) - began[1]], device=device)
    every = accelerator.gather(spent[None])  # (processes, 2)
    return Cost(float(every[:, 0].max()) / done, float(every[:, 1].sum()) / done, done)


def affordable_steps(config: PretrainConfig, steps: Steps, folder: Path, accelerator: Any) -> int:
    """Number of steps within `optim.processor_seconds`; determined once and kept in the run's budget.json."""
    seconds, path = config.optim.processor_seconds, folder / "budget.json"
    assert seconds is not None
    if not path.is_file():
        cost = step_cost(config, steps, accelerator)
        said = {"processor_seconds": seconds, "seconds_of_a_step": cost.processor}
        run.on_main(lambda: write_json(path, said | {"steps": max(1, int(seconds / cost.processor))}))
    return int(read_json(path, Budget)["steps"])


def estimate(config: PretrainConfig, args: argparse.Namespace | None = None) -> str:
    """Estimate how long a run of this config takes on this machine; nothing is written.

    Raises: UserError: the config does not fit the films, the store or the machine.
    """
    accelerator, store, text, ehr = build.accelerator(config, args), Store(config.store), build.text(config), config.ehr
    films = select_films(config.features, store, config.films, ehr.groups, ehr.preset, config.seed, text)
    steps = build.steps(config, films, store, build.method(config, films), accelerator)
    optim, short = config.optim, _shortened(config, accelerator)
    timed = build.steps(short, films, store, build.method(short, films), accelerator)
    part = optim.batch_size / short.optim.batch_size
    found = step_cost(short, timed, accelerator, MOST_SECONDS)
    cost, plan = Cost(found.wall * part, found.processor * part), Schedule(optim, steps.steps_per_epoch)
    total = plan.total if optim.processor_seconds is None else max(1, int(optim.processor_seconds / cost.processor))
    where = f"{accelerator.num_processes} x {accelerator.device.type}"
    return (
        f"{found.steps} steps of {short.optim.batch_size} films, {where}, without compile and workers: "
        f"{optim.batch_size / cost.wall:.0f} films/s, {cost.wall:.3g} s a step of "
        f"{optim.batch_size}\n"
        f"the run: {total} steps ({total / steps.steps_per_epoch:.1f} epochs of {len(films)} films), "
        f"about {total * cost.wall / 3600:.2g} h, {total * cost.processor / 3600:.2g} processor hours"
    )


def _shortened(config: PretrainConfig, accelerator: Any) -> PretrainConfig:
    """On a CPU the config with as few films a process and step as take little memory and give the cost of a film."""
    v = config.views
    pixels = config.encoder.image_size**2 * (1 + v.num_random) + v.focal_size**2 * v.num_focal
    few = max(FEW, PIXELS // pixels) * accelerator.num_processes
    if accelerator.device.type != "cpu" or config.optim.batch_size <= few:
        return config
    return config.model_copy(update={"optim": config.optim.model_copy(update={"batch_size": few, "accumulate": 1})})


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
