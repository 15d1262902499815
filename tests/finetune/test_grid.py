"""finetune.grid: every combination once, all checked before the first starts, complete runs skipped."""

import json
from pathlib import Path

import pytest

from configs import UserError, load
from ehr_features.typed import read_json
from finetune import grid as grids
from finetune.config import GridConfig
from finetune.grid import Command, grid, plan

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


@pytest.fixture
def small(tmp_path: Path) -> GridConfig:
    pretrain = ["pretrain", str(CONFIGS / "pretrain_vit_tiny.yaml"), f"features={tmp_path}"]
    probe = ["probe", str(CONFIGS / "probe_linear.yaml"), "encoder={pretrain}"]
    record = {"none": {"pretrain": ["ehr.groups=[]"]}, "sex": {"pretrain": ["ehr.groups=[sex]"], "probe": ["seed=1"]}}
    seeds = {"s0": {"pretrain": ["seed=0"]}, "s1": {"pretrain": ["seed=1"]}}
    steps = {"pretrain": pretrain, "probe": probe}
    return GridConfig(out=str(tmp_path / "grid"), steps=steps, axes={"record": record, "seed": seeds})


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[Command]:
    """What would have been started; each run is complete at once."""
    done: list[Command] = []

    def run(command: Command, processes: int) -> int:
        done.append(command)
        command.folder.mkdir(parents=True)
        (command.folder / "provenance.json").write_text(json.dumps({"finished_at": "now"}))
        return 0

    monkeypatch.setattr(grids, "_run", run)
    return done


def test_every_combination_once_with_its_own_words(small: GridConfig) -> None:
    combinations = plan(small)
    assert [c[0].name for c in combinations] == ["none-s0", "none-s1", "sex-s0", "sex-s1"]
    pretrain, probe = combinations[3]
    assert pretrain.words[-3:] == ("ehr.groups=[sex]", "seed=1", f"out={small.out}/sex-s1/pretrain")
    assert probe.words[2:] == (f"encoder={small.out}/sex-s1/pretrain", "seed=1", f"out={small.out}/sex-s1/probe")


def test_the_choices_of_every_combination_are_kept_for_tables(small: GridConfig, ran: list[Command]) -> None:
    grid(small)
    about = read_json(Path(small.out) / "grid.json")
    assert about["axes"]["sex-s1"] == {"record": "sex", "seed": "s1"} and about["methods"]["sex-s1"] == "sex"


def test_shards_share_all_combinations(small: GridConfig, ran: list[Command]) -> None:
    for shard in ("1/3", "2/3", "3/3"):
        assert grid(small, shard=shard) == 0
    assert len(ran) == len({command.folder for command in ran}) == 8


def test_what_is_complete_is_not_run_again(small: GridConfig, ran: list[Command], capsys) -> None:
    grid(small, only="sex-*")
    grid(small)
    assert [command.name for command in ran] == ["sex-s0"] * 2 + ["sex-s1"] * 2 + ["none-s0"] * 2 + ["none-s1"] * 2
    assert "8 runs, 4 complete" in capsys.readouterr().out


def test_a_dry_run_prints_commands_and_starts_none(small: GridConfig, ran: list[Command], capsys) -> None:
    assert grid(small, dry_run=True, processes=4) == 0
    assert capsys.readouterr().out.count("./launch.sh pretrain") == 4 and not ran


def test_a_fault_in_the_last_combination_is_named_before_anything_starts(small: GridConfig, ran: list[Command]) -> None:
    axes = {**small.axes, "seed": {**small.axes["seed"], "s2": {"pretrain": ["optim.learning_rate=1"]}}}
    with pytest.raises(UserError, match=r"optim.learning_rate"):
        grid(GridConfig(out=small.out, steps=small.steps, axes=axes))
    assert not ran


def test_a_failed_run_does_not_stop_the_others(small: GridConfig, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    started: list[str] = []

    def run(command: Command, processes: int) -> int:
        started.append(f"{command.name}/{command.folder.name}")
        return 2 if command.name == "none-s0" else 0

    monkeypatch.setattr(grids, "_run", run)
    assert grid(small) == 2
    assert "none-s0/probe" not in started and "sex-s1/probe" in started
    assert "failed: none-s0" in capsys.readouterr().err


def test_a_stopped_run_stops_the_grid(small: GridConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grids, "_run", lambda command, processes: 75)
    assert grid(small) == 75


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"steps": {"a": ["train", "x.yaml"]}}, "wanted .pretrain"),
        ({"axes": {"x": {"y": {"nothing": []}}}}, "no step `nothing`"),
    ],
)
def test_a_wrong_grid_says_what_is_wrong(small: GridConfig, change: dict[str, object], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        GridConfig.model_validate(small.model_dump() | change)


def test_the_published_grid_has_23_sets_and_2_sizes() -> None:
    combinations = plan(load(GridConfig, CONFIGS / "grid_cxr_ehr_msn.yaml"))
    assert len(combinations) == len({c[0].name for c in combinations}) == 46


def test_the_models_of_medfuse_are_ten_on_two_tasks_and_every_run_is_valid(tmp_path: Path, capsys) -> None:
    config = load(GridConfig, CONFIGS / "grid_medfuse.yaml", [f"out={tmp_path}"])
    steps = {"fuse": ["fuse", str(CONFIGS / "fuse_mortality_published.yaml"), *config.steps["fuse"][2:]]}
    assert grid(GridConfig(out=config.out, steps=steps, axes=config.axes), dry_run=True) == 0
    assert capsys.readouterr().out.count("./launch.sh fuse") == 20


@pytest.mark.parametrize("shard", ["0/2", "3/2", "2", "a/b"])
def test_a_shard_that_does_not_exist_is_refused(small: GridConfig, ran: list[Command], shard: str) -> None:
    with pytest.raises(UserError, match="wanted i/n"):
        grid(small, shard=shard)
