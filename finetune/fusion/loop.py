"""Train one net: epochs until validation stops improving, and predictions.

Input: a fresh net, samples, row numbers of train and val. Output: the net with the weights of its best epoch. A stopped
run resumes from its last checkpoint with the losses of an unbroken one: order and dropout of an epoch depend on seed
and epoch only, not on the number of processes.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from configs import UserError
from finetune.config import FuseConfig
from finetune.encoders import pooled
from finetune.fit import Scores, fit
from finetune.fusion.models import Late, Output
from finetune.fusion.net import Net
from finetune.fusion.outputs import Predictions
from finetune.fusion.samples import Samples, batches, stream
from finetune.metrics import macro_auroc
from pretrain import run
from pretrain.encoder.embed import check_finite


class WholeBatchDropout(TorchFunctionMode):
    """Dropout drawn for the whole batch as in one process; each process uses its own rows.

    All processes have the same seed. Dropout inside attention and drop path are not replaced: they differ by process.
    """

    def __init__(self, own: NDArray[np.int64], total: int) -> None:
        super().__init__()
        self.own, self.total = torch.from_numpy(own), total

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not functional.dropout or len(args[0]) != len(self.own):
            return func(*args, **(kwargs or {}))
        x, *rest = args
        whole = functional.dropout(x.new_ones(self.total, *x.shape[1:]), *rest, **(kwargs or {}))
        return x * whole[self.own.to(x.device)]


def loss_of(
    output: Output,
    labels: Tensor,
    has_image: Tensor,
    part_weight: float,
    exclusive: bool = False,
    accelerator: Accelerator | None = None,
) -> Tensor:
    """The loss of the logits, plus part_weight times that of each branch (the film's only for rows with a film).

    Args:
        labels: (B, L) 0, 1, NaN (ignored).
        has_image: (B, K).
        exclusive: exactly one label of a row is 1: softmax, not sigmoid.
        accelerator: with several processes, the mean of the result over them is the loss of the whole batch.

    `late` detaches its fused logits: its branches train at full weight and `part_weight` is ignored.
    """
    loss = entropy(output.logits, labels, exclusive=exclusive, accelerator=accelerator)
    if output.parts and not output.logits.requires_grad:
        part_weight = 1.0
    for name, logits in output.parts.items():
        where = has_image[:, :1] if name == "film" else torch.ones_like(has_image[:, :1])
        loss = loss + part_weight * entropy(logits, labels, where, exclusive=exclusive, accelerator=accelerator)
    return loss


def entropy(
    logits: Tensor,
    labels: Tensor,
    where: Tensor | None = None,
    *,
    exclusive: bool = False,
    accelerator: Accelerator | None = None,
) -> Tensor:
    """Over the rows `where`: mean binary cross-entropy of the known labels, or cross-entropy if `exclusive`."""
    known, targets = ~labels.isnan(), labels.nan_to_num()
    if exclusive:
        losses = functional.cross_entropy(logits.float(), targets, reduction="none")[:, None]
        known = known[:, :1]
    else:
        losses = functional.binary_cross_entropy_with_logits(logits.float(), targets, reduction="none")
    known = known if where is None else known & where
    count, world = known.sum(), 1
    if accelerator is not None and (world := accelerator.num_processes) > 1:
        count = accelerator.reduce(count, "sum")
    return world * (losses * known).sum() / count.clamp(min=1)


def train(
    net: Net,
    samples: Samples,
    rows: dict[str, NDArray[np.int64]],
    config: FuseConfig,
    accelerator: Accelerator,
    log: run.Log,
    folder: Path,
) -> Scores:
    """Train on rows["train"], choose the epoch on rows["val"]; `net` ends with the best epoch's weights.

    Returns: the best epoch's scores. Raises: Stopped: on SIGTERM; a checkpoint is in `folder`.
    """
    wrapped, optimizer = accelerator.prepare(net, torch.optim.AdamW(_groups(net, config), betas=config.betas))
    steps = partial(_epoch, net, wrapped, optimizer, samples, rows["train"], config, accelerator)
    validate = partial(scores, net, samples, rows["val"], config, accelerator)
    given = config.model_dump(include={"epochs", "patience", "plateau", "checkpoint_every"})
    best, _, _ = fit(net, optimizer, lambda epoch: [steps(epoch)], validate, log, folder, **given)
    return choose_share(net, samples, rows["val"], config, accelerator) or best


def _epoch(
    net: Net,
    wrapped: nn.Module,
    optimizer: torch.optim.Optimizer,
    samples: Samples,
    rows: NDArray[np.int64],
    config: FuseConfig,
    accelerator: Accelerator,
    epoch: int,
) -> float:
    """One pass over the rows. Returns: the mean loss, equal for any number of processes up to rounding."""
    rng = np.random.default_rng([config.seed, epoch])
    if config.epoch_samples is not None and config.epoch_samples < len(rows):
        rows = rng.choice(rows, config.epoch_samples, replace=False)
    whole = [rows[part] for part in batches(samples.length[rows], config.batch_size, rng)]
    own = [_own(len(part), accelerator) for part in whole]
    torch.manual_seed(int(rng.integers(2**62)))  # seeds dropout
    wrapped.train()
    total = 0.0
    parts = [part[mine] for part, mine in zip(whole, own, strict=True)]
    tuned = not config.freeze and epoch >= (config.unfreeze_after or 0)
    ahead = stream(samples, parts, config.workers, tuned)
    for i, (part, mine, batch) in enumerate(zip(whole, own, ahead, strict=True)):
        batch = {key: value.to(accelerator.device) for key, value in batch.items()}
        if accelerator.process_index >= len(part):  # a short batch has no row for this process: use one without weight
            batch["labels"].fill_(torch.nan)
        shared = WholeBatchDropout(mine, len(part)) if accelerator.num_processes > 1 else nullcontext()
        with accelerator.autocast(), shared:
            output = wrapped(batch)
        exclusive = samples.hours_left is not None
        loss = loss_of(output, batch["labels"], batch["has_image"], config.part_weight, exclusive, accelerator)
        mean = accelerator.reduce(loss.detach(), "mean") if accelerator.num_processes > 1 else loss.detach()
        if not torch.isfinite(mean):
            _refuse(
                net, samples, part[mine], batch, config, f"the loss is not finite in epoch {epoch + 1}, batch {i + 1}"
            )
        optimizer.zero_grad()
        accelerator.backward(loss)
        if config.clip is not None:
            accelerator.clip_grad_norm_(wrapped.parameters(), config.clip)
        optimizer.step()
        total += mean.item()
    return total / len(parts)


def _refuse(
    net: Net, samples: Samples, rows: NDArray[np.int64], batch: dict[str, Tensor], config: FuseConfig, what: str
) -> NoReturn:
    """Stop and name the encoder and the films of a batch."""
    found = samples.films[rows]
    films, encoder = [samples.film_ids[i] for i in found[found >= 0]], None if net.films is None else net.films.encoder
    if net.films is not None and encoder is not None and "images" in batch and films:
        with torch.no_grad():
            check_finite(pooled(encoder, batch["images"], net.films.pool).float(), encoder.name, films)
    of = f"whose {len(films)} films begin with {films[0]}" if films else "which has no film"
    raise UserError(f"{config.encoder or config.model}: {what}, {of}; lower lr ({config.lr}) or encoder_lr")


def _own(rows: int, accelerator: Accelerator) -> NDArray[np.int64]:
    """This process's positions in a batch; the first row if there are fewer rows than processes."""
    return (
        np.arange(rows)[accelerator.process_index :: accelerator.num_processes]
        if (accelerator.process_index < rows)
        else np.zeros(1, np.int64)
    )


@torch.no_grad()
def predict(
    net: Net, samples: Samples, rows: NDArray[np.int64], config: FuseConfig, accelerator: Accelerator
) -> Predictions:
    """Logits of the rows, each exactly once with any number of processes; log-odds of the softmax for exclusive
    labels."""
    net.eval()
    parts = [rows[part] for part in batches(samples.length[rows], 4 * config.batch_size)]
    parts, found = parts[accelerator.process_index :: accelerator.num_processes], []
    for batch in stream(samples, parts, config.workers, not config.freeze):
        with accelerator.autocast():
            batch = {key: value.to(accelerator.device) for key, value in batch.items()}
            output: Output = net(batch)
        raw = output.logits.double()
        if not raw.isfinite().all():
            _refuse(net, samples, batch["rows"].cpu().numpy(), batch, config, "logits are not finite in a batch")
        raw = raw if samples.hours_left is None else torch.logit(raw.softmax(1), eps=1e-9)
        weighed = output.weights if output.weights is not None else raw[:, :0]
        found.append((batch["rows"].cpu().numpy(), raw.cpu().numpy(), weighed.double().cpu().numpy()))
    found = gather_object(found) if accelerator.num_processes > 1 else found
    at, logits, weights = (np.concatenate(column) for column in zip(*found, strict=True))
    order = np.argsort(at)
    assert np.array_equal(at[order], np.sort(rows)), "each sample is predicted once"
    return Predictions(at[order], logits[order], weights[order] if weights.shape[1] else None)


def scores(net: Net, samples: Samples, rows: NDArray[np.int64], config: FuseConfig, accelerator: Accelerator) -> Scores:
    """Macro AUROC and loss, without intervals."""
    predictions = predict(net, samples, rows, config, accelerator)
    labels = samples.labels[predictions.rows]
    loss = entropy(torch.from_numpy(predictions.logits), torch.from_numpy(labels)).item()
    if not ((labels == 1).any(0) & (labels == 0).any(0)).any():
        return Scores(float("nan"), loss)
    return Scores(float(macro_auroc(labels, predictions.logits[:, None])[0]), loss)


def choose_share(
    net: Net, samples: Samples, rows: NDArray[np.int64], config: FuseConfig, accelerator: Accelerator
) -> Scores | None:
    """Set the film's weight of a `late` net by validation AUROC; None for other nets."""
    model = net.model
    if not isinstance(model, Late):
        return None
    best: tuple[Scores, float] | None = None
    for share in np.linspace(0, 1, 11).tolist():
        model.share.fill_(share)
        now = scores(net, samples, rows, config, accelerator)
        if now.better(best and best[0]):
            best = now, share
    assert best is not None
    model.share.fill_(best[1])
    return best[0]


def _groups(net: Net, config: FuseConfig) -> list[dict[str, Any]]:
    """Parameter groups: the model's weights with decay, its biases without, and the encoder's with its own lr."""
    learned = [(name, p) for name, p in net.named_parameters() if p.requires_grad]
    encoder = [p for name, p in learned if name.startswith("films.encoder.")]
    own = [p for name, p in learned if not name.startswith("films.encoder.")]
    groups: list[dict[str, Any]] = []
    for weights, lr in ((own, config.lr), (encoder, config.encoder_lr)):
        matrices, others = [p for p in weights if p.ndim > 1], [p for p in weights if p.ndim < 2]
        for kept, decay in ((matrices, config.weight_decay), (others, 0.0)):
            groups += [{"params": kept, "lr": lr, "weight_decay": decay}] if kept else []
    return groups
