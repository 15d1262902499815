"""The `next:` line of each command, copied: its own parser and schema take it, and it names what the user has."""

from __future__ import annotations

import json
import shlex
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

import ehr_features.__main__ as tables
import finetune.__main__ as evaluates
import pretrain.__main__ as trains
from configs import cli, load
from configs.commands import COMMANDS
from ehr_features.config import FeaturesConfig
from pretrain.config import ImagesConfig, PretrainConfig

PARSERS = {"ehr_features": tables.parser, "finetune": evaluates.parser, "pretrain": trains.parser}


def resolved(printed: str, capsys: Any) -> tuple[str, dict[str, Any]]:
    """The command of the only `next:` line, and the config that its parser makes of it."""
    (line,) = [line for line in printed.splitlines() if line.startswith("next: ")]
    _, name, *words = shlex.split(line.removeprefix("next: "))
    command = COMMANDS[name]
    parser = PARSERS[command.module]()
    with pytest.raises(SystemExit) as left:
        cli.main(parser, [command.subcommand, *words, "--print-config"])
    assert left.value.code == 0, line
    return f"{name} {words[0]}", yaml.safe_load(capsys.readouterr().out)


@pytest.mark.parametrize("config", ["features", "demo/features"])
@pytest.mark.parametrize("films", ["mimic_cxr=/data/cxr", "mimic_cxr=null"])
def test_features_points_to_films_or_without_films_to_the_record(
    config: str, films: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    out = tmp_path / "features"
    monkeypatch.setattr("ehr_features.build.build", lambda config: out)
    monkeypatch.setattr("ehr_features.films.summary.summary", lambda out: [])
    given = load(FeaturesConfig, config, ["mimic_iv=/data/iv", films, f"out={out}"])
    tables._build(given, Namespace(config=config))
    name, found = resolved(capsys.readouterr().out, capsys)
    of = "demo/" if config.startswith("demo/") else ""
    if films.endswith("null"):
        assert name == f"fuse {of}fuse_mortality" and found["features"] == str(out) and found["encoder"] is None
    else:
        assert name == f"images {of}images" and found["mimic_cxr"] == "/data/cxr"
        assert found["out"] == str(tmp_path / "store")


@pytest.mark.parametrize(
    ("config", "keys", "name"),
    [
        ("images", ["mimic_cxr=/data/cxr"], "pretrain pretrain_vit_small"),
        ("demo/images", ["mimic_cxr=/data/cxr"], "pretrain demo/pretrain_resnet"),
        ("own_films/images", ["films=a table.csv"], "pretrain own_films/pretrain"),
        ("own_films/images", ["films=t.parquet", "layout=chexpert", "path=file"], "pretrain own_films/pretrain"),
        ("own_films/images", ["films=t.csv", "layout=null"], "pretrain own_films/pretrain"),
        ("images", ["films=folder", "mimic_cxr=null"], "pretrain own_films/pretrain"),
    ],
)
def test_images_points_to_the_pretraining_of_these_films(
    config: str, keys: list[str], name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    store = tmp_path / "store"
    for folder, of in (("a", "/data/other"), ("features", "/data/other"), ("mine", "/data/cxr")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "images.parquet").touch()
        (tmp_path / folder / "provenance.json").write_text(json.dumps({"config": {"mimic_cxr": of}}))
    store.mkdir()
    (store / "store.json").touch()
    monkeypatch.setattr("pretrain.store.pack", lambda config, part: store)
    given = load(ImagesConfig, config, [*keys, f"out={store}"])
    trains._images(given, Namespace(shard="1/1", config=config))
    said, found = resolved(capsys.readouterr().out, capsys)
    assert said == name and found["store"] == str(store)
    if given.films is None:
        assert found["features"] == str(tmp_path / "mine")  # the features that were made with these films
    else:
        assert found["features"] is None and found["films"]["layout"] == (given.layout or "csv")
        assert found["films"]["table"] == (given.films if "." in given.films else "my.csv")
        assert found["films"]["path"] == given.path


@pytest.mark.parametrize(
    ("config", "keys", "name"),
    [
        ("pretrain_vit_small", ["features=f"], "probe probe_linear"),
        ("demo/pretrain_resnet", ["features=f"], "probe demo/probe_linear"),
        ("own_films/pretrain", ["films.table=my films.csv", "films.seed=3"], "probe own_films/probe"),
    ],
)
def test_pretrain_points_to_a_probe_of_its_encoder_on_the_same_films(
    config: str, keys: list[str], name: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    import pretrain.train as module

    given = load(PretrainConfig, config, [*keys, "store=s", "out=runs/x"])
    monkeypatch.setattr(module, "train", lambda config, args: Path(config.out))
    monkeypatch.setattr("pretrain.run.is_main", lambda: True)
    trains._train(given, SimpleNamespace(estimate=False, config=config))  # type: ignore[arg-type]
    said, found = resolved(capsys.readouterr().out, capsys)
    assert said == name and found["encoder"] == "runs/x" and found["out"] == "runs/x_probe" and found["store"] == "s"
    films = found["films"] or {}
    assert found["features"] == given.features and films.get("table") == given.films.table
    if films:
        assert films["seed"] == 3


def test_check_points_to_features_with_the_same_words(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr("ehr_features.check.check", lambda config: 0)
    words = ["mimic_iv=/data/my iv", "out=f"]
    tables._check(load(FeaturesConfig, "features", words), Namespace(config="features", overrides=words))
    name, found = resolved(capsys.readouterr().out, capsys)
    assert name == "features features" and found["mimic_iv"] == "/data/my iv" and found["out"] == "f"
