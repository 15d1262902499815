"""The blocks of a ViT: timm's own modules and numbers, without what nobody reads.

Comes in: tokens (B, N, D). Goes out: tokens after the last block, or the class token alone where only it is wanted: the
last block then computes keys and values of all tokens and the rest of one, a twelfth of the work of 12 blocks saved.
Small attention on a CPU (focal views: 37 tokens) is batched matrix products; torch's fused kernel, made for long
sequences, takes three times as long there.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import Attention
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

SMALL = 64  # tokens up to which batched products win on a CPU


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
    return getattr(attn, "gate", None) is None and attn.attn_drop.p == 0 and not block._forward_hooks


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
    """timm's `Attention.forward` without its options for masks and dropout."""
    qkv = attn.qkv(x).unflatten(2, (3, attn.num_heads, -1))  # (B, N, 3, heads, d)
    small = x.shape[1] <= SMALL and qkv.device.type == "cpu" and qkv.dtype == torch.float32
    if small and qkv.requires_grad and isinstance(attn.q_norm, nn.Identity) and not torch.compiler.is_compiling():
        return _project(attn, SmallAttention.apply(qkv))
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    seen = F.scaled_dot_product_attention(attn.q_norm(q), attn.k_norm(k), v)
    return _project(attn, seen.transpose(1, 2).flatten(2))


def _project(attn: Any, x: Tensor) -> Tensor:
    return attn.proj_drop(attn.proj(attn.norm(x)))


class SmallAttention(torch.autograd.Function):
    """softmax(q k' / sqrt(d)) v of packed (B, N, 3, heads, d) -> (B, N, heads * d); the weights are kept for later."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor) -> Tensor:
        films, number, _, heads, depth = qkv.shape
        packed = qkv.permute(2, 0, 3, 1, 4).contiguous().view(3, films * heads, number, depth)
        q, k, v = packed.unbind(0)
        scores = torch.baddbmm(q.new_empty(len(q), number, number), q, k.transpose(1, 2), beta=0, alpha=depth**-0.5)
        weights = torch.softmax(scores, dim=-1)
        ctx.save_for_backward(packed, weights)
        seen = torch.bmm(weights, v).view(films, heads, number, depth)
        return seen.transpose(1, 2).reshape(films, number, heads * depth)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        packed, weights = ctx.saved_tensors
        q, k, v = packed.unbind(0)
        films, number, depth = len(grad), grad.shape[1], q.shape[2]
        grad = grad.unflatten(2, (-1, depth)).transpose(1, 2).reshape(-1, number, depth)
        grads = torch.empty_like(packed)
        torch.bmm(weights.transpose(1, 2), grad, out=grads[2])
        scores = torch._softmax_backward_data(torch.bmm(grad, v.transpose(1, 2)), weights, -1, weights.dtype)
        torch.baddbmm(grads[0], scores, k, beta=0, alpha=depth**-0.5, out=grads[0])
        torch.baddbmm(grads[1], scores.transpose(1, 2), q, beta=0, alpha=depth**-0.5, out=grads[1])
        return grads.view(3, films, -1, number, depth).permute(1, 3, 0, 2, 4).contiguous()
