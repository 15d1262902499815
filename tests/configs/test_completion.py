"""Tab completion as the shells do it: the printed script in a real bash, zsh and fish."""

from __future__ import annotations

import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from configs import UserError
from configs.commands import COMMANDS
from configs.completion import script


def shell(name: str, code: str, folder: Path) -> str:
    if shutil.which(name) is None:
        pytest.skip(f"no {name} here")
    flags = {"bash": ["--norc"], "zsh": ["-f"], "fish": ["--no-config"]}[name]
    done = subprocess.run([name, *flags, "-c", code], cwd=folder, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and not done.stderr, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("completion")
    for name in ("bash", "zsh", "fish"):
        (folder / f"c.{name}").write_text(script(name), encoding="utf-8")
    (folder / "runs").mkdir()
    (folder / "my films").mkdir()
    return folder


TYPED = {  # words as bash breaks them, the last one begun -> some of what is offered, and what is not
    "ehr-msn pr": ({"pretrain", "probe"}, {"fuse"}),
    "ehr-msn probe own_f": ({"own_films/probe"}, {"own_films/pretrain"}),
    "ehr-msn probe probe_linear meth": ({"method="}, {"seed="}),
    "ehr-msn probe probe_linear method = l": ({"linear", "logistic"}, {"knn"}),
    "ehr-msn probe probe_linear method = ": ({"linear", "knn"}, {"method="}),
    "ehr-msn probe probe_linear method =": ({"linear", "knn"}, {"method="}),
    "ehr-msn pretrain pretrain_vit_tiny optim.acc": ({"optim.accumulate=", "optim.accumulate_mode="}, {"accumulate="}),
    "ehr-msn pretrain pretrain_vit_tiny optim.optimizer = ": ({"adamw", "lars"}, set()),
    "ehr-msn fuse fuse_mortality freeze = ": ({"true", "false"}, set()),
    "ehr-msn probe probe_linear --wa": ({"--watch"}, {"--shift"}),
    "ehr-msn compare runs/a --split ": ({"val", "test"}, {"train"}),
    "ehr-msn probe probe_linear encoder = ru": ({"runs"}, set()),
    "ehr-msn report ru": ({"runs"}, set()),
    "ehr-msn report my": ({"my films"}, set()),
    "ehr-msn config demo/f": ({"demo/features"}, {"features"}),
    "ehr-msn --completion z": ({"zsh"}, {"fish"}),
}


@pytest.mark.parametrize("typed", TYPED)
def test_bash_offers_what_fits(typed: str, written: Path) -> None:
    words = typed.split(" ")
    given = f"COMP_WORDS=({shlex.join(words)}); COMP_CWORD={len(words) - 1}; _ehr_msn 2>/dev/null"
    code = f"source c.bash; {given}; printf '%s\\n' \"${{COMPREPLY[@]}}\"; complete -p launch.sh ehr-msn >/dev/null"
    offered = set(shell("bash", code, written).splitlines())
    wanted, unwanted = TYPED[typed]
    assert wanted <= offered and not unwanted & offered


def test_a_key_stays_before_its_value_where_bash_does_not_break_words_at_the_sign(written: Path) -> None:
    code = "source c.bash; COMP_WORDS=(ehr-msn probe x method=kn); COMP_CWORD=3; _ehr_msn; echo ${COMPREPLY[@]}"
    assert shell("bash", code, written).split() == ["method=knn"]


def test_zsh_reads_the_script(written: Path) -> None:
    code = "autoload -Uz compinit; compinit -D; source ./c.zsh; print ${_comps[ehr-msn]} ${_comps[launch.sh]}"
    assert shell("zsh", code, written).split() == ["_ehr_msn", "_ehr_msn"]


def test_fish_offers_what_fits(written: Path) -> None:
    def offered(line: str) -> set[str]:
        out = shell("fish", f"source c.fish; complete -C {shlex.quote(line)}", written)
        return {row.split("\t")[0] for row in out.splitlines()}

    assert {"pretrain", "probe"} <= offered("ehr-msn pr")
    assert {"method=linear", "method=knn"} <= offered("ehr-msn probe probe_linear method=")
    assert "probe_linear" in offered("ehr-msn probe probe_l") and "--watch" in offered("ehr-msn probe --wa")


def test_every_command_is_in_every_script_and_another_shell_is_refused(written: Path) -> None:
    for name in ("bash", "zsh", "fish"):
        text = (written / f"c.{name}").read_text(encoding="utf-8")
        assert all(command in text for command in COMMANDS)
    with pytest.raises(UserError, match="wanted one of bash, zsh, fish"):
        script("ksh")
