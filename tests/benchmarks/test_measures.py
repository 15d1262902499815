"""Parts of the benchmarks: folds of whole subjects, operations compared with hand counts, printed intervals."""

import numpy as np
import pandas as pd
import torch

from benchmarks.pretrain import count
from benchmarks.real_films import SOURCES, parts, table
from finetune.compare import paired


def test_each_film_is_tested_once_and_persons_stay_whole():
    random = np.random.default_rng(0)
    films = pd.DataFrame({"person": random.integers(0, 90, 300)})
    splits = pd.DataFrame({fold: parts(films, 5, 3, fold) for fold in range(3)})
    assert ((splits == "test").sum(axis=1) == 1).all()
    assert (splits.groupby(films["person"]).nunique() == 1).all(axis=None)
    assert ((splits == "test").sum() > 80).all() and (splits == "val").sum().between(15, 40).all()
    assert not splits[0].equals(parts(films, 6, 3, 0))


def test_operations_of_a_step_are_counted_as_by_hand():
    q = torch.randn(2, 3, 100, 8, requires_grad=True)
    x, w = torch.randn(7, 5), torch.randn(5, 4)

    def attend_and_multiply():
        torch.nn.functional.scaled_dot_product_attention(q, q, q).sum().backward()
        return x @ w

    products = 2 * 2 * 3 * 100 * 100 * 8
    assert count(attend_and_multiply) == (2 + 4) * products + 2 * 7 * 5 * 4


def test_the_table_of_real_films_prints_the_paired_interval_over_seeds_and_persons():
    rng = np.random.default_rng(0)
    films = pd.DataFrame({"dicom_id": [f"f{i}" for i in range(240)], "person": np.arange(240) // 2})
    films["male"], films["ap"], films["Edema"] = (rng.integers(0, 2, 240) for _ in range(3))
    truth = films[["male", "ap", "Edema"]].to_numpy(float)
    runs = {
        source: [
            pd.DataFrame(rng.normal(gain * truth, 1), index=films["dicom_id"], columns=["male", "ap", "Edema"])
            for _ in range(3)
        ]
        for source, gain in zip(SOURCES, (0.2, 0.8, 1.2), strict=True)
    }
    row = next(line for line in table(films, ["Edema"], runs).splitlines() if line.startswith("| sex"))
    ours, theirs = (np.stack([of["male"].to_numpy() for of in runs[source]])[..., None] for source in SOURCES[1::-1])
    found = paired(truth[:, :1], ours, theirs, groups=films["person"].to_numpy(), same_seeds=True).iloc[0]
    assert row.endswith(f"| {found['difference']:+.3f} ({found['low']:+.3f} to {found['high']:+.3f}) |")
    assert found["low"] < found["difference"] < found["high"] and found["claim"] == "method"
