"""`import ehr_features, pretrain, finetune`: the public names, imported lazily."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import ehr_features.build
import finetune.probe.main
import finetune.report
import pretrain.train
from configs import UserError, __version__, load
from finetune.config import FuseConfig

FACES = {
    "ehr_features": ["build", "series", "static"],
    "pretrain": ["encoder", "loss", "store", "train"],
    "finetune": ["fuse", "fusion", "metrics", "probe", "report", "results"],
}


@pytest.mark.parametrize("name", FACES)
def test_a_package_shows_what_a_notebook_needs_and_loads_no_torch_before_it_is_used(name: str) -> None:
    code = f"import sys, {name}\nassert not {{'torch', 'pandas', 'yaml'}} & set(sys.modules)\nprint(dir({name}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == str(["__version__", *FACES[name]]), done.stderr
    package = importlib.import_module(name)
    assert package.__version__ == __version__
    assert all(getattr(package, shown).__doc__ for shown in FACES[name])
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        package.nothing  # noqa: B018


@pytest.mark.parametrize("call", [ehr_features.build, pretrain.train, finetune.probe, finetune.fuse])
def test_a_step_takes_a_dict_a_path_or_a_name_and_names_every_fault(tmp_path: Path, call) -> None:
    (tmp_path / "a.yaml").write_text("ot: x\nsed: 1\n")
    for config in ({"ot": tmp_path, "sed": 1}, tmp_path / "a.yaml"):
        with pytest.raises(UserError, match=r"(?s)unknown key `ot`.*unknown key `sed`"):
            call(config)
    with pytest.raises(UserError, match="no such config file"):
        call("demo/nothing")


def test_a_config_is_the_same_from_a_dict_a_name_and_an_object(tmp_path: Path) -> None:
    named = load(FuseConfig, "demo/fuse_mortality", ["seed=3"])
    assert load(FuseConfig, named) is named
    assert load(FuseConfig, named.model_dump()) == named
    assert load(FuseConfig, named, ["seed=4"]).seed == 4
    assert load(FuseConfig, named.model_dump() | {"out": tmp_path}).out == str(tmp_path)


def test_a_module_that_is_called_is_its_function(monkeypatch: pytest.MonkeyPatch) -> None:
    for module, name in ((finetune.probe, "probe"), (finetune.report, "report"), (pretrain.train, "train")):
        monkeypatch.setattr(module, name, lambda *args, **options: (args, options))
        assert module(1, a=2) == ((1,), {"a": 2})
