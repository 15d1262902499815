"""MAE: a small decoder reconstructs the masked patches (arXiv:2111.06377)."""

from __future__ import annotations

import torch
from lightly.models.modules.masked_vision_transformer_decoder_timm import MaskedVisionTransformerDecoderTIMM
from lightly.models.utils import patchify
from torch import Tensor, nn

from pretrain.methods.base import Batch, Method, Setup


class MAE(Method):
    """The encoder computes the kept patches of one view; `anchor_head` is the decoder. There is no embedding."""

    has_target = False
    is_told = False
    needs_vit = True
    masked = ("target",)
    least_anchors = 0

    def head(self, width: int, setup: Setup) -> nn.Module:
        return nn.Linear(width, setup.options.decoder_width)

    def begin(self, setup: Setup) -> None:
        o, encoder = setup.options, self.anchor
        patch, size = encoder.patch, encoder.meta["image_size"]
        if not setup.record.compared:  # the loss sees tokens: a norm of pooled ones has no gradient
            encoder.net.fc_norm.requires_grad_(False)
        self.num_prefix = int(encoder.net.num_prefix_tokens)
        self.decoder = MaskedVisionTransformerDecoderTIMM(
            num_patches=(size // patch) ** 2, embed_dim=o.decoder_width, depth=o.decoder_depth,
            num_heads=o.decoder_heads, num_prefix_tokens=self.num_prefix,
        )  # fmt: skip
        self.paint = nn.Linear(o.decoder_width, patch**2 * encoder.meta["in_chans"])

    def embed(self, batch: Batch) -> dict[str, Tensor]:
        keep = batch.target_keep
        assert keep is not None
        tokens = self.anchor(batch.target, keep=keep, tokens=True)  # (B, P + n, D)
        features = self.anchor.pool(tokens)
        small = self.anchor_head(tokens)
        whole = self.decoder.mask_token.to(small.dtype).repeat(len(small), self.decoder.sequence_length, 1)
        prefix = torch.arange(self.num_prefix, device=keep.device).expand(len(keep), -1)
        places = torch.cat([prefix, keep + self.num_prefix], dim=1)[..., None].expand_as(small)
        painted = self.paint(self.decoder(whole.scatter(1, places, small)))[:, self.num_prefix :]
        return {"painted": painted[None], "views": features[None], "features": features.detach()[None]}

    def score(self, seen: dict[str, Tensor], batch: Batch) -> dict[str, Tensor]:
        assert batch.target_keep is not None
        wanted = patchify(batch.target.float(), self.anchor.patch)  # (B, N, p*p*C)
        if self.setup.options.norm_pixels:
            wanted = (wanted - wanted.mean(dim=2, keepdim=True)) / (wanted.var(dim=2, keepdim=True) + 1e-6).sqrt()
        error = (seen["painted"][0] - wanted).square().mean(dim=2)
        hidden = torch.ones_like(error).scatter_(1, batch.target_keep, 0.0)
        return {"loss": (error * hidden).sum() / hidden.sum()}
