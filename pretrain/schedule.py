"""Learning rate, weight decay and momentum as pure functions of the optimizer step.

`stretch` > 1 ends a schedule before its last value is reached, as if the run were that much longer (the original MSN:
1.25).
"""

from __future__ import annotations

import math


def warmup_cosine(
    step: int, total: int, *, warmup: int, start: float, peak: float, end: float, stretch: float = 1.0
) -> float:
    """Linear from `start` at step 0 to `peak` at step `warmup`, then cosine to `end` at step `stretch * total`."""
    if step < warmup:
        return start + (peak - start) * step / warmup
    return cosine(step - warmup, total - warmup, peak, end, stretch)


def cosine(step: int, total: int, start: float, end: float, stretch: float = 1.0) -> float:
    """Half a cosine from `start` at step 0 to `end` at step `stretch * total`."""
    done = min(1.0, step / max(1.0, stretch * total))
    return end + (start - end) * (1 + math.cos(math.pi * done)) / 2


def linear(step: int, total: int, start: float, end: float, stretch: float = 1.0) -> float:
    """A straight line from `start` at step 0 to `end` at step `stretch * total`."""
    return start + (end - start) * min(1.0, step / max(1.0, stretch * total))
