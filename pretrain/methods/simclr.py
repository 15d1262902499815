"""SimCLR: two views of a film are similar, and differ from those of all other films of the batch (arXiv:2002.05709)."""

from __future__ import annotations

from lightly.loss import NTXentLoss
from torch import nn

from pretrain.methods.base import Setup, mlp
from pretrain.methods.pairs import Pairs


class SimCLR(Pairs):
    """Every anchor is a pair with the target view; the loss is lightly's, over the films of all processes."""

    least_films = 2

    def head(self, width: int, setup: Setup) -> nn.Module:
        return mlp([width, setup.hidden, setup.out], setup.norm, nn.ReLU, last_norm=True)

    def begin(self, setup: Setup) -> None:
        self.pair_loss = NTXentLoss(setup.options.temperature, gather_distributed=True)
