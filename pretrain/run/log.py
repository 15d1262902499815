"""Metrics and messages of a run: metrics.jsonl, log.txt, the terminal, its trackers. Process 0 writes."""

from __future__ import annotations

import datetime
import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ehr_features.files import new_file
from pretrain.run.processes import is_main, on_main
from pretrain.run.trackers import Tracker, finite

if TYPE_CHECKING:
    from accelerate import Accelerator


class Log:
    """metrics.jsonl, log.txt, the terminal, and trackers, if any; other processes than 0 write nothing.

    `part` names one of several trainings of a run in its trackers, e.g. a fold; the only one is "".
    """

    def __init__(
        self,
        folder: Path,
        accelerator: Accelerator | None = None,
        trackers: Sequence[Tracker] = (),
        part: str = "",
    ) -> None:
        self.folder, self.accelerator = Path(folder), accelerator
        self.trackers, self.part = list(trackers), part
        self._parts: set[str] = set()
        self._began = time.monotonic()  # monotonic: unaffected by clock changes

    def log(self, values: Mapping[str, Any], step: int, part: str | None = None) -> None:
        """Append one line of metrics, {"step", "seconds", **values}; what is not finite is written as null, and left
        out of the trackers."""
        if is_main():
            plain = {key: _number(value) for key, value in values.items()}
            line = {"step": step, "seconds": round(time.monotonic() - self._began, 3), **plain}
            with (self.folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(line, allow_nan=False) + "\n")
            self.track(values, step, part)

    def track(self, values: Mapping[str, Any], step: int, part: str | None = None) -> None:
        """Give values to the trackers alone."""
        part = self.part if part is None else part
        if not is_main() or not self.trackers or not (numbers := finite(values)):
            return
        if part not in self._parts:
            self.begin(-1, part)
        for tracker in self.trackers:
            tracker.log(part, numbers, step)

    def begin(self, step: int, part: str | None = None) -> None:
        """A training starts or goes on at `step`: the trackers drop what they have after it."""
        part = self.part if part is None else part
        if is_main():
            self._parts.add(part)
            for tracker in self.trackers:
                tracker.begin(part, step)

    def within(self, folder: Path) -> Log:
        """The log of a training in a folder of this run, with the same trackers."""
        return Log(folder, self.accelerator, self.trackers, Path(folder).relative_to(self.folder).as_posix())

    def close(self) -> None:
        """End the trackers' runs."""
        for tracker in self.trackers if is_main() else ():
            tracker.close()

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
        self.begin(step)


def _number(value: Any) -> Any:
    value = value.item() if hasattr(value, "item") else value
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _step(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf  # a partial line of a killed process
