"""The training loop of `fuse`, and of the methods finetune and attentive of `probe`: epochs with early stopping.

Input: a net, functions that train a part of an epoch and score validation. Output: the net with the weights of its best
epoch. SIGTERM saves; called again with the same folder, the loop goes on from there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor, nn

from configs import UserError
from configs.signals import Stopped
from ehr_features.progress import Bar
from pretrain import run


class Scores(NamedTuple):
    """The validation scores of an epoch; a higher AUROC is better, at equal AUROC a lower loss."""

    auroc: float  # NaN if no label has both classes
    loss: float = math.nan  # NaN: the AUROC alone decides

    def better(self, other: Scores | None) -> bool:
        if other is None or np.isnan(self.auroc):
            return other is None or self.loss < other.loss
        return (self.auroc, -self.loss) > (other.auroc, -other.loss)


def weights_of(net: nn.Module) -> dict[str, Tensor]:
    """A copy on the CPU."""
    return {key: value.detach().cpu().clone() for key, value in net.state_dict().items()}


def fit(
    net: nn.Module,
    optimizer: Any,
    steps: Callable[[int], Iterable[float]],
    validate: Callable[[], Scores],
    log: run.Log,
    folder: Path,
    *,
    epochs: int,
    patience: int,
    per_epoch: int = 1,
    plateau: int | None = None,
    checkpoint_every: int = 1,
) -> tuple[Scores, int, int]:
    """Train until `patience` epochs in a row were no better than the best, whose weights `net` ends with.

    Args:
        steps: i -> the losses of the steps from step i to the end of its epoch; training can stop between two steps.
        folder: of the checkpoints; a `log` in another folder has the lines of several trainings.
        plateau: halve the learning rates after so many epochs without a lower validation loss.
        checkpoint_every: epochs between checkpoints; 0: only when stopped.
    Returns: the scores and number of the best epoch; the steps done.
    Raises: Stopped: on SIGTERM; UserError: checkpoints of another release.
    """
    at: dict[str, Any] = {"step": 0, "waited": 0, "flat": 0, "lowest": math.inf, "losses": []}
    at |= {"best": None, "kept": weights_of(net)}  # of the best epoch
    if (saved := run.load_checkpoint(folder)) is not None:
        if at.keys() - saved.keys() - {"losses"}:  # `fuse` of 0.2.0 stops between epochs: no losses
            raise UserError(f"{folder}/checkpoints: written by another release; remove {folder} to train again")
        net.load_state_dict(saved.pop("net"))
        optimizer.load_state_dict(saved.pop("optimizer"))
        at |= saved
    inside = log.trackers and log.folder != folder
    part = Path(folder).relative_to(log.folder).as_posix() if inside else log.part
    if log.folder == folder:
        log.cut(at["step"])
    elif inside:
        log.begin(at["step"], part)
    unit = "steps" if per_epoch > 1 else "epochs"
    with run.stopping() as stop, Bar(f"training {folder.name}", epochs * per_epoch, unit, shown=run.is_main()) as bar:
        bar.advance(at["step"])
        while at["step"] < epochs * per_epoch and at["waited"] < patience:
            for loss in steps(at["step"]):
                at["step"] += 1
                at["losses"].append(loss)
                bar.advance(1, f"loss {loss:.3f}")
                if at["step"] % per_epoch and stop.agreed(at["step"]):
                    break
            epoch, within = divmod(at["step"], per_epoch)
            if not within:
                now, mean = validate(), float(np.mean(at["losses"]))
                at |= {"waited": at["waited"] + 1, "flat": at["flat"] + 1, "losses": []}
                if now.better(at["best"] and Scores(*at["best"])):
                    at |= {"waited": 0, "best": list(now), "kept": weights_of(net)}
                if now.loss < at["lowest"]:
                    at |= {"flat": 0, "lowest": now.loss}
                if at["flat"] == plateau:
                    at["flat"] = 0
                    for group in optimizer.param_groups:
                        group["lr"] /= 2
                bar.advance(0, f"loss {mean:.3f} val AUROC {now.auroc:.3f}")
                values = {"epoch": epoch, "train/loss": mean, "val/loss": now.loss, "val/auroc/macro": now.auroc}
                log.log(values, at["step"], part)
            ended = bool(within) or stop.agreed(at["step"])
            if ended or (checkpoint_every and epoch % checkpoint_every == 0):
                nets = {"net": net.state_dict(), "optimizer": optimizer.state_dict()}
                run.save_checkpoint(folder, at | nets, at["step"])
            if ended:
                raise Stopped(run.go_on(log.folder, at["step"], stop.gone))
    net.load_state_dict(at["kept"])
    return Scores(*at["best"]), at["step"] // per_epoch - at["waited"], at["step"]
