"""Tables of films outside MIMIC: ids, split, values, layouts, the record, and the sentence for each fault."""

import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from configs import UserError
from ehr_features import static
from ehr_features.own_films.config import TableConfig, find_layout, layouts
from ehr_features.own_films.ids import subject_numbers
from ehr_features.own_films.read import FilmsTable, read_films_table, read_paths
from ehr_features.own_films.record import check_groups, encode_group, refuse_constant
from ehr_features.own_films.values import text
from ehr_features.schema import FINDINGS, SPLITS

NUM = 60


def people(num: int = NUM) -> pd.DataFrame:
    """A hospital's table: two films a person, ids that are text."""
    who = np.arange(num) // 2
    return pd.DataFrame(
        {
            "path": [f"p{p}/film{i}.png" for i, p in enumerate(who)],
            "patient": [f"P-{p:03d}" for p in who],
            "sex": np.where(who % 2, "M", "F"),
            "age": 20 + who % 60,
            "ward": np.array(["icu", "er", "clinic"])[who % 3],
            "crp": np.where(who % 4, 3.5 * who, np.nan),
            "smoker": who % 2,
            "pneumonia": np.arange(num) % 2,
        }
    )


def saved(folder: Path, table: pd.DataFrame, name: str = "my.csv") -> str:
    path = folder / name
    table.to_parquet(path) if name.endswith("parquet") else table.to_csv(path, index=False)
    return str(path)


def read(folder: Path, table: pd.DataFrame, *, labels: bool = False, name: str = "my.csv", **keys: Any) -> FilmsTable:
    return read_films_table(TableConfig(table=saved(folder, table, name), **keys), labels=labels)


def encoded(table: FilmsTable, group: str, categories: tuple[str, ...] = ()) -> dict[str, np.ndarray]:
    train = (table.films["split"] == "train").to_numpy()
    check_groups(table, [group], "my.csv")
    array, names = encode_group(table, group, train, categories, "my.csv")
    return dict(zip(names, array.T, strict=True))


# ---- Ids and the split: of the table alone, the same for every command. ---------------------------------------------
@pytest.mark.parametrize("ids", ["text", "numbers", "long numbers"])
def test_a_person_keeps_id_and_split_in_another_order_a_part_a_parquet_and_without_labels(
    tmp_path: Path, ids: str
) -> None:
    table = people()
    if ids != "text":
        table["patient"] = [int(p[2:]) + 10**30 * (ids == "long numbers") for p in table["patient"]]
        table["patient"] = table["patient"].astype(object if ids == "long numbers" else int)
    whole = read(tmp_path, table)
    assert set(whole.films["split"]) == set(SPLITS)
    assert whole.films.groupby("subject_id")["split"].nunique().max() == 1
    assert whole.films["subject_id"].nunique() == NUM // 2
    known = whole.films.set_index("dicom_id")[["subject_id", "split"]]
    form = table.astype({"patient": str}) if ids == "long numbers" else table
    others = {
        "order": read(tmp_path, table.sample(frac=1, random_state=1)),
        "parquet": read(tmp_path, form, name="my.parquet"),
        "labels": read(tmp_path, table, labels=True, columns=["pneumonia"]),
        "part": read(tmp_path, table[10:30]),
    }
    for name, other in others.items():
        found = other.films.set_index("dicom_id")[["subject_id", "split"]]
        pd.testing.assert_frame_equal(found.sort_index(), known.loc[found.index].sort_index(), check_dtype=False)
        assert (other.digest == whole.digest) == (name != "part"), name
    assert read(tmp_path, table, seed=1).films["split"].tolist() != whole.films["split"].tolist()


def test_subject_numbers_depend_on_the_id_alone() -> None:
    found = subject_numbers(pd.Series(["7", " 7 ", "7.0", "P-1", "P-1", "p-1"]))
    assert found[:3].tolist() == [7, 7, 7] and found[3] == found[4] != found[5]
    assert subject_numbers(pd.Series(["P-1"]))[0] == found[3] > 2**31


@pytest.mark.parametrize("words", [["train", "valid", "test"], ["Training", "DEV", "Test "], ["TRAIN", "val", "test"]])
def test_a_split_of_the_table_is_kept_and_without_val_an_eighth_of_train_becomes_it(
    tmp_path: Path, words: list[str]
) -> None:
    table = people().assign(part=np.repeat(words, NUM // 3))
    assert read(tmp_path, table, split="part").films["split"].tolist() == np.repeat(SPLITS, NUM // 3).tolist()
    without = read(tmp_path, table.assign(part=np.where(table["part"] == words[2], "test", "train")), split="part")
    carved = without.films.groupby("subject_id")["split"].agg(["nunique", "first"])
    assert (carved["nunique"] == 1).all() and set(carved["first"]) == set(SPLITS)


# ---- Values. --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("words", "given"),
    [
        (["M", "F"], {}),
        ([" male", "FEMALE "], {}),
        (["m", "w"], {"w": "F"}),
        ([1, 0], {1: "M", 0: "F"}),
        ([1.0, None], {"1": "M", "d": None}),
    ],
)
def test_words_for_sex(tmp_path: Path, words: list[Any], given: dict[str, Any]) -> None:
    table = people().assign(sex=np.resize(np.array(words, object), NUM))
    found = read(tmp_path, table, sex_words=given).films["sex"]
    assert found[0] == "M" and (found[1] == "F" if words[1] is not None else pd.isna(found[1]))


def test_ages_as_dicom_writes_them_are_years_and_said(tmp_path: Path) -> None:
    ages = ["058Y", "018M", "003D", "052W", "7", "", "33.5"]
    found = read(tmp_path, people().assign(age=np.resize(ages, NUM)))
    np.testing.assert_allclose(
        found.films["age_years"][:7], [58, 1.5, 3 / 365.25, 52 * 7 / 365.25, 7, np.nan, 33.5], rtol=1e-12
    )
    assert any("DICOM's (058Y)" in line for line in found.said)


def test_columns_are_taken_by_their_usual_names_in_any_case_and_said(tmp_path: Path) -> None:
    table = people().rename(columns={"path": "File", "patient": "Patient_ID", "sex": "Gender", "age": "Age"})
    found = read(tmp_path, table.assign(Projection=np.resize(["pa", "ap ", "Lateral"], NUM)))
    assert found.roles == {
        "path": "File", "subject": "Patient_ID", "view": "Projection", "sex": "Gender", "age": "Age",
    }  # fmt: skip
    assert "subject=Patient_ID" in found.said[0]
    assert found.films["view"][:3].tolist() == ["PA", "AP", "LATERAL"]


def test_a_column_of_another_meaning_is_left_alone_with_none(tmp_path: Path) -> None:
    table = people().assign(split="fold 1", age="60-69", sex="x", view="x")
    found = read(tmp_path, table, split="none", age="none", sex="none", view="none")
    assert set(found.roles) == {"path", "subject"} and set(found.films["split"]) == set(SPLITS)
    assert not {"sex", "age_years"} & set(found.films) and set(found.films["view"]) == {"AP"}


@pytest.mark.parametrize("flags", [[1, 0, -1, None], [True, False], ["1.0", "0.0", ""], ["True", "FALSE", None]])
@pytest.mark.parametrize("name", ["my.csv", "my.parquet"])
def test_columns_of_flags_are_labels_unless_others_are_named(tmp_path: Path, flags: list[Any], name: str) -> None:
    table = people().assign(sick=pd.Series(np.resize(np.array(flags, object), NUM)), always=1).drop(columns="smoker")
    table["sick"] = table["sick"].astype("string") if name.endswith("parquet") else table["sick"]
    found = read(tmp_path, table, labels=True, name=name).labels
    assert list(found) == ["pneumonia", "sick"] and found["sick"][:2].tolist() == [1, 0]
    assert found["sick"].isin([0, 1, -1]).sum() == table["sick"].replace("", None).notna().sum()
    assert list(read(tmp_path, table, labels=True, name=name, columns=["sick"]).labels) == ["sick"]


def test_films_are_known_by_their_names_and_by_their_folders_where_names_repeat(tmp_path: Path) -> None:
    table = people(4)
    assert read(tmp_path, table).films["dicom_id"].tolist() == ["film0", "film1", "film2", "film3"]
    table["path"] = ["a/1.png", "b/1.png", "c/d/1.png", "2.png"]
    given = TableConfig(table=saved(tmp_path, table))
    ids = read_films_table(given, labels=False).films["dicom_id"].tolist()
    assert ids == ["a/1", "b/1", "c/d/1", "2"] == read_paths(given)[0]["dicom_id"].tolist()


def test_rows_without_an_id_are_counted(tmp_path: Path) -> None:
    table = people()
    table.loc[3, "path"], table.loc[[5, 6], "patient"] = None, " "
    found = read(tmp_path, table)
    assert found.left_out == {"row without path": 1, "row without patient": 2} and len(found.films) == NUM - 3


# ---- The record. ----------------------------------------------------------------------------------------------------
def test_a_column_of_numbers_is_scaled_on_train_and_masked(tmp_path: Path) -> None:
    table = people()
    table["crp"] = table["crp"].astype(object)
    table.loc[0, "crp"] = "inf"  # a laboratory's word for above its range is no number to scale by
    found = read(tmp_path, table)
    columns = encoded(found, "crp")
    numbers = pd.to_numeric(table["crp"]).replace(np.inf, np.nan)
    train = (found.films["split"] == "train").to_numpy()
    expected = (numbers - numbers[train].mean()) / numbers[train].std(ddof=0)
    np.testing.assert_allclose(columns["crp"], expected.fillna(0), atol=1e-6)
    np.testing.assert_array_equal(columns["crp_missing"], numbers.isna())


@pytest.mark.parametrize("huge", [1e30, -1e300, np.inf, 2.0**53])
def test_a_huge_number_is_text_as_it_stands_and_the_others_are_whole_numbers(huge):
    found = text(pd.Series([3.0, huge, np.nan]))
    assert pd.isna(found[2]) and (found[0] in ("3", "3.0")) and (pd.isna(found[1]) or float(found[1]) == huge)


def test_a_column_of_words_is_one_hot_over_the_words_of_train(tmp_path: Path) -> None:
    table = people()
    held_out = read(tmp_path, table).films["split"] != "train"
    table.loc[held_out.to_numpy().nonzero()[0][0], "ward"] = "maternity"
    table.loc[1, "ward"] = None
    columns = encoded(read(tmp_path, table), "ward")
    assert list(columns) == ["ward_clinic", "ward_er", "ward_icu", "ward_other", "ward_missing"]
    np.testing.assert_array_equal(np.sum(list(columns.values()), axis=0), 1)
    np.testing.assert_array_equal(columns["ward_other"], table["ward"] == "maternity")
    np.testing.assert_array_equal(columns["ward_missing"], table["ward"].isna())
    known = static.known(np.stack(list(columns.values()), 1), list(columns), ["ward"] * 5)
    assert not known[1].any() and known[0].sum() == 4


@pytest.mark.parametrize("flags", [[0, 1], [True, False], ["true", "FALSE"]])
def test_flags_and_named_codes_are_words_not_numbers(tmp_path: Path, flags: list[Any]) -> None:
    table = people().assign(flag=np.resize(flags, NUM), code=np.arange(NUM) % 3)
    found = read(tmp_path, table)
    assert len(encoded(found, "flag")) == 4 and all(np.isin(v, [0, 1]).all() for v in encoded(found, "flag").values())
    assert list(encoded(found, "code")) == ["code", "code_missing"]
    assert list(encoded(found, "code", ("code",))) == ["code_0", "code_1", "code_2", "code_other", "code_missing"]


def test_sex_age_and_view_are_the_groups_of_mimic(tmp_path: Path) -> None:
    found = read(tmp_path, people())
    for group in ("sex", "age", "age10"):
        expected, names, _ = static.encode(found.films, [group])
        columns = encoded(found, group)
        assert list(columns) == names
        np.testing.assert_array_equal(np.stack(list(columns.values()), 1), expected)


def test_a_group_that_is_the_same_for_all_films_is_refused_with_the_value(tmp_path: Path) -> None:
    found = read(tmp_path, people().assign(modality="CX", sex="F"))
    train = (found.films["split"] == "train").to_numpy()
    for group, value in (("modality", "CX"), ("sex", "F")):
        each = encode_group(found, group, train, (), "my.csv")
        with pytest.raises(UserError, match=rf"`{group}` is `{value}` for all {train.sum()} films that are trained on"):
            refuse_constant(found, group, each, train, "my.csv")
    empty = read(tmp_path, people().assign(age=None))
    with pytest.raises(UserError, match=f"`age` is empty for all {train.sum()} films"):
        refuse_constant(empty, "age", encode_group(empty, "age", train, (), "my.csv"), train, "my.csv")


# ---- Faults: one sentence each. -------------------------------------------------------------------------------------
def changed(**columns: Any) -> pd.DataFrame:
    return people().assign(**columns)


def at(row: int, value: Any, like: list[Any]) -> list[Any]:
    return [value if i == row else v for i, v in enumerate(np.resize(np.array(like, object), NUM))]


FAULTS: dict[str, tuple[pd.DataFrame, dict[str, Any], str]] = {
    "no paths": (people().rename(columns={"path": "image_name"}), {}, "columns missing: path or file .* films.path="),
    "no such column": (people(), {"sex": "sx"}, r"columns missing: sx \(films.sex=\); found .*; did you mean `sex`\?"),
    "ids null": (changed(patient=None), {}, r"no film is left \(60 row without patient\)"),
    "split words": (changed(split=at(2, "holdout", ["train"])), {}, "`split` holds `holdout`, .* line 4; wanted train"),
    "split empty": (changed(split=at(2, None, ["train"])), {}, "`split` holds 1 empty cells, the first in line 4"),
    "two splits": (changed(split=at(0, "test", ["train"])), {}, "1 subjects are in two splits, e.g. that of film f"),
    "old": (changed(age=at(3, 414, [50])), {}, "1 ages in `age` are not from 0 to 120 years, the first in line 5"),
    "unborn": (changed(age=at(3, -1, [50])), {}, "not from 0 to 120 years"),
    "no age": (changed(age=at(3, "fifty", [50])), {}, "1 values of `age` are no age, the first in line 5; .* 058Y"),
    "sex words": (changed(sex=np.resize(["m", "w"], NUM)), {}, "`sex` holds `w` in 30 rows, .*films.sex_words="),
    "sex 0 / 1": (changed(sex=np.resize([0, 1], NUM)), {}, "`sex` holds `0`, `1` in 60 rows"),
    "paths twice": (changed(path=at(1, "p0/film0.png", people()["path"].tolist())), {}, "1 films have more than one"),
    "up": (changed(path=at(1, "../../secret.png", people()["path"].tolist())), {}, "1 paths lead out of .* line 3"),
    "absolute": (changed(path=at(1, "/etc/x.png", people()["path"].tolist())), {"images": "films"}, "lead out of"),
    "dates": (changed(on=at(1, "31/05/2024", ["2024-05-31"])), {"taken_at": "on"}, "1 values of `on` are no date"),
    "layout": (people(), {"layout": "chexprt"}, "films.layout=chexprt: wanted brax, chexpert, csv"),
    "labels": (changed(sick=at(1, 2, [0, 1])), {"columns": ["sick"]}, "1 values of `sick` are not 1, 0, -1 .* line 3"),
    "semicolons": (pd.DataFrame({"path;sex": ["a;M"]}), {}, "columns are separated by ;; save it with commas"),
    "no labels": (people()[["path", "patient", "age"]], {}, "no column has labels"),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_of_a_table_is_one_sentence(tmp_path: Path, name: str) -> None:
    table, keys, says = FAULTS[name]
    with pytest.raises(UserError, match=says):
        read(tmp_path, table, labels=True, **keys)


def test_an_absent_table_and_one_without_rows_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"absent\.csv: no such table"):
        read_films_table(TableConfig(table=str(tmp_path / "absent.csv")), labels=False)
    with pytest.raises(UserError, match="no rows"):
        read(tmp_path, people()[:0])


@pytest.mark.parametrize(
    ("group", "says"),
    [
        ("wrd", "no column `wrd` for an EHR group; did you mean `ward`"),
        ("xyzzy", "there are (?!.*sex.*sex)(?!.*pneumonia)"),
        ("patient", "`patient` is a path, an id, the split or a label"),
        ("pneumonia", "`pneumonia` is a path, an id, the split or a label"),
        ("remark", "different words in .* train films, more than 100"),
        ("mixed", r"1 of 800 values of `mixed` are no number, the first in line 9; .*films.categories=\[mixed\]"),
        ("empty", "column `empty` is empty for all"),
    ],
)
def test_a_group_that_cannot_be_one_is_refused(tmp_path: Path, group: str, says: str) -> None:
    num = 800
    more = {"remark": [f"note {i}" for i in range(num)], "mixed": np.arange(num).astype(object), "empty": None}
    table = people(num).assign(**more)
    table.loc[7, "mixed"] = "haemolytic"
    with pytest.raises(UserError, match=says):
        encoded(read(tmp_path, table, columns=["pneumonia"]), group)


def test_a_group_of_a_person_without_its_column_says_which_key_names_it(tmp_path: Path) -> None:
    for group, key in (("sex", "sex"), ("age10", "age")):
        with pytest.raises(UserError, match=f"group `{group}` needs a column of the {key} .*films.{key}=COLUMN"):
            encoded(read(tmp_path, people().drop(columns=key)), group)


# ---- Layouts: published tables as data. -----------------------------------------------------------------------------
def test_every_shipped_layout_is_read_and_says_where_its_columns_come_from() -> None:
    assert set(layouts()) == {"csv", "chexpert", "padchest", "vindr", "rsna", "nih", "brax"}
    for name, path in layouts().items():
        layout, head = find_layout(name), path.read_text(encoding="utf-8").split("\n\n")[0]
        assert all(line.startswith("#") for line in head.splitlines()) and "./launch.sh " in head
        assert name == "csv" or (
            "olumns as in" in head.replace("\n# ", " ") and (layout.labels.columns or layout.labels.words)
        )
        assert set(layout.labels.as_chexpert.values()) <= set(FINDINGS)
        assert set(layout.labels.as_chexpert) <= {*layout.labels.columns, *layout.labels.words}


def test_padchest(tmp_path: Path) -> None:
    rows = {
        "ImageID": ["1_a.png", "1_b.png", "2_c.png"],
        "ImageDir": [0, 0, 1],
        "StudyDate_DICOM": [20140131, 20140131, 20150801],
        "StudyID": ["s1", "s1", "s2"],
        "PatientID": ["839860488694292331637988235681460987"] * 2 + ["22"],
        "PatientBirth": [1970.0, 1970.0, None],
        "PatientSex_DICOM": ["F", "F", "O"],
        "Projection": ["PA", "L", "AP_horizontal"],
        "Labels": ["['normal']", "[' laminar atelectasis', 'pleural effusion']", None],
    }
    found = read(tmp_path, pd.DataFrame(rows), layout="padchest", labels=True)
    assert found.films["view"].tolist() == ["PA", "LATERAL", "AP"]
    assert found.films["age_years"].tolist()[:2] == [44, 44] and np.isnan(found.films["age_years"][2])
    assert found.films["sex"].tolist()[:2] == ["F", "F"] and pd.isna(found.films["sex"][2])
    assert found.films["study_id"].tolist() == ["s1", "s1", "s2"]
    assert found.films["subject_id"][0] == found.films["subject_id"][1] != found.films["subject_id"][2] == 22
    assert found.labels.loc[1, ["normal", "atelectasis", "pleural effusion", "pneumonia"]].tolist() == [0, 1, 1, 0]
    assert found.labels.loc[0, "normal"] == 1 and found.labels.loc[2].isna().all()
    own = read(tmp_path, pd.DataFrame(rows), layout="padchest", labels=True, names="chexpert").labels
    assert set(own) <= set(FINDINGS) and own.loc[1, "Atelectasis"] == 1 and own.loc[0, "No Finding"] == 1


def test_vindr_takes_the_majority_of_three_readers_and_the_consensus_of_the_test_films(tmp_path: Path) -> None:
    names = find_layout("vindr").labels.columns
    votes = {"a": [1, 1, 0], "b": [0, 0, 1]}
    rows = [{"image_id": film, **dict.fromkeys(names, v)} for film, given in votes.items() for v in given]
    test = pd.DataFrame([{"image_id": "t", **dict.fromkeys(names, 1)}])
    saved(tmp_path, test.rename(columns={"Other diseases": "Other disease"}), "image_labels_test.csv")
    found = read(tmp_path, pd.DataFrame(rows), name="image_labels_train.csv", layout="vindr", labels=True)
    assert found.films["dicom_id"].tolist() == ["a", "b", "t"] and found.films["split"].tolist()[2] == "test"
    np.testing.assert_array_equal(found.labels.to_numpy(), np.repeat([[1.0], [0.0], [1.0]], len(names), axis=1))
    assert read_paths(TableConfig(table=str(tmp_path / "image_labels_train.csv"), layout="vindr"))[0]["file"].size == 3


def test_odd_ages_of_a_published_table_are_unknown_and_said(tmp_path: Path) -> None:
    ages = ["060Y", "414", "unknown", "-3"]
    rows = {"Image Index": [f"{i}.png" for i in range(4)], "Finding Labels": "No Finding", "Patient ID": range(4)}
    found = read(tmp_path, pd.DataFrame({**rows, "View Position": "PA", "Patient Age": ages}), layout="nih")
    np.testing.assert_array_equal(found.films["age_years"], [60, np.nan, np.nan, np.nan])
    assert sum("taken as unknown" in line for line in found.said) == 2


def test_rsna_counts_a_film_once_whatever_its_boxes(tmp_path: Path) -> None:
    rows = {"patientId": ["x", "x", "y"], "x": [1, 5, None], "y": 0, "width": 3, "height": 3, "Target": [1, 1, 0]}
    found = read(tmp_path, pd.DataFrame(rows), layout="rsna", labels=True)
    assert found.labels["Target"].tolist() == [1, 0] and found.films["dicom_id"].tolist() == ["x", "y"]


def test_brax(tmp_path: Path) -> None:
    rows = {
        "DicomPath": ["Anonymized_DICOMs/a.dcm", "Anonymized_DICOMs/b.dcm"],
        "PngPath": ["images/id_1/Study_1/Series_1/image-1.png", "images/id_1/Study_1/Series_2/image-1.png"],
        "PatientID": "1",
        "PatientSex": ["M", "O"],
        "PatientAge": [35, "85 or more"],
        "AccessionNumber": "s9",
        "StudyDate": 20080527,
        "ViewPosition": ["PA", "L"],
        **{name: [1.0, None] for name in FINDINGS},
    }
    found = read(tmp_path, pd.DataFrame(rows), layout="brax", labels=True)
    assert found.films["age_years"].tolist() == [35, 85] and found.films["view"].tolist() == ["PA", "LATERAL"]
    assert found.films["dicom_id"].is_unique and found.films["study_id"].tolist() == ["s9", "s9"]
    assert set(found.labels) == set(FINDINGS) and found.films["taken_at"][0] == pd.Timestamp("2008-05-27")


def test_a_users_own_layout_is_a_yaml_file(tmp_path: Path) -> None:
    (tmp_path / "clinic.yaml").write_text(
        "path: [datei]\nsubject: [fall]\nsex: [geschlecht]\nsex_words: {w: F}\nview: [aufnahme]\n"
        "view_words: {seitlich: LATERAL}\nlabels: {columns: [infiltrat], values: {ja: 1, nein: 0, unklar: -1}}\n"
    )
    table = pd.DataFrame(
        {
            "datei": ["1.png", "2.png", "3.png"],
            "fall": ["a", "b", "c"],
            "geschlecht": ["w", "m", ""],
            "aufnahme": ["pa", "Seitlich", "ap"],
            "infiltrat": ["ja", "unklar", "Nein"],
        }
    )
    found = read(tmp_path, table, layout=str(tmp_path / "clinic.yaml"), labels=True)
    assert found.labels["infiltrat"].tolist() == [1, -1, 0] and found.films["view"].tolist() == ["PA", "LATERAL", "AP"]
    assert found.films["sex"].tolist()[:2] == ["F", "M"]
    (tmp_path / "clinic.yaml").write_text("pth: [datei]\n")
    with pytest.raises(UserError, match=r"clinic\.yaml: unknown key `pth`; did you mean `path`"):
        read(tmp_path, table, layout=str(tmp_path / "clinic.yaml"))
    (tmp_path / "clinic.yaml").write_text("path: [datei]\npattern: '('\n")
    with pytest.raises(UserError, match="is no regular expression"):
        read(tmp_path, table, layout=str(tmp_path / "clinic.yaml"))


def chexpert_train(num: int = 223_414) -> pd.DataFrame:
    """A table of the shape of CheXpert's train.csv: about 3.5 films a patient, one lateral in seven."""
    rng = np.random.default_rng(0)
    who = np.sort(rng.integers(1, 64_541, num))
    nth = np.arange(num) - np.searchsorted(who, who)
    lateral = rng.random(num) < 1 / 7
    views = np.where(lateral, "lateral", "frontal")
    frame = pd.DataFrame(
        {
            "Path": [
                f"CheXpert-v1.0-small/train/patient{p:05d}/study{n + 1}/view1_{v}.jpg"
                for p, n, v in zip(who, nth, views, strict=True)
            ],
            "Sex": np.where(who % 2, "Male", "Female"),
            "Age": 18 + who % 73,
            "Frontal/Lateral": np.where(lateral, "Lateral", "Frontal"),
            "AP/PA": np.where(lateral, None, np.where(rng.random(num) < 0.85, "AP", "PA")),
        }
    )
    for name in FINDINGS:
        frame[name] = rng.choice([1.0, 0.0, -1.0, np.nan], num, p=[0.15, 0.1, 0.05, 0.7])
    frame.loc[5, "Sex"] = "Unknown"
    return frame


@pytest.mark.slow
def test_chexperts_whole_train_table_is_read_in_seconds_of_processor_time(tmp_path: Path) -> None:
    config = TableConfig(table=saved(tmp_path, chexpert_train(), "train.csv"), layout="chexpert")
    began = time.process_time()
    found = read_films_table(config, labels=True)
    seconds = time.process_time() - began
    print(f"223,414 rows: {seconds:.1f} processor seconds")
    assert len(found.films) == 223_414 and found.films["dicom_id"].is_unique and set(found.labels) == set(FINDINGS)
    assert set(found.films["split"]) == set(SPLITS) and found.films["view"].isin(["AP", "PA", "LATERAL"]).all()
    assert found.films["sex"].isna().sum() == 1 and "split by hash" in found.warnings[0]
    assert found.films.loc[0, "dicom_id"].startswith("patient00001_study1_view1_")
    assert found.films["subject_id"].max() == 64_540
    train = (found.films["split"] == "train").to_numpy()
    assert encode_group(found, "sex", train, (), "train.csv")[0].shape == (223_414, 3)
