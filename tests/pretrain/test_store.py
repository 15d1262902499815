"""The store holds every film once, complete and in order, after any interruption of packing; reads copy nothing."""

import gzip
import os
import pickle
import signal
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from configs import UserError
from configs.cli import guard
from configs.signals import Stopped
from ehr_features.files import read_json
from pretrain.__main__ import _images
from pretrain.config import FilmsConfig, ImagesConfig
from pretrain.data import select_films
from pretrain.store import Store, pack
from pretrain.store import write as packing
from pretrain.store.decode import decode, fit
from pretrain.store.listing import films_of, list_films
from pretrain.store.write import workers


def draw(path: Path, seed: int, height: int = 40, width: int = 32) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 256, (height // 4, width // 4), dtype=np.uint8)
    Image.fromarray(noise).resize((width, height)).save(path, quality=95)


def config(out: Path, films: Path | None = None, mimic: Path | None = None, **more: Any) -> ImagesConfig:
    where = {"films": str(films)} if films else {"mimic_cxr": str(mimic)}
    return ImagesConfig(**{"out": str(out), "size": 32, "workers": 1, **where, **more})


@pytest.fixture
def films(tmp_path: Path) -> Path:
    """A folder of ten good films in two sizes and formats, and four that are not."""
    folder = tmp_path / "films"
    for number in range(10):
        draw(folder / f"s{number % 3}/film{number}.{'png' if number % 2 else 'jpg'}", number, 40 + 8 * (number % 3))
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "text.jpg").write_text("not a film")
    (folder / "half.jpg").write_bytes((folder / "s0/film0.jpg").read_bytes()[:500])
    Image.new("L", (40, 40)).save(folder / "black.png")
    (folder / "readme.txt").write_text("no film, and not named as one")
    return folder


def whole(folder: Path) -> dict[str, bytes]:
    store = Store(folder)
    return {i: store[i].tobytes() for i in store.index.dicom_id}


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


# ---- which films ----------------------------------------------------------------------------------------------------
VIEWS = [("AP", ""), ("PA", ""), ("LATERAL", ""), ("", "postero-anterior"), ("", "lateral"), ("", ""), ("LL", "")]


@pytest.fixture
def mimic(tmp_path: Path) -> Path:
    """Three subjects with a film of each entry of VIEWS."""
    root, rows = tmp_path / "mimic", []
    for subject in (10000001, 10000002, 19000003):
        for number, (view, code) in enumerate(VIEWS):
            dicom_id, study = f"{subject}-{number}", 50000000 + number
            rows.append((dicom_id, subject, study, view, code))
            draw(root / f"files/p{str(subject)[:2]}/p{subject}/s{study}/{dicom_id}.jpg", number)
    columns = ["dicom_id", "subject_id", "study_id", "ViewPosition", "ViewCodeSequence_CodeMeaning"]
    table = pd.DataFrame(rows, columns=columns).assign(Rows=40)
    table.to_csv(root / "mimic-cxr-2.0.0-metadata.csv.gz", index=False)
    return root


def test_frontal_films_are_known_by_their_view_or_its_code(
    tmp_path: Path, mimic: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = Store(pack(config(tmp_path / "store", mimic=mimic)))
    assert sorted(store.index.dicom_id.str[-1].unique()) == ["0", "1", "3"] and len(store) == 9
    says = capsys.readouterr().out
    assert "3 packed AP" in says and "6 packed PA" in says and "6 left out LATERAL (views: frontal)" in says
    assert "3 left out unknown view" in says
    assert len(Store(pack(config(tmp_path / "all", mimic=mimic, views="all")))) == 21


@pytest.mark.parametrize("name", ["mimic-cxr-2.0.0-metadata.parquet", "mimic-cxr-2.1.0-metadata.csv"])
def test_the_metadata_may_be_of_any_release_and_file_that_features_reads(
    tmp_path: Path, mimic: Path, name: str
) -> None:
    table = pd.read_csv(mimic / "mimic-cxr-2.0.0-metadata.csv.gz", dtype=str)
    table["ViewPosition"] = table["ViewPosition"].str.lower()
    (mimic / "mimic-cxr-2.0.0-metadata.csv.gz").unlink()
    table.to_parquet(mimic / name) if name.endswith("parquet") else table.to_csv(mimic / name)
    assert len(Store(pack(config(tmp_path / "store", mimic=mimic)))) == 9


@pytest.mark.parametrize("case", [str.lower, str.title, "  {} ".format], ids=["lower", "title", "spaces"])
@pytest.mark.parametrize("beside", [False, True])
def test_views_in_any_case_and_films_beside_the_table_or_under_files(
    tmp_path: Path, mimic: Path, case: Callable[[str], str], beside: bool
) -> None:
    path = mimic / "mimic-cxr-2.0.0-metadata.csv.gz"
    table = pd.read_csv(path, dtype=str).fillna("")
    for column in ("ViewPosition", "ViewCodeSequence_CodeMeaning"):
        table[column] = table[column].map(case)
    table.to_csv(path, index=False)
    if beside:
        for folder in (mimic / "files").iterdir():
            folder.rename(mimic / folder.name)
    store = Store(pack(config(tmp_path / "store", mimic=mimic)))
    assert sorted(store.index.dicom_id.str[-1].unique()) == ["0", "1", "3"] and len(store) == 9


@pytest.mark.parametrize(
    ("listed", "name"),
    [
        ("a.csv", "films/s0/film0.jpg"),
        ("lists/a.txt", "films/s0/film0.jpg"),  # from the working folder
        ("a.parquet", "theirs/films/s0/film0.jpg"),
        ("films/a.parquet", "film0.jpg"),
        ("films/a.csv", "/elsewhere/s0/film0.png"),
    ],
)
def test_a_list_finds_its_films_beside_it_below_the_working_folder_or_by_name(
    tmp_path: Path, films: Path, monkeypatch: pytest.MonkeyPatch, listed: str, name: str
) -> None:
    path, table = tmp_path / listed, pd.DataFrame({"path": [name]})
    path.parent.mkdir(exist_ok=True)
    monkeypatch.chdir(tmp_path)
    if path.suffix == ".parquet":
        table.to_parquet(path)
    else:
        table.to_csv(path, index=False, header=path.suffix == ".csv")
    assert set(whole(pack(config(tmp_path / "store", path)))) == {"film0"}


@pytest.mark.parametrize("form", ["{}.0", " {} ", "{}"])
def test_ids_of_the_metadata_in_any_form_and_rows_without_one(tmp_path: Path, mimic: Path, form: str) -> None:
    path = mimic / "mimic-cxr-2.0.0-metadata.csv.gz"
    table = pd.read_csv(path, dtype=str)
    wanted, counts = list_films(config(tmp_path / "store", mimic=mimic))
    for name in ("subject_id", "study_id"):
        table[name] = table[name].map(form.format)
    junk = pd.DataFrame([[None] * len(table.columns), list(table.columns)], columns=table.columns)
    pd.concat([table[:3], junk, table[3:]]).to_csv(path, index=False)
    found, told = list_films(config(tmp_path / "store", mimic=mimic))
    pd.testing.assert_frame_equal(found, wanted)
    assert told == counts | {"left out (row without dicom_id, subject_id or study_id)": 2}


def test_the_cap_draws_films_of_each_subject_by_seed(tmp_path: Path, mimic: Path) -> None:
    drawn = [
        set(Store(pack(config(tmp_path / str(n), mimic=mimic, per_subject_cap=2, seed=seed))).index.dicom_id)
        for n, seed in enumerate([0, 0, 1])
    ]
    assert drawn[0] == drawn[1] != drawn[2]
    assert pd.Series([i[:8] for i in drawn[0]]).value_counts().tolist() == [2, 2, 2]


def test_a_cap_keeps_the_same_films_in_the_store_and_in_pretraining(tmp_path: Path, mimic: Path) -> None:
    """With the same seed and cap, no film of the store is left out in pretraining."""
    store = Store(pack(config(tmp_path / "store", mimic=mimic, per_subject_cap=2, seed=5)))
    ids = Store(pack(config(tmp_path / "all", mimic=mimic))).index.dicom_id.tolist()
    table = pd.DataFrame({"dicom_id": ids, "study_id": 1, "subject_id": [i[:8] for i in ids], "split": "train"})
    (tmp_path / "features").mkdir()
    (tmp_path / "features/provenance.json").write_text("{}")
    table.assign(view="AP", taken_at=pd.Timestamp("2150-01-01")).to_parquet(tmp_path / "features/images.parquet")
    films = FilmsConfig(per_subject_cap=2)
    chosen = select_films(tmp_path / "features", Store(tmp_path / "all"), films, [], "default", 5)
    assert sorted(chosen.table["dicom_id"]) == sorted(store.index.dicom_id)


def test_mimic_films_that_are_dicom_or_absent(tmp_path: Path, mimic: Path) -> None:
    folder = mimic / "files/p19/p19000003"
    (folder / "s50000001/19000003-1.jpg").unlink()
    draw(folder / "s50000000/19000003-0.png", 5)
    (folder / "s50000000/19000003-0.jpg").unlink()
    out = pack(config(tmp_path / "store", mimic=mimic))
    assert "19000003-0" in Store(out)  # found under its other suffix
    assert pd.read_parquet(out / "rejected.parquet")[["dicom_id", "reason"]].values.tolist() == [
        ["19000003-1", "absent"]
    ]


def test_lists_of_films(tmp_path: Path, films: Path) -> None:
    (tmp_path / "list.txt").write_text("films/s0/film0.jpg\n\nfilms/s1/film1.png\n")
    assert set(whole(pack(config(tmp_path / "a", tmp_path / "list.txt")))) == {"film0", "film1"}
    pd.DataFrame({"path": ["films/s0/film0.jpg"], "dicom_id": ["mine"]}).to_csv(tmp_path / "list.csv", index=False)
    assert set(whole(pack(config(tmp_path / "b", tmp_path / "list.csv")))) == {"mine"}


@pytest.mark.parametrize("columns", [["path", "dicom_id"], ["dicom_id", "path", "site"], ["path"]])
def test_rows_of_a_list_without_an_id_and_repeated_headers_are_counted(tmp_path: Path, columns: list[str]) -> None:
    rows = pd.DataFrame({"path": ["00000001", "", "path", "2/00000001.png"], "dicom_id": ["07", "x", "dicom_id", "7"]})
    rows.assign(site=["", "", "site", "3"])[columns].to_csv(tmp_path / "list.csv", index=False)
    films, others = films_of(str(tmp_path / "list.csv"))
    assert films.path.tolist() == [f"{tmp_path}/{name}" for name in ("00000001", "2/00000001.png")]
    assert films.dicom_id.tolist() == (["07", "7"] if "dicom_id" in columns else ["00000001"] * 2)
    named = " or ".join(c for c in columns if c != "site")
    assert others == {f"left out (row without {named})": 2}


UID = "1.2.840.113619.2.55.3"


@pytest.mark.parametrize("protocol", ["", "memory://"])
def test_films_are_found_by_content_and_others_counted_by_kind(tmp_path: Path, films: Path, protocol: str) -> None:
    folder = tmp_path / "in"
    content = {"jpg": (films / "s0/film0.jpg").read_bytes(), "png": (films / "s1/film1.png").read_bytes()}
    named = {f"{UID}.0": "jpg", f"{UID}.1": "png", f"{UID}.2.JPG": "jpg", "00000001": "png", "a.b.png": "png"}
    named |= {"scan.img": "jpg", "deep/x.7": "png"}
    for name, kind in named.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content[kind])
    for name in ("list.txt", "more.TXT", "README", ".DS_Store", "._a.b.png", "DICOMDIR", f"{UID}.9", "page.html"):
        (folder / name).write_bytes(b"\0" * 128 + b"DICM" if name == "DICOMDIR" else b"no film")
    place = str(folder)
    if protocol:
        place = protocol + "uids"
        fsspec.filesystem("memory").put(str(folder), "/uids", recursive=True)
    found, others = films_of(place)
    ids = [f"{UID}.0", f"{UID}.1", f"{UID}.2", "00000001", "a.b", "scan.img", "x.7"]
    assert sorted(found.dicom_id) == sorted(ids)
    kinds = {".txt": 2, "file without a suffix": 2, "hidden file": 2, "DICOMDIR": 1, ".html": 1}
    assert others == {f"left out {kind} (no film)": n for kind, n in kinds.items()}
    store = pack(ImagesConfig.model_validate({"out": str(tmp_path / "s"), "size": 32, "workers": 1, "films": place}))
    assert sorted(Store(store).index.dicom_id) == sorted(ids)
    assert read_json(store / "store.json")["counts"] == {"packed": 7} | others
    if protocol:
        fsspec.filesystem("memory").rm("/uids", recursive=True)


def test_a_uid_without_its_file_is_not_taken_for_another(tmp_path: Path) -> None:
    draw(tmp_path / f"{UID}.jpg", 0)
    draw(tmp_path / f"{UID}.8.png", 1)
    (tmp_path / "list.txt").write_text(f"{UID}.7\n{UID}.8\n")
    out = pack(config(tmp_path / "store", tmp_path / "list.txt"))
    assert list(Store(out).index.dicom_id) == [f"{UID}.8"]
    assert pd.read_parquet(out / "rejected.parquet")[["dicom_id", "reason"]].values.tolist() == [[f"{UID}.7", "absent"]]


def test_two_films_of_one_id_are_refused_with_both_paths(tmp_path: Path, films: Path) -> None:
    draw(films / "other/film3.jpg", 1)
    with pytest.raises(UserError, match=r"film3: \S*other/film3\.jpg and \S*s0/film3\.png"):
        pack(config(tmp_path / "store", films))
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("absent", None, "no such folder or file"),
        ("a.csv", "file\nx.jpg\n", "no column `path`; found file"),
        ("a.csv", "", "cannot be read as a table"),
        (
            "a.csv",
            "path,dicom_id\nx.jpg,\n",
            r"no film to pack \(0 packed, 1 left out \(row without path or dicom_id\)\)",
        ),
        ("a.txt", "", "no film to pack"),
        ("a.txt", "x.jpg\ny.jpg\n", "none of 2 films could be read: 2 absent"),
    ],
)
def test_wrong_lists_are_explained(tmp_path: Path, name: str, text: str | None, says: str) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=says):
        pack(config(tmp_path / "store", tmp_path / name))
    assert not (tmp_path / "store").exists()


def test_a_folder_that_is_not_mimic_is_explained(tmp_path: Path, films: Path) -> None:
    with pytest.raises(UserError, match=r"no mimic-cxr-2\.0\.0-metadata or mimic-cxr-2\.1\.0-metadata .* here"):
        pack(config(tmp_path / "store", mimic=films))
    (films / "mimic-cxr-2.0.0-metadata.csv").write_text("dicom_id,subject_id\na,1\n")
    with pytest.raises(UserError, match="columns missing: study_id, ViewPosition"):
        pack(config(tmp_path / "store", mimic=films))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cut=st.integers(0, 400), changes=st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), max_size=5))
def test_a_damaged_table_gives_a_message(tmp_path: Path, mimic: Path, cut: int, changes: list[tuple[int, int]]) -> None:
    path = mimic / "mimic-cxr-2.0.0-metadata.csv.gz"
    keep = path.read_bytes()
    data = bytearray(keep[: max(0, len(keep) - cut)])
    for at, value in changes:
        if data:
            data[at % len(data)] = value
    try:
        path.write_bytes(data)
        list_films(config(tmp_path / "store", mimic=mimic))
    except UserError:
        pass
    finally:
        path.write_bytes(keep)
    assert gzip.decompress(keep)


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
    with pytest.raises(UserError, match=r"shard-00001\.arrow: damaged"):
        Store(out)
    shard.write_bytes(bytes(len(data)))
    store = Store(out)  # of the right size: seen when it is read
    with pytest.raises(UserError, match=r"shard-00001\.arrow: damaged"):
        store.read(list(store.index.dicom_id))
    start, stop, _ = read_json(out / "store.json")["frames"][shard.name]
    assert stop - start == 32 * 32 * 4 and len(data) - stop + start < 3000  # little is read to be sure
    for at in [*range(8, start, 97), *range(stop, len(data), 97)]:  # read by Arrow, some of these end the process
        shard.write_bytes(data[:at] + bytes([data[at] ^ 0xFF]) + data[at + 1 :])
        with pytest.raises(UserError, match=r"shard-00001\.arrow: damaged \(outside its films\)"):
            Store(out).read(list(store.index.dicom_id))
    shard.unlink()
    with pytest.raises(UserError, match=r"shard-00001\.arrow: absent"):
        Store(out)
    about = out / "store.json"
    about.write_text(about.read_text().replace('"shards"', '"shakds"'))
    with pytest.raises(UserError, match=r"store\.json: damaged \(`shards`"):
        Store(out)
    with pytest.raises(UserError, match="not a store; write one with"):
        Store(films)


def test_a_disk_that_is_too_small_is_seen_before(tmp_path: Path, films: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = packing.shutil._ntuple_diskusage(1, 1, 1)
    monkeypatch.setattr(packing.shutil, "disk_usage", lambda _: free)
    with pytest.raises(UserError, match=r"GB are needed and 0\.0 GB are free; encoding=jpeg"):
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
