"""Sections of the config of `pretrain`: views, masks, head, optimizer, and one of each method. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from configs import Settings
from configs.loader import Beta

# The methods: name -> file and class under pretrain/methods/; and the section of the config that is theirs alone.
METHODS = {
    "msn": "msn:MSN",
    "pmsn": "msn:MSN",
    "dino": "dino:DINO",
    "ibot": "ibot:IBOT",
    "mae": "mae:MAE",
    "simclr": "simclr:SimCLR",
    "vicreg": "vicreg:VICReg",
    "byol": "byol:BYOL",
    "lejepa": "lejepa:LeJEPA",
}
TITLES = {  # as a reader knows them
    "msn": "MSN", "pmsn": "PMSN", "dino": "DINO", "ibot": "iBOT", "mae": "MAE", "simclr": "SimCLR", "vicreg": "VICReg",
    "byol": "BYOL", "lejepa": "LeJEPA",
}  # fmt: skip
SECTIONS = {
    "msn": "loss",
    "pmsn": "loss",
    "dino": "dino",
    "ibot": "dino",
    "mae": "mae",
    "simclr": "simclr",
    "vicreg": "vicreg",
    "lejepa": "lejepa",
}


Part = Annotated[float, Field(ge=0, le=1)]
Shape = Annotated[float, Field(gt=0, le=100)]
Share = tuple[Part, Part]  # lowest and highest share of a film's area


class ViewsConfig(Settings):
    """How views are cut from films."""

    num_random: int = Field(
        default=1, ge=0, le=100, description="Masked anchor views of side encoder.image_size for each film."
    )
    num_focal: int = Field(default=10, ge=0, le=100, description="Small unmasked anchor views for each film.")
    focal_size: int = Field(default=96, ge=8, le=4096, description="Side of a focal view in pixels.")
    target_scale: Share = Field(
        default=(0.3, 1.0), description="Lowest and highest share of the film's area in the target view."
    )
    random_scale: Share = Field(
        default=(0.3, 1.0), description="Lowest and highest share of the film's area in a random view."
    )
    focal_scale: Share = Field(
        default=(0.05, 0.3), description="Lowest and highest share of the film's area in a focal view."
    )
    ratio: tuple[Shape, Shape] = Field(
        default=(3 / 4, 4 / 3),
        description="Lowest and highest width / height of a crop; [1, 1] keeps the heart's shape.",
    )
    flip: float = Field(
        default=0.0, ge=0, le=1, description="Probability of a left-right flip; 0, as the heart is on the left."
    )
    brightness: float = Field(default=0.2, ge=0, lt=1, description="Largest change of brightness, of pixels in [0, 1].")
    contrast: float = Field(default=0.2, ge=0, lt=1, description="Largest relative change of contrast.")
    gamma: float = Field(default=0.0, ge=0, lt=1, description="Largest relative change of gamma.")
    normalise: Literal["crop", "film", "dataset"] = Field(
        default="crop",
        description="Mean and deviation of each view (crop), of its film (film), or `mean` and `std` (dataset).",
    )
    mean: float = Field(default=0.5, ge=-1e3, le=1e3, description="Mean of pixels in [0, 1], with normalise: dataset.")
    std: float = Field(
        default=0.25, gt=0, le=1e3, description="Deviation of pixels in [0, 1], with normalise: dataset."
    )

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise ValueError(f"ratio must be 0 < low <= high, got {self.ratio[0]}, {self.ratio[1]}")
        for name in ("target_scale", "random_scale", "focal_scale"):
            low, high = getattr(self, name)
            if not 0 < low <= high <= 1:
                raise ValueError(f"{name} must be 0 < low <= high <= 1, got {low}, {high}")
        return self


class MaskConfig(Settings):
    """What anchors do not see."""

    ratio: float = Field(
        default=0.15, ge=0, lt=1, description="Share of patches (ViT) or cells (convolutional) removed."
    )
    focal: bool = Field(default=False, description="Mask focal views too, which the original MSN does not.")
    cell: int = Field(
        default=32, ge=4, le=4096, description="Side in pixels of a masked cell of a convolutional network."
    )
    shape: Literal["random", "block"] = Field(
        default="random", description="Which patches: any, or those nearest to a point drawn on the film."
    )
    fill: Literal["noise", "mean", "film"] = Field(
        default="noise",
        description="Content of a masked cell of a convolutional network: noise, the mean, or another film.",
    )


class HeadConfig(Settings):
    """The projection head: three linear layers."""

    hidden: int | None = Field(
        default=2048, ge=1, le=65536, description="Width of the hidden layers; null: four times the encoder's width."
    )
    out: int | None = Field(default=256, ge=1, le=65536, description="Width of the output; null: the encoder's width.")
    norm: Literal["batch", "layer", "none"] = Field(
        default="batch", description="Normalisation; layer and none serve exact accumulation and batches of 1."
    )


class OptimConfig(Settings):
    """The optimizer and its schedules."""

    optimizer: Literal["adamw", "lars"] = Field(
        default="adamw", description="adamw; lars (momentum 0.9) is what SimCLR, VICReg and BYOL were trained with."
    )

    batch_size: int = Field(default=1024, ge=1, le=10**6, description="Films in an optimizer step, over all processes.")
    epochs: float = Field(default=100, gt=0, le=1e6, description="Passes over the films.")
    steps: int | None = Field(
        default=None, ge=1, le=10**9, description="Optimizer steps in place of epochs; null: epochs count."
    )
    processor_seconds: float | None = Field(
        default=None,
        gt=0,
        le=1e10,
        description="Processor seconds of all processes (of GPUs: seconds of them all) in place of epochs and steps: "
        "the first steps are timed, and the number of steps is kept in the run's budget.json; null: epochs or steps "
        "count.",
    )
    lr: float = Field(
        default=1e-3, gt=0, le=1e3, description="Peak learning rate at lr_batch films a step; scaled with batch_size."
    )
    lr_batch: int | None = Field(
        default=1024, ge=1, le=10**6, description="Batch size that `lr` is meant for; null: lr is not scaled."
    )
    lr_start: float = Field(default=0.2, ge=0, le=1, description="Learning rate at step 0, as a share of the peak.")
    lr_end: float = Field(default=1e-3, ge=0, le=1, description="Learning rate at the end, as a share of the peak.")
    warmup_epochs: float = Field(default=2, ge=0, le=1e6, description="Epochs of linear warm-up.")
    warmup_steps: int | None = Field(
        default=None,
        ge=0,
        le=10**9,
        description="Steps of linear warm-up in place of warmup_epochs; null: warmup_epochs counts.",
    )
    weight_decay: float = Field(default=0.04, ge=0, le=1e3, description="Weight decay at the start.")
    weight_decay_end: float = Field(default=0.4, ge=0, le=1e3, description="Weight decay at the end of its cosine.")
    decay_all: bool = Field(default=False, description="Decay biases and norms too; prototypes never.")
    betas: tuple[Beta, Beta] = Field(default=(0.9, 0.999), description="Both betas of AdamW.")
    clip: float | None = Field(
        default=3.0, gt=0, le=1e6, description="Largest norm of all gradients but the prototypes'; null: no clipping."
    )
    ema: float = Field(default=0.996, ge=0, le=1, description="Momentum of the target at the start.")
    ema_end: float = Field(default=1.0, ge=0, le=1, description="Momentum of the target at the end.")
    ema_shape: Literal["linear", "cosine"] = Field(
        default="linear", description="Path of the target's momentum from start to end."
    )
    stretch: float = Field(
        default=1.25, ge=1, le=1e3, description="Schedules run as if the training were this many times as long."
    )
    by_epoch: bool = Field(default=False, description="Change the schedules once an epoch rather than every step.")
    accumulate: int = Field(
        default=1, ge=1, le=10**6, description="Parts in which a process computes its share of the batch."
    )
    accumulate_mode: Literal["exact", "approximate"] = Field(
        default="exact", description="exact: the loss of the whole batch; approximate: the loss of each part by itself."
    )

    @model_validator(mode="after")
    def _parts(self) -> Self:
        if self.batch_size % self.accumulate:
            raise ValueError(f"batch_size {self.batch_size} is not a multiple of accumulate {self.accumulate}")
        if self.processor_seconds is not None and self.steps is not None:
            raise ValueError("steps and processor_seconds both say how long to train; give one")
        return self


class LossConfig(Settings):
    """With method: msn or pmsn: the loss over prototypes (pretrain/loss.py)."""

    prototypes: int = Field(
        default=1024, ge=2, le=1_000_000, description="Number of learned prototypes; far more than clusters collapses."
    )
    temperature: float = Field(default=0.1, gt=0, le=1e6, description="Temperature of the anchors' distribution.")
    target_temperature: float = Field(
        default=0.25, gt=0, le=1, description="Exponent of the targets' sharpening; lower is sharper, 1 is none."
    )
    sinkhorn_iterations: int = Field(
        default=3, ge=0, le=1000, description="Sinkhorn iterations that balance the targets; 0: none."
    )
    me_max_weight: float = Field(default=1.0, ge=0, le=1e6, description="Weight of the mean-entropy term.")
    prior: Literal["uniform", "power_law"] = Field(
        default="uniform", description="Distribution over prototypes that the mean-entropy term asks for."
    )


class DinoConfig(Settings):
    """With method: dino or ibot. head.out is the number of classes."""

    bottleneck: int = Field(default=256, ge=1, le=65536, description="Width before the last layer of the head.")
    norm_last_layer: bool = Field(default=True, description="Keep the norms of the last layer's weights at 1.")
    freeze_epochs: float = Field(
        default=1.0, ge=0, le=1e6, description="Epochs in which the last layer stays as it is."
    )
    student_temperature: float = Field(default=0.1, gt=0, le=1e6, description="Temperature of the student.")
    teacher_temperature: float = Field(
        default=0.04, gt=0, le=1e6, description="Temperature of the teacher after its warm-up."
    )
    teacher_start: float = Field(default=0.04, gt=0, le=1e6, description="Temperature of the teacher at the start.")
    warmup_epochs: float = Field(default=0.0, ge=0, le=1e6, description="Epochs of the teacher's warm-up.")
    center_momentum: float = Field(default=0.9, ge=0, lt=1, description="Momentum of the teacher's mean, its centre.")
    patch_weight: float = Field(
        default=1.0, ge=0, le=1e6, description="With ibot: weight of the loss of masked patches."
    )


class MaeConfig(Settings):
    """With method: mae."""

    decoder_width: int = Field(default=512, ge=4, le=65536, description="Width of the decoder.")
    decoder_depth: int = Field(default=8, ge=1, le=256, description="Blocks of the decoder.")
    decoder_heads: int = Field(default=16, ge=1, le=1024, description="Attention heads of the decoder.")
    norm_pixels: bool = Field(default=True, description="Targets are patches of mean 0 and deviation 1.")

    @model_validator(mode="after")
    def _heads(self) -> Self:
        if self.decoder_width % self.decoder_heads or self.decoder_width % 4:
            raise ValueError(
                f"decoder_width {self.decoder_width} must be a multiple of decoder_heads {self.decoder_heads} and of 4"
            )
        return self


class SimclrConfig(Settings):
    """With method: simclr."""

    temperature: float = Field(default=0.1, gt=0, le=1e6, description="Temperature of the contrast between films.")


class VicregConfig(Settings):
    """With method: vicreg: weights of the three terms."""

    invariance: float = Field(default=25.0, ge=0, le=1e6, description="Weight of the distance between views.")
    variance: float = Field(default=25.0, ge=0, le=1e6, description="Weight of the hinge on each output's deviation.")
    covariance: float = Field(default=1.0, ge=0, le=1e6, description="Weight of the covariance between outputs.")


class LejepaConfig(Settings):
    """With method: lejepa."""

    weight: float = Field(default=0.05, ge=0, le=1, description="Weight of the Gaussian term; the rest is agreement.")
    directions: int = Field(
        default=1024, ge=1, le=1_000_000, description="Random directions it looks along, each step."
    )
