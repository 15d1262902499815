"""VICReg: two views of a film are similar; over films each output has variance and outputs do not correlate
(arXiv:2105.04906)."""

from __future__ import annotations

from lightly.loss import VICRegLoss
from torch import nn

from pretrain.methods.base import Setup, mlp
from pretrain.methods.pairs import Pairs


class VICReg(Pairs):
    """Every anchor is a pair with the target view; the loss is lightly's, over the films of all processes."""

    least_films = 2

    def head(self, width: int, setup: Setup) -> nn.Module:
        return mlp([width, setup.hidden, setup.hidden, setup.out], setup.norm, nn.ReLU)

    def begin(self, setup: Setup) -> None:
        o = setup.options
        self.pair_loss = VICRegLoss(o.invariance, o.variance, o.covariance, gather_distributed=True)
