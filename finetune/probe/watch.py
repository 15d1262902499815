"""`probe --watch RUN`: probe every encoder that a running pretraining exports, on train and val labels only.

Input: a pretraining run (it rewrites encoder/ every export_every_epochs) and a probe's config. Output: a line of
RUN/probe.jsonl for each step: {"step", "linear/auroc", "knn/auroc", ...}. Ends with the pretraining, or when it was
stopped; the same command goes on with it. An encoder that is replaced before the previous one has been probed is
skipped.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from configs import UserError
from ehr_features.files import locked, read_table
from ehr_features.typed import read_json, read_lines
from ehr_features.typed.shapes import Provenance
from finetune.config import ProbeConfig
from finetune.config.shapes import Probed
from finetune.encoders import Frozen, film_features, open_encoder
from finetune.guard import check_encoder
from finetune.labelled import Films, check_splits
from finetune.layouts import open_films
from finetune.probe.methods import on_features
from finetune.run_folders import report_line
from pretrain.shapes import EncoderJson

QUIET = 60.0  # seconds without a line of a run that may have stopped


def watch(config: ProbeConfig, folder: str | Path, *, seconds: float = 2.0) -> Path:
    """Follow a run to its end.

    Args:
        seconds: polling interval.
    Returns: RUN/probe.jsonl.
    Raises: UserError: not a run folder, or a pretraining that sees val or test subjects.
    """
    run = Path(folder)
    if not (run / "config.yaml").is_file():
        raise UserError(f"{run}: not a run folder (no config.yaml); start the pretraining first")
    if config.folds:
        raise UserError(f"folds={config.folds}: --watch probes on the films' own split; leave folds out")
    films, store = open_films(config)
    check_splits(films)
    films = films.keep((films.table["split"] != "test").to_numpy(), "test films are not looked at")
    out = run / "probe.jsonl"
    done = _steps(out)
    print(f"watching {run}: each new encoder is probed on train and val; Ctrl-C ends the watching, not the run")
    while True:
        ended = _ended(run) or _left(run)  # asked before polling, so that the last encoder is not missed
        frozen = _open(run, config.pools) if _step(run) not in {None, *done} else None
        if frozen is not None:
            step = int(frozen.about["step"])
            values = probed(config, films, frozen, store)
            with out.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **values}) + "\n")
            done.add(step)
            print(f"step {step}: linear {values['linear/auroc']:.4f}, kNN {values['knn/auroc']:.4f}", flush=True)
            continue
        if ended:
            how = "has ended" if _ended(run) else "stopped before its end (its log.txt says why)"
            print(f"{run} {how}; {out} holds {len(done)} encoders\nnext: {report_line(run)}")
            return out
        time.sleep(seconds)


def probed(config: ProbeConfig, films: Films, frozen: Frozen, store: Any) -> dict[str, Any]:
    """Macro AUROC on val of the best linear head (by gradient steps, or method=logistic) and of kNN.

    Raises: UserError: the encoder saw val or test.
    """
    if frozen.folder is not None:
        subjects = films.table if films.own is None else films.own.films
        if config.features:
            subjects = read_table(config.features, "images", ["subject_id", "split"])
        check_encoder(
            frozen.folder,
            subjects,
            features=config.features,
            own=films.own,
            allow_leak=config.allow_leak,
            same_source=bool(config.features),
            other_people=config.other_people,
            card=frozen.card,
        )
    features = film_features(frozen, store, films.table["dicom_id"].tolist())
    device = "cuda" if torch.cuda.is_available() else "cpu"
    found: dict[str, Any] = {}
    head = "logistic" if config.method == "logistic" else "linear"
    for name, method, chosen in (("linear", head, "pool"), ("knn", "knn", "neighbours")):
        learn = on_features(config.model_copy(update={"method": method}), films, features, device, lambda *_: None)
        fit = learn(films.rows("train"), films.rows("val"), config.seed).chosen
        found |= {f"{name}/auroc": fit["val_auroc"], f"{name}/{chosen}": fit[chosen]}
    return found


def _open(run: Path, pools: Sequence[str]) -> Frozen | None:
    """The current encoder; None while it is being replaced."""
    try:
        return open_encoder(str(run), pools=pools)
    except UserError:
        if (run / "encoder" / "encoder.json").is_file() and (run / "encoder" / "encoder.safetensors").is_file():
            raise
        return None


def _step(run: Path) -> int | None:
    path = run / "encoder" / "encoder.json"
    try:
        return read_json(path, EncoderJson).get("step") if path.is_file() else None
    except UserError:
        return None  # being replaced


def _ended(run: Path) -> bool:
    path = run / "provenance.json"
    return path.is_file() and bool(read_json(path, Provenance).get("finished_at"))


def _left(run: Path) -> bool:
    """Whether no process trains in the folder: nothing was logged for a while (another machine's lock may be unseen),
    and none holds its lock."""
    logs = [run / name for name in ("config.yaml", "log.txt", "metrics.jsonl")]
    written = max(path.stat().st_mtime for path in logs if path.is_file())
    return time.time() - written > QUIET and not locked(run)


def _steps(path: Path) -> set[int]:
    """Steps already probed, so that watching can resume."""
    if not path.is_file():
        return set()
    return {line["step"] for line in read_lines(path, Probed)}
