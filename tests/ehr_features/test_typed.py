"""What parses and is not of its declared shape is refused in one line: file, place, what was found, what was wanted."""

import json
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from configs import UserError
from ehr_features.files import read_table, write_json
from ehr_features.typed import read_json, read_lines, read_yaml, shapes
from finetune.config.shapes import Head, Logged
from finetune.results import Results
from pretrain.shapes import EncoderJson, ProbeResults, StoreJson
from tests.written import encoder_json, series_json

ROW = {"split": "test", "label": "a", "metric": "auroc", "value": 0.7, "low": 0.6, "high": 0.8, "n": 9, "positives": 4}
SQUARE = {"resize": 32, "dicom": "window"}
STORE = {"format": 1, "size": 32, "hash": "a", "preprocess": SQUARE, "shards": {"shard-00000.arrow": 8}}


def changed(value: dict, **more: object) -> str:
    return json.dumps(value | more)


SERIES = series_json(["a", "b"], ["a", "b"])
ODD = {  # text of the file, its shape -> what is said
    "a list": ("[1]", dict, "got a list of 1, wanted an object"),
    "a key twice": ('{"a": 1, "a": 2}', dict, "the key `a` stands twice"),
    "10,000 levels": ("[" * 10_000 + "]" * 10_000, dict, "nested deeper than 50 levels"),
    "100 levels": ('{"a": ' * 100 + "1" + "}" * 100, dict, "nested deeper than 50 levels"),
    "NaN": ('{"a": NaN}', dict, "got NaN, wanted a finite number"),
    "an infinite number": ('{"a": 1e999}', dict, "1e999, which is too large"),
    "a huge number": ('{"a": 1%s}' % ("0" * 30), dict, "a number of 31 digits"),
    "half a character": ('{"a": "\\ud800"}', dict, "characters that are none"),
    "no preset": (changed(SERIES, preset=3), shapes.Series, "`preset`: got 3, wanted 'default' or 'medfuse'"),
    "no step": (changed(SERIES, step_hours=0), shapes.Series, "`step_hours`: got 0, wanted more than 0"),
    "no mean": (changed(SERIES, normaliser={"mean": [0.0], "std": [1.0]}), shapes.Series, "in normaliser.mean"),
    "a yes as a seed": ('{"config": {"seed": true}}', shapes.Provenance, "`config.seed`: got true"),
    "more after than before": (
        '{"exclusions": [{"table": "a", "why": "b", "before": 1, "after": 2}]}', shapes.AttritionJson, "no more rows",
    ),
    "an AUROC of 3": (json.dumps({"run": {"task": "a"}, "rows": [ROW | {"value": 3.0}]}), Results, "auroc between"),
    "a row twice": (json.dumps({"run": {"task": "a"}, "rows": [ROW, ROW]}), Results, "each number once"),
    "a row of text": (json.dumps({"run": {"task": "a"}, "rows": [ROW | {"n": "9"}]}), Results, "`rows.0.n`: got the"),
    "another size": (changed(STORE, size=16), StoreJson, "preprocess.resize as size, 16"),
    "a shard that is missing": (changed(STORE, shards={"shard-00001.arrow": 8}), StoreJson, "without a gap"),
    "no frame": (changed(STORE, frames={"shard-00000.arrow": [0, "x", "y"]}), StoreJson, "begin and end, and a hash"),
    "no arguments": (changed(encoder_json(), model_args=None), EncoderJson, "`model_args`: got null, wanted an object"),
    "a huge network": (changed(encoder_json(), model_args={"depth": 10**9}), EncoderJson, "no number above 65,536"),
    "no time": (changed(encoder_json(), ehr_groups={"age": "never"}), EncoderJson, "study, admission or discharge"),
    "weights of a list": ('{"encoder": {"init": ["a"]}}', shapes.RunConfig, "whose `init` is text or null"),
    "groups in a list": ('{"ehr_groups": ["age"]}', shapes.OfRecord, "`ehr_groups`: got a list of 1, wanted an object"),
    "a run in a list": ('{"run": ["a"]}', ProbeResults, "`run`: got a list of 1, wanted an object"),
    "a value of text": ('{"rows": [{"metric": "auroc", "value": "0.7"}]}', ProbeResults, "`rows.0.value`: got the"),
    "a threshold too few": (
        '{"labels": ["a", "b"], "pools": ["avg"], "encoder": "", "encoder_hash": "", "thresholds": [0.5]}', Head,
        "a threshold for each",
    ),
}  # fmt: skip


@pytest.mark.parametrize("odd", ODD)
def test_json_of_another_shape_is_refused_in_one_line(odd: str, tmp_path: Path) -> None:
    text, shape, says = ODD[odd]
    (tmp_path / "held.json").write_text(text)
    with pytest.raises(UserError, match=r"held\.json: ") as error:
        read_json(tmp_path / "held.json", shape)
    assert says in str(error.value) and "\n" not in str(error.value)


def test_what_is_of_its_shape_is_read_as_it_is(tmp_path: Path) -> None:
    for value, shape in ((SERIES, shapes.Series), (STORE, StoreJson), (encoder_json(new=[1]), EncoderJson)):
        write_json(tmp_path / "held.json", value)
        assert read_json(tmp_path / "held.json", shape) == value


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a: 1\na: 2\n", "a key stands twice"),
        ("[" * 1000, "nested deeper"),
        ("a: [b\n", "line 2: not valid YAML"),
        ("features: 5\n", "`features`: got 5, wanted text"),
        ("- a\n", "got a list of 1, wanted an object"),
        ("ehr: {groups: age}\n", "`ehr.groups`: got the text 'age', wanted a list"),
    ],
)
def test_a_config_of_another_shape_is_refused_in_one_line(text: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(UserError, match=r"config\.yaml: ") as error:
        read_yaml(tmp_path / "config.yaml", shapes.RunConfig)
    assert says in str(error.value) and "\n" not in str(error.value)


def test_the_last_line_of_a_log_may_be_cut_short(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"ste')
    assert read_lines(path, Logged) == [{"step": 1}]
    path.write_text('{"ste\n{"step": 1}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 1: not valid JSON"):
        read_lines(path, Logged)


STAYS = pd.DataFrame({"stay_id": [1, 2, 3], "subject_id": [7, 8, 9], "split": ["train", "val", "test"]})
STAYS = STAYS.assign(los_hours=[50.0, 60.0, 70.0], age_years=[40, 50, 60])
TABLES = {
    "an id twice": (STAYS.assign(stay_id=[1, 1, 3]), "column `stay_id`, row 2: wanted each value once"),
    "no id": (STAYS.assign(stay_id=pd.array([1, None, 3], "Int64")), "column `stay_id`, row 2: wanted a value"),
    "an id of text": (STAYS.assign(stay_id=["a", "b", "c"]), "column `stay_id`: got "),
    "half an id": (STAYS.assign(stay_id=[1.0, 2.5, 3.0]), "column `stay_id`, row 2: wanted whole numbers"),
    "a negative id": (STAYS.assign(subject_id=[7, -8, -9]), "column `subject_id`, 2 rows, the first row 2: wanted 0"),
    "no such split": (STAYS.assign(split="x7"), "column `split`, 3 rows, the first row 1: wanted one of"),
    "NaN": (STAYS.assign(los_hours=[50.0, float("nan"), 70.0]), "column `los_hours`, row 2: wanted a value"),
    "infinite": (STAYS.assign(los_hours=[50.0, float("inf"), 70.0]), "column `los_hours`, row 2: wanted finite"),
    "a negative age": (STAYS.assign(age_years=[40, 50, -9]), "column `age_years`, row 3: wanted 0 or more"),
    "lists": (STAYS.assign(age_years=[[1], [2], [3]]), "column `age_years`: got list<"),
    "no column": (STAYS.drop(columns="split"), "columns missing: split"),
    "no rows": (STAYS.iloc[:0], "no rows"),
}  # fmt: skip


@pytest.mark.parametrize("odd", TABLES)
def test_a_table_of_another_shape_is_refused_without_a_value_of_it(odd: str, tmp_path: Path) -> None:
    table, says = TABLES[odd]
    write_json(tmp_path / "provenance.json", {})
    table.to_parquet(tmp_path / "stays.parquet")
    with pytest.raises(UserError, match=r"stays\.parquet: ") as error:
        read_table(tmp_path, "stays")
    said = str(error.value)
    assert says in said and "\n" not in said and not {"999", "2.5", "-8", "x7"} & set(said.replace(",", " ").split())


def test_a_column_twice_and_one_that_schema_json_lists_are_named(tmp_path: Path) -> None:
    write_json(tmp_path / "provenance.json", {})
    table = pa.Table.from_pandas(STAYS)
    pq.write_table(table.append_column("split", table["split"]), tmp_path / "stays.parquet")
    with pytest.raises(UserError, match="two columns are called `split`"):
        read_table(tmp_path, "stays")
    STAYS.to_parquet(tmp_path / "stays.parquet")
    about = {"type": "string", "unit": "", "group": "subgroup", "available_at": "study"}
    write_json(tmp_path / "schema.json", {"stays": {"race": about}})
    with pytest.raises(UserError, match="columns missing: race"):
        read_table(tmp_path, "stays")


def test_whole_numbers_that_another_writer_left_as_floats_are_whole_and_no_table_is_torn_into_columns(
    tmp_path: Path,
) -> None:
    write_json(tmp_path / "provenance.json", {})
    more = pd.DataFrame(0.5, range(3), [f"more{i}" for i in range(200)])
    pd.concat([STAYS.assign(stay_id=[1.0, 2.0, 3.0]), more], axis=1).to_parquet(tmp_path / "stays.parquet")
    table = read_table(tmp_path, "stays")
    assert table["stay_id"].dtype == "int64" and table["los_hours"].dtype == "float64"
    table["another"] = 1  # pandas warns where a table is of very many blocks, and a warning is an error here
