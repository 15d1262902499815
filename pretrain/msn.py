"""The method: masked anchors, told of the record, predict the prototypes of an unmasked target.

Comes in: normalised views and the static EHR vectors of a batch. Goes out: the loss and what a run logs.
`MSN.forward` does all that needs a gradient, prototypes included, so that one module goes to `accelerator.prepare`;
every trained parameter gets a gradient in every step. The target is a moving average of the anchor; EHR enters on the
anchor's side only and is dropped after pretraining.
The target draws nothing at random: dropout and drop path act on the anchor only. Batch norm of the target normalises
by the batch at hand, as in the original, so that its output depends on the batch alone; its running statistics, those
of unmasked views, are exported.
Differs from CXR-EHR-MSN: prototypes are trained; `add` conditions by h + W e with W = 0 at the start (there, and with
`concat`: [h; f(e)] -> g); focal views are unmasked unless asked; every patch can be masked (there the last always was).
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from typing import Any, Literal

import torch
from lightly.models.modules.heads import ProjectionHead
from lightly.models.utils import update_momentum
from torch import Tensor, nn

from pretrain.encoder import Encoder
from pretrain.loss import msn_loss


@dataclasses.dataclass(frozen=True)
class Record:
    """How the static vector (S,) takes part. `width` 0: vanilla MSN."""

    width: int = 0
    use: Literal["condition", "predict"] = "condition"
    inject: Literal["add", "concat"] = "add"
    hidden: int = 128
    predict_weight: float = 1.0


@dataclasses.dataclass(frozen=True)
class Batch:
    """What one step computes on; the leading dimension is view-major (all films of view 0, then view 1).

    Args:
        target: (B, C, H, W).
        anchors: random views (V*B, C, H, W), then focal views (F*B, C, h, w); either may be missing.
        keep: for each of `anchors`, indices (V*B, n) of the patches to compute, or None: all.
        static: (B, S), or None.
    """

    target: Tensor
    anchors: list[Tensor]
    keep: list[Tensor | None]
    static: Tensor | None

    def parts(self, number: int) -> list[Batch]:
        """The same films in `number` equal parts."""
        if number == 1:
            return [self]
        size = len(self.target) // number

        def part(x: Tensor | None, i: int) -> Any:
            if x is None:
                return None
            by_view = x.unflatten(0, (-1, len(self.target)))  # (V, B, ...)
            return by_view[:, i * size : (i + 1) * size].flatten(0, 1)

        return [
            Batch(
                part(self.target, i),
                [part(x, i) for x in self.anchors],
                [part(x, i) for x in self.keep],
                part(self.static, i),
            )
            for i in range(number)
        ]


class MSN(nn.Module):
    """Anchor and target branches, prototypes, and the record's way in."""

    def __init__(
        self,
        encoder: Encoder,
        *,
        num_prototypes: int,
        hidden: int,
        out: int,
        norm: str = "batch",
        record: Record = Record(),
        loss: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.anchor = encoder
        self.anchor_head = projection_head(encoder.width, hidden, out, norm)
        self.target = copy.deepcopy(encoder).requires_grad_(False)
        self.target_head = copy.deepcopy(self.anchor_head).requires_grad_(False)
        self.prototypes = nn.Parameter(torch.empty(num_prototypes, out).uniform_(-(out**-0.5), out**-0.5))
        self.record = record
        self.condition = _condition(encoder.width, record) if record.width and record.use == "condition" else None
        self.predict = nn.Linear(encoder.width, record.width) if record.width and record.use == "predict" else None
        self.loss_options = loss or {}
        self.train()

    def train(self, mode: bool = True) -> MSN:
        """Training mode for all modules but the target's stochastic ones (dropout, drop path, DenseNet's layers)."""
        super().train(mode)
        for module in [*self.target.modules(), *self.target_head.modules()]:
            module.training = mode and isinstance(module, nn.modules.batchnorm._BatchNorm)
        return self

    def forward(self, batch: Batch, grads: Tensor | None = None, scale: float = 1.0) -> dict[str, Tensor]:
        """Loss and parts (scalars), `features` (B, D) of the target, `hits` (K,): targets nearest to each prototype.

        With `grads`, the loss's gradient at the projected anchors (V*B, out), `loss` is what has that gradient: the
        second pass of exact accumulation. `scale` is that of the other losses there.
        """
        anchors, extra = self.embed_anchors(batch)
        if grads is not None:
            carrier = (anchors.float() * grads).sum() + scale * sum(extra.values())
            return {"loss": carrier + 0 * self.prototypes.sum()}
        targets, features = self.embed_targets(batch)
        return self.score(anchors, targets, features, extra)

    def embed_anchors(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Projected anchors (V*B, out), and the loss of predicting the record where that is asked for."""
        parts = [self.anchor(view, keep=keep) for view, keep in zip(batch.anchors, batch.keep, strict=True)]
        extra: dict[str, Tensor] = {}
        if self.predict is not None and batch.static is not None:
            views = torch.cat(parts)
            wanted = batch.static.repeat(len(views) // len(batch.static), 1)
            error = nn.functional.mse_loss(self.predict(views).float(), wanted)
            extra["record_error"] = self.record.predict_weight * error
        parts = [self._tell(part, batch.static) for part in parts]
        if self.anchor.is_vit:  # one batch of all views, as in the original; a convolutional net's passes stay apart
            return self.anchor_head(torch.cat(parts)), extra
        return torch.cat([self.anchor_head(part) for part in parts]), extra

    @torch.no_grad()
    def embed_targets(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Projected targets (B, out) and the features (B, D) under them."""
        features = self.target(batch.target)
        return self.target_head(features), features

    def score(self, anchors: Tensor, targets: Tensor, features: Tensor, extra: dict[str, Tensor]) -> dict[str, Tensor]:
        """The loss on embeddings."""
        out = msn_loss(anchors, targets, self.prototypes, **self.loss_options)
        for name, value in extra.items():
            out["loss"] = out["loss"] + value
            out[name] = value.detach()
        with torch.no_grad():
            unit = nn.functional.normalize(self.prototypes.float(), dim=1)
            nearest = (targets.float() @ unit.T).argmax(dim=1)
            out["hits"] = torch.bincount(nearest, minlength=len(self.prototypes))
        out["features"] = features.detach().float()
        return out

    def _tell(self, features: Tensor, static: Tensor | None) -> Tensor:
        """The record's part in the anchor: (V*B, D) -> (V*B, D)."""
        if self.condition is None or static is None:
            return features
        return self.condition(features, static.repeat(len(features) // len(static), 1))

    @torch.no_grad()
    def update_target(self, momentum: float) -> None:
        """target <- momentum * target + (1 - momentum) * anchor; parameters only, as in the original."""
        update_momentum(self.anchor, self.target, momentum)
        update_momentum(self.anchor_head, self.target_head, momentum)

    def groups(self, decay_all: bool = False) -> list[dict[str, Any]]:
        """Optimizer groups; `decays` says whether weight decay applies. Prototypes stand alone, undecayed."""
        named = [(n, p) for n, p in self.named_parameters() if p.requires_grad and n != "prototypes"]
        decayed = [p for n, p in named if decay_all or (p.ndim > 1 and not _is_token(n))]
        kept = {id(p) for p in decayed}
        return [
            {"params": decayed, "decays": True},
            {"params": [p for _, p in named if id(p) not in kept], "decays": False},
            {"params": [self.prototypes], "decays": False},
        ]


class Add(nn.Module):
    """h + W e, W = 0 at the start: the anchor begins as that of vanilla MSN, and a zero record is no record."""

    def __init__(self, width: int, record_width: int) -> None:
        super().__init__()
        self.weight = nn.Linear(record_width, width, bias=False)
        nn.init.zeros_(self.weight.weight)

    def forward(self, features: Tensor, static: Tensor) -> Tensor:
        return features + self.weight(static)


class Concat(nn.Module):
    """g([h; f(e)]), both linear, as published."""

    def __init__(self, width: int, record_width: int, hidden: int) -> None:
        super().__init__()
        self.record = nn.Linear(record_width, hidden)
        self.project = nn.Linear(width + hidden, width)

    def forward(self, features: Tensor, static: Tensor) -> Tensor:
        return self.project(torch.cat([features, self.record(static)], dim=1))


def _condition(width: int, record: Record) -> nn.Module:
    return Add(width, record.width) if record.inject == "add" else Concat(width, record.width, record.hidden)


def projection_head(width: int, hidden: int, out: int, norm: str = "batch") -> nn.Sequential:
    """Three linear layers with norm and GELU between; biases and initial weights as the original MSN's."""
    make = nn.BatchNorm1d if norm == "batch" else nn.LayerNorm
    blocks = [(a, b, make(b), nn.GELU(), True) for a, b in ((width, hidden), (hidden, hidden))]
    head = ProjectionHead([*blocks, (hidden, out, None, None)]).layers
    for layer in head:
        if isinstance(layer, nn.Linear):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
    return head


def _is_token(name: str) -> bool:
    """Learned tokens and positions: of several dimensions, but biases in what they do."""
    return name.rpartition(".")[2] in ("cls_token", "reg_token", "pos_embed")


@torch.no_grad()
def effective_rank(features: Tensor) -> Tensor:
    """exp(entropy of the normalised singular values) of centred features (N, D): how many directions are in use.

    Source: Roy and Vetterli 2007; as a sign of collapse: RankMe, arXiv:2210.02885.
    """
    centred = features.double() - features.double().mean(dim=0)
    gram = centred @ centred.T if len(features) < features.shape[1] else centred.T @ centred
    values = torch.linalg.eigvalsh(gram).clamp_min(0).sqrt()
    share = values / values.sum().clamp_min(1e-12)
    return torch.special.entr(share).sum().exp()


# ---- Gradients of one step's loss on this process's films, in one pass or in parts that fit into memory.


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
    """Embed all films without a graph; the loss's gradient at the embeddings then stands for the loss, part by part.

    A part draws the same dropout and drop path in both passes: the generator's state is kept and restored.
    """
    generator = random_generator(accelerator.device)
    states, embedded, looked_at = [], [], []
    with torch.no_grad(), accelerator.autocast():
        for part in parts:
            states.append(generator.get_state())
            embedded.append(msn.embed_anchors(part))
            looked_at.append(msn.embed_targets(part))
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
    for i, (part, state) in enumerate(zip(parts, states, strict=True)):
        generator.set_state(state)
        with _alone(model, accelerator, i < len(parts) - 1):
            model(part, grads[i].flatten(0, 1), scale / len(parts))["loss"].backward()
    return out


def random_generator(device: torch.device) -> torch.Generator:
    """The generator that dropout and drop path draw from."""
    return (
        torch.cuda.default_generators[torch.cuda.current_device()] if device.type == "cuda" else torch.default_generator
    )


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
