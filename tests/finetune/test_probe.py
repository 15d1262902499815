"""The probes on films with planted findings."""

import json
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from lightly.utils.benchmarking.knn import knn_predict
from sklearn.metrics import roc_auc_score
from torch.overrides import TorchFunctionMode

from configs import UserError, load
from ehr_features.config import Policy
from ehr_features.files import write_json
from finetune import layouts as sources
from finetune import results
from finetune.config import ProbeConfig
from finetune.encoders import film_features, open_encoder
from finetune.fusion.film_tokens import film_tokens
from finetune.labelled import check_splits, evaluation_labels, read_films, training_labels
from finetune.probe import heads
from finetune.probe import heads as classic
from finetune.probe.evaluation import scored
from finetune.probe.main import probe
from finetune.results import read_predictions, read_results
from pretrain import encoder as encoders

World = Callable[..., Path]
TINY = {"depth": 1, "embed_dim": 24, "num_heads": 2}


def config(folder: Path, **more: object) -> ProbeConfig:
    given = {"features": str(folder / "features"), "store": "memory", "encoder": "pixels", "pixels": 4}
    given |= {"out": str(folder / "runs/probe"), "epochs": 30, "samples": 100, **more}
    return ProbeConfig.model_validate(given)


def tiny_encoder(folder: Path, **meta: object) -> Path:
    torch.manual_seed(0)
    encoder = encoders.create("vit_tiny_patch16_224", image_size=32, model_args=TINY)
    return encoders.save(folder / "pretrain/encoder", encoder, {"ehr_groups": {}, **meta})


def macro(folder: Path, column: str = "value", split: str = "test") -> float:
    rows = read_results(folder)[1]
    chosen = (rows["label"] == "macro") & (rows["metric"] == "auroc") & (rows["split"] == split)
    return rows[chosen][column].item()


@pytest.mark.parametrize("method", ["linear", "logistic", "knn"])
def test_each_method_finds_planted_findings(make_world: World, method: str) -> None:
    folder = make_world()
    out = probe(config(folder, method=method))
    assert macro(out, "low") > 0.8
    run, rows = read_results(out)
    assert run["model"] == method and run["encoder"] == "pixels 4x4" and run["warnings"] == []
    assert set(rows["split"]) == {"val", "test"} and (rows["fraction"] == 1).all()


@pytest.mark.parametrize("method", ["linear", "logistic", "knn"])
def test_shuffled_findings_stay_at_one_half(make_world: World, method: str) -> None:
    out = probe(config(make_world(shuffled=True, subjects=250), method=method))
    assert macro(out, "low") < 0.5 < macro(out, "high")


def test_the_results_are_those_of_the_predictions(make_world: World) -> None:
    folder = make_world()
    out = probe(config(folder, unit="film"))
    ids, labels, logits = read_predictions(out, "test")
    per_label = [
        roc_auc_score(labels.loc[known, n], logits.loc[known, n]) for n in labels for known in [labels[n].notna()]
    ]
    assert macro(out) == pytest.approx(np.mean(per_label), abs=1e-12)
    images = pd.read_parquet(folder / "features/images.parquet").set_index("dicom_id")
    assert (images.loc[ids["dicom_id"], "split"] == "test").all()
    assert (images.loc[ids["dicom_id"], "subject_id"].to_numpy() == ids["subject_id"].to_numpy()).all()
    assert labels["Edema"].isna().to_numpy().tolist() == (images.loc[ids["dicom_id"], "Edema"] == -1).tolist()


def test_a_study_is_scored_by_the_mean_of_its_films(make_world: World) -> None:
    folder = make_world()
    films = read_films(folder / "features")
    rows = films.rows("test")
    logits = np.random.default_rng(0).normal(size=(len(rows), 3))
    on = scored(films, rows, logits, unit="study")
    table, p = films.table.iloc[rows].reset_index(drop=True), 1 / (1 + np.exp(-logits))
    for i in (0, 5, len(on.table) - 1):
        of = np.flatnonzero(table["study_id"] == on.table["study_id"].iloc[i])
        np.testing.assert_allclose(on.probabilities[i], p[of].mean(0))
        assert on.table["num_films"].iloc[i] == len(of)
    assert len(on.table) == table["study_id"].nunique() < len(rows)


def test_lateral_films_are_left_out_and_counted(make_world: World) -> None:
    folder = make_world()
    run, _ = read_results(probe(config(folder)))
    images = pd.read_parquet(folder / "features/images.parquet")
    assert run["left_out"]["not frontal"] == (images["view"] == "LATERAL").sum()
    all_views, _ = read_results(probe(config(folder, views="all", out=str(folder / "runs/all"))))
    assert sum(s["films"] for s in all_views["splits"].values()) > sum(s["films"] for s in run["splits"].values())


def test_cached_features_give_the_same_result_as_uncached(make_world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_world()
    encoder = tiny_encoder(folder)
    first = probe(config(folder, encoder=str(encoder), out=str(folder / "runs/a"), epochs=5))
    assert len(list((folder / "runs/cache").glob("films_*.safetensors"))) == 1

    def fail(*_: object) -> None:
        raise AssertionError("the encoder ran although its features were cached")

    monkeypatch.setattr("pretrain.encoder.model.Encoder.features", fail)
    second = probe(config(folder, encoder=str(encoder), out=str(folder / "runs/b"), epochs=5))
    pd.testing.assert_frame_equal(read_results(first)[1], read_results(second)[1])


def test_other_weights_or_films_are_not_taken_from_the_cache(make_world: World) -> None:
    folder = make_world()
    store = sources.Store("memory")
    ids = sorted(store.films)[:6]
    cache = folder / "cache"
    keys = {seed: open_encoder(f"random:{tiny_encoder(folder)}", seed=seed).key for seed in (0, 1)}
    assert keys[0] != keys[1]
    a = film_features(open_encoder("pixels", pixels=4), store, ids, cache=cache)["avg"]
    b = film_features(open_encoder("pixels", pixels=8), store, ids, cache=cache)["avg"]
    assert a.shape == (6, 16) and b.shape == (6, 64)
    reordered = film_features(open_encoder("pixels", pixels=4), store, ids[::-1], cache=cache)["avg"]
    np.testing.assert_array_equal(reordered, a[::-1])


def test_features_are_kept_by_film_and_no_film_is_encoded_twice(
    make_world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another set of films encodes those that are new; a damaged file costs its own films."""
    folder = make_world()
    store, cache = sources.Store("memory"), folder / "cache"
    ids = sorted(store.films)[:9]
    encoded: list[int] = []
    frozen = open_encoder("pixels", pixels=4)
    counted = replace(frozen, encode=lambda films: encoded.append(len(films)) or frozen.encode(films))
    monkeypatch.setattr("finetune.encoders.PART", 3)
    whole = film_features(frozen, store, ids)["avg"]
    first = film_features(counted, store, ids[:6], cache=cache, batch_size=2)["avg"]
    assert sum(encoded) == 6 and len(list(cache.iterdir())) == 2
    other = film_features(counted, store, [*ids[4:], ids[5]], cache=cache)["avg"]  # five films, two of them known
    assert sum(encoded) == 9 and np.array_equal(first, whole[:6])
    assert np.array_equal(other, whole[[4, 5, 6, 7, 8, 5]])
    path = sorted(cache.iterdir())[0]
    path.write_bytes(path.read_bytes()[:50])
    assert np.array_equal(film_features(counted, store, ids, cache=cache)["avg"], whole) and sum(encoded) == 12


def test_tokens_are_kept_by_film(make_world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_world()
    store, cache, frozen = sources.Store("memory"), folder / "cache", open_encoder("pixels")
    ids, seen, read = sorted(store.films)[:7], list[str](), store.read
    monkeypatch.setattr("finetune.fusion.film_tokens.PART", 3)
    whole, _ = film_tokens(frozen, store, ids, folder / "whole")
    monkeypatch.setattr(store, "read", lambda films: seen.extend(films) or read(films))
    film_tokens(frozen, store, ids[:4], cache)
    found, places = film_tokens(frozen, store, [*ids[2:], ids[3]], cache)  # two of them known
    assert sorted(seen) == ids and places == 16
    rows = np.arange(6)
    assert np.array_equal(found.read(rows)[0], whole.read(np.array([2, 3, 4, 5, 6, 3]))[0])


def test_an_encoder_that_saw_test_subjects_is_refused(make_world: World) -> None:
    folder = make_world()
    encoder = tiny_encoder(folder)
    images = pd.read_parquet(folder / "features/images.parquet")
    images[["subject_id"]].drop_duplicates().to_parquet(folder / "pretrain/seen_subjects.parquet")
    with pytest.raises(UserError, match=r"its pretraining saw .* val or test subjects.*allow_leak=true"):
        probe(config(folder, encoder=str(encoder)))
    assert not (folder / "runs/probe").exists()
    out = probe(config(folder, encoder=str(encoder), allow_leak=True, epochs=2))
    run, _ = read_results(out)
    assert run["allow_leak"] and run["pretraining_films"] == "leak" and "LEAK" in run["warnings"][0]


def test_an_encoder_of_the_train_subjects_passes_and_one_of_unknown_films_is_named(make_world: World) -> None:
    folder = make_world()
    encoder = tiny_encoder(folder)
    run, _ = read_results(probe(config(folder, encoder=str(encoder), epochs=2, out=str(folder / "runs/unknown"))))
    assert run["pretraining_films"] == "unknown" and "unknown" in run["warnings"][0]
    images = pd.read_parquet(folder / "features/images.parquet").query("split == 'train'")
    images[["subject_id"]].drop_duplicates().to_parquet(folder / "pretrain/seen_subjects.parquet")
    run, _ = read_results(probe(config(folder, encoder=str(folder / "pretrain"), epochs=2)))
    assert run["pretraining_films"] == "train" and run["warnings"] == []


def test_the_heads_of_the_grid_do_not_touch_each_other() -> None:
    rng = np.random.default_rng(0)
    x = {"cls": rng.normal(size=(60, 5)).astype(np.float32), "avg": rng.normal(size=(60, 5)).astype(np.float32)}
    y = (x["avg"][:, :2] + 0.5 * rng.normal(size=(60, 2)) > 0).astype(np.float32)
    y[::7, 0] = np.nan
    train, val = (
        heads.Data({k: v[rows] for k, v in x.items()}, y[rows]) for rows in (np.arange(40), np.arange(40, 60))
    )
    more = {"epochs": 12, "patience": 12, "batch_size": 16, "seed": 3}
    predict, chosen = heads.linear(
        train, val, pools=["cls", "avg", "both"], lrs=[1e-3, 1e-2], weight_decays=[0.0, 0.1], **more
    )
    assert chosen["pool"] in ("avg", "both") and chosen["heads"] == 12
    alone, again = heads.linear(
        train, val, pools=[chosen["pool"]], lrs=[chosen["lr"]], weight_decays=[chosen["weight_decay"]], **more
    )
    assert again["epoch"] == chosen["epoch"]
    np.testing.assert_allclose(alone(x), predict(x), atol=1e-5)


@pytest.mark.parametrize(("lr", "decay"), [(0.05, 0.1), (0.3, 0.0), (0.003, 1.0)])
def test_a_linear_head_is_torchs_adamw_on_the_mean_cross_entropy(lr: float, decay: float) -> None:
    rng = np.random.default_rng(1)
    x = {"avg": rng.normal(size=(32, 4)).astype(np.float32)}
    y = (x["avg"] @ np.array([[1.0], [0.5], [0], [-1]]) + rng.normal(size=(32, 1)) > 0).astype(np.float32)
    data = heads.Data(x, y)
    more = {"epochs": 40, "patience": 40, "batch_size": 32, "seed": 0}
    predict, chosen = heads.linear(data, data, pools=["avg"], lrs=[lr], weight_decays=[decay], **more)
    scaled = torch.from_numpy(heads.Scale(x)(x))
    layer = torch.nn.Linear(4, 1)
    torch.nn.init.zeros_(layer.weight)
    torch.nn.init.zeros_(layer.bias)
    groups = [{"params": [layer.weight], "weight_decay": decay}, {"params": [layer.bias], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=lr)
    for _ in range(chosen["epoch"]):
        optimizer.zero_grad()
        torch.nn.functional.binary_cross_entropy_with_logits(layer(scaled), torch.from_numpy(y)).backward()
        optimizer.step()
    assert chosen["epoch"] > 1, "one step cannot show the moments"
    np.testing.assert_allclose(predict(x), layer(scaled).detach().numpy(), atol=1e-5)


def test_the_quick_macro_auroc_equals_scikit_learn_with_ties_and_unknown_labels() -> None:
    rng = np.random.default_rng(0)
    y = (rng.random((50, 3)) < 0.4).astype(np.float32)
    y[rng.random(y.shape) < 0.2] = np.nan
    y[:, 2] = 0  # one class: left out
    scores = np.round(rng.normal(size=(50, 4, 3)), 1)
    for h, value in enumerate(heads.macro_auroc(y, scores)):
        wanted = [
            roc_auc_score(y[k, i], scores[k, h, i]) for i in range(2) for k in [np.flatnonzero(~np.isnan(y[:, i]))]
        ]
        assert value == pytest.approx(np.mean(wanted), abs=1e-12)
    with pytest.raises(UserError, match="both classes"):
        heads.macro_auroc(np.zeros((5, 2), np.float32), np.zeros((5, 1, 2)))


def test_knn_votes_of_a_hand_worked_table() -> None:
    near, votes = np.array([[1.0, 0.5]]), np.array([[[1.0, np.nan], [0.0, np.nan]]])
    half = np.exp(-0.5 / 0.5)
    got = classic._vote(near, votes, 0.5, np.array([0.1, 0.2]))
    np.testing.assert_allclose(got, [[1 / (1 + half), 0.2]])


def test_knn_votes_are_lightlys_where_a_film_has_one_label() -> None:
    rng = np.random.default_rng(0)
    bank, query = (classic._unit(rng.normal(size=(n, 8)).astype(np.float32), "cpu") for n in (60, 40))
    labels = (rng.random(60) < 0.4).astype(np.float32)
    (near, rows), *_ = classic.nearest(query, bank, 7)
    ours = classic._vote(near, labels[rows][:, :, None], 0.07, np.zeros(1))[:, 0]
    theirs = knn_predict(
        query, bank.T.contiguous(), torch.from_numpy(labels).long(), num_classes=2, knn_k=7, knn_t=0.07
    )
    np.testing.assert_array_equal(ours > 0.5, theirs[:, 0].numpy() == 1)


@pytest.mark.parametrize("k", [1, 7, 40])
def test_neighbours_by_blocks_are_those_of_the_whole_table(k: int) -> None:
    """Blocks of both tables, some shorter than k, against a sort of all similarities at once."""
    rng = np.random.default_rng(0)
    x, bank = (torch.from_numpy(rng.normal(size=(n, 6)).astype(np.float32)) for n in (23, 50))
    near, rows = (np.concatenate(of) for of in zip(*classic.nearest(x, bank, k, queries=5, banked=16), strict=True))
    whole = (x @ bank.T).numpy()
    np.testing.assert_array_equal(rows, np.argsort(-whole, axis=1)[:, :k])
    np.testing.assert_allclose(near, -np.sort(-whole, axis=1)[:, :k], atol=1e-6)


def test_knn_holds_no_table_of_films_by_films() -> None:
    """3,000 films among 20,000: all similarities would be 240 MB, and their int64 order twice that."""
    rng = np.random.default_rng(0)
    train, val = (
        heads.Data({"cls": rng.normal(size=(n, 4)).astype(np.float32)}, (rng.random((n, 2)) < 0.4).astype(np.float32))
        for n in (20_000, 3_000)
    )
    sizes: list[int] = []

    class Seen(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            sizes.append(out.numel() if isinstance(out, torch.Tensor) else 0)
            return out

    tracemalloc.start()
    with Seen():
        heads.knn(train, val, pools=["cls"], neighbours=[5, 20])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert max(sizes) <= 512 * 16_384 and peak < 40e6


def test_what_uncertain_and_empty_findings_become() -> None:
    raw = pd.DataFrame({"Edema": [1.0, 0.0, -1.0, np.nan]})
    nan = np.nan
    for uncertain, empty, wanted in (
        ("ignore", "zeros", [1, 0, nan, 0]),
        ("zeros", "ignore", [1, 0, 0, nan]),
        ("ones", "zeros", [1, 0, 1, 0]),
    ):
        np.testing.assert_array_equal(training_labels(raw, Policy(uncertain, empty))[:, 0], wanted)
    np.testing.assert_array_equal(evaluation_labels(raw)[:, 0], [1, 0, nan, 0])


def test_a_finding_counts_the_same_films_whatever_else_is_asked_for(make_world: World) -> None:
    folder = make_world()
    images = pd.read_parquet(folder / "features/images.parquet")
    images.loc[images.index[::2], "Edema"] = np.nan  # other findings of these films are known: edema is negative
    images.to_parquet(folder / "features/images.parquet")
    more = {"epochs": 2, "samples": 0}
    rows = [
        read_results(probe(config(folder, labels=labels, out=str(folder / f"runs/{bool(labels)}"), **more)))[1]
        for labels in (None, ["Edema"])
    ]
    alone, among = (r[(r["label"] == "Edema") & (r["metric"] == "auroc")][["split", "n", "positives"]] for r in rows)
    assert alone.to_numpy().tolist() == among.to_numpy().tolist()


def test_a_subject_in_two_splits_is_refused(make_world: World) -> None:
    folder = make_world()
    path = folder / "features/images.parquet"
    images = pd.read_parquet(path)
    images.loc[images.index[:1], "split"] = "test" if images["split"].iloc[0] != "test" else "val"
    images["subject_id"] = images["subject_id"].where(images.index > 1, 100)
    images.loc[images.index[1], "split"] = "train"
    images.to_parquet(path)
    with pytest.raises(UserError, match="subjects are in two splits"):
        check_splits(read_films(folder / "features", views="all"))


def test_an_unknown_finding_names_the_nearest(make_world: World) -> None:
    with pytest.raises(UserError, match="no finding `Edma`; did you mean `Edema`"):
        probe(config(make_world(), labels=["Edma"]))


def test_a_finished_probe_is_not_done_again(make_world: World, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_world()
    probe(config(folder, epochs=2))
    before = (folder / "runs/probe/results.json").stat().st_mtime_ns
    probe(config(folder, epochs=2))
    assert (folder / "runs/probe/results.json").stat().st_mtime_ns == before
    assert "complete" in capsys.readouterr().out
    with pytest.raises(UserError, match="another config"):
        probe(config(folder, epochs=3))


def test_a_damaged_results_file_is_named(tmp_path: Path) -> None:
    write_json(tmp_path / "results.json", {"run": {}, "rows": []})
    with pytest.raises(UserError, match=r"results.json: `run.task` is missing"):
        read_results(tmp_path)
    guard = {"held_out": 3, "seen": 9, "both": 0}
    for key, value, says in (
        ("guard", {"seen": 9, "both": 0}, "`run.guard.held_out` is missing"),
        ("guard", guard | {"seen": "9 of 12"}, "`run.guard.seen`"),
        ("prevalence", {"Edema": 1.5}, "`run.prevalence.Edema`"),
        ("fractions", [3], "`run.fractions.0`"),
    ):
        write_json(tmp_path / "results.json", {"run": {"task": "findings", "guard": guard, key: value}, "rows": []})
        with pytest.raises(UserError, match=f"results.json: {says}"):
            read_results(tmp_path)


def test_results_are_of_the_shipped_schema_and_a_null_has_its_reason(make_world: World) -> None:
    shipped = json.loads((Path(results.__file__).parent / "results.schema.json").read_text())
    assert shipped == results.Written.model_json_schema()
    row = shipped["$defs"]["WrittenRow"]
    assert (
        set(row["required"]) == set(row["properties"]) == set(results.COLUMNS) and row["additionalProperties"] is False
    )
    folder = make_world()
    images = pd.read_parquet(folder / "features/images.parquet").assign(Edema=0.0)  # one class only
    images.to_parquet(folder / "features/images.parquet")
    written = json.loads((probe(config(folder, epochs=2)) / "results.json").read_text())
    assert all(set(r) == set(row["properties"]) for r in written["rows"])
    assert set(shipped["$defs"]["WrittenRun"]["required"]) <= set(written["run"])
    nulls = [r for r in written["rows"] if r["value"] is None]
    assert {r["label"] for r in nulls} == {"Edema"} and all(r["reason"].startswith("one class") for r in nulls)
    nulls[0]["reason"] = None
    with pytest.raises(ValueError, match="null without a `reason`"):
        results.Written.model_validate(written)


def test_the_shipped_configs_load() -> None:
    root = Path(__file__).parents[2] / "configs"
    wanted = {"probe_linear": "linear", "demo/probe_linear": "linear", "probe_nih": "linear", "probe_csv": "linear"}
    for name, method in (wanted | {"probe_chexpert": "transfer"}).items():
        assert load(ProbeConfig, root / f"{name}.yaml").method == method
        assert (root / f"{name}.yaml").read_text().startswith("# ")


def test_a_pool_of_stages_is_computed_where_it_is_asked_for(make_world: World) -> None:
    """Raw pixels have no stages: the same head on the same numbers."""
    folder = make_world()
    given = {"method": "logistic", "strengths": [0.1]}
    plain = probe(config(folder, **given, out=str(folder / "runs/avg")))
    staged = probe(config(folder, **given, pools=["stages"], out=str(folder / "runs/stages")))
    assert macro(plain) == pytest.approx(macro(staged), abs=1e-9)
    torch.manual_seed(0)
    args = {"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16]}
    made = encoders.create("resnet18", image_size=32, model_args=args)
    encoder = str(encoders.save(folder / "pretrain/encoder", made, {"ehr_groups": {}}).parent)
    films = np.random.default_rng(0).integers(0, 256, (3, 32, 32), dtype=np.uint8)
    widths = {
        pools: {pool: value.shape[1] for pool, value in open_encoder(encoder, pools=pools).encode(films).items()}
        for pools in ((), ("cls", "avg", "both"), ("avg", "stages"), ("stages",))
    }
    assert widths[()] == widths["cls", "avg", "both"] == {"avg": 16}
    assert widths["avg", "stages"] == {"avg": 16, "stages": 48} and widths["stages",] == {"stages": 48}
    run = probe(config(folder, **given, encoder=encoder, pools=["avg", "stages"], allow_leak=True))
    head = json.loads((run / "head.json").read_text())
    again = {"method": "transfer", "head": str(run), "encoder": encoder, "allow_leak": True}
    moved = probe(config(folder, **again, out=str(folder / "runs/again")))
    assert head["pools"][0] in ("avg", "stages") and macro(moved) == pytest.approx(macro(run), abs=1e-9)
