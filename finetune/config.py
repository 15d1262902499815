"""The configs of `probe` and `fuse`. Imports no torch, so that `--help` and `--print-config` are quick."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from configs import Settings


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
    pools: list[Literal["cls", "mean", "both"]] = Field(["cls", "mean", "both"], min_length=1)
    lrs: list[float] = Field([3e-4, 1e-3, 3e-3, 1e-2], min_length=1)
    weight_decays: list[float] = Field([0.0, 1e-2, 1e-1, 1.0], min_length=1)
    epochs: int = Field(100, ge=1)
    patience: int = Field(10, ge=1)  # epochs without a better validation AUROC of any head
    batch_size: int = Field(256, ge=1)
    pixels: int = Field(16, ge=2)  # side of the raw-pixel baseline
    neighbours: list[int] = Field([5, 10, 20, 50], min_length=1)  # of `method: knn`, chosen on validation
    samples: int = Field(1000, ge=0)  # resamples of the intervals
    allow_leak: bool = False  # go on with an encoder that saw a val or test subject; shown on top of the report
    cache: str | None = None  # where features of films are kept; `cache/` beside `out` if none

    @model_validator(mode="after")
    def _needs(self) -> ProbeConfig:
        if self.store is None:
            raise ValueError("`store` is missing: the packed films; write them with ./launch.sh images CONFIG")
        return self
