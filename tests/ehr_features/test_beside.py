"""Which features were made from a synthetic hospital, and what an encoder's card says then."""

import json

import pytest

from configs import UserError
from ehr_features.demo.beside import truth_of
from pretrain.export.card import datasets


@pytest.fixture
def features(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "work/features").mkdir(parents=True)
    return tmp_path / "work/features"


@pytest.mark.parametrize("tables", ["data/mimic-iv", None])
def test_the_truth_beside_the_tables_is_found_and_no_data_set_is_named(features, tables):
    root = features.parents[1]
    config = {"mimic_iv": tables or str(root / "data/mimic-iv")}  # relative to a folder above, or absolute
    (features / "provenance.json").write_text(json.dumps({"config": config}))
    assert truth_of(features) == {} and datasets(str(features), None) == ["mimic-cxr", "mimic-iv"]
    (root / "data/truth.json").write_text('{"bayes": {"mortality": 1}}')
    assert truth_of(features) == {"bayes": {"mortality": 1}} and datasets(str(features), None) == []


@pytest.mark.parametrize("said", ['{"config": null}', "{}"])
def test_features_that_say_nothing_are_taken_for_real(features, said):
    (features / "provenance.json").write_text(said)
    assert truth_of(features) == {} == truth_of(features / "absent")


def test_a_truth_of_another_kind_is_named(features):
    (features / "provenance.json").write_text('{"config": {"mimic_iv": "data/mimic-iv"}}')
    (features.parents[1] / "data/truth.json").write_text("[1]")
    with pytest.raises(UserError, match=r"truth\.json: got a list of 1, wanted an object"):
        truth_of(features)
