"""What the self-supervised methods read from a config: their names, and a section for each. Imports no torch."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from configs import Settings

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
