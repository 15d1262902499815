"""Which films a store holds: of MIMIC's metadata table, of a folder, of a list."""

import gzip
from collections.abc import Callable
from pathlib import Path

import fsspec
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from configs import UserError
from ehr_features.typed import read_json
from pretrain.config import FilmsConfig, ImagesConfig
from pretrain.data import select_films
from pretrain.store import Store, pack
from pretrain.store.listing import films_of, list_films
from tests.pretrain.drawn import config, draw, whole


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
    table = pd.DataFrame({"dicom_id": ids, "study_id": 1, "subject_id": [int(i[:8]) for i in ids], "split": "train"})
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
