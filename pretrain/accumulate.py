"""Gradients of one step's loss on this process's films, in one pass or in parts that fit into memory."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor

from pretrain.methods import Batch, Method


def backward(model: Any, method: Method, batch: Batch, accelerator: Any, number: int, exact: bool) -> dict[str, Tensor]:
    """Compute the gradients of the parameters.

    Args:
        model: `method` as prepared by accelerate.
        number: parts in which the batch passes the network.
        exact: as in one pass, for networks without batch norm; else each part has its own loss.
    Returns: the result of `Method.forward` for the whole batch.
    """
    if number == 1:
        out = model(batch)
        accelerator.backward(out["loss"])
        return dict(out)
    return (_exact if exact else _approximate)(model, method, batch, accelerator, number)


def _exact(model: Any, method: Method, batch: Batch, accelerator: Any, number: int) -> dict[str, Tensor]:
    """Embed all films without a graph, take the loss's gradients at the embeddings, and backpropagate them part by
    part.

    Both passes of a part use the same dropout and drop path: the generator's state is kept and restored.
    """
    generator, parts = random_generator(accelerator.device), batch.parts(number)
    states, embedded, observed = [], [], []
    with torch.no_grad(), accelerator.autocast():
        for part in parts:
            states.append(generator.get_state())
            embedded.append(method.embed_all(part))
            observed.append(method.observe_all(part))
    leaves = {name: value.float().requires_grad_() for name, value in _whole(embedded).items()}
    out = method.finish(leaves, _whole(observed), batch)
    with _alone(model, accelerator, True):
        accelerator.backward(out["loss"])
    grads = {name: leaf.grad.chunk(number, dim=1) for name, leaf in leaves.items() if leaf.grad is not None}
    after = generator.get_state()
    for i, (part, state) in enumerate(zip(parts, states, strict=True)):
        generator.set_state(state)
        with _alone(model, accelerator, i < number - 1):
            model(part, {name: grad[i] for name, grad in grads.items()})["loss"].backward()
    generator.set_state(after)
    return {name: value.detach() for name, value in out.items()}


def _whole(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Join tensors (V, B, ...) of the parts."""
    return {name: torch.cat([part[name] for part in parts], dim=1) for name in parts[0]}


def random_generator(device: torch.device) -> torch.Generator:
    """The generator that dropout and drop path use."""
    return (
        torch.cuda.default_generators[torch.cuda.current_device()] if device.type == "cuda" else torch.default_generator
    )


def _approximate(model: Any, method: Method, batch: Batch, accelerator: Any, number: int) -> dict[str, Tensor]:
    outs: list[dict[str, Tensor]] = []
    for i, part in enumerate(batch.parts(number)):
        with _alone(model, accelerator, i < number - 1):
            outs.append(model(part))
            accelerator.backward(outs[-1]["loss"] / number)
    scalars = [key for key, value in outs[0].items() if value.ndim == 0]
    merged = {key: torch.stack([out[key].detach() for out in outs]).mean(dim=0) for key in scalars}
    if "hits" in outs[0]:
        merged["hits"] = torch.stack([out["hits"] for out in outs]).sum(dim=0)
    return merged | {"features": torch.cat([out["features"] for out in outs])}


def _alone(model: Any, accelerator: Any, alone: bool) -> Any:
    """Average gradients over processes once, after the last part."""
    return accelerator.no_sync(model) if alone else contextlib.nullcontext()
