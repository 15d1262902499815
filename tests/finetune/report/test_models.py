"""Names of models from configs, encoder.json and results.json; what the user trained beside its baselines."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from safetensors.numpy import save_file

from ehr_features.files import write_json
from finetune.names import architecture, counted, model_name, named, pretrained_name
from finetune.report.verdict import lead
from finetune.run_folders import Run, read_runs
from tests.written import encoder_json

TINY = {"arch": "vit_tiny_patch16_224"}


@pytest.mark.parametrize(
    ("encoder", "name"),
    [
        ({**TINY, "method": "msn", "ehr_groups": {"age": "study"}, "ehr": {"use": "condition"}}, "EHR-conditioned MSN"),
        ({**TINY, "method": "msn", "ehr_groups": {"age": "study"}}, "EHR-conditioned MSN"),
        ({**TINY, "method": "simclr", "ehr_groups": ["age"], "ehr": {"use": "contrast"}}, "EHR-contrasted SimCLR"),
        ({**TINY, "method": "mae", "ehr_groups": ["age"], "ehr": {"use": "predict"}}, "EHR-predicting MAE"),
        ({**TINY, "method": "ibot", "ehr_groups": {}}, "iBOT on films alone"),
        ({**TINY, "method": "mine.py:MyMethod", "ehr_groups": {}}, "MyMethod on films alone"),
        ({**TINY, "method": "dino"}, "DINO"),
        (TINY, "Pretrained encoder"),
    ],
)
def test_a_pretraining_is_named_by_its_method_and_its_use_of_the_record(encoder: dict[str, Any], name: str) -> None:
    assert pretrained_name(encoder) == f"{name}, ViT-Tiny"


@pytest.mark.parametrize(
    ("arch", "args", "weights", "name"),
    [
        ("vit_small_patch16_224", {"num_heads": 6}, 22_000_000, "ViT-Small"),
        ("deit3_base_patch16_224", {}, 0, "ViT-Base"),
        ("densenet121", {}, 7_000_000, "DenseNet-121"),
        ("resnet18", {"layers": [1, 1, 1, 1]}, 700_000, "ResNet (small)"),
        ("resnet18", {"layers": [9, 9, 9, 9]}, 70_000_000, "ResNet (own size)"),
        ("convnext_tiny", {}, 28_000_000, "convnext_tiny"),
    ],
)
def test_an_architecture_has_the_name_and_size_that_papers_give(arch: str, args: Any, weights: int, name: str) -> None:
    assert architecture({"arch": arch, "model_args": args, "parameters": weights}) == name


def by_folder(runs: list[Run]) -> dict[str, str]:
    return {run.name: run.called for run in named(runs)}


def test_every_run_of_a_set_has_a_name_of_its_own_in_its_task(report_runs: list[Path]) -> None:
    assert by_folder(read_runs(report_runs)) == {
        "vanilla": "MSN on films alone, ViT-Tiny",
        "ehr": "EHR-conditioned MSN, ViT-Tiny",
        "pixels": "Raw pixels, 16x16",
        "random": "Random weights, ViT-Tiny",
        "probe_vanilla": "MSN on films alone, ViT-Tiny",
        "probe_ehr": "EHR-conditioned MSN, ViT-Tiny",
        "record_lstm": "Record only, LSTM",
        "film_only": "Film only",
        "medfuse": "Film and record, MedFuse",
    }


def test_runs_of_one_name_get_what_differs_and_at_last_their_folder(report_runs: list[Path]) -> None:
    runs = {run.name: run for run in read_runs(report_runs)}
    fused, probe = runs["medfuse"], runs["probe_ehr"]

    def like(run: Run, name: str, **result: Any) -> Run:
        return replace(run, name=name, result={**run.result, **result})

    seeds = by_folder([like(fused, "a", seed=1), like(fused, "b", seed=2)])
    assert seeds == {f: f"Film and record, MedFuse, seed {s}" for f, s in (("a", 1), ("b", 2))}
    heads = by_folder([like(probe, "a", model="knn"), like(probe, "b", model="linear")])
    assert heads == {f: f"EHR-conditioned MSN, ViT-Tiny, {m}" for f, m in (("a", "knn"), ("b", "linear"))}
    alike = by_folder([like(fused, "a"), like(fused, "b"), like(fused, "c", control="context")])
    assert alike["a"].endswith("MedFuse [a]") and alike["b"].endswith("MedFuse [b]")
    assert alike["c"] == "Film and record, MedFuse, no pixels"


def test_the_weights_file_tells_the_size_and_the_log_of_results_what_is_gone(
    report_runs: list[Path], tmp_path: Path
) -> None:
    run = next(run for run in read_runs(report_runs) if run.name == "probe_ehr")
    (tmp_path / "encoder").mkdir()
    meta = encoder_json(arch="resnet18", model_args={"layers": [1, 1, 1, 1]}, method="simclr", ehr_groups={})
    write_json(tmp_path / "encoder" / "encoder.json", meta)
    save_file({"w": np.zeros((3, 4), np.float32)}, tmp_path / "encoder" / "encoder.safetensors")
    for given in (tmp_path, tmp_path / "encoder"):
        there = replace(run, config={"encoder": str(given)}, result={**run.result, "encoder": str(given)})
        assert model_name(there) == "SimCLR on films alone, ResNet (small)"
    by = {"method": "byol", "arch": "resnet50", "record": ["age"], "record_use": "predict"}
    gone = {**run.result, "encoder": "moved/away/encoder", "compared_by": by}
    moved = replace(run, config={"encoder": "moved/away"}, result=gone)
    assert model_name(moved) == "EHR-predicting BYOL, ResNet-50"
    assert model_name(replace(moved, result={**gone, "compared_by": {}})) == "Weights of away"


def test_rows_are_counted_in_films_studies_and_stays(report_runs: list[Path]) -> None:
    runs = {run.name: run for run in read_runs(report_runs)}
    head = runs["medfuse"].headline(subset="paired")
    assert head and counted(runs["medfuse"], head, "paired") == f"{head['positives']} of {head['n']} stays with a film"
    probe = runs["probe_ehr"]
    assert counted(probe, {"n": 1022}) == "1,022 films"
    assert counted(replace(probe, result={**probe.result, "unit": "study"}), {"n": 1022}) == "1,022 studies"


def test_a_tile_leads_with_what_was_trained_and_validation_chooses_among_several(report_runs: list[Path]) -> None:
    runs = {run.name: run for run in read_runs(report_runs)}
    films = lead("findings", [runs[name] for name in ("pixels", "random", "probe_vanilla", "probe_ehr")])
    assert films and films.run.name == "probe_ehr"
    assert [run.name for run in films.baselines] == ["probe_vanilla", "random", "pixels"]

    def valued(name: str, value: float) -> Run:
        run, test = runs["medfuse"], runs["medfuse"].rows
        val = test[test["split"] == "test"].assign(split="val", value=value)
        return replace(run, name=name, rows=pd.concat([test, val]))

    fused = lead("mortality", [runs["record_lstm"], runs["film_only"], valued("a", 0.6), valued("b", 0.7)])
    assert fused and fused.run.name == "b" and fused.subset == "paired"
    assert [run.name for run in fused.baselines] == ["record_lstm", "film_only"]
    assert lead("mortality", [runs["record_lstm"]]) is None
