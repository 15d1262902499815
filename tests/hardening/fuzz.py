"""Damage the input files of each reader, and check that it reads or refuses them.

    python -m tests.hardening.fuzz OUT [--inputs 200] [--seed 0] [--kinds config table ...]

Input: an empty folder. Output: a Markdown table: damaged inputs by kind, how many were still readable, were refused
with a message, or had another outcome: another exception, or more than `PATIENCE` seconds. Damage is flipped, repeated,
moved, inserted, zeroed or cut bytes, at seeded places.
"""

from __future__ import annotations

import contextlib
import io
import random
import shutil
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

from configs import UserError, load
from ehr_features.build import build
from ehr_features.config import FeaturesConfig
from ehr_features.demo.generate import generate
from ehr_features.files import write_json
from ehr_features.notes import template as notes_template
from ehr_features.notes.facts import FIELDS
from ehr_features.series import channels
from finetune.config import FuseConfig
from finetune.report.page import report
from finetune.results import write_results
from finetune.score import score
from pretrain import encoder as encoders
from pretrain.config import ImagesConfig, PretrainConfig
from pretrain.encoder.preprocess import Preprocess
from pretrain.encoder.weights import read_state
from pretrain.store import Store, pack
from pretrain.store.decode import BadFilm, decode
from pretrain.text.notes import read_notes
from tests.hardening.kills import command_line

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 60
Reader = Callable[[Path], object]  # reads the damaged file in place


def damage(data: bytes, draw: random.Random) -> bytes:
    """A few changes of the bytes of a file."""
    out = bytearray(data)
    for _ in range(draw.randint(1, 4)):
        at, size = draw.randrange(len(out) + 1), draw.randint(1, 64)
        part = bytes(out[at : at + size])
        match draw.choice(("flip", "zero", "cut", "insert", "repeat", "move", "drop")):
            case "flip" if at < len(out):
                out[at] ^= 1 << draw.randrange(8)
            case "zero":
                out[at : at + size] = bytes(len(part))
            case "cut":
                del out[at:]
            case "insert":
                out[at:at] = draw.randbytes(size)
            case "repeat":
                out[at:at] = part * 3
            case "move":
                del out[at : at + size]
                to = draw.randrange(len(out) + 1)
                out[to:to] = part
            case _:
                del out[at : at + size]
    return bytes(out)


def kinds(folder: Path) -> dict[str, list[tuple[Path, Reader]]]:
    """kind -> files that can be damaged, each with what reads it."""
    folder.mkdir(parents=True, exist_ok=True)
    return {
        "config (YAML)": [
            (_copy(ROOT / "configs/features.yaml", folder), lambda path: load(FeaturesConfig, path)),
            (_copy(ROOT / "configs/pretrain_vit_small.yaml", folder), lambda path: load(PretrainConfig, path)),
            (_copy(ROOT / "configs/fuse_mortality.yaml", folder), lambda path: load(FuseConfig, path)),
        ],
        "channels file, notes template": [
            (_copy(channels.SHIPPED, folder), channels.read_channels),
            (_copy(notes_template.SHIPPED, folder), lambda path: notes_template.read_template(path, FIELDS)),
        ],
        "raw table (csv, csv.gz, parquet)": _tables(folder / "tables"),
        "film (JPEG, PNG, DICOM)": [(path, decode) for path in _films(folder / "films")],
        "store": _store(folder / "store"),
        "encoder/": _encoder(folder / "encoder"),
        "notes.parquet": _notes(folder / "notes"),
        "results.json": _results(folder / "run"),
        "weights file": [(path, read_state) for path in _weights(folder / "weights")],
        "arrays to score (npy, csv, parquet)": _arrays(folder / "arrays"),
    }


def _copy(path: Path, folder: Path) -> Path:
    return Path(shutil.copy(path, folder / path.name))


def _tables(folder: Path) -> list[tuple[Path, Reader]]:
    """Every table of a hospital of 50 subjects, in three forms; the whole extraction reads it."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        generate(folder, subjects=50, seed=1)
    import pandas as pd

    paths = sorted(folder.rglob("*.csv.gz"))
    files = []
    for i, path in enumerate(paths):
        frame, stem = pd.read_csv(path, dtype="str", keep_default_na=False), path.name.removesuffix(".csv.gz")
        if i % 3 == 1:
            path.unlink()
            path = path.with_name(f"{stem}.csv")
            frame.to_csv(path, index=False)
        elif i % 3 == 2:
            path.unlink()
            path = path.with_name(f"{stem}.parquet")
            frame.to_parquet(path, index=False)
        files.append(path)

    def extract(path: Path) -> None:
        roots = {f"mimic_{name}": str(folder / f"mimic-{name}") for name in ("iv", "cxr")}
        roots["mimic_ed"] = str(folder / "mimic-iv-ed")
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            build(FeaturesConfig(**roots, out=folder / "features", memory="500MB", threads=1))

    return [(path, extract) for path in files]


def _films(folder: Path) -> list[Path]:
    folder.mkdir()
    grey = np.random.default_rng(0).integers(0, 255, (64, 48), np.uint8)
    made = []
    for name, options in {"a.jpg": {"quality": 90}, "b.png": {}, "c.jpg": {"progressive": True}}.items():
        Image.fromarray(grey).save(folder / name, **options)  # type: ignore[arg-type]
        made.append(folder / name)
    with contextlib.suppress(ImportError):
        from pydicom.dataset import FileDataset, FileMetaDataset
        from pydicom.uid import ExplicitVRLittleEndian

        meta = FileMetaDataset()
        meta.TransferSyntaxUID = ExplicitVRLittleEndian
        film = FileDataset(str(folder / "d.dcm"), {}, file_meta=meta, preamble=b"\0" * 128)
        film.Rows, film.Columns, film.SamplesPerPixel, film.PixelRepresentation = 64, 48, 1, 0
        film.BitsAllocated, film.BitsStored, film.HighBit = 16, 12, 11
        film.PhotometricInterpretation, film.PixelData = "MONOCHROME2", grey.astype("<u2").tobytes()
        film.save_as(folder / "d.dcm", enforce_file_format=False)
        made.append(folder / "d.dcm")
    return made


def _store(folder: Path) -> list[tuple[Path, Reader]]:
    films = folder / "in"
    films.mkdir(parents=True)
    for i in range(6):
        grey = np.random.default_rng(i).integers(0, 255, (32, 32), np.uint8)
        Image.fromarray(grey).save(films / f"{i}.png")
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        pack(ImagesConfig(films=str(films), out=str(folder / "out"), size=32, workers=1), (1, 1))

    def read(path: Path) -> object:
        store = Store(folder / "out")
        return store.read(store.index.dicom_id.tolist())

    return [(path, read) for path in sorted((folder / "out").iterdir()) if path.name[0] not in "." and path.is_file()]


def _small_encoder() -> encoders.Encoder:
    arguments = {"embed_dim": 16, "depth": 1, "num_heads": 2}
    preprocess = Preprocess(32, "crop", 0.5, 0.25, 1)
    return encoders.create(
        "vit_tiny_patch16_224", in_chans=1, image_size=32, model_args=arguments, preprocess=preprocess
    )


def _encoder(folder: Path) -> list[tuple[Path, Reader]]:
    encoders.save(folder, _small_encoder(), {"step": 1})
    return [(path, lambda path: encoders.load(path.parent)) for path in sorted(folder.glob("encoder.*"))]


def _notes(folder: Path) -> list[tuple[Path, Reader]]:
    import pandas as pd

    folder.mkdir()
    films = [f"film{i}" for i in range(40)]
    table = pd.DataFrame({"dicom_id": films, "note": [f"{i} year old woman with cough" for i in range(40)]})
    table["available_at"] = pd.Timestamp("2150-01-01")
    table.to_parquet(folder / "notes.parquet")
    write_json(folder / "provenance.json", {})
    taken_at = pd.Series(pd.Timestamp("2150-01-02"), films)
    return [(folder / "notes.parquet", lambda path: read_notes(path.parent, taken_at))]


def _results(folder: Path) -> list[tuple[Path, Reader]]:
    """results.json of a run, which the report reads."""
    import pandas as pd

    row: dict[str, Any] = {"split": "test", "label": "macro", "subset": "all", "fraction": 1.0, "metric": "auroc"}
    row |= {"value": 0.7, "low": 0.6, "high": 0.8, "n": 40, "positives": 20, "reason": None}
    rows = pd.DataFrame(
        [row | {"split": split, "label": label} for split in ("val", "test") for label in ("macro", "a")]
    )
    folder.mkdir()
    write_results(
        folder,
        {"task": "findings", "model": "linear", "encoder": "x", "seed": 0, "allow_leak": False, "warnings": []},
        rows,
    )
    (folder / "config.yaml").write_text("method: linear\nout: run\n")
    write_json(folder / "provenance.json", {"config": {}, "finished_at": "2150-01-01"})

    def read(path: Path) -> object:
        with contextlib.redirect_stderr(io.StringIO()):
            return report([path.parent], folder.with_name("report.html"))

    return [(folder / "results.json", read)]


def _weights(folder: Path) -> list[Path]:
    folder.mkdir()
    state = {key: value.contiguous() for key, value in _small_encoder().net.state_dict().items()}
    save_file(state, folder / "a.safetensors")
    torch.save({"state_dict": state}, folder / "b.pth")
    torch.save(state, folder / "c.pth", _use_new_zipfile_serialization=False)
    return sorted(folder.iterdir())


def _arrays(folder: Path) -> list[tuple[Path, Reader]]:
    import pandas as pd

    folder.mkdir()
    draw = np.random.default_rng(0)
    labels, scores = draw.integers(0, 2, (40, 2)), draw.random((40, 2))
    np.save(folder / "labels.npy", labels)
    np.save(folder / "a.npy", scores)
    pd.DataFrame(scores).to_csv(folder / "b.csv", index=False)
    pd.DataFrame(scores, columns=["x", "y"]).to_parquet(folder / "c.parquet")

    def read(path: Path) -> object:
        with contextlib.redirect_stdout(io.StringIO()):
            return score(str(folder / "labels.npy"), str(path), samples=10)

    return [(folder / name, read) for name in ("a.npy", "b.csv", "c.parquet")]


@contextlib.contextmanager
def patience() -> Iterator[None]:
    """Raise TimeoutError in the block after `PATIENCE` seconds."""

    def late(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"no answer in {PATIENCE} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(PATIENCE)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def attempt(path: Path, read: Reader, data: bytes) -> str:
    """`read`, `refused`, or a description of another outcome. The file is restored afterwards."""
    whole = path.read_bytes()
    path.write_bytes(data)
    try:
        with patience():
            read(path)
        return "read"
    except (UserError, BadFilm) as error:
        return "refused" if str(error) else "refused without a word"
    except Exception as error:  # what a user would see as a traceback
        return f"{path.name}: {type(error).__name__}: {(str(error).splitlines() or [''])[0][:100]}"
    finally:
        path.write_bytes(whole)


def torment(files: list[tuple[Path, Reader]], inputs: int, seed: int) -> Counter[str]:
    """Damage the files in turn. Returns: the number of each outcome."""
    outcomes: Counter[str] = Counter()
    for i in range(inputs):
        path, read = files[i % len(files)]
        outcomes[attempt(path, read, damage(path.read_bytes(), random.Random(f"{seed}/{i}")))] += 1
    return outcomes


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--inputs", type=int, default=200, help="of each kind (default 200)")
    parser.add_argument("--kinds", nargs="+", metavar="KIND")
    args = parser.parse_args()
    print("| damaged | inputs | still readable | refused with a message | anything else |\n|---|---|---|---|---|")
    for kind, files in kinds(args.out).items():
        if args.kinds and not any(kind.startswith(k) for k in args.kinds):
            continue
        outcomes: dict[str, Any] = torment(files, args.inputs, args.seed)
        rest = [f"{what} ({n})" for what, n in outcomes.items() if what not in ("read", "refused")]
        says = "; ".join(rest) or "none"
        print(f"| {kind} | {args.inputs} | {outcomes['read']} | {outcomes['refused']} | {says} |", flush=True)


if __name__ == "__main__":
    main()
