"""The supported timm networks: VisionTransformers, DenseNets, ResNets."""

from __future__ import annotations

import difflib
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.layers import Attention, PatchEmbed, build_sincos2d_pos_embed
from timm.models import model_entrypoint
from timm.models.densenet import DenseNet
from timm.models.resnet import ResNet
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from configs import UserError

VITS = ("vision_transformer", "deit")  # timm modules whose models support dynamic_img_size


def make(arch: str, in_chans: int, image_size: int, args: dict[str, Any]) -> Any:
    """Create a timm model with random weights; `args` is extended so that a ViT takes films of any size.

    Raises: UserError: timm has no such model, refuses the arguments, or it is of another family.
    """
    if files := {"checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay"} & args.keys():
        raise UserError(
            f"encoder.model_args: {', '.join(sorted(files))}: no weights are read here; give encoder.init=PATH"
        )
    if args.get("patch_drop_rate"):
        raise UserError("encoder.model_args: patch_drop_rate is not used; mask.ratio sets the dropped patches")
    try:
        if model_entrypoint(arch).__module__.rpartition(".")[2] in VITS:
            args |= {"img_size": image_size, "dynamic_img_size": True} | args
        net = timm.create_model(arch, pretrained=False, num_classes=0, in_chans=in_chans, **args)
    except KeyError:
        near = difflib.get_close_matches(arch, timm.list_models(), n=5) or ["vit_tiny_patch16_224", "densenet121"]
        raise UserError(f"encoder.arch: timm has no `{arch}`. Similar names: {', '.join(near)}") from None
    except (RuntimeError, TypeError, AssertionError, ValueError) as error:
        raise UserError(f"encoder.arch: timm cannot make `{arch}` with {args}: {error}") from None
    if not isinstance(net, (VisionTransformer, DenseNet, ResNet)) or hasattr(net, "dist_token"):
        raise UserError(
            f"encoder.arch: `{arch}` is a {type(net).__name__}; wanted a VisionTransformer, DenseNet or ResNet"
        )
    if isinstance(net, VisionTransformer) and type(net.patch_embed) is not PatchEmbed:
        raise UserError(f"encoder.arch: `{arch}` has a convolutional stem; wanted a plain ViT")
    return net


@torch.no_grad()
def sincos(net: Any) -> None:
    """Set sine-cosine positions of the patches; the class token's are unchanged."""
    width = net.embed_dim // 4 * 4
    table = build_sincos2d_pos_embed(list(net.patch_embed.grid_size), width)  # sines of both, then cosines of both
    table = table.unflatten(1, (2, 2, -1)).transpose(1, 2).flatten(1)  # rows, then columns
    net.pos_embed[0, -len(table) :, :width] = table


# ---- The blocks of a ViT: timm's own modules and numbers, without unused outputs.


def through(blocks: nn.Module, tokens: Tensor, *, first_only: bool = False, checkpointing: bool = False) -> Tensor:
    """(B, N, D) -> (B, N, D); with `first_only` (B, 1, D), the first token's, if the last block is timm's plain one.

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
    """Whether it is timm's pre-norm block with timm's attention, exactly as implemented here."""
    if type(block) is not Block or type(block.attn) is not Attention:
        return False
    attn: Any = block.attn
    usual = getattr(attn, "gate", None) is None and attn.attn_drop.p == 0 and not block._forward_hooks
    return usual and attn.fused_attn  # without fused attention, users expect to see the attention weights


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

    Split before the heads are transposed, so that the three gradients are joined in one copy instead of two.
    """
    qkv = attn.qkv(x).unflatten(2, (3, attn.num_heads, -1))  # (B, N, 3, heads, d)
    q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))
    seen = F.scaled_dot_product_attention(attn.q_norm(q), attn.k_norm(k), v)
    return _project(attn, seen.transpose(1, 2).flatten(2))


def _project(attn: Any, x: Tensor) -> Tensor:
    return attn.proj_drop(attn.proj(attn.norm(x)))
