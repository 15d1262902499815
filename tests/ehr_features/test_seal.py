"""seal.txt: a file that changed since its command wrote it is read with a warning, once."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from safetensors.numpy import load_file, save_file

from ehr_features import build, series
from ehr_features.files import read_table, write_json, write_seal
from ehr_features.typed import read_json, read_lines, read_yaml, seal, undamaged

Told = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def _forget() -> None:
    seal.forget()


def warnings(told: Told) -> list[str]:
    return [line for line in told.readouterr().err.splitlines() if "changed since it was written" in line]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_json(tmp_path / "a.json", {"seed": 1})
    (tmp_path / "a.yaml").write_text("seed: 1\n")
    (tmp_path / "a.jsonl").write_text('{"step": 1}\n')
    (tmp_path / "samples").mkdir()
    pd.DataFrame({"a": [1, 2]}).to_parquet(tmp_path / "samples/a.parquet")
    save_file({"a": np.arange(3)}, tmp_path / "a.safetensors")
    write_seal(tmp_path, "a.*", "samples/*.parquet")
    return tmp_path


def read_all(folder: Path) -> None:
    read_json(folder / "a.json")
    read_yaml(folder / "a.yaml")
    read_lines(folder / "a.jsonl")
    for name in ("samples/a.parquet", "a.safetensors"):
        with undamaged(folder / name, "again"):
            pass


def test_each_kind_of_file_is_compared_and_a_changed_one_is_named_once(folder: Path, capsys: Told) -> None:
    read_all(folder)
    assert warnings(capsys) == []
    write_json(folder / "a.json", {"seed": 2})
    (folder / "a.yaml").write_text("seed: 2\n")
    (folder / "a.jsonl").write_text('{"step": 2}\n')
    pd.DataFrame({"a": [2, 1]}).to_parquet(folder / "samples/a.parquet")
    save_file({"a": np.arange(3)[::-1].copy()}, folder / "a.safetensors")
    for _ in range(2):
        read_all(folder)
    told = warnings(capsys)
    assert len(told) == 5 and all(str(folder) in line and "seal.txt" in line for line in told), told
    assert read_json(folder / "a.json") == {"seed": 2}


def test_a_copy_and_a_touched_file_are_unchanged(folder: Path, capsys: Told) -> None:
    for path in folder.rglob("*.*"):
        path.write_bytes(path.read_bytes())
    read_all(folder)
    assert warnings(capsys) == []


def test_without_a_seal_or_a_line_in_it_or_with_a_damaged_one_files_are_read(folder: Path, capsys: Told) -> None:
    write_json(folder / "a.json", {"seed": 2})
    lines = (folder / seal.SEAL).read_text().splitlines()
    (folder / seal.SEAL).write_text("".join(f"{line}\n" for line in lines if "a.json" not in line.split("  ")))
    read_json(folder / "a.json")
    for damaged in (b"", b"\xff\xfe", b"x\n\n  \n"):
        (folder / seal.SEAL).write_bytes(damaged)
        read_all(folder)
    (folder / seal.SEAL).unlink()
    read_all(folder)
    assert warnings(capsys) == []


def test_other_files_of_a_sealed_folder_stay_as_they_were_listed(folder: Path, capsys: Told) -> None:
    write_json(folder / "a.json", {"seed": 2})
    write_json(folder / "b.json", {})
    write_seal(folder, "b.json")
    for name in "ab":
        read_json(folder / f"{name}.json")
    (told,) = warnings(capsys)
    assert "a.json" in told


def test_one_process_of_several_warns(folder: Path, capsys: Told, monkeypatch: pytest.MonkeyPatch) -> None:
    write_json(folder / "a.json", {"seed": 2})
    monkeypatch.setenv("RANK", "1")
    read_json(folder / "a.json")
    assert warnings(capsys) == []


def test_of_a_large_file_a_bounded_part_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seal, "BLOCK", 16)
    path, data = tmp_path / "large", bytearray(range(256)) * 64
    path.write_bytes(data)
    whole = seal.sealed_digest(path)
    for at, changed in ((0, True), (len(data) - 1, True), (20, False)):
        path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        assert (seal.sealed_digest(path) != whole) == changed
    path.write_bytes(data + b"x")
    assert seal.sealed_digest(path) != whole


def test_features_are_sealed_and_a_users_own_samples_are_not(frames, write, tmp_path, config, capsys) -> None:
    write(tmp_path / "mimic", frames)
    out = build.build(config(tasks=("mortality",)))
    own = out / "samples/own.parquet"
    read_table(out, "samples/mortality").to_parquet(own)
    build.build(config(tasks=("mortality", "decompensation")))
    pd.read_parquet(own).iloc[::-1].to_parquet(own)
    names = ("stays", "samples/mortality", "samples/decompensation", "samples/own")
    for name in names:
        read_table(out, name)
    series.load(out)
    assert warnings(capsys) == []
    for name in names[:3]:
        pd.read_parquet(out / f"{name}.parquet").iloc[::-1].to_parquet(out / f"{name}.parquet")
    tensors = load_file(out / "series.safetensors")
    save_file(tensors | {"values": tensors["values"] + 1}, out / "series.safetensors")
    for name in names:
        read_table(out, name)
    series.load(out)
    told = warnings(capsys)
    assert [Path(line.split(": ")[1]).stem for line in told] == ["stays", "mortality", "decompensation", "series"]
