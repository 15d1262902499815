"""The whole pipeline with its commands, as typed by a user: synthetic and real input, one and two processes."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import timm
import torch
from safetensors.torch import load_file

from tests import forked

pytestmark = pytest.mark.slow
CONFIGS = Path(__file__).resolve().parents[1] / "configs" / "demo"
SHORT = ["optim.steps=4", "optim.batch_size=16", "log_every=1", "views.num_focal=2"]
QUICK_PROBE = ["epochs=5", "samples=50"]
QUICK_FUSE = ["epochs=3", "samples=50"]


def command(*words: object, code: int = 0, env: dict[str, str] | None = None) -> str:
    """Run `python -m words` and return its output; fail with the output if the exit code differs."""
    own = os.environ | {"OMP_NUM_THREADS": "1"} | (env or {})
    done = forked.run(list(words), env=own)
    assert done.returncode == code, f"{words}: exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    assert code == 0 or "Traceback" not in done.stderr, done.stderr
    return done.stdout + done.stderr


def results(run: Path) -> pd.DataFrame:
    return pd.DataFrame(json.loads((run / "results.json").read_text())["rows"])


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Synthetic tables and films, features/ and store/."""
    house = tmp_path_factory.mktemp("house")
    data = house / "data"
    command("ehr_features", "demo", data, "--subjects", 160, "--seed", 3)
    tables = [f"mimic_iv={data / 'mimic-iv'}", f"mimic_cxr={data / 'mimic-cxr'}", f"mimic_ed={data / 'mimic-iv-ed'}"]
    command("ehr_features", "build", CONFIGS / "features.yaml", *tables, f"out={house / 'features'}")
    command("pretrain", "images", CONFIGS / "images.yaml", tables[1], f"out={house / 'store'}")
    return house


def pretrain(house: Path, out: Path, *keys: str, processes: int = 1, code: int = 0) -> str:
    inputs = [f"features={house / 'features'}", f"store={house / 'store'}", f"out={out}", *SHORT, *keys]
    words: Sequence[object] = ["pretrain", "train", CONFIGS / "pretrain_vit_tiny.yaml", *inputs]
    if processes > 1:
        start = ["configs.launch", "--processes", str(processes), "--"]
        return command(*start, *words, "--processes", str(processes), code=code)
    return command(*words, code=code)


@pytest.fixture(scope="module")
def run(house: Path) -> Path:
    """A short EHR-conditioned pretraining."""
    out = house / "runs" / "ehr"
    pretrain(house, out)
    return out


def loads_strictly_with_timm(encoder: Path) -> None:
    meta = json.loads((encoder / "encoder.json").read_text())
    model = timm.create_model(meta["arch"], num_classes=0, in_chans=meta["in_chans"], **meta["model_args"])
    model.load_state_dict(load_file(encoder / "encoder.safetensors"))
    films = torch.zeros(2, meta["in_chans"], meta["image_size"], meta["image_size"])
    assert model.eval()(films).shape == (2, meta["width"])


def test_features_to_report_on_synthetic_input(house: Path, run: Path) -> None:
    loads_strictly_with_timm(run / "encoder")
    inputs = [f"features={house / 'features'}", f"store={house / 'store'}", f"encoder={run}"]
    probe, fused = house / "runs/probe", house / "runs/medfuse"
    command("finetune", "probe", CONFIGS / "probe_linear.yaml", *inputs, f"out={probe}", *QUICK_PROBE)
    command("finetune", "fuse", CONFIGS / "fuse_mortality.yaml", *inputs, f"out={fused}", "model=medfuse", *QUICK_FUSE)
    phenotypes = house / "runs/phenotypes"
    command(
        "finetune", "fuse", CONFIGS / "fuse_phenotypes.yaml", *inputs, f"out={phenotypes}", "model=medfuse", *QUICK_FUSE
    )
    for folder in (probe, fused, phenotypes):
        rows = results(folder)
        assert {"val", "test"} <= set(rows.split) and {"auroc", "auprc"} <= set(rows.metric)
        for split in ("val", "test"):
            table = pd.read_parquet(folder / "predictions" / f"{split}.parquet")
            assert "subject_id" in table and any(c.startswith("logit_") for c in table)
    assert {f"label_phenotype_{ccs}" for ccs in (2, 49, 249)} <= set(
        pd.read_parquet(phenotypes / "predictions/test.parquet").columns
    )
    report = house / "report.html"
    command("finetune", "report", run, probe, fused, phenotypes, "--out", report)
    page = report.read_text(encoding="utf-8")
    assert page.count("<svg") >= 3 and "medfuse" in page


@pytest.mark.browser
def test_the_report_of_these_runs_opens_on_a_page_and_on_a_phone(
    house: Path, run: Path, tmp_path: Path, chromium: Any
) -> None:
    inputs = [f"features={house / 'features'}", f"store={house / 'store'}", f"encoder={run}"]
    probe, page = house / "runs/probe_seen", tmp_path / "report.html"
    command("finetune", "probe", CONFIGS / "probe_linear.yaml", *inputs, f"out={probe}", *QUICK_PROBE)
    command("finetune", "report", run, probe, "--with-films", "--out", page)
    _, console, asked = chromium.visit(page, tmp_path / "profile", 1280)
    assert not console and not asked
    for width in (1280, 390):
        seen = chromium.measure(page, tmp_path / f"profile{width}", width)
        figures = {figure["id"]: figure for figure in seen["figures"]}
        assert seen["wide"] <= width and {"figure-flow", "figure-labels-findings", "figure-map-ehr"} <= set(figures)
        assert all(f["drawn"] and f["marks"] and f["right"] <= width for f in figures.values())


@pytest.mark.parametrize("shuffled", [False, True])
def test_the_planted_findings_are_learned_and_shuffled_ones_are_not(tmp_path: Path, shuffled: bool) -> None:
    data, features, store = tmp_path / "data", tmp_path / "features", tmp_path / "store"
    command("ehr_features", "demo", data, "--subjects", 300, "--seed", 3, *["--shuffled"] * shuffled)
    tables = [f"mimic_iv={data / 'mimic-iv'}", f"mimic_cxr={data / 'mimic-cxr'}"]
    command("ehr_features", "build", CONFIGS / "features.yaml", *tables, f"out={features}")
    command("pretrain", "images", CONFIGS / "images.yaml", tables[1], f"out={store}")
    inputs = [f"features={features}", f"store={store}", "encoder=pixels", f"out={tmp_path / 'probe'}"]
    command("finetune", "probe", CONFIGS / "probe_linear.yaml", *inputs, "samples=200")
    rows = results(tmp_path / "probe")
    wanted = (rows.split == "test") & (rows.label == "macro") & (rows.metric == "auroc") & (rows.subset == "all")
    macro = rows[wanted].iloc[0]
    assert macro.low < 0.5 < macro.high if shuffled else macro.low > 0.5


@pytest.mark.parametrize("shortcut", [0, 1])
def test_a_view_shortcut_is_caught_by_the_shift_and_no_shortcut_is_not(tmp_path: Path, shortcut: int) -> None:
    data, features, store = tmp_path / "data", tmp_path / "features", tmp_path / "store"
    more = ["--subjects", 250, "--seed", 3, "--film-size", 64, "--view-shortcut", shortcut]
    command("ehr_features", "demo", data, *more)
    tables = [f"mimic_iv={data / 'mimic-iv'}", f"mimic_cxr={data / 'mimic-cxr'}"]
    command("ehr_features", "build", CONFIGS / "features.yaml", *tables, f"out={features}")
    command("pretrain", "images", CONFIGS / "images.yaml", tables[1], f"out={store}")
    inputs = [f"features={features}", f"store={store}", "encoder=pixels", f"out={tmp_path / 'probe'}"]
    text = command("finetune", "probe", CONFIGS / "probe_linear.yaml", *inputs, "samples=200", "--shift", "view")
    shift = json.loads((tmp_path / "probe/results.json").read_text())["run"]["shift"]
    across = shift["comparison"][0]
    assert across["label"] == "macro" and "shift: view AP -> PA" in text
    if shortcut:
        assert across["high"] < -0.2 and shift["drop"]["low"] > 0.3
    else:
        assert across["high"] > 0 and shift["drop"]["low"] < 0.15


def test_a_running_pretraining_is_watched_and_its_probes_are_drawn(house: Path) -> None:
    out = house / "runs" / "watched"
    inputs = [f"features={house / 'features'}", f"store={house / 'store'}"]
    keys = ["optim.steps=24", "optim.batch_size=16", "views.num_focal=2", "export_every_epochs=0.5", f"out={out}"]
    words = ["pretrain", "train", CONFIGS / "pretrain_vit_tiny.yaml", *inputs, *keys]
    running = subprocess.Popen([sys.executable, "-m", *map(str, words)], env=os.environ | {"OMP_NUM_THREADS": "1"})
    try:
        while not (out / "config.yaml").is_file() and running.poll() is None:
            time.sleep(0.2)
        probe = ["finetune", "probe", CONFIGS / "probe_linear.yaml", *inputs, "epochs=5", "--watch", out]
        assert "has ended" in command(*probe)
    finally:
        running.wait()
    assert running.returncode == 0
    lines = [json.loads(line) for line in (out / "probe.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in lines]
    assert steps[-1] == 24 and steps == sorted(set(steps)), steps
    assert all(0 < line[key] < 1 for line in lines for key in ("linear/auroc", "knn/auroc"))
    command("finetune", "report", out, "--out", house / "watched.html")
    assert "Quality: linear probe, val AUROC" in (house / "watched.html").read_text(encoding="utf-8")


def test_one_split_for_films_and_stays(house: Path) -> None:
    films, stays = (pd.read_parquet(house / f"features/{name}.parquet") for name in ("images", "stays"))
    both = pd.concat([films[["subject_id", "split"]], stays[["subject_id", "split"]]]).drop_duplicates()
    assert both.subject_id.is_unique and set(both.split) == {"train", "val", "test"}
    seen = pd.read_parquet(house / "features/samples/mortality.parquet").merge(stays, on="stay_id")
    assert (seen.split_x == seen.split_y).all()


def test_pretraining_sees_train_subjects_only(house: Path, run: Path) -> None:
    films = pd.read_parquet(house / "features/images.parquet")
    seen = set(pd.read_parquet(run / "seen_subjects.parquet").subject_id)
    assert seen and seen <= set(films.subject_id[films.split == "train"])


def test_two_processes_train_one_model(house: Path) -> None:
    out = house / "runs" / "two"
    text = pretrain(house, out, processes=2)
    assert "2 x cpu" in text
    steps = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert steps[-1]["step"] == 4
    loads_strictly_with_timm(out / "encoder")


def test_another_world_size_than_asked_for_is_refused(house: Path) -> None:
    inputs = [f"features={house / 'features'}", f"store={house / 'store'}", f"out={house / 'runs/none'}", *SHORT]
    words = ["pretrain", "train", CONFIGS / "pretrain_vit_tiny.yaml", *inputs, "--processes", 2]
    assert "found 1" in command(*words, code=2)


def test_a_run_folder_of_another_config_is_refused(house: Path, run: Path) -> None:
    text = pretrain(house, run, "optim.lr=0.1", code=2)
    assert "optim.lr" in text and "out=" in text


def test_an_encoder_that_saw_test_subjects_is_refused(house: Path, run: Path, tmp_path: Path) -> None:
    """Fine-tuning on another split than that of pretraining."""
    data, features = house / "data", tmp_path / "features"
    tables = [f"mimic_iv={data / 'mimic-iv'}", f"mimic_cxr={data / 'mimic-cxr'}", f"out={features}", "seed=99"]
    command("ehr_features", "build", CONFIGS / "features.yaml", *tables)
    inputs = [f"features={features}", f"store={house / 'store'}", f"encoder={run}", *QUICK_PROBE]
    words = ["finetune", "probe", CONFIGS / "probe_linear.yaml", *inputs]
    assert "allow_leak" in command(*words, f"out={tmp_path / 'refused'}", code=2)
    command(*words, f"out={tmp_path / 'allowed'}", "allow_leak=true")
    assert json.loads((tmp_path / "allowed/results.json").read_text())["run"]["warnings"]


def test_missing_inputs_are_named_and_leave_nothing(house: Path, run: Path, tmp_path: Path) -> None:
    for words in (
        ["ehr_features", "build", CONFIGS / "features.yaml", f"mimic_iv={tmp_path}", f"out={tmp_path / 'f'}"],
        ["pretrain", "images", CONFIGS / "images.yaml", f"mimic_cxr={tmp_path}", f"out={tmp_path / 's'}"],
        ["pretrain", "train", CONFIGS / "pretrain_vit_tiny.yaml", f"features={tmp_path}", f"out={tmp_path / 'r'}"],
        ["finetune", "probe", CONFIGS / "probe_linear.yaml", f"features={tmp_path}", f"out={tmp_path / 'p'}"],
        ["finetune", "fuse", CONFIGS / "fuse_mortality.yaml", f"features={tmp_path}", f"out={tmp_path / 'q'}"],
        ["finetune", "report", tmp_path / "nowhere", "--out", tmp_path / "report.html"],
    ):
        text = command(*words, code=2)
        assert "error: " in text and len(text.splitlines()) < 15
        assert not (tmp_path / "report.html").exists()
    broken = tmp_path / "encoder"
    broken.mkdir()
    meta = json.loads((run / "encoder/encoder.json").read_text())
    (broken / "encoder.safetensors").write_bytes((run / "encoder/encoder.safetensors").read_bytes())
    (broken / "encoder.json").write_text(json.dumps(meta | {"arch": "resnet18", "model_args": {}}))
    inputs = [
        f"features={house / 'features'}",
        f"store={house / 'store'}",
        f"encoder={broken}",
        f"out={tmp_path / 'e'}",
    ]
    assert "resnet18" in command("finetune", "probe", CONFIGS / "probe_linear.yaml", *inputs, code=2)


@pytest.mark.real
def test_raw_tables_to_fused_predictions_on_the_real_demo(shared: Path, tmp_path: Path) -> None:
    tables = [f"mimic_iv={shared / 'data/mimic-iv-demo-2.2'}", f"mimic_cxr={shared / 'data/mimic-cxr-linked'}"]
    features, store = tmp_path / "features", tmp_path / "store"
    command("ehr_features", "build", CONFIGS / "features.yaml", *tables, f"out={features}")
    films, stays = (pd.read_parquet(features / f"{name}.parquet") for name in ("images", "stays"))
    assert (len(films), films.subject_id.nunique(), len(stays)) == (538, 351, 140)
    mortality = pd.read_parquet(features / "samples/mortality.parquet")
    assert (len(mortality), mortality.mortality.sum()) == (74, 12)
    provenance = (features / "provenance.json").read_text()
    for count in ("668862", "107727"):
        assert count in provenance.replace(",", "")
    command("pretrain", "images", CONFIGS / "images.yaml", tables[1], f"out={store}")
    inputs = [f"features={features}", f"store={store}"]
    run = tmp_path / "runs/pretrain"
    command("pretrain", "train", CONFIGS / "pretrain_vit_tiny.yaml", *inputs, f"out={run}", *SHORT)
    probe = tmp_path / "runs/probe"
    command("finetune", "probe", CONFIGS / "probe_linear.yaml", *inputs, f"encoder={run}", f"out={probe}", *QUICK_PROBE)
    runs = [run, probe]
    for model in ("record_lstm", "film_only", "medfuse"):
        runs.append(tmp_path / "runs" / model)
        words = ["finetune", "fuse", CONFIGS / "fuse_mortality.yaml", *inputs, f"encoder={run}", f"out={runs[-1]}"]
        command(*words, f"model={model}", *QUICK_FUSE)
        assert len(pd.read_parquet(runs[-1] / "predictions/test.parquet")) > 0
    command("finetune", "report", *runs, "--out", tmp_path / "report.html")
    assert (tmp_path / "report.html").stat().st_size > 20_000
