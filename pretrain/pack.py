"""Films -> store/, in parallel, shard by shard.

A shard is whole or absent; store.json is written last, so that a folder without it is a store in the making, which the
same command goes on with.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import multiprocessing
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
from PIL import Image

from configs import UserError
from ehr_features.files import PARTIAL, digest, new_file, provenance, read_json, write_json
from pretrain.config import ImagesConfig
from pretrain.film_list import films_digest, list_films
from pretrain.films import SUFFIXES, BadFilm, decode, fit
from pretrain.lock import lock
from pretrain.progress import Bar

FORMAT = 1
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
QUALITY = 95
Row = tuple[str, bytes | None, str]  # dicom_id, the packed film or None, the path or why it is set aside


def pack(config: ImagesConfig, part: tuple[int, int] = (1, 1), *, shard_films: int | None = None) -> Path:
    """Pack films into config.out; goes on with what an interrupted call left.

    Args:
        part: (i, n): pack the i-th of n parts of the shards (i from 1), for n machines on one shared folder; who
            comes last completes the store.
        shard_films: films in a shard; None: as many as make 128 MiB.
    Returns: the folder.
    Raises: UserError: nothing to pack, no film can be read, the folder holds something else, the disk is too small.
    """
    out = Path(config.out)
    films, counts = list_films(config)
    per_shard = shard_films or max(1, min(4096, SHARD_BYTES // config.size**2))
    plan = _plan(config, films, per_shard)
    if _opened(out, plan, part):
        return out
    print(f"packing {len(films)} films ({', '.join(f'{n} {what}' for what, n in counts.items())}) into {out}")
    groups = [films.iloc[at : at + per_shard] for at in range(0, len(films), per_shard)]
    mine = [n for n in range(part[0] - 1, len(groups), part[1]) if not _finished(out / shard_name(n), plan)]
    _check_disk(out, config, sum(len(groups[n]) for n in mine))
    began = time.monotonic()
    with Bar("packing", sum(len(groups[n]) for n in mine), "films") as bar, _workers(config.workers) as work:
        for number in mine:
            group = groups[number]
            jobs: list[Job] = [
                (i, path, config.size, config.encoding, config.dicom)
                for i, path in zip(group.dicom_id, group.path, strict=True)
            ]
            rows = []
            for row in work(jobs):
                rows.append(row)
                bar.advance()
            _write_shard(out / shard_name(number), rows, config, plan)
    if all((out / shard_name(n)).is_file() for n in range(len(groups))):
        _complete(out, config, plan, films, counts, len(groups), time.monotonic() - began)
    else:
        print(f"{out}: part {part[0]} of {part[1]} is packed; the store is complete once the other parts are")
    return out


def shard_name(number: int) -> str:
    """shard-00000.arrow and so on."""
    return f"shard-{number:05d}.arrow"


# ---- the folder -----------------------------------------------------------------------------------------------------
def _plan(config: ImagesConfig, films: pd.DataFrame, per_shard: int) -> dict[str, Any]:
    """What must be equal for a call to go on with a folder."""
    settings = config.model_dump(mode="json", exclude={"out", "workers"})
    return {
        "format": FORMAT,
        **settings,
        "films_in_shard": per_shard,
        "num_films": len(films),
        "ids": films_digest(films),
    }


def _opened(out: Path, plan: dict[str, Any], part: tuple[int, int]) -> bool:
    """Lock the folder and see what it holds. Returns: whether the store is complete already."""
    if not 1 <= part[0] <= part[1]:
        raise UserError(f"--shard {part[0]}/{part[1]}: wanted i/n with 1 <= i <= n")
    held = next((out / name for name in ("store.json", "packing.json") if (out / name).is_file()), None)
    if held is None and out.is_dir() and (foreign := sorted(p.name for p in out.iterdir() if p.name[0] != ".")):
        raise UserError(f"{out}: not a store; it holds {', '.join(foreign[:5])}. Choose another folder with out=...")
    lock(out, f".lock-{part[0]}-of-{part[1]}")
    if held is None:
        write_json(out / "packing.json", plan)
        return False
    old = read_json(held)["plan"] if held.name == "store.json" else read_json(held)
    if keys := [k for k in {**old, **plan} if old.get(k) != plan.get(k)]:
        lines = [f"  {k}: {old.get(k)!r} there, {plan.get(k)!r} now" for k in keys]
        raise UserError(
            "\n".join([f"{out}: holds a store made otherwise:", *lines, "remove it, or choose another out=..."])
        )
    if held.name == "store.json":
        print(f"{out}: complete, nothing to do; to redo it, remove the folder or choose another out=...")
        return True
    for stale in out.glob(f".*{PARTIAL}-*"):
        if part[1] == 1:
            stale.unlink()  # left by a process that was killed
    return False


def _finished(path: Path, plan: dict[str, Any]) -> bool:
    return path.is_file() and _metadata(path)["plan"] == digest(plan)


def _metadata(path: Path) -> dict[str, Any]:
    """What stands in a shard beside its films: plan, sha256, rejected."""
    with pa.memory_map(str(path)) as file:
        return dict(json.loads(pa.ipc.open_file(file).schema.metadata[b"ehr_msn"]))


def _check_disk(out: Path, config: ImagesConfig, films: int) -> None:
    need = films * config.size**2 // (1 if config.encoding == "raw" else 4)
    free = shutil.disk_usage(out).free
    if need > free:
        more = "" if config.encoding == "jpeg" else "; encoding=jpeg takes about a tenth"
        raise UserError(f"{out}: about {need / 1e9:.1f} GB are needed and {free / 1e9:.1f} GB are free{more}")


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


def _complete(
    out: Path,
    config: ImagesConfig,
    plan: dict[str, Any],
    films: pd.DataFrame,
    counts: dict[str, int],
    shards: int,
    seconds: float,
) -> None:
    """All shards are there: write index, rejected and, last, store.json."""
    index, rejected, hashes = [], [], []
    for number in range(shards):
        about = _metadata(out / shard_name(number))
        hashes.append(about["sha256"])
        rejected += about["rejected"]
        with pa.memory_map(str(out / shard_name(number))) as file:
            batch = pa.ipc.open_file(file).get_batch(0).select(["dicom_id", "height", "width"]).to_pandas()
        index.append(batch.assign(shard=number, row=range(len(batch))))
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
    preprocess = {
        "resize": config.size,
        "interpolation": "area",
        "pad": "centre",
        "pad_value": 0,
        "dicom": config.dicom,
    }
    files = {shard_name(n): (out / shard_name(n)).stat().st_size for n in range(shards)}
    more = {"num_films": len(packed), "num_rejected": len(bad), "reasons": reasons.to_dict(), "counts": counts}
    about = {
        "format": FORMAT,
        "size": config.size,
        "hash": digest([FORMAT, config.size, hashes]),
        "preprocess": preprocess,
    }
    made = provenance(config.model_dump(mode="json"), seconds=round(seconds, 1))
    write_json(out / "store.json", {**about, **more, "shards": files, "plan": plan, "provenance": made})
    (out / "packing.json").unlink(missing_ok=True)
    size, rate = sum(files.values()) / 1e6, len(films) / max(seconds, 1e-9)
    print(f"{out}: {len(packed)} films, {size:.0f} MB, {rate:.0f} films/s")
    if says:
        print(f"{len(bad)} films set aside: {says}; each with its reason in {out / 'rejected.parquet'}")


# ---- the workers ----------------------------------------------------------------------------------------------------
Job = tuple[str, str, int, str, Any]


def pack_film(job: Job) -> Row:
    """One film, decoded, resized, padded and encoded; or why not."""
    dicom_id, path, size, encoding, dicom = job
    try:
        square = fit(decode(_existing(path), dicom=dicom, near=2 * size), size)
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


@contextlib.contextmanager
def _workers(number: int | None) -> Iterator[Callable[[list[Job]], Iterator[Row]]]:
    """Give a function that packs films in order, with `number` processes; they end with this one, however it ends."""
    number = number or len(os.sched_getaffinity(0))
    if number == 1:
        yield lambda jobs: map(pack_film, jobs)
        return
    pool: list[ProcessPoolExecutor] = []

    def run(jobs: list[Job]) -> Iterator[Row]:
        if not pool:
            pool.append(_pool(number))
        done = 0
        try:
            for row in pool[0].map(pack_film, jobs, chunksize=max(1, min(16, len(jobs) // number))):
                done += 1
                yield row
        except BrokenProcessPool:  # a decoder died of a film: find it, one film and one process at a time
            pool.clear()
            for job in jobs[done:]:
                with _pool(1) as single:
                    try:
                        yield single.submit(pack_film, job).result()
                    except BrokenProcessPool:
                        yield job[0], None, f"{job[1]}\nthe decoder crashed"

    try:
        yield run
    except BaseException:
        for executor in pool:
            for process in list(executor._processes.values()):
                process.kill()
        raise
    finally:
        for executor in pool:
            executor.shutdown(wait=True, cancel_futures=True)


def _pool(number: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(number, multiprocessing.get_context("spawn"), _begin_worker)


def _begin_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the first process, which ends the others
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
