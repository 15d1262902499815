"""config.json of an encoder: timm's hub layout, which `timm.create_model("local-dir:FOLDER", pretrained=True)` reads.

Input: an Encoder. Output: the dictionary of config.json. Nothing of ours is needed to read it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from timm.models.eva import Eva
from torch import nn

if TYPE_CHECKING:
    from pretrain.encoder.model import Encoder

TIMM_POOLS = {"cls": "token"}  # timm's names where they differ from ours


def timm_config(encoder: Encoder) -> dict[str, Any]:
    """The architecture, its arguments (channels, film size, pool) and the preprocessing that timm's transforms can do.

    `normalise: crop` and `film` divide each film by its own deviation, which timm cannot: mean 0 and std 1 leave the
    pixels in [0, 1], and the model card has the missing line.
    """
    meta, way = encoder.meta, encoder.preprocess
    chans, size = meta["in_chans"], meta["image_size"]
    mean, std = way.per_channel()
    own = getattr(encoder.net, "default_cfg", {})
    return {
        "architecture": meta["arch"].partition(".")[0],
        "num_classes": 0,
        "num_features": encoder.width,
        "global_pool": TIMM_POOLS.get(meta["pool"], meta["pool"]),
        "model_args": {**meta["model_args"], "in_chans": chans, **_pooling(encoder)},
        "pretrained_cfg": {
            "tag": "ehr_msn",
            "custom_load": False,
            "input_size": [chans, size, size],
            "fixed_input_size": bool(own.get("fixed_input_size")) and not meta["model_args"].get("dynamic_img_size"),
            "interpolation": "bilinear",
            "crop_pct": 1.0,
            "crop_mode": "border",  # scale the longer side and pad: nothing is cropped
            "mean": mean,
            "std": std,
            "num_classes": 0,
            "first_conv": own.get("first_conv"),
            "classifier": own.get("classifier"),
        },
    }


def _pooling(encoder: Encoder) -> dict[str, Any]:
    """timm's arguments for a pool other than the architecture's own; the norm stays where the weights have it."""
    if encoder.meta["pool"] == encoder.pools[0]:
        return {}
    chosen: dict[str, Any] = {"global_pool": TIMM_POOLS.get(encoder.meta["pool"], encoder.meta["pool"])}
    after = getattr(encoder.net, "fc_norm", None)
    name = "use_fc_norm" if isinstance(encoder.net, Eva) else "fc_norm"
    return chosen if after is None else {**chosen, name: not isinstance(after, nn.Identity)}
