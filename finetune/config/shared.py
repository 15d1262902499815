"""What the configs of `probe` and `fuse` share."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from configs import Settings
from configs.loader import Seed

Positive = Annotated[float, Field(gt=0, le=1e6)]
NotNegative = Annotated[float, Field(ge=0, le=1e6)]


WEIGHTS = (".safetensors", ".ckpt", ".pth", ".pt", ".bin", ".tar")  # endings of bare weights files


Pool = Annotated[
    Literal["cls", "avg", "both", "stages"],
    Field(
        description="Pooling: class token, mean of patches (of the map), or both; stages: the means of the last four "
        "stages (blocks of a ViT) together."
    ),
]
AllowLeak = Annotated[
    bool, Field(description="Go on with an encoder that saw a val or test subject; the report shows it on top.")
]
Cache = Annotated[str | None, Field(description="Folder of films' features; null: cache/ beside `out`.")]
Samples = Annotated[int, Field(ge=0, le=100_000, description="Resamples of subjects for the 95% intervals; 0: none.")]
Mean = Annotated[float, Field(ge=-1e3, le=1e3)]
Deviation = Annotated[float, Field(gt=0, le=1e3)]


Seeds = Annotated[int, Field(ge=1, le=1000)] | Annotated[list[Seed], Field(min_length=1)]


def first_seed(data: Any) -> Any:
    """With a list of seeds, the first of them is `seed`. Raises: ValueError: a seed is listed twice."""
    seeds = data.get("seeds") if isinstance(data, dict) else None
    if not isinstance(seeds, list) or not seeds:
        return data
    if len(set(map(str, seeds))) < len(seeds):
        raise ValueError(f"`seeds` {seeds}: a seed is listed twice; its trainings would be the same")
    return data | {"seed": seeds[0]}


def named_weights(data: Any) -> Any:
    """`weights=hf-hub:ORG/NAME` and other text names the encoder itself."""
    if isinstance(data, dict) and isinstance(data.get("weights"), str):
        return {key: value for key, value in data.items() if key != "weights"} | {"encoder": data["weights"]}
    return data


def seed_list(seed: int, seeds: int | list[int], least: int = 1) -> list[int]:
    """The seeds of `seeds`: those listed; or `seed`, `seed` + 1, ..., of which there are at least `least`."""
    return seeds if isinstance(seeds, list) else list(range(seed, seed + max(seeds, least)))


class TuneConfig(Settings):
    """Training through the encoder: `method: finetune` and `attentive`."""

    lr: Positive = Field(
        default=1e-3,
        le=1e3,
        description="Learning rate of the head; with finetune, block i of n has lr x layer_decay ^ (n - i).",
    )
    layer_decay: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="Factor of the learning rate from a block to the one below; null: 0.75, and 1 for random weights.",
    )
    weight_decay: NotNegative = Field(default=0.05, description="Weight decay of AdamW.")
    warmup_epochs: NotNegative = Field(default=1, le=1e6, description="Epochs of linear warm-up.")
    epochs: int = Field(default=30, ge=1, le=10**6, description="Largest number of epochs.")
    patience: int = Field(
        default=5, ge=1, le=10**6, description="Epochs without a better validation AUROC before training stops."
    )
    batch_size: int = Field(default=64, ge=1, le=10**6, description="Films in an optimizer step, over all processes.")
    rotate: NotNegative = Field(default=10, le=360, description="Largest rotation in degrees; films are never flipped.")
    zoom: float = Field(default=0.1, ge=0, lt=1, description="Largest relative change of size.")
    shift: float = Field(default=0.05, ge=0, lt=1, description="Largest shift, as a share of the side.")
    contrast: float = Field(default=0.2, ge=0, lt=1, description="Largest relative change of contrast.")
    clip: Positive = Field(default=1.0, le=1e6, description="Largest norm of the gradient.")


class WeightsConfig(Settings):
    """What a bare weights file (`encoder: path.safetensors`) does not say; of published encoders, another size."""

    arch: str | None = Field(
        default=None, description="Name of the timm network of a bare file, e.g. vit_base_patch14_dinov2."
    )
    image_size: int | None = Field(
        default=None,
        ge=16,
        le=4096,
        description="Side of the films in pixels; null: the published encoder's own, else 224.",
    )
    in_chans: Literal[1, 3] = Field(
        default=3, description="Input channels of a bare file; gray films are repeated to 3."
    )
    model_args: dict[str, Any] = Field(default={}, description="Arguments passed to timm, for a bare file.")
    mean: Mean | Annotated[list[Mean], Field(min_length=1, max_length=3)] | None = Field(
        default=None,
        description="Mean of pixels in [0, 1], one number or one per channel; null: the published encoder's own, else "
        "ImageNet's.",
    )
    std: Deviation | Annotated[list[Deviation], Field(min_length=1, max_length=3)] | None = Field(
        default=None, description="Deviation of pixels in [0, 1], as `mean`."
    )

    @model_validator(mode="after")
    def _agree(self) -> WeightsConfig:
        for name in ("mean", "std"):
            values = getattr(self, name)
            if isinstance(values, list) and len(values) not in (1, self.in_chans):
                raise ValueError(
                    f"`{name}` has {len(values)} numbers; wanted one, or one per channel ({self.in_chans})"
                )
        return self
