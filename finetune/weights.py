"""An encoder from a bare weights file of timm or torchvision: ImageNet, DINOv2, or anyone's.

Comes in: .safetensors or .pth (tensors only; nothing is unpickled but those) and the architecture's name. Goes out: an
`Encoder` with every weight loaded: the classifier is left out, missing or odd keys are refused.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from timm.layers import resample_abs_pos_embed

from configs import UserError
from pretrain import encoder as encoders
from pretrain.encoder.preprocess import Preprocess
from pretrain.encoder.weights import CLASSIFIERS, COUNTER, read_state

if TYPE_CHECKING:
    from finetune.config import WeightsConfig


def fresh(config: WeightsConfig) -> encoders.Encoder:
    """`config.arch` with random weights."""
    return encoders.create(
        config.arch,
        in_chans=config.in_chans,
        image_size=config.image_size,
        model_args=dict(config.model_args),
        preprocess=Preprocess(config.image_size, "dataset", config.mean, config.std, config.in_chans),
    )


def open_weights(path: str | Path, config: WeightsConfig) -> encoders.Encoder:
    """Build `config.arch` and fill it from `path`.

    Raises: UserError: no such file, not a file of tensors, weights of another architecture.
    """
    encoder = fresh(config)
    wanted = encoder.net.state_dict()
    state = {key: value for key, value in read_state(Path(path)).items() if not key.startswith(CLASSIFIERS)}
    state |= {key: value for key, value in wanted.items() if key.endswith(COUNTER) and key not in state}
    if "pos_embed" in state and "pos_embed" in wanted:
        prefix = 0 if encoder.net.no_embed_class else encoder.net.num_prefix_tokens
        grid = list(encoder.net.patch_embed.grid_size)
        state["pos_embed"] = resample_abs_pos_embed(state["pos_embed"], grid, num_prefix_tokens=prefix)
    if faults := encoders.differences(wanted, state):
        raise UserError(f"{path}: these weights are not of weights.arch={config.arch}: {faults}")
    encoder.net.load_state_dict(state)
    return encoder.eval()
