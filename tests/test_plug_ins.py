"""The plug-ins of the pages, copied literally, run and type-checked; and what a wrong one is told."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from configs import UserError
from configs.plugin import load_class
from ehr_features import static
from ehr_features.plug_ins import task_name, task_rows
from finetune.fusion.models import Fusion
from finetune.guard import refuse_discharge
from pretrain.methods import Method

DOCS = Path(__file__).resolve().parents[1] / "docs"
PAGES = ("plug_ins.md", "adding_a_model.md", "methods.md")


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A folder with each file of the pages whose first line is its name."""
    for page in PAGES:
        for code in re.findall(r"^```python\n(.*?)^```$", (DOCS / page).read_text("utf-8"), re.MULTILINE | re.DOTALL):
            if found := re.match(r'"""(\w+\.py)', code):
                (tmp_path / found[1]).write_text(code, encoding="utf-8")
    assert {p.name for p in tmp_path.iterdir()} == {"my_group.py", "my_task.py", "my_model.py", "my_method.py"}
    return tmp_path


def images(**more) -> pd.DataFrame:
    given = {"split": ["train", "train", "train", "test"], "sex": list("MFMF"), "race": list("abcd")}
    given |= {"ed_heart_rate": [60, 90, 120, 99], "ed_sbp": [120.0, 90.0, None, 100.0], "Edema": [1.0, 0, 1, 0]}
    return pd.DataFrame(given | more)


def test_the_pages_group_goes_with_the_shipped_ones(own):
    word = f"{own}/my_group.py:Pressure"
    array, names, fitted = static.encode(images(), ["sex", word])
    assert names[-3:] == ["shock_index", "shock_index_missing", "shock_index_high"] and len(names) == 6
    np.testing.assert_allclose(array[:, 3], [-1, 1, 0, (0.99 - 0.75) / 0.25], rtol=1e-6)  # train: 0.5 and 1
    assert array[:, 4].tolist() == [0, 0, 1, 0] and array[:, 5].tolist() == [0, 1, 0, 1]
    again = static.encode(images()[3:], ["sex", word], fitted=fitted)[0]
    np.testing.assert_array_equal(again, array[3:])
    assert static.available_at(["sex", word])[word] == "admission"
    assert static.reads([word], "default", images()) == ["ed_heart_rate", "ed_sbp"] and static.has(word, images())
    assert static.known(array, names, ["sex"] * 3 + [word] * 3)[:, 3].tolist() == [True, True, False, True]


GROUP = """from ehr_features.plug_ins import Group
class Mine(Group):
    {lines}
    def columns(self, images, scale):
        return {body}
"""


@pytest.mark.parametrize(
    ("lines", "body", "words"),
    [
        ("available_at = 'study'", "{}", "does not declare `reads`"),
        ("reads = ('sex',)", "{}", "does not declare `available_at`"),
        ("reads = 'sex'; available_at = 'admission'", "{}", "wanted a tuple"),
        ("reads = ('sex',); available_at = 'now'", "{}", "wanted study, admission, discharge"),
        ("reads = ('sexx',); available_at = 'study'", "{}", "no column of images.parquet"),
        ("reads = ('Edema',); available_at = 'study'", "{}", "may not be an input"),
        ("reads = ('race',); available_at = 'admission'", "{}", "may not be an input"),
        ("reads = ('subject_id',); available_at = 'study'", "{}", "may not be an input"),
        ("reads = ('died_in_hospital',); available_at = 'study'", "{}", "known at discharge only"),
        ("reads = ('sex',); available_at = 'admission'", "{}", "gave none"),
        ("reads = ('sex',); available_at = 'admission'", "{'a': images['ed_sbp']}", "KeyError"),
        ("reads = ('ed_sbp',); available_at = 'admission'", "{'a': images['ed_sbp']}", "1 missing values"),
        ("reads = ('sex',); available_at = 'admission'", "{'a': [1.0]}", "shape"),
        ("reads = ('sex',); available_at = 'admission'", "{'sex_m': images['sex'] == 'M'}", "of another group"),
    ],
)
def test_a_group_that_reads_what_it_may_not_is_refused(lines, body, words, tmp_path):
    (tmp_path / "mine.py").write_text(GROUP.format(lines=lines, body=body))
    with pytest.raises(KeyError if words == "KeyError" else UserError, match=None if words == "KeyError" else words):
        static.encode(images(), ["sex", f"{tmp_path}/mine.py:Mine"])


def test_a_group_known_at_discharge_is_no_input_of_probe_and_fuse(tmp_path):
    (tmp_path / "mine.py").write_text(
        GROUP.format(lines="reads = ('died_in_hospital',); available_at = 'discharge'", body="{}")
    )
    word = f"{tmp_path}/mine.py:Mine"
    with pytest.raises(UserError, match="discharge"):
        refuse_discharge([word], static.available_at([word]))


STAYS = pd.DataFrame({"stay_id": [1, 2, 3], "los_hours": [30.0, 60.0, 200.0]})


def test_the_pages_task_labels_stays(own):
    word = f"{own}/my_task.py:LongStay"
    rows = task_rows(word, STAYS, lambda name: pd.DataFrame())
    assert rows.to_dict("list") == {"stay_id": [2, 3], "predict_at_hours": [48.0, 48.0], "long_stay": [0, 1]}
    assert task_name(word) == "long_stay" and task_name("mortality") == "mortality"


TASK = """import pandas as pd
from ehr_features.plug_ins import Task
class Mine(Task):
    {lines}
    def rows(self, stays, table):
        return pd.DataFrame({body})
"""
NAMED = "name = 'mine'; labels = ('mine',)"


@pytest.mark.parametrize(
    ("lines", "body", "words"),
    [
        ("name = 'mine'", {}, "does not declare `labels`"),
        ("name = 'my task'; labels = ('a',)", {}, "letters, digits"),
        ("name = 'mine'; labels = 'mine'", {}, "wanted a tuple"),
        ("name = 'mine'; labels = ('split',)", {}, "names of other columns"),
        (NAMED, {"stay_id": [1]}, "no column predict_at_hours, mine"),
        (NAMED, {"stay_id": [], "predict_at_hours": [], "mine": []}, "no row"),
        (NAMED, {"stay_id": [9], "predict_at_hours": [1], "mine": [1]}, "not in the cohort"),
        (NAMED, {"stay_id": [1], "predict_at_hours": [31], "mine": [1]}, "outside their stay"),
        (NAMED, {"stay_id": [1], "predict_at_hours": [-1], "mine": [1]}, "outside their stay"),
        (NAMED, {"stay_id": [1, 1], "predict_at_hours": [2, 2], "mine": [1, 0]}, "repeat"),
        (NAMED, {"stay_id": [1], "predict_at_hours": [2], "mine": [0.5]}, "other than 1, 0 and missing"),
    ],
)
def test_a_task_outside_its_stays_is_refused(lines, body, words, tmp_path):
    (tmp_path / "mine.py").write_text(TASK.format(lines=lines, body=body))
    with pytest.raises(UserError, match=words):
        task_rows(f"{tmp_path}/mine.py:Mine", STAYS, lambda name: pd.DataFrame())


def test_the_pages_model_and_method_are_classes_of_ours(own):
    assert issubclass(load_class(f"{own}/my_model.py:Bilinear", Fusion, "model"), torch.nn.Module)
    assert load_class(f"{own}/my_method.py:SimSiam", Method, "method").has_target is False


@pytest.mark.slow
def test_the_pages_code_is_typed(own):
    files = sorted(str(path) for path in own.glob("*.py"))
    command = [sys.executable, "-m", "mypy", *files]  # with the options of pyproject.toml, and so with its cache
    done = subprocess.run(command, cwd=DOCS.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
