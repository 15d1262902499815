"""The blocks of a ViT: timm's own modules and numbers, without what nobody reads.

Comes in: tokens (B, N, D). Goes out: tokens after the last block, or the class token alone where only it is wanted: the
last block then computes keys and values of all tokens and the rest of one: a sixth of its work.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import Attention
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def through(blocks: nn.Module, tokens: Tensor, *, first_only: bool = False, checkpointing: bool = False) -> Tensor:
    """(B, N, D) -> (B, N, D); with `first_only` (B, 1, D), the first token's, where the last block is timm's plain one.

    Args:
        checkpointing: recompute blocks in the backward pass: less memory, more time.
    """
    modules: list[Any] = list(blocks.children())
    for i, block in enumerate(modules):
        step = block if not plain(block) else first if first_only and i == len(modules) - 1 else whole
        given = (tokens,) if step is block else (block, tokens)
        if checkpointing and torch.is_grad_enabled():
            tokens = checkpoint(step, *given, use_reentrant=False)
        else:
            tokens = step(*given)
    return tokens


def plain(block: nn.Module) -> bool:
    """Whether it is timm's pre-norm block with timm's attention, no more and no less than what is written here."""
    if type(block) is not Block or type(block.attn) is not Attention:
        return False
    attn: Any = block.attn
    usual = getattr(attn, "gate", None) is None and attn.attn_drop.p == 0 and not block._forward_hooks
    return usual and attn.fused_attn  # who asks timm not to fuse wants to see its weights


def whole(block: Any, tokens: Tensor) -> Tensor:
    """timm's `Block.forward`."""
    tokens = tokens + block.drop_path1(block.ls1(_attend(block.attn, block.norm1(tokens))))
    return tokens + block.drop_path2(block.ls2(block.mlp(block.norm2(tokens))))


def first(block: Any, tokens: Tensor) -> Tensor:
    """`whole(block, tokens)[:, :1]`."""
    attn, normed = block.attn, block.norm1(tokens)
    weight, bias = attn.qkv.weight, attn.qkv.bias
    width = weight.shape[0] // 3
    biases = (None, None) if bias is None else (bias[:width], bias[width:])
    q = F.linear(normed[:, :1], weight[:width], biases[0]).unflatten(2, (attn.num_heads, -1)).transpose(1, 2)
    k, v = F.linear(normed, weight[width:], biases[1]).unflatten(2, (2, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
    seen = F.scaled_dot_product_attention(attn.q_norm(q), attn.k_norm(k), v)  # (B, heads, 1, d)
    told = _project(attn, seen.transpose(1, 2).flatten(2))
    token = tokens[:, :1] + block.drop_path1(block.ls1(told))
    return token + block.drop_path2(block.ls2(block.mlp(block.norm2(token))))


def _attend(attn: Any, x: Tensor) -> Tensor:
    """timm's `Attention.forward` without its options for masks and dropout.

    Split before the heads change places, so that the three gradients are put together in one copy instead of two.
    """
    qkv = attn.qkv(x).unflatten(2, (3, attn.num_heads, -1))  # (B, N, 3, heads, d)
    q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))
    seen = F.scaled_dot_product_attention(attn.q_norm(q), attn.k_norm(k), v)
    return _project(attn, seen.transpose(1, 2).flatten(2))


def _project(attn: Any, x: Tensor) -> Tensor:
    return attn.proj_drop(attn.proj(attn.norm(x)))
