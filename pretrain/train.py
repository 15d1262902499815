"""The loop: features/ + store/ -> runs/X/ with encoder/.

Reads from top to bottom: processes and folder, films, method, then step by step. Process 0 writes; all decide alike.
"""

from __future__ import annotations

import argparse
import math
import time
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
from pretrain.build import keep_freed_memory
from pretrain.config import PretrainConfig
from pretrain.data import Steps, batches, select_films
from pretrain.encoder import differences
from pretrain.monitor import Watch, introduce
from pretrain.msn import MSN, backward, random_generator
from pretrain.schedule import Schedule
from pretrain.seen import write_seen
from pretrain.store import Store

MAY_DIFFER = (
    "workers", "log_every", "save_every_minutes", "keep", "keep_every_hours", "export_every_epochs", "trackers",
    "checkpointing", "compile",
)  # fmt: skip

callable_module(__name__)


def train(config: PretrainConfig | Given, args: argparse.Namespace | None = None) -> Path:
    """Pretrain, or go on with a pretraining.

    Args:
        config: a PretrainConfig, its keys in a dict, a YAML file, or the name of a shipped one.
        args: the command line's, for the number of processes.
    Returns: the run folder, with encoder/ in it.
    Raises: UserError: the config does not fit the films, the store or the machine; Stopped: SIGTERM, saved.
    """
    config = load(PretrainConfig, config)
    keep_freed_memory()
    accelerator = build.accelerator(config, args)
    images, index = Path(config.features) / "images.parquet", Path(config.store) / "index.parquet"
    text = build.text(config)
    notes = [] if text is None else [Path(text.notes) / "notes.parquet"]
    folder = run.open_run(config.out, config, sources=[images, index, *notes], may_differ=MAY_DIFFER)
    if run.complete(folder):
        return folder
    log, store = run.Log(folder, accelerator), Store(config.store)
    with accelerator.main_process_first():  # one process embeds the notes
        ehr = config.ehr
        films = select_films(config.features, store, config.films, ehr.groups, ehr.preset, config.seed, text)
    if config.ehr.permuted:
        films.permute_record(config.seed)
    torch.manual_seed(config.seed)
    msn = build.method(config, films.static.shape[1], log)
    steps = build.steps(config, films, store, msn.anchor, accelerator)
    plan = Schedule(config.optim, steps.steps_per_epoch)
    introduce(log, config, steps, msn, plan, accelerator)
    if run.is_main():
        write_seen(folder, films.table, config.encoder.init)
    step = _loop(config, folder, log, msn, steps, plan, accelerator)
    if run.is_main():
        export.write(folder, config, msn.target, films, store, step, last=True)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    run.finish(folder, steps=step, films=len(films))
    return folder


def _loop(
    config: PretrainConfig, folder: Path, log: run.Log, msn: MSN, steps: Steps, plan: Schedule, accelerator: Any
) -> int:
    """Steps until the end, or until SIGTERM. Returns: the number of steps done."""
    optim = config.optim
    optimizer = torch.optim.AdamW(msn.groups(optim.decay_all), lr=1.0, betas=optim.betas, fused=True)
    watch = Watch(config, steps, log, accelerator)
    state, start = run.load_checkpoint(folder), 0
    if state is not None:
        start = state["step"]
        _restore(msn, state["model"], folder)
        watch.restore(state)
        log.say(f"going on at step {start} of {plan.total}")
    model, optimizer = build.prepare(msn, optimizer, accelerator, config, state)
    log.cut(start)

    def save(step: int) -> None:
        watch.check(msn, step)
        state = {"model": msn.state_dict(), "optimizer": optimizer.state_dict(), **watch.state()}
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
            chance.manual_seed(hash((config.seed, step, accelerator.process_index)))  # of drop path, where there is any
            lr, decay, momentum = plan(step)
            for group in optimizer.param_groups:
                group["lr"], group["weight_decay"] = lr, decay if group["decays"] else 0.0
            try:
                out = backward(model, msn, batch, accelerator, optim.accumulate, optim.accumulate_mode == "exact")
            except RuntimeError:
                if config.compile and stop.requested:  # SIGTERM to the whole job has ended the compiler too
                    raise Stopped(f"{folder}: stopped while compiling; go on with\n  {typed()}") from None
                raise
            norm = _clip(msn, accelerator, optim.clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            msn.update_target(momentum)
            watch.see(out, step, waited, {"lr": lr, "weight_decay": decay, "momentum": momentum, "grad_norm": norm})
            bar.advance(1, watch.note)
            done = step + 1
            if done % config.log_every == 0 or done == plan.total:  # this waits for the device
                watch.report(done)
                if stop.any(time.monotonic() - saved_at > 60 * config.save_every_minutes):
                    save(done)
                    saved_at = time.monotonic()
            if export_every and done % export_every == 0:
                watch.check(msn, done)
                if run.is_main():
                    export.write(folder, config, msn.target, steps.films, steps.store, done)
            if stop.agreed():
                save(done)
                raise Stopped(run.go_on(folder, done))
    save(plan.total)
    return plan.total


def _clip(msn: MSN, accelerator: Any, most: float | None) -> Tensor:
    """Clip the gradients of all but the prototypes, as the original. Returns: their norm before."""
    parameters = [p for p in msn.parameters() if p.grad is not None and p is not msn.prototypes]
    return accelerator.clip_grad_norm_(parameters, math.inf if most is None else most)


def _restore(msn: MSN, state: dict[str, Tensor], folder: Path) -> None:
    if faults := differences(msn.state_dict(), state):
        raise UserError(f"{folder}/checkpoints: of another model than this config makes: {faults}; choose another out=")
    msn.load_state_dict(state)
