"""LeJEPA: all views of a film match the mean of its large views; embeddings are Gaussian (arXiv:2511.08544)."""

from __future__ import annotations

import torch
from lightly.loss.lejepa_loss import SIGReg, lejepa_invariance_loss
from torch import Tensor, nn

from pretrain.methods.base import Batch, Method, Setup, by_view, mlp


class LeJEPA(Method):
    """One encoder sees all views; the record conditions those of the anchors. No target network and no
    stop-gradient."""

    has_target = False
    least_films = 2

    def head(self, width: int, setup: Setup) -> nn.Module:
        return mlp([width, setup.hidden, setup.hidden, setup.out], setup.norm, nn.ReLU)

    def begin(self, setup: Setup) -> None:
        self.weight = setup.options.weight
        self.regulariser = SIGReg(num_vectors=setup.options.directions, gather_distributed=True)

    def embed(self, batch: Batch) -> dict[str, Tensor]:
        target, *anchors = self.encode([batch.target, *batch.anchors], [None, *batch.keep])
        views = by_view([target, *anchors], len(batch.target))
        first, others = self.project([target], batch, told=False), self.project(self.tell(anchors, batch), batch)
        return {"all": torch.cat([first, others]), "views": views, "features": target.detach()[None]}

    def score(self, seen: dict[str, Tensor], batch: Batch) -> dict[str, Tensor]:
        large = seen["all"][: 1 + self.setup.num_random]
        agreement = lejepa_invariance_loss(all_proj=seen["all"], global_proj=large)
        shape = self.regulariser(seen["all"])
        loss = self.weight * shape + (1 - self.weight) * agreement
        return {"loss": loss, "agreement": agreement.detach(), "gaussian": shape.detach()}
