"""Gradients of one step's loss on this process's films, in one pass or in parts that fit into memory."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor

from pretrain.msn import MSN, Batch


def backward(model: Any, msn: MSN, batch: Batch, accelerator: Any, number: int, exact: bool) -> dict[str, Tensor]:
    """Leave the gradients in the parameters.

    Args:
        model: `msn` as accelerate prepared it.
        number: parts in which the batch passes the network.
        exact: as if in one pass, for networks without batch norm; else each part has a loss of its own.
    Returns: what `MSN.forward` does, of the whole batch.
    """
    if number == 1:
        out = model(batch)
        accelerator.backward(out["loss"])
        return dict(out)
    parts = batch.parts(number)
    return (_exact if exact else _approximate)(model, msn, parts, accelerator)


def _exact(model: Any, msn: MSN, parts: list[Batch], accelerator: Any) -> dict[str, Tensor]:
    """Embed all films without a graph; the loss's gradient at the embeddings then stands for the loss, part by part."""
    with torch.no_grad(), accelerator.autocast():
        embedded = [msn.embed_anchors(part) for part in parts]
        looked_at = [msn.embed_targets(part) for part in parts]
    by_part = [
        anchors.float().unflatten(0, (-1, len(t))) for (anchors, _), (t, _) in zip(embedded, looked_at, strict=True)
    ]
    leaf = torch.cat(by_part, dim=1).flatten(0, 1).requires_grad_()  # (V*B, out), view-major
    targets, features = (torch.cat([t[i] for t in looked_at]) for i in range(2))
    extra = {key: torch.stack([e[key] for _, e in embedded]).mean(dim=0) for key in embedded[0][1]}
    out = msn.score(leaf, targets, features, extra)
    with _alone(model, accelerator, True):
        accelerator.backward(out["loss"])
    assert leaf.grad is not None
    grads = leaf.grad.unflatten(0, (-1, len(targets))).chunk(len(parts), dim=1)
    scale = accelerator.scaler.get_scale() if accelerator.scaler is not None else 1.0
    for i, part in enumerate(parts):
        with _alone(model, accelerator, i < len(parts) - 1):
            model(part, grads[i].flatten(0, 1), scale / len(parts))["loss"].backward()
    return out


def _approximate(model: Any, msn: MSN, parts: list[Batch], accelerator: Any) -> dict[str, Tensor]:
    outs: list[dict[str, Tensor]] = []
    for i, part in enumerate(parts):
        with _alone(model, accelerator, i < len(parts) - 1):
            outs.append(model(part))
            accelerator.backward(outs[-1]["loss"] / len(parts))
    scalars = [key for key, value in outs[0].items() if value.ndim == 0]
    merged = {key: torch.stack([out[key].detach() for out in outs]).mean(dim=0) for key in scalars}
    hits = torch.stack([out["hits"] for out in outs]).sum(dim=0)
    return merged | {"hits": hits, "features": torch.cat([out["features"] for out in outs])}


def _alone(model: Any, accelerator: Any, alone: bool) -> Any:
    """Gradients are averaged over processes once, after the last part."""
    return accelerator.no_sync(model) if alone else contextlib.nullcontext()
