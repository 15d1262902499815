"""The timm networks that an encoder can be made of: VisionTransformers, DenseNets, ResNets."""

from __future__ import annotations

import difflib
from typing import Any

import timm
import torch
from timm.layers import PatchEmbed
from timm.models import model_entrypoint
from timm.models.densenet import DenseNet
from timm.models.resnet import ResNet
from timm.models.vision_transformer import VisionTransformer

from configs import UserError

VITS = ("vision_transformer", "deit")  # timm's modules of models that take any size with dynamic_img_size


def make(arch: str, in_chans: int, image_size: int, args: dict[str, Any]) -> Any:
    """The timm model, freshly initialised; `args` gets what makes a ViT take films of any size.

    Raises: UserError: timm has no such model, refuses the arguments, or it is of another family.
    """
    if files := {"checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay"} & args.keys():
        raise UserError(
            f"encoder.model_args: {', '.join(sorted(files))}: no weights are read here; give encoder.init=PATH"
        )
    if args.get("patch_drop_rate"):
        raise UserError("encoder.model_args: patch_drop_rate: patches are dropped by mask.ratio")
    try:
        if model_entrypoint(arch).__module__.rpartition(".")[2] in VITS:
            args |= {"img_size": image_size, "dynamic_img_size": True} | args
        net = timm.create_model(arch, pretrained=False, num_classes=0, in_chans=in_chans, **args)
    except KeyError:
        near = difflib.get_close_matches(arch, timm.list_models(), n=5) or ["vit_tiny_patch16_224", "densenet121"]
        raise UserError(f"encoder.arch: timm has no `{arch}`. Near it: {', '.join(near)}") from None
    except (RuntimeError, TypeError, AssertionError, ValueError) as error:
        raise UserError(f"encoder.arch: timm cannot make `{arch}` with {args}: {error}") from None
    if not isinstance(net, (VisionTransformer, DenseNet, ResNet)) or hasattr(net, "dist_token"):
        raise UserError(
            f"encoder.arch: `{arch}` is a {type(net).__name__}; wanted a VisionTransformer, DenseNet or ResNet"
        )
    if isinstance(net, VisionTransformer) and type(net.patch_embed) is not PatchEmbed:
        raise UserError(f"encoder.arch: `{arch}` sees a film through a convolutional net; wanted a plain ViT")
    return net


@torch.no_grad()
def sincos(net: Any) -> None:
    """Fill in sine-cosine positions of the patches; the class token's stay as they are."""
    height, width = net.patch_embed.grid_size
    quarter = net.embed_dim // 4
    rates = 10000 ** -(torch.arange(quarter) / quarter)
    rows = torch.arange(height).repeat_interleave(width)[:, None] * rates  # (N, D/4)
    columns = torch.arange(width).repeat(height)[:, None] * rates
    table = torch.cat([rows.sin(), rows.cos(), columns.sin(), columns.cos()], dim=1)
    net.pos_embed[0, -height * width :, : table.shape[1]] = table
