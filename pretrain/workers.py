"""Processes that turn film files into packed squares, in order; a film that kills its decoder costs only itself."""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import InvalidStateError, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from PIL import Image

from configs.signals import held
from ehr_features.raw.remote import fetch, is_url
from pretrain.films import SUFFIXES, BadFilm, decode, fit

QUALITY = 95
AHEAD = 128  # films of a URL that are read while the ones before them are decoded
Row = tuple[str, bytes | None, str]  # dicom_id, the packed film or None, the path, or path and reason on two lines
Job = tuple[str, str, int, str, Any, bytes | None]  # dicom_id, path, size, encoding, dicom, what a URL gave


def pack_film(job: Job) -> Row:
    """One film, decoded, resized, padded and encoded; or why not."""
    dicom_id, path, size, encoding, dicom, data = job
    try:
        if is_url(path) and data is None:
            raise BadFilm("absent")
        found = path if is_url(path) else _existing(path)
        square = fit(decode(found, dicom=dicom, near=2 * size, data=data), size)
    except BadFilm as why:
        return dicom_id, None, f"{path}\n{why}"
    if encoding == "raw":
        return dicom_id, square.tobytes(), path
    file = io.BytesIO()
    Image.fromarray(square).save(file, "JPEG", quality=QUALITY)
    return dicom_id, file.getvalue(), path


def _existing(path: str) -> str:
    """The path, or the same film as .dcm or .png beside where it should be (MIMIC-CXR has .dcm, MIMIC-CXR-JPG .jpg)."""
    if os.path.exists(path):
        return path
    others = (os.path.splitext(path)[0] + suffix for suffix in SUFFIXES)
    return next((other for other in others if os.path.exists(other)), path)


def streamed(jobs: Sequence[Job]) -> Iterator[Sequence[Job]]:
    """The jobs with the content of films that lie at a URL, some at a time; the next are read meanwhile."""
    if not jobs or not is_url(jobs[0][1]):
        yield jobs
        return
    parts = [jobs[at : at + AHEAD] for at in range(0, len(jobs), AHEAD)]
    with ThreadPoolExecutor(1) as reader:
        coming = reader.submit(_fetched, parts[0])
        for following in [*parts[1:], None]:
            ready = coming.result()
            if following is not None:
                coming = reader.submit(_fetched, following)
            yield ready


def _fetched(jobs: Sequence[Job]) -> list[Job]:
    """Read the films, or the same ones as .dcm or .png beside where they should be."""
    contents: dict[str, bytes | None] = dict(
        zip((job[1] for job in jobs), fetch([job[1] for job in jobs]), strict=True)
    )
    for suffix in SUFFIXES:
        absent = [path for path, content in contents.items() if content is None]
        others = [os.path.splitext(path)[0] + suffix for path in absent]
        contents |= dict(zip(absent, fetch(others), strict=True))
    return [(*job[:5], contents[job[1]]) for job in jobs]


@contextlib.contextmanager
def workers(
    number: int | None, work: Callable[[Any], Row] = pack_film
) -> Iterator[Callable[[Sequence[Any]], Iterator[Row]]]:
    """Give a function that does `work` on jobs, in their order, with `number` processes (None: one a core).

    The processes end with this one, however it ends. A job at which a process dies is set aside.
    """
    number = number or (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()) or 1
    if number == 1:
        yield lambda jobs: map(work, jobs)
        return
    pools: dict[int, ProcessPoolExecutor] = {}  # by number of processes

    def ask(number: int, jobs: Sequence[Any]) -> Iterator[Row]:
        if number not in pools:
            context = multiprocessing.get_context("spawn")
            pools[number] = ProcessPoolExecutor(number, context, _begin_worker, (os.getpid(),))
        # Processes start here, with Ctrl-C blocked for good: it is for the first process, which ends the others.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            try:
                with held():
                    rows = pools[number].map(work, jobs, chunksize=max(1, min(16, len(jobs) // number)))
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
            yield from rows
        except BrokenProcessPool:
            pools.pop(number).shutdown()
            raise

    def run(jobs: Sequence[Any]) -> Iterator[Row]:
        at = 0
        while at < len(jobs):
            with contextlib.suppress(BrokenProcessPool):
                for row in ask(number, jobs[at:]):
                    at += 1
                    yield row
            for job in jobs[at : at + 64]:  # a decoder died of one of these: ask for them one by one
                at += 1
                try:
                    row = next(ask(1, [job]))
                except BrokenProcessPool:
                    row = job[0], None, f"{job[1]}\nthe decoder crashed"
                yield row

    try:
        yield run
    except BaseException:
        threading.excepthook = _no_stumble
        for executor in pools.values():
            for process in list((executor._processes or {}).values()):
                process.kill()
        raise
    finally:
        for executor in pools.values():
            executor.shutdown(wait=True, cancel_futures=True)


def _no_stumble(fault: threading.ExceptHookArgs) -> None:
    """The pool's own thread may raise when its processes are killed: it fails futures that are cancelled already."""
    if fault.exc_type is not InvalidStateError:
        threading.__excepthook__(fault)


def _begin_worker(parent: int) -> None:
    """Leave when the first process is gone, however it went."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
