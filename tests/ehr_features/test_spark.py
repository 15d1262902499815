"""engine: pyspark gives the same features as DuckDB."""

from __future__ import annotations

import shutil

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import load_file

from ehr_features.build import build
from ehr_features.config import FeaturesConfig, NotesConfig
from ehr_features.demo import generate as demo
from ehr_features.notes.write import write_notes

pytestmark = [pytest.mark.spark, pytest.mark.slow]


@pytest.fixture(scope="module", autouse=True)
def needs():
    pytest.importorskip("pyspark", reason="pyspark is not installed (extra `spark`)")
    if shutil.which("java") is None:
        pytest.skip("Java is not on this machine")
    yield
    from pyspark.sql import SparkSession

    if session := SparkSession.getActiveSession():
        session.stop()


@pytest.mark.real
@pytest.mark.filterwarnings("ignore")  # py4j leaves its sockets to the end
def test_spark_equals_duckdb_on_the_real_demo(shared, tmp_path):
    tables = {"mimic_iv": str(shared / "data/mimic-iv-demo-2.2"), "mimic_cxr": str(shared / "data/mimic-cxr-linked")}
    tasks = ("mortality", "phenotypes", "decompensation", "length_of_stay")
    made = {
        engine: build(FeaturesConfig(**tables, out=tmp_path / engine, engine=engine, memory="2GB", tasks=tasks))
        for engine in ("duckdb", "pyspark")
    }
    for path in made["duckdb"].rglob("*.parquet"):
        other = made["pyspark"] / path.relative_to(made["duckdb"])
        pd.testing.assert_frame_equal(pd.read_parquet(path), pd.read_parquet(other))
    a, b = (load_file(folder / "series.safetensors") for folder in made.values())
    for key in a:
        np.testing.assert_array_equal(a[key], b[key])


@pytest.mark.filterwarnings("ignore")
def test_spark_writes_the_notes_that_duckdb_writes(tmp_path):
    demo.generate(tmp_path / "raw", subjects=60, seed=3, film_size=32, leak=0.5)
    raw = {f"mimic_{key}": str(tmp_path / "raw" / f"mimic-{name}") for key, name in (("iv", "iv"), ("ed", "iv-ed"))}
    cxr = str(tmp_path / "raw/mimic-cxr")
    features = build(FeaturesConfig(**raw, mimic_cxr=cxr, out=tmp_path / "features", tasks=("mortality",)))
    made = [
        write_notes(NotesConfig(features=features, **raw, out=tmp_path / engine, engine=engine, memory="2GB"))
        for engine in ("duckdb", "pyspark")
    ]
    for name in ("notes.parquet", "unfiltered.parquet"):
        assert pq.read_table(made[0] / name).equals(pq.read_table(made[1] / name)) and pq.read_table(made[0] / name)
    assert (made[0] / "attrition.json").read_bytes() == (made[1] / "attrition.json").read_bytes()
