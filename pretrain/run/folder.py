"""A run folder and what every training loop needs around it; used by pretraining and by fine-tuning.

runs/X/: config.yaml, provenance.json, metrics.jsonl, log.txt, trackers/, checkpoints/step_*.pt. Only process 0 writes;
what it decides or refuses, all processes do. A loop reads as

    accelerator = run.accelerator(args, mixed_precision="no")
    folder = run.open_run(config.out, config, sources=[...])
    if run.complete(folder): return folder
    log, state = run.Log(folder, accelerator), run.load_checkpoint(folder)
    log.cut(state["step"] if state else 0)
    with run.stopping() as stop:
        for step in ...:
            ...; log.log({"train/loss": loss}, step)
            if stop.agreed(step):
                run.save_checkpoint(folder, state, step); raise Stopped(run.go_on(folder, step, stop.gone))
    run.finish(folder)
"""

from __future__ import annotations

import datetime
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from configs import Settings, UserError
from configs.cli import typed
from ehr_features.files import check_ours, file_digest, lock, new_file, provenance, tidy, write_json, write_seal
from ehr_features.typed import read_json, read_yaml
from ehr_features.typed.shapes import Provenance
from pretrain.run.processes import agreed, on_main, watch

FIRST = ("config.yaml", "provenance.json", "budget.json", "log.txt", "checkpoints", "seen_subjects.parquet", "trackers")
OURS = (*FIRST, "metrics.jsonl", "encoder")
OF_ONE = ("*.json", "*.parquet", "*.safetensors", "predictions/*.parquet")
SEALED = ("config.yaml", "metrics.jsonl", *OF_ONE, *(f"seed_*/{pattern}" for pattern in OF_ONE))


def open_run(
    out: str | Path, config: Settings, *, sources: Sequence[str | Path] = (), may_differ: Sequence[str] = ()
) -> Path:
    """Make runs/X, or resume it if config and sources are the same.

    Args:
        out: the folder.
        config: saved as config.yaml.
        sources: files that it reads; their digests must be the same when the run is resumed.
        may_differ: keys (with dots) that may change between calls, e.g. `workers`; `out` always may.
    Returns: the folder; the lock on it is held until the process ends.
    Raises: UserError: another command holds its lock, its config differs, or it is not a run folder.
    """
    folder = Path(out)

    def open_it() -> None:
        check_ours(folder, "a run folder", ["config.yaml"], unfinished=OURS)
        lock(folder)
        tidy(folder, locked=True)
        tidy(folder / "checkpoints", locked=True)
        given = config.model_dump(mode="json")
        digests = {Path(s).as_posix(): file_digest(s) for s in sources if Path(s).is_file()}
        if (folder / "config.yaml").exists() and _begun(folder):
            _same_config(folder, given, {"out", *may_differ})
            _same_sources(folder, digests)
        else:
            (folder / "checkpoints").mkdir(exist_ok=True)
            write_json(folder / "provenance.json", provenance(given, sources, digests=digests, command=typed()))
            with new_file(folder / "config.yaml") as part:  # last: a folder with a config is complete
                part.write_text(yaml.safe_dump(given, sort_keys=False), encoding="utf-8")

    on_main(open_it)
    return folder


def needs(features: str | Path | None, store: str | Path | None) -> None:
    """Training reads these folders throughout: a run under which one is moved or deleted saves and ends."""
    files = [Path(features) / "provenance.json"] if features else []
    watch(files + ([Path(store) / "index.parquet", *sorted(Path(store).glob("shard-*.arrow"))] if store else []))


def _begun(folder: Path) -> bool:
    """Whether there is work to resume: a checkpoint or a result, not only a run's first files."""
    held = {p.name for p in folder.iterdir() if not p.name.startswith(".")}
    return bool(held - {*FIRST}) or any(folder.glob("checkpoints/*.pt"))


def _same_config(folder: Path, given: dict[str, Any], free: set[str]) -> None:
    path = folder / "config.yaml"
    held = read_yaml(path)
    old, new = dict(flat(held)), dict(flat(given))
    if old.get("precision") == "fp32":  # its name before release 0.3.0
        old["precision"] = "no"
    keys = [k for k in {**old, **new} if k not in free and old.get(k, "absent") != new.get(k, "absent")]
    if keys:
        lines = [f"  {k}: {old.get(k, 'absent')!r} there, {new.get(k, 'absent')!r} now" for k in keys[:12]]
        more = [f"  and {len(keys) - 12} more"] if len(keys) > 12 else []
        raise UserError(
            "\n".join([f"{folder}: holds a run of another config:", *lines, *more])
            + f"\nchoose another folder with out=..., or remove {folder} to start again"
        )


def _same_sources(folder: Path, digests: dict[str, str]) -> None:
    held = read_json(folder / "provenance.json", Provenance).get("digests", {})
    changed = [path for path, digest in digests.items() if held.get(path, digest) != digest]
    if changed:
        raise UserError(
            f"{folder}: its input has changed since it began: {', '.join(changed[:5])}; "
            f"choose another folder with out=..., or remove {folder} to start again"
        )


def flat(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested keys joined by dots, each with its value."""
    for key, item in value.items():
        if isinstance(item, Mapping) and item:
            yield from flat(item, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", item


def complete(folder: Path) -> bool:
    """Whether the run in the folder has finished; if so, say how to redo it. The same answer in all processes."""

    def ask() -> bool:
        at = read_json(folder / "provenance.json", Provenance).get("finished_at")
        if at:
            print(
                f"{folder}: complete since {at}, nothing to do; to redo it, remove the folder or choose another out=..."
            )
        return bool(at)

    return agreed(ask)


def finish(folder: Path, **more: Any) -> None:
    """Mark the run as complete; `more` is added to provenance.json."""

    def mark() -> None:
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        path = folder / "provenance.json"
        write_json(path, read_json(path, Provenance) | more | {"finished_at": now})
        write_seal(folder, *SEALED)

    on_main(mark)


def go_on(folder: Path, step: int, gone: Path | None = None) -> str:
    """The message of an early stop: `raise Stopped(go_on(folder, step, stop.gone))`."""
    why = f"{gone}: it is no longer there, moved or deleted under the run; put it back\n" if gone else ""
    return f"{why}{folder}: stopped at step {step} and saved; go on with\n  {typed()}"
