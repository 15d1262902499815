"""What exceeds this machine's memory is refused before the work, by the keys that made it large."""

from types import SimpleNamespace

import numpy as np
import pytest

from configs import UserError, amounts
from finetune.encoders import film_features, open_encoder
from finetune.fusion.train import check_batch
from finetune.probe.heads import Data, linear


@pytest.fixture(autouse=True)
def _one_gigabyte(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(amounts, "machine_memory", lambda: 1_000_000_000)


def test_a_large_grid_of_linear_heads_is_refused() -> None:
    rng = np.random.default_rng(0)
    data = Data({"avg": rng.normal(size=(20, 64)).astype(np.float32)}, (rng.random((20, 14)) < 0.5).astype(np.float32))
    given = {"pools": ["avg"], "weight_decays": [0.0] * 100, "epochs": 1, "patience": 1, "batch_size": 10, "seed": 0}
    with pytest.raises(UserError, match=r"^lrs, weight_decays, pools: 100,000 linear heads of 14 labels: .* GB of mem"):
        linear(data, data, lrs=[1e-3] * 1000, **given)
    linear(data, data, lrs=[1e-3], **given)


def test_raw_pixels_of_very_many_films_are_refused() -> None:
    with pytest.raises(UserError, match=r"^pixels 512: 10,000 films of 512 x 512 numbers: 10 GB .* lower it$"):
        film_features(open_encoder("pixels", pixels=512), SimpleNamespace(), [str(i) for i in range(10_000)])


def test_a_batch_of_very_many_hours_is_refused() -> None:
    rows = {"train": np.arange(50_000), "val": np.arange(10)}
    samples = SimpleNamespace(length=np.full(60_000, 100), num_inputs=76)
    config = SimpleNamespace(batch_size=1_000_000, hidden=256, layers=2)
    with pytest.raises(UserError, match=r"^batch_size 1000000: a step of 50,000 samples, 5,000,000 hours of rec"):
        check_batch(config, samples, rows, 1)
    config.batch_size = 64
    check_batch(config, samples, rows, 1)
