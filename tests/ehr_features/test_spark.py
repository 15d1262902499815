"""engine: pyspark gives the same features as DuckDB, and no result stands in the driver's memory as a whole."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ibis
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import load_file

from configs import UserError
from ehr_features.build import build
from ehr_features.config import FeaturesConfig, NotesConfig
from ehr_features.demo import generate as demo
from ehr_features.notes.write import write_notes
from ehr_features.raw import spark
from ehr_features.raw.engine import batches, connect, hold, kept, named_by_the_engine
from ehr_features.raw.source import open_source
from ehr_features.series import events

ON_SPARK = [
    pytest.mark.spark,
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.usefixtures("session"),
]
QUICK = {
    "spark.sql.codegen.wholeStage": False,
    "spark.sql.shuffle.partitions": 3,
}  # compiling takes longer than the work


def on_spark(test: Any) -> Any:
    for mark in ON_SPARK:
        test = mark(test)
    return test


@pytest.fixture(scope="module")
def session() -> Iterator[None]:
    """One session serves all tests here."""
    pytest.importorskip("pyspark", reason="pyspark is not installed (extra `spark`)")
    if shutil.which("java") is None:
        pytest.skip("Java is not on this machine")
    yield
    from pyspark.sql import SparkSession

    if session := SparkSession.getActiveSession():
        session.stop()


@on_spark
@pytest.mark.real
def test_spark_equals_duckdb_on_the_real_demo(shared: Path, tmp_path: Path) -> None:
    tables = {"mimic_iv": str(shared / "data/mimic-iv-demo-2.2"), "mimic_cxr": str(shared / "data/mimic-cxr-linked")}
    keys: dict[str, Any] = {"memory": "2GB", "spark": QUICK, "tasks": ("mortality", "phenotypes", "decompensation")}
    made = {
        engine: build(FeaturesConfig(**tables, **keys, out=tmp_path / engine, engine=engine))
        for engine in ("duckdb", "pyspark")
    }
    for path in made["duckdb"].rglob("*.parquet"):
        other = made["pyspark"] / path.relative_to(made["duckdb"])
        pd.testing.assert_frame_equal(pd.read_parquet(path), pd.read_parquet(other))
    a, b = (load_file(folder / "series.safetensors") for folder in made.values())
    for key in a:
        np.testing.assert_array_equal(a[key], b[key])
    for name in ("series.json", "schema.json", "attrition.json"):
        assert (made["duckdb"] / name).read_text() == (made["pyspark"] / name).read_text(), name
    assert not list(tmp_path.rglob("result*")), "results in the scratch folder are left"


@on_spark
def test_spark_writes_the_notes_that_duckdb_writes(tmp_path: Path) -> None:
    demo.generate(tmp_path / "raw", subjects=60, seed=3, film_size=32, leak=0.5)
    raw = {f"mimic_{key}": str(tmp_path / "raw" / f"mimic-{name}") for key, name in (("iv", "iv"), ("ed", "iv-ed"))}
    cxr = str(tmp_path / "raw/mimic-cxr")
    features = build(FeaturesConfig(**raw, mimic_cxr=cxr, out=tmp_path / "features", tasks=("mortality",)))
    made = [
        write_notes(
            NotesConfig(features=features, **raw, out=tmp_path / engine, engine=engine, memory="2GB", spark=QUICK)
        )
        for engine in ("duckdb", "pyspark")
    ]
    for name in ("notes.parquet", "unfiltered.parquet"):
        assert pq.read_table(made[0] / name).equals(pq.read_table(made[1] / name)) and pq.read_table(made[0] / name)
    assert (made[0] / "attrition.json").read_bytes() == (made[1] / "attrition.json").read_bytes()


@on_spark
def test_the_driver_collects_no_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    con = connect("pyspark", memory="2GB", spill=tmp_path, settings=QUICK | {"spark.sql.shuffle.partitions": 7})
    con._session.conf.set("spark.sql.adaptive.enabled", False)  # or so few rows become one partition
    at = pd.Timestamp("2150-01-01 10:00:00.25")
    rows = pd.DataFrame({"stay_id": np.arange(900) % 300, "v": np.where(np.arange(900) % 3, 1.5, np.nan), "at": at})
    table = hold(con, "some_rows", pa.Table.from_pandas(rows, preserve_index=False))
    from pyspark.sql.classic.dataframe import DataFrame

    for name in ("toPandas", "toArrow", "collect"):
        monkeypatch.setattr(DataFrame, name, lambda *_, name=name: pytest.fail(f"{name} was called"))
    found = list(batches(con, table.order_by("stay_id"), 50))
    assert len(found) > 7 and max(map(len, found)) <= 50
    whole = pa.Table.from_batches(found).to_pandas()
    assert whole["stay_id"].is_monotonic_increasing and whole["v"].isna().sum() == 300
    assert whole["at"].dt.tz_localize(None).eq(at).all() if whole["at"].dt.tz else whole["at"].eq(at).all()
    again = kept(con, table.filter(ibis._.stay_id < 10))
    assert sum(map(len, batches(con, again))) == 30
    con._session.conf.set("spark.sql.adaptive.enabled", True)


@on_spark
@pytest.mark.parametrize("suffix", [".csv", ".csv.gz", ".parquet"])
def test_events_are_counted_in_the_pass_that_reads_them(
    tmp_path: Path, frames: Any, write: Any, config: Any, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    frames["chartevents"].loc[3, "value"] = 'two\nlines, "quoted"'
    text = frames["chartevents"].astype({"itemid": object})
    frames["chartevents"] = text if suffix == ".parquet" else pd.concat([text, pd.DataFrame([{"itemid": "itemid"}])])
    if suffix == ".parquet":
        frames["chartevents"] = frames["chartevents"].astype({"itemid": "int64"})
    write(tmp_path / "mimic", frames, suffix={"chartevents": suffix, "labevents": suffix})
    found = {}
    for engine in ("duckdb", "pyspark"):
        keys = {"engine": engine, "memory": "2GB", "spark": QUICK if engine == "pyspark" else {}}
        source = open_source(config(**keys, cache=tmp_path / engine))
        monkeypatch.setattr(source, "rows", lambda name: pytest.fail(f"{name} was read again to count it"))
        tables = events.cached(source, [220045, 223900, 50931], [10_000_001, 10_000_002], tmp_path / engine)
        found[engine] = {
            name: (rows, source.dropped[name], sorted(map(str, table.to_pyarrow().to_pylist())))
            for name, (table, rows) in tables.items()
        }
    assert found["duckdb"] == found["pyspark"]
    assert found["pyspark"]["chartevents"][1] == (suffix != ".parquet")  # the repeated header


@on_spark
def test_executors_that_write_elsewhere_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    con = connect("pyspark", memory="2GB", spill=tmp_path / "scratch", settings=QUICK)
    table = hold(con, "few_rows", pa.table({"a": [1]}))
    monkeypatch.setattr(spark, "place", lambda path: f"file://{tmp_path / 'other' / Path(path).name}")
    with pytest.raises(UserError, match="driver and executors share"):
        list(batches(con, table))


# ---- Without a session


def test_a_cluster_is_named_by_spark_submit_or_by_its_defaults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PYSPARK_GATEWAY_PORT", "PYSPARK_SUBMIT_ARGS", "SPARK_HOME", "SPARK_CONF_DIR"):
        monkeypatch.delenv(name, raising=False)
    assert not spark.has_master()
    (tmp_path / "spark-defaults.conf").write_text("# spark.master yarn\nspark.executor.memory 4g\n")
    monkeypatch.setenv("SPARK_CONF_DIR", str(tmp_path))
    assert not spark.has_master()
    (tmp_path / "spark-defaults.conf").write_text("spark.executor.memory 4g\nspark.master yarn\n")
    assert spark.has_master()
    monkeypatch.delenv("SPARK_CONF_DIR")
    monkeypatch.setenv("PYSPARK_SUBMIT_ARGS", "--master yarn pyspark-shell")
    assert spark.has_master()


def test_settings_are_those_of_spark() -> None:
    given = {"spark.master": "spark://host:7077", "spark.executor.instances": 4}
    assert FeaturesConfig(mimic_iv="a", out="b", spark=given).spark == given
    with pytest.raises(ValueError, match=r"such as spark\.master; got master"):
        FeaturesConfig(mimic_iv="a", out="b", spark={"master": "yarn"})


def test_a_path_without_a_scheme_is_of_this_machine_and_not_of_hdfs(tmp_path: Path) -> None:
    assert spark.place(tmp_path / "a b") == f"file://{tmp_path}/a b"
    assert spark.place("s3a://bucket/mimic") == "s3a://bucket/mimic"


@pytest.mark.parametrize(
    ("module", "words"),
    [
        ("py4j.protocol", "Total size of serialized results of 4 tasks is bigger than spark.driver.maxResultSize"),
        ("pyspark.errors", "java.lang.OutOfMemoryError: Java heap space"),
        ("duckdb", "Out of Memory Error: failed to allocate"),
    ],
)
def test_an_engine_without_memory_is_told_in_a_line(module: str, words: str) -> None:
    name = "OutOfMemoryException" if module == "duckdb" else "Py4JJavaError"
    error = type(name, (Exception,), {"__module__": module})
    with pytest.raises(UserError, match="ran out of memory") as told, named_by_the_engine():
        raise error(f"{words}\n\tat org.apache")
    assert "memory=" in str(told.value) and "\n" not in str(told.value)
