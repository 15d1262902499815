"""Reading films from the store against opening the JPEG files, and how fast films are packed.

./launch.sh python -m benchmarks.store [FOLDER of JPEG films] [--json FILE]

Films are read in random order. The CPU time of one thread is counted, with files and shards in the page cache, so that
disk and other load matter little.
Without FOLDER, films of 2544 x 3056 px are generated, the size in MIMIC-CXR-JPG. Reference: Pillow opens the file,
converts it to grayscale and resizes it to the stored side; `same size`: JPEG files that already have the stored side.
"""

from __future__ import annotations

import argparse
import io
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from pretrain.config import ImagesConfig
from pretrain.store import Store, pack

BATCH = 32


def make_films(folder: Path, number: int) -> Path:
    """Smooth noise with grain, 2544 x 3056 px, JPEG quality 95 (about 2 MB each)."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for n in range(number):
        smooth = Image.fromarray(rng.integers(0, 256, (24, 20), dtype=np.uint8)).resize(
            (2544, 3056), Image.Resampling.BICUBIC
        )
        grain = rng.normal(0, 4, (3056, 2544))
        Image.fromarray((np.asarray(smooth) + grain).clip(0, 255).astype(np.uint8)).save(
            folder / f"{n}.jpg", quality=95
        )
    return folder


def milliseconds(read: Callable[[list[str]], object], ids: list[str], seconds: float = 3.0) -> float:
    """Milliseconds per film, batches in random order; the first pass is not counted."""
    rng, count, spent = np.random.default_rng(1), 0, 0.0
    read(ids[: 2 * BATCH])
    while spent < seconds:
        batch = [ids[i] for i in rng.integers(0, len(ids), BATCH)]
        began = time.process_time()
        read(batch)
        spent += time.process_time() - began
        count += len(batch)
    return spent / count * 1000


def open_all(paths: list[str], size: int) -> np.ndarray:
    """Open and resize files as a dataset over files does."""
    films = np.empty((len(paths), size, size), np.uint8)
    for at, path in enumerate(paths):
        with Image.open(path) as image:
            grey = image.convert("L")
            films[at] = np.asarray(
                grey if grey.size == (size, size) else grey.resize((size, size), Image.Resampling.BILINEAR)
            )
    return films


def measure(films: Path, scratch: Path, size: int) -> dict[str, float]:
    """Milliseconds per film for each way to read, and films packed per second by one process."""
    paths = {p.stem: p.as_posix() for p in films.rglob("*.jpg")}
    result = {}
    for encoding in ("raw", "jpeg"):
        config = ImagesConfig(
            films=str(films), out=str(scratch / f"{encoding}{size}"), size=size, encoding=encoding, workers=1
        )
        began = time.process_time()
        store = Store(pack(config))
        result[f"films packed a second ({encoding})"] = len(paths) / (time.process_time() - began)
        result[f"store {encoding}"] = milliseconds(store.read, list(store.index.dicom_id))
    result["JPEG files"] = milliseconds(lambda ids: open_all([paths[i] for i in ids], size), list(paths))
    small = scratch / f"small{size}"
    small.mkdir()
    for dicom_id in paths:
        (small / f"{dicom_id}.jpg").write_bytes(jpeg(store[dicom_id]))
    result["JPEG files of the same size"] = milliseconds(
        lambda ids: open_all([f"{small}/{i}.jpg" for i in ids], size), list(paths)
    )
    return result


def jpeg(film: np.ndarray) -> bytes:
    """Encode with quality 95, as the films themselves."""
    file = io.BytesIO()
    Image.fromarray(film).save(file, "JPEG", quality=95)
    return file.getvalue()


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("films", nargs="?", help="a folder of JPEG films; without it some are made")
    parser.add_argument("--sizes", type=int, nargs="+", default=[256, 512], help="stored sides")
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    tables = {}
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        films = Path(args.films) if args.films else make_films(scratch / "films", 12)
        for size in args.sizes:
            found = measure(films, scratch, size)
            tables[str(size)] = found
            print(f"\nstored at {size} px                       ms a film   times slower than the store")
            for what in ("store raw", "store jpeg", "JPEG files of the same size", "JPEG files"):
                print(f"  {what:<32} {found[what]:>12.4f} {found[what] / found['store raw']:>12.1f} x")
            print(f"  packing: {found['films packed a second (raw)']:.1f} films a CPU second")
    if args.json:
        Path(args.json).write_text(json.dumps(tables, indent=2) + "\n")


if __name__ == "__main__":
    main()
