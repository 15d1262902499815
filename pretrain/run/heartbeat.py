"""Signs of life of a run's processes, and waiting for process 0 without a collective call.

Every process counts up a number in the run's store (torch's TCPStore, in process 0) every few seconds, from a thread of
its own: it goes on counting during a long step, an evaluation or a write; a stopped process or a lost machine does not.
Every process reads the numbers of all. One that stands still for longer than the limit is named, and the others leave
with exit code 75: the same command goes on from the last checkpoint.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import threading
import time
from datetime import timedelta

import torch.distributed as dist

from configs.signals import STOPPED, held

EVERY_SECONDS = 5.0  # between two signs of life
LAST_SECONDS = 5.0  # that process 0 waits at its end for the others to read its last answer
ENDED = "ended"
COLLECTIVE = 3  # a collective call may take as many times the limit: one between processes that are alive


class Heartbeat:
    """One per process of a run with several.

    Args:
        store: of the run; its client here is used by nothing else.
        limit: seconds without a sign of life after which a process counts as lost.
        local: number of processes of each machine.
    """

    def __init__(self, store: dist.Store, rank: int, world: int, limit: float, local: int = 1) -> None:
        self.rank, self.world, self.limit, self.step = rank, world, limit, -1
        self._store, self._waits, self._waiting = store, 0, rank == 0
        self._machine = range(rank // local * local, min(world, (rank // local + 1) * local))
        self._keys = [f"alive/{r}" for r in range(world)]
        if rank == 0:
            for key in self._keys:
                store.set(key, "")
        self._read, self._silent = [""] * world, [0.0] * world
        self._ended = threading.Event()
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._count, self._watch)]
        with held():  # a signal inside a thread's start would leave its lock in disorder
            for thread in self._threads:
                thread.start()

    def end(self) -> None:
        """Say that this process has ended, and end the threads: one inside the store while Python ends would abort.

        The store ends with process 0: before that the others have read its last answer.
        """
        self._ended.set()
        for thread in self._threads:
            thread.join(2)
        with contextlib.suppress(RuntimeError):  # process 0 has ended before
            self._store.set(self._keys[self.rank], ENDED)
            deadline = time.monotonic() + LAST_SECONDS
            while self.rank == 0 and self._waits and time.monotonic() < deadline:
                if self._store.add(f"read/{self._waits}", 0) >= self.world - 1:
                    break
                time.sleep(0.01)

    def from_main(self, answer: str | None = None) -> str:
        """Process 0 gives an answer; the others wait for it, however long that takes. All processes call this."""
        self._waits += 1
        key, pause = f"main/{self._waits}", 0.002
        if answer is not None:
            self._store.set(key, answer)
            return answer
        while not self._store.check([key]):
            time.sleep(pause)
            pause = min(2 * pause, 0.2)
        answer = self._store.get(key).decode()
        self._store.add(f"read/{self._waits}", 1)
        return answer

    def _count(self) -> None:
        number, host = 0, socket.gethostname()
        while True:
            number += 1
            try:
                self._store.set(self._keys[self.rank], f"{host} {self.step} {number}")
                for rank, said in enumerate(self._store.multi_get(self._keys)):
                    if said.decode() != self._read[rank]:
                        self._read[rank], self._silent[rank] = said.decode(), 0.0
            except RuntimeError:
                return  # process 0 has ended, or the network is gone: its silence is counted
            if self._ended.wait(min(EVERY_SECONDS, self.limit / 4)):
                return

    def _watch(self) -> None:
        tick = min(1.0, self.limit / 8)
        before = began = time.monotonic()
        while not self._ended.wait(tick):
            now = time.monotonic()
            passed = min(now - before, 2 * tick)  # not the time in which this process itself was stopped
            before = now
            for rank in range(self.world):
                self._silent[rank] += passed if self._read[rank] != ENDED else 0.0
            self._say_who_is_missing(now - began)
            if lost := self.lost():
                speaks = next((rank for rank in self._machine if rank not in lost), self.rank)
                if speaks == self.rank or self._silent[lost[0]] > self.limit + 2 * EVERY_SECONDS:
                    _leave(self.sentence(lost))

    def lost(self) -> list[int]:
        """Processes without a sign of life for too long."""
        found = [rank for rank in range(self.world) if self._silent[rank] > self.limit]
        if self.rank in found:  # its own does not come back from the store, which is process 0's
            return [] if self.rank == 0 else [0]
        return found

    def sentence(self, lost: list[int]) -> str:
        first, others = lost[0], ", ".join(map(str, lost[1:]))
        says, at = f"process {first} has not begun", ""
        if self._read[first]:
            host, step, _ = self._read[first].split()
            says, at = f"process {first} on {host} has not answered", f" (last at step {step})" * (step != "-1")
        more = f", nor has {others}" if others else ""
        return (
            f"{says} for {self._silent[first]:.0f} s{at}{more}: is it stopped, or its machine or the network gone? The "
            f"run ends here (process_timeout={self.limit:g}); the same command goes on from the last checkpoint"
        )

    def _say_who_is_missing(self, waited: float) -> None:
        if self._waiting and waited > 15:
            self._waiting = False
            if absent := [str(rank) for rank in range(self.world) if not self._read[rank]]:
                print(f"waiting for process {', '.join(absent)} of {self.world}", file=sys.stderr, flush=True)


def connect(rank: int, limit: float) -> dist.Store:
    """A client of the run's store, which torch.distributed then uses too; process 0 serves it."""
    agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == str(True)  # torchrun serves it
    host, port = os.environ.get("MASTER_ADDR", "127.0.0.1"), int(os.environ.get("MASTER_PORT", "29500"))
    return dist.TCPStore(
        host,
        port,
        is_master=rank == 0 and not agent,
        timeout=timedelta(seconds=limit),
        wait_for_workers=False,
        multi_tenant=True,
    )


def _leave(sentence: str) -> None:
    os.write(2, f"{sentence}\n".encode())
    os._exit(STOPPED)  # the first thread waits in a collective call
