"""Which subjects an encoder may be tested on."""

from pathlib import Path

import pandas as pd
import pytest

from configs import UserError
from ehr_features.files import write_json
from finetune.guard import check_encoder, features_hash, refuse_discharge
from tests.written import encoder_json

SUBJECTS = pd.DataFrame({"subject_id": [1, 2, 3, 3], "split": ["train", "val", "test", "test"]})


def encoder(folder: Path, seen: list[object] | None = None, **meta: object) -> Path:
    (folder / "encoder").mkdir(parents=True)
    write_json(folder / "encoder/encoder.json", encoder_json(**meta))
    if seen is not None:
        pd.DataFrame({"subject_id": seen}).to_parquet(folder / "seen_subjects.parquet")
    return folder / "encoder"


@pytest.mark.parametrize(("seen", "ok"), [([1], True), ([1, 9], True), ([1, 2], False), ([3], False)])
def test_a_val_or_test_subject_in_pretraining_is_refused(tmp_path: Path, seen: list[int], ok: bool) -> None:
    made = encoder(tmp_path, seen, ehr_groups={})
    if ok:
        assert check_encoder(made, SUBJECTS).films == "train"
        return
    with pytest.raises(UserError, match="1 of 2 of the val or test subjects"):
        check_encoder(made, SUBJECTS)
    passed = check_encoder(made, SUBJECTS, allow_leak=True)
    assert passed.films == "leak" and passed.warnings[0].startswith("LEAK (allow_leak=true)")


def test_an_exported_encoder_is_judged_by_the_splits_of_the_same_features(tmp_path: Path) -> None:
    features = tmp_path / "features"
    features.mkdir()
    SUBJECTS.to_parquet(features / "images.parquet")
    same = {"ehr_groups": {}, "features_hash": features_hash(features)}
    assert (
        check_encoder(encoder(tmp_path / "a", splits_seen=["train"], **same), SUBJECTS, features=features).films
        == "train"
    )
    with pytest.raises(UserError, match=r"all \(val\)"):
        check_encoder(encoder(tmp_path / "b", splits_seen=["train", "val"], **same), SUBJECTS, features=features)
    other = encoder(tmp_path / "c", splits_seen=["train"], ehr_groups={}, features_hash="another")
    assert check_encoder(other, SUBJECTS, features=features).films == "unknown"


def test_an_outcome_in_pretraining_is_named(tmp_path: Path) -> None:
    seen = check_encoder(encoder(tmp_path, [1], ehr_groups={"sex": "study", "mortality": "discharge"}), SUBJECTS)
    assert seen.supervision == "outcome-supervised" and "conditioned on mortality" in seen.warnings[0]
    assert (
        check_encoder(encoder(tmp_path / "b", [1], ehr_groups={"sex": "study"}), SUBJECTS).supervision
        == "self-supervised"
    )
    assert check_encoder(encoder(tmp_path / "c", [1]), SUBJECTS).supervision == "unknown"


def test_a_damaged_list_of_subjects_is_no_pass(tmp_path: Path) -> None:
    made = encoder(tmp_path, [1], ehr_groups={})
    (tmp_path / "seen_subjects.parquet").write_bytes(b"half a file")
    with pytest.raises(UserError, match="damaged Parquet file"):
        check_encoder(made, SUBJECTS)


@pytest.mark.parametrize("seen", [[2, 3], ["2", "03"], [2.0, 9.0]])
def test_equal_ids_in_another_source_are_refused_until_they_are_said_to_be_other_people(
    tmp_path: Path, seen: list[object]
) -> None:
    made = encoder(tmp_path, seen, ehr_groups={})
    with pytest.raises(UserError, match=r"saw [12] of 2 of the val or test subjects.*other_people=true"):
        check_encoder(made, SUBJECTS, same_source=False)
    told = check_encoder(made, SUBJECTS, same_source=False, other_people=True)
    assert told.films == "other source" and "by their ids" in told.warnings[-1]
    assert check_encoder(made, SUBJECTS, same_source=False, allow_leak=True).films == "leak"


def test_an_encoder_of_another_source_passes_with_the_counts_that_prove_it(tmp_path: Path) -> None:
    apart = check_encoder(encoder(tmp_path, [1, 50, 60], ehr_groups={}), SUBJECTS, same_source=False)
    assert apart.films == "other source" and apart.compared == {"held_out": 2, "seen": 3, "both": 0}
    unlisted = check_encoder(encoder(tmp_path / "b", None, ehr_groups={}), SUBJECTS, same_source=False)
    assert unlisted.compared is None and "their subjects are unknown" in unlisted.warnings[-1]


def test_outcomes_are_no_inputs() -> None:
    refuse_discharge(["sex", "icu"], {"sex": "study", "icu": "study", "mortality": "discharge"})
    with pytest.raises(UserError, match="mortality: known only at discharge"):
        refuse_discharge(["sex", "mortality"], {"sex": "study", "mortality": "discharge"})
