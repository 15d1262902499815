"""The training loop of the fusion models, on small data with a planted signal."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from accelerate import debug_launcher
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from configs import UserError, load
from configs.signals import Stopped
from finetune.config import FuseConfig
from finetune.fusion import film_gain, loop
from finetune.fusion.cross_attention import KINDS
from finetune.fusion.models import MODELS
from finetune.fusion.train import fuse
from finetune.guard import check_encoder
from finetune.results import read_results
from pretrain import encoder as encoders
from pretrain.encoder import read_meta
from pretrain.run import accelerator, stopping
from pretrain.run import share as run_share

Make = Callable[..., Path]
CONFIGS = Path(__file__).parents[2] / "configs"


def config(folder: Path, **changes: Any) -> FuseConfig:
    small = {"hidden": 8, "layers": 1, "joint": 8, "epochs": 3, "samples": 20, "lr": 1e-2, "batch_size": 32}
    paths = {"features": str(folder / "features"), "store": "memory", "encoder": "pixels", "out": str(folder / "run")}
    return FuseConfig(**(paths | small | changes))


def test_a_run_leaves_results_and_every_sample_once(make_icu: Make) -> None:
    folder = make_icu()
    run = fuse(config(folder))
    about, rows = read_results(run)
    assert about["model"] == "medfuse" and {"all", "paired", "age=40-59"} <= set(rows["subset"])
    samples = pd.read_parquet(folder / "features/samples/mortality.parquet")
    assert (run / "model.safetensors").is_file() and not (run / "encoder").exists()
    for split in ("val", "test"):
        wanted = samples.loc[samples["split"] == split, "sample_id"]
        assert sorted(pd.read_parquet(run / f"predictions/{split}.parquet")["sample_id"]) == sorted(wanted)


def curve(run: Path) -> list[tuple[float, float]]:
    table = pd.read_json(run / "metrics.jsonl", lines=True)
    return list(zip(table["train/loss"], table["val/loss"], strict=True))


def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(make_icu: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_icu()
    unbroken = fuse(config(folder, epochs=4, out=str(folder / "unbroken")))

    class StopAfterTwo(stopping):
        seen = 0

        def agreed(self, step: int = -1) -> bool:
            self.seen += 1
            return self.seen == 2

    with monkeypatch.context() as patch, pytest.raises(Stopped, match="step 2"):
        patch.setattr("pretrain.run.stopping", StopAfterTwo)
        fuse(config(folder, epochs=4))
    broken = fuse(config(folder, epochs=4))
    assert curve(broken) == curve(unbroken)
    ours, theirs = (pd.read_parquet(run / "predictions/test.parquet") for run in (broken, unbroken))
    pd.testing.assert_frame_equal(ours, theirs)


@pytest.mark.parametrize("model", [*MODELS, "record_gbm"])
def test_every_model_trains_and_predicts(make_icu: Make, model: str) -> None:
    folder = make_icu(stays=60)
    run = fuse(config(folder, model=model, epochs=1, samples=0))
    table = pd.read_parquet(run / "predictions/test.parquet")
    assert table["logit_mortality"].notna().all()
    assert table["has_image"].all() or model != "film_only"
    assert ("weight_film" in table) == (model == "attention")


def test_fusion_learns_both_parts_of_the_planted_signal(make_icu: Make) -> None:
    folder = make_icu(stays=900)
    found = {}
    for model in ("record_lstm", "film_only", "medfuse"):
        run = fuse(
            config(
                folder, model=model, epochs=40, film="findings", samples=0, hidden=16, joint=16, out=str(folder / model)
            )
        )
        _, rows = read_results(run)
        auroc = rows[(rows["metric"] == "auroc") & (rows["split"] == "test") & (rows["label"] == "macro")]
        found[model] = auroc.set_index("subset")["value"]["paired"]
    print(found)
    assert found["record_lstm"] > 0.6 and found["film_only"] > 0.6
    assert found["medfuse"] > max(found["record_lstm"], found["film_only"]) + 0.03


def test_shuffled_labels_teach_nothing(make_icu: Make) -> None:
    run = fuse(config(make_icu(stays=900, shuffled=True), epochs=5, samples=200))
    _, rows = read_results(run)
    auroc = rows[(rows["metric"] == "auroc") & (rows["split"] == "test") & (rows["subset"] == "all")].iloc[0]
    assert auroc["low"] < 0.5 < auroc["high"]


@pytest.fixture
def tiny_encoder(tmp_path: Path) -> Path:
    args = {"patch_size": 16, "embed_dim": 16, "depth": 1, "num_heads": 2}
    torch.manual_seed(0)
    return encoders.save(
        tmp_path / "tiny" / "encoder", encoders.create("vit_tiny_patch16_224", image_size=32, model_args=args)
    )


@pytest.mark.parametrize("freeze", [True, False])
def test_the_film_encoder_learns_only_when_it_is_tuned(make_icu: Make, tiny_encoder: Path, freeze: bool) -> None:
    folder = make_icu(stays=60)
    pd.DataFrame({"subject_id": [1, 100]}).to_parquet(tiny_encoder.parent / "seen_subjects.parquet")
    run = fuse(config(folder, encoder=str(tiny_encoder.parent), freeze=freeze, encoder_lr=1e-3, epochs=2))
    assert (run / "encoder").is_dir() is not freeze
    if not freeze:
        before, after = (encoders.load(place).state_dict() for place in (tiny_encoder, run / "encoder"))
        moved = [name for name in before if not torch.equal(before[name], after[name])]
        assert len(moved) > len(before) / 2
        train = pd.read_parquet(folder / "features/samples/mortality.parquet").query("split == 'train'")["subject_id"]
        assert set(pd.read_parquet(run / "seen_subjects.parquet")["subject_id"]) == {1, *train}
        again = check_encoder(run / "encoder", pd.DataFrame({"subject_id": [7], "split": ["test"]}))
        assert again.supervision == "outcome-supervised" and "mortality" in again.warnings[0]


def test_whom_a_tuned_encoder_has_seen_stays_unknown_if_it_was(make_icu: Make, tiny_encoder: Path) -> None:
    run = fuse(config(make_icu(stays=60), encoder=str(tiny_encoder), freeze=False, epochs=1))
    assert read_meta(run / "encoder")["started_from"]["films"] == "unknown"
    assert check_encoder(run / "encoder", pd.DataFrame({"subject_id": [7], "split": ["test"]})).films == "unknown"


def test_an_encoder_tuned_on_findings_is_not_called_outcome_supervised(make_icu: Make, tiny_encoder: Path) -> None:
    folder = make_icu(stays=60)
    images = pd.read_parquet(folder / "features/images.parquet").query("dicom_id != 'film0000_0'")
    rows = images[["subject_id", "split", "dicom_id"]].assign(predict_at_hours=np.nan, Edema=images["Edema"])
    rows.assign(sample_id=images["dicom_id"], stay_id=images["stay_id"]).to_parquet(
        folder / "features/samples/findings.parquet"
    )
    stage = config(folder, task="findings", model="film_only", encoder=str(tiny_encoder), freeze=False, epochs=1)
    run = fuse(stage)
    found = check_encoder(run / "encoder", pd.DataFrame({"subject_id": [7], "split": ["test"]}))
    assert found.supervision == "supervised by findings"
    about, _ = read_results(fuse(config(folder, encoder=str(run), epochs=1, out=str(folder / "fused"))))
    assert about["supervision"] == "supervised by findings"


def test_a_missing_film_never_reaches_the_encoder(
    make_icu: Make, tiny_encoder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    real = encoders.Encoder.features
    monkeypatch.setattr(
        encoders.Encoder, "features", lambda self, x, keep=None: seen.append(len(x)) or real(self, x, keep)
    )
    folder = make_icu(stays=60)
    fuse(config(folder, encoder=str(tiny_encoder), freeze=False, film="features", epochs=1))
    films = {
        split: pd.read_parquet(folder / f"run/predictions/{split}.parquet")["has_image"].sum()
        for split in ("val", "test")
    }
    assert min(seen) > 0
    assert sum(seen[1:]) == seen[0] + films["val"]  # all films frozen; then train, val, and at the end val, test


def test_an_encoder_that_saw_test_subjects_is_refused(make_icu: Make, tiny_encoder: Path) -> None:
    folder = make_icu(stays=60)
    table = pd.read_parquet(folder / "features/samples/mortality.parquet")
    table[["subject_id"]].drop_duplicates().to_parquet(tiny_encoder.parent / "seen_subjects.parquet")
    with pytest.raises(UserError, match="saw"):
        fuse(config(folder, encoder=str(tiny_encoder)))
    assert not (folder / "run").exists()
    about, _ = read_results(fuse(config(folder, encoder=str(tiny_encoder), allow_leak=True, epochs=1)))
    assert about["films_seen"] == "leak" and "LEAK" in about["warnings"][0]


def test_a_batch_of_one_works(make_icu: Make) -> None:
    folder = make_icu(stays=24)
    fuse(config(folder, batch_size=1, epochs=1))


def test_mistakes_are_named(make_icu: Make) -> None:
    folder = make_icu(stays=24)
    with pytest.raises(UserError, match="did you mean `medfuse`"):
        fuse(config(folder, model="medfus"))
    own = folder / "mine.py"
    own.write_text("from finetune.fusion.models import MedFuse\nclass Mine(MedFuse):\n    pass\n")
    fuse(config(folder, model=f"{own}:Mine", epochs=1, out=str(folder / "own")))
    with pytest.raises(UserError, match="has no class `Other`"):
        fuse(config(folder, model=f"{own}:Other"))
    with pytest.raises(UserError, match="`encoder` missing: model=medfuse looks at films"):
        fuse(config(folder, encoder=None))
    fuse(config(folder, model="record_lstm", encoder=None, store=None, epochs=1))


@pytest.mark.parametrize("model", ["record_lstm", "record_transformer", "record_gbm"])
@pytest.mark.parametrize("name", sorted(p.stem for p in CONFIGS.rglob("fuse_*.yaml") if "demo" not in p.parts))
def test_a_model_of_the_record_needs_no_film_store_or_encoder_in_any_shipped_config(
    tmp_path: Path, make_icu: Make, monkeypatch: pytest.MonkeyPatch, name: str, model: str
) -> None:
    folder = make_icu(stays=60)
    monkeypatch.undo()  # the real Store: there is none
    monkeypatch.chdir(tmp_path)
    words = [
        f"model={model}",
        f"features={folder / 'features'}",
        "out=run",
        "hidden=8",
        "layers=1",
        "epochs=1",
        "samples=0",
        *["freeze_record=true", "record_weights=elsewhere"][: 2 * (name == "fuse_mortality")],
    ]
    run = fuse(load(FuseConfig, CONFIGS / f"{name}.yaml", words))
    about, rows = read_results(run)
    assert about["encoder"] is None and len(rows) and "no store there" in about["warnings"][0]
    assert load(FuseConfig, run / "config.yaml").encoder is None
    with pytest.raises(UserError, match=r"no store|not a store"):
        fuse(load(FuseConfig, CONFIGS / f"{name}.yaml", ["model=medfuse", *words[1:7], "record_weights=null"]))


def test_a_models_class_says_whether_it_sees_films(make_icu: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_icu(stays=24)
    monkeypatch.setitem(KINDS, "plain_lstm", KINDS["record_lstm"])
    fuse(config(folder, model="plain_lstm", encoder=None, store=None, epochs=1))
    monkeypatch.setitem(KINDS, "record_medfuse", KINDS["medfuse"])
    with pytest.raises(UserError, match="`store and encoder` missing: model=record_medfuse looks at films"):
        fuse(config(folder, model="record_medfuse", encoder=None, store=None))
    for key, value in {"film_weights": "run", "control": "another", "adds": True}.items():
        with pytest.raises(UserError, match=f"`{key}` .*model=plain_lstm looks at no film"):
            fuse(config(folder, model="plain_lstm", **{key: value}))


def test_several_seeds_leave_each_training_and_their_mean(make_icu: Make) -> None:
    folder = make_icu(stays=120)
    run = fuse(config(folder, seeds=2, epochs=2, samples=20))
    found = [read_results(run / f"seed_{seed}")[1] for seed in (0, 1)]
    _, mean = read_results(run)
    keys = ["split", "subset", "label", "metric"]
    values = [table.set_index(keys)["value"].loc[("test", "all", "mortality", "auroc")] for table in (*found, mean)]
    assert values[0] != values[1] and abs((values[0] + values[1]) / 2 - values[2]) < 1e-9


def test_the_search_takes_the_lr_of_the_best_validation_and_records_all(make_icu: Make) -> None:
    folder = make_icu(stays=120)
    run = fuse(config(folder, lr_draws=3, lr_range=[1e-5, 1e-1], epochs=2, samples=0))
    trials = [json.loads((run / "search" / f"lr_{i}" / "trial.json").read_text()) for i in range(3)]
    assert len({trial["lr"] for trial in trials}) == 3 and all(1e-5 <= trial["lr"] <= 1e-1 for trial in trials)
    best = max(range(3), key=lambda i: (trials[i]["val_auroc"], -trials[i]["val_loss"]))
    chosen, kept = load_file(run / "model.safetensors"), load_file(run / "search" / f"lr_{best}" / "net.safetensors")
    assert all(torch.equal(chosen[name], kept[name]) for name in chosen)


def test_stage_one_weights_are_taken_strictly(make_icu: Make) -> None:
    folder = make_icu(stays=60)
    stage = fuse(config(folder, model="record_lstm", epochs=2, out=str(folder / "stage")))
    early = {"record_weights": str(stage), "freeze_record": True, "epochs": 1}
    run = fuse(config(folder, **early))
    before, after = load_file(stage / "model.safetensors"), load_file(run / "model.safetensors")
    for name, value in before.items():
        assert torch.equal(value, after[name.replace("model.", "model.record.", 1)])
    with pytest.raises(UserError, match="another shape"):
        fuse(config(folder, **early, hidden=16, out=str(folder / "other")))


def test_tuning_begins_after_the_frozen_epochs(
    make_icu: Make, tiny_encoder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[bool] = []
    real = loop.stream
    monkeypatch.setattr(loop, "stream", lambda s, p, w, images: seen.append(images) or real(s, p, w, images))
    folder = make_icu(stays=60)
    fuse(config(folder, encoder=str(tiny_encoder), freeze=False, unfreeze_after=2, epochs=3, patience=9))
    assert seen[:6:2] == [False, False, True]  # training; validation reads films throughout


@pytest.mark.parametrize("control", ["context", "another"])
def test_controls_see_no_pixels_of_the_own_film(make_icu: Make, control: str) -> None:
    """The film carries half of the planted risk, so without it the film branch is at chance."""
    folder = make_icu(stays=900)
    found = {}
    for name in ("none", control):
        run = fuse(config(folder, model="film_only", control=name, epochs=10, samples=0, out=str(folder / name)))
        table = read_results(run)[1].set_index(["split", "subset", "label", "metric"])["value"]
        found[name] = table.loc[("test", "paired", "mortality", "auroc")]
    assert found["none"] > 0.65 and found[control] < 0.62


@pytest.mark.parametrize("model", ["record_lstm", "record_gbm"])
def test_length_of_stay_has_kappa_and_hours(make_icu: Make, model: str) -> None:
    folder = make_icu(stays=200)
    path = folder / "features/samples/mortality.parquet"
    table = pd.read_parquet(path)
    left = np.random.default_rng(0).gamma(2, 40, len(table))
    hours = table.drop(columns="mortality").assign(
        los_remaining_hours=left, los_bin=np.searchsorted(24 * np.array([1, 2, 3, 4, 5, 6, 7, 8, 14]), left, "right")
    )
    hours.to_parquet(path.with_name("length_of_stay.parquet"))
    _, rows = read_results(fuse(config(folder, task="length_of_stay", model=model, epochs=1)))
    of = rows[(rows["label"] == "los_hours") & (rows["split"] == "test") & (rows["subset"] == "all")].set_index(
        "metric"
    )
    assert abs(of["value"]["kappa"]) < 0.3 and 10 < of["value"]["mae_hours"] < 100
    assert of["low"]["mae_hours"] < of["value"]["mae_hours"] < of["high"]["mae_hours"]


def test_findings_are_predicted_from_the_film_and_with_the_record_before_it(make_icu: Make) -> None:
    folder = make_icu(stays=300)
    images = pd.read_parquet(folder / "features/images.parquet")
    table = images.assign(sample_id=images["dicom_id"], predict_at_hours=np.nan)
    kept = ["sample_id", "stay_id", "subject_id", "split", "predict_at_hours", "dicom_id", "Edema"]
    table.loc[::5, "stay_id"] = pd.NA
    table.astype({"stay_id": "Int64"})[kept].to_parquet(folder / "features/samples/findings.parquet")
    for task, model in (("findings", "film_only"), ("radiology", "medfuse")):
        run = fuse(config(folder, task=task, model=model, out=str(folder / task), epochs=5))
        found = pd.read_parquet(run / "predictions/test.parquet")
        assert found["stay_id"].isna().any() == (task == "findings")
        assert found["has_image"].all() or task == "radiology"
    with pytest.raises(UserError, match="task=radiology"):
        fuse(config(folder, task="findings"))


def test_a_poorer_test_split_is_rated_beside_the_whole(make_icu: Make) -> None:
    """Without films a fused model predicts as for stays without films; predictions/ keep those of the whole split."""
    folder = make_icu(stays=400)
    run = fuse(config(folder, robustness=True, epochs=6, seed=1))
    table = read_results(run)[1].set_index(["split", "subset", "label", "metric"])["value"]
    values = {
        name: table.loc[("test", name, "mortality", "auroc")]
        for name in ("all", "without films", "without half of the films", "without the last 24 h")
    }
    assert len(set(values.values())) == 4
    assert sorted(p.name for p in (run / "predictions").iterdir()) == ["test.parquet", "val.parquet"]


def test_a_control_may_lack_a_film_that_no_other_subject_has() -> None:
    ids = pd.DataFrame({"sample_id": range(30), "subject_id": range(30)})
    labels = pd.DataFrame({"died": np.arange(30) % 2})
    scores = np.random.default_rng(0).random((1, 30, 1))
    kept = np.arange(30) != 7
    theirs = (ids[kept], labels[kept], scores[:, kept] / 2)
    asked = FuseConfig.model_construct(samples=20, seed=0)
    found = film_gain._less((ids, labels, scores), theirs, asked).set_index("label")
    wanted = film_gain._less((ids[kept], labels[kept], scores[:, kept]), theirs, asked).set_index("label")
    assert found.loc["died", "n"] == 29 and found.loc["died", "value"] == wanted.loc["died", "value"] == 0


def test_what_the_film_adds_is_told_against_record_view_and_anothers_film(make_icu: Make) -> None:
    """Half of the planted risk is in the film, so each difference is above 0; a second call trains nothing."""
    folder = make_icu(stays=900)
    run = fuse(config(folder, adds=True, film="findings", model="concat", epochs=15, samples=100))
    _, rows = read_results(run)
    added = rows[(rows["metric"] == "auroc_difference") & (rows["label"] == "macro")].set_index("subset")
    best, *controls = added.index
    assert best.startswith("paired, less record_") and controls == ["paired, less context", "paired, less another"]
    assert (added["value"] > 0).all() and (added["low"] <= added["value"]).all()
    ours, theirs = (read_results(where)[1] for where in (run, run / "controls" / "another"))
    key = ["split", "subset", "label", "metric"]
    values = [r.set_index(key)["value"].loc[("test", "paired", "macro", "auroc")] for r in (ours, theirs)]
    assert added.loc["paired, less another", "value"] == pytest.approx(values[0] - values[1])
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*.safetensors")}
    assert fuse(config(folder, adds=True, film="findings", model="concat", epochs=15, samples=100)) == run
    assert before == {path: path.stat().st_mtime_ns for path in run.rglob("*.safetensors")}
    assert len(read_results(run)[1]) == len(rows)


def test_each_split_may_be_paired_by_itself(make_icu: Make) -> None:
    """As published: train on all, choose on stays with a film, test on all."""
    folder = make_icu()
    run = fuse(config(folder, val_pairing="paired", epochs=1, samples=0))
    val, test = (pd.read_parquet(run / f"predictions/{split}.parquet") for split in ("val", "test"))
    assert val["has_image"].all() and not test["has_image"].all()


def test_late_learns_without_a_weight_on_the_parts(make_icu: Make) -> None:
    """Its average carries no gradient, so its branches always have a loss of their own."""
    run = fuse(config(make_icu(), model="late", part_weight=0.0, epochs=2, samples=0))
    losses = [loss for loss, _ in curve(run)]
    assert losses[1] < losses[0]


def test_late_refuses_a_film_head_of_other_labels(make_icu: Make) -> None:
    folder = make_icu(stays=60)
    stage = fuse(config(folder, task="phenotypes", model="film_only", epochs=1, out=str(folder / "stage")))
    with pytest.raises(UserError, match="its head has 2 labels, mortality 1"):
        fuse(config(folder, model="late", film_weights=str(stage)))


def test_bf16_scores_of_a_users_own_class_do_not_tie(make_icu: Make) -> None:
    """Whatever its last layer is: a plain Linear, or logits that are cast up after it."""
    folder = make_icu(stays=400)
    for name, head in (("Plain", "self.head(both)"), ("Cast", "self.head(both).float()")):
        (folder / f"{name}.py").write_text(
            "import torch\nfrom torch import nn\nfrom finetune.fusion.models import Output\n"
            f"class {name}(nn.Module):\n"
            "    def __init__(self, sizes):\n"
            "        super().__init__()\n"
            "        self.head = nn.Linear(sizes.inputs + sizes.film, sizes.labels)\n"
            "    def forward(self, series, lengths, film, has_image, hours):\n"
            "        both = torch.cat([series.mean(1), film], dim=1)\n"
            f"        return Output({head})\n"
        )
        distinct = {}
        for precision in ("no", "bf16"):
            AcceleratorState._reset_state(reset_partial_state=True)
            given = {"model": f"{folder / name}.py:{name}", "precision": precision, "epochs": 1, "samples": 0}
            run = fuse(config(folder, **given, out=str(folder / f"{name}_{precision}")))
            distinct[precision] = pd.read_parquet(run / "predictions/test.parquet")["logit_mortality"].nunique()
        AcceleratorState._reset_state(reset_partial_state=True)
        assert distinct["bf16"] == distinct["no"] > 70, distinct


def test_listed_seeds_are_the_seeds_of_the_trainings(make_icu: Make) -> None:
    folder = make_icu(stays=60)
    run = fuse(config(folder, seeds=[4, 1], epochs=1))
    assert sorted(p.name for p in run.glob("seed_*")) == ["seed_1", "seed_4"]
    about, _ = read_results(run)
    assert (about["seeds"], about["seed"]) == (2, 4)
    alone = fuse(config(folder, seeds=[1], epochs=1, out=str(folder / "alone")))
    ours, theirs = (pd.read_parquet(of / "predictions/test.parquet") for of in (run / "seed_1", alone))
    pd.testing.assert_frame_equal(ours, theirs)


@pytest.mark.parametrize("model", ["late", "medfuse", "attention", "film_only", "record_transformer", "mmtm"])
def test_bf16_trains_and_its_scores_do_not_tie(make_icu: Make, model: str) -> None:
    """As many distinct scores as in fp32: logits are never rounded to 8 bits."""
    folder = make_icu(stays=400)
    distinct = {}
    for precision in ("no", "bf16"):
        AcceleratorState._reset_state(reset_partial_state=True)
        given = {"model": model, "precision": precision, "epochs": 1, "samples": 0, "out": str(folder / precision)}
        table = pd.read_parquet(fuse(config(folder, **given)) / "predictions/test.parquet")
        distinct[precision] = table["logit_mortality"].nunique()
    AcceleratorState._reset_state(reset_partial_state=True)
    assert distinct["bf16"] == distinct["no"]


def test_fp16_on_a_cpu_and_a_batch_that_does_not_divide_are_refused(
    make_icu: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_icu(stays=24)
    with pytest.raises(UserError, match="fp16 needs a GPU"):
        fuse(config(folder, precision="fp16"))
    with pytest.raises(UserError, match="batch_size 7 does not divide among 2 processes"):
        run_share(7, 2, "batch_size")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")  # of an accelerate config, for any command
    with pytest.raises(UserError, match="fp16 needs a GPU"):
        accelerator()
    assert not (folder / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("model", "processes"), [("medfuse", 2), ("late", 2), ("attention", 3), ("film_only", 2)])
def test_several_processes_give_the_losses_of_one(make_icu: Make, model: str, processes: int) -> None:
    """With dropout, and with a last batch of fewer rows than processes."""
    folder = make_icu(stays=240)
    given = {"model": model, "batch_size": 30, "epoch_samples": 61, "epochs": 2, "samples": 0}
    one = fuse(config(folder, **given, out=str(folder / "one")))
    debug_launcher(_several, (str(folder), given, processes), num_processes=processes)
    found = list(dict.fromkeys(curve(folder / "several")))  # this launcher lets each process write its line
    assert np.array(found) == pytest.approx(np.array(curve(one)), rel=1e-4)


def _several(folder: str, given: dict[str, Any], processes: int) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)  # the fork's parent had one process
    several = config(Path(folder), **given, out=str(Path(folder) / "several"))
    fuse(several, argparse.Namespace(processes=processes))


@pytest.mark.slow
def test_two_processes_predict_each_sample_once_and_learn(tmp_path: Path, make_icu: Make) -> None:
    """The predictions of two processes are of all samples, and both processes end with the same weights."""
    folder = make_icu(stays=120)
    debug_launcher(_two, (str(folder),), num_processes=2)
    table = pd.read_parquet(folder / "run/predictions/test.parquet")
    wanted = pd.read_parquet(folder / "features/samples/mortality.parquet").query("split == 'test'")
    assert sorted(table["sample_id"]) == sorted(wanted["sample_id"])


def _two(folder: str) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)  # the fork's parent had one process
    fuse(config(Path(folder), model="record_lstm", store=None, encoder=None, epochs=2), argparse.Namespace(processes=2))
