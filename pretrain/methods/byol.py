"""BYOL: a predictor on one view predicts the moving average's embedding of another (arXiv:2006.07733)."""

from __future__ import annotations

import torch
from lightly.loss import NegativeCosineSimilarity
from torch import Tensor, nn

from pretrain.methods.base import Batch, Method, Setup, by_view, mlp


class BYOL(Method):
    """The student sees all views, conditioned on the record; the target sees the large ones."""

    def head(self, width: int, setup: Setup) -> nn.Module:
        return mlp([width, setup.hidden, setup.out], setup.norm, nn.ReLU)

    def begin(self, setup: Setup) -> None:
        self.guess = mlp([setup.out, setup.hidden, setup.out], setup.norm, nn.ReLU)
        self.distance = NegativeCosineSimilarity()

    def embed(self, batch: Batch) -> dict[str, Tensor]:
        parts = self.encode([batch.target, *batch.anchors], [None, *batch.keep])
        projected = self.project(self.tell(parts, batch), batch)
        guesses = self.guess(projected.flatten(0, 1)).unflatten(0, projected.shape[:2])
        return {"guesses": guesses, "views": by_view(parts, len(batch.target))}

    def observe(self, batch: Batch) -> dict[str, Tensor]:
        features = [self.target(view) for view in self.large_views(batch)]
        return {"wanted": torch.stack([self.target_head(f) for f in features]), "features": features[0][None]}

    def score(self, seen: dict[str, Tensor], batch: Batch) -> dict[str, Tensor]:
        guesses, wanted = seen["guesses"], seen["wanted"]
        pairs = [(i, j) for i in range(len(guesses)) for j in range(len(wanted)) if i != j]
        return {"loss": torch.stack([self.distance(guesses[i], wanted[j]) for i, j in pairs]).mean()}
