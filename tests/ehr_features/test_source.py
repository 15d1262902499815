"""Raw tables of any layout, format and location; errors name what is wrong."""

from __future__ import annotations

import re
import shutil

import fsspec
import pandas as pd
import pyarrow.parquet as pq
import pytest

from configs import UserError
from ehr_features.build import build
from ehr_features.check import check
from ehr_features.raw.engine import connect
from ehr_features.raw.source import Source, open_source


def test_layout_is_told_from_folders_and_columns(tmp_path, frames, write, config):
    for layout in ("1.0", "2.0", "2.2"):
        root = write(tmp_path / layout, frames, layout)
        source = open_source(config(mimic_iv=str(root)))
        assert source.layout == layout
        assert source.table("admissions").race.to_pandas().unique().tolist() == ["WHITE"]


@pytest.mark.parametrize("suffix", [".csv", ".csv.gz", ".parquet", {"chartevents": ".parquet", "patients": ".csv"}])
def test_forms_can_be_mixed_and_give_the_same_rows(tmp_path, frames, write, config, suffix):
    source = open_source(config(mimic_iv=str(write(tmp_path / "m", frames, suffix=suffix))))
    got = source.table("chartevents").order_by(["stay_id", "charttime", "itemid"]).to_pandas()
    want = frames["chartevents"].sort_values(["stay_id", "charttime", "itemid"]).reset_index(drop=True)
    pd.testing.assert_frame_equal(got, want[list(got.columns)], check_dtype=False)


def test_text_none_is_a_value_and_quoted_commas_stay_in_their_column(tmp_path, frames, write, config):
    source = open_source(config(mimic_iv=str(write(tmp_path / "m", frames))))
    chart = source.table("chartevents")
    assert set(chart.filter(chart.itemid == 220739).value.to_pandas()) == {"None"}
    assert set(source.table("admissions").insurance.to_pandas()) == {'Other, "self"'}
    assert source.table("labevents").count().execute() == len(frames["labevents"])


ZONED = {
    "icustays": "intime",
    "chartevents": "charttime",
    "labevents": "storetime",
    "admissions": "edregtime",
    "patients": "dod",
}


@pytest.mark.parametrize(("name", "column"), ZONED.items())
def test_times_in_another_zone_than_utc_are_refused_in_every_table(tmp_path, frames, write, config, name, column):
    frames["admissions"]["edregtime"] = frames["admissions"]["admittime"]
    frames["patients"]["dod"] = pd.Timestamp("2160-01-01")
    wanted = open_source(config(mimic_iv=str(write(tmp_path / "m", frames)))).table(name).to_pandas()
    for zone in ("America/New_York", "Asia/Kolkata", "+05:00", "Etc/UTC", "UTC"):
        zoned = frames[name].assign(**{column: frames[name][column].dt.tz_localize(zone)})
        root = write(tmp_path / zone.replace("/", "-"), frames | {name: zoned}, suffix={name: ".parquet"})
        source = open_source(config(mimic_iv=str(root)))
        if zone.endswith("UTC"):  # the same times, whatever the zone of this machine
            assert sorted(source.table(name)[column].to_pandas()) == sorted(wanted[column])
        else:
            with pytest.raises(
                UserError, match=rf"{name}\.parquet: the times of `{column}` are in the zone .*{zone[1:]}"
            ):
                source.table(name)


@pytest.mark.parametrize("offset", ["-05:00", "+0530", " -05", " America/New_York", "Z", "+00:00", " UTC", ".250"])
def test_an_offset_behind_the_times_of_a_csv_is_refused_too(tmp_path, frames, write, config, offset):
    wanted = frames["icustays"]["intime"]
    frames["icustays"]["intime"] = wanted.astype(str) + offset
    source = open_source(config(mimic_iv=str(write(tmp_path / "m", frames))))
    if offset in ("Z", "+00:00", " UTC", ".250"):
        assert sorted(source.table("icustays").intime.to_pandas().dt.floor("s")) == sorted(wanted)
    else:
        with pytest.raises(UserError, match=rf"the times of `intime` are in the zone {re.escape(offset.strip())}"):
            source.table("icustays")


@pytest.mark.parametrize("protocol", ["memory", "file"])
def test_tables_are_read_from_urls(tmp_path, frames, write, config, protocol):
    root = write(tmp_path / "m", frames, suffix={"chartevents": ".parquet"})
    url = f"file://{root}"
    if protocol == "memory":
        fsspec.filesystem("memory").put(str(root), "/tables", recursive=True)
        url = "memory://tables"
    source = open_source(config(mimic_iv=url))
    assert source.table("icustays").count().execute() == 8
    assert source.table("chartevents").count().execute() == len(frames["chartevents"])
    if protocol == "memory":
        fsspec.filesystem("memory").rm("/tables", recursive=True)


def test_missing_column_names_file_found_columns_and_the_layout_that_has_it(tmp_path, frames, write, config):
    frames["admissions"] = frames["admissions"].rename(columns={"admittime": "admit_time"})
    root = write(tmp_path / "m", frames | {"icustays": frames["icustays"].drop(columns="intime")})
    with pytest.raises(UserError, match=r"icustays\.csv\.gz: column `intime` is missing; found .*'outtime'.*2\.2"):
        open_source(config(mimic_iv=str(root))).table("icustays")


def test_wrong_folder_says_what_is_there_and_which_folder_was_meant(tmp_path, frames, write, config):
    write(tmp_path / "mimic-iv" / "2.2", frames)
    with pytest.raises(UserError, match=r"none of its tables is there; found \['2\.2'\].*did you mean .*/2\.2\?"):
        open_source(config(mimic_iv=str(tmp_path / "mimic-iv")))
    with pytest.raises(UserError, match="no such folder"):
        open_source(config(mimic_iv=str(tmp_path / "nowhere")))


@pytest.mark.parametrize("name", ["icustays", "patients", "chartevents", "labevents"])
def test_a_damaged_page_of_a_parquet_table_is_told_with_its_file(tmp_path, frames, write, config, name):
    root = write(tmp_path / "m", frames, suffix={name: ".parquet"})
    path = next(root.rglob(f"{name}.parquet"))
    data = bytearray(path.read_bytes())
    group = pq.ParquetFile(path).metadata.row_group(0)
    for column in (group.column(i) for i in range(group.num_columns)):
        for page in (column.dictionary_page_offset, column.data_page_offset):
            if page is not None:
                data[page] = 0x1F  # a field of a type that there is none of
    path.write_bytes(data)
    with pytest.raises(
        UserError, match=rf"{name}\.parquet: don't know what type; is the file whole\? Download"
    ) as told:
        build(config(mimic_iv=str(root)))
    assert str(told.value).isprintable()


def test_two_layouts_in_one_folder_are_refused(tmp_path, frames, write, config):
    root = write(tmp_path / "m", frames, "2.2")
    (root / "core").mkdir()
    shutil.copy(root / "hosp/patients.csv.gz", root / "core/patients.csv.gz")
    with pytest.raises(UserError, match=r"two MIMIC-IV layouts are mixed.*core/patients is 1\.0"):
        open_source(config(mimic_iv=str(root)))


def test_tables_of_2_0_among_those_of_2_2_are_a_warning(tmp_path, frames, write, config, capsys):
    root = write(tmp_path / "m", frames, "2.2")
    assert check(config(mimic_iv=str(root))) == 0 and "one release" not in capsys.readouterr().out
    write(root, {"labevents": frames["labevents"]}, "2.0")
    assert check(config(mimic_iv=str(root))) == 0
    said = capsys.readouterr().out
    assert "warning: admissions, chartevents as since 2.2, labevents as before (without order_provider_id)" in said


def test_absent_table_names_the_file(tmp_path, frames, write, config):
    frames.pop("labevents")
    source = open_source(config(mimic_iv=str(write(tmp_path / "m", frames))))
    assert not source.has("labevents")
    with pytest.raises(UserError, match=r"hosp/labevents\{.*no such file"):
        source.table("labevents")
    with pytest.raises(UserError, match="the config has no `mimic_ed`"):
        source.table("edstays")


def test_truncated_gz_and_empty_file_are_named(tmp_path, frames, write, config):
    root = write(tmp_path / "m", frames)
    path = root / "hosp/patients.csv.gz"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"patients\.csv\.gz: (damaged|IO Error).*[Dd]ownload it again"):
        open_source(config(mimic_iv=str(root))).table("patients")
    path.write_bytes(b"")
    with pytest.raises(UserError, match=r"patients\.csv\.gz: the file is empty"):
        open_source(config(mimic_iv=str(root)))
    path.write_bytes(b"subject_id,gender")
    with pytest.raises(UserError, match=r"patients\.csv\.gz: damaged"):
        open_source(config(mimic_iv=str(root)))


def test_unreadable_text_becomes_null_and_not_another_value():
    source = Source.from_frames(
        {"labevents": pd.DataFrame({"valuenum": ["___", "7.4", ""], "itemid": ["1", "2", "x"], "subject_id": 1})}
    )
    got = source.table("labevents").order_by("itemid").to_pandas()
    assert got["valuenum"].tolist()[1] == 7.4 and got["valuenum"].isna().sum() == 1
    assert got["itemid"].tolist() == [1, 2] and source.rows("labevents") == 3 and source.dropped["labevents"] == 1


def test_a_time_or_number_that_is_none_costs_that_value_and_not_the_table(tmp_path, frames, write, config):
    (tmp_path / "ed").mkdir()  # a table of numbers and times alone: DuckDB casts such a one while it reads
    path = tmp_path / "ed/vitalsign.csv"
    path.write_text(
        "subject_id,stay_id,charttime,temperature,heartrate,resprate,o2sat,sbp,dbp,rhythm,pain\n"
        "1,2,2150-01-01 11:00:00,98.6,80,16,97,120,80,,\n"
        "1,3,yesterday,98.6,81,16,97,120,80,,\n"
        "1,4,2150-01-01 12:00:00,98.6,fast,16,97,120,80,,\n"
    )
    raw = config(mimic_iv=str(write(tmp_path / "m", frames)), mimic_ed=str(tmp_path))
    with pytest.raises(UserError, match=r"ed/edstays\{.*no such file"):
        open_source(raw)
    (tmp_path / "ed/edstays.csv").write_text("subject_id,hadm_id,stay_id,intime,outtime\n")
    source = open_source(raw)
    got = source.table("vitalsign").order_by("stay_id").to_pandas()
    assert got["charttime"].isna().tolist() == [False, True, False]
    assert got["heartrate"].isna().tolist() == [False, False, True]


@pytest.mark.parametrize("odd", ["inf", "-inf", "Infinity", "294247-01-01", "9999-12-31 23:59:59", "0001-01-01"])
@pytest.mark.parametrize(("name", "column"), [("admissions", "deathtime"), ("patients", "dod")])
def test_a_time_outside_of_any_calendar_is_none(tmp_path, frames, write, config, name, column, odd):
    frames[name][column] = frames[name][column].astype(object)
    frames[name].loc[0, column] = odd
    frames[name].loc[1, column] = "2150-01-01"
    source = open_source(config(mimic_iv=str(write(tmp_path / "m", frames))))
    got = source.table(name).order_by("subject_id").to_pandas()[column]
    assert pd.isna(got[0]) and pd.Timestamp(got[1]) == pd.Timestamp("2150-01-01")


def test_windows_line_ends_and_a_byte_order_mark_are_read(tmp_path, frames, write, config):
    root = write(tmp_path / "m", frames, suffix=".csv")
    for path in root.rglob("*.csv"):
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    source = open_source(config(mimic_iv=str(root)))
    assert source.table("patients").subject_id.to_pandas().tolist() == frames["patients"].subject_id.tolist()
    assert source.table("labevents").count().execute() == len(frames["labevents"])
    d_items = source.table("d_items").to_pandas()
    assert d_items.label.tolist() == ["HR", "eye", "verbal", "motor"]


def test_spark_without_java_says_what_to_install(monkeypatch):
    pytest.importorskip("pyspark", reason="pyspark is not installed (extra `spark`)")
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("JAVA_HOME", raising=False)
    with pytest.raises(UserError, match="Java is not installed"):
        connect("pyspark")


def test_whole_numbers_in_any_form_are_read_and_all_else_is_null() -> None:
    forms = ["220045", " 220045 ", "0220045", "220045.0", "2.20045e5", "220045.5", "itemid", "nan", "inf", "1e400"]
    forms += ["9" * 25, ""]
    wanted = [220045] * 5 + [None] * 7
    text = pd.DataFrame({"itemid": forms, "label": "x"})
    numbers = text.assign(itemid=pd.to_numeric(text["itemid"], errors="coerce"))
    for frame in (text, numbers):
        source = Source.from_frames({"d_items": frame})
        found = source._tables["d_items"].itemid.to_pyarrow().to_pylist()
        assert found == wanted
        assert source.rows("d_items") == len(forms) and source.dropped == {"d_items": 7}
