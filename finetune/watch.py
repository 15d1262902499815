"""`probe --watch RUN`: probe every encoder that a running pretraining exports, on train and val labels only.

Comes in: a run folder of pretraining (encoder/ is rewritten there on the way, see export_every_epochs) and a probe's
config. Goes out: a line of RUN/probe.jsonl for each step: {"step", "linear/auroc", "knn/auroc", ...}. Ends when the
pretraining has.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch

from configs import UserError
from ehr_features.files import read_json
from finetune import classic, heads
from finetune.config import ProbeConfig
from finetune.films import Films, check_splits, evaluation_labels, training_labels
from finetune.frozen import Frozen, film_features, open_frozen
from finetune.heads import Data
from finetune.sources import open_films


def watch(config: ProbeConfig, folder: str | Path, *, seconds: float = 10.0) -> Path:
    """Follow a run to its end.

    Args:
        seconds: between two looks.
    Returns: RUN/probe.jsonl.
    Raises: UserError: not a run folder.
    """
    run = Path(folder)
    if not (run / "config.yaml").is_file():
        raise UserError(f"{run}: not a run folder (no config.yaml); start the pretraining first")
    films, store = open_films(config)
    check_splits(films)
    out = run / "probe.jsonl"
    done = _steps(out)
    print(f"watching {run}: each new encoder is probed on train and val; Ctrl-C ends the watching, not the run")
    while True:
        ended = _ended(run)  # before the look, so that the last encoder is not missed
        step = _step(run)
        if step is not None and step not in done:
            frozen = _open(run)
            if frozen is not None:
                values = probed(config, films, frozen, store)
                with out.open("a", encoding="utf-8") as file:
                    file.write(json.dumps({"step": step, **values}) + "\n")
                done.add(step)
                print(f"step {step}: linear {values['linear/auroc']:.4f}, kNN {values['knn/auroc']:.4f}", flush=True)
                continue
        if ended:
            print(f"{run} has ended; {out} holds {len(done)} encoders\nnext: ./launch.sh report {run}")
            return out
        time.sleep(seconds)


def probed(config: ProbeConfig, films: Films, frozen: Frozen, store: Any) -> dict[str, Any]:
    """Macro AUROC on val of the best linear head and of kNN."""
    rows = {split: films.rows(split) for split in ("train", "val")}
    ids = films.table["dicom_id"]
    features = {split: film_features(frozen, store, ids.iloc[r].tolist()) for split, r in rows.items()}
    labels = training_labels(films.labels.iloc[rows["train"]], uncertain=config.uncertain, missing=config.missing)
    train = Data(features["train"], labels)
    val = Data(features["val"], evaluation_labels(films.labels.iloc[rows["val"]]))
    linear = heads.linear(
        train,
        val,
        pools=config.pools,
        lrs=config.lrs,
        weight_decays=config.weight_decays,
        epochs=config.epochs,
        patience=config.patience,
        batch_size=config.batch_size,
        seed=config.seed,
        device="cuda" if torch.cuda.is_available() else "cpu",
    )[1]
    near = classic.knn(train, val, pools=config.pools, neighbours=config.neighbours)[1]
    return {
        "linear/auroc": linear["val_auroc"],
        "knn/auroc": near["val_auroc"],
        "linear/pool": linear["pool"],
        "knn/neighbours": near["neighbours"],
    }


def _open(run: Path) -> Frozen | None:
    """The encoder as it is now; None where it is being replaced this moment."""
    try:
        return open_frozen(str(run))
    except UserError:
        if (run / "encoder" / "encoder.json").is_file() and (run / "encoder" / "encoder.safetensors").is_file():
            raise
        return None


def _step(run: Path) -> int | None:
    path = run / "encoder" / "encoder.json"
    try:
        return int(read_json(path)["step"]) if path.is_file() else None
    except (UserError, KeyError):
        return None  # being replaced


def _ended(run: Path) -> bool:
    path = run / "provenance.json"
    return path.is_file() and bool(read_json(path).get("finished_at"))


def _steps(path: Path) -> set[int]:
    """Steps already probed, so that watching can go on."""
    if not path.is_file():
        return set()
    return {json.loads(line)["step"] for line in path.read_text(encoding="utf-8").splitlines() if line.endswith("}")}
