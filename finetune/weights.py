"""An encoder from a bare weights file of timm or torchvision: ImageNet, DINOv2, or anyone's.

Comes in: .safetensors or .pth (tensors only; nothing is unpickled but those) and the architecture's name. Goes out: an
`Encoder` with every weight loaded: the classifier is left out, missing or odd keys are refused.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.layers import resample_abs_pos_embed
from torch import Tensor

from configs import UserError
from pretrain import encoder as encoders
from pretrain.preprocess import Preprocess

if TYPE_CHECKING:
    from finetune.config import WeightsConfig

HEADS = ("head.", "fc.", "classifier.", "head_dist.", "mask_token")
WRAPPERS = ("state_dict", "model", "teacher", "student", "target_encoder")
PREFIXES = ("module.", "backbone.", "encoder.", "net.")


def open_weights(path: str | Path, config: WeightsConfig) -> encoders.Encoder:
    """Build `config.arch` and fill it from `path`.

    Raises: UserError: no such file, not a file of tensors, weights of another architecture.
    """
    preprocess = Preprocess(config.image_size, "dataset", config.mean, config.std, config.in_chans)
    encoder = encoders.create(
        config.arch,
        in_chans=config.in_chans,
        image_size=config.image_size,
        model_args=dict(config.model_args),
        preprocess=preprocess,
    )
    wanted = encoder.net.state_dict()
    state = {key: value for key, value in tensors(Path(path)).items() if not key.startswith(HEADS)}
    if "pos_embed" in state and "pos_embed" in wanted:
        prefix = 0 if encoder.net.no_embed_class else encoder.net.num_prefix_tokens
        grid = list(encoder.net.patch_embed.grid_size)
        state["pos_embed"] = resample_abs_pos_embed(state["pos_embed"], grid, num_prefix_tokens=prefix)
    if faults := encoders.differences(wanted, state):
        raise UserError(f"{path}: these weights are not of weights.arch={config.arch}: {faults}")
    encoder.net.load_state_dict(state)
    return encoder.eval()


def tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, out of the usual wrappers and prefixes. Raises: UserError."""
    try:
        state: Any = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path}: no such weights file") from None
    except (SafetensorError, OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise UserError(f"{path}: not a file of tensors ({str(error).splitlines()[0][:120]})") from None
    while isinstance(state, dict) and (inner := next((w for w in WRAPPERS if isinstance(state.get(w), dict)), None)):
        state = state[inner]
    found = {k: v for k, v in state.items() if isinstance(v, Tensor)} if isinstance(state, dict) else {}
    if not found:
        raise UserError(f"{path}: holds no named tensors")
    for prefix in PREFIXES:
        if all(key.startswith(prefix) for key in found):
            found = {key.removeprefix(prefix): value for key, value in found.items()}
    return found
