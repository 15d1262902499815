"""Small films and tables of them, and a fresh accelerator."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from accelerate.state import AcceleratorState
from PIL import Image

from pretrain.config import ImagesConfig
from pretrain.store import pack
from tests.pretrain.drawn import VIEWS, draw
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


@pytest.fixture
def films(tmp_path: Path) -> Path:
    """A folder of ten good films in two sizes and formats, and four that are not."""
    folder = tmp_path / "films"
    for number in range(10):
        draw(folder / f"s{number % 3}/film{number}.{'png' if number % 2 else 'jpg'}", number, 40 + 8 * (number % 3))
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "text.jpg").write_text("not a film")
    (folder / "half.jpg").write_bytes((folder / "s0/film0.jpg").read_bytes()[:500])
    Image.new("L", (40, 40)).save(folder / "black.png")
    (folder / "readme.txt").write_text("no film, and not named as one")
    return folder


@pytest.fixture
def mimic(tmp_path: Path) -> Path:
    """Three subjects with a film of each entry of VIEWS."""
    root, rows = tmp_path / "mimic", []
    for subject in (10000001, 10000002, 19000003):
        for number, (view, code) in enumerate(VIEWS):
            dicom_id, study = f"{subject}-{number}", 50000000 + number
            rows.append((dicom_id, subject, study, view, code))
            draw(root / f"files/p{str(subject)[:2]}/p{subject}/s{study}/{dicom_id}.jpg", number)
    columns = ["dicom_id", "subject_id", "study_id", "ViewPosition", "ViewCodeSequence_CodeMeaning"]
    table = pd.DataFrame(rows, columns=columns).assign(Rows=40)
    table.to_csv(root / "mimic-cxr-2.0.0-metadata.csv.gz", index=False)
    return root
