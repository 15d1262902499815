"""The loop on two dozen small films: what it reads, writes, repeats, refuses."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors.torch import load_file

from configs import UserError, load
from configs.signals import Stopped
from pretrain import build, run, train
from pretrain import data as bt
from pretrain import data as loader
from pretrain import encoder as enc
from pretrain.config import ImagesConfig, PretrainConfig
from pretrain.data import Partners
from pretrain.run import load_checkpoint
from pretrain.store import Store, pack

NUM = 24
SMALL = {
    "encoder": {"arch": "vit_tiny_patch16_224", "image_size": 32, "model_args": {"embed_dim": 24, "depth": 2}},
    "views": {"num_focal": 2, "focal_size": 16},
    "loss": {"prototypes": 8},
    "head": {"hidden": 16, "out": 8},
    "optim": {"batch_size": 8, "steps": 6, "lr_batch": None, "warmup_steps": 2},
}
SMALL["encoder"]["model_args"]["num_heads"] = 2


@pytest.fixture(autouse=True)
def fresh_accelerator():
    """accelerate keeps its precision for the process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """store/ and features/ of 24 films of 8 subjects: 5 train, 1 val, 2 test; findings stand in the table."""
    folder = tmp_path_factory.mktemp("data")
    random = np.random.default_rng(0)
    (folder / "films").mkdir()
    for i in range(NUM):
        Image.fromarray(random.integers(0, 255, (40, 40), dtype=np.uint8)).save(folder / f"films/f{i:02d}.png")
    pack(ImagesConfig(films=str(folder / "films"), out=str(folder / "store"), size=40, workers=1))
    subject = np.arange(NUM) % 8
    table = pd.DataFrame(
        {
            "dicom_id": [f"f{i:02d}" for i in range(NUM)],
            "study_id": np.arange(NUM) // 2 + 100,
            "subject_id": subject,
            "taken_at": pd.Timestamp("2150-01-01") + pd.to_timedelta(np.arange(NUM), unit="D"),
            "view": ["PA", "AP", "AP"] * 7 + ["PA", "LATERAL", "LL"],
            "split": np.select([subject < 5, subject < 6], ["train", "val"], "test"),
            "sex": np.where(np.arange(NUM) // 8 % 2, "M", "F"),
            "age_years": random.uniform(20, 90, NUM),
            "Edema": random.integers(0, 2, NUM),
        }
    )
    (folder / "features").mkdir()
    table.to_parquet(folder / "features/images.parquet")
    (folder / "features/provenance.json").write_text("{}")
    return folder


def config(data: Path, out: Path, *overrides: str, **sections) -> PretrainConfig:
    path = out.parent / f"{out.name}.yaml"
    merged = {key: {**SMALL.get(key, {}), **sections.get(key, {})} for key in SMALL} | {
        key: value for key, value in sections.items() if key not in SMALL
    }
    merged |= {"features": str(data / "features"), "store": str(data / "store"), "out": str(out)}
    path.write_text(yaml.safe_dump(merged))
    return load(PretrainConfig, path, overrides)


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["train/loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_run_leaves_what_the_next_room_needs(data, tmp_path):
    folder = train.train(config(data, tmp_path / "x", "ehr.groups=[sex,age]"))
    meta = enc.read_meta(folder / "encoder")
    assert meta["ehr_groups"] == {"sex": "study", "age": "study"} and meta["splits_seen"] == ["train"]
    assert meta["step"] == 6 and meta["branch"] == "target"
    assert enc.load(folder / "encoder").width == 24
    assert set(pd.read_parquet(folder / "seen_subjects.parquet")["subject_id"]) == set(range(5))
    assert "sex" in (folder / "encoder/MODEL_CARD.md").read_text()
    line = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    wanted = "loss cross_entropy me_max target_entropy target_max prototypes_used effective_rank grad_norm lr momentum"
    assert {f"train/{key}" for key in [*wanted.split(), "weight_decay", "films_per_second", "wait_share"]} <= set(line)
    state = run.load_checkpoint(folder)
    target = {k.removeprefix("target.net."): v for k, v in state["model"].items() if k.startswith("target.net.")}
    exported = enc.load(folder / "encoder").net.state_dict()
    assert all(torch.equal(exported[key], value) for key, value in target.items())


def test_no_finding_is_read(data, tmp_path, monkeypatch):
    read, seen = pd.read_parquet, []

    def watch(path, *args, **kwargs):
        if Path(path).name == "images.parquet":
            seen.extend(kwargs["columns"])
        return read(path, *args, **kwargs)

    monkeypatch.setattr(pd, "read_parquet", watch)
    train.train(config(data, tmp_path / "x", "ehr.groups=[sex]", "optim.steps=1"))
    assert sorted(seen) == sorted(["dicom_id", "study_id", "subject_id", "taken_at", "split", "view", "sex"])


SMALL_RESNET = {"arch": "resnet34", "model_args": {"channels": [8, 8, 16, 16], "layers": [1, 1, 1, 1]}}


@pytest.mark.parametrize("network", [{}, SMALL_RESNET])
def test_stopped_and_gone_on_gives_the_losses_of_an_unbroken_run(data, tmp_path, monkeypatch, network):
    section = {"encoder": {**SMALL["encoder"], **network}, "mask": {"cell": 16}}
    whole = losses(train.train(config(data, tmp_path / "whole", **section)))
    calls = iter([False, False, True])
    with monkeypatch.context() as patch:
        patch.setattr(run.stopping, "agreed", lambda self: next(calls))
        with pytest.raises(Stopped, match="step 3"):
            train.train(config(data, tmp_path / "broken", **section))
    assert losses(train.train(config(data, tmp_path / "broken", **section))) == whole


def test_going_on_measures_rank_and_prototypes_over_the_same_films(data, tmp_path, monkeypatch):
    def seen(folder):
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        return [(line["train/effective_rank"], line["train/prototypes_used"]) for line in lines]

    whole = seen(train.train(config(data, tmp_path / "whole")))
    calls = iter([False, False, True])
    with monkeypatch.context() as patch:
        patch.setattr(run.stopping, "agreed", lambda self: next(calls))
        with pytest.raises(Stopped):
            train.train(config(data, tmp_path / "broken"))
    assert seen(train.train(config(data, tmp_path / "broken"))) == whole


def test_workers_do_not_change_the_losses(data, tmp_path):
    alone = losses(train.train(config(data, tmp_path / "a", "optim.steps=3", "films.views=all")))
    helped = losses(train.train(config(data, tmp_path / "b", "optim.steps=3", "films.views=all", "workers=1")))
    assert helped == alone


def test_accumulating_exactly_gives_the_losses_of_the_whole_batch(data, tmp_path):
    layer = {"head": {**SMALL["head"], "norm": "layer"}}
    whole = losses(train.train(config(data, tmp_path / "a", "ehr.groups=[sex]", **layer)))
    parts = config(data, tmp_path / "b", "ehr.groups=[sex]", "optim.accumulate=4", **layer)
    assert losses(train.train(parts)) == pytest.approx(whole, rel=1e-4)
    rough = config(data, tmp_path / "c", "optim.accumulate=4", "optim.accumulate_mode=approximate", **layer)
    assert losses(train.train(rough))[0] != pytest.approx(whole[0], rel=1e-4)
    assert "approximation" in (tmp_path / "c/log.txt").read_text()


def test_draws_of_a_compiled_network_are_not_replayed_but_refused(data, tmp_path):
    layer = {"head": {**SMALL["head"], "norm": "layer"}, "optim": {**SMALL["optim"], "accumulate": 2}}
    network = {"encoder": {**SMALL["encoder"], "model_args": {**SMALL["encoder"]["model_args"], "drop_path_rate": 0.5}}}
    with pytest.raises(UserError, match=r"drop_path_rate=0\.5: a compiled network need not repeat"):
        train.train(config(data, tmp_path / "x", "compile=true", **layer, **network))


def test_recomputing_activations_changes_nothing(data, tmp_path):
    plain = losses(train.train(config(data, tmp_path / "a", "optim.steps=3")))
    again = losses(train.train(config(data, tmp_path / "b", "optim.steps=3", "checkpointing=true")))
    assert again == pytest.approx(plain, rel=1e-5)


def test_bf16_trains(data, tmp_path):
    folder = train.train(config(data, tmp_path / "x", "optim.steps=2", "precision=bf16"))
    assert np.isfinite(losses(folder)).all()


def test_a_convolutional_net_trains_with_masked_input(data, tmp_path):
    net = {"encoder": {"arch": "resnet34", "image_size": 32, "model_args": {}}, "mask": {"cell": 16, "ratio": 0.5}}
    folder = train.train(config(data, tmp_path / "x", "optim.steps=2", "films.views=all", **net))
    assert enc.load(folder / "encoder").features(torch.zeros(1, 1, 32, 32)).shape == (1, 512, 1, 1)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("gcc") is None, reason="torch.compile needs a C++ compiler")
def test_a_compiled_encoder_gives_the_losses_of_a_plain_one(data, tmp_path):
    less = {"views": {"num_focal": 0}, "encoder": {**SMALL["encoder"], "model_args": {"embed_dim": 24, "depth": 1}}}
    less["encoder"]["model_args"]["num_heads"] = 2
    plain = losses(train.train(config(data, tmp_path / "a", "optim.steps=3", **less)))
    assert losses(train.train(config(data, tmp_path / "b", "optim.steps=3", "compile=true", **less))) == pytest.approx(
        plain, rel=1e-4
    )


@pytest.mark.slow
@pytest.mark.parametrize("accumulate", [1, 2])
def test_two_processes_give_the_losses_of_one(data, tmp_path, accumulate):
    """Without batch norm, whose statistics are local on a CPU, nothing else depends on the number of processes."""
    layer = {"head": {**SMALL["head"], "norm": "layer"}}
    one = losses(train.train(config(data, tmp_path / "one", **layer)))
    config(data, tmp_path / "two", **layer, optim={**SMALL["optim"], "accumulate": accumulate})
    launch = [sys.executable, "-m", "configs.launch", "--processes", "2", "--", "pretrain", "train"]
    done = subprocess.run(
        [*launch, str(tmp_path / "two.yaml"), "--processes", "2"],
        capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "on 2 x cpu" in done.stdout
    assert losses(tmp_path / "two") == pytest.approx(one, rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_sigterm_saves_and_exits_75(data, tmp_path, workers):
    """As SLURM sends it: to every process of the job, those that read films too."""
    config(data, tmp_path / "x", optim={**SMALL["optim"], "steps": 100000}, workers=workers)
    process = subprocess.Popen(
        [sys.executable, "-m", "pretrain", "train", str(tmp_path / "x.yaml")],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip
    while not (tmp_path / "x/metrics.jsonl").exists():
        assert process.poll() is None, process.stdout.read()
    os.killpg(process.pid, signal.SIGTERM)
    said = process.communicate(timeout=300)[0]
    assert process.returncode == 75 and "go on with" in said and "Traceback" not in said
    assert run.load_checkpoint(tmp_path / "x")["step"] >= 1


@pytest.mark.slow
def test_two_processes_stop_together(data, tmp_path):
    config(data, tmp_path / "x", optim={**SMALL["optim"], "steps": 100000})
    launch = [sys.executable, "-m", "configs.launch", "--processes", "2", "--", "pretrain", "train"]
    process = subprocess.Popen(
        [*launch, str(tmp_path / "x.yaml"), "--processes", "2"],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    while not (tmp_path / "x/metrics.jsonl").exists():
        assert process.poll() is None, process.stdout.read()
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=400)[0]
    assert process.returncode == 75 and "go on with" in said and "Traceback" not in said
    assert "batch norm sees the films of its own process only" in said
    assert run.load_checkpoint(tmp_path / "x")["step"] >= 1


def test_a_checkpoint_of_another_model_is_refused_by_name(data, tmp_path, monkeypatch):
    """As when EHR columns have become more since: the widths are named."""
    train.train(config(data, tmp_path / "a", "ehr.groups=[sex]", "optim.steps=1"))
    with monkeypatch.context() as patch:
        patch.setattr(run, "load_checkpoint", lambda _: load_checkpoint(tmp_path / "a"))
        with pytest.raises(UserError, match=r"condition\.weight\.weight \(24, 3\) instead of \(24, 5\)"):
            train.train(config(data, tmp_path / "b", "ehr.groups=[sex,age]", "optim.steps=1"))


def test_a_loss_that_is_not_finite_stops_and_names_the_films(data, tmp_path, monkeypatch):
    def broken(self, *_):
        out = score(self, *_)
        return out | {"loss": out["loss"] * (torch.nan if broken.calls == 2 else 1), "calls": bump()}

    def bump():
        broken.calls += 1
        return torch.tensor(0.0)

    broken.calls = 0
    score = train.MSN.score
    monkeypatch.setattr(train.MSN, "score", broken)
    with pytest.raises(UserError, match=r"not finite at step 2 \(step 1 was the last finite one\)"):
        train.train(config(data, tmp_path / "x"))
    listed = json.loads((tmp_path / "x/bad_batch_2_rank0.json").read_text())
    assert len(listed["dicom_ids"]) == 8 and run.load_checkpoint(tmp_path / "x") is None


def test_weights_that_are_not_finite_are_neither_exported_on_the_way_nor_saved(data, tmp_path):
    given = ("optim.lr=1e30", "optim.clip=null", "log_every=100", "export_every_epochs=0.3")
    with pytest.raises(UserError, match="loss is not finite at step 1"):
        train.train(config(data, tmp_path / "a", *given))
    for path in (tmp_path / "a/encoder").glob("*.safetensors"):
        assert all(value.isfinite().all() for value in load_file(path).values())
    with pytest.raises(UserError, match=r"update of the weights is not finite at step 0 \(no step was finite\)"):
        train.train(config(data, tmp_path / "b", "optim.lr=1e39", "optim.clip=null", "optim.steps=1"))
    assert run.load_checkpoint(tmp_path / "b") is None and not (tmp_path / "b/encoder").exists()


def test_collapse_warns_in_words(data, tmp_path, monkeypatch):
    monkeypatch.setattr("pretrain.monitor.RANK_FLOOR", 1e9)
    monkeypatch.setattr("pretrain.monitor.PATIENCE", 3)
    train.train(config(data, tmp_path / "x"))
    said = (tmp_path / "x/log.txt").read_text()
    assert said.count("warning: step 3: effective rank") == 1 and "collapsing" in said


@pytest.mark.parametrize(
    "override, says",
    [
        ("optim.batch_size=64", "more than the"),
        ("optim.batch_size=1", "batch norm"),
        ("views.focal_size=20", "not whole patches of 16 px"),
        ("ehr.groups=[sexx]", "did you mean `sex`"),
        ("ehr.groups=[view,mortality]", "died_in_hospital"),
        ("mask.ratio=1.0", "mask.ratio"),
        ("loss.prototypes=1", "loss.prototypes"),
        ("loss.prototypes=1000000000", "loss.prototypes"),
        ("encoder.model_args={checkpoint_path: x.pth}", "give encoder.init"),
        ("encoder.model_args={patch_drop_rate: 0.5}", "dropped by mask.ratio"),
        ("optim.betas=[0.9,1.0]", "betas must be in"),
        ("precision=fp16", "GPU"),
        ("encoder.image_size=48", "films are 40 px"),
        ("encoder.pool=max", "pool `max`"),
        ("encoder.init=nowhere.safetensors", "nowhere"),
        ("encoder.model_args={depth: 2, embed_dim: 25}", "timm cannot make"),
    ],
)
def test_mistakes_are_named(data, tmp_path, override, says):
    with pytest.raises(UserError, match=says):
        train.train(config(data, tmp_path / "x", override))


@pytest.mark.parametrize(
    "arch, override, says",
    [
        ("densenet121", "views.focal_size=16", "views.focal_size 16 is too small for densenet121"),
        ("resnet34", "mask.focal=true", "mask.cell 32 is more than views.focal_size 16"),
    ],
)
def test_views_too_small_for_a_convolutional_net_are_named(data, tmp_path, arch, override, says):
    made = config(data, tmp_path / "x", override)
    net = made.encoder.model_copy(update={"arch": arch, "model_args": {}, "pool": None})
    with pytest.raises(UserError, match=says):
        train.train(made.model_copy(update={"encoder": net}))


@pytest.mark.parametrize("ratio, named", [(0.2, "masks none; 0.25 masks one"), (0.25, None), (0.0, None)])
def test_a_ratio_of_less_than_one_patch_is_told(data, tmp_path, ratio, named):
    train.train(config(data, tmp_path / "x", f"mask.ratio={ratio}", "encoder.image_size=32", "optim.steps=1"))
    said = (tmp_path / "x" / "log.txt").read_text()
    assert (named in said) if named else ("masks none" not in said)


def test_films_of_other_splits_and_views_are_left_out_and_counted(data):
    settings = config(data, data / "y").films
    films = bt.select_films(data / "features", Store(data / "store"), settings, ["sex"], "default", 0)
    assert set(films.table["subject_id"]) <= set(range(5)) and len(films) == 15
    assert films.left_out["not of split train"] == 9
    capped = settings.model_copy(update={"per_subject_cap": 1})
    films = bt.select_films(data / "features", Store(data / "store"), capped, [], "default", 0)
    assert films.table["subject_id"].is_unique and films.left_out["over per_subject_cap"] == 10


def test_partners_are_of_the_same_study_or_subject_in_time():
    table = pd.DataFrame(
        {
            "split": "train",
            "study_id": [1, 1, 2, 3, 4],
            "subject_id": [1, 1, 1, 1, 2],
            "taken_at": pd.to_datetime(["2150-01-01", "2150-01-01", "2150-01-03", "2151-01-01", "2150-01-01"]),
        }
    )
    rows = np.arange(5)
    for u in np.linspace(0, 0.999, 7):
        draws = np.full(5, u)
        assert Partners(table, "study", None)(rows, draws).tolist() == [1, 0, 2, 3, 4]
        near = Partners(table, "patient", 7)(rows, draws)
        assert near[0] in (1, 2) and near[2] in (0, 1) and near[3] == 3 and near[4] == 4
        assert Partners(table, "patient", None)(rows, draws)[3] in (0, 1, 2)


@pytest.mark.parametrize("positives", ["study", "patient"])
def test_other_positives_train(data, tmp_path, positives):
    train.train(config(data, tmp_path / "x", "optim.steps=2", f"films.positives={positives}"))


@pytest.mark.parametrize("arch", ["vit_tiny_patch16_224", "resnet34"])
@pytest.mark.parametrize("workers", [0, 1])
def test_films_cut_on_the_device_give_the_same_batches(data, tmp_path, arch, workers):
    """As on a GPU: workers read films and plans, the views are cut where the model is."""
    network = {"arch": arch, "image_size": 32, "model_args": SMALL["encoder"]["model_args"] if "vit" in arch else {}}
    settings = config(data, tmp_path / "x", "mask.ratio=0.5", "mask.cell=16", encoder=network)
    store = Store(data / "store")
    films = bt.select_films(data / "features", store, settings.films, ["sex"], "default", 0)
    accelerator = type("A", (), {"num_processes": 1, "process_index": 0, "device": torch.device("cpu")})
    encoder = enc.create(arch, image_size=32, model_args=network["model_args"])
    steps = build.steps(settings, films, store, encoder, accelerator)
    here = [steps[i] for i in range(2)]
    steps.cut_here = False
    for mine, other in zip(here, loader.batches(steps, 0, 2, workers, torch.device("cpu")), strict=True):
        for a, b in zip(
            [mine.target, mine.static, *mine.anchors], [other.target, other.static, *other.anchors], strict=True
        ):
            torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_blanked_groups_are_zero_as_a_whole(data, tmp_path):
    store = Store(data / "store")
    films = bt.select_films(data / "features", store, config(data, tmp_path / "x").films, ["sex", "age"], "default", 0)
    accelerator = type("A", (), {"num_processes": 1, "process_index": 0, "device": torch.device("cpu")})
    settings = config(data, tmp_path / "x", "ehr.dropout=0.5")
    steps = build.steps(settings, films, store, build.method(settings, 5).anchor, accelerator)
    drawn = torch.cat([steps[i].static for i in range(40)])
    sex = drawn[:, :3].abs().sum(dim=1)
    assert set(sex.tolist()) == {0.0, 1.0} and 0.35 < sex.mean() < 0.65


def test_the_permuted_record_is_somebody_elses(data, tmp_path, monkeypatch):
    seen = {}
    make = build.steps

    def keep(config, films, *rest):
        seen[config.ehr.permuted] = films.static.copy()
        return make(config, films, *rest)

    monkeypatch.setattr(build, "steps", keep)
    for permuted in ("false", "true"):
        settings = config(data, tmp_path / permuted, "ehr.groups=[age]", "optim.steps=1", f"ehr.permuted={permuted}")
        train.train(settings)
    assert (seen[True][:, 0] != seen[False][:, 0]).mean() > 0.7
    assert sorted(seen[True][:, 0]) == sorted(seen[False][:, 0])


def test_the_papers_preset_fills_what_is_not_given_and_trains(data, tmp_path):
    paper = {"optim": {"batch_size": 8, "steps": 2}, "head": {}, "ehr": {"groups": ["sex"]}}
    path = tmp_path / "paper.yaml"
    small = {key: {**value, **paper.get(key, {})} for key, value in SMALL.items() if key not in ("optim", "head")}
    keys = {
        "preset": "paper",
        "features": str(data / "features"),
        "store": str(data / "store"),
        "out": str(tmp_path / "x"),
    }
    path.write_text(yaml.safe_dump({**small, **paper, **keys}))
    settings = load(PretrainConfig, path, ["views.flip=0.25"])
    assert settings.views.flip == 0.25 and settings.views.normalise == "dataset" and settings.mask.focal
    assert settings.ehr.inject == "concat" and settings.optim.ema == settings.optim.ema_end == 0.996
    msn = build.method(settings, 2)
    assert msn.anchor_head[0].out_features == 4 * 24 and msn.prototypes.shape == (8, 24)
    assert len(msn.groups(settings.optim.decay_all)[1]["params"]) == 0
    folder = train.train(settings)
    meta = enc.read_meta(folder / "encoder")
    assert meta["preprocess"]["normalise"] == "dataset" and meta["preprocess"]["mean"] == 0.449


def test_the_record_can_be_a_target_instead(data, tmp_path):
    folder = train.train(config(data, tmp_path / "x", "ehr.groups=[sex]", "ehr.use=predict", "optim.steps=3"))
    line = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    assert line["train/record_error"] > 0
    assert "a target of the anchor (control)" in (folder / "encoder/MODEL_CARD.md").read_text()


def test_readability_is_told_of_conditioned_columns(data, tmp_path):
    folder = train.train(config(data, tmp_path / "x", "ehr.groups=[sex,age]", "optim.steps=2"))
    readable = enc.read_meta(folder / "encoder")["readability"]
    assert readable["sex_m"]["metric"] == "auroc" and 0 <= readable["sex_m"]["value"] <= 1
    assert readable["age_years"]["metric"] == "r2" and readable["age_years"]["chance"] == 0.0


def test_another_config_or_other_input_is_refused_in_a_run_folder(data, tmp_path):
    train.train(config(data, tmp_path / "x", "optim.steps=1"))
    with pytest.raises(UserError, match="another config"):
        train.train(config(data, tmp_path / "x", "optim.steps=1", "ehr.groups=[sex]"))


def test_a_full_disk_while_saving_loses_nothing(data, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    calls = iter([False, False, True])
    with monkeypatch.context() as patch:
        patch.setattr(run.stopping, "agreed", lambda self: next(calls))
        with pytest.raises(Stopped):
            train.train(config(data, tmp_path / "x"))
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        with pytest.raises(UserError, match="could not be written"):
            train.train(config(data, tmp_path / "x"))
    assert run.load_checkpoint(tmp_path / "x")["step"] == 3
    assert losses(train.train(config(data, tmp_path / "x"))) == losses(train.train(config(data, tmp_path / "y")))


@pytest.mark.parametrize(("compiled", "error"), [("true", Stopped), ("false", RuntimeError)])
def test_sigterm_that_ends_the_compiler_too_is_a_stop(data, tmp_path, monkeypatch, compiled, error):
    def killed(*_):
        os.kill(os.getpid(), signal.SIGTERM)
        raise RuntimeError("g++ was terminated")

    monkeypatch.setattr(train, "backward", killed)
    with pytest.raises(error):
        train.train(config(data, tmp_path / "x", f"compile={compiled}"))


def test_encoder_is_exported_on_the_way(data, tmp_path, monkeypatch):
    steps = []
    write = train.export.write
    monkeypatch.setattr(train.export, "write", lambda *a, **k: (steps.append(a[5]), write(*a, **k))[1])
    train.train(config(data, tmp_path / "x", "optim.steps=3", "export_every_epochs=2", "films.views=all"))
    assert steps == [2, 3]  # one step an epoch: 15 films, batches of 8; then the end


def test_tensorboard_gets_what_metrics_jsonl_gets(data, tmp_path):
    pytest.importorskip("tensorboard")
    train.train(config(data, tmp_path / "x", "optim.steps=1", "trackers=[tensorboard]"))
    assert list((tmp_path / "x").rglob("events.out.tfevents*"))


def test_a_stop_between_two_reports_changes_no_line(data, tmp_path, monkeypatch):
    whole = losses(train.train(config(data, tmp_path / "whole", "log_every=4")))
    calls = iter([False, True])
    with monkeypatch.context() as patch:
        patch.setattr(run.stopping, "agreed", lambda self: next(calls))
        with pytest.raises(Stopped, match="step 2"):
            train.train(config(data, tmp_path / "broken", "log_every=4"))
    assert losses(train.train(config(data, tmp_path / "broken", "log_every=4"))) == whole


def test_going_on_draws_the_same_drop_path(data, tmp_path, monkeypatch):
    network = {"encoder": {**SMALL["encoder"], "model_args": {**SMALL["encoder"]["model_args"], "drop_path_rate": 0.5}}}
    whole = losses(train.train(config(data, tmp_path / "whole", **network)))
    calls = iter([False, False, True])
    with monkeypatch.context() as patch:
        patch.setattr(run.stopping, "agreed", lambda self: next(calls))
        with pytest.raises(Stopped):
            train.train(config(data, tmp_path / "broken", **network))
    torch.rand(5)  # whatever else draws numbers
    assert losses(train.train(config(data, tmp_path / "broken", **network))) == whole


def test_pairs_never_cross_splits_and_are_counted(data, tmp_path):
    table = pd.DataFrame({"split": ["train", "val", "train"], "study_id": 1, "subject_id": 1, "taken_at": "2150-01-01"})
    for by in ("study", "patient"):
        partners = Partners(table, by, None)
        assert partners(np.arange(3), np.full(3, 0.5)).tolist() == [2, 1, 0] and partners.count() == 2
    folder = train.train(config(data, tmp_path / "x", "optim.steps=1", "films.positives=patient", "films.max_days=8"))
    assert "pairs: 15 of 15 films have another of their patient" in (folder / "log.txt").read_text()


def test_weights_hand_on_whom_they_have_seen(data, tmp_path):
    """A run that starts from another's encoder has seen that run's subjects and outcomes too."""
    first = train.train(config(data, tmp_path / "a", "optim.steps=1", "films.splits=[train,val]"))
    second = train.train(config(data, tmp_path / "b", "optim.steps=1", f"encoder.init={first}", "ehr.groups=[sex]"))
    assert set(pd.read_parquet(second / "seen_subjects.parquet")["subject_id"]) == set(range(6))
    meta = enc.read_meta(second / "encoder")
    assert meta["splits_seen"] == ["train", "val"] and meta["started_from"]["films"] == "known"
    torch.save(enc.load(first / "encoder").net.state_dict(), tmp_path / "bare.pth")
    bare = config(data, tmp_path / "c", "optim.steps=1", f"encoder.init={tmp_path}/bare.pth", "encoder.init_heads=2")
    meta = enc.read_meta(train.train(bare) / "encoder")
    assert meta["started_from"]["films"] == "unknown"
    assert "whose films are unknown" in (tmp_path / "c/encoder/MODEL_CARD.md").read_text()


@pytest.mark.slow
def test_a_killed_run_with_workers_goes_on_at_once(data, tmp_path):
    """Workers outlive a killed process for some seconds; they do not hold its folder."""
    config(data, tmp_path / "x", optim={**SMALL["optim"], "steps": 100000}, workers=2)
    command = [sys.executable, "-m", "pretrain", "train", str(tmp_path / "x.yaml")]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (tmp_path / "x/metrics.jsonl").exists():
        assert process.poll() is None
    process.kill()
    process.wait()
    run.open_run(tmp_path / "x", load(PretrainConfig, tmp_path / "x.yaml"))


TOLD = {
    "f00": "cough and fever",
    "f01": "fall",
    "f02": "chest pain",
    "f03": "fall",
    "f05": "leg swelling",
    "f07": "cough",
}


def text(notes: Path, **more) -> dict:
    groups = ["sex", "text"]
    return {"ehr": {"groups": groups, "notes": str(notes), "text_encoder": "words", **more}}


def test_a_note_conditions_as_a_group_with_zeros_and_a_mask_where_there_is_none(
    data, tmp_path, write_notes, word_encoder
):
    folder = train.train(config(data, tmp_path / "a", **text(write_notes(TOLD), inject="add")))
    meta = json.loads((folder / "encoder/encoder.json").read_text())
    assert meta["ehr_groups"]["text"] == "study"
    assert meta["text"]["films_with_note"] < meta["text"]["films"] and meta["text"]["encoder"] == "words"
    told = [name for name in meta["readability"] if name.startswith("text")]
    assert set(told) <= {"text_missing", "text (mean over its columns)"}
    weight = load_checkpoint(folder)["model"]["condition.weight.weight"]
    assert weight.shape[1] == len(meta["ehr"]["columns"]) == 3 + 17 and weight[:, 3:].any()


def test_columns_of_a_text_encoder_that_say_nothing_are_zero(data, tmp_path, write_notes, minilm):
    """Two columns of MiniLM's vectors are 0 but for 1e-33: no card of an encoder can hold what their squares give."""
    given = text(write_notes(TOLD), text_encoder=str(minilm))
    folder = train.train(config(data, tmp_path / "a", "optim.steps=1", **given))
    readable = json.loads((folder / "encoder/encoder.json").read_text())["readability"]
    assert np.isfinite(readable["text (mean over its columns)"]["value"])
    films = bt.select_films(
        data / "features", Store(data / "store"), config(data, tmp_path / "a").films, ["text"], "default", 0,
        build.text(config(data, tmp_path / "a", **given)),
    )  # fmt: skip
    nothing = np.abs(films.static).max(axis=0) < 1e-20
    assert 0 < nothing.sum() < 10 and not films.static[:, nothing].any()


def test_the_text_group_is_fitted_on_train_and_blanked_as_a_whole(data, tmp_path, write_notes, word_encoder):
    source = build.text(config(data, tmp_path / "a", **text(write_notes(TOLD))))
    settings = config(data, tmp_path / "a").films
    films = bt.select_films(data / "features", Store(data / "store"), settings, ["text", "sex"], "default", 0, source)
    assert films.available_at["text"] == "study" and "text_missing" in films.columns
    columns = np.array(films.column_groups) == "text"
    has = films.table["dicom_id"].isin(list(TOLD)).to_numpy()
    vectors = films.static[:, columns]
    assert not vectors[~has, :-1].any() and (vectors[:, -1] == ~has).all()
    np.testing.assert_allclose(vectors[has, :-1].mean(0), 0, atol=1e-5)
    assert "f05" not in films.table["dicom_id"].to_numpy() and "leg swelling" not in word_encoder.embedded
    steps = build.steps(
        config(data, tmp_path / "a", "ehr.dropout=0.5", **text(write_notes(TOLD))),
        films, Store(data / "store"), enc.create("vit_tiny_patch16_224", image_size=32), SimpleNamespace(
            num_processes=1, process_index=0, device=torch.device("cpu")),
    )  # fmt: skip
    rows = np.flatnonzero(has)
    blanked = [steps._static(rows, films.keys[rows], epoch)[:, columns] for epoch in range(20)]
    kinds = {bool(x.any()) for epoch in blanked for x in epoch}
    assert kinds == {True, False}
    assert all(not x.any() or np.array_equal(x, y) for e in blanked for x, y in zip(e, vectors[rows], strict=True))


def test_text_and_its_folders_go_together(data, tmp_path, write_notes):
    with pytest.raises(UserError, match=r"needs ehr\.notes"):
        config(data, tmp_path / "a", ehr={"groups": ["text"]})
    with pytest.raises(UserError, match="go with the group `text`"):
        config(data, tmp_path / "a", ehr={"groups": ["sex"], "notes": "n", "text_encoder": "e"})


def test_changed_notes_are_another_run(data, tmp_path, write_notes, word_encoder):
    sections = text(write_notes(TOLD))
    train.train(config(data, tmp_path / "a", **sections))
    write_notes({**TOLD, "f00": "nothing"})
    with pytest.raises(UserError, match="input has changed"):
        train.train(config(data, tmp_path / "a", **sections))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: t.assign(age_years="old"), "EHR group `age` holds values of another type"),
        (lambda t: pd.concat([t, t.head(3)]), "3 dicom_ids stand twice"),
        (lambda t: t.drop(columns="age_years"), "columns missing: age_years"),
        (lambda t: t.assign(subject_id=None), "films have no subject_id"),
        (lambda t: t.assign(age_years=np.nan), None),
    ],
)
def test_odd_tables_are_named(data, tmp_path, change, says):
    shutil.copytree(data / "features", tmp_path / "features")
    change(pd.read_parquet(data / "features/images.parquet")).to_parquet(tmp_path / "features/images.parquet")
    settings = config(data, tmp_path / "x", "ehr.groups=[sex,age]", "optim.steps=1", f"features={tmp_path}/features")
    if says is None:
        assert "warning: of EHR group age all films have the same" in (train.train(settings) / "log.txt").read_text()
    else:
        with pytest.raises(UserError, match=says):
            train.train(settings)
