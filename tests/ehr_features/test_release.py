"""Which release the tables are of."""

import pytest

from ehr_features.release import claimed, differences, recognised


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
