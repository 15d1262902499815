"""A progress bar with rate and ETA on a terminal; elsewhere (a log file, CI) a line every QUIET_SECONDS."""

from __future__ import annotations

import sys
import time
from typing import Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)

QUIET_SECONDS = 30.0  # between two lines without a terminal
NAME, ETA = 26, len("00:00:00")  # letters
ETA_SECONDS = 600  # past work that the time left is estimated from: a step may take longer than half a minute


class Bar:
    """`with Bar("packing", total, "films") as bar: bar.advance(n)`; writes to stderr.

    Args:
        what: the text before the bar.
        total: number of units; unit: their name, in the plural.
        shown: False prints nothing (all processes but the first).
        after: seconds of work before the bar is shown, for work that may be short or comes many times.
    """

    def __init__(self, what: str, total: int, unit: str, *, shown: bool = True, after: float = 0.0) -> None:
        self.what, self.total, self.unit, self.shown, self.after = what, total, unit, shown, after
        self.done, self.note = 0, ""
        self._began = self._spoke = time.monotonic()
        rich = shown and sys.stderr.isatty()
        console = Console(stderr=True) if rich else None
        self._rich = (
            None
            if console is None
            else Progress(*_columns(console.width), console=console, speed_estimate_period=ETA_SECONDS)
        )
        self._room = 0 if console is None else _room(what, total, console.width)

    def __enter__(self) -> Self:
        if not self.after:
            self._start()
        return self

    def _start(self) -> None:
        if self._rich is not None:
            self._rich.start()
            self._task = self._rich.add_task(_short(self.what), total=self.total, note="")
        self.after = 0.0

    def __exit__(self, *_: object) -> None:
        if self._rich is not None and not self.after:
            self._rich.stop()

    @property
    def rate(self) -> float:
        """Units per second since the bar was made."""
        return self.done / max(time.monotonic() - self._began, 1e-9)

    def _speed(self, *, short: bool = False) -> str:
        """`12.5 films/s` (`12.5/s`), or where a unit takes longer than a second `3.2 s each`."""
        unit = "" if short else f" {self.unit}"
        return f"{self.rate:.1f}{unit}/s" if self.rate >= 1 or not self.done else f"{1 / self.rate:.1f} s each"

    def advance(self, number: int = 1, note: str = "") -> None:
        """Count `number` more units; `note` is printed at the end of the line, e.g. the loss."""
        self.done += number
        self.note = note or self.note
        if self.after and time.monotonic() - self._began > self.after:
            self._start()
        if self.after:
            return
        if self._rich is not None:
            note = _fit(f"{self._speed()} {self.note}".strip(), self._room)
            self._rich.update(self._task, completed=self.done, note=note)
        elif self.shown and time.monotonic() - self._spoke > QUIET_SECONDS:
            self._spoke = time.monotonic()
            left = (self.total - self.done) / self.rate
            text = f"{self.what}: {self.done} of {self.total} {self.unit}, {self._speed(short=True)}, {left:.0f} s left"
            print(text, self.note, file=sys.stderr, flush=True)


def _columns(width: int) -> list[ProgressColumn]:
    """Name, bar, count, ETA, note: whatever the terminal's width, the note is what gives way."""
    said = [TextColumn("{task.description}"), BarColumn(bar_width=_bar(width)), MofNCompleteColumn()]
    return [*said, TimeRemainingColumn(), TextColumn("{task.fields[note]}")]


def _room(what: str, total: int, width: int) -> int:
    """Letters that are left for the note."""
    return max(0, width - len(_short(what)) - _bar(width) - 2 * len(str(total)) - 1 - ETA - 4)


def _fit(note: str, room: int) -> str:
    """The note's first parts that fit, none of them cut."""
    while len(note) > room:
        note = note.rpartition(", ")[0] or note.rpartition(" ")[0]
    return note


def _bar(width: int) -> int:
    return 40 if width >= 120 else 10


def _short(what: str) -> str:
    """A long name without its middle: a path differs at the end."""
    return what if len(what) <= NAME else f"{what[: NAME // 2 - 1]}…{what[-NAME // 2 :]}"
