"""The training loop: features/ + store/ -> runs/X/ with encoder/.

Read from top to bottom: processes and folder, films, method, then step by step. Process 0 writes; all processes take
the same decisions.
"""

from __future__ import annotations

import argparse
import math
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from configs import UserError, load
from configs.cli import typed
from configs.face import callable_module
from configs.loader import Given
from configs.signals import Stopped
from ehr_features.progress import Bar
from pretrain import build, export, run
from pretrain.accumulate import backward, random_generator
from pretrain.build import keep_freed_memory
from pretrain.config import PretrainConfig
from pretrain.data import Steps, batches, select_films
from pretrain.encoder import differences
from pretrain.estimate import affordable_steps, processor_seconds
from pretrain.methods import Method
from pretrain.monitor import Watch, introduce
from pretrain.schedule import Schedule
from pretrain.seen import write_seen
from pretrain.store import Store

MAY_DIFFER = (
    "workers", "log_every", "save_every_minutes", "keep", "keep_every_hours", "export_every_epochs", "trackers",
    "project", "run_name", "checkpointing", "compile", "process_timeout",
)  # fmt: skip

callable_module(__name__)


def train(config: PretrainConfig | Given, args: argparse.Namespace | None = None) -> Path:
    """Pretrain, or resume a pretraining.

    Args:
        config: a PretrainConfig, its keys in a dict, a YAML file, or the name of a shipped one.
        args: command-line arguments, for the number of processes.
    Returns: the run folder, with encoder/ in it.
    Raises: UserError: the config does not fit the films, the store or the machine; Stopped: SIGTERM, saved.
    """
    config = load(PretrainConfig, config)
    keep_freed_memory()
    accelerator = build.accelerator(config, args)
    images = config.films.table if config.features is None else Path(config.features) / "images.parquet"
    index = Path(config.store) / "index.parquet"
    text = build.text(config)
    notes = [] if text is None else [Path(text.notes) / "notes.parquet"]
    folder = run.open_run(config.out, config, sources=[str(images), index, *notes], may_differ=MAY_DIFFER)
    if run.complete(folder):
        return folder
    log, store = run.open_log(folder, config, accelerator), Store(config.store)
    run.needs(config.features, config.store)
    ehr = config.ehr
    films = select_films(config.features, store, config.films, ehr.groups, ehr.preset, config.seed, text)
    if config.ehr.permuted:
        films.permute_record(config.seed)
    torch.manual_seed(config.seed)
    method = build.method(config, films, log)
    steps = build.steps(config, films, store, method, accelerator)
    optim = config.optim
    if optim.processor_seconds is not None:
        paid = affordable_steps(config, steps, folder, accelerator)
        optim = optim.model_copy(update={"steps": paid, "processor_seconds": None})
    plan = Schedule(optim, steps.steps_per_epoch)
    introduce(log, config, steps, method, plan, accelerator)
    if run.is_main():
        write_seen(folder, films.table, config.encoder.init)
    step, seconds = _loop(config, folder, log, method, steps, plan, accelerator)
    run.on_main(lambda: export.write(folder, config, method, films, store, step, last=True, seconds=seconds))
    log.close()
    accelerator.end_training()
    run.finish(folder, steps=step, films=len(films))
    return folder


def _loop(
    config: PretrainConfig, folder: Path, log: run.Log, method: Method, steps: Steps, plan: Schedule, accelerator: Any
) -> tuple[int, float]:
    """Steps until the end, or until SIGTERM. Returns: the number of steps done, and the processor seconds they took."""
    optim = config.optim
    optimizer = build.optimizer(optim, method)
    watch = Watch(config, steps, log, accelerator, method.num_prototypes)
    state, start, spent, began = run.load_checkpoint(folder), 0, 0.0, processor_seconds(accelerator.device)
    if state is not None:
        start, spent = state["step"], state.get("processor_seconds", 0.0)
        _restore(method, state["model"], folder)
        watch.restore(state)
        log.say(f"resuming at step {start} of {plan.total}")
    model, optimizer = build.prepare(method, optimizer, accelerator, config, state)
    log.cut(start)

    def seconds() -> float:
        now = torch.tensor(processor_seconds(accelerator.device) - began, device=accelerator.device)
        return spent + float(accelerator.reduce(now, "sum"))

    def save(step: int) -> None:
        watch.check(method, step)
        state = {
            "processor_seconds": seconds(),
            "model": method.state_dict(),
            "optimizer": optimizer.state_dict(),
            **watch.state(),
        }
        if accelerator.scaler is not None:
            state["scaler"] = accelerator.scaler.state_dict()
        run.save_checkpoint(folder, state, step, keep=config.keep, every_hours=config.keep_every_hours)

    chance = random_generator(accelerator.device)
    export_every = math.ceil((config.export_every_epochs or 0) * steps.steps_per_epoch)
    ahead, saved_at = batches(steps, start, plan.total, config.workers, accelerator.device), time.monotonic()
    with run.stopping() as stop, Bar("pretraining", plan.total - start, "steps", shown=run.is_main()) as bar:
        for step in range(start, plan.total):
            asked_at = time.monotonic()
            batch = next(ahead)
            waited = time.monotonic() - asked_at
            chance.manual_seed(hash((config.seed, step, accelerator.process_index)))  # seeds drop path, if there is any
            lr, decay, momentum = plan(step)
            for group in optimizer.param_groups:
                group["lr"], group["weight_decay"] = lr, decay if group["decays"] else 0.0
            method.before_step(step)
            try:
                out = backward(model, method, batch, accelerator, optim.accumulate, optim.accumulate_mode == "exact")
            except RuntimeError:
                if config.compile and stop.requested:  # SIGTERM to the whole job has stopped the compiler too
                    raise Stopped(f"{folder}: stopped while compiling; go on with\n  {typed()}") from None
                raise
            method.before_update(step)
            norm = _clip(method, accelerator, optim.clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            method.after_step(momentum)
            watch.see(out, step, waited, {"lr": lr, "weight_decay": decay, "momentum": momentum, "grad_norm": norm})
            bar.advance(1, watch.note)
            done = step + 1
            if done % config.log_every == 0 or done == plan.total:  # waits for the device
                watch.report(done)
                if stop.any(time.monotonic() - saved_at > 60 * config.save_every_minutes):
                    save(done)
                    saved_at = time.monotonic()
            if export_every and done % export_every == 0:
                watch.check(method, done)
                run.on_main(partial(export.write, folder, config, method, steps.films, steps.store, done))
            if stop.agreed(done):
                save(done)
                raise Stopped(run.go_on(folder, done, stop.gone))
    ahead.close()  # its workers end, and their seconds count
    save(plan.total)
    return plan.total, seconds()


def _clip(method: Method, accelerator: Any, most: float | None) -> Tensor:
    """Clip the gradients of all but the prototypes, as the original MSN. Returns: their norm before."""
    apart = {id(p) for p in method.loss_parameters()}
    parameters = [p for p in method.parameters() if p.grad is not None and id(p) not in apart]
    return accelerator.clip_grad_norm_(parameters, math.inf if most is None else most)


def _restore(method: Method, state: dict[str, Tensor], folder: Path) -> None:
    if faults := differences(method.state_dict(), state):
        raise UserError(f"{folder}/checkpoints: their model differs from the config's: {faults}; choose another out=")
    method.load_state_dict(state)
