"""Base of SimCLR and VICReg: one trained branch, and a loss between the target view and each anchor."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pretrain.methods.base import Batch, Method, by_view


class Pairs(Method):
    """One encoder sees all views; the record conditions those of the anchors. Subclasses define `pair_loss`."""

    has_target = False
    pair_loss: nn.Module

    def embed(self, batch: Batch) -> dict[str, Tensor]:
        target, *anchors = self.encode([batch.target, *batch.anchors], [None, *batch.keep])
        views = by_view([target, *anchors], len(batch.target))
        first = self.project([target], batch, told=False)
        others = self.project(self.tell(anchors, batch), batch)
        return {"first": first, "others": others, "views": views, "features": target.detach()[None]}

    def score(self, seen: dict[str, Tensor], batch: Batch) -> dict[str, Tensor]:
        losses = [self.pair_loss(seen["first"][0], other) for other in seen["others"]]
        return {"loss": torch.stack(losses).mean()}
