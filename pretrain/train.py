"""The loop: features/ + store/ -> runs/X/ with encoder/.

Reads from top to bottom: processes and folder, films, method, then step by step. Process 0 writes; all decide alike.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from configs import UserError
from configs.cli import Stopped
from ehr_features.files import new_file
from pretrain import encoder as encoders
from pretrain import export, run
from pretrain.batches import Cutter, Films, Partners, Steps, select_films
from pretrain.config import PretrainConfig, ViewsConfig
from pretrain.msn import MSN, Batch, Record
from pretrain.preprocess import Preprocess
from pretrain.progress import Bar
from pretrain.schedule import Schedule
from pretrain.store import Store
from pretrain.views import Views
from pretrain.watch import Watch
from pretrain.weights import start_from

MAY_DIFFER = (
    "workers", "log_every", "save_every_minutes", "keep", "keep_every_hours", "export_every_epochs", "trackers",
    "checkpointing", "compile",
)  # fmt: skip


def train(config: PretrainConfig, args: argparse.Namespace | None = None) -> Path:
    """Pretrain, or go on with a pretraining.

    Returns: the run folder, with encoder/ in it.
    Raises: UserError: the config does not fit the films, the store or the machine; Stopped: SIGTERM, saved.
    """
    accelerator = _accelerator(config, args)
    images, index = Path(config.features) / "images.parquet", Path(config.store) / "index.parquet"
    folder = run.open_run(config.out, config, sources=[images, index], may_differ=MAY_DIFFER)
    if run.complete(folder):
        return folder
    log, store = run.Log(folder, accelerator), Store(config.store)
    films = select_films(config.features, store, config.films, config.ehr.groups, config.ehr.preset, config.seed)
    if config.ehr.permuted:
        shuffle = torch.randperm(len(films), generator=torch.Generator().manual_seed(config.seed))
        films.static = films.static[shuffle.numpy()]
    torch.manual_seed(config.seed)
    msn = build(config, films.static.shape[1], log)
    steps = _steps(config, films, store, msn.anchor, accelerator)
    plan = Schedule(config.optim, steps.steps_per_epoch)
    _introduce(log, config, films, msn, plan, accelerator)
    if config.trackers:
        accelerator.init_trackers("pretrain", config=_flat(config.model_dump(mode="json")))
    _write_seen(folder, films)
    step = _loop(config, folder, log, msn, steps, plan, accelerator)
    if run.is_main():
        export.write(folder, config, msn.target, films, store, step, last=True)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    run.finish(folder, steps=step, films=len(films))
    return folder


def build(config: PretrainConfig, record_width: int, log: run.Log | None = None) -> MSN:
    """The method's module as the config says, initialised from torch's global generator."""
    e, v = config.encoder, config.views
    preprocess = Preprocess(e.image_size, v.normalise, v.mean, v.std, e.in_chans)
    encoder = encoders.create(
        e.arch,
        in_chans=e.in_chans,
        image_size=e.image_size,
        model_args=e.model_args,
        preprocess=preprocess,
        pool=e.pool,
        positions=e.positions,
    )
    if e.init is not None:
        said = start_from(encoder, e.init, e.init_heads)
        if log is not None:
            log.say(f"starting from {said}")
    encoder.checkpointing = config.checkpointing
    record = Record(record_width, config.ehr.use, config.ehr.inject, config.ehr.width, config.ehr.predict_weight)
    loss = config.loss.model_dump()
    return MSN(
        encoder,
        num_prototypes=loss.pop("prototypes"),
        hidden=config.head.hidden or 4 * encoder.width,
        out=config.head.out or encoder.width,
        norm=config.head.norm,
        record=record,
        loss=loss,
    )


def _accelerator(config: PretrainConfig, args: argparse.Namespace | None) -> Any:
    from accelerate import DistributedDataParallelKwargs

    precision = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}[config.precision]
    if config.precision == "fp16" and not torch.cuda.is_available():
        raise UserError("precision: fp16 needs a GPU; choose bf16 or fp32 on a CPU")
    ddp = DistributedDataParallelKwargs(gradient_as_bucket_view=True)
    log_with = config.trackers or None
    return run.accelerator(
        args, mixed_precision=precision, kwargs_handlers=[ddp], log_with=log_with, project_dir=config.out
    )


def _steps(config: PretrainConfig, films: Films, store: Store, encoder: encoders.Encoder, accelerator: Any) -> Steps:
    v, size, patch = config.views, config.encoder.image_size, encoder.patch if encoder.is_vit else config.mask.cell
    for name, side in (("encoder.image_size", size), ("views.focal_size", v.focal_size)):
        if encoder.is_vit and side % patch:
            raise UserError(f"{name} {side} is not whole patches of {patch} px; e.g. {round(side / patch) * patch}")
    cutter = Cutter(
        target=_views(v, 1, size, v.target_scale),
        random=_views(v, v.num_random, size, v.random_scale),
        focal=_views(v, v.num_focal, v.focal_size, v.focal_scale),
        preprocess=encoder.preprocess,
        patch=patch,
        is_vit=encoder.is_vit,
        mask_ratio=config.mask.ratio,
        mask_focal=config.mask.focal,
        fill=config.mask.fill,
        seed=config.seed,
    )
    positives = config.films.positives
    world = accelerator.num_processes
    if config.optim.batch_size % (world * config.optim.accumulate):
        raise UserError(
            f"optim.batch_size {config.optim.batch_size} does not divide among {world} processes"
            f" x {config.optim.accumulate} parts; choose a multiple of {world * config.optim.accumulate}"
        )
    if config.head.norm == "batch" and config.optim.batch_size // world // config.optim.accumulate < 2:
        raise UserError("one film at a time cannot pass batch norm: raise optim.batch_size, or head.norm: layer")
    return Steps(
        films,
        store,
        cutter,
        batch_size=config.optim.batch_size,
        rank=accelerator.process_index,
        world=world,
        partners=None if positives == "film" else Partners(films.table, positives, config.films.max_days),
        dropout=config.ehr.dropout,
        cut_here=accelerator.device.type == "cpu",
    )


def _views(v: ViewsConfig, count: int, size: int, scale: tuple[float, float]) -> Views:
    return Views(count, size, scale, v.ratio, v.flip, v.brightness, v.contrast, v.gamma)


def _loop(
    config: PretrainConfig, folder: Path, log: run.Log, msn: MSN, steps: Steps, plan: Schedule, accelerator: Any
) -> int:
    """Steps until the end, or until SIGTERM. Returns: the number of steps done."""
    fused = accelerator.device.type in ("cpu", "cuda")
    optimizer = torch.optim.AdamW(msn.groups(config.optim.decay_all), lr=1.0, betas=config.optim.betas, fused=fused)
    state = run.load_checkpoint(folder)
    if state is not None:
        _restore(msn, state["model"], folder)
        log.say(f"going on at step {state['step']} of {plan.total}")
    model, optimizer = _prepare(msn, optimizer, accelerator, config, state)
    start = state["step"] if state is not None else 0
    log.cut(start)
    watch = Watch(config, steps, log, accelerator)

    def save(step: int) -> None:
        state = {"model": msn.state_dict(), "optimizer": optimizer.state_dict()}
        if accelerator.scaler is not None:
            state["scaler"] = accelerator.scaler.state_dict()
        run.save_checkpoint(folder, state, step, keep=config.keep, every_hours=config.keep_every_hours)

    every = math.ceil(config.export_every_epochs * steps.steps_per_epoch) if config.export_every_epochs else None
    saved_at = time.monotonic()
    batches = _batches(steps, start, plan.total, config.workers, accelerator.device)
    with run.stopping() as stop, Bar("pretraining", plan.total - start, "steps", shown=run.is_main()) as bar:
        for step in range(start, plan.total):
            asked_at = time.monotonic()
            batch = next(batches)
            waited = time.monotonic() - asked_at
            lr, decay, momentum = plan(step)
            for group in optimizer.param_groups:
                group["lr"], group["weight_decay"] = lr, decay if group["decays"] else 0.0
            out = backward(model, msn, batch, accelerator, config)
            norm = _clip(msn, accelerator, config.optim.clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            msn.update_target(momentum)
            watch.see(out, step, waited, {"lr": lr, "weight_decay": decay, "momentum": momentum, "grad_norm": norm})
            bar.advance(1, watch.note)
            done = step + 1
            if done % config.log_every and done < plan.total:
                continue  # what follows waits for the device
            watch.report(done)
            if stop.agreed():
                save(done)
                raise Stopped(run.go_on(folder, done))
            if _any(time.monotonic() - saved_at > 60 * config.save_every_minutes, accelerator):
                save(done)
                saved_at = time.monotonic()
            if every and done // every > (done - config.log_every) // every and run.is_main():
                export.write(folder, config, msn.target, steps.films, steps.store, done)
    save(plan.total)
    return plan.total


def backward(model: Any, msn: MSN, batch: Batch, accelerator: Any, config: PretrainConfig) -> dict[str, Tensor]:
    """Gradients of the loss on this process's films, in as many parts as the config says."""
    number = config.optim.accumulate
    if number == 1:
        out = model(batch)
        accelerator.backward(out["loss"])
        return out
    exact, parts = config.optim.accumulate_mode == "exact", batch.parts(number)
    if exact:
        # The loss couples all films. First embed them without a graph; the loss's gradient at the embeddings then
        # stands for the loss, one part at a time. Without batch norm (see the config) a part embeds as in the whole.
        with torch.no_grad(), accelerator.autocast():
            embedded = [(msn.embed_anchors(part)[0].float(), *msn.embed_targets(part)) for part in parts]
        anchors, targets, features = ([e[i] for e in embedded] for i in range(3))
        by_view = torch.cat([a.unflatten(0, (-1, len(targets[0]))) for a in anchors], dim=1)  # (V, B, out)
        leaf = by_view.flatten(0, 1).requires_grad_()
        out = msn.score(leaf, torch.cat(targets), torch.cat(features), {})
        with accelerator.no_sync(model):
            accelerator.backward(out["loss"])
        assert leaf.grad is not None
        grads = leaf.grad.unflatten(0, (len(by_view), -1))
    outs = []
    for i, part in enumerate(parts):
        with accelerator.no_sync(model) if i < number - 1 else contextlib.nullcontext():
            if exact:
                own = slice(i * len(part.target), (i + 1) * len(part.target))
                scale = accelerator.scaler.get_scale() if accelerator.scaler is not None else 1.0
                model(part, grads[:, own].flatten(0, 1), scale / number)["loss"].backward()
            else:
                outs.append(model(part))
                accelerator.backward(outs[-1]["loss"] / number)
    if exact:
        return out
    merged = {
        key: torch.stack([o[key].detach() for o in outs]).mean(dim=0) for key in outs[0] if outs[0][key].ndim == 0
    }
    return merged | {
        "hits": torch.stack([o["hits"] for o in outs]).sum(dim=0),
        "features": torch.cat([o["features"] for o in outs]),
    }


def _prepare(msn: MSN, optimizer: Any, accelerator: Any, config: PretrainConfig, state: dict[str, Any] | None) -> Any:
    """The method and its optimizer, ready for this machine."""
    if accelerator.device.type == "cuda":
        if accelerator.num_processes > 1:
            nn.SyncBatchNorm.convert_sync_batchnorm(msn)
        if not msn.anchor.is_vit:
            msn.to(memory_format=torch.channels_last)
    if config.compile:
        msn.anchor.compile()
        msn.target.compile()
    model, optimizer = accelerator.prepare(msn, optimizer)
    if state is not None:
        optimizer.load_state_dict(state["optimizer"])
        if accelerator.scaler is not None and "scaler" in state:
            accelerator.scaler.load_state_dict(state["scaler"])
    return model, optimizer


def _batches(steps: Steps, start: int, end: int, workers: int, device: torch.device) -> Iterator[Batch]:
    """Batches on the device; there, films are cut while the next ones are read."""
    cuda = device.type == "cuda"
    options: dict[str, Any] = {"persistent_workers": True, "prefetch_factor": 2} if workers else {}
    order = range(start, end)
    loader = DataLoader(
        steps, batch_size=None, sampler=order, num_workers=workers, pin_memory=cuda, collate_fn=_as_it_is, **options
    )
    for item in loader:
        yield item if isinstance(item, Batch) else steps.cutter.cut(to_device(item, device))


def _as_it_is(item: Any) -> Any:
    return item


def to_device(raw: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Copy what are tensors, without waiting for the copy."""
    return {key: x.to(device, non_blocking=True) if isinstance(x, Tensor) else x for key, x in raw.items()}


def _clip(msn: MSN, accelerator: Any, most: float | None) -> Tensor:
    """Clip the gradients of all but the prototypes, as the original. Returns: their norm before."""
    parameters = [p for p in msn.parameters() if p.grad is not None and p is not msn.prototypes]
    return accelerator.clip_grad_norm_(parameters, math.inf if most is None else most)


def _any(flag: bool, accelerator: Any) -> bool:
    """Whether it is true in any process."""
    if accelerator.num_processes == 1:
        return flag
    return bool(accelerator.reduce(torch.tensor(float(flag), device=accelerator.device), "sum").item())


def _restore(msn: MSN, state: dict[str, Tensor], folder: Path) -> None:
    if faults := encoders.differences(msn.state_dict(), state):
        raise UserError(f"{folder}/checkpoints: of another model than this config makes: {faults}; choose another out=")
    msn.load_state_dict(state)


def _introduce(log: run.Log, config: PretrainConfig, films: Films, msn: MSN, plan: Schedule, accelerator: Any) -> None:
    """Say what is about to happen."""
    o, record = config.optim, "no record (vanilla MSN)"
    if config.ehr.groups:
        record = (
            f"{config.ehr.use} on {', '.join(config.ehr.groups)}: {len(films.columns)} columns, {config.ehr.inject}"
        )
        record += ", permuted between films (control)" if config.ehr.permuted else ""
    left_out = "; ".join(f"{n} {reason}" for reason, n in films.left_out.items() if n)
    number = sum(p.numel() for p in msn.anchor.parameters()) / 1e6
    log.say(
        f"films: {len(films)} of {films.table['subject_id'].nunique()} subjects"
        + (f" (left out: {left_out})" if left_out else "")
        + f"\nencoder: {config.encoder.arch}, {number:.1f} M weights, {config.encoder.image_size} px; {record}"
        + f"\ntraining: {plan.total} steps of {o.batch_size} films ({plan.total / plan.steps_per_epoch:.1f} epochs) on "
        + f"{accelerator.num_processes} x {accelerator.device.type}, {config.precision}; preset {config.preset}"
    )
    if o.accumulate > 1 and o.accumulate_mode == "approximate":
        log.say(
            f"note: the loss of each of {o.accumulate} parts by itself is an approximation: Sinkhorn, the mean entropy "
            "and batch norm see a part of the batch only"
        )


def _write_seen(folder: Path, films: Films) -> None:
    """Whom the run trains on, before it does: fine-tuning keeps them out of its test."""
    if run.is_main():
        seen = films.table[["subject_id", "split"]].drop_duplicates().sort_values("subject_id", ignore_index=True)
        with new_file(folder / "seen_subjects.parquet") as part:
            seen.to_parquet(part, index=False)


def _flat(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, item in value.items():
        out |= _flat(item, f"{prefix}{key}.") if isinstance(item, dict) else {f"{prefix}{key}": str(item)}
    return out
