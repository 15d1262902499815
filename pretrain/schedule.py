"""Learning rate, weight decay and momentum as pure functions of the optimizer step.

`stretch` > 1 ends a schedule before its last value is reached, as if the run were that much longer (the original MSN:
1.25).
"""

from __future__ import annotations

import math

from lightly.utils.scheduler import cosine_schedule

from pretrain.options import OptimConfig


def warmup_cosine(
    step: int, total: int, *, warmup: int, start: float, peak: float, end: float, stretch: float = 1.0
) -> float:
    """Linear from `start` at step 0 to `peak` at step `warmup`, then cosine to `end` at step `stretch * total`."""
    if step < warmup:
        return start + (peak - start) * step / warmup
    return cosine(step - warmup, stretch * total - warmup, peak, end)


def cosine(step: int, total: float, start: float, end: float, stretch: float = 1.0) -> float:
    """Half a cosine from `start` at step 0 to `end` at step `stretch * total`."""
    last = max(1.0, stretch * total)
    return cosine_schedule(min(step, last), last + 1, start, end)


def linear(step: int, total: int, start: float, end: float, stretch: float = 1.0) -> float:
    """A straight line from `start` at step 0 to `end` at step `stretch * total`."""
    return start + (end - start) * min(1.0, step / max(1.0, stretch * total))


class Schedule:
    """Every number that changes with the step."""

    def __init__(self, optim: OptimConfig, steps_per_epoch: int) -> None:
        o = self.o = optim
        self.steps_per_epoch = steps_per_epoch
        self.total = o.steps or math.ceil(o.epochs * steps_per_epoch)
        self.warmup = o.warmup_steps if o.warmup_steps is not None else round(o.warmup_epochs * steps_per_epoch)
        self.peak = o.lr * (o.batch_size / o.lr_batch if o.lr_batch else 1.0)

    def __call__(self, step: int) -> tuple[float, float, float]:
        """Learning rate, weight decay, momentum of the target."""
        o = self.o
        at = step // self.steps_per_epoch * self.steps_per_epoch if o.by_epoch else step
        start, end = self.peak * o.lr_start, self.peak * o.lr_end
        lr = warmup_cosine(at, self.total, warmup=self.warmup, start=start, peak=self.peak, end=end, stretch=o.stretch)
        decay = cosine(at, self.total, o.weight_decay, o.weight_decay_end, o.stretch)
        path = linear if o.ema_shape == "linear" else cosine
        return lr, decay, path(at, self.total, o.ema, o.ema_end, o.stretch)
