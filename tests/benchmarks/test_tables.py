"""`benchmarks.run` collects the rows that the extraction benchmarks print."""

from benchmarks import features, linking, run


def test_results_of_the_extraction_are_rows_with_a_ratio():
    rows = {"chart_rows": 13_377_240, "lab_rows": 2_154_540}
    results = {1: rows | {"seconds": 3.0, "peak_mb": 278}, 5: rows, 20: rows | {"seconds": 9.0, "peak_mb": 560}}
    found = run.rows("\n".join(features.table(results)), "x")
    assert [row.split(" | ")[3] for row in found] == ["8.0x", "0.5x", "41.0x", "0.2x"]
    assert "15,531,780 event rows" in found[0]


def test_results_of_linking_are_rows_with_a_ratio():
    ours = {"linking": 0.5, "whole": 4.0, "record": 6.0}
    results = {"link": {"seconds": ours}, "pandas_link": {"seconds": {"linking": 0.6}}}
    all_, some = (run.rows("\n".join(linking.table(results, n)), "x") for n in (377_110, 1_000))
    assert [row.split(" | ")[3] for row in all_] == ["1.2x", "75.0x"]
    assert [row.split(" | ")[3] for row in some] == ["1.2x"]
