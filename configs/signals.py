"""What Ctrl-C and SIGTERM do to a command, from its first line to its last. Imports little, so that it comes first.

Before the work they end the process at once, with a line and an exit code; during it they raise, so that what is
half-written is removed and what is done is saved; after it they change nothing.
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


class Stopped(BaseException):
    """SIGTERM came: what is done is saved, and the same command goes on from there."""


def leave() -> None:
    """Let both signals end this process at once: nothing has begun."""
    stopped = "stopped by SIGTERM before it began; the same command goes on"
    signal.signal(signal.SIGTERM, lambda *_: _leave(stopped, STOPPED))
    signal.signal(signal.SIGINT, lambda *_: _leave("interrupted before it began", INTERRUPTED))


def listen() -> None:
    """Let SIGTERM raise Stopped and Ctrl-C KeyboardInterrupt, once each."""
    signal.signal(signal.SIGTERM, _stop)
    signal.signal(signal.SIGINT, _interrupt)  # a shell's background jobs start with it ignored


def ignore() -> None:
    """Let neither signal change the outcome: it is known."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@contextlib.contextmanager
def held() -> Iterator[None]:
    """Let signals wait for the block's end: a process that is being started there would be lost, or stumble."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    before = {n: signal.signal(n, lambda number, _: came.append(number)) for n in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for first in came[:1]:
            signal.raise_signal(first)


def _stop(_: int, frame: FrameType | None) -> None:
    """SIGTERM counts once, as Ctrl-C does: a launcher passes on what every process of a job may have been sent."""
    if _first(signal.SIGTERM):
        if _importing(frame):
            _leave("stopped by SIGTERM; the same command goes on from here", STOPPED)
        raise Stopped


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


def _leave(message: str, code: int) -> None:
    if os.environ.get("RANK", "0") == "0":  # of several processes the first speaks
        os.write(2, f"{message}\n".encode())
    os._exit(code)
