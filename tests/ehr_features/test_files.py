"""Atomic writes: through symbolic links, and never replacing a device, pipe or folder."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from configs import UserError
from ehr_features import files
from ehr_features.files import alone, check_new_file, new_file, new_folder
from ehr_features.schema import view_names
from ehr_features.typed import Shape, read_json, undamaged


def test_a_view_has_one_spelling_whoever_wrote_it(tmp_path: Path) -> None:
    given = ["ap", " Pa", "LATERAL", "ll ", "Antero-Posterior", "", None, "xtable lateral"]
    wanted = ["AP", "PA", "LATERAL", "LL", "AP", None, None, "XTABLE LATERAL"]
    assert view_names(pd.Series(given)).tolist() == wanted
    meanings = pd.Series(["lateral"] * 5 + ["Postero-Anterior", "oblique", "lateral"])
    assert view_names(pd.Series(given), meanings).tolist() == [*wanted[:5], "PA", None, wanted[7]]
    (tmp_path / "provenance.json").write_text("{}")
    films = pd.DataFrame({"view": given, "dicom_id": list("abcdefgh"), "subject_id": 1, "split": "train"})
    films.to_parquet(tmp_path / "images.parquet")
    assert files.read_table(tmp_path, "images")["view"].tolist() == wanted


def test_a_folder_behind_a_symbolic_link_is_replaced_and_the_link_stays(tmp_path: Path) -> None:
    (tmp_path / "scratch").mkdir()
    for target in ("scratch/there", "scratch/not_yet"):
        link = tmp_path / Path(target).name
        link.symlink_to(target)
    (tmp_path / "scratch/there").mkdir()
    (tmp_path / "scratch/there/old").touch()
    for name in ("there", "not_yet"):
        with alone(tmp_path / name), new_folder(tmp_path / name) as part:
            (part / "new").touch()
        assert (tmp_path / name).is_symlink()
        assert os.listdir(tmp_path / "scratch" / name) == ["new"]
    assert sorted(os.listdir(tmp_path)) == ["not_yet", "scratch", "there"]  # nothing half-made beside the links


def test_a_file_behind_a_symbolic_link_is_replaced_and_the_link_stays(tmp_path: Path) -> None:
    (tmp_path / "scratch").mkdir()
    (tmp_path / "latest.csv").symlink_to("scratch/today.csv")
    with new_file(tmp_path / "latest.csv") as part:
        part.write_text("a")
    assert (tmp_path / "latest.csv").is_symlink() and (tmp_path / "scratch/today.csv").read_text() == "a"


def test_a_folder_or_a_pipe_is_never_replaced_by_a_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")  # as /dev/null, a file of its name would take its place
    (tmp_path / "folder").mkdir()
    for name, kind in (("pipe", "no regular file"), ("folder", "a folder")):
        with pytest.raises(UserError, match=f"{name}: is {kind}"), new_file(tmp_path / name) as part:
            part.write_text("a")
        with pytest.raises(UserError, match=f"{name}: is {kind}"):
            check_new_file(tmp_path / name)
    assert (tmp_path / "pipe").is_fifo() and sorted(os.listdir(tmp_path)) == ["folder", "pipe"]


def test_the_check_for_a_new_file_leaves_nothing(tmp_path: Path) -> None:
    check_new_file(tmp_path / "out.csv")
    assert not os.listdir(tmp_path)


def test_a_key_that_a_json_file_has_not_is_told_with_the_file(tmp_path: Path) -> None:
    (tmp_path / "held.json").write_text('{"size": 1}')

    class Held(Shape):
        size: int
        hash: str

    assert read_json(tmp_path / "held.json") == {"size": 1}
    with pytest.raises(UserError, match=r"held\.json: `hash` is missing; was it copied whole\?"):
        read_json(tmp_path / "held.json", Held)


def test_damaged_notes_of_pandas_in_a_parquet_file_are_told(tmp_path: Path) -> None:
    table = pa.Table.from_pandas(pd.DataFrame({"a": ["x"]}))
    notes = {key: value.replace(b"numpy_type", b"numqy_type") for key, value in table.schema.metadata.items()}
    pq.write_table(table.replace_schema_metadata(notes), tmp_path / "a.parquet")
    with (
        pytest.raises(UserError, match=r"a\.parquet: damaged .*; copy it again"),
        undamaged(tmp_path / "a.parquet", "copy it again"),
    ):
        pd.read_parquet(tmp_path / "a.parquet")


@pytest.mark.parametrize(
    "step", ["build", "films.linking", "films.record", "series.bins", "series.medfuse", "notes.write"]
)
def test_a_change_in_any_file_of_a_step_changes_the_key_of_its_cache(
    step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = Path(files.__file__).parent
    code = f"import sys, ehr_features.{step}; print(*[m.__file__ for n, m in sys.modules.items() if 'ehr_f' in n])"
    loaded = subprocess.run([sys.executable, "-c", code], cwd=home.parent, capture_output=True, text=True, check=True)
    of_the_step = {Path(name) for name in loaded.stdout.split()} | {home / "phenotypes.csv", home / "channels.yaml"}
    others = set(home.rglob("*.py")) - of_the_step
    assert len(of_the_step) > 5 and others
    module, real = importlib.import_module(f"ehr_features.{step}"), files.file_digest
    before = files.code_digest(module)

    def key_after_a_change_of(changed: Path) -> str:
        monkeypatch.setattr(files, "file_digest", lambda path: "0" * 16 if Path(path) == changed else real(path))
        return files.code_digest(module)

    assert [path.name for path in of_the_step if key_after_a_change_of(path) == before] == []
    assert key_after_a_change_of(home / "demo" / "thorax.py") == before
