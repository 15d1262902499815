"""Refuse a network that cannot fit into this machine's memory before its weights are allocated.

Input: the block that builds it. Output: the block's own, or a UserError that names the keys and the sizes.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.utils._python_dispatch import TorchDispatchMode

from configs import UserError
from configs.amounts import amount, machine_memory

TRAINED = 4  # copies of a trained weight: itself, its gradient, two moments of AdamW
DEEPEST = 1_000  # blocks; the deepest published networks have about 200
BYTES = 4


class _Sizes(TorchDispatchMode):
    """Passes the number of elements of each new tensor to `check` before it is allocated."""

    def __init__(self, check: Any) -> None:
        super().__init__()
        self.check = check

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        size = args[0] if args else None
        if isinstance(size, (list, tuple)) and size and all(isinstance(side, int) for side in size):
            self.check(math.prod(size))
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def weights_fit(keys: str, copies: int = 1, beside: nn.Module | None = None) -> Iterator[None]:
    """Stop the building of a network as soon as its weights exceed the machine's memory.

    Args:
        keys: of the config that set its size, for the message.
        copies: of each weight that the work will hold.
        beside: a network that is held in as many copies.
    Raises: UserError.
    """
    limit, held = machine_memory(), 0 if beside is None else sum(p.numel() for p in beside.parameters())

    def check(more: int) -> None:
        if (need := (held + more) * BYTES * copies) > limit:
            each = f", {copies} copies of each weight" if copies > 1 else ""
            raise UserError(
                f"{keys}: more than {amount(need)} of memory are needed{each}; this machine has {amount(limit)}. "
                "Make the network smaller"
            )

    def registered(module: nn.Module, name: str, parameter: Tensor | None) -> None:
        nonlocal held
        if parameter is not None:
            check(parameter.numel())
            held += parameter.numel()

    hook = register_module_parameter_registration_hook(registered)
    try:
        with _Sizes(check):
            yield
    finally:
        hook.remove()


def tried_on_meta(build: Callable[[], object], keys: str, copies: int) -> None:
    """Build a network without memory for its weights, to find out whether they fit. Raises: UserError: they do not."""
    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"), weights_fit(keys, copies):
            build()
    except UserError:
        raise
    except Exception:  # some networks compute with values while they are built, which such weights have not
        return


def check_arguments(args: dict[str, Any], where: str) -> None:
    """Refuse arguments of a network with more blocks than can be meant. Raises: UserError."""
    for key, value in args.items():
        for number in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(number, int) and ("depth" in key or "layers" in key) and number > DEEPEST:
                raise UserError(f"{where}: {key}={number} is more than {DEEPEST} blocks; choose fewer")
