"""Run folders for tests of the report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml
from safetensors.numpy import save_file
from scipy.special import expit

from ehr_features.files import provenance, write_json
from ehr_features.schema import DEATHS
from finetune.metrics import evaluate
from finetune.results import write_predictions, write_results
from tests.written import encoder_json, series_json

FINDINGS = ["Cardiomegaly", "Edema", "Pleural Effusion", "Pneumothorax", "Support Devices"]
HOSTILE = "<script>alert('x')</script>"


def make_features(folder: Path, rng: np.random.Generator, subjects: int = 240) -> pd.DataFrame:
    """A small features/ folder of the contract; its films."""
    folder.mkdir(parents=True)
    split = pd.Series(rng.choice(["train", "val", "test"], subjects, p=[0.5, 0.15, 0.35]), name="split")
    people = pd.DataFrame({"subject_id": np.arange(subjects) + 10_000_000, "split": split})
    films = people.loc[np.repeat(people.index, 3)].reset_index(drop=True)
    films["dicom_id"] = [f"film{i:05d}" for i in range(len(films))]
    for column, values in {"sex": ["F", "M"], "view": ["AP", "PA"]}.items():
        films[column] = rng.choice(values, len(films))
    films["age_years"] = rng.integers(20, 90, len(films)).astype(float)
    films.to_parquet(folder / "images.parquet")
    stays = people.assign(stay_id=np.arange(subjects) + 30_000_000, los_hours=60.0)
    stays.to_parquet(folder / "stays.parquet")
    (folder / "samples").mkdir()
    samples = stays.assign(
        sample_id=[f"{stay}_48" for stay in stays["stay_id"]], mortality=(rng.random(subjects) < 0.3).astype(int)
    )
    samples["dicom_id"] = [f"film{3 * i:05d}" if i % 3 else None for i in range(subjects)]
    samples.to_parquet(folder / "samples" / "mortality.parquet")
    observed = (rng.random((5000, 4)) < np.array([0.9, 0.6, 0.2, 0.02])).astype(np.uint8)
    offsets = np.linspace(0, 5000, subjects + 1).astype(np.int64)
    series = {"stay_id": stays["stay_id"].to_numpy(), "offsets": offsets, "observed": observed}
    save_file(series | {"values": np.zeros((5000, 2), np.float32)}, folder / "series.safetensors")
    write_json(folder / "series.json", series_json(["a", "b"], ["Heart Rate", "Glucose", "pH", "Height"]))
    steps = [
        {"table": "icu stays", "before": 300, "after": 260, "why": "age under 18 at intime", "num_ids": 40},
        {
            "table": "icu stays",
            "before": 260,
            "after": subjects,
            "why": f"outtime before intime {HOSTILE}",
            "num_ids": 20,
        },
    ]
    deaths = {"deathtime on another day than dod": 3, "dod before admission": 0}
    write_json(folder / "attrition.json", {"exclusions": steps, "counts": {DEATHS: deaths}})
    write_json(folder / "provenance.json", provenance({"mimic_iv": str(folder.parent / "data" / "mimic-iv")}))
    return films


def make_run(folder: Path, config: dict[str, Any]) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    write_json(folder / "provenance.json", provenance(config))
    return folder


def make_pretraining(folder: Path, features: Path, rng: np.random.Generator, collapsed: bool = False) -> Path:
    make_run(folder, {"features": str(features), "seed": 0, "loss": {"prototypes": 128}})
    steps = np.arange(10, 2001, 10)
    with (folder / "metrics.jsonl").open("w", encoding="utf-8") as file:
        for step in steps:
            rank = 1.7 if collapsed else 20 + 20 * (1 - np.exp(-step / 400))
            line = {
                "step": int(step),
                "train/loss": float(5.2 - 1.6 * (1 - np.exp(-step / 500)) + 0.05 * rng.standard_normal()),
                "train/effective_rank": float(rank + 0.3 * rng.standard_normal()),
                "train/prototypes_used": float(min(128, 60 + step / 20)),
                "train/grad_norm": float(1 + rng.random()),
                "train/lr": float(1e-3 * min(1, step / 200)),
            }
            file.write(json.dumps(line) + "\n")
    with (folder / "probe.jsonl").open("w", encoding="utf-8") as file:
        for step in range(400, 2001, 400):
            values = {"linear/auroc": 0.6 + step / 12000, "knn/auroc": 0.58 + step / 14000, "linear/pool": "cls"}
            file.write(json.dumps({"step": step, **values}) + "\n")
    (folder / "encoder").mkdir()
    readable = {
        "sex": {"metric": "auroc", "value": 0.71, "chance": 0.5},
        "age_years": {"metric": "r2", "value": 0.2, "chance": 0.0},
    }
    record = {"ehr_groups": {"age": "study"}, "ehr": {"use": "condition"}} if collapsed else {"ehr_groups": {}}
    meta = encoder_json(width=96, method="msn", readability=readable, **record)
    write_json(folder / "encoder" / "encoder.json", meta)
    return folder


def make_evaluation(
    folder: Path, features: Path, rows: pd.DataFrame, names: list[str], skill: float, **run: Any
) -> Path:
    """An evaluation whose scores carry `skill` of the labels; the same labels for the same rows."""
    make_run(folder, {"features": str(features), "encoder": str(run.get("encoder")), "seed": 0})
    truth, noise = np.random.default_rng(5), np.random.default_rng(abs(hash(folder.name)) % 1000)
    prevalence = np.linspace(0.35, 0.1, len(names))
    labels = (truth.random((len(rows), len(names))) < prevalence).astype(float)
    logits = skill * (labels - 0.5) + noise.standard_normal(labels.shape) - 1.0
    tables = []
    subjects = rows["subject_id"].to_numpy()
    for subset, chosen in {"all": np.full(len(rows), True), **subsets(rows)}.items():
        result = evaluate(labels[chosen], expit(logits[chosen]), names=names, groups=subjects[chosen], samples=50)
        tables.append(result.assign(split="test", subset=subset, fraction=1.0))
    for fraction in (0.01, 0.1) if run["task"] == "findings" else ():
        weak = expit(logits + (0.5 - fraction) * 2 * noise.standard_normal(labels.shape))
        result = evaluate(labels, weak, names=names, groups=subjects, samples=50)
        tables.append(result.assign(split="test", subset="all", fraction=fraction))
    gaps = [{"field": "sex", "higher": "F", "lower": "M", "difference": 0.07, "low": 0.01, "high": 0.13}]
    about: dict[str, Any] = {"gaps": gaps} if run["task"] == "findings" else {}
    about |= {"model": "linear", "seed": 0, "allow_leak": False, "warnings": [], "encoder": None, **run}
    if run["task"] == "findings":
        tables.append(tables[0].assign(split="test_radiologist"))
    else:
        tables.append(tables[0].assign(subset="without films"))
        added = tables[0].query("metric == 'auroc'").assign(metric="auroc_difference", value=0.04, low=-0.01, high=0.09)
        tables += [added.assign(subset=f"paired, less {name}") for name in ("record_gbm", "context", "another")]
    write_results(folder, about, pd.concat(tables))
    id_ = "dicom_id" if run["task"] == "findings" else "sample_id"
    write_predictions(folder, "test", rows[[id_, "subject_id"]], pd.DataFrame(labels, columns=names), logits)
    return folder


def subsets(rows: pd.DataFrame) -> dict[str, np.ndarray]:
    if "sex" not in rows:
        return {"paired": rows["dicom_id"].notna().to_numpy()}
    groups = {f"sex={v}": (rows["sex"] == v).to_numpy() for v in ("F", "M")}
    return groups | {f"view: {v} -> PA": (rows["view"] == "PA").to_numpy() for v in ("AP", "PA")}


def make_runs(folder: Path) -> list[Path]:
    """Two pretrainings, four probes, three fusions on one features folder with a truth.json."""
    rng = np.random.default_rng(0)
    features, runs = folder / "features", folder / "runs"
    films = make_features(features, rng)
    bayes = {
        "findings": dict.fromkeys(FINDINGS, 0.93),
        "mortality": {"record": 0.84, "film": 0.75, "both": 0.9},
    }
    write_json(folder / "data" / "truth.json", {"bayes": bayes})
    test = films[films["split"] == "test"].reset_index(drop=True)
    stays = pd.read_parquet(features / "samples" / "mortality.parquet")
    stays = stays[stays["split"] == "test"].reset_index(drop=True)
    made = [
        make_pretraining(runs / "vanilla", features, rng),
        make_pretraining(runs / "ehr", features, rng, collapsed=True),
    ]
    for name, skill in {"pixels": 0.8, "random": 0.5, "probe_vanilla": 1.4, "probe_ehr": 1.6}.items():
        encoder = {"pixels": "pixels", "random": "random:vit_tiny_patch16_224"}.get(name, f"runs/{name[6:]}/encoder")
        about: dict[str, Any] = {"task": "findings", "encoder": encoder, "unit": "film"}
        if name.startswith("probe"):
            about["compared_by"] = {"weights": "step 10", "record": ["age"] if name == "probe_ehr" else []}
        made.append(make_evaluation(runs / name, features, test, FINDINGS, skill, **about))
    for name, skill in {"record_lstm": 1.4, "film_only": 1.0, "medfuse": 1.9}.items():
        about = {"task": "mortality", "model": name, "encoder": "runs/ehr/encoder"}
        if name == "medfuse":
            about |= {"allow_leak": True, "warnings": [f"LEAK (allow_leak=true): 3 subjects {HOSTILE}"]}
        made.append(make_evaluation(runs / name, features, stays, ["mortality"], skill, **about))
    return made


@pytest.fixture(scope="session")
def report_runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return make_runs(tmp_path_factory.mktemp("report"))
