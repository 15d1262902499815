"""The training loop: early stopping, best weights, resuming, checkpoints."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from configs import UserError
from configs.signals import Stopped
from finetune.fit import Scores, fit
from pretrain import run

NAN = float("nan")


def training(folder: Path, scores: list[Scores], *, stop_at: int = 0, log: Path | None = None, **options: Any) -> Any:
    """Each step adds 1 to the only weight, so that it is the number of steps; epoch i has scores[i].

    Returns: the result of `fit`, the weight at the end, the learning rate at the end, the steps taken by this call.
    """
    folder.mkdir(exist_ok=True)
    net = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.zeros_(net.weight)
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    per_epoch, taken = options.setdefault("per_epoch", 1), []

    def steps(first: int) -> Iterator[float]:
        for i in range(first, (first // per_epoch + 1) * per_epoch):
            taken.append(i)
            with torch.no_grad():
                net.weight += 1
            if i + 1 == stop_at:
                stops[-1].requested = True
            yield float(i)

    stops: list[run.stopping] = []

    class Kept(run.stopping):
        def __init__(self) -> None:
            super().__init__()
            stops.append(self)

    def validate() -> Scores:
        return scores[taken[-1] // per_epoch]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "stopping", Kept)
        options = {"epochs": len(scores), "patience": 99} | options
        result = fit(net, optimizer, steps, validate, run.Log(log or folder), folder, **options)
    return result, net.weight.item(), optimizer.param_groups[0]["lr"], taken


def lines(folder: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in found]


def test_it_stops_after_patience_and_ends_with_the_best_weights(tmp_path: Path) -> None:
    aurocs = [0.6, 0.8, 0.7, 0.7, 0.9]
    result, weight, _, taken = training(tmp_path, [Scores(a, 1.0) for a in aurocs], patience=2, per_epoch=3)
    assert result == (Scores(0.8, 1.0), 2, 12) and weight == 6 and len(taken) == 12
    assert lines(tmp_path)[1] == {"step": 6, "epoch": 2, "train/loss": 4.0, "val/loss": 1.0, "val/auroc/macro": 0.8}


@pytest.mark.parametrize(
    ("scores", "best"),
    [
        ([Scores(0.7, 0.5), Scores(0.7, 0.4), Scores(0.7, 0.4)], 2),  # equal AUROC: the lower loss
        ([Scores(0.7), Scores(0.7), Scores(0.6)], 1),  # without a loss: the first
        ([Scores(NAN, 0.5), Scores(NAN, 0.3), Scores(NAN, 0.4)], 2),  # no label has both classes: the lower loss
        ([Scores(NAN), Scores(NAN), Scores(NAN)], 1),
    ],
)
def test_equal_and_missing_aurocs(tmp_path: Path, scores: list[Scores], best: int) -> None:
    result, weight, _, _ = training(tmp_path, scores)
    assert result[1] == best and weight == best


def test_the_learning_rate_is_halved_on_a_plateau_of_the_loss(tmp_path: Path) -> None:
    losses = [3.0, 2.0, 2.0, 2.5, 2.0, 2.0, 1.0, 1.0]
    scores = [Scores(0.5 + i / 100, loss) for i, loss in enumerate(losses)]
    assert training(tmp_path / "a", scores, plateau=2)[2] == 0.25
    assert training(tmp_path / "b", scores)[2] == 1.0


@pytest.mark.parametrize("stop_at", [1, 4, 6, 9])  # in an epoch, and at an epoch's and the training's end
@pytest.mark.parametrize("per_epoch", [1, 3])
def test_a_stopped_training_goes_on_as_if_it_had_not_been(tmp_path: Path, per_epoch: int, stop_at: int) -> None:
    scores = [Scores(a, loss) for a, loss in ((0.6, 2.0), (0.5, 2.0), (0.7, 2.0))] * (3 // per_epoch)
    given: dict[str, Any] = {"per_epoch": per_epoch, "plateau": 1, "checkpoint_every": 0}
    whole = training(tmp_path / "whole", scores, **given)
    with pytest.raises(Stopped, match=f"stopped at step {stop_at}"):
        training(tmp_path / "broken", scores, stop_at=stop_at, **given)
    broken = training(tmp_path / "broken", scores, **given)
    assert broken[:2] == whole[:2] and broken[3] == list(range(stop_at, 9))
    assert lines(tmp_path / "broken") == lines(tmp_path / "whole")


def test_checkpoints_come_every_so_many_epochs(tmp_path: Path) -> None:
    for every, wanted in ((0, []), (2, [2, 4]), (1, [4, 5])):
        folder = tmp_path / str(every)
        training(folder, [Scores(0.5 + i / 10) for i in range(5)], checkpoint_every=every)
        assert sorted(int(p.stem.removeprefix("step_")) for p in folder.glob("checkpoints/*")) == wanted


def test_several_trainings_write_to_one_log(tmp_path: Path) -> None:
    for fold in "01":
        training(tmp_path / fold, [Scores(0.5), Scores(0.6)], log=tmp_path)
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 1, 2]


def test_checkpoints_of_another_release_are_refused(tmp_path: Path) -> None:
    state = {"net": {}, "optimizer": {}, "reached": 0.7, "best_epoch": 1, "done": False}  # probe's in 0.2.0
    run.save_checkpoint(tmp_path, state, 4)
    with pytest.raises(UserError, match=r"written by another release; remove .* to train again"):
        training(tmp_path, [Scores(0.5)])
