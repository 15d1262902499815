"""A table of films outside MIMIC in `probe` and `fuse`: the guard, the static record, what is refused."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from configs import UserError, load
from ehr_features.files import write_json
from ehr_features.own_films.config import TableConfig
from ehr_features.own_films.read import read_films_table
from ehr_features.own_films.record import encode_group
from finetune.config import FuseConfig, ProbeConfig
from finetune.fusion.own_samples import check_model, load_table, read_only
from finetune.fusion.train import fuse, kind_of
from finetune.guard import check_encoder
from finetune.probe.main import probe
from finetune.results import read_results
from pretrain.seen import write_seen
from tests.written import encoder_json

NUM = 240


@pytest.fixture
def table(tmp_path: Path) -> str:
    """240 films of 120 people; the sickness is that of the ward and follows the age."""
    who = np.arange(NUM) // 2
    age = 20 + (who * 37) % 60
    own = pd.DataFrame({"path": [f"{i}.png" for i in range(NUM)], "patient": [f"P{p}" for p in who], "age": age})
    own = own.assign(ward=np.where(age > 50, "icu", "er"), died=who % 2, sick=(age > 50).astype(int))
    own.to_csv(tmp_path / "my.csv", index=False)
    return str(tmp_path / "my.csv")


def encoder(folder: Path, given: TableConfig, groups: dict[str, str], splits: tuple[str, ...] = ("train",)) -> Path:
    """An encoder/ folder as a pretraining on the table leaves it, without its weights."""
    own = read_films_table(given, labels=False)
    write_seen(folder, own.films[own.films["split"].isin(splits)], None)
    (folder / "encoder").mkdir()
    meta = encoder_json(ehr_groups=groups, features_hash=own.digest, splits_seen=list(splits))
    write_json(folder / "encoder/encoder.json", meta)
    return folder / "encoder"


def guarded(folder: Path, given: TableConfig, **more: Any) -> Any:
    own = read_films_table(given, labels=True)
    return check_encoder(folder, own.films[["subject_id", "split"]], own=own, same_source=False, **more)


def test_the_guard_knows_the_table_of_its_pretraining_and_the_split_of_another_seed(tmp_path: Path, table: str) -> None:
    given = TableConfig(table=table, columns=["sick"])
    made = encoder(tmp_path / "run", given, {"age": "study"})
    seen = guarded(made, given, labels=["sick"])
    assert (seen.films, seen.supervision, seen.warnings) == ("train", "self-supervised", [])
    assert seen.compared["both"] == 0 < seen.compared["held_out"]
    part = pd.read_csv(table)[
        : NUM // 2
    ]  # another table of the same people: known by their ids, unless those are short
    for name, ids, films in (("text", part["patient"], "train"), ("short", part["patient"].str[1:], "other source")):
        part.assign(patient=ids).to_csv(tmp_path / f"{name}.csv", index=False)
        assert guarded(made, TableConfig(table=str(tmp_path / f"{name}.csv"))).films == films, name
    with pytest.raises(UserError, match=r"its pretraining saw .* of the val or test subjects"):
        guarded(made, given.model_copy(update={"seed": 1}))


def test_an_encoder_that_saw_held_out_films_or_was_told_a_label_is_not_self_supervised(
    tmp_path: Path, table: str
) -> None:
    given = TableConfig(table=table, columns=["sick"])
    late = encoder(tmp_path / "late", given, {"age": "study"}, ("train", "test"))
    with pytest.raises(UserError, match=r"the same films\.table, films\.split and films\.seed"):
        guarded(late, given)
    for name, groups in (("label", {"sick": "study"}), ("outcome", {"died": "discharge"})):
        told = guarded(encoder(tmp_path / name, given, groups), given, labels=["sick"])
        assert told.supervision == "outcome-supervised"
        assert ("a label of this evaluation" if name == "label" else "only at discharge") in told.warnings[0]


def test_any_column_is_a_group_of_the_metadata_baseline_and_outcomes_and_labels_are_none(
    tmp_path: Path, table: str
) -> None:
    given = {"films": {"table": table, "columns": ["sick"]}, "encoder": "metadata", "method": "logistic"}
    given |= {"groups": ["age", "ward"], "out": str(tmp_path / "runs/probe"), "samples": 20}
    about, rows = read_results(probe(given))
    assert rows.query("split == 'test' and label == 'sick' and metric == 'auroc'")["value"].item() == 1
    assert sum(part["films"] for part in about["splits"].values()) == NUM
    films = {"table": table, "columns": ["sick"], "outcomes": ["died"]}
    for group, says in (("died", "known only at discharge"), ("sick", "`sick` is a path, an id, the split or a label")):
        with pytest.raises(UserError, match=says):
            probe({**given, "films": films, "groups": [group], "out": str(tmp_path / "runs/x")})


def test_the_static_record_of_a_fusion_is_one_step_of_the_tables_columns(table: str) -> None:
    films = {"table": table, "columns": ["sick"]}
    config = load(FuseConfig, {"films": films, "groups": ["age", "ward"], "encoder": "x", "out": "runs/x"})
    samples, own = load_table(config, {f"{i}" for i in range(0, NUM, 2)})  # type: ignore[arg-type]
    train = (own.table["split"] == "train").to_numpy()
    assert own.own is not None
    expected = np.concatenate([encode_group(own.own, g, train, (), table)[0] for g in ("age", "ward")], axis=1)
    batch = samples.batch(np.array([3, 8]))
    np.testing.assert_array_equal(batch["series"], expected[[3, 8]][:, None])
    assert batch["lengths"].tolist() == [1, 1] and batch["has_image"][:, 0].tolist() == [False, True]
    there = read_only(samples)
    assert there.film_ids == [f"{i}" for i in range(0, NUM, 2)] and there.films[8, 0] == 4 and there.films[3, 0] == -1


def test_record_models_learn_from_a_table_alone(tmp_path: Path, table: str) -> None:
    films = {"table": table, "columns": ["sick"]}
    given = {"films": films, "groups": ["ward"], "out": str(tmp_path / "runs/fuse"), "model": "record_gbm"}
    about, rows = read_results(fuse({**given, "samples": 20}))
    assert about["task"] == "labels" and about["model"] == "record_gbm"
    found = rows.query("split == 'test' and subset == 'all' and label == 'sick' and metric == 'auroc'")
    assert found["value"].item() == 1
    predicted = pd.read_parquet(tmp_path / "runs/fuse/predictions/test.parquet")
    assert {"sample_id", "subject_id", "dicom_id"} <= set(predicted) and "stay_id" not in predicted


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"max_hours": 24}, "`max_hours` reads hourly series"),
        ({"robustness": True}, "`robustness` reads hourly series"),
        ({"task": "mortality"}, "with films.table the task is `labels`"),
        ({"film": "both"}, "`film` both: logits of findings"),
        ({"features": "features"}, "wanted one of `features`"),
        ({"films": 3}, "the number of films is now called `num_films`"),
        ({"films": None, "features": "features", "groups": ["age"]}, "`groups` goes with films.table"),
    ],
)
def test_what_needs_hours_or_mimic_is_refused_by_the_config(keys: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        load(FuseConfig, {"films": {"table": "my.csv"}, "encoder": "x", "out": "runs/x", **keys})


@pytest.mark.parametrize(
    ("model", "groups", "says"),
    [
        ("medfuse_time", ["age"], "has no hourly series: take medfuse"),
        ("film_tokens", ["age"], "reads notes or tokens"),
        ("medfuse", [], "reads a record: name columns of my.csv with 'groups="),
        ("record_lstm", [], "reads a record"),
    ],
)
def test_models_that_read_what_a_table_has_not_are_refused(model: str, groups: list[str], says: str) -> None:
    kind = kind_of(model)
    given = {"films": {"table": "my.csv"}, "encoder": "x", "out": "runs/x", "groups": groups}
    with pytest.raises(UserError, match=says):
        check_model(FuseConfig.model_validate(given | {"model": "medfuse"}).model_copy(update={"model": model}), kind)
    check_model(FuseConfig.model_validate({**given, "groups": []}), kind_of("film_only"))


def test_probes_of_a_table_have_their_own_split_seed(table: str) -> None:
    given = {"films": {"table": table}, "encoder": "metadata", "out": "runs/x"}
    configs = [ProbeConfig.model_validate({**given, "seed": seed}) for seed in (0, 1)]
    digests = {read_films_table(c.films, labels=False).digest for c in configs if c.films is not None}
    assert len(digests) == 1
