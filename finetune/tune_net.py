"""What `tune` trains: a head on an encoder, its parameter groups, how films are changed, how lr goes."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from timm.optim import param_groups_layer_decay
from torch import Tensor, nn

if TYPE_CHECKING:
    from finetune.config import TuneConfig
    from pretrain.encoder import Encoder


class Tuned(nn.Module):
    """Films -> logits.

    Args:
        attentive: freeze the encoder and weigh its tokens by one learned query.
        prior: (L,) log odds that the head starts from.
        scratch: random weights: batch norm learns its statistics too.
    """

    def __init__(self, encoder: Encoder, prior: Tensor, *, attentive: bool, scratch: bool) -> None:
        super().__init__()
        self.encoder, self.attentive, self.scratch = encoder, attentive, scratch
        self.head = nn.Linear(encoder.width, len(prior))
        nn.init.zeros_(self.head.weight)
        with torch.no_grad():
            self.head.bias.copy_(prior)
        if attentive:
            encoder.requires_grad_(False)
            self.query = nn.Parameter(torch.zeros(encoder.width))
            self.norm = nn.LayerNorm(encoder.width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W), normalised -> (B, L)."""
        if not self.attentive:
            return self.head(self.encoder(x))
        with torch.no_grad():
            tokens = self.encoder.features(x)
        tokens = self.norm(tokens if tokens.ndim == 3 else tokens.flatten(2).transpose(1, 2))  # (B, N, D)
        weight = (tokens @ self.query / math.sqrt(len(self.query))).softmax(dim=1)  # (B, N)
        return self.head((weight[:, :, None] * tokens).sum(1))

    def train(self, mode: bool = True) -> Tuned:
        """A frozen encoder stays in eval mode; a pretrained one keeps its batch norm's statistics."""
        super().train(mode)
        if self.attentive:
            self.encoder.eval()
        elif not self.scratch:
            for module in self.encoder.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
        return self


def groups(net: Tuned, config: TuneConfig) -> list[dict[str, Any]]:
    """Parameter groups with `lr_scale`: the head's 1, lower layers less; no decay on biases and norms."""
    own = [(n, p) for n, p in net.named_parameters() if not n.startswith("encoder.")]
    found: list[dict[str, Any]] = []
    if not net.attentive:
        found = param_groups_layer_decay(net.encoder.net, config.weight_decay, layer_decay=config.layer_decay)
    found.append({"params": [p for n, p in own if p.ndim > 1], "weight_decay": config.weight_decay, "lr_scale": 1.0})
    found.append({"params": [p for n, p in own if p.ndim <= 1], "weight_decay": 0.0, "lr_scale": 1.0})
    return found


def augment(films: Tensor, config: TuneConfig, generator: torch.Generator) -> Tensor:
    """Turn, zoom, shift and change the contrast of uint8 (B, S, S) -> (B, 1, S, S) in [0, 1]; outside is black."""
    pixels, n = films[:, None].float() / 255, len(films)
    draw = (2 * torch.rand(5, n, generator=generator) - 1).to(films.device)
    angle, scale = draw[0] * math.radians(config.rotate), 1 + draw[1] * config.zoom
    cos, sin = angle.cos() * scale, angle.sin() * scale
    theta = torch.stack([cos, -sin, draw[2] * 2 * config.shift, sin, cos, draw[3] * 2 * config.shift], dim=1)
    grid = F.affine_grid(theta.view(n, 2, 3), list(pixels.shape), align_corners=False)
    pixels = F.grid_sample(pixels, grid, align_corners=False)
    middle = pixels.mean(dim=(1, 2, 3), keepdim=True)
    return ((pixels - middle) * (1 + draw[4] * config.contrast).view(-1, 1, 1, 1) + middle).clamp(0, 1)


def schedule(step: int, total: int, warmup: int) -> float:
    """Linear warm-up, then a cosine to 0; of the largest lr."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))
