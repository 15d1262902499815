"""The published model's training step, from the libraries that it was built of: what benchmarks.pretrain is held to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pretrain.msn import Batch

WIDTH, HEADS, DEPTH, PROTOTYPES = 192, 6, 12, 1024


class Published(nn.Module):
    """The published model, from the libraries that it was built of."""

    def __init__(self) -> None:
        from lightly.models.modules import MaskedVisionTransformerTorchvision
        from lightly.models.modules.heads import MSNProjectionHead
        from lightly.models.utils import deactivate_requires_grad
        from torchvision.models import VisionTransformer

        def branch() -> Any:
            vit = VisionTransformer(224, 16, DEPTH, HEADS, WIDTH, 4 * WIDTH)
            return MaskedVisionTransformerTorchvision(vit=vit)

        super().__init__()
        self.target, self.anchor = branch(), branch()
        self.target_head, self.anchor_head = (MSNProjectionHead(WIDTH, 4 * WIDTH, WIDTH) for _ in range(2))
        self.prototypes = nn.Linear(WIDTH, PROTOTYPES, bias=False).weight
        deactivate_requires_grad(self.target)
        deactivate_requires_grad(self.target_head)


def published_step(batch: Batch) -> Callable[[], Tensor]:
    """One optimizer step of the published model on the same views, in three channels."""
    from lightly.loss import MSNLoss
    from lightly.models.utils import random_token_mask, update_momentum

    model, loss_of = Published(), MSNLoss()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    target, random, focal = (x.expand(-1, 3, -1, -1).contiguous() for x in (batch.target, *batch.anchors))

    def embed(x: Tensor) -> Tensor:
        length = (x.shape[-1] // 16) ** 2 + 1
        keep, _ = random_token_mask((len(x), length), mask_ratio=0.15, device=x.device)
        return model.anchor_head(model.anchor(images=x, idx_keep=keep))

    def step() -> Tensor:
        update_momentum(model.anchor, model.target, 0.996)
        update_momentum(model.anchor_head, model.target_head, 0.996)
        with torch.no_grad():
            targets = model.target_head(model.target(images=target))
        anchors = torch.cat([embed(random), embed(focal)])
        loss = loss_of(anchors, targets, model.prototypes)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    return step
