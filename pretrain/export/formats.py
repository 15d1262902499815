"""The forms of an exported encoder, each written and then opened by its own reader and compared.

Input: an Encoder in eval mode, a folder. Output: the files of one form: timm's hub layout, transformers' ViTMSNModel,
ONNX, TorchScript. A form that does not give the encoder's numbers is not written.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save
from timm.models import _hub
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from configs import UserError
from pretrain.encoder import Encoder
from pretrain.encoder.model import HUB_WEIGHTS
from pretrain.encoder.network import plain

TOLERANCE = 1e-5  # of ONNX features, relative to the largest: another library multiplies the matrices


def to_timm(folder: Path, encoder: Encoder) -> str:
    """model.safetensors beside the config.json that every encoder folder has; the same bytes as encoder.safetensors."""
    try:
        os.link(folder / "encoder.safetensors", folder / HUB_WEIGHTS)
    except OSError:  # a file system without hard links
        shutil.copyfile(folder / "encoder.safetensors", folder / HUB_WEIGHTS)
    if not hasattr(_hub, "load_model_config_from_path"):
        return f"not compared: timm {timm.__version__} cannot read a local folder"
    net = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    x = _input(encoder)
    with torch.inference_mode():
        if not torch.equal(net(x), encoder(x)):
            raise UserError(
                f"{encoder.name}: timm computes other features with pool `{encoder.meta['pool']}` of "
                f"{encoder.meta['arch']}; export it with --format torchscript or onnx"
            )
    return "timm gives the same features, bit by bit"


def to_transformers(folder: Path, encoder: Encoder) -> str:
    """config.json, model.safetensors and preprocessor_config.json of a ViTMSNModel."""
    _needs("transformers", "transformers")
    from transformers import AutoModel, ViTImageProcessor, ViTMSNConfig

    if why := unlike_vit_msn(encoder):
        raise UserError(
            f"{encoder.name}: --format transformers writes a ViTMSNModel, a plain ViT with a class token; "
            f"{encoder.meta['arch']} has {', '.join(why)}. Use --format timm, onnx or torchscript"
        )
    net, way = encoder.net, encoder.preprocess
    block, chans = net.blocks[0], encoder.meta["in_chans"]
    config = ViTMSNConfig(
        hidden_size=net.embed_dim, num_hidden_layers=len(net.blocks), num_attention_heads=block.attn.num_heads,
        intermediate_size=block.mlp.fc1.out_features, hidden_act="gelu", layer_norm_eps=net.norm.eps,
        image_size=encoder.meta["image_size"], patch_size=encoder.patch, num_channels=chans,
        qkv_bias=block.attn.qkv.bias is not None, architectures=["ViTMSNModel"],
    )  # fmt: skip
    config.save_pretrained(folder)
    state = {key: value.detach().cpu().clone().contiguous() for key, value in _vit_msn_state(net).items()}
    (folder / HUB_WEIGHTS).write_bytes(save(state, metadata={"format": "pt"}))
    fixed, size = way.normalise == "dataset", encoder.meta["image_size"]
    ViTImageProcessor(
        do_resize=True, size={"height": size, "width": size}, resample=2, do_rescale=True, rescale_factor=1 / 255,
        do_normalize=fixed, image_mean=way.per_channel()[0],
        image_std=way.per_channel()[1],
    ).save_pretrained(folder)  # fmt: skip
    theirs, x = AutoModel.from_pretrained(folder).eval(), _input(encoder)
    with torch.inference_mode():
        if not torch.equal(theirs(x).last_hidden_state, encoder.features(x)):
            raise UserError(f"{encoder.name}: transformers computes other features; use --format timm")
    return "transformers gives the same tokens, bit by bit"


def unlike_vit_msn(encoder: Encoder) -> list[str]:
    """What an encoder has that a ViTMSNModel does not, in words."""
    net = encoder.net
    if type(net) is not VisionTransformer:
        return [f"the network {type(net).__name__}"]
    blocks: list[Any] = list(net.blocks)

    def none(module: Any) -> bool:
        return module is None or isinstance(module, nn.Identity)

    standard = all(type(block) is Block and plain(block) for block in blocks)
    norms = [net.norm, *(norm for block in blocks for norm in (block.norm1, block.norm2))] if standard else []
    has = {
        "no class token": net.cls_token is None,
        "registers": net.reg_token is not None,
        "no learned positions of all tokens": net.pos_embed is None or bool(net.no_embed_class),
        "a norm before its blocks": not none(net.norm_pre),
        "a norm of patches": not none(net.patch_embed.norm),
        "a patch embedding without bias": net.patch_embed.proj.bias is None,
        "pooling by attention": net.attn_pool is not None,
        "no norm after its blocks": none(net.norm),
        "blocks of its own": not standard,
        "layer scale": standard and not all(none(b.ls1) and none(b.ls2) for b in blocks),
        "norms of queries and keys": standard and not all(none(b.attn.q_norm) and none(b.attn.k_norm) for b in blocks),
        "a norm in attention": standard and not all(none(b.attn.norm) for b in blocks),
        "another MLP": standard and not all(_plain_mlp(b.mlp) for b in blocks),
        "other norms": any(type(n) is not _layer_norm(n) or n.eps != net.norm.eps or n.bias is None for n in norms),
    }
    return [words for words, true in has.items() if true]


def _layer_norm(norm: nn.Module) -> type[nn.Module]:
    """The type of a norm that computes as nn.LayerNorm does."""
    return type(norm) if isinstance(norm, nn.LayerNorm) else nn.LayerNorm


def _plain_mlp(mlp: Any) -> bool:
    usual = type(mlp).__name__ == "Mlp" and isinstance(mlp.act, nn.GELU) and mlp.act.approximate == "none"
    return usual and isinstance(mlp.norm, nn.Identity) and isinstance(mlp.fc1, nn.Linear) and mlp.fc1.bias is not None


def _vit_msn_state(net: Any) -> dict[str, Tensor]:
    """timm's weights under the names that ViTMSNModel's files have had since transformers 4."""
    out = {"embeddings.cls_token": net.cls_token, "embeddings.position_embeddings": net.pos_embed}
    parts = {"embeddings.patch_embeddings.projection": net.patch_embed.proj, "layernorm": net.norm}
    for i, block in enumerate(net.blocks):
        at = f"encoder.layer.{i}"
        for kind in ("weight", "bias"):
            if (joint := getattr(block.attn.qkv, kind)) is not None:
                for name, part in zip(("query", "key", "value"), joint.chunk(3), strict=True):
                    out[f"{at}.attention.attention.{name}.{kind}"] = part
        parts |= {
            f"{at}.attention.output.dense": block.attn.proj, f"{at}.intermediate.dense": block.mlp.fc1,
            f"{at}.output.dense": block.mlp.fc2, f"{at}.layernorm_before": block.norm1,
            f"{at}.layernorm_after": block.norm2,
        }  # fmt: skip
    return out | {f"{name}.{kind}": getattr(part, kind) for name, part in parts.items() for kind in ("weight", "bias")}


def to_onnx(folder: Path, encoder: Encoder) -> str:
    """encoder.onnx: normalised views (N, C, S, S) -> features (N, D), any N."""
    _needs("onnx", "onnx", "onnxscript")
    torch.onnx.export(
        encoder.eval(), (_input(encoder),), folder / "encoder.onnx", input_names=["views"], output_names=["features"],
        dynamo=True, dynamic_shapes={"x": {0: "films"}}, external_data=False, verbose=False,
    )  # fmt: skip
    if importlib.util.find_spec("onnxruntime") is None:
        return "not compared: onnxruntime is not installed"
    import onnxruntime

    session, x = onnxruntime.InferenceSession(str(folder / "encoder.onnx")), _input(encoder, 3)
    with torch.inference_mode():
        expected = encoder(x)
    found = torch.from_numpy(session.run(None, {"views": x.numpy()})[0])
    apart = ((found - expected).abs().max() / expected.abs().max().clamp_min(1)).item()
    if not apart <= TOLERANCE:
        raise UserError(f"{encoder.name}: onnxruntime's features differ by {apart:.1e}; use --format torchscript")
    return f"onnxruntime gives the same features within {apart:.0e}"


def to_torchscript(folder: Path, encoder: Encoder) -> str:
    """encoder.pt: normalised views (N, C, S, S) -> features (N, D), any N, by `torch.jit.load` alone."""
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # of branches by the films' size, which is fixed; and of tracing itself
        traced: Any = torch.jit.trace(encoder.eval(), (_input(encoder),), check_trace=False)
        torch.jit.save(traced, str(folder / "encoder.pt"))
        again = torch.jit.load(str(folder / "encoder.pt"))
        x = _input(encoder, 3)
        if not torch.equal(again(x), encoder(x)):
            raise UserError(f"{encoder.name}: TorchScript computes other features; use --format timm or onnx")
    return "TorchScript gives the same features, bit by bit"


WRITERS: dict[str, Callable[[Path, Encoder], str]] = {
    "timm": to_timm, "transformers": to_transformers, "onnx": to_onnx, "torchscript": to_torchscript,
}  # fmt: skip
HUB_FILES = {  # what --push sends, and nothing else
    "timm": ("config.json", HUB_WEIGHTS),
    "transformers": ("config.json", HUB_WEIGHTS, "preprocessor_config.json"),
    "onnx": ("encoder.onnx",),
    "torchscript": ("encoder.pt",),
}
OPEN = {  # how a reader of the card opens it
    "timm": 'model = timm.create_model("hf-hub:{name}", pretrained=True).eval()  # or local-dir:FOLDER\n'
    "features = model(x)",
    "transformers": 'model = AutoModel.from_pretrained("{name}").eval()  # or a folder\n'
    "features = model(x).last_hidden_state{pool}",
    "onnx": 'session = onnxruntime.InferenceSession("encoder.onnx")\n'
    'features = session.run(None, {{"views": x.numpy()}})[0]',
    "torchscript": 'model = torch.jit.load("encoder.pt")\nfeatures = model(x)',
}


def opened(form: str, encoder: Encoder, name: str) -> str:
    """The card's section on how to open this form, from a film as a square of pixels in [0, 1]."""
    way = encoder.preprocess
    mean, std = (
        f"torch.tensor({list(one)}).view(-1, 1, 1)" if isinstance(one, tuple) else one for one in (way.mean, way.std)
    )
    line = f"x = (x - {mean}) / {std}"
    if way.normalise != "dataset":
        line = (
            "x = (x - x.mean((1, 2, 3), True)) / (x.std((1, 2, 3), True, correction=0) + 0.1)  # each film by its own"
        )
    pool = "[:, 0]" if encoder.meta["pool"] == "cls" else "[:, 1:].mean(1)"
    size, chans = encoder.meta["image_size"], encoder.meta["in_chans"]
    start = f"# x: (N, {chans}, {size}, {size}), grey, black-padded to a square, pixels in [0, 1]"
    code = "\n".join([start, line, OPEN[form].format(name=name, pool=pool)])
    return f"## How to open it\n\n```python\n{code}\n```\n"


def _input(encoder: Encoder, films: int = 2) -> Tensor:
    """Noise in the shape of views, the same at each call."""
    size, chans = encoder.meta["image_size"], encoder.meta["in_chans"]
    return torch.randn(films, chans, size, size, generator=torch.Generator().manual_seed(0))


def _needs(form: str, *packages: str) -> None:
    if missing := [name for name in packages if importlib.util.find_spec(name) is None]:
        raise UserError(f"--format {form} needs {' and '.join(missing)}: pip install {' '.join(missing)}")
