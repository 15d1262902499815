"""The log of a run with the trackers that its config names."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from configs import Settings
from configs.threads import said
from pretrain.run.folder import flat
from pretrain.run.log import Log
from pretrain.run.processes import is_main
from pretrain.run.trackers import Tracker, open_trackers

if TYPE_CHECKING:
    from accelerate import Accelerator


def open_log(folder: Path, config: Settings, accelerator: Accelerator | None = None) -> Log:
    """A Log; `config` has trackers, project and run_name."""
    given = config.model_dump(mode="json")
    trackers: list[Tracker] = []
    if is_main() and given["trackers"]:
        named = dict(flat(given))
        trackers = open_trackers(given["trackers"], folder, given["project"], given["run_name"], named)
    log = Log(folder, accelerator, trackers)
    log.say(said())
    return log
