"""Configs of Hugging Face's transformers as arguments of timm: ViT, ViTMAE, ViTMSN, DINOv2, DINOv3.

Input: config.json and preprocessor_config.json. Output: timm's name and arguments; mean and deviation of the input.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs import UserError
from pretrain.encoder.hub import read_config

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
ACTIVATIONS = {"gelu": None, "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "quick_gelu": "quick_gelu"}
ACTIVATIONS |= {name: name for name in ("relu", "silu", "gelu_tanh")} | {"swish": "silu"}


def statistics(
    folder: Path, channels: int, mean: tuple[float, ...], std: tuple[float, ...]
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation for pixels in [0, 1]; the arguments are those of the owner's default processor."""
    path = folder / "preprocessor_config.json"
    config = read_config(path) if path.is_file() else {}
    if config.get("do_normalize") is False:
        mean, std = (0.0,) * channels, (1.0,) * channels
    else:
        mean, std = (
            tuple(value) if isinstance(value, list) else (float(value),) * channels if value is not None else default
            for value, default in ((config.get("image_mean"), mean), (config.get("image_std"), std))
        )
    scale = 255 * config.get("rescale_factor", 1 / 255) if config.get("do_rescale", True) else 255.0
    if len(mean) not in (1, channels) or len(std) not in (1, channels) or min(std) <= 0:
        raise UserError(f"{path}: image_mean {mean}, image_std {std}: wanted one number per channel ({channels})")
    return tuple(m / scale for m in mean), tuple(s / scale for s in std)


def _activation(config: dict[str, Any], where: str, usual: str = "gelu") -> dict[str, Any]:
    """act_layer for timm, if it is not the family's own."""
    name = config["hidden_act"]
    if name not in ACTIVATIONS:
        raise UserError(f"{where}: hidden_act {name!r} is not read; wanted one of {', '.join(ACTIVATIONS)}")
    return {} if name == usual or ACTIVATIONS[name] is None else {"act_layer": ACTIVATIONS[name]}


def mlp_ratio(hidden: int, width: int) -> float:
    """A ratio for which timm's int(width * ratio) is `hidden`."""
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else (hidden + 0.25) / width


def _vit(config: dict[str, Any], where: str) -> tuple[str, dict[str, Any]]:
    args = {"mlp_ratio": mlp_ratio(config["intermediate_size"], config["hidden_size"]), "qkv_bias": config["qkv_bias"]}
    return "vit_base_patch16_224", args | _activation(config, where)


def _dinov2(config: dict[str, Any], where: str) -> tuple[str, dict[str, Any]]:
    width, registers = config["hidden_size"], config.get("num_register_tokens") or 0
    arch, args = "vit_base_patch14", {"mlp_ratio": float(config["mlp_ratio"])}
    if config["use_swiglu_ffn"]:
        hidden = (int(int(width * config["mlp_ratio"]) * 2 / 3) + 7) // 8 * 8
        arch, args = "vit_giant_patch14", {"mlp_ratio": mlp_ratio(2 * hidden, width)}
    else:
        args |= _activation(config, where)
    args |= {"init_values": float(config["layerscale_value"]), "qkv_bias": config["qkv_bias"]}
    if config["model_type"] == "dinov2_with_registers":
        return f"{arch}_reg4_dinov2", args | {"reg_tokens": registers}
    return f"{arch}_dinov2", args


def _dinov3(config: dict[str, Any], where: str) -> tuple[str, dict[str, Any]]:
    """Only the query's and the value's bias exist, or none."""
    hidden, width = config["intermediate_size"], config["hidden_size"]
    biased = (config["query_bias"], config["value_bias"])
    if config["key_bias"] or biased[0] != biased[1] or not (config["proj_bias"] and config["mlp_bias"]):
        raise UserError(f"{where}: these biases (query, key, value, proj, mlp) are not those of a published DINOv3")
    args: dict[str, Any] = {
        "mlp_ratio": mlp_ratio(hidden, width),
        "init_values": float(config["layerscale_value"]),
        "num_reg_tokens": config["num_register_tokens"],
        "qkv_bias": bool(biased[0]),
        "rope_temperature": float(config["rope_theta"]),
    }
    if config["use_gated_mlp"]:
        if config["hidden_act"] not in ("silu", "swish"):
            raise UserError(f"{where}: a gated MLP with hidden_act {config['hidden_act']!r}; wanted silu")
        return "vit_small_plus_patch16_dinov3", args | {"swiglu_align_to": 8 if hidden % 8 == 0 else 1}
    if _activation(config, where):
        raise UserError(f"{where}: hidden_act {config['hidden_act']!r}; wanted gelu, as published")
    return "vit_small_patch16_dinov3", args


@dataclass(frozen=True)
class Reader:
    """A model_type of transformers: what its config leaves out if it is the default, and its timm network."""

    arch: Callable[[dict[str, Any], str], tuple[str, dict[str, Any]]]
    default: dict[str, Any]
    mean: tuple[float, ...] = IMAGENET[0]
    std: tuple[float, ...] = IMAGENET[1]


_COMMON = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "hidden_act": "gelu"}
_COMMON |= {"num_channels": 3, "image_size": 224, "qkv_bias": True}
_VIT = _COMMON | {"patch_size": 16, "intermediate_size": 3072, "layer_norm_eps": 1e-12}
_DINOV2 = _COMMON | {"patch_size": 14, "mlp_ratio": 4, "layerscale_value": 1.0, "use_swiglu_ffn": False}
_DINOV2 |= {"layer_norm_eps": 1e-6}
_DINOV3 = _COMMON | {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536, "patch_size": 16}
_DINOV3 |= {"layer_norm_eps": 1e-5, "layerscale_value": 1.0, "rope_theta": 100.0, "num_register_tokens": 0}
_DINOV3 |= {"query_bias": True, "key_bias": False, "value_bias": True, "proj_bias": True, "mlp_bias": True}
HALF = (0.5, 0.5, 0.5)
READERS = {
    "vit": Reader(_vit, _VIT, HALF, HALF),
    "vit_mae": Reader(_vit, _VIT),
    "vit_msn": Reader(_vit, _VIT | {"layer_norm_eps": 1e-6}),
    "dinov2": Reader(_dinov2, _DINOV2),
    "dinov2_with_registers": Reader(_dinov2, _DINOV2 | {"num_register_tokens": 4}),
    "dinov3_vit": Reader(_dinov3, _DINOV3 | {"use_gated_mlp": False}),
}
