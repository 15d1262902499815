"""The audit of runs: the subjects used for pretraining, and the columns used as inputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd

from configs import UserError
from ehr_features import static
from ehr_features.audit.verdict import Verdict, cannot, decide
from ehr_features.schema import HELD_OUT, Column
from ehr_features.typed import read_json, read_parquet, read_yaml
from ehr_features.typed.shapes import OfRecord, RunConfig

UNTRAINED = ("pixels", "metadata", "random:")


def check_runs(runs: list[Path], subjects: pd.DataFrame) -> list[Verdict]:
    """Verdicts on each run.

    Args:
        runs: folders of pretrain, probe or fuse. subjects: subject_id, split of the features.
    Raises: UserError: a folder is not a run.
    """
    held_out = set(subjects.loc[subjects["split"].isin(HELD_OUT), "subject_id"].astype(int))
    verdicts = []
    for run in runs:
        config = _config(run)
        verdicts += [_seen(run, config, held_out), _inputs(run, config)]
        if (run / "predictions").is_dir():
            verdicts.append(_predictions(run, subjects))
    return verdicts


def _config(run: Path) -> dict[str, Any]:
    if not (run / "config.yaml").is_file():
        raise UserError(f"{run}: not a run folder: it has no config.yaml; wanted runs/X")
    config: dict[str, Any] = read_yaml(run / "config.yaml", RunConfig)
    return config


def _seen(run: Path, config: dict[str, Any], held_out: set[int]) -> Verdict:
    """No val or test subject was used to train the weights of a run or the weights from which it started."""
    claim = f"{run}: its pretraining saw no val or test subject"
    seen: set[int] = set()
    folder, looked, visited = run, [], {run.resolve()}
    while True:  # follow the chain of runs from which the weights come
        listed = folder / "seen_subjects.parquet"
        if listed.is_file():
            seen |= _ids(listed)
            looked.append(f"{folder}")
        elif isinstance(config.get("encoder"), dict):
            return cannot(claim, f"{folder} has no seen_subjects.parquet")
        source = _starts_from(config)
        if source is None:
            break
        parent = next((p for p in (Path(source), Path(source).parent) if (p / "config.yaml").is_file()), None)
        if parent is None:
            return cannot(claim, f"{folder} starts from {source}, whose train films are unknown (not a run folder)")
        if parent.resolve() in visited:
            return cannot(claim, f"{parent} starts from itself")
        visited.add(parent.resolve())
        folder, config = parent, _config(parent)
    both = seen & held_out
    proof = f"{len(held_out)} val and test subjects, {len(seen)} seen by {', '.join(looked) or 'nothing: untrained'}"
    return decide(claim, {f"val or test subjects seen, e.g. {sorted(both)[:3]}": len(both)}, proof)


def _starts_from(config: dict[str, Any]) -> str | None:
    """The folder or file with the initial weights of a run; None for random weights."""
    encoder = config.get("encoder")
    if isinstance(encoder, dict):
        return encoder.get("init")
    if encoder is None or str(encoder).startswith(UNTRAINED) or str(config.get("model")).startswith("record_"):
        return None  # a record-only model ignores the encoder of its config
    return str(encoder)


def _ids(path: Path) -> set[int]:
    return set(_subjects(path))


def _subjects(path: Path) -> list[int]:
    """The subject of each row of a table of a run."""
    subject = {"subject_id": Column("int64", null=False)}
    return read_parquet(path, subject, "copy the run again", names=["subject_id"])["subject_id"].tolist()


def _inputs(run: Path, config: dict[str, Any]) -> Verdict:
    """The EHR groups of a run are declared; groups known at discharge are listed, and allowed in pretraining only."""
    claim = f"{run}: no label is among its inputs"
    ehr = config.get("ehr") or {}
    baseline = config.get("groups") if config.get("encoder") == "metadata" else None  # other probes ignore them
    groups, preset = list(ehr.get("groups") or baseline or []), ehr.get("preset", "default")
    exported = run / "encoder" / "encoder.json"
    told = read_json(exported, OfRecord).get("ehr_groups") or {} if exported.is_file() and "ehr" in config else {}
    refused, late = [], []
    for group in dict.fromkeys([*groups, *told]):
        try:
            late += [g for g, when in static.available_at([group], preset).items() if when == "discharge"]
        except UserError:
            refused.append(group)
    pretraining = isinstance(config.get("encoder"), dict)
    hidden = [g for g in late if g in told and told[g] != "discharge"]
    bad = {
        f"inputs that are not EHR groups ({', '.join(refused)})": len(refused),
        f"inputs known only at discharge ({', '.join(late)})": 0 if pretraining else len(late),
        f"groups known only at discharge, contrary to encoder.json ({', '.join(hidden)})": len(hidden),
    }
    listed = ", ".join(dict.fromkeys(late)) or "none"
    return decide(claim, bad, f"{len(groups)} EHR groups; known only at discharge (pretraining only): {listed}")


def _predictions(run: Path, subjects: pd.DataFrame) -> Verdict:
    """The val and test files in predictions/ hold only val and test subjects."""
    bad: dict[str, int] = {}
    rows = 0
    for path in sorted((run / "predictions").glob("*.parquet")):
        own = set(subjects.loc[subjects["split"] == path.stem, "subject_id"].astype(int))
        ids = _subjects(path)
        rows += len(ids)
        if path.stem in HELD_OUT:
            bad[f"rows of predictions/{path.name} of other subjects"] = sum(i not in own for i in ids)
    return decide(f"{run}: its predictions are of val and test subjects", bad, f"{rows} predictions")
