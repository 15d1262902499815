"""Weights that others trained: read, renamed to timm's keys, checked, put into an encoder. Nothing is re-initialised.

Comes in: encoder/ (or the run it is in), or a file of timm, torchvision or Hugging Face's ViTs (DINOv2 too). Goes out:
the encoder, filled.
"""

from __future__ import annotations

import math
import pickle
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from configs import UserError
from pretrain.encoder.model import Encoder, differences, encoder_folder, read_meta

FIRST = ("patch_embed.proj.weight", "features.conv0.weight", "conv1.weight")  # layers that see the film's channels
CLASSIFIERS = ("head.", "heads.", "fc.", "classifier.", "head_dist.", "mask_token")  # what no encoder of ours has
WRAPPERS = ("state_dict", "model", "model_state_dict", "teacher", "student", "target_encoder")
PREFIXES = ("module.", "_orig_mod.", "backbone.", "encoder.net.", "encoder.", "net.")
TORCHVISION_VIT = (
    (r"^class_token$", "cls_token"),
    (r"^conv_proj\.", "patch_embed.proj."),
    (r"^encoder\.pos_embedding$", "pos_embed"),
    (r"^encoder\.ln\.", "norm."),
    (r"^encoder\.layers\.encoder_layer_(\d+)\.", r"blocks.\1."),
    (r"\.ln_([12])\.", r".norm\1."),
    (r"\.self_attention\.in_proj_", ".attn.qkv."),
    (r"\.self_attention\.out_proj\.", ".attn.proj."),
    (r"\.mlp\.(?:0|linear_1)\.", ".mlp.fc1."),
    (r"\.mlp\.(?:3|linear_2)\.", ".mlp.fc2."),
)
HUGGING_FACE_VIT = (  # ViTModel and Dinov2Model; queries, keys and values are put together afterwards
    (r"^embeddings\.(cls_token)$", r"\1"),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^layernorm\.", "norm."),
    (r"^encoder\.layer\.(\d+)\.", r"blocks.\1."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.layer_scale([12])\.lambda1$", r".ls\1.gamma"),
    (r"\.attention\.output\.dense\.", ".attn.proj."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
)
HEADS = (*CLASSIFIERS, "projection", "predictor", "prototypes", "decoder", "pooler")  # beside a wrapped backbone
OLD_DENSENET = re.compile(r"(\.denselayer\d+\.(?:norm|conv))\.([12]\.)")  # torchvision's files still have these names
COUNTER = ".num_batches_tracked"  # of batch norm; absent from old files, and used by nothing


def start_from(encoder: Encoder, path: str | Path, heads: int | None = None) -> str:
    """Fill an encoder with weights of the same architecture.

    Args:
        heads: attention heads of a bare ViT file; its tensors have the same shapes for any number.
    Returns: what was done, for the log.
    Raises: UserError: no such weights, of another architecture, or of one that cannot be known to be the same.
    """
    path, folder = Path(path), encoder_folder(path)
    own = encoder.net.blocks[0].attn.num_heads if encoder.is_vit else None
    if folder.is_dir():
        _same_network(encoder, read_meta(folder), folder)
        state, source = read_state(folder / "encoder.safetensors"), f"encoder {folder}"
    else:
        state, source = read_state(path), f"file {path}"
        if encoder.is_vit and heads is None:
            raise UserError(
                f"{path}: a bare ViT file does not say how many attention heads it has; give encoder.init_heads "
                f"(this config makes {own})"
            )
        if encoder.is_vit and heads != own:
            raise UserError(
                f"{path}: encoder.init_heads {heads}, but this config makes {own} heads; set "
                f"encoder.model_args: {{num_heads: {heads}}}"
            )
    dropped = sorted(key for key in state if key.startswith(CLASSIFIERS))
    state = {key: value for key, value in state.items() if key not in dropped}
    wanted = encoder.net.state_dict()
    state |= {key: value for key, value in wanted.items() if key.endswith(COUNTER) and key not in state}
    state, converted = to_channels(state, encoder.meta["in_chans"])
    if faults := differences(wanted, state):
        raise UserError(
            f"encoder.init {path}: not the weights of {encoder.meta['arch']} as configured: {faults}"
            + _other_size(encoder, state)
        )
    if broken := [key for key, value in state.items() if not value.isfinite().all()]:
        raise UserError(f"encoder.init {path}: not a number in {len(broken)} tensors, e.g. {broken[0]}")
    encoder.net.load_state_dict(state)
    notes = [f"{len(state)} tensors from {source}", *([converted] if converted else [])]
    return "; ".join(notes + ([f"its classifier ({', '.join(dropped)}) left out"] if dropped else []))


def _other_size(encoder: Encoder, state: dict[str, Tensor]) -> str:
    """What to do where the file's positions are those of films of another size; else nothing."""
    mine, theirs = getattr(encoder.net, "pos_embed", None), state.get("pos_embed")
    if mine is None or theirs is None or mine.shape == theirs.shape:
        return ""
    extra = mine.shape[1] - math.prod(encoder.net.patch_embed.grid_size)
    side = math.isqrt(theirs.shape[1] - extra)
    if side**2 != theirs.shape[1] - extra:
        return ""
    theirs_px, mine_px = side * encoder.patch, encoder.meta["image_size"]
    return (
        f"; with encoder.model_args: {{img_size: {theirs_px}}} its positions are interpolated for films of {mine_px} px"
    )


def read_state(path: Path) -> dict[str, Tensor]:
    """Tensors of a file under timm's keys. Raises: UserError: absent, damaged, or not only tensors."""
    try:
        state: Any = _read(path)
    except FileNotFoundError:
        raise UserError(f"{path}: no such weights file") from None
    except Exception as error:  # damaged bytes make torch raise almost anything
        if isinstance(error, pickle.UnpicklingError) and "GLOBAL" in str(error):
            raise UserError(
                f"{path}: holds more than tensors, and loading it could run code; save its state_dict"
            ) from None
        why = (str(error).strip() or "it is empty").splitlines()[0]
        raise UserError(f"{path}: damaged, or not a weights file ({why})") from None
    while isinstance(state, dict) and (inner := next((w for w in WRAPPERS if isinstance(state.get(w), dict)), None)):
        state = state[inner]
    if not isinstance(state, dict) or not state or not all(isinstance(v, Tensor) for v in state.values()):
        raise UserError(f"{path}: no state_dict in it; wanted names and tensors")
    for prefix in PREFIXES:
        inside = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
        if inside and all(key.startswith((prefix, *HEADS)) for key in state):
            state = inside
    if "class_token" in state:
        state = {_renamed(key, TORCHVISION_VIT): value for key, value in state.items()}
    if "embeddings.cls_token" in state:
        state = _merged({_renamed(key, HUGGING_FACE_VIT): value for key, value in state.items()})
    return {OLD_DENSENET.sub(r"\1\2", key): value for key, value in state.items()}


def _read(path: Path) -> Any:
    return load_file(path) if path.suffix == ".safetensors" else torch.load(path, map_location="cpu", weights_only=True)


def to_channels(state: dict[str, Tensor], in_chans: int) -> tuple[dict[str, Tensor], str]:
    """The same function of a gray film seen through another number of equal channels; what was changed, in words."""
    first = next((key for key in FIRST if key in state), None)
    if first is None or state[first].shape[1] == in_chans:
        return state, ""
    weight = state[first]
    gray = weight.sum(dim=1, keepdim=True).expand(-1, in_chans, -1, -1) / in_chans
    return state | {first: gray.contiguous()}, f"{first} from {weight.shape[1]} to {in_chans} channels (summed)"


def _renamed(key: str, table: Sequence[tuple[str, str]]) -> str:
    for pattern, by in table:
        key = re.sub(pattern, by, key)
    return key


def _merged(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Queries, keys and values as timm's one blocks.N.attn.qkv; no pooler, no mask token."""
    out = {k: v for k, v in state.items() if not k.startswith(("pooler.", "embeddings.")) and ".query." not in k}
    for key, query in state.items():
        if ".attention.attention.query." in key:
            parts = [query, *(out.pop(key.replace(".query.", f".{name}.")) for name in ("key", "value"))]
            out[key.replace(".attention.attention.query.", ".attn.qkv.")] = torch.cat(parts)
    return out


def _same_network(encoder: Encoder, meta: dict[str, Any], folder: Path) -> None:
    """encoder.json against the config: what the tensors' shapes may not show."""
    mine, theirs = _traits(encoder.meta), _traits(meta)
    faults = [f"{key} {theirs[key]} there, {mine[key]} in this config" for key in mine if mine[key] != theirs[key]]
    if faults:
        raise UserError(f"encoder.init {folder}: another network: {'; '.join(faults)}; make the config agree")


def _traits(meta: dict[str, Any]) -> dict[str, Any]:
    free = ("img_size", "dynamic_img_size")
    args = {key: value for key, value in meta["model_args"].items() if key not in free}
    return {"arch": meta["arch"], "image_size": meta["image_size"], "model_args": args}
