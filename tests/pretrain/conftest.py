"""Two dozen small films, and a fresh accelerator."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from accelerate.state import AcceleratorState
from PIL import Image

from pretrain.config import ImagesConfig
from pretrain.store import pack
from tests.pretrain.small import NUM


@pytest.fixture
def fresh_accelerator():
    """accelerate keeps its precision for the process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    """store/ and features/ of 24 films of 8 subjects: 5 train, 1 val, 2 test; the table has findings."""
    folder = tmp_path_factory.mktemp("data")
    random = np.random.default_rng(0)
    (folder / "films").mkdir()
    for i in range(NUM):
        Image.fromarray(random.integers(0, 255, (40, 40), dtype=np.uint8)).save(folder / f"films/f{i:02d}.png")
    pack(ImagesConfig(films=str(folder / "films"), out=str(folder / "store"), size=40, workers=1))
    subject = np.arange(NUM) % 8
    table = pd.DataFrame(
        {
            "dicom_id": [f"f{i:02d}" for i in range(NUM)],
            "study_id": np.arange(NUM) // 2 + 100,
            "subject_id": subject,
            "taken_at": pd.Timestamp("2150-01-01") + pd.to_timedelta(np.arange(NUM), unit="D"),
            "view": ["PA", "AP", "AP"] * 7 + ["PA", "LATERAL", "LL"],
            "split": np.select([subject < 5, subject < 6], ["train", "val"], "test"),
            "sex": np.where(np.arange(NUM) // 8 % 2, "M", "F"),
            "age_years": random.uniform(20, 90, NUM),
            "Edema": random.integers(0, 2, NUM),
        }
    )
    (folder / "features").mkdir()
    table.to_parquet(folder / "features/images.parquet")
    (folder / "features/provenance.json").write_text("{}")
    return folder
