"""What Ctrl-C, SIGTERM and SIGHUP do to a command, from its first line to its last. Imports little, to come first.

Before the work they end the process at once, with a line and an exit code; during it they raise, so that what is
half-written is removed and what is done is saved; after it they change nothing. SIGHUP (the terminal was closed) counts
as SIGTERM, unless the command was started to ignore it (nohup).
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType

STOPPED, INTERRUPTED = 75, 130  # exit codes
_came_at: dict[int, float] = {}  # signal -> when it came last
_terminals: list[int] = []  # of 0, 1, 2, those that were a terminal at the start


class Stopped(BaseException):
    """SIGTERM or SIGHUP came: what is done is saved, and the same command goes on from there."""


def stops() -> tuple[signal.Signals, ...]:
    """The signals that stop a command to go on later."""
    hangup = signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN  # ignored: nohup
    return (signal.SIGTERM, signal.SIGHUP) if hangup else (signal.SIGTERM,)


def leave() -> None:
    """Let all of them end this process at once: nothing has begun."""
    _terminals.extend(number for number in (0, 1, 2) if os.isatty(number))
    for number in stops():
        signal.signal(number, _leave_at_once)
    signal.signal(signal.SIGINT, lambda *_: _leave("interrupted before it began", INTERRUPTED))


def listen() -> None:
    """Let SIGTERM and SIGHUP raise Stopped and Ctrl-C KeyboardInterrupt, once each."""
    for number in stops():
        signal.signal(number, _stop)
    signal.signal(signal.SIGINT, _interrupt)  # a shell's background jobs start with it ignored


def ignore() -> None:
    """Let no signal change the outcome: it is known."""
    for number in (*stops(), signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def hung_up(number: int) -> None:
    """After SIGHUP: what is written to a terminal that is gone, which would fail, goes nowhere."""
    if number != signal.SIGHUP:
        return
    for gone in _terminals:
        if not os.isatty(gone):
            os.dup2(os.open(os.devnull, os.O_RDWR), gone)


@contextlib.contextmanager
def held() -> Iterator[None]:
    """Let signals wait for the block's end: a process that is being started there would be lost, or stumble."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    before = {n: signal.signal(n, lambda number, _: came.append(number)) for n in (*stops(), signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for first in came[:1]:
            signal.raise_signal(first)


def _stop(number: int, frame: FrameType | None) -> None:
    """It counts once, as Ctrl-C does: a launcher passes on what every process of a job may have been sent."""
    hung_up(number)
    if _first(signal.SIGTERM):
        if _importing(frame):
            _leave(f"stopped by {signal.Signals(number).name}; the same command goes on from here", STOPPED)
        raise Stopped(f"stopped by {signal.Signals(number).name}")


def _interrupt(_: int, frame: FrameType | None) -> None:
    """Ctrl-C counts once: a launcher passes it on to processes that the terminal has told already."""
    if _first(signal.SIGINT):
        if _importing(frame):
            _leave("interrupted", INTERRUPTED)
        raise KeyboardInterrupt


def _first(number: int) -> bool:
    """Whether the same signal did not come just before."""
    before, _came_at[number] = _came_at.get(number, -math.inf), time.monotonic()
    return _came_at[number] - before > 3


def _importing(frame: FrameType | None) -> bool:
    """Whether the signal came in the middle of an import, where an exception is lost, or misleads."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


def _leave_at_once(number: int, _: object) -> None:
    hung_up(number)
    _leave(f"stopped by {signal.Signals(number).name} before it began; the same command goes on", STOPPED)


def _leave(message: str, code: int) -> None:
    if os.environ.get("RANK", "0") == "0":  # of several processes the first speaks
        os.write(2, f"{message}\n".encode())
    os._exit(code)
