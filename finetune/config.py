"""The configs of `probe` and `fuse`. Imports no torch, so that `--help` and `--print-config` are quick."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from configs import Settings

Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]


class ProbeConfig(Settings):
    """What `probe` needs. The shipped configs/probe_linear.yaml gives a reason beside each key."""

    features: str  # a features/ folder: the films' labels and splits
    store: str | None = None  # a store/ of packed films; `encoder: metadata` needs none
    encoder: str  # an encoder/ folder or a run's; `pixels`; `random:ARCH` or `random:FOLDER`
    out: str
    seed: int = 0
    method: Literal["linear", "logistic", "knn"] = "linear"
    labels: list[str] = []  # all findings if empty
    views: Literal["frontal", "all"] = "frontal"
    uncertain: Literal["ignore", "zeros", "ones"] = "ignore"  # -1 in training; evaluation always ignores it
    missing: Literal["zeros", "ignore"] = "zeros"  # empty in training; evaluation always takes it as 0
    pools: list[Literal["cls", "avg", "both"]] = Field(["cls", "avg", "both"], min_length=1)  # those the encoder has
    lrs: list[Positive] = Field([3e-4, 1e-3, 3e-3, 1e-2], min_length=1)
    weight_decays: list[NotNegative] = Field([0.0, 1e-2, 1e-1, 1.0], min_length=1)
    epochs: int = Field(100, ge=1)
    patience: int = Field(10, ge=1)  # epochs without a better validation AUROC of any head
    batch_size: int = Field(256, ge=1)
    pixels: int = Field(16, ge=2)  # side of the raw-pixel baseline
    strengths: list[Positive] = Field([1e-4, 1e-3, 1e-2, 1e-1, 1.0], min_length=1)  # of `method: logistic`, C
    neighbours: list[Annotated[int, Field(ge=1)]] = Field([5, 10, 20, 50], min_length=1)  # of `method: knn`
    samples: int = Field(1000, ge=0)  # resamples of the intervals
    allow_leak: bool = False  # go on with an encoder that saw a val or test subject; shown on top of the report
    cache: str | None = None  # where features of films are kept; `cache/` beside `out` if none

    @model_validator(mode="after")
    def _needs(self) -> ProbeConfig:
        if self.store is None:
            raise ValueError("`store` is missing: the packed films; write them with ./launch.sh images CONFIG")
        return self


class FuseConfig(Settings):
    """What `fuse` needs. The shipped configs/fuse_mortality.yaml gives a reason beside each key."""

    features: str  # a features/ folder: series, samples, films of stays
    store: str | None = None  # a store/ of packed films; a model of the record alone needs none
    encoder: str | None = (
        None  # an encoder/ folder or a run's; `random:ARCH` or `random:FOLDER`; none for the record alone
    )
    out: str
    seed: int = 0
    task: str = "mortality"  # a table of features/samples/
    model: str = "medfuse"  # a name of fusion.MODELS
    pairing: Literal["paired", "partial"] = "partial"  # train and choose on stays with a film, or on all
    freeze: bool = True  # film features computed once; false tunes the encoder too
    pool: Literal["cls", "avg", "both"] | None = None  # of the encoder; its own if none
    context: bool = True  # give the film's view and age beside its features
    standardise: bool = True  # film features by the mean and deviation of the train films
    hidden: int = Field(256, ge=1)  # width of the record's LSTM and of a projected film
    layers: int = Field(2, ge=1)
    joint: int = Field(512, ge=1)  # width of MedFuse's LSTM over the tokens
    dropout: float = Field(0.3, ge=0, lt=1)
    missing: Literal["zero", "learnable"] = "learnable"  # concat's token for an absent film
    part_weight: float = Field(0.5, ge=0)  # of the loss of each branch by itself
    max_hours: int | None = Field(None, ge=1)  # read the last so many hours before the prediction; all if none
    lr: float = Field(1e-3, gt=0)
    encoder_lr: float = Field(1e-5, gt=0)
    weight_decay: float = Field(0.01, ge=0)
    betas: tuple[float, float] = (0.9, 0.999)
    clip: float | None = Field(1.0, gt=0)  # largest norm of the gradient
    batch_size: int = Field(64, ge=1)
    epochs: int = Field(50, ge=1)
    patience: int = Field(10, ge=1)  # epochs without a better validation AUROC
    checkpoint_every: int = Field(5, ge=0)  # epochs; 0: only when stopped
    samples: int = Field(1000, ge=0)  # resamples of the intervals
    workers: int = Field(0, ge=0)  # processes that read films ahead when the encoder is tuned
    precision: Literal["no", "bf16", "fp16"] = "no"
    allow_leak: bool = False  # go on with an encoder that saw a val or test subject; shown on top of the report
    cache: str | None = None  # where features of films are kept; `cache/` beside `out` if none

    @model_validator(mode="after")
    def _agree(self) -> FuseConfig:
        film = not self.model.startswith("record_")
        if film and (self.store is None or self.encoder is None):
            missing = " and ".join(key for key in ("store", "encoder") if getattr(self, key) is None)
            raise ValueError(f"`{missing}` missing: model={self.model} looks at films; model=record_lstm needs neither")
        if not film and not self.freeze:
            raise ValueError(f"`freeze` false: model={self.model} has no film encoder to tune")
        return self
