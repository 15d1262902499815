"""Metrics and messages of a run: metrics.jsonl, log.txt, the terminal, accelerate's trackers. Process 0 writes."""

from __future__ import annotations

import datetime
import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ehr_features.files import new_file
from pretrain.run.processes import is_main, on_main

if TYPE_CHECKING:
    from accelerate import Accelerator


class Log:
    """metrics.jsonl, log.txt, the terminal, and accelerate's trackers, if any; other processes than 0 write nothing."""

    def __init__(self, folder: Path, accelerator: Accelerator | None = None) -> None:
        self.folder, self.accelerator = Path(folder), accelerator
        self._began = time.monotonic()  # monotonic: unaffected by clock changes

    def log(self, values: Mapping[str, Any], step: int) -> None:
        """Append one line of metrics, {"step", "seconds", **values}; what is not finite is written as null."""
        if self.accelerator is not None and self.accelerator.trackers:
            self.accelerator.log(dict(values), step=step)
        if is_main():
            plain = {key: _number(value) for key, value in values.items()}
            line = {"step": step, "seconds": round(time.monotonic() - self._began, 3), **plain}
            with (self.folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(line, allow_nan=False) + "\n")

    def say(self, text: str) -> None:
        """Print, and append to log.txt with the time."""
        if is_main():
            print(text, flush=True)
            with (self.folder / "log.txt").open("a", encoding="utf-8") as file:
                file.write(f"{datetime.datetime.now():%Y-%m-%d %H:%M:%S} {text}\n")

    def cut(self, step: int) -> None:
        """Drop the metrics after `step`, which a resumed run writes again."""

        def cut_it() -> None:
            path = self.folder / "metrics.jsonl"
            if path.exists():
                lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
                with new_file(path) as part:
                    part.write_text("".join(line for line in lines if _step(line) <= step), encoding="utf-8")

        on_main(cut_it)


def _number(value: Any) -> Any:
    value = value.item() if hasattr(value, "item") else value
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _step(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf  # a partial line of a killed process
