"""The training loop on two dozen small films: inputs, outputs, errors."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from safetensors.torch import load_file

from configs import UserError, load
from pretrain import build, run, train
from pretrain import encoder as enc
from pretrain.config import PretrainConfig
from pretrain.data import select_films
from pretrain.export import make
from pretrain.methods.msn import MSN
from pretrain.run import processes
from pretrain.store import Store
from tests.pretrain.small import SMALL, config, losses

pytestmark = pytest.mark.usefixtures("fresh_accelerator")


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
    with pytest.raises(UserError, match=r"drop_path_rate=0\.5: a compiled network may draw other"):
        train.train(config(data, tmp_path / "x", "compile=true", **layer, **network))


def test_recomputing_activations_changes_nothing(data, tmp_path):
    plain = losses(train.train(config(data, tmp_path / "a", "optim.steps=3")))
    again = losses(train.train(config(data, tmp_path / "b", "optim.steps=3", "checkpointing=true")))
    assert again == pytest.approx(plain, rel=1e-5)


def test_bf16_trains(data, tmp_path):
    folder = train.train(config(data, tmp_path / "x", "optim.steps=2", "precision=bf16"))
    assert np.isfinite(losses(folder)).all()


@pytest.mark.parametrize(("flags", "taken"), [("avx2 avx512_bf16", "bf16"), ("avx2 avx512f", "no")])
def test_auto_takes_bf16_where_the_processor_has_it(data, tmp_path, monkeypatch, flags, taken):
    (tmp_path / "cpuinfo").write_text(f"processor : 0\nflags : fpu {flags}\n")
    monkeypatch.setattr(processes, "PROCESSOR", tmp_path / "cpuinfo")
    folder = train.train(config(data, tmp_path / "x", "optim.steps=2", "precision=auto"))
    assert f"precision {taken};" in (folder / "log.txt").read_text()
    assert enc.read_meta(folder / "encoder")["precision"] == taken
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


def test_a_loss_that_is_not_finite_stops_and_names_the_films(data, tmp_path, monkeypatch):
    def broken(self, *_):
        out = score(self, *_)
        return out | {"loss": out["loss"] * (torch.nan if broken.calls == 2 else 1), "calls": bump()}

    def bump():
        broken.calls += 1
        return torch.tensor(0.0)

    broken.calls = 0
    score = MSN.score
    monkeypatch.setattr(MSN, "score", broken)
    with pytest.raises(UserError, match=r"not finite at step 2 \(step 1 was the last finite one\)"):
        train.train(config(data, tmp_path / "x"))
    listed = json.loads((tmp_path / "x/bad_batch_2_rank0.json").read_text())
    assert len(listed["dicom_ids"]) == 8 and run.load_checkpoint(tmp_path / "x") is None


def test_weights_that_are_not_finite_are_neither_exported_on_the_way_nor_saved(data, tmp_path):
    def beyond(name, lr, *words):  # a learning rate that no config may have
        given = config(data, tmp_path / name, "optim.clip=null", *words)
        return given.model_copy(update={"optim": given.optim.model_copy(update={"lr": lr})})

    with pytest.raises(UserError, match="loss is not finite at step 1"):
        train.train(beyond("a", 1e30, "log_every=100", "export_every_epochs=0.3"))
    for path in (tmp_path / "a/encoder").glob("*.safetensors"):
        assert all(value.isfinite().all() for value in load_file(path).values())
    with pytest.raises(UserError, match=r"update of the weights is not finite at step 0 \(no step was finite\)"):
        train.train(beyond("b", 1e39, "optim.steps=1"))
    assert run.load_checkpoint(tmp_path / "b") is None and not (tmp_path / "b/encoder").exists()


@pytest.mark.parametrize("patch", [1e20, 3e38])
def test_initial_weights_that_overflow_are_named_with_the_first_film(data, tmp_path, patch):
    made = enc.load(train.train(config(data, tmp_path / "a", "optim.steps=1")) / "encoder")
    with torch.no_grad():
        made.net.norm.weight.fill_(patch)
    enc.save(tmp_path / "large/encoder", made, {"ehr_groups": {}})
    with pytest.raises(
        UserError, match=r"large/encoder: features that are not finite or above 1e19, of film \w+ and 7"
    ):
        train.train(config(data, tmp_path / "b", f"encoder.init={tmp_path / 'large/encoder'}"))


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
        ("encoder.model_args={patch_drop_rate: 0.5}", "mask.ratio sets the dropped patches"),
        ("optim.betas=[0.9,1.0]", "optim.betas.1` Input should be less than 1"),
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


def test_the_size_of_focal_views_does_not_matter_where_there_are_none(data, tmp_path):
    none = ["views.num_focal=0", "optim.steps=1"]
    train.train(config(data, tmp_path / "x", "views.focal_size=20", *none))
    made = config(data, tmp_path / "y", *none)  # a transformer with a convolutional stem takes one size
    net = {
        "arch": "visformer_tiny",
        "model_args": {"init_channels": 8, "embed_dim": 24, "depth": [0, 1, 1], "num_heads": 1},
    }
    train.train(made.model_copy(update={"encoder": made.encoder.model_copy(update=net | {"pool": None})}))
    with pytest.raises(UserError, match=r"views.focal_size 16.*set views.num_focal=0"):
        made = config(data, tmp_path / "z", "optim.steps=1")
        train.train(made.model_copy(update={"encoder": made.encoder.model_copy(update=net | {"pool": None})}))


@pytest.mark.parametrize("ratio, named", [(0.2, "masks none; 0.25 masks one"), (0.25, None), (0.0, None)])
def test_a_ratio_of_less_than_one_patch_is_told(data, tmp_path, ratio, named):
    train.train(config(data, tmp_path / "x", f"mask.ratio={ratio}", "encoder.image_size=32", "optim.steps=1"))
    said = (tmp_path / "x" / "log.txt").read_text()
    assert (named in said) if named else ("masks none" not in said)


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
    msn = build.method(settings)
    assert msn.anchor_head[0].out_features == 4 * 24 and msn.prototypes.shape == (8, 24)
    assert len(msn.groups(settings.optim.decay_all)[1]["params"]) == 0
    folder = train.train(settings)
    meta = enc.read_meta(folder / "encoder")
    assert meta["preprocess"]["normalise"] == "dataset" and meta["preprocess"]["mean"] == 0.449


def test_the_record_can_be_a_target_instead(data, tmp_path):
    folder = train.train(config(data, tmp_path / "x", "ehr.groups=[sex]", "ehr.use=predict", "optim.steps=3"))
    line = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    assert line["train/record_error"] > 0
    assert "predicted from the film" in (folder / "encoder/MODEL_CARD.md").read_text()


def test_readability_is_told_of_conditioned_columns(data, tmp_path):
    folder = train.train(config(data, tmp_path / "x", "ehr.groups=[sex,age]", "optim.steps=2"))
    readable = enc.read_meta(folder / "encoder")["readability"]
    assert readable["sex_m"]["metric"] == "auroc" and 0 <= readable["sex_m"]["value"] <= 1
    assert readable["age_years"]["metric"] == "r2" and readable["age_years"]["chance"] == 0.0


def test_a_column_is_readable_or_not_on_the_films_that_have_it(data, tmp_path, monkeypatch):
    """The features tell whether a film has the value, and nothing of the value."""
    films = select_films(
        data / "features", Store(data / "store"), config(data, tmp_path / "x").films, ["sex"], "default", 0
    )
    films.columns, films.column_groups = ["died", "died_missing"], ["mortality"] * 2
    has = np.arange(len(films)) % 2 == 0
    died = has & (np.arange(len(films)) % 4 == 0)
    films.static = np.stack([died, ~has], axis=1).astype(np.float32)
    films.known = np.stack([has, np.zeros(len(films), bool)], axis=1)
    order = films.table["dicom_id"].tolist()
    rows = []
    monkeypatch.setattr(Store, "read", lambda self, ids: rows.extend(order.index(i) for i in ids))
    monkeypatch.setattr(make.encoders, "embed", lambda *a, **k: torch.from_numpy(has[rows, None].astype(np.float32)))
    found = make.readability(enc.create("vit_tiny_patch16_224", image_size=32), films, Store(data / "store"), 0)
    assert found["died_missing"]["value"] == 1 and found["died"]["value"] == 0.5


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


def test_weights_hand_on_whom_they_have_seen(data, tmp_path):
    """A run that starts from another run's encoder has seen that run's subjects and outcomes too."""
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
