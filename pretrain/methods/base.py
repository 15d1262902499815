"""The interface between a method and the training loop.

A method is one class. `embed` computes the inputs of the loss that need a gradient, `observe` those that do not,
`score` the loss. They are separate so that a batch can pass the network in parts while the loss is that of the whole
batch. Every trained parameter gets a gradient in every step. A new method overrides `head`, `embed` and `score`, and
`observe` if it has a target; docs/methods.md shows an example.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from lightly.models.modules.heads import ProjectionHead
from lightly.models.utils import update_momentum
from torch import Tensor, nn

from pretrain.encoder import Encoder
from pretrain.methods.record import NO_RECORD, Record, RecordUse


@dataclasses.dataclass(frozen=True)
class Batch:
    """The inputs of one step; the leading dimension is view-major (all films of view 0, then view 1).

    Args:
        target: (B, C, H, W).
        anchors: random views (V*B, C, H, W), then focal views (F*B, C, h, w); either may be missing.
        keep: for each of `anchors`, indices (V*B, n) of the patches to compute, or None: all.
        static: (B, S), or None: no record.
        known: (B, S), whether the film's record has this column; None: all of them.
        subjects: (B,), equal numbers mark one subject; None: all differ.
        target_keep: as `keep`, for `target`.
        target_static, target_known: the record of the target view where that is of another film; None: `static`.
    """

    target: Tensor
    anchors: list[Tensor]
    keep: list[Tensor | None]
    static: Tensor | None
    known: Tensor | None = None
    subjects: Tensor | None = None
    target_keep: Tensor | None = None
    target_static: Tensor | None = None
    target_known: Tensor | None = None

    def record(self, rows: int) -> tuple[Tensor, Tensor]:
        """The records (V, B, S) of the last `rows` = V * B views, and whether each value is known; V is 1 where all
        views have the same."""
        assert self.static is not None
        films, views = len(self.target), 1 + sum(len(group) for group in self.anchors) // len(self.target)
        known = torch.ones_like(self.static, dtype=torch.bool) if self.known is None else self.known.bool()
        if self.target_static is None or rows < views * films:
            return self.static[None], known[None]
        own = torch.ones_like(known) if self.target_known is None else self.target_known.bool()
        static = [self.target_static, *[self.static] * (views - 1)]
        return torch.stack(static), torch.stack([own, *[known] * (views - 1)])

    def told(self, rows: int) -> Tensor | None:
        """The records (V * B, S) of the last V * B views; None without a record."""
        if self.static is None:
            return None
        record = self.record(rows)[0]
        return record.expand(rows // len(self.target), -1, -1).flatten(0, 1)

    @property
    def views(self) -> list[Tensor]:
        """The target view and the anchors, one tensor (B, C, H, W) for each view."""
        return [self.target, *(view for group in self.anchors for view in group.split(len(self.target)))]

    def parts(self, number: int) -> list[Batch]:
        """The same films in `number` equal parts."""
        if number == 1:
            return [self]
        size, films = len(self.target) // number, len(self.target)

        def part(x: Any, i: int) -> Any:
            if isinstance(x, list):
                return [part(one, i) for one in x]
            if x is None:
                return None
            return x.unflatten(0, (-1, films))[:, i * size : (i + 1) * size].flatten(0, 1)  # (V, B, ...) between

        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return [Batch(**{name: part(x, i) for name, x in fields.items()}) for i in range(number)]


@dataclasses.dataclass(frozen=True)
class Setup:
    """The settings of a config for any method.

    Args:
        hidden, out: widths of the projection head.
        norm: of the head, `batch`, `layer` or `none`.
        record: how the record is used.
        options: the method's own section of the config.
        num_random: random views per film.
        steps_per_epoch: for schedules of the method itself.
        parts: of a batch that are scored one after the other, each by its own loss (approximate accumulation).
    """

    hidden: int
    out: int
    norm: str = "batch"
    record: Record = NO_RECORD
    options: Any = None
    num_random: int = 1
    steps_per_epoch: float = 1.0
    parts: int = 1


class Method(nn.Module):
    """A trained encoder `anchor` under a head, and often their moving average `target`."""

    has_target: ClassVar[bool] = True  # there is a moving average, which is the exported encoder
    is_told: ClassVar[bool] = True  # the record can condition its embeddings
    needs_vit: ClassVar[bool] = False  # tokens are dropped, replaced or reconstructed
    masked: ClassVar[tuple[str, ...]] = ("random",)  # the kinds of view to which mask.ratio applies
    masks_input: ClassVar[bool] = False  # what it exports never sees a masked input of a convolutional network
    least_films: ClassVar[int] = 1  # smallest batch, over all processes
    least_anchors: ClassVar[int] = 1  # smallest number of views of a film besides the target view
    num_prototypes: int = 0  # length of `hits`; 0: no prototypes

    def __init__(self, encoder: Encoder, setup: Setup) -> None:
        super().__init__()
        self.setup = setup
        self.anchor = encoder
        self.anchor_head = self.head(encoder.width, setup)
        if self.has_target:
            self.target = copy.deepcopy(encoder).requires_grad_(False)
            self.target.exact = False
            self.target_head = self.head_copy().requires_grad_(False)
        self.begin(setup)
        self.record = RecordUse(encoder.width, setup.out, setup.record)
        self.train()

    # ---- Defined by each method.

    def head(self, width: int, setup: Setup) -> nn.Module:
        """The projection head."""
        raise NotImplementedError

    def begin(self, setup: Setup) -> None:
        """Create the method's further modules: prototypes, a predictor, a decoder."""

    def embed(self, batch: Batch) -> dict[str, Tensor]:
        """Inputs of the loss with a gradient, each (V, B, ...); without a target also `features` (1, B, D)."""
        raise NotImplementedError

    def observe(self, batch: Batch) -> dict[str, Tensor]:
        """Inputs of the loss without a gradient, each (V, B, ...); with a target also its `features` (1, B, D)."""
        return {}

    def score(self, seen: dict[str, Tensor], batch: Batch) -> dict[str, Tensor]:
        """`loss` and other scalars from the results of `embed` and `observe`, in fp32; `hits` (K,) with prototypes."""
        raise NotImplementedError

    def loss_parameters(self) -> list[nn.Parameter]:
        """Parameters that only `score` uses: without weight decay and clipping."""
        return []

    def before_step(self, step: int) -> None:
        """Update values that depend on the step."""

    def before_update(self, step: int) -> None:
        """Change gradients before they are clipped."""

    def after_step(self, momentum: float) -> None:
        """target <- momentum * target + (1 - momentum) * anchor; parameters only, as in the original MSN."""
        if self.has_target:
            update_momentum(self.anchor, self.target, momentum)
            update_momentum(self.anchor_head, self.target_head, momentum)

    @property
    def product(self) -> tuple[str, Encoder]:
        """The exported branch: the moving average if there is one."""
        return ("target", self.target) if self.has_target else ("anchor", self.anchor)

    # ---- Common to all methods.

    def forward(self, batch: Batch, grads: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Scalars with `loss`, `features` (B, D) of the exported encoder, and `hits` if there are prototypes.

        With `grads`, the loss's gradients at the embeddings, `loss` is a scalar with those gradients: the second pass
        of exact accumulation.
        """
        embedded = self.embed_all(batch)
        if grads is not None:
            terms = [(embedded[name].float() * grad).sum() for name, grad in grads.items()]
            return {"loss": torch.stack([*terms, *(0 * p.sum() for p in self.loss_parameters())]).sum()}
        return self.finish(embedded, self.observe_all(batch), batch)

    def embed_all(self, batch: Batch) -> dict[str, Tensor]:
        """The results of `embed`, and the inputs of the record's loss."""
        embedded = self.embed(batch)
        if self.setup.record.compared and batch.static is not None:
            views = embedded["views"]
            embedded |= self.record.embed(views, batch.record(len(views) * len(batch.target))[0])
        embedded.pop("views", None)
        return embedded

    @torch.no_grad()
    def observe_all(self, batch: Batch) -> dict[str, Tensor]:
        return self.observe(batch)

    def finish(self, embedded: dict[str, Tensor], observed: dict[str, Tensor], batch: Batch) -> dict[str, Tensor]:
        """The loss on embeddings, in fp32 under any precision of the networks."""
        seen = {name: value.float() for name, value in {**embedded, **observed}.items()}
        with torch.autocast(batch.target.device.type, enabled=False):
            out = self.score(seen, batch)
            for name, (value, weight) in self.record.losses(seen, batch).items():
                out["loss"] = out["loss"] + weight * value
                out[name] = value.detach()
        return out | {"features": seen["features"][0].detach()}

    def train(self, mode: bool = True) -> Method:
        """Set training mode for all modules except the target's stochastic ones (dropout, drop path, DenseNet's
        layers)."""
        super().train(mode)
        if self.has_target:
            for module in [*self.target.modules(), *self.target_head.modules()]:
                module.training = mode and isinstance(module, nn.modules.batchnorm._BatchNorm)
        return self

    def head_copy(self) -> nn.Module:
        """A second head with the weights of the first."""
        return copy.deepcopy(self.anchor_head)

    def large_views(self, batch: Batch) -> list[Tensor]:
        """The target view and the random ones, each (B, C, H, W)."""
        return batch.views[: 1 + self.setup.num_random]

    def encode(self, views: list[Tensor], keep: list[Tensor | None] | None = None) -> list[Tensor]:
        """Features (V*B, D) of each of `views`."""
        kept = keep or [None] * len(views)
        return [self.anchor(view, keep=one) for view, one in zip(views, kept, strict=True)]

    def tell(self, parts: list[Tensor], batch: Batch) -> list[Tensor]:
        """Condition features on the record, if it enters before the head."""
        if (record := batch.told(sum(len(part) for part in parts))) is None:
            return parts
        of_parts = record.split([len(part) for part in parts])
        return [self.record.condition(part, own) for part, own in zip(parts, of_parts, strict=True)]

    def project(self, parts: list[Tensor], batch: Batch, told: bool = True) -> Tensor:
        """Features of some views -> (V, B, out). `told`: condition the head's output on the record, if so configured.

        A ViT's views pass the head as one batch, as in the original MSN; a convolutional net needs separate passes.
        """
        groups = [torch.cat(parts)] if self.anchor.is_vit else parts
        projected = torch.cat([self.anchor_head(group) for group in groups])
        if told:
            projected = self.record.predictor(projected, batch.told(len(projected)))
        return projected.unflatten(0, (-1, len(batch.target)))

    def groups(self, decay_all: bool = False) -> list[dict[str, Any]]:
        """Optimizer groups; `decays` marks those with weight decay. Parameters of the loss alone are a separate
        group."""
        alone = {id(p) for p in self.loss_parameters()}
        named = [(n, p) for n, p in self.named_parameters() if p.requires_grad and id(p) not in alone]
        decayed = [p for n, p in named if decay_all or (p.ndim > 1 and not _is_token(n))]
        kept = {id(p) for p in decayed}
        groups = [
            {"params": decayed, "decays": True},
            {"params": [p for _, p in named if id(p) not in kept], "decays": False},
        ]
        return groups + ([{"params": self.loss_parameters(), "decays": False}] if alone else [])


def by_view(parts: list[Tensor], films: int) -> Tensor:
    """Features (V*B, D) of groups of views -> (V, B, D)."""
    return torch.cat([part.unflatten(0, (-1, films)) for part in parts])


def mlp(
    widths: list[int], norm: str, activation: Callable[[], nn.Module], *, last_norm: bool = False, bias: bool = False
) -> nn.Sequential:
    """Linear layers with norm and activation between them: lightly's heads, with layer norm as a further option.

    Args:
        widths: of the input, the hidden layers and the output.
        last_norm: normalise the output too.
        bias: use biases also before a norm, which cancels them.
    """
    norms: dict[str, Any] = {"batch": nn.BatchNorm1d, "layer": nn.LayerNorm, "none": lambda _: None}
    make, bias = norms[norm], bias or norm == "none"
    blocks: list[Any] = [(a, b, make(b), activation(), bias) for a, b in itertools.pairwise(widths[:-1])]
    last = (widths[-2], widths[-1], make(widths[-1]), None, bias) if last_norm else (*widths[-2:], None, None)
    return ProjectionHead([*blocks, last]).layers


def _is_token(name: str) -> bool:
    """Learned tokens and positions: multi-dimensional parameters that are treated like biases."""
    return name.rpartition(".")[2] in ("cls_token", "reg_token", "pos_embed", "mask_token")
