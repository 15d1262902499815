"""The search for recipes: what chooses is apart from what reports, and a row says what was run."""

import argparse
import shlex

import pandas as pd
import pytest
import torch

from benchmarks import recipes
from configs import UserError, load
from finetune.demo import CONFIGS
from pretrain import build
from pretrain.config import PretrainConfig
from pretrain.encoder.model import Encoder


def given(out, **more):
    return argparse.Namespace(
        **{"out": out, "report": None, "name": None, "labelled": None, "keys": [], "seconds": 9.0, "tries": [0, 2]}
        | more
    )


def test_patients_who_report_are_in_no_table_that_chooses(films, tmp_path, monkeypatch):
    monkeypatch.setattr(recipes, "pack", lambda *_: None)
    kept = set(films.loc[films["fold"].isin(recipes.KEPT), "patient"])
    for fold in (0, 1, 2):
        recipes.data(f"real {fold}", tmp_path, 50, tmp_path / "films.csv", "nih")
        for name in ("pretrain", "probe"):
            assert not kept & set(pd.read_csv(tmp_path / f"real_{fold}" / f"{name}.csv")["patient"])
    recipes.data("real 3", tmp_path, 50, tmp_path / "films.csv", "nih")
    probed = pd.read_csv(tmp_path / "real_3" / "probe.csv")
    assert set(probed.loc[probed["split"] == "test", "patient"]) == set(films.loc[films["fold"] == 3, "patient"])


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--data", "real 3"], "kept for --report"),
        (["--data", "10"], "kept for --report"),
        (["--data", "real", "0"], "'real 0'"),
        ([], "real 0 needs --films"),
        (["--report", "try_1"], "real 3 needs --films"),
        (["--keys", "seed=1"], "go together"),
        (["--name", "one"], "go together"),
    ],
)
def test_words_that_would_fail_late_or_mislead_are_refused_at_once(words, says, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["recipes", str(tmp_path / "out"), *words])
    with pytest.raises(SystemExit):
        recipes.main()
    assert says in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_try_is_itself_whatever_was_drawn_before_and_its_row_says_what_was_run(tmp_path, monkeypatch):
    assert recipes.draw(1) == recipes.draw(1) != recipes.draw(2)
    done = []

    def data(name, *_):
        own = ["films.views=all"] if name.startswith("real") else []
        return recipes.Data([], own, lambda encoder, folder: {1.0: 0.5 + len(done) / 10, 0.1: 0.4})

    def attempt(out, name, where, given, keys):
        done.append((name, where))
        row = {"try": name, "data": where, "keys": shlex.join(keys), "seconds": 9, "steps": 5}
        return row | recipes.scored(given, "x", out, "auroc") | recipes.scored(given, "random:x", out, "random")

    monkeypatch.setattr(recipes, "data", data)
    monkeypatch.setattr(recipes, "attempt", attempt)
    path = tmp_path / "recipes.csv"
    args = given(tmp_path, best=1, films=None, subjects=50)
    for _ in range(2):  # the second time nothing is left to run
        recipes.go_on(path, recipes.asked(args, recipes.read(path)), ["1", "2", "real 0"], args)
        assert done == [("try_0", "1"), ("try_1", "1"), ("try_1", "2"), ("try_1", "real 0")]  # the better one goes on
    rows = recipes.read(path)
    assert rows[3]["keys"] == f"{rows[1]['keys']} films.views=all"
    with pytest.raises(UserError, match="try_0 with other keys"):
        recipes.asked(given(tmp_path, seconds=8.0), rows)
    with pytest.raises(UserError, match="no such try"):
        recipes.asked(given(tmp_path, report=["try_1", "try_99"]), rows)
    assert recipes.asked(given(tmp_path, report=["try_1"]), rows)["try_1"] == shlex.split(rows[1]["keys"])
    assert recipes.asked(given(tmp_path, report=["try_7"]), rows)["try_7"][2:] == recipes.draw(7)  # shipped


def test_every_draw_can_be_trained():
    """A draw that is refused ends the search: DenseNets of 48 px were drawn with focal views of 24, too small."""
    seen = set()
    for number in range(100):
        config = load(PretrainConfig, CONFIGS / "pretrain_vit_tiny.yaml", [*recipes.COMMON, *recipes.draw(number)])
        focal = [config.views.focal_size] if config.views.num_focal else []
        sides = [config.encoder.image_size, *focal]
        if (key := (config.method, config.encoder.arch, str(config.encoder.model_args), *sides)) not in seen:
            seen.add(key)
            encoder = next(m for m in build.method(config).modules() if isinstance(m, Encoder)).eval()
            for side in sides:
                assert encoder(torch.zeros(1, encoder.meta["in_chans"], side, side)) is not None
    assert len(seen) > 30


def test_a_row_has_its_own_random_weights_and_heads_on_the_last_layer(tmp_path, monkeypatch):
    """The shipped rows have such heads; the demo's own config reads all stages."""
    asked = []
    monkeypatch.setattr(recipes, "hospital", lambda *_: ["features=f", "store=s"])
    monkeypatch.setattr(recipes, "call", lambda *words: asked.append(words))
    monkeypatch.setattr(recipes, "read_json", lambda _: {"step": 3, "processor_seconds": 2.0})
    of = {True: 0.6, False: 0.7}
    monkeypatch.setattr(
        recipes, "auroc_rows", lambda run, *_: [{"label": "macro", "value": of[run.name == "probe_random"]}]
    )
    row = recipes.attempt(tmp_path, "a", "1", recipes.data("1", tmp_path, 50, None), ["method=msn"])
    assert (row["auroc"], row["random_tenth"], row["steps"]) == (0.7, 0.6, 3)
    encoder = tmp_path / "a_1" / "encoder"
    (pretrained, *_), *probes = asked
    assert pretrained == "pretrain" and all("pools=[cls,avg,both]" in words for words in probes)
    assert [words[4] for words in probes] == [f"encoder={encoder}", f"encoder=random:{encoder}"]
