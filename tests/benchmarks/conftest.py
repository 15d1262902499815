"""A table of real films, made up."""

import numpy as np
import pandas as pd
import pytest

from benchmarks import real_films


@pytest.fixture
def films(tmp_path):
    rng = np.random.default_rng(0)
    count = 400
    patients = rng.integers(0, 120, count)
    table = pd.DataFrame({"path": [f"a/{i}.png" for i in range(count)], "source": ["nih"] * 300 + ["other"] * 100})
    table["patient"] = [f"{s}{p}" for s, p in zip(table["source"], patients, strict=True)]
    table["sex"], table["age_years"], table["view"] = rng.choice(["M", "F"], count), 50, rng.choice(["AP", "PA"], count)
    table["findings"] = rng.choice(["Edema", "Edema|Mass", "No Finding", "Rare"], count, p=[0.3, 0.2, 0.45, 0.05])
    table["pixels"] = 128
    table.to_csv(tmp_path / "films.csv", index=False)
    return real_films.read_films(tmp_path / "films.csv", labelled="nih")
