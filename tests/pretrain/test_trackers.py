"""Trackers: what their own readers find, after one run and after a resumed one."""

import importlib.util
import json
import time
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest

from configs import UserError, load
from pretrain import run
from pretrain.config import PretrainConfig
from pretrain.run import check_trackers
from pretrain.run.trackers import NAMES, open_trackers

WHERE = {"features": "features", "store": "store"}
CONFIG = {"optim.lr": 0.1, "method": "msn"}


def needs(name: str) -> None:
    if name != "csv":
        pytest.importorskip(name, reason=f"needs the extra `trackers`: {name}")


def leveldb_log(data: bytes, before: int) -> Iterator[bytes]:
    """The records of a file in LevelDB's log format, as W&B writes offline runs; it starts after `before` bytes."""
    at, parts = 0, b""
    while at + 7 <= len(data):
        left = 32768 - (at + before) % 32768
        if left < 7:
            at += left
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield parts
            parts = b""


def read(name: str, folder) -> dict[str, dict[int, float]]:
    """Metric (with its part before it) -> step -> value, by the tracker's own reader; a step twice is an error."""
    out: dict[str, dict[int, float]] = {}

    def put(part: str, key: str, step: int, value: float) -> None:
        held = out.setdefault(f"{part}/{key}" if part not in ("", ".") else key, {})
        assert step not in held, f"{name}: {key} has step {step} twice"
        held[step] = value

    if name == "csv":
        for row in pd.read_csv(folder / "csv/metrics.csv", keep_default_na=False).to_dict("records"):
            put(row["part"], row["name"], row["step"], float(row["value"]))
    elif name == "tensorboard":
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        root = folder / "tensorboard/lungs/first"
        for place in sorted({path.parent for path in root.rglob("events.out.tfevents*")}):
            events = EventAccumulator(str(place)).Reload()
            for key in events.Tags()["scalars"]:
                for event in events.Scalars(key):
                    put(place.relative_to(root).as_posix(), key, event.step, event.value)
    elif name == "mlflow":
        from mlflow import MlflowClient

        client = MlflowClient((folder / "mlflow").resolve().as_uri())
        (found,) = client.search_runs([client.get_experiment_by_name("lungs").experiment_id])
        assert found.info.run_name == "first" and found.data.params["optim.lr"] == "0.1"
        for key in found.data.metrics:
            for entry in client.get_metric_history(found.info.run_id, key):
                put("", key, entry.step, entry.value)
    else:
        from wandb.proto.wandb_internal_pb2 import Record

        def records(path: Path) -> list[Record]:
            """All of a file: W&B's own process may write the last ones after `finish` has returned."""
            for _ in range(600):
                held = [Record.FromString(data) for data in leveldb_log(path.read_bytes()[7:], before=7)]
                if held and held[-1].WhichOneof("record_type") == "exit":
                    break
                time.sleep(0.1)
            return held

        for path in sorted(folder.rglob("*.wandb")):
            for record in records(path):
                if record.WhichOneof("record_type") == "run":
                    assert record.run.project == "lungs" and record.run.display_name == "first"
                items = {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in record.history.item}
                step = items.pop("step", None)
                for key, value in items.items():
                    if not key.startswith("_"):
                        put("", key, step, value)
    return out


@pytest.mark.parametrize("name", NAMES)
def test_a_resumed_run_has_each_step_once(name, tmp_path, monkeypatch):
    needs(name)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)

    def log() -> run.Log:
        return run.Log(tmp_path, None, open_trackers([name], tmp_path, "lungs", "first", CONFIG))

    first = log()
    first.cut(0)
    for step in (1, 2, 3):
        first.log({"train/loss": 1 / step, "train/nan": float("nan"), "note": "text"}, step)
    (tmp_path / "seed_1").mkdir()
    first.within(tmp_path / "seed_1").log({"train/loss": 7.0}, 1)
    first.close()
    if name == "wandb":
        time.sleep(1.1)  # its folders are named by the second
    second = log()
    second.cut(2)  # the checkpoint is of step 2: step 3 comes again
    for step in (3, 4):
        second.log({"train/loss": 1 / step}, step)
    second.track({"test/auroc/macro": 0.75}, 0, "results")
    second.close()
    found = read(name, tmp_path / "trackers")
    assert found.keys() == {"train/loss", "seed_1/train/loss", "results/test/auroc/macro"}
    assert found["train/loss"] == pytest.approx({1: 1, 2: 1 / 2, 3: 1 / 3, 4: 1 / 4})
    assert found["seed_1/train/loss"] == {1: 7.0} and found["results/test/auroc/macro"] == {0: 0.75}


def test_only_process_0_tracks(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    config = load(PretrainConfig, WHERE | {"out": str(tmp_path), "trackers": ["csv"]})
    log = run.open_log(tmp_path, config)
    log.log({"train/loss": 1.0}, 1)
    log.close()
    assert not log.trackers and not (tmp_path / "trackers").exists()


def test_the_names_come_from_the_config(tmp_path):
    given = WHERE | {"out": str(tmp_path / "x"), "trackers": ["csv"]}
    for more, expected in (({}, ("ehr-msn", "x")), ({"project": "lungs", "run_name": "first"}, ("lungs", "first"))):
        run.open_log(tmp_path / "x", load(PretrainConfig, given | more)).close()
        about = json.loads((tmp_path / "x/trackers/csv/run.json").read_text())
        assert (about["project"], about["run"]) == expected and about["config"]["method"] == "msn"


def test_an_unknown_tracker_is_named_with_the_known_ones():
    with pytest.raises(UserError, match=r"trackers.*'tensorboard', 'wandb', 'mlflow' or 'csv'"):
        load(PretrainConfig, WHERE | {"out": "x", "trackers": ["comet"]})


def test_a_tracker_that_is_not_installed_comes_with_the_line_that_installs_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None)
    with pytest.raises(UserError, match="pip install wandb mlflow-skinny"):
        check_trackers(["csv", "wandb", "mlflow"])
    check_trackers(["csv"])
