"""The configs of `probe`, `fuse` and `grid`. Imports no torch, so that `--help` and `--print-config` are quick."""

from finetune.config.fuse import FuseConfig, GridConfig
from finetune.config.probe import ProbeConfig, ShiftConfig
from finetune.config.shared import WEIGHTS, TuneConfig, WeightsConfig, seed_list

__all__ = [
    "WEIGHTS",
    "FuseConfig",
    "GridConfig",
    "ProbeConfig",
    "ShiftConfig",
    "TuneConfig",
    "WeightsConfig",
    "seed_list",
]
