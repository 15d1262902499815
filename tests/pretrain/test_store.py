"""The store holds every film once, whole, in order, whatever stops its packing; reading it copies nothing."""

import os
import pickle
import signal
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from PIL import Image

from configs import UserError
from configs.cli import guard
from configs.signals import Stopped
from ehr_features.typed import read_json
from pretrain.__main__ import _images
from pretrain.config import ImagesConfig
from pretrain.store import Store, pack
from pretrain.store import write as packing
from pretrain.store.decode import decode, fit
from pretrain.store.write import workers
from tests.pretrain.drawn import config, draw, whole


# ---- what is stored -------------------------------------------------------------------------------------------------
def test_good_films_are_stored_and_bad_ones_set_aside_with_their_reason(tmp_path: Path, films: Path) -> None:
    out = pack(config(tmp_path / "store", films))
    store = Store(out)
    assert list(store.index.columns) == ["dicom_id", "shard", "row", "height", "width"]
    assert sorted(store.index.dicom_id) == [f"film{n}" for n in range(10)] and len(store) == 10 and store.size == 32
    for path in films.rglob("film*"):
        assert path.stem in store
        assert (store[path.stem] == fit(decode(path, near=64), 32)).all()
    bad = pd.read_parquet(out / "rejected.parquet").set_index("dicom_id")
    reasons = {
        "empty": "empty file",
        "text": "not a JPEG, PNG or DICOM file",
        "half": "truncated",
        "black": "blank: every pixel is 0",
    }
    assert list(bad.columns) == ["path", "reason"] and bad.reason.to_dict() == reasons
    assert "half" not in store and not list(out.glob(".*partial*"))


def test_shards_are_arrow_files_that_any_tool_reads(tmp_path: Path, films: Path) -> None:
    out = pack(config(tmp_path / "store", films), shard_films=4)
    table = pa.concat_tables(pa.ipc.open_file(path).read_all() for path in sorted(out.glob("shard-*.arrow")))
    assert table.column_names == ["dicom_id", "height", "width", "encoding", "bytes"] and len(table) == 10
    row = table.slice(3, 1).to_pylist()[0]
    assert (row["height"], row["width"], row["encoding"], len(row["bytes"])) == (32, 32, "raw", 32 * 32)
    assert len(list(out.glob("shard-*"))) == 4  # 14 files, 4 a shard


def test_reading_keeps_the_order_and_a_raw_film_is_no_copy(tmp_path: Path, films: Path) -> None:
    store = Store(pack(config(tmp_path / "store", films), shard_films=4))
    ids = ["film7", "film0", "film7", "film3"]
    batch = store.read(ids)
    assert batch.shape == (4, 32, 32) and batch.dtype == np.uint8 and batch.flags.writeable
    for film, dicom_id in zip(batch, ids, strict=True):
        assert (film == store[dicom_id]).all()
    view = store["film7"]
    assert not view.flags.owndata and not view.flags.writeable and np.shares_memory(view, store["film7"])
    assert store.read([]).shape == (0, 32, 32)


def test_a_store_travels_to_other_processes(tmp_path: Path, films: Path) -> None:
    store = Store(pack(config(tmp_path / "store", films)))
    film = store["film1"].copy()
    sent = pickle.dumps(store)
    assert len(sent) < 20_000 and (pickle.loads(sent)["film1"] == film).all()
    pid = os.fork()
    if pid == 0:
        os._exit(0 if (store["film1"] == film).all() and len(store.read(["film2"])) else 1)
    assert os.waitpid(pid, 0)[1] == 0


def test_jpeg_shards_are_smaller_and_nearly_the_same(tmp_path: Path, films: Path) -> None:
    raw = Store(pack(config(tmp_path / "raw", films, size=256)))
    small = Store(pack(config(tmp_path / "jpeg", films, size=256, encoding="jpeg")))
    assert small["film1"].shape == (256, 256)
    assert np.abs(raw["film1"].astype(int) - small["film1"]).mean() < 3
    assert np.abs(raw.read(["film4", "film1"]).astype(int) - small.read(["film4", "film1"])).mean() < 3
    bytes_of = {s: sum(p.stat().st_size for p in s.folder.glob("shard-*")) for s in (raw, small)}
    assert bytes_of[small] < bytes_of[raw] / 3


def test_an_unknown_film_is_named(tmp_path: Path, films: Path) -> None:
    store = Store(pack(config(tmp_path / "store", films)))
    with pytest.raises(UserError, match="film half is not in this store"):
        store["half"]
    with pytest.raises(UserError, match=r"2 of 3 films are not in this store, e\.g\. half"):
        store.read(["film1", "half", "empty"])


# ---- stops and other machines ---------------------------------------------------------------------------------------
def test_a_stopped_packing_goes_on_and_ends_the_same(
    tmp_path: Path, films: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    want = Store(pack(config(tmp_path / "unbroken", films), shard_films=4)).hash
    out, write = tmp_path / "store", packing._write_shard

    def stop(path: Path, *rest: Any) -> None:
        if path.name == "shard-00002.arrow":
            raise Stopped
        write(path, *rest)

    monkeypatch.setattr(packing, "_write_shard", stop)
    with pytest.raises(Stopped):
        pack(config(out, films), shard_films=4)
    monkeypatch.setattr(packing, "_write_shard", write)
    with pytest.raises(UserError, match="run the same"):
        Store(out)
    first = {p.name: p.stat().st_mtime_ns for p in out.glob("shard-*")}
    assert sorted(first) == ["shard-00000.arrow", "shard-00001.arrow"]
    pack(config(out, films), shard_films=4)
    assert Store(out).hash == want and whole(out) == whole(tmp_path / "unbroken")
    assert all((out / name).stat().st_mtime_ns == at for name, at in first.items())
    capsys.readouterr()
    pack(config(out, films, workers=2), shard_films=4)
    assert "complete, nothing to do" in capsys.readouterr().out


def test_kill_at_any_moment_leaves_whole_shards_only(tmp_path: Path, films: Path) -> None:
    want = Store(pack(config(tmp_path / "unbroken", films), shard_films=2)).hash
    finished = 0
    for moment in range(10):
        out = tmp_path / f"store{moment}"
        pid = os.fork()
        if pid == 0:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            pack(config(out, films), shard_films=2)
            os._exit(0)
        time.sleep(0.004 * (moment + 1))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        if (out / "store.json").exists():
            finished += 1
        else:
            with pytest.raises(UserError, match=r"not a store|not all films are packed"):
                Store(out)
        pack(config(out, films), shard_films=2)
        assert Store(out).hash == want and not list(out.glob(".shard*partial*"))
    assert finished < 10


def test_two_machines_pack_one_store(tmp_path: Path, films: Path) -> None:
    out = tmp_path / "store"
    pack(config(out, films), (2, 2), shard_films=3)
    with pytest.raises(UserError, match="not all films are packed"):
        Store(out)
    pack(config(out, films), (1, 2), shard_films=3)
    assert whole(out) == whole(pack(config(tmp_path / "one", films), shard_films=3))
    with pytest.raises(UserError, match="--shard 3/2"):
        pack(config(out, films), (3, 2), shard_films=3)


def test_a_part_points_to_the_other_parts(tmp_path: Path, films: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for part, says in (("2/2", "next: the parts of --shard i/2"), ("1/2", "next: ./launch.sh pretrain")):
        _images(config(tmp_path / "store", films), Namespace(shard=part))
        assert says in capsys.readouterr().out


def test_two_workers_store_the_same_as_one(tmp_path: Path, films: Path) -> None:
    one, two = (Store(pack(config(tmp_path / str(n), films, workers=n))) for n in (1, 2))
    assert one.hash == two.hash and one.index.equals(two.index)


def test_a_film_that_kills_its_decoder_costs_only_itself() -> None:
    jobs = [f"('{n}', b'', '')" for n in range(90)]
    jobs[40] = jobs[70] = "__import__('os')._exit(3)"
    with workers(2, eval) as work:
        rows = list(work(jobs))
    assert [row[0] for row in rows] == ["_" if n in (40, 70) else str(n) for n in range(90)]
    assert [row[2] for row in rows if row[1] is None] == ["_\nthe decoder crashed"] * 2


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_a_signal_ends_command_and_workers_and_it_goes_on(tmp_path: Path, number: signal.Signals, code: int) -> None:
    draw(tmp_path / "film.png", 0, 2000, 1600)
    pd.DataFrame({"path": "film.png", "dicom_id": [f"film{n}" for n in range(80)]}).to_csv(tmp_path / "films.csv")
    (tmp_path / "images.yaml").write_text("films: films.csv\nout: store\nsize: 1024\nworkers: 2\n")
    command = [sys.executable, "-m", "pretrain", "images", "images.yaml"]
    pipe = subprocess.PIPE
    child = subprocess.Popen(command, cwd=tmp_path, stdout=pipe, stderr=pipe, text=True, start_new_session=True)
    for _ in range(400):
        if (tmp_path / "store/packing.json").exists():
            break
        time.sleep(0.05)
    time.sleep(1.0)
    (os.killpg if number == signal.SIGINT else os.kill)(child.pid, number)
    _, err = child.communicate(timeout=180)  # returns once no worker holds the pipe any more
    assert child.returncode == code and "Traceback" not in err, err
    assert not (tmp_path / "store/store.json").exists()
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and len(Store(tmp_path / "store")) == 80, done.stderr


# ---- what is refused ------------------------------------------------------------------------------------------------
def test_another_config_in_the_same_folder_is_refused_by_key(tmp_path: Path, films: Path) -> None:
    pack(config(tmp_path / "store", films))
    with pytest.raises(UserError, match="size: 32 there, 64 now"):
        pack(config(tmp_path / "store", films, size=64))
    (films / "s0/film0.jpg").unlink()
    with pytest.raises(UserError, match="num_films: 14 there, 13 now"):
        pack(config(tmp_path / "store", films))
    with pytest.raises(UserError, match="not a store; it holds"):
        pack(config(films, films))


def test_a_store_that_was_not_copied_whole_is_refused(tmp_path: Path, films: Path) -> None:
    out = pack(config(tmp_path / "store", films), shard_films=4)
    shard = out / "shard-00001.arrow"
    data = shard.read_bytes()
    shard.write_bytes(data[:-100])
    held, whole = f"{len(data) - 100:,}", f"{len(data):,}"
    with pytest.raises(UserError, match=rf"shard-00001\.arrow: {held} bytes, store\.json says {whole} bytes"):
        Store(out)
    shard.write_bytes(bytes(len(data)))
    store = Store(out)  # of the right size: seen when it is read
    with pytest.raises(UserError, match=r"shard-00001\.arrow: damaged"):
        store.read(list(store.index.dicom_id))
    start, stop, _ = read_json(out / "store.json")["frames"][shard.name]
    assert stop - start == 32 * 32 * 4 and len(data) - stop + start < 3000  # little is read to be sure
    for at in [*range(8, start, 97), *range(stop, len(data), 97)]:  # read by Arrow, some of these end the process
        shard.write_bytes(data[:at] + bytes([data[at] ^ 0xFF]) + data[at + 1 :])
        with pytest.raises(UserError, match=r"shard-00001\.arrow: damaged \(outside its films, by store\.json\)"):
            Store(out).read(list(store.index.dicom_id))
    shard.unlink()
    with pytest.raises(UserError, match=r"shard-00001\.arrow: absent"):
        Store(out)
    about = out / "store.json"
    about.write_text(about.read_text().replace('"format": 1', '"format": 7', 1))
    with pytest.raises(UserError, match=r"store\.json: store format 7, this version reads 1"):
        Store(out)
    about.write_text(about.read_text().replace('"format": 7', '"format": 1', 1).replace('"shards"', '"shakds"'))
    with pytest.raises(UserError, match=r"store\.json: `shards` is missing"):
        Store(out)
    with pytest.raises(UserError, match="not a store; write one with"):
        Store(films)


def test_a_disk_that_is_too_small_is_seen_before(tmp_path: Path, films: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = packing.shutil._ntuple_diskusage(1, 1, 1)
    monkeypatch.setattr(packing.shutil, "disk_usage", lambda _: free)
    with pytest.raises(UserError, match=r"about \d+ [KM]B are needed and .* are free; encoding=jpeg"):
        pack(config(tmp_path / "store", films))


def test_a_disk_that_fills_up_ends_with_a_message_and_whole_shards(
    tmp_path: Path, films: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("may not mount a small tmpfs here")
    monkeypatch.setattr(packing, "_check_disk", lambda *_: None)  # another program takes the space meanwhile
    pid = os.fork()
    if pid == 0:  # in a child, so that no lock keeps the disk busy
        code = guard(lambda: (pack(config(disk / "store", films, size=256), shard_films=4), 0)[1])
        left = sorted(p.name for p in (disk / "store").iterdir() if not p.name.startswith(".lock"))
        os._exit(code if left == ["packing.json", "shard-00000.arrow", "shard-00001.arrow"] else 1)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    subprocess.run(["umount", str(disk)], check=True)
    assert code == 2 and "the disk is full: free some space" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({}, "wanted one of `mimic_cxr`"),
        ({"films": "a", "mimic_cxr": "b"}, "wanted one of `mimic_cxr`"),
        ({"films": "a", "per_subject_cap": 3}, "goes with `mimic_cxr`"),
    ],
)
def test_config_asks_for_one_source(more: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        ImagesConfig(out="store", **more)


@pytest.mark.real
def test_the_real_films_are_packed(tmp_path: Path, shared: Path) -> None:
    root = shared / "data/mimic-cxr-linked"
    store = Store(pack(config(tmp_path / "store", mimic=root, size=64)))
    assert len(store) == 538
    dicom_id = store.index.dicom_id[100]
    path = next(root.glob(f"files/*/*/*/{dicom_id}.jpg"))
    grey = np.asarray(Image.open(path).convert("L")).astype(float)
    assert np.abs(store[dicom_id] - grey.reshape(64, 4, 64, 4).mean((1, 3))).mean() < 1


def test_an_index_whose_whole_numbers_are_floats_is_read(tmp_path: Path, films: Path) -> None:
    out = pack(config(tmp_path / "store", films))
    index = pd.read_parquet(out / "index.parquet")
    wanted = Store(out).read(index["dicom_id"].tolist())
    numbers = {name: float for name in ("shard", "row", "height", "width")}
    index.astype(numbers).to_parquet(out / "index.parquet")
    np.testing.assert_array_equal(Store(out).read(index["dicom_id"].tolist()), wanted)


def test_an_index_with_fewer_films_than_its_store_is_refused(tmp_path: Path, films: Path) -> None:
    out = pack(config(tmp_path / "store", films))
    pd.read_parquet(out / "index.parquet").iloc[:-1].to_parquet(out / "index.parquet")
    with pytest.raises(UserError, match=r"index\.parquet: \d+ films, store\.json says"):
        Store(out)
