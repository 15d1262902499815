"""MSN: masked anchors, conditioned on the record, predict the prototypes of an unmasked target (arXiv:2204.07141).

The target is a moving average of the anchor; the record enters on the anchor's side only and is dropped after
pretraining. The target is deterministic: dropout and drop path act on the anchor only. Batch norm of the target
normalises by the current batch, as in the original; its running statistics, those of unmasked views, are exported.
Differs from CXR-EHR-MSN: prototypes are trained; `add` conditions by h + W e with W = 0 at the start (published, and
here `concat`: [h; f(e)] -> g); focal views are unmasked by default; every patch can be masked (published: the last one
always is). PMSN is MSN with another prior over the prototypes (arXiv:2210.07277).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pretrain.loss import msn_loss
from pretrain.methods.base import Batch, Method, Setup, by_view, mlp


class MSN(Method):
    """Anchor and target branches over trained prototypes."""

    def head(self, width: int, setup: Setup) -> nn.Module:
        """Three linear layers with norm and GELU between; biases and initial weights as in the original."""
        head = mlp([width, setup.hidden, setup.hidden, setup.out], setup.norm, nn.GELU, bias=True)
        for layer in head:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
        return head

    masks_input = True  # the target sees the film unmasked, and its batch norm is exported

    def begin(self, setup: Setup) -> None:
        self.num_prototypes, out = setup.options.prototypes, setup.out
        self.loss_options = setup.options.model_dump(exclude={"prototypes"})
        self.prototypes = nn.Parameter(torch.empty(self.num_prototypes, out).uniform_(-(out**-0.5), out**-0.5))

    def embed(self, batch: Batch) -> dict[str, Tensor]:
        parts = self.encode(batch.anchors, batch.keep)
        views = by_view(parts, len(batch.target))
        return {"anchors": self.project(self.tell(parts, batch), batch), "views": views}

    def observe(self, batch: Batch) -> dict[str, Tensor]:
        features = self.target(batch.target)
        return {"targets": self.target_head(features)[None], "features": features[None]}

    def score(self, seen: dict[str, Tensor], batch: Batch) -> dict[str, Tensor]:
        targets = seen["targets"][0]
        out = msn_loss(seen["anchors"].flatten(0, 1), targets, self.prototypes, **self.loss_options)
        with torch.no_grad():
            unit = nn.functional.normalize(self.prototypes.float(), dim=1)
            nearest = (targets @ unit.T).argmax(dim=1)
        return out | {"hits": torch.bincount(nearest, minlength=self.num_prototypes)}

    def loss_parameters(self) -> list[nn.Parameter]:
        return [self.prototypes]
