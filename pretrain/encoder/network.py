"""timm networks of any family: how they are made, what their features are, how tokens pass the blocks of a ViT."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Any, Literal

import timm
import torch
import torch.nn.functional as F
from timm.layers import Attention, PatchEmbed, apply_keep_indices_nlc, build_sincos2d_pos_embed
from timm.models import model_entrypoint
from timm.models.densenet import DenseNet
from timm.models.eva import Eva
from timm.models.resnet import ResNet
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from configs import UserError, first_line
from pretrain.encoder.memory import check_arguments, tried_on_meta, weights_fit

VITS = ("vision_transformer", "deit", "eva")  # timm modules whose models support dynamic_img_size
PLAIN = ("densenet", "resnet")  # take films of any size without an argument
SIZES = ("img_size", "dynamic_img_size", "strict_img_size")  # arguments of timm's other networks, where they exist


def make(arch: str, in_chans: int, image_size: int, args: dict[str, Any]) -> Any:
    """Create a timm model with random weights; `args` is extended so that it takes films of other sizes if it can.

    Raises: UserError: timm has no such model, refuses the arguments, or its weights exceed the memory.
    """
    check_model_args(arch, in_chans, image_size, args)
    try:
        with weights_fit(_keys(arch, args)):
            return _made(arch, in_chans, args, _sizes(arch, image_size, args))
    except UserError:
        raise
    except Exception as error:  # a network that is built from arguments of any kind raises almost anything
        if not timm.is_model(arch):
            near = difflib.get_close_matches(arch, timm.list_models(), n=5) or ["vit_tiny_patch16_224", "densenet121"]
            raise UserError(f"encoder.arch: timm has no `{arch}`. Similar names: {', '.join(near)}") from None
        raise UserError(f"encoder.arch: timm cannot make `{arch}` with {args}: {first_line(error)}") from None


def check_model_args(arch: str, in_chans: int, image_size: int, args: dict[str, Any], copies: int = 1) -> None:
    """Refuse arguments that read files, that have no effect, or that make a network too large for this machine.

    Args:
        copies: of each weight that the work will hold.
    Raises: UserError.
    """
    if files := {"checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay", "pretrained"} & args.keys():
        raise UserError(
            f"encoder.model_args: {', '.join(sorted(files))}: no weights are read here; give encoder.init=PATH"
        )
    if args.get("patch_drop_rate"):
        raise UserError("encoder.model_args: patch_drop_rate is not used; mask.ratio sets the dropped patches")
    check_arguments(args, "encoder.model_args")
    if args:  # a network as published is built so fast that it needs no trial
        tried_on_meta(
            lambda: _made(arch, in_chans, dict(args), _sizes(arch, image_size, args)), _keys(arch, args), copies
        )


def _keys(arch: str, args: dict[str, Any]) -> str:
    return f"encoder.arch={arch}" + (f", encoder.model_args={args}" if args else "")


def _sizes(arch: str, image_size: int, args: dict[str, Any]) -> dict[str, Any]:
    """The arguments by which a timm model takes films of other sizes, but for those that are given."""
    module = model_entrypoint(arch).__module__.rpartition(".")[2]
    sizes: dict[str, Any] = {"img_size": image_size, "dynamic_img_size": True}
    if module in PLAIN:
        sizes = {}
    elif module not in VITS:
        sizes |= {"strict_img_size": False}
    return {key: value for key, value in sizes.items() if key not in args}


def _made(arch: str, in_chans: int, args: dict[str, Any], sizes: dict[str, Any]) -> Any:
    """The network with those of `sizes` that its constructor takes; they are added to `args`."""
    while True:
        try:
            net = timm.create_model(arch, pretrained=False, num_classes=0, in_chans=in_chans, **sizes, **args)
        except TypeError as error:
            if not (refused := [key for key in sizes if f"'{key}'" in str(error)]):
                raise
            sizes = {key: value for key, value in sizes.items() if key not in refused}
            continue
        args |= sizes
        return net


def drops_tokens(net: nn.Module) -> bool:
    """Whether patches can be left out exactly: each is a token with its own position, and attention is over all.

    timm's VisionTransformer and Eva (EVA-02, EVA-X, DINOv3, rotary positions) with a plain patch embedding.
    """
    if not isinstance(net, (VisionTransformer, Eva)) or hasattr(net, "dist_token"):
        return False
    return type(net.patch_embed) is PatchEmbed


@dataclass(frozen=True)
class Layout:
    """What a network gives.

    Args:
        form: of `forward_features`: tokens (B, N, D), or a map (B, D, h, w) or (B, h, w, D).
        channels: D of the features.
        width: D of timm's own pooled features.
        prefix: tokens before those of the patches.
        patch: pixels of a side of a token's or a cell's part of the film.
    """

    form: Literal["tokens", "map", "map, channels last"]
    channels: int
    width: int
    prefix: int
    patch: int


@torch.no_grad()
def layout(net: Any, arch: str, in_chans: int, image_size: int) -> Layout:
    """What `net` gives for films of this size, by a trial for families that are not known here.

    Raises: UserError: the size does not suit it, or it gives neither tokens nor a map.
    """
    prefix: Any = getattr(net, "num_prefix_tokens", None)
    width = int(net.num_features)
    if drops_tokens(net):
        return Layout("tokens", width, width, prefix, net.patch_embed.patch_size[0])
    if isinstance(net, (DenseNet, ResNet)):
        return Layout("map", width, width, 0, 32)
    nothing = f"encoder.arch: `{arch}` is a {type(net).__name__}, which gives neither tokens nor a map of features"
    try:
        features = net.eval().forward_features(torch.zeros(1, in_chans, image_size, image_size))
        if not isinstance(features, Tensor) or features.ndim not in (3, 4):
            raise UserError(nothing)
        pooled = net.forward_head(features, pre_logits=True)
    except UserError:
        raise
    except (RuntimeError, AssertionError, ValueError, TypeError, AttributeError, IndexError) as error:
        raise UserError(
            f"encoder.arch: `{arch}` does not take films of {image_size} px ({str(error).splitlines()[0]}); "
            "try another encoder.image_size, such as the one in its name"
        ) from None
    finally:
        net.train()
    if pooled.ndim != 2:
        raise UserError(nothing)
    if features.ndim == 3:
        prefix = prefix if prefix is not None else int(getattr(net, "cls_token", None) is not None)
        patches = max(1, features.shape[1] - prefix)
        return Layout("tokens", features.shape[2], pooled.shape[1], prefix, round(image_size / patches**0.5))
    last = getattr(net, "output_fmt", "") == "NHWC" or (features.shape[1] != width and features.shape[3] == width)
    side, channels = (features.shape[1], features.shape[3]) if last else (features.shape[2], features.shape[1])
    form: Any = "map, channels last" if last else "map"
    return Layout(form, channels, pooled.shape[1], 0, max(1, round(image_size / side)))


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


# ---- Eva: EVA-02, EVA-X, DINOv3 and other ViTs with rotary positions.


def through_eva(net: Any, patches: Tensor, keep: Tensor | None = None, *, checkpointing: bool = False) -> Tensor:
    """Embedded patches (B, h, w, D) -> tokens (B, N, D), prefix first.

    Args:
        keep: (B, n) indices of the patches to compute. Positions are added before the others are left out, and rotary
            positions follow the kept ones; class and register tokens are always kept.
    """
    tokens, rope = net._pos_embed(patches)
    mixed = bool(getattr(net, "rope_mixed", False))  # one rotation per block
    if keep is not None:
        prefix, rest = tokens[:, : net.num_prefix_tokens], tokens[:, net.num_prefix_tokens :]
        tokens = torch.cat([prefix, rest.gather(1, keep[:, :, None].expand(-1, -1, rest.shape[2]))], dim=1)
        if rope is not None:
            rope = apply_keep_indices_nlc(tokens, rope, keep)
            rope = rope.transpose(0, 1) if mixed else rope.unsqueeze(1)
    tokens = net.norm_pre(tokens)
    for i, block in enumerate(net.blocks):
        own = rope[i] if mixed and rope is not None else rope
        if checkpointing and torch.is_grad_enabled():
            tokens = checkpoint(block, tokens, rope=own, use_reentrant=False)
        else:
            tokens = block(tokens, rope=own)
    return net.norm(tokens)
