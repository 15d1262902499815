"""Detection of the tables' release."""

import pytest

from ehr_features.check import claimed, differences, recognised, releases


@pytest.mark.parametrize(
    ("folder", "release"),
    [
        ("/data/physionet.org/files/mimiciv/2.2", "2.2"),
        ("/data/mimic-iv-3.1/", "3.1"),
        ("data/mimic-iv-demo-2.2", "demo"),
        ("data/mimic-iv-demo/2.2", "demo"),
        ("/projects/release-7.5/tables", None),
        ("demo/data/mimic-iv", None),
        ("/data/mimic", None),
        ("https://host/mimic-cxr-jpg/2.1.0", "2.1.0"),
        ("/data/mimic-iv-ed-2.2", "2.2"),
    ],
)
def test_a_release_is_read_from_the_folders_name(folder, release):
    assert claimed(folder) == release


def test_a_release_is_recognised_by_its_row_counts():
    assert recognised({"patients": 364_627, "icustays": 94_458, "d_items": 4_095}) == "3.1"
    assert recognised({"patients": 364_627, "icustays": 94_457}) is None


def test_a_count_that_differs_from_the_claimed_release_says_by_how_many():
    assert differences({"icustays": 73_180, "patients": 299_712}, "2.2") == [
        "icustays: 73,180 rows, 1 fewer than the 73,181 of release 2.2; is it whole?"
    ]
    assert differences({"icustays": 5}, None) == []


def test_every_folder_of_the_config_is_held_to_the_release_that_it_claims():
    rows = {"icustays": 76_540, "edstays": 425_086, "cxr_metadata": 377_110, "cxr_chexpert": 227_827}
    roots = {"mimic_iv": "/data/mimic-iv-1.0", "mimic_ed": "/data/mimic-iv-ed/2.2", "mimic_cxr": "/data/films"}
    known, warnings = releases(roots, rows, "2.2")
    assert {root: found["release"] for root, found in known.items()} == {
        "mimic_iv": "1.0", "mimic_ed": "2.2", "mimic_cxr": "2.0.0 or 2.1.0"
    }  # fmt: skip
    assert warnings == [
        "/data/mimic-iv-1.0: named 1.0, but its tables are laid out as in 2.2; is the name right?",
        "edstays: 425,086 rows, 1 fewer than the 425,087 of release 2.2; is it whole?",
    ]
    assert releases(roots | {"mimic_ed": None}, rows, "1.0")[1] == []
