"""Runs of other versions, unfinished, damaged or edited give a page or a UserError, never a traceback."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from configs import UserError
from finetune.report.page import report
from finetune.report.runs import show
from finetune.run_folders import read_runs

HERE = ("vanilla", "film_only", "record_lstm")


@pytest.fixture
def runs(report_runs: list[Path], tmp_path: Path) -> Path:
    """A copy of one pretraining and two fusions, with their features."""
    for name in HERE:
        shutil.copytree(report_runs[0].parent / name, tmp_path / "runs" / name)
    shutil.copytree(report_runs[0].parents[1] / "features", tmp_path / "features")
    for path in (tmp_path / "runs").glob("*/config.yaml"):
        text = path.read_text(encoding="utf-8")
        path.write_text(text.replace(str(report_runs[0].parents[1]), str(tmp_path)), encoding="utf-8")
    return tmp_path / "runs"


def results(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def edit(runs: Path) -> None:
        for path in runs.glob("*/results.json"):
            content = json.loads(path.read_text(encoding="utf-8"))
            change(content)
            keys = ("split", "label", "subset", "fraction", "metric")
            content["rows"] = list({tuple(row.get(key) for key in keys): row for row in content["rows"]}.values())
            path.write_text(json.dumps(content), encoding="utf-8")

    return edit


def each_row(**values: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda content: [row.update(values) for row in content["rows"]]


def predictions(change: Callable[[pd.DataFrame], pd.DataFrame]) -> Callable[[Path], None]:
    def edit(runs: Path) -> None:
        for path in runs.glob("*/predictions/test.parquet"):
            change(pd.read_parquet(path)).to_parquet(path)

    return edit


def file(pattern: str, content: str) -> Callable[[Path], None]:
    def edit(runs: Path) -> None:
        for path in runs.parent.glob(pattern):
            path.write_text(content, encoding="utf-8")

    return edit


def without(*keys: str) -> Callable[[dict[str, Any]], Any]:
    return lambda content: [content["run"].pop(key) for key in keys]


PAGE = {
    "an older version's run keys": results(without("model", "encoder", "seed", "allow_leak", "warnings")),
    "an older version's rows": results(lambda c: [r.pop(k) for r in c["rows"] for k in ("subset", "fraction")]),
    "a newer version's rows": results(each_row(unit="study")),
    "nothing has a value": results(each_row(value=None, low=None, high=None)),
    "nothing has an interval": results(each_row(low=None, high=None)),
    "all values equal": results(each_row(value=1.0, low=1.0, high=1.0)),
    "validation only": results(each_row(split="val")),
    "no rows": results(lambda c: c.update(rows=[])),
    "labels with markup": results(each_row(label="<b>\"'&")),
    "labels without a name": results(each_row(label="")),
    "no AUROC": results(each_row(metric="kappa", label="los_hours")),
    "no predictions": lambda runs: [shutil.rmtree(path) for path in runs.glob("*/predictions")],
    "logits without a value": predictions(lambda t: t.assign(logit_mortality=float("nan"))),
    "logs without steps": file("runs/*/metrics.jsonl", '{"train/loss": 1.0}\n'),
    "empty logs": file("runs/*/metrics.jsonl", ""),
    "no config to speak of": file("runs/*/config.yaml", "{}"),
    "features that moved": lambda runs: shutil.rmtree(runs.parent / "features"),
    "films that moved": lambda runs: (runs.parent / "features" / "images.parquet").unlink(),
    "no features config": file("features/provenance.json", '{"config": null}'),
}  # fmt: skip


@pytest.mark.parametrize("odd", PAGE)
def test_odd_runs_give_a_page_and_a_list(odd: str, runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    PAGE[odd](runs)
    page = report([runs], runs.parent / "r.html").read_text(encoding="utf-8")
    show(runs)
    printed = capsys.readouterr().out
    for name in HERE:
        assert name in page and name in printed
    assert "<b>\"'&" not in page and "damaged" not in printed


REFUSED = {
    "images.parquet": file("features/images.parquet", "PAR1"),
    "series.safetensors": file("features/series.safetensors", "x"),
    "series.json": file("features/series.json", "[]"),
    "attrition.json": file("features/attrition.json", "{"),
    "results.json": results(lambda c: c["run"].update(gaps="x")),
    "logit_mortality": predictions(lambda t: t.assign(logit_mortality="x")),
    "encoder.json": file("runs/*/encoder/encoder.json", "[]"),
    "no predictions in it": predictions(lambda t: t.iloc[:0]),
    "rows stand twice": predictions(lambda t: pd.concat([t, t])),
    "columns missing: subject_id": predictions(lambda t: t.drop(columns="subject_id")),
    "metrics.jsonl, line 1": file("runs/*/metrics.jsonl", '{"step": 1, "train/loss": "x"}\n'),
    "probe.jsonl, line 1: `step`": file("runs/*/probe.jsonl", '{"step": null, "linear/auroc": 0.5}\n'),
    "provenance.json: `versions`": file("runs/*/provenance.json", '{"versions": [1]}'),
    "config.yaml: `features`: got 5, wanted text": file("runs/*/config.yaml", "features: 5\n"),
    "config.yaml: got a list of 0": file("runs/*/config.yaml", "[]"),
    "images.parquet: no rows": lambda runs: pd.DataFrame(columns=["dicom_id", "subject_id", "split"]).to_parquet(
        runs.parent / "features" / "images.parquet"
    ),
    "attrition.json: `exclusions.0`": file("features/attrition.json", '{"exclusions": [1], "counts": 5}'),
    "attrition.json: got 5": file("features/attrition.json", "5"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_damaged_is_named(what: str, runs: Path) -> None:
    REFUSED[what](runs)
    with pytest.raises(UserError, match=what):
        report([runs], runs.parent / "r.html")


@pytest.mark.parametrize("kept", HERE)
def test_any_run_alone_gives_a_page(kept: str, runs: Path) -> None:
    page = report([runs / kept], runs.parent / "r.html").read_text(encoding="utf-8")
    assert len(read_runs([runs / kept])) == 1 and "<figure" in page
