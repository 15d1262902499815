"""A stopped or killed run, or one whose disk was full, resumes as if it had not been interrupted."""

import json
import os
import signal
import subprocess
import sys

import pytest
import torch

from configs import UserError, load
from configs.signals import Stopped
from pretrain import run, train
from pretrain.config import PretrainConfig
from pretrain.run import load_checkpoint
from tests import forked
from tests.pretrain.small import SMALL, SMALL_RESNET, config, losses

pytestmark = pytest.mark.usefixtures("fresh_accelerator")


@pytest.mark.parametrize("network", [{}, SMALL_RESNET])
def test_stopped_and_gone_on_gives_the_losses_of_an_unbroken_run(data, tmp_path, monkeypatch, network):
    section = {"encoder": {**SMALL["encoder"], **network}, "mask": {"cell": 16}}
    whole = losses(train.train(config(data, tmp_path / "whole", **section)))
    calls = iter([False, False, True])
    with monkeypatch.context() as patch:
        patch.setattr(run.stopping, "agreed", lambda self, step: next(calls))
        with pytest.raises(Stopped, match="step 3"):
            train.train(config(data, tmp_path / "broken", **section))
    assert losses(train.train(config(data, tmp_path / "broken", **section))) == whole


def test_going_on_measures_rank_and_prototypes_over_the_same_films(data, tmp_path, monkeypatch):
    def seen(folder):
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        return [(line["train/effective_rank"], line["train/prototypes_used"]) for line in lines]

    whole = seen(train.train(config(data, tmp_path / "whole")))
    calls = iter([False, False, True])
    with monkeypatch.context() as patch:
        patch.setattr(run.stopping, "agreed", lambda self, step: next(calls))
        with pytest.raises(Stopped):
            train.train(config(data, tmp_path / "broken"))
    assert seen(train.train(config(data, tmp_path / "broken"))) == whole


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_sigterm_saves_and_exits_75(data, tmp_path, workers):
    """As SLURM sends it: to every process of the job, including those that read films."""
    config(data, tmp_path / "x", optim={**SMALL["optim"], "steps": 100000}, workers=workers)
    log = tmp_path / "log.txt"
    process = forked.Popen(["pretrain", "train", str(tmp_path / "x.yaml")], tmp_path, log)
    while not (tmp_path / "x/metrics.jsonl").exists():
        assert process.poll() is None, log.read_text()
    os.killpg(process.pid, signal.SIGTERM)
    code, said = process.wait(300), log.read_text()
    assert code == 75 and "go on with" in said and "Traceback" not in said
    assert run.load_checkpoint(tmp_path / "x")["step"] >= 1


@pytest.mark.slow
def test_two_processes_stop_together(data, tmp_path):
    config(data, tmp_path / "x", optim={**SMALL["optim"], "steps": 100000})
    launch = [sys.executable, "-m", "configs.launch", "--processes", "2", "--", "pretrain", "train"]
    process = subprocess.Popen(
        [*launch, str(tmp_path / "x.yaml"), "--processes", "2"],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    while not (tmp_path / "x/metrics.jsonl").exists():
        assert process.poll() is None, process.stdout.read()
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=400)[0]
    assert process.returncode == 75 and "go on with" in said and "Traceback" not in said
    assert "batch norm uses the films of its own process only" in said
    assert run.load_checkpoint(tmp_path / "x")["step"] >= 1


def test_a_checkpoint_of_another_model_is_refused_by_name(data, tmp_path, monkeypatch):
    """For example after EHR columns were added: the error names the widths."""
    train.train(config(data, tmp_path / "a", "ehr.groups=[sex]", "optim.steps=1"))
    with monkeypatch.context() as patch:
        patch.setattr(run, "load_checkpoint", lambda _: load_checkpoint(tmp_path / "a"))
        with pytest.raises(UserError, match=r"record\.before_head\.weight\.weight \(24, 3\) instead of \(24, 5\)"):
            train.train(config(data, tmp_path / "b", "ehr.groups=[sex,age]", "optim.steps=1"))


def test_another_config_or_other_input_is_refused_in_a_run_folder(data, tmp_path):
    train.train(config(data, tmp_path / "x", "optim.steps=1"))
    with pytest.raises(UserError, match="another config"):
        train.train(config(data, tmp_path / "x", "optim.steps=1", "ehr.groups=[sex]"))


def test_a_full_disk_while_saving_loses_nothing(data, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    calls = iter([False, False, True])
    with monkeypatch.context() as patch:
        patch.setattr(run.stopping, "agreed", lambda self, step: next(calls))
        with pytest.raises(Stopped):
            train.train(config(data, tmp_path / "x"))
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        with pytest.raises(UserError, match="could not be written"):
            train.train(config(data, tmp_path / "x"))
    assert run.load_checkpoint(tmp_path / "x")["step"] == 3
    assert losses(train.train(config(data, tmp_path / "x"))) == losses(train.train(config(data, tmp_path / "y")))


@pytest.mark.parametrize(("compiled", "error"), [("true", Stopped), ("false", RuntimeError)])
def test_sigterm_that_ends_the_compiler_too_is_a_stop(data, tmp_path, monkeypatch, compiled, error):
    def killed(*_):
        os.kill(os.getpid(), signal.SIGTERM)
        raise RuntimeError("g++ was terminated")

    monkeypatch.setattr(train, "backward", killed)
    with pytest.raises(error):
        train.train(config(data, tmp_path / "x", f"compile={compiled}"))


def test_a_stop_between_two_reports_changes_no_line(data, tmp_path, monkeypatch):
    whole = losses(train.train(config(data, tmp_path / "whole", "log_every=4")))
    calls = iter([False, True])
    with monkeypatch.context() as patch:
        patch.setattr(run.stopping, "agreed", lambda self, step: next(calls))
        with pytest.raises(Stopped, match="step 2"):
            train.train(config(data, tmp_path / "broken", "log_every=4"))
    assert losses(train.train(config(data, tmp_path / "broken", "log_every=4"))) == whole


def test_going_on_draws_the_same_drop_path(data, tmp_path, monkeypatch):
    network = {"encoder": {**SMALL["encoder"], "model_args": {**SMALL["encoder"]["model_args"], "drop_path_rate": 0.5}}}
    whole = losses(train.train(config(data, tmp_path / "whole", **network)))
    calls = iter([False, False, True])
    with monkeypatch.context() as patch:
        patch.setattr(run.stopping, "agreed", lambda self, step: next(calls))
        with pytest.raises(Stopped):
            train.train(config(data, tmp_path / "broken", **network))
    torch.rand(5)  # whatever else draws numbers
    assert losses(train.train(config(data, tmp_path / "broken", **network))) == whole


@pytest.mark.slow
def test_a_killed_run_with_workers_goes_on_at_once(data, tmp_path):
    """Workers outlive a killed process for some seconds; they do not hold its folder."""
    config(data, tmp_path / "x", optim={**SMALL["optim"], "steps": 100000}, workers=2)
    process = forked.Popen(["pretrain", "train", str(tmp_path / "x.yaml")], tmp_path, tmp_path / "log.txt")
    while not (tmp_path / "x/metrics.jsonl").exists():
        assert process.poll() is None
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    run.open_run(tmp_path / "x", load(PretrainConfig, tmp_path / "x.yaml"))
