"""The one loop of the fusion models: features/ + films + encoder/ -> results.json, predictions, a model.

Comes in: a FuseConfig. Goes out: runs/X/ with results.json, predictions/{val,test}.parquet, model.safetensors and,
where the encoder was tuned, encoder/. Validation chooses the epoch; the test split is read once, at the end.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import gather_object
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from configs import UserError
from configs.cli import Stopped
from finetune import metrics, outputs
from finetune.config import FuseConfig
from finetune.fusion import MODELS, Output, Sizes
from finetune.inputs import prepare
from finetune.net import FilmBranch, Net
from finetune.outputs import Predictions, weights_of
from finetune.samples import Samples, batches, stream
from pretrain import run
from pretrain.progress import Bar


class Scores(NamedTuple):
    """What validation says of an epoch; the higher AUROC is better, then the lower loss."""

    auroc: float  # NaN where no label has both classes
    loss: float

    def better(self, other: Scores | None) -> bool:
        if other is None or np.isnan(self.auroc):
            return other is None or self.loss < other.loss
        return (self.auroc, -self.loss) > (other.auroc, -other.loss)


def fuse(config: FuseConfig, args: argparse.Namespace | None = None) -> Path:
    """Train a model on a task and evaluate it.

    Returns: the run folder.
    Raises: UserError: unreadable inputs, an encoder that saw val or test subjects, a split without samples; Stopped:
        SIGTERM came, and the same command goes on.
    """
    uneven = DistributedDataParallelKwargs(find_unused_parameters=True)  # a batch may hold no film
    accelerator = run.accelerator(args, mixed_precision=config.precision, kwargs_handlers=[uneven])
    samples, films, about = prepare(config, accelerator)
    sources = [Path(config.features) / name for name in ("provenance.json", f"samples/{config.task}.parquet")]
    folder = run.open_run(config.out, config, sources=sources, may_differ=["workers", "cache"])
    if run.complete(folder):
        return folder
    log = run.Log(folder, accelerator)
    net = build(config, samples, films)
    paired = "paired" if getattr(net.model, "needs_film", False) else config.pairing
    parts = {split: samples.rows(split, paired) for split in ("train", "val", "test")}
    outputs.announce(log, config, samples, parts, net, about)
    train(net, samples, parts["train"], parts["val"], config, accelerator, log, folder)
    held_out = {split: predict(net, samples, parts[split], config, accelerator) for split in ("val", "test")}
    if accelerator.is_main_process:
        outputs.save(folder, net, samples, config)
        outputs.show(log, outputs.write(folder, samples, held_out, config, about), folder)
    run.finish(folder)
    return folder


def build(config: FuseConfig, samples: Samples, films: FilmBranch | None) -> Net:
    """A fresh net on a copy of the film branch."""
    torch.manual_seed(config.seed)
    sizes = Sizes(
        inputs=samples.num_inputs,
        film=0 if films is None else films.width,
        labels=len(samples.names),
        hidden=config.hidden,
        layers=config.layers,
        joint=config.joint,
        dropout=config.dropout,
        missing=config.missing,
    )
    return Net(copy.deepcopy(films), MODELS[config.model](sizes))


def loss_of(output: Output, labels: Tensor, has_image: Tensor, part_weight: float) -> Tensor:
    """Binary cross-entropy of the logits, plus part_weight times that of each branch (the film's where it is there)."""
    loss = _entropy(output.logits, labels)
    for name, logits in output.parts.items():
        known = has_image[:, :1] | torch.zeros_like(labels, dtype=torch.bool) if name == "film" else None
        loss = loss + part_weight * _entropy(logits, labels, known)
    return loss


def _entropy(logits: Tensor, labels: Tensor, where: Tensor | None = None) -> Tensor:
    known = ~labels.isnan() if where is None else ~labels.isnan() & where
    losses = functional.binary_cross_entropy_with_logits(logits.float(), labels.nan_to_num(), reduction="none")
    return (losses * known).sum() / known.sum().clamp(min=1)


def train(
    net: Net,
    samples: Samples,
    train_rows: NDArray[np.int64],
    val_rows: NDArray[np.int64],
    config: FuseConfig,
    accelerator: Accelerator,
    log: run.Log,
    folder: Path,
) -> None:
    """Train until validation stops getting better; leaves the best epoch's weights in `net`. Goes on if stopped."""
    optimizer = torch.optim.AdamW(_groups(net, config), betas=config.betas)
    state = run.load_checkpoint(folder)
    first, best, kept, waited = 0, None, weights_of(net), 0
    if state is not None:
        net.load_state_dict(state["net"])
        optimizer.load_state_dict(state["optimizer"])
        first, best, kept, waited = state["epoch"], Scores(*state["best"]), state["kept"], state["waited"]
    log.cut(first)
    wrapped, optimizer = accelerator.prepare(net, optimizer)
    with run.stopping() as stop, Bar("training", config.epochs, "epochs", shown=accelerator.is_main_process) as bar:
        bar.advance(first)
        for epoch in range(first, config.epochs):
            if waited >= config.patience:
                break
            loss = run_epoch(wrapped, optimizer, samples, train_rows, config, accelerator, epoch)
            now = scores(predict(net, samples, val_rows, config, accelerator), samples)
            waited = 0 if now.better(best) else waited + 1
            if waited == 0:
                best, kept = now, weights_of(net)
            log.log({"train/loss": loss, "val/loss": now.loss, "val/auroc/macro": now.auroc}, epoch + 1)
            bar.advance(1, f"loss {loss:.3f} val AUROC {now.auroc:.3f}")
            ended = stop.agreed()
            if ended or (config.checkpoint_every and (epoch + 1) % config.checkpoint_every == 0):
                assert best is not None, "there was an epoch"
                checkpoint = {"net": weights_of(net), "optimizer": optimizer.state_dict(), "kept": kept}
                checkpoint |= {"epoch": epoch + 1, "best": list(best), "waited": waited}
                run.save_checkpoint(folder, checkpoint, epoch + 1)
            if ended:
                raise Stopped(run.go_on(folder, epoch + 1))
    net.load_state_dict(kept)


def run_epoch(
    wrapped: nn.Module,
    optimizer: torch.optim.Optimizer,
    samples: Samples,
    rows: NDArray[np.int64],
    config: FuseConfig,
    accelerator: Accelerator,
    epoch: int,
) -> float:
    """One pass over the rows in an order that depends on seed and epoch only. Returns: the mean loss."""
    rng = np.random.default_rng([config.seed, epoch])
    parts = batches(samples.length[rows], config.batch_size, rng)
    rank, world = accelerator.process_index, accelerator.num_processes
    parts = [rows[part] for part in parts + parts[: -len(parts) % world]][rank::world]
    torch.manual_seed(int(rng.integers(2**62)) + rank)  # of dropout
    wrapped.train()
    total = 0.0
    for batch in stream(samples, parts, config.workers, images=not config.freeze):
        batch = {key: value.to(accelerator.device) for key, value in batch.items()}
        with accelerator.autocast():
            loss = loss_of(wrapped(batch), batch["labels"], batch["has_image"], config.part_weight)
        if not torch.isfinite(loss):
            raise UserError(f"the loss is not finite in epoch {epoch + 1}; lower lr ({config.lr}) or encoder_lr")
        optimizer.zero_grad()
        accelerator.backward(loss)
        if config.clip is not None:
            accelerator.clip_grad_norm_(wrapped.parameters(), config.clip)
        optimizer.step()
        total += loss.item()
    return total / len(parts)


@torch.no_grad()
def predict(
    net: Net, samples: Samples, rows: NDArray[np.int64], config: FuseConfig, accelerator: Accelerator
) -> Predictions:
    """Logits of the rows, each exactly once, whatever the number of processes."""
    net.eval()
    parts = [rows[part] for part in batches(samples.length[rows], 4 * config.batch_size)]
    found = []
    for batch in stream(
        samples, parts[accelerator.process_index :: accelerator.num_processes], config.workers, not config.freeze
    ):
        output = net({key: value.to(accelerator.device) for key, value in batch.items()})
        weights = output.weights if output.weights is not None else output.logits[:, :0]
        found.append((batch["rows"].numpy(), output.logits.double().cpu().numpy(), weights.double().cpu().numpy()))
    found = gather_object(found) if accelerator.num_processes > 1 else found
    at, logits, weights = (np.concatenate(column) for column in zip(*found, strict=True))
    order = np.argsort(at)
    assert np.array_equal(at[order], np.sort(rows)), "each sample is predicted once"
    return Predictions(at[order], logits[order], weights[order] if weights.shape[1] else None)


def scores(predictions: Predictions, samples: Samples) -> Scores:
    """Macro AUROC and loss, without intervals."""
    labels = samples.labels[predictions.rows]
    table = metrics.evaluate(labels, predictions.logits, names=samples.names, samples=0)
    value = table.loc[(table["label"] == "macro") & (table["metric"] == "auroc"), "value"].item()
    return Scores(float(value), _entropy(torch.from_numpy(predictions.logits), torch.from_numpy(labels)).item())


def _groups(net: Net, config: FuseConfig) -> list[dict[str, Any]]:
    """Weights of the model with decay, its biases without, and the encoder's with its own lr."""
    learned = [(name, p) for name, p in net.named_parameters() if p.requires_grad]
    encoder = [p for name, p in learned if name.startswith("films.encoder.")]
    own = [p for name, p in learned if not name.startswith("films.encoder.")]
    groups = []
    for weights, lr in ((own, config.lr), (encoder, config.encoder_lr)):
        for kept, decay in (
            ([p for p in weights if p.ndim > 1], config.weight_decay),
            ([p for p in weights if p.ndim < 2], 0.0),
        ):
            if kept:
                groups.append({"params": kept, "lr": lr, "weight_decay": decay})
    return groups
