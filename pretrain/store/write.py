"""Pack films into store/, in parallel, shard by shard.

A shard is complete or absent. store.json is written last: a folder without it is unfinished, and the same command
resumes it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import InvalidStateError, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa

from configs import UserError
from configs.amounts import amount
from configs.signals import held
from configs.threads import cores
from ehr_features.files import (
    check_ours,
    check_settings,
    digest,
    lock,
    new_file,
    provenance,
    tidy,
    write_json,
    write_seal,
)
from ehr_features.own_films.ids import SUFFIXES, film_id
from ehr_features.progress import Bar
from ehr_features.raw.remote import configure, fetch, is_url
from ehr_features.typed import read_json
from pretrain.config import ImagesConfig
from pretrain.shapes import Plan, StoreJson
from pretrain.store.decode import BadFilm, Square
from pretrain.store.listing import films_digest, list_films
from pretrain.store.read import FORMAT, frame_hash, shard_name

SCHEMA = pa.schema(
    [
        ("dicom_id", pa.string()),
        ("height", pa.int32()),
        ("width", pa.int32()),
        ("encoding", pa.string()),
        ("bytes", pa.binary()),
    ]
)
SHARD_BYTES = 128 * 2**20  # a shard is held in memory until it is written


def pack(config: ImagesConfig, part: tuple[int, int] = (1, 1), *, shard_films: int | None = None) -> Path:
    """Pack films into config.out; resume after an interruption.

    Args:
        part: (i, n): pack the i-th of n parts of the shards (i from 1), for n machines on one shared folder; the last
            machine to finish completes the store.
        shard_films: films in a shard; None: as many as make 128 MiB.
    Returns: the folder.
    Raises: UserError: nothing to pack, no film can be read, the folder holds something else, the disk is too small.
    """
    out = Path(config.out)
    configure(config.storage)
    films, counts = list_films(config)
    per_shard = shard_films or max(1, min(4096, SHARD_BYTES // config.size**2))
    plan = _plan(config, films, per_shard)
    if _opened(out, plan, part):
        return out
    print(f"packing {len(films)} films ({', '.join(f'{n} {what}' for what, n in counts.items())}) into {out}")
    groups = [films.iloc[at : at + per_shard] for at in range(0, len(films), per_shard)]
    mine = [n for n in range(part[0] - 1, len(groups), part[1]) if not _finished(out / shard_name(n), plan)]
    _check_disk(out, config, sum(len(groups[n]) for n in mine))
    began, square = time.monotonic(), Square(config.size, config.dicom, config.encoding)
    with Bar("packing", sum(len(groups[n]) for n in mine), "films") as bar, workers(config.workers) as work:
        for number in mine:
            group = groups[number]
            jobs: list[Job] = [
                (dicom_id, path, square, None) for dicom_id, path in zip(group.dicom_id, group.path, strict=True)
            ]
            rows = []
            for ready in streamed(jobs):
                for row in work(ready):
                    rows.append(row)
                    bar.advance()
            _write_shard(out / shard_name(number), rows, config, plan)
    if all(_finished(out / shard_name(n), plan) for n in range(len(groups))):
        _complete(out, config, plan, films, counts, len(groups), time.monotonic() - began)
    else:
        print(f"{out}: part {part[0]} of {part[1]} is packed; the store is complete once the other parts are")
    return out


# ---- the folder -----------------------------------------------------------------------------------------------------
def _plan(config: ImagesConfig, films: pd.DataFrame, per_shard: int) -> dict[str, Any]:
    """The settings that must be equal to resume a folder."""
    settings = config.model_dump(mode="json", exclude={"out", "workers", "storage", "root", "path", "layout"})
    return {
        "format": FORMAT,
        **settings,
        "films_in_shard": per_shard,
        "num_films": len(films),
        "ids": films_digest(films),
    }


def _opened(out: Path, plan: dict[str, Any], part: tuple[int, int]) -> bool:
    """Lock the folder and read its state. Returns: whether the store is complete already."""
    if not 1 <= part[0] <= part[1]:
        raise UserError(f"--shard {part[0]}/{part[1]}: wanted i/n with 1 <= i <= n")
    held = next((out / name for name in ("store.json", "packing.json") if (out / name).is_file()), None)
    check_ours(out, "a store", ["store.json", "packing.json"])
    lock(out, f".lock-{part[0]}-of-{part[1]}")
    if held is None:
        write_json(out / "packing.json", plan)
        return False
    old = read_json(held, StoreJson).get("plan", {}) if held.name == "store.json" else read_json(held, Plan)
    check_settings(out, "a store", old, plan)
    if held.name == "store.json":
        print(f"{out}: complete, nothing to do; to redo it, remove the folder or choose another out=...")
        return True
    return False


def _finished(path: Path, plan: dict[str, Any]) -> bool:
    try:
        return path.is_file() and _metadata(path)["plan"] == digest(plan)
    except (pa.ArrowInvalid, OSError, KeyError, TypeError, ValueError):
        return False  # damaged: it is packed again


def _metadata(path: Path) -> dict[str, Any]:
    """The metadata of a shard: plan, sha256, rejected."""
    with pa.memory_map(str(path)) as file:
        return dict(json.loads(pa.ipc.open_file(file).schema.metadata[b"ehr_msn"]))


def _check_disk(out: Path, config: ImagesConfig, films: int) -> None:
    need = films * config.size**2 // (1 if config.encoding == "raw" else 4)
    free = shutil.disk_usage(out).free
    if need > free:
        more = "" if config.encoding == "jpeg" else "; encoding=jpeg takes about a tenth"
        raise UserError(f"{out}: about {amount(need)} are needed and {amount(free)} are free{more}")


def _write_shard(path: Path, rows: list[Row], config: ImagesConfig, plan: dict[str, Any]) -> None:
    good = [(i, data) for i, data, _ in rows if data is not None]
    bad = [(i, *why.split("\n", 1)) for i, data, why in rows if data is None]
    sha = hashlib.sha256()
    for dicom_id, data in good:
        sha.update(dicom_id.encode() + b"\0" + data)
    about = {"plan": digest(plan), "sha256": sha.hexdigest(), "rejected": bad}
    columns = [
        [i for i, _ in good],
        *[[config.size] * len(good)] * 2,
        [config.encoding] * len(good),
        [d for _, d in good],
    ]
    arrays = [pa.array(values, field.type) for values, field in zip(columns, SCHEMA, strict=True)]
    schema = SCHEMA.with_metadata({"ehr_msn": json.dumps(about)})
    with new_file(path) as new, pa.OSFile(str(new), "wb") as file, pa.ipc.new_file(file, schema) as writer:
        writer.write_batch(pa.record_batch(arrays, schema=schema))


def _frame(path: Path) -> tuple[int, int, str]:
    """Start and end of a shard's films, and the hash of all bytes around them, which Arrow does not check."""
    with pa.memory_map(str(path)) as file:
        films = pa.ipc.open_file(file).get_batch(0).column("bytes").buffers()[2]
        file.seek(0)
        start = films.address - file.read_buffer(1).address if films is not None and films.size else 0
        stop = start + (films.size if start else 0)
        return start, stop, frame_hash(path, start, stop)


def _complete(
    out: Path,
    config: ImagesConfig,
    plan: dict[str, Any],
    films: pd.DataFrame,
    counts: dict[str, int],
    shards: int,
    seconds: float,
) -> None:
    """Once all shards exist, write index, rejected and, last, store.json."""
    tidy(out)
    index, rejected, hashes, frames = [], [], [], {}
    for number in range(shards):
        about = _metadata(out / shard_name(number))
        hashes.append(about["sha256"])
        rejected += about["rejected"]
        with pa.memory_map(str(out / shard_name(number))) as file:
            batch = pa.ipc.open_file(file).get_batch(0).select(["dicom_id", "height", "width"]).to_pandas()
        index.append(batch.assign(shard=number, row=range(len(batch))))
        frames[shard_name(number)] = _frame(out / shard_name(number))
    packed = pd.concat(index)[["dicom_id", "shard", "row", "height", "width"]].astype(
        {"shard": "int32", "row": "int32"}
    )
    bad = pd.DataFrame(rejected, columns=["dicom_id", "path", "reason"], dtype=str)
    reasons = bad.reason.value_counts()
    says = ", ".join(f"{n} {why}" for why, n in reasons.head(5).items())
    if packed.empty:
        shutil.rmtree(out)
        raise UserError(f"none of {len(bad)} films could be read: {says}; the first: {bad.path.iloc[0]}")
    for name, table in (("index", packed), ("rejected", bad)):
        with new_file(out / f"{name}.parquet") as new:
            table.to_parquet(new, index=False)
    files = {shard_name(n): (out / shard_name(n)).stat().st_size for n in range(shards)}
    more = {"num_films": len(packed), "num_rejected": len(bad), "reasons": reasons.to_dict(), "counts": counts}
    about = {
        "format": FORMAT,
        "size": config.size,
        "hash": digest([FORMAT, config.size, hashes]),
        "preprocess": Square(config.size, config.dicom, config.encoding).to_json(),
    }
    made = provenance(config.model_dump(mode="json"), seconds=round(seconds, 1))
    write_json(
        out / "store.json", {**about, **more, "shards": files, "frames": frames, "plan": plan, "provenance": made}
    )
    write_seal(out, "store.json", "index.parquet", "rejected.parquet")
    (out / "packing.json").unlink(missing_ok=True)
    size, rate = sum(files.values()) / 1e6, len(films) / max(seconds, 1e-9)
    print(f"{out}: {len(packed)} films, {size:.0f} MB, {rate:.0f} films/s")
    if says:
        print(f"{len(bad)} films set aside: {says}; each with its reason in {out / 'rejected.parquet'}")


# ---- Processes that pack film files into squares, in order; a film that crashes its decoder affects no other film.

AHEAD = 128  # films of a URL that are prefetched during decoding
Row = tuple[str, bytes | None, str]  # dicom_id, the packed film or None, the path, or path and reason on two lines
Job = tuple[str, str, Square, bytes | None]  # dicom_id, path, preprocessing, content from a URL


def pack_film(job: Job) -> Row:
    """Decode, resize, pad and encode one film; or return the reason of failure."""
    dicom_id, path, square, data = job
    try:
        if is_url(path) and data is None:
            raise BadFilm("absent")
        return dicom_id, square.pack(path if is_url(path) else _existing(path), data), path
    except BadFilm as why:
        return dicom_id, None, f"{path}\n{why}"


def _existing(path: str) -> str:
    """The path, or the same film as .dcm or .png in that folder (MIMIC-CXR has .dcm, MIMIC-CXR-JPG .jpg)."""
    if os.path.exists(path):
        return path
    return next((other for other in _twins(path) if os.path.exists(other)), path)


def _twins(path: str) -> list[str]:
    """The path with each film suffix."""
    return [os.path.join(os.path.dirname(path), film_id(path) + suffix) for suffix in SUFFIXES]


def streamed(jobs: Sequence[Job]) -> Iterator[Sequence[Job]]:
    """The jobs with the content of films at a URL, prefetched in groups."""
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
    """Read the films, or the same films as .dcm or .png in their folder."""
    contents: dict[str, bytes | None] = dict(
        zip((job[1] for job in jobs), fetch([job[1] for job in jobs]), strict=True)
    )
    for number in range(len(SUFFIXES)):
        absent = [path for path, content in contents.items() if content is None]
        contents |= dict(zip(absent, fetch([_twins(path)[number] for path in absent]), strict=True))
    return [(*job[:3], contents[job[1]]) for job in jobs]


@contextlib.contextmanager
def workers(
    number: int | None, work: Callable[[Any], Row] = pack_film
) -> Iterator[Callable[[Sequence[Any]], Iterator[Row]]]:
    """A function that runs `work` on jobs in order, with `number` processes (None: one per core).

    The processes end with this one, in every case. A job whose process dies is set aside.
    """
    number = number or cores()
    if number == 1:
        yield lambda jobs: map(work, jobs)
        return
    pools: dict[int, ProcessPoolExecutor] = {}  # by number of processes

    def ask(number: int, jobs: Sequence[Any]) -> Iterator[Row]:
        if number not in pools:
            context = multiprocessing.get_context("spawn")
            pools[number] = ProcessPoolExecutor(number, context, _begin_worker, (os.getpid(),))
        # Processes start here with Ctrl-C blocked for good: the first process handles it and ends the others.
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
            for job in jobs[at : at + 64]:  # one of these crashed its decoder: run them one by one
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
    """Ignore errors in the pool's own thread after its processes are killed: it fails futures that are already
    cancelled."""
    if fault.exc_type is not InvalidStateError:
        threading.__excepthook__(fault)


def _begin_worker(parent: int) -> None:
    """Exit when the first process has ended, in whatever way."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
