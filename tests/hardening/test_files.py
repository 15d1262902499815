"""Code in files, patient values in messages, and files with future timestamps."""

import json
import os
import pickle
import re
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from ehr_features import progress
from tests.hardening.rooms import (
    SHORT,
    Command,
    Room,
    commands,
    wait_for,
)


# ---- files that somebody may have sent ------------------------------------------------------------------------------
class Bomb:
    """A pickle that creates a file if a reader executes it."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return os.mkdir, (str(self.mark),)


def plant(path: Path, mark: Path) -> None:
    """Write a file with code in it, in the format of its suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix in (".pth", ".pt", ".bin"):
        torch.save({"state_dict": {"a": Bomb(mark)}}, path)
    elif path.suffix == ".npy":
        np.save(path, np.array([[Bomb(mark)], [0]], object), allow_pickle=True)
    elif path.suffix == ".parquet" and path.name == "extension.parquet":  # as pyarrow before 14.0.1 unpickled it
        about = {
            "ARROW:extension:name": "arrow.py_extension_type",
            "ARROW:extension:metadata": pickle.dumps(Bomb(mark)),
        }
        field = pa.field("a", pa.int64(), metadata=about)
        pq.write_table(pa.table([pa.array([0, 1])], schema=pa.schema([field])), path)
    elif path.suffix == ".yaml":
        path.write_text(f"out: !!python/object/apply:os.mkdir ['{mark}']\n")
    else:
        path.write_bytes(pickle.dumps(Bomb(mark)))


TAKES: dict[str, tuple[str, str]] = {  # what is planted -> the command that reads it; {} is its path
    "init.pth": ("pretrain", "encoder.init={}"),
    "init.pt": ("pretrain", "encoder.init={}"),
    "init.safetensors": ("pretrain", "encoder.init={}"),
    "run/checkpoints/step_000000009.pt": ("pretrain", ""),
    "weights.pth": ("probe", "encoder={} weights.arch=vit_tiny_patch16_224 weights.image_size=32"),
    "encoder/encoder.safetensors": ("probe", "encoder={parent}"),
    "stage/model.safetensors": ("fuse", "film_weights={parent}"),
    "features/series.safetensors": ("fuse", "features={parent}"),
    "labels.npy": ("score", "{} {}"),
    "labels.parquet": ("score", "{} {}"),
    "extension.parquet": ("score", "{} {}"),
    "labels.pkl": ("score", "{} {}"),
    "labels.csv": ("score", "{} {}"),
    "embeddings.parquet": ("nearest", "{} film"),
    "features.yaml": ("check", "{}"),
    "tiny/pytorch_model.bin": ("knowledge", ""),
    "run2/predictions/test.parquet": ("compare", "{run} --with {run}"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", TAKES)
def test_code_in_a_file_is_refused_and_not_run(room: Callable[..., Room], tmp_path: Path, name: str) -> None:
    reader, words = TAKES[name]
    here = room(tmp_path / "own", reader)
    path, mark = here.own / name, tmp_path / "it_ran"
    if name.startswith("encoder/"):
        shutil.copytree(here.world / "runs/pretrain/encoder", path.parent)
    elif name.startswith("run2/"):
        shutil.copytree(here.world / "runs/probe", here.own / "run2")
    elif name.startswith("tiny/"):
        (here.own / "tiny/model.safetensors").unlink()
    elif name.startswith("stage/"):
        shutil.copytree(here.world / "runs/fuse", path.parent)
    elif name.startswith("features/"):
        shutil.copytree(here.world / "features", path.parent)
    given = words.replace("{parent}", str(path.parent)).replace("{run}", f"{here.own}/run2").replace("{}", str(path))
    if reader in ("score", "nearest", "compare", "check"):
        module = "ehr_features" if reader == "check" else "finetune"
        command = Command([module, reader, *given.split()], here.own)
    else:
        command = here.command(reader)
        command.words.extend(given.split())
    if name.startswith("run/"):  # a run of the same config that has begun
        process, log = here.start(command)
        wait_for(lambda: command.working(log), process, log)
        os.killpg(process.pid, signal.SIGKILL)
        here.end(process, log)
        shutil.rmtree(path.parent)
    plant(path, mark)
    code, text = here.run(command)
    wanted = 0 if name == "extension.parquet" else 2  # read as the numbers that it also is
    assert code == wanted and "Traceback" not in text and not mark.exists(), text


# ---- what is printed and passed on ----------------------------------------------------------------------------------
MARK, ODD = "Qx7Marker", "7654321"  # no such word, and no such number, is anywhere else
NEVER = {"dicom_id", "split", "path", "itemid", "language"}


def with_markers(data: Path) -> int:
    """Plant a word in each raw text column, and unusual numbers in numeric columns."""
    planted = 0
    for path in data.glob("*/**/*.csv.gz"):
        table = pd.read_csv(path, dtype=str, keep_default_na=False)
        if len(table) < 10 or path.name.startswith("d_") or "chexpert" in path.name:
            continue
        for i, column in enumerate(c for c in table if not c.endswith("_id") and c not in NEVER):
            if table[column].str.match(r"\d{4}-").any():
                continue  # a damaged time is refused by some tables
            numbers = pd.to_numeric(table[column].replace("", "0"), errors="coerce").notna().all()
            table.loc[table.index[(3 * i + 1) % len(table)], column] = ODD if numbers else f"{MARK}{column}"
            planted += 1
        table.to_csv(path, index=False)
    return planted


@pytest.mark.slow
def test_no_value_of_a_patient_is_printed_or_passed_on(room: Callable[..., Room], tmp_path: Path) -> None:
    here = room(tmp_path / "own")
    data = here.own / "data"
    shutil.copytree(here.world / "data", data)
    assert with_markers(data) > 60
    known = commands(here.world, here.own)
    texts = []
    for name in ("check", "features", "notes", "images"):
        words = [w.replace(f"{here.world}/data", str(data)) for w in known[name].words]
        words = [w.replace(f"{here.world}/features", f"{here.own}/features") for w in words]
        code, text = here.run(Command([*words, *SHORT.get(name, [])], known[name].out))
        texts.append(text)
        assert code == 0, text
    inputs = [f"features={here.own}/features", f"store={here.own}/store", f"notes={here.own}/notes"]
    for name, run in (("pretrain", "runs/a"), ("probe", "runs/b"), ("fuse", "runs/c")):
        words = [w for w in known[name].words if not w.startswith(("features=", "store=", "encoder=", "out="))]
        more = ["allow_leak=true", "encoder=random:" + str(here.world / "runs/pretrain")] if name != "pretrain" else []
        command = Command([*words, *inputs[:2], *more, *SHORT[name], f"out={here.own}/{run}"], here.own / run)
        code, text = here.run(command)
        texts.append(text)
        assert code == 0, text
    for words in (
        ["ehr_features", "audit", "features", "runs/a", "notes"],
        ["finetune", "report", "runs/a", "runs/b", "runs/c", "--out", "report.html"],
        ["finetune", "runs", "runs"],
    ):
        absolute = [str(here.own / w) if (here.own / w).exists() or w.endswith(".html") else w for w in words]
        code, text = here.run(Command(absolute, here.own))
        texts.append(text)
        assert "Traceback" not in text and code in (0, 2), text
    found = [text for text in texts if MARK in text or ODD in text]
    assert not found, found
    for path in here.own.rglob("*"):
        if path.suffix in (".json", ".jsonl", ".html", ".txt", ".md", ".yaml"):
            lines = path.read_text(errors="replace").splitlines()
            assert not [line[:300] for line in lines if MARK in line or ODD in line], path


# ---- the clock ------------------------------------------------------------------------------------------------------
def put_ahead(folder: Path) -> None:
    """Set all timestamps ten years ahead, as if the clock had been set back."""
    ahead = time.time() + 10 * 365 * 86_400
    for path in [folder, *folder.rglob("*")]:
        os.utime(path, (ahead, ahead))


@pytest.mark.slow
def test_a_run_goes_on_where_its_files_are_of_the_future(room: Callable[..., Room], tmp_path: Path) -> None:
    here = room(tmp_path / "own")
    command = here.command("pretrain")

    def steps() -> list[int]:
        lines = (command.out / "metrics.jsonl").read_text().splitlines(keepends=True)
        return [json.loads(line)["step"] for line in lines if line.endswith("\n")]

    first, log = here.start(command)
    wait_for(lambda: command.working(log) and len(steps()) > 5, first, log)
    os.kill(first.pid, signal.SIGTERM)
    assert here.end(first, log)[0] == 75
    before = steps()
    put_ahead(command.out)
    second, log = here.start(command)
    wait_for(lambda: len(steps()) > len(before) + 5, second, log)
    os.kill(second.pid, signal.SIGTERM)
    assert here.end(second, log)[0] == 75
    assert steps() == list(range(1, steps()[-1] + 1)) and steps()[: len(before)] == before
    newest = max((command.out / "checkpoints").glob("step_*.pt"))
    assert int(newest.stem.removeprefix("step_")) == steps()[-1]


@pytest.mark.slow
def test_a_table_that_became_older_is_read_again(room: Callable[..., Room], tmp_path: Path) -> None:
    here = room(tmp_path / "own")
    shutil.copytree(here.world / "data", here.own / "data")
    command = here.command("features")
    command.words[:] = [word.replace(f"{here.world}/data", f"{here.own}/data") for word in command.words]
    put_ahead(here.own / "data")
    assert here.run(command)[0] == 0
    assert "up to date" in here.run(command)[1]
    table = next((here.own / "data").rglob("labevents.csv.gz"))
    os.utime(table, (1e9, 1e9))
    code, text = here.run(command)
    assert code == 0 and "up to date" not in text, text


def test_no_time_left_is_below_zero_when_the_clock_is_put_back(monkeypatch, capsys) -> None:
    clock = iter(range(10**6, 0, -1000))
    monkeypatch.setattr(time, "time", lambda: float(next(clock)))
    monkeypatch.setattr(progress, "QUIET_SECONDS", 0.0)
    with progress.Bar("packing", 100, "films") as bar:
        for _ in range(99):
            bar.advance()
    said = re.findall(r"([-\d.]+)/s, ([-\d]+) s left", capsys.readouterr().err)
    assert len(said) > 90 and all(float(rate) >= 0 and int(left) >= 0 for rate, left in said)
