"""Load weights trained elsewhere: read, rename to timm's keys, check, copy into an encoder. Nothing is re-initialised.

Input: encoder/ (or its run), or a file with the names of timm, torchvision, lightly, DINOv2 or Hugging Face (ViT, MAE,
ViTMSN, DINOv2, DINOv3), alone or inside a checkpoint of Lightning, solo-learn, MoCo, DINO, MSN or CXR-EHR-MSN; other
original names (EVA, Swin, ConvNeXt, ...) pass timm's own conversion. Output: the encoder with these weights. Only
tensors and plain containers of a file are unpickled.
"""

from __future__ import annotations

import math
import pickle
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from configs import UserError
from ehr_features.typed import read_json
from pretrain.encoder.model import Encoder, differences, encoder_folder, load
from pretrain.shapes import WeightIndex

WRAPPERS = ("state_dict", "model_state_dict", "model", "teacher", "target_encoder", "student", "encoder", "backbone")
ROOTS = (  # layers that occur once in a backbone: the text before one in a key is the backbone's name
    "patch_embed.proj.weight",  # timm's ViTs, DINO, DINOv2, MAE, MSN
    "conv_proj.weight",  # torchvision's ViT
    "embeddings.patch_embeddings.projection.weight",  # Hugging Face's
    "embeddings.patch_embeddings.weight",  # its DINOv3
    "layer1.0.conv1.weight",  # a ResNet
    "4.0.conv1.weight",  # a ResNet's children as one Sequential, as in lightly's examples
    "conv0.weight",  # a DenseNet's features
)
NOT_EVALUATED = re.compile(r"momentum|anchor|student|encoder_k")  # copies that the method's authors do not evaluate
HEADS = re.compile(
    r"(head|heads|fc|classifier|head_dist|pooler)\.|(embeddings\.)?mask_token|decoder|proj|pred|prototypes|queue"
)
RENAMED = tuple(
    (re.compile(pattern), by)
    for pattern, by in (
        (r"^class_token$", "cls_token"),  # torchvision's ViT, lightly's over it
        (r"^conv_proj\.", "patch_embed.proj."),
        (r"^encoder\.pos_embedding$", "pos_embed"),
        (r"^encoder\.ln\.", "norm."),
        (r"^encoder\.layers\.encoder_layer_(\d+)\.", r"blocks.\1."),
        (r"\.ln_([12])\.", r".norm\1."),
        (r"\.self_attention\.in_proj_", ".attn.qkv."),
        (r"\.self_attention\.out_proj\.", ".attn.proj."),
        (r"\.mlp\.(?:0|linear_1)\.", ".mlp.fc1."),
        (r"\.mlp\.(?:3|linear_2)\.", ".mlp.fc2."),
        (r"^embeddings\.(cls_token|register_tokens)$", r"\1"),  # Hugging Face, before and after transformers 5
        (r"^embeddings\.position_embeddings$", "pos_embed"),
        (r"^embeddings\.patch_embeddings\.(?:projection\.)?", "patch_embed.proj."),
        (r"^layernorm\.", "norm."),
        (r"^(?:encoder\.layer|layers|(?:model\.)?layer)\.(\d+)\.", r"blocks.\1."),
        (r"\.layernorm_before\.", ".norm1."),
        (r"\.layernorm_after\.", ".norm2."),
        (r"\.layer_scale([12])\.lambda1$", r".ls\1.gamma"),
        (r"\.attention\.(?:attention\.)?(?:query|q_proj)\.", ".attn.q."),
        (r"\.attention\.(?:attention\.)?(?:key|k_proj)\.", ".attn.k."),
        (r"\.attention\.(?:attention\.)?(?:value|v_proj)\.", ".attn.v."),
        (r"\.attention\.(?:output\.dense|o_proj)\.", ".attn.proj."),
        (r"\.intermediate\.dense\.", ".mlp.fc1."),
        (r"\.output\.dense\.", ".mlp.fc2."),
        (r"\.mlp\.(?:weights_in|w12)\.", ".mlp.fc1."),  # SwiGLU of DINOv2's largest
        (r"\.mlp\.(?:weights_out|w3|down_proj)\.", ".mlp.fc2."),
        (r"^blocks\.\d+\.(\d+)\.", r"blocks.\1."),  # DINOv2's chunks of blocks
        (r"^([4-7])\.", lambda m: f"layer{int(m[1]) - 3}."),  # a ResNet's children, numbered
        (r"^0\.", "conv1."),
        (r"^1\.", "bn1."),
        (r"^(conv0|norm0|norm5|denseblock\d|transition\d)\.", r"features.\1."),  # a DenseNet's features
        (r"(\.denselayer\d+\.(?:norm|conv))\.([12]\.)", r"\1\2"),  # torchvision's older files
    )
)
OF_EVA = (  # Hugging Face's DINOv3, after RENAMED, in timm's Eva
    (re.compile(r"^register_tokens$"), "reg_token"),
    (re.compile(r"\.ls([12])\.gamma$"), r".gamma_\1"),
    (re.compile(r"\.attn\.([qv])\.bias$"), r".attn.\1_bias"),
)
JOINED = {  # tensors that timm joins into one
    ".attn.qkv.": (".attn.q.", ".attn.k.", ".attn.v."),
    ".mlp.fc1.": (".mlp.gate_proj.", ".mlp.up_proj."),
}
COUNTER = ".num_batches_tracked"  # of batch norm; absent from old files, and unused
CXR_EHR_MSN, ITS_HEADS = "ehr_cxr_project_g.weight", 6  # both its ViTs have 6 heads; timm's have 3 and 6


def load_weights(encoder: Encoder, path: str | Path, heads: int | None = None, section: str = "encoder") -> str:
    """Fill an encoder with weights of the same architecture; positions are resampled to its film size, as in timm.

    Args:
        heads: attention heads of a bare ViT file; its tensors have the same shapes for any number.
        section: of the config that describes the encoder, for errors.
    Returns: what was done, for the log.
    Raises: UserError: no such weights, of another architecture, or of an architecture that cannot be verified.
    """
    folder, left_out = encoder_folder(path), list[str]()
    if folder.is_dir():
        theirs = load(folder)
        _same_network(encoder, theirs, folder)
        state, source = theirs.net.state_dict(), f"encoder {folder}"
    else:
        state, left_out, known = state_for(encoder.net, read_tensors(Path(path)), Path(path))
        source = f"file {path}"
        _same_heads(encoder, path, known or heads, section)
    return copy_state(encoder, state, f"{path}", source, left_out=left_out, section=section)


def copy_state(
    encoder: Encoder,
    state: dict[str, Tensor],
    path: str,
    source: str,
    *,
    left_out: Iterable[str] = (),
    section: str = "encoder",
    antialias: bool = True,
) -> str:
    """Copy weights under timm's keys into an encoder, after channels and positions are brought to its size.

    Args:
        path, source: for the error and for the log.
        antialias: resample positions as timm does; False: as Hugging Face does.
    Returns: what was done. Raises: UserError: the weights do not fit.
    """
    wanted = encoder.net.state_dict()
    state = state | {key: value for key, value in wanted.items() if key.endswith(COUNTER) and key not in state}
    state, converted = to_channels(state, encoder.meta["in_chans"], wanted)
    state, resampled = _to_film_size(encoder, state, antialias)
    if faults := differences(wanted, state):
        raise UserError(
            f"{path}: these weights do not fit {section}.arch={encoder.meta['arch']} as configured: {faults}"
        )
    encoder.net.load_state_dict(state)
    dropped = [f"left out: {', '.join(left_out)}"] if left_out else []
    return "; ".join([f"{len(state)} tensors from {source}", *filter(None, (converted, resampled)), *dropped])


def read_state(path: Path) -> tuple[dict[str, Tensor], list[str], int | None]:
    """Read the backbone of a file under timm's keys, the names of its other contents, and its attention heads if known.

    Raises: UserError: absent, damaged, not only tensors, no backbone in it or more than one.
    """
    return backbone(read_tensors(path), path, ())


def state_for(
    net: nn.Module, tensors: dict[str, Tensor], path: Path
) -> tuple[dict[str, Tensor], list[str], int | None]:
    """The weights of `net` among `tensors`: by our names, else by timm's own conversion for its family.

    Returns: as `read_state`. Raises: UserError: no backbone in the file, or more than one.
    """
    wanted, refused = net.state_dict(), None
    try:
        found = backbone(tensors, path, wanted)
        if wanted.keys() <= found[0].keys() | {key for key in wanted if key.endswith(COUNTER)}:
            return found
    except UserError as error:
        found, refused = ({}, [], None), error
    converted = _by_timm(net, tensors, wanted)
    if converted is not None:
        kept = {key: value for key, value in converted.items() if key in wanted}
        return kept, sorted({key.partition(".")[0] for key in converted if key not in wanted}), None
    if refused is not None:
        raise refused
    return found


def _by_timm(net: nn.Module, tensors: dict[str, Tensor], wanted: dict[str, Tensor]) -> dict[str, Tensor] | None:
    """The file's tensors under the keys that timm's own loader of this family gives them; None if some are missing."""
    convert = getattr(sys.modules[type(net).__module__], "checkpoint_filter_fn", None)
    if convert is None:
        return None
    for name in ("", "module.", "backbone.", "model."):
        inside = {key.removeprefix(name): value for key, value in tensors.items() if key.startswith(name)}
        try:
            found: dict[str, Tensor] = convert(inside, net)
        except (KeyError, RuntimeError, ValueError, AttributeError, IndexError, TypeError, AssertionError):
            continue
        if wanted.keys() <= found.keys() | {key for key in wanted if key.endswith(COUNTER)}:
            return found
    return None


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file by their names, out of its outer containers.

    Raises: UserError: absent, damaged, or not only tensors.
    """
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
    state = state.tensors() if isinstance(state, _Inert) else state
    tensors = {str(k): v for k, v in state.items() if isinstance(v, Tensor)} if isinstance(state, dict) else {}
    if not tensors:
        raise UserError(f"{path}: no state_dict in it; wanted a dict of names and tensors")
    return tensors


def backbone(
    tensors: dict[str, Tensor], path: Path, wanted: Iterable[str]
) -> tuple[dict[str, Tensor], list[str], int | None]:
    """The backbone under timm's keys, the names of the other tensors, and its attention heads if known.

    Args:
        wanted: the keys of the network to be filled, if it is known.
    Raises: UserError: no backbone or more than one.
    """
    wanted = list(wanted)
    name = _backbone_name(tensors, path, wanted)
    inside = {key.removeprefix(name): value for key, value in tensors.items() if key.startswith(name)}
    kept = {key: value for key, value in inside.items() if key in wanted or not HEADS.match(key)}
    rest = {key.removeprefix("module.").partition(".")[0] for key in tensors if key.removeprefix(name) not in kept}
    known = ITS_HEADS if CXR_EHR_MSN in tensors else None
    return _timm(kept, wanted), sorted(rest), known


class _Inert(dict[Any, Any]):
    """Replaces an object in a checkpoint that is not read: its class is not imported, none of its code is run."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        self.state = state if isinstance(state, dict) else {}

    def tensors(self, prefix: str = "") -> dict[str, Tensor]:
        """The state_dict of a module that was pickled whole, as torchxrayvision's files are."""
        found: dict[str, Tensor] = {}
        content = getattr(self, "state", {})
        for name in ("_parameters", "_buffers"):
            own = content.get(name) or {}
            found |= {prefix + str(key): value for key, value in own.items() if isinstance(value, Tensor)}
        for key, module in (content.get("_modules") or {}).items():
            if isinstance(module, _Inert):
                found |= module.tensors(f"{prefix}{key}.")
        return found


def _read(path: Path) -> Any:
    """Read a file; Lightning and training scripts store objects (arguments, configs) beside the tensors."""
    if path.suffix == ".safetensors":
        return load_file(path)
    if path.name.endswith(".index.json"):  # the weights lie in several files beside it
        parts = sorted(set(read_json(path, WeightIndex)["weight_map"].values()))
        return {key: value for part in parts for key, value in _read(path.parent / Path(part).name).items()}
    try:
        others = get_unsafe_globals_in_checkpoint(path)
    except ValueError:  # the format before torch 1.6
        others = []
    with safe_globals([(_Inert, name) for name in others]):
        return torch.load(path, map_location="cpu", weights_only=True)


def _backbone_name(state: dict[str, Tensor], path: Path, wanted: list[str]) -> str:
    """The key prefix of the backbone that the method's authors evaluate."""
    names: set[str] = set()
    for roots in (ROOTS, tuple(wanted[:1])):  # the first layer of another family
        names = names or {key[: -len(root)] for key in state for root in roots if f".{key}".endswith(f".{root}")}
    if not names:
        raise UserError(
            f"{path}: no known backbone (ViT, DenseNet, ResNet{', or that of the config' if wanted else ''}) among "
            f"its {len(state)} tensors, e.g. {', '.join(list(state)[:3])}; save the backbone's state_dict under timm's "
            "names"
        )
    chosen = {name for name in names if not NOT_EVALUATED.search(name)} or names
    chosen = {name for name in chosen if "online" in name} or chosen  # BYOL
    if len(chosen) > 1:
        raise UserError(
            f"{path}: {len(chosen)} backbones in it: {', '.join(sorted(chosen))}; save the state_dict of one of them"
        )
    return chosen.pop()


def _timm(state: dict[str, Tensor], wanted: Iterable[str] = ()) -> dict[str, Tensor]:
    """Rename keys to timm's; join queries, keys and values; add registers to positions as in timm."""
    out, rules = {}, list(RENAMED)
    wanted = set(wanted)
    if state.keys() <= wanted:
        return state
    if any(key.endswith(".gamma_1") for key in wanted):
        gated = any(".mlp.fc1_g." in key for key in wanted)
        rules += [*OF_EVA, (re.compile(r"\.mlp\.up_proj\."), ".mlp.fc1_x." if gated else ".mlp.fc1.")]
        rules.append((re.compile(r"\.mlp\.gate_proj\."), ".mlp.fc1_g."))
    for key, value in state.items():
        for pattern, by in rules:
            key = pattern.sub(by, key)
        if value.numel():  # a DINOv3 without registers stores none
            out[key] = value
    for joint, parts in JOINED.items():
        for key in [key for key in out if parts[0] in key]:
            own = [key.replace(parts[0], part) for part in parts]
            if all(part in out for part in own):
                out[key.replace(parts[0], joint)] = torch.cat([out.pop(part) for part in own])
    if "register_tokens" in out and out.keys() >= {"cls_token", "pos_embed"}:
        out["reg_token"] = out.pop("register_tokens")
        out["cls_token"], out["pos_embed"] = out["cls_token"] + out["pos_embed"][:, :1], out["pos_embed"][:, 1:]
    return out


def to_channels(
    state: dict[str, Tensor], in_chans: int, wanted: dict[str, Tensor] | None = None
) -> tuple[dict[str, Tensor], str]:
    """Change the number of equal input channels without changing the function of a grey film; also say what was
    changed. `wanted`: the network's tensors in its order, by default `state`; the first convolution reads the film."""
    ordered = (state if wanted is None else wanted).items()
    first = next((key for key, value in ordered if value.ndim == 4 and key.endswith(".weight")), None)
    first = first if first in state and state[first].ndim == 4 else None
    if first is None or state[first].shape[1] == in_chans:
        return state, ""
    weight = state[first]
    gray = weight.sum(dim=1, keepdim=True).expand(-1, in_chans, -1, -1) / in_chans
    return state | {first: gray.contiguous()}, f"{first} from {weight.shape[1]} to {in_chans} channels (summed)"


def _to_film_size(encoder: Encoder, state: dict[str, Tensor], antialias: bool) -> tuple[dict[str, Tensor], str]:
    """Resample positions to the encoder's grid of patches; also say what was changed."""
    mine, theirs = getattr(encoder.net, "pos_embed", None), state.get("pos_embed")
    if mine is None or theirs is None or theirs.ndim != 3 or mine.shape[1] == theirs.shape[1]:
        return state, ""
    grid = list(encoder.net.patch_embed.grid_size)
    prefix = mine.shape[1] - math.prod(grid)
    side = math.isqrt(max(0, theirs.shape[1] - prefix))
    if side**2 != theirs.shape[1] - prefix or side == 0:
        return state, ""  # `differences` reports the shapes
    new = resample_abs_pos_embed(theirs, grid, [side, side], num_prefix_tokens=prefix, antialias=antialias)
    return state | {"pos_embed": new}, f"positions resampled from {side} x {side} to {grid[0]} x {grid[1]} patches"


def _same_heads(encoder: Encoder, path: str | Path, heads: int | None, section: str) -> None:
    """Refuse a bare ViT whose number of attention heads is unknown or different; tensor shapes do not show it."""
    if not encoder.is_vit:
        return
    if heads is None:
        raise UserError(
            f"{path}: a bare ViT file does not contain its number of attention heads; set encoder.init_heads "
            f"(this config has {encoder.heads})"
        )
    if heads != encoder.heads:
        raise UserError(
            f"{path}: its ViT has {heads} attention heads, but this config has {encoder.heads}; set "
            f"{section}.model_args: {{num_heads: {heads}}}"
        )


def _same_network(encoder: Encoder, theirs: Encoder, folder: Path) -> None:
    """Refuse weights whose encoder.json names another network, which tensor shapes may not show."""
    free = ("img_size", "dynamic_img_size")  # positions are resampled
    mine, found = (
        {"arch": e.meta["arch"], "model_args": {k: v for k, v in e.meta["model_args"].items() if k not in free}}
        for e in (encoder, theirs)
    )
    if faults := [f"{key} {found[key]} there, {mine[key]} in this config" for key in mine if mine[key] != found[key]]:
        raise UserError(f"encoder.init {folder}: another network: {'; '.join(faults)}; change the config accordingly")
