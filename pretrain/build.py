"""What a pretraining is built of, each part from the config: accelerator, method, optimizer, batches."""

from __future__ import annotations

import argparse
import ctypes
import sys
from pathlib import Path
from typing import Any

import torch
from timm.layers import convert_sync_batchnorm
from timm.optim import Lars
from torch.nn.modules.batchnorm import _BatchNorm

from configs import UserError, load
from configs.amounts import amount, machine_memory
from pretrain import encoder as encoders
from pretrain import run
from pretrain.config import PretrainConfig
from pretrain.data import Cutter, Films, Partners, Steps
from pretrain.encoder.memory import TRAINED, weights_fit
from pretrain.encoder.network import check_model_args
from pretrain.encoder.preprocess import Preprocess
from pretrain.encoder.sources import start_from
from pretrain.methods import Method, Setup, find
from pretrain.methods.record import Record
from pretrain.options import METHODS, SECTIONS, OptimConfig
from pretrain.store import Store
from pretrain.text.notes import TextSource
from pretrain.views import Views


def accelerator(config: PretrainConfig, args: argparse.Namespace | None) -> Any:
    """Set up processes and precision. Raises: UserError: this machine does not support the config."""
    from accelerate import DistributedDataParallelKwargs

    run.check_trackers(config.trackers)
    ddp = DistributedDataParallelKwargs(gradient_as_bucket_view=True)
    return run.accelerator(args, limit=config.process_timeout, mixed_precision=config.precision, kwargs_handlers=[ddp])


def text(config: PretrainConfig) -> TextSource | None:
    """The source of the EHR group `text`, if that group is used."""
    if config.ehr.notes is None or config.ehr.text_encoder is None:
        return None
    return TextSource(config.ehr.notes, config.ehr.text_encoder, Path(config.out).parent / "cache")


def method(config: PretrainConfig, films: Films | None = None, log: run.Log | None = None) -> Method:
    """The method's module as the config says, initialised from torch's global generator.

    Args:
        films: whose record takes part; None: no record.
    """
    e, v = config.encoder, config.views
    check_model_args(e.arch, e.in_chans, e.image_size, e.model_args, TRAINED)
    encoder = encoders.create(
        e.arch,
        in_chans=e.in_chans,
        image_size=e.image_size,
        model_args=e.model_args,
        preprocess=Preprocess(e.image_size, v.normalise, v.mean, v.std, e.in_chans),
        pool=e.pool,
        positions=e.positions,
    )
    if e.init is not None:
        said = start_from(encoder, e.init, e.init_heads)
        encoder.name = e.init
        if log is not None:
            log.say(f"starting from {said}")
    encoder.checkpointing = config.checkpointing
    _freeze_unused(encoder)
    wanted = find(config.method)
    _suits(config, wanted, encoder)
    setup = Setup(
        hidden=config.head.hidden or 4 * encoder.width,
        out=config.head.out or encoder.width,
        norm=config.head.norm,
        record=_record(config, wanted, films),
        options=_options(config, wanted),
        num_random=v.num_random,
        steps_per_epoch=1.0 if films is None else max(1, len(films) // config.optim.batch_size),
        parts=config.optim.accumulate if config.optim.accumulate_mode == "approximate" else 1,
    )
    keys = f"head.hidden={setup.hidden}, head.out={setup.out}, and the options of method {config.method}"
    with weights_fit(keys, TRAINED, encoder):
        return wanted(encoder, setup)


def _freeze_unused(encoder: encoders.Encoder) -> None:
    """Parameters that the chosen pool does not use are not trained: without a gradient several processes would fail."""
    if encoder.meta["pool"] == encoder.pools[0]:
        return
    trained, side = list(encoder.parameters()), encoder.meta["image_size"]
    out = encoder.eval()(torch.zeros(1, encoder.meta["in_chans"], side, side))
    for parameter, used in zip(trained, torch.autograd.grad(out.sum(), trained, allow_unused=True), strict=True):
        parameter.requires_grad_(used is not None)
    encoder.train()


def _record(config: PretrainConfig, wanted: type[Method], films: Films | None) -> Record:
    """How the record takes part. Raises: UserError: the method or the films cannot use it so."""
    ehr = config.ehr
    if films is None or not films.columns:
        return Record()
    if ehr.use == "condition" and not wanted.is_told:
        raise UserError(
            f"method {config.method} has no embedding that a record could condition; "
            f"set ehr.use=predict or ehr.use=contrast, or ehr.groups=[]"
        )
    if films.known is not None and not films.known.any():
        done = {"condition": "condition on", "predict": "predict", "contrast": "contrast"}[ehr.use]
        raise UserError(f"ehr.groups {', '.join(ehr.groups)}: no film has a known value, so there is nothing to {done}")
    weight = ehr.predict_weight if ehr.use == "predict" else ehr.contrast_weight
    widths = {"width": len(films.columns), "hidden": ehr.width}
    return Record(
        use=ehr.use,
        inject=ehr.inject,
        binary=films.binary,
        weight=weight,
        temperature=ehr.contrast_temperature,
        **widths,
    )


def _options(config: PretrainConfig, wanted: type[Method]) -> Any:
    """The method's own section of the config; `method_args` of a method from a user's file."""
    section = SECTIONS.get(config.method)
    if section is not None:
        return getattr(config, section)
    if config.method in METHODS:
        return None
    made = getattr(wanted, "Options", None)
    return dict(config.method_args) if made is None else load(made, config.method_args)


def _suits(config: PretrainConfig, wanted: type[Method], encoder: encoders.Encoder) -> None:
    """Refuse what this method cannot do."""
    anchors, name = config.views.num_random + config.views.num_focal, config.method
    if wanted.needs_vit and not encoder.is_vit:
        raise UserError(
            f"method {name} works on the tokens of a ViT: it leaves out or replaces tokens, which only timm's "
            f"VisionTransformer and Eva do exactly; {config.encoder.arch} has none or masks its input; "
            "take method=msn, dino, simclr, vicreg or byol"
        )
    if wanted.least_anchors == 0 and anchors:
        raise UserError(f"method {name} sees one view of a film; set views.num_random=0 and views.num_focal=0")
    if anchors < wanted.least_anchors:
        raise UserError(
            f"views.num_random and views.num_focal are both 0: there is no anchor to train; method {name} needs "
            f"{wanted.least_anchors}"
        )
    if wanted.least_anchors == 0 and config.films.positives != "film":
        raise UserError(f"method {name} compares no two films; set films.positives=film")
    if wanted.masked != ("random",) and config.mask.focal:
        raise UserError(f"method {name} masks no focal views; set mask.focal=false")
    if config.mask.ratio and not encoder.is_vit and wanted.has_target and not wanted.masks_input:
        raise UserError(
            f"mask.ratio: a convolutional network's views are masked in their input, which method {name}'s "
            "teacher would see too; set mask.ratio=0, or method=msn"
        )
    if config.mask.ratio and not wanted.masks_input and not encoder.is_vit and _has_batch_norm(encoder):
        raise UserError(
            f"mask.ratio: method {name} exports one batch norm for masked and unmasked views; set mask.ratio=0, or "
            "method=msn, which keeps them apart"
        )
    if "target" in wanted.masked and not config.mask.ratio:
        raise UserError(f"method {name} learns from masked patches; set mask.ratio, e.g. 0.75")
    patches = (config.encoder.image_size // encoder.patch) ** 2
    if "target" in wanted.masked and int(patches * config.mask.ratio) == 0:
        raise UserError(
            f"method {name} learns from masked patches: mask.ratio {config.mask.ratio} of {patches} patches masks none"
        )
    if wanted.masked == ("target",) and encoder.pools == ("map",):
        raise UserError(
            f"method {name} trains no pooling, and {config.encoder.arch} learns its own; take another encoder.arch"
        )
    if config.optim.batch_size < wanted.least_films:
        raise UserError(
            f"method {name} compares the films of a batch: optim.batch_size {config.optim.batch_size}, "
            f"wanted at least {wanted.least_films}"
        )
    if config.ehr.groups and config.ehr.use == "contrast" and config.optim.batch_size < 2:
        raise UserError("ehr.use: contrast compares the films of a batch; raise optim.batch_size to 2 or more")


def optimizer(optim: OptimConfig, method: Method) -> torch.optim.Optimizer:
    """AdamW, or LARS with momentum .9; learning rates and decays are set at every step."""
    groups = method.groups(optim.decay_all)
    if optim.optimizer == "lars":  # matrices are adapted at a decay of 0 too, biases and norms never
        return Lars([group | {"always_adapt": group["decays"]} for group in groups], lr=1.0, momentum=0.9)
    return torch.optim.AdamW(groups, lr=1.0, betas=optim.betas, fused=True)


def steps(config: PretrainConfig, films: Films, store: Store, method: Method, accelerator: Any) -> Steps:
    """The batches of this process. Raises: UserError: films, store, network and batch do not fit together."""
    encoder = method.anchor
    v, size, patch = config.views, config.encoder.image_size, encoder.patch if encoder.is_vit else config.mask.cell
    world, positives = accelerator.num_processes, config.films.positives
    _fit(config, store, encoder, world)
    cutter = Cutter(
        target=Views(1, size, v.target_scale, v),
        random=Views(v.num_random, size, v.random_scale, v),
        focal=Views(v.num_focal, v.focal_size, v.focal_scale, v),
        preprocess=encoder.preprocess,
        patch=patch,
        is_vit=encoder.is_vit,
        mask_ratio=config.mask.ratio,
        masked=(*method.masked, "focal") if config.mask.focal else method.masked,
        block=config.mask.shape == "block",
        fill=config.mask.fill,
        seed=config.seed,
    )
    found = Steps(
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
    if config.encoder.init is not None:  # before any training: do these weights overflow?
        ids = found.dicom_ids[found.rows(0)[:8]].tolist()
        encoders.embed(encoder, store.read(ids), names=ids)
        method.train()
    return found


def _fit(config: PretrainConfig, store: Store, encoder: encoders.Encoder, world: int) -> None:
    """Refuse combinations that would fail, or be meaningless, during a step."""
    size, patch = config.encoder.image_size, encoder.patch
    sides = {"encoder.image_size": size}
    if config.views.num_focal:
        sides["views.focal_size"] = config.views.focal_size
    for name, side in sides.items():
        if encoder.is_vit and side % patch:
            raise UserError(f"{name} {side} is not whole patches of {patch} px; e.g. {round(side / patch) * patch}")
        masked = config.mask.ratio and (name == "encoder.image_size" or config.mask.focal)
        if not encoder.is_vit and masked and config.mask.cell > side:
            raise UserError(f"mask.cell {config.mask.cell} is more than {name} {side}: nothing could be masked")
        if not encoder.is_vit:
            _passes(encoder, side, name)
    if store.size < size:
        raise UserError(
            f"{store.folder}: its films are {store.size} px, encoder.image_size is {size}, enlarging adds nothing; "
            f"pack them with size={size} or more, or set encoder.image_size={store.size // patch * patch}"
        )
    batch, parts = config.optim.batch_size, world * config.optim.accumulate
    if batch % parts:
        raise UserError(
            f"optim.batch_size {batch} does not divide among {world} processes x {config.optim.accumulate} parts; "
            f"choose a multiple of {parts}"
        )
    v = config.views
    pixels = size**2 * (1 + v.num_random) + v.focal_size**2 * v.num_focal
    need, has = 4 * batch // parts * pixels * config.encoder.in_chans, machine_memory()
    if need > has:
        raise UserError(
            f"optim.batch_size {batch}: the views of {batch // parts} films at a time are {amount(need)}, this machine "
            f"has {amount(has)} of memory; lower it, raise optim.accumulate, or make the views fewer or smaller"
        )
    drawn = [f"{key}={value}" for key, value in encoder.meta["model_args"].items() if "drop" in key and value]
    if config.compile and drawn and config.optim.accumulate > 1 and config.optim.accumulate_mode == "exact":
        raise UserError(
            f"compile, exact accumulation and {', '.join(drawn)}: a compiled network may draw other random numbers "
            "in the second pass; set compile=false, or optim.accumulate_mode=approximate"
        )
    exact = config.optim.accumulate > 1 and config.optim.accumulate_mode == "exact"
    if exact and _has_batch_norm(encoder):
        raise UserError(
            f"optim.accumulate > 1 with batch norm in {encoder.meta['arch']}, which couples films: exact needs a "
            "network without it; or say optim.accumulate_mode: approximate"
        )
    if batch // parts < 2 and _has_batch_norm(encoder):
        raise UserError("batch norm of a convolutional net needs two films or more at a time: raise optim.batch_size")
    if batch // parts < 2 and config.head.norm == "batch":
        raise UserError("batch norm needs two films or more at a time: raise optim.batch_size, or set head.norm: layer")


def _has_batch_norm(encoder: encoders.Encoder) -> bool:
    return any(isinstance(module, _BatchNorm) for module in encoder.modules())


def _passes(encoder: encoders.Encoder, side: int, name: str) -> None:
    """Refuse views that a net does not take: too small, or of another size than its positions and windows."""
    if side >= 64 and side == encoder.meta["image_size"]:
        return
    was_training = encoder.training
    try:
        with torch.no_grad():
            encoder.eval()(torch.zeros(1, encoder.meta["in_chans"], side, side))
    except (RuntimeError, AssertionError, ValueError) as error:
        if side >= 64 or isinstance(error, AssertionError):
            raise UserError(
                f"{name} {side}: {encoder.meta['arch']} takes films of encoder.image_size {encoder.meta['image_size']} "
                f"only ({str(error).splitlines()[0]}); set views.num_focal=0, or views.focal_size to that size"
            ) from None
        raise UserError(
            f"{name} {side} is too small for {encoder.meta['arch']}: no feature map is left; use e.g. 64"
        ) from None
    finally:
        encoder.train(was_training)


def synchronise(method: Method) -> Method:
    """Batch norm over all processes, on GPUs. Use timm's conversion: torch's drops DenseNet's fused activations."""
    made: Method = convert_sync_batchnorm(method)
    return made


def prepare(
    method: Method, optimizer: Any, accelerator: Any, config: PretrainConfig, state: dict[str, Any] | None
) -> Any:
    """Prepare method and optimizer for this machine, with the optimizer's `state`."""
    if accelerator.device.type == "cuda" and accelerator.num_processes > 1:
        synchronise(method)
    if not method.anchor.is_vit:  # channels-last convolutions are faster on GPUs and take a third less time on CPUs
        method.to(memory_format=torch.channels_last)
    if config.compile:  # one graph per view size is faster than one for all sizes
        for encoder in {id(e): e for e in (method.anchor, method.product[1])}.values():
            encoder.compile(dynamic=False)
    model, optimizer = accelerator.prepare(method, optimizer)
    if state is not None:
        optimizer.load_state_dict(state["optimizer"])
        _as_laid_out(optimizer)
        if accelerator.scaler is not None and "scaler" in state:
            accelerator.scaler.load_state_dict(state["scaler"])
    return model, optimizer


def _as_laid_out(optimizer: Any) -> None:
    """Store moments in the memory order of their parameters: the fused AdamW assumes it without a check."""
    for parameter, moments in optimizer.state.items():
        for name, value in moments.items():
            if value.shape == parameter.shape and value.stride() != parameter.stride():
                moments[name] = torch.empty_like(parameter).copy_(value)


# ---- Memory of a training process on Linux: freed memory stays with the process.

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # of glibc's malloc.h


def keep_freed_memory() -> bool:
    """Set glibc to keep large freed blocks instead of returning them to the system between steps.

    A step allocates the same hundreds of megabytes as the one before. If they were returned, each page would be faulted
    in and zeroed again, which costs more than the arithmetic of the views. Processes forked later inherit the setting.
    Returns: whether the C library accepted it; C libraries other than glibc are left unchanged.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(_MMAP_MAX, 0)) and bool(mallopt(_TRIM_THRESHOLD, 2**31 - 1))
