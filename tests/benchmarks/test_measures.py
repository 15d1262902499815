"""Parts of the benchmarks: folds of whole subjects, counts of operations compared with hand counts."""

import numpy as np
import pandas as pd
import torch

from benchmarks.pretrain import count
from benchmarks.real_films import parts


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
