"""Memory and time at a hospital's full counts: fuse, kNN, controls, intervals, threads, estimates, a report.

    ./launch.sh python -m benchmarks.full_size [PART ...] [--scratch FOLDER] [--share 1.0] [--runs 200]

The tables are made up, with the counts of MIMIC-IV 3.1 and MIMIC-CXR: 94,458 stays, 7.8 million stay-hours, 377,110
films; `--share` takes a part of them. Each part runs in its own processes. `private` is a process's own memory that
the system cannot drop (Private_Dirty of /proc/self/smaps_rollup); pages of a mapped file are shared by all processes
and count for none. `peak` is the largest resident memory.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd

STAYS, HOURS, FILMS, SUBJECTS = 94_458, 83.0, 377_110, 65_366
VALUES, OBSERVED = 18, 17  # columns of the default series
SPLITS = np.array(["train", "val", "test"], object)


# ---- Made-up tables


def hospital(folder: Path, share: float) -> Path:
    """A features folder with the series, samples of mortality and decompensation, and films of stays."""
    if (folder / "provenance.json").is_file():
        return folder
    from ehr_features.series.file import _header

    rng = np.random.default_rng(0)
    (folder / "samples").mkdir(parents=True, exist_ok=True)
    stays = np.sort(rng.choice(10**7, int(STAYS * share), replace=False)) + 3 * 10**7
    subject = rng.integers(10**7, 10**7 + int(SUBJECTS * share), len(stays))
    split = SPLITS[np.searchsorted([0.7, 0.8], (subject * 7919 % 1000) / 1000, "right")]
    hours = np.clip(rng.lognormal(np.log(HOURS) - 0.5, 1.0, len(stays)), 5, 2400)
    bins = np.ceil(hours).astype(np.int64)
    offsets = np.concatenate([[0], np.cumsum(bins)])
    shapes = {
        "stay_id": ("I64", stays.shape),
        "offsets": ("I64", offsets.shape),
        "values": ("F32", (int(offsets[-1]), VALUES)),
        "observed": ("U8", (int(offsets[-1]), OBSERVED)),
    }
    with (folder / "series.safetensors").open("wb") as file:
        starts = _header(file, shapes)
        file.seek(starts["stay_id"])
        file.write(stays.astype("<i8").tobytes() + offsets.astype("<i8").tobytes())
        for begin in range(0, int(offsets[-1]), 10**6):
            rows = min(10**6, int(offsets[-1]) - begin)
            file.write(rng.normal(size=(rows, VALUES)).astype(np.float32).tobytes())
        for begin in range(0, int(offsets[-1]), 10**6):
            rows = min(10**6, int(offsets[-1]) - begin)
            file.write((rng.random((rows, OBSERVED)) < 0.3).astype(np.uint8).tobytes())
    names = [f"v{i}" for i in range(VALUES)] + [f"seen{i}" for i in range(OBSERVED)]
    normaliser = {"mean": [0.1] * VALUES, "std": [1.5] * VALUES}
    about = {"columns": names, "units": ["1"] * len(names), "step_hours": 1.0, "num_values": VALUES}
    about |= {"observed_of": [min(i, OBSERVED - 1) for i in range(VALUES)], "normaliser": normaliser}
    about["imputation"] = {"rule": "none", "normal": [0.0] * VALUES}
    (folder / "series.json").write_text(json.dumps(about))
    table = pd.DataFrame({"stay_id": stays, "subject_id": subject, "split": split, "los_hours": hours})
    table.assign(age_years=rng.uniform(18, 90, len(stays))).to_parquet(folder / "stays.parquet")
    _films(folder, table, rng, int(FILMS * share))
    (folder / "provenance.json").write_text("{}")
    return folder


def _films(folder: Path, stays: pd.DataFrame, rng: np.random.Generator, films: int) -> None:
    """stay_films: a third of the films are of a stay, in a fifth of the stays; samples name the last one before."""
    own = rng.choice(len(stays), len(stays) // 5, replace=False)
    of = np.sort(rng.choice(own, films // 3))
    taken = pd.DataFrame({"stay_id": stays["stay_id"].to_numpy()[of], "dicom_id": _ids(len(of))})
    taken["hours_from_intime"] = rng.random(len(of)) * stays["los_hours"].to_numpy()[of]
    taken["view"] = np.array(["AP", "PA", "LATERAL"], object)[rng.choice(3, len(of), p=[0.7, 0.2, 0.1])]
    taken.to_parquet(folder / "stay_films.parquet")
    keys = ["stay_id", "subject_id", "split"]
    early = stays[stays["los_hours"] >= 48][keys].assign(predict_at_hours=48.0)
    early["sample_id"], early["mortality"] = early["stay_id"].astype(str), (rng.random(len(early)) < 0.1).astype(int)
    _last_film(early, taken).to_parquet(folder / "samples/mortality.parquet")
    counts = np.maximum(np.ceil(stays["los_hours"].to_numpy()).astype(int) - 4, 0)
    hourly = stays[keys].loc[np.repeat(stays.index, counts)].reset_index(drop=True)
    hourly["predict_at_hours"] = 5.0 + np.arange(len(hourly)) - np.repeat(np.cumsum(counts) - counts, counts)
    hourly["sample_id"] = hourly["stay_id"].astype(str) + "-" + hourly["predict_at_hours"].astype(int).astype(str)
    hourly["decompensation"] = (rng.random(len(hourly)) < 0.02).astype(int)
    _last_film(hourly, taken).to_parquet(folder / "samples/decompensation.parquet")


def _last_film(samples: pd.DataFrame, taken: pd.DataFrame) -> pd.DataFrame:
    taken = taken.rename(columns={"hours_from_intime": "predict_at_hours"})[["stay_id", "dicom_id", "predict_at_hours"]]
    ordered = samples.sort_values("predict_at_hours", kind="stable")
    return pd.merge_asof(ordered, taken.sort_values("predict_at_hours"), on="predict_at_hours", by="stay_id")


def _ids(num: int) -> list[str]:
    return [f"{i:08x}-{i * 2654435761 % 2**32:08x}-{i:08x}-{i * 40503 % 2**32:08x}-{i:08x}" for i in range(num)]


def store(folder: Path, share: float, size: int = 32) -> Path:
    """images.parquet in `folder`, and a store of its films: noise, small so that it is quickly written."""
    if (folder / "store/store.json").is_file():
        return folder / "store"
    from ehr_features.static import READS
    from pretrain.config import ImagesConfig
    from pretrain.store.write import _complete, _plan, _write_shard, shard_name

    rng, count = np.random.default_rng(2), int(FILMS * share)
    subject = np.sort(rng.integers(10**7, 10**7 + int(SUBJECTS * share), count))
    table = pd.DataFrame({"dicom_id": _ids(count), "study_id": np.arange(count) + 5 * 10**7, "subject_id": subject})
    table["taken_at"] = pd.Timestamp("2150-01-01") + pd.to_timedelta(rng.integers(0, 10**8, count), unit="s")
    table["split"] = SPLITS[np.searchsorted([0.7, 0.8], (subject * 7919 % 1000) / 1000, "right")]
    table["view"] = np.array(["AP", "PA", "LATERAL"], object)[rng.choice(3, count, p=[0.4, 0.25, 0.35])]
    table["sex"], table["age_years"] = rng.choice(["M", "F"], count), rng.uniform(18, 90, count)
    for name in READS["ed_triage"]:
        table[name] = np.where(rng.random(count) < 0.5, rng.normal(80, 20, count), np.nan)
    table.to_parquet(folder / "images.parquet")
    config = ImagesConfig(films=f"{folder}/images.parquet", out=f"{folder}/store", size=size)
    films = table[["dicom_id"]].assign(path=table["dicom_id"])
    plan, numbers = _plan(config, films, 4096), range(0, count, 4096)
    (folder / "store").mkdir(exist_ok=True)
    for number, first in enumerate(numbers):
        ids = films["dicom_id"].iloc[first : first + 4096]
        _write_shard(folder / "store" / shard_name(number), [(i, rng.bytes(size**2), i) for i in ids], config, plan)
    _complete(folder / "store", config, plan, films, {}, len(numbers), 1.0)
    return folder / "store"


def memory() -> dict[str, float]:
    """MB of this process: private now, and the largest that was resident."""
    rollup = Path("/proc/self/smaps_rollup").read_text().split()
    status = Path("/proc/self/status").read_text().split()
    return {
        "private": int(rollup[rollup.index("Private_Dirty:") + 1]) / 1024,
        "peak": int(status[status.index("VmHWM:") + 1]) / 1024,
    }


# ---- Parts: each prints rows of a table


def fuse(scratch: Path, share: float) -> None:
    """Two processes load a task, and each gathers the batches of 20,000 samples."""
    folder = hospital(scratch / f"hospital_{share:g}", share)
    for task, hours in (("mortality", None), ("decompensation", 48)):
        code = f"from benchmarks.full_size import load_task; load_task({str(folder)!r}, {task!r}, {hours})"
        children = [_python(code) for _ in range(2)]
        said = [json.loads(child.communicate()[0].splitlines()[-1]) for child in children]
        worst = {key: max(of[key] for of in said) for key in said[0]}
        what = f"`fuse`, {task}, {worst['samples']:,.0f} samples, each of 2 processes"
        print(f"| {what}, private MB after loading | {worst['private']:.0f} |")
        print(f"| the same, peak MB | {worst['peak']:.0f} |")
        print(f"| the same, s to load; s for 20,000 samples in batches | {worst['load']:.1f}; {worst['batches']:.1f} |")


def load_task(folder: str, task: str, hours: int | None) -> None:
    """What a process of `fuse` holds of the record; `base` is what its imports hold."""
    from finetune.fusion.samples import batches, load

    base, began = memory()["private"], time.monotonic()
    samples = load(folder, task, max_hours=hours)
    loaded = time.monotonic() - began
    rows = np.random.default_rng(os.getpid()).choice(samples.rows("train"), min(20_000, len(samples) // 2), False)
    began = time.monotonic()
    for part in batches(samples.length[rows], 32, np.random.default_rng(0)):
        samples.batch(rows[part])
    found = memory() | {"base": base, "samples": len(samples), "load": loaded, "batches": time.monotonic() - began}
    time.sleep(1)
    print(json.dumps(found))


def control(scratch: Path, share: float) -> None:
    """control=another of the mortality task: a film of another subject for each sample."""
    from finetune.fusion.samples import another_film, load

    samples = load(hospital(scratch / f"hospital_{share:g}", share), "mortality")
    began = time.process_time()
    another_film(samples)
    print(f"| `control=another`, {samples.has_image.sum():,} samples, s | {time.process_time() - began:.1f} |")


def knn(scratch: Path, share: float) -> None:
    """kNN of test films among train films, features of width 384, 14 labels."""
    from finetune.probe.heads import Data
    from finetune.probe.heads import knn as fit

    rng = np.random.default_rng(0)
    train, val = int(200_000 * share), int(20_000 * share)
    given = [
        Data({"cls": rng.normal(size=(n, 384)).astype(np.float32)}, (rng.random((n, 14)) < 0.2).astype(np.float32))
        for n in (train, val)
    ]
    base, began = memory()["peak"], time.monotonic()
    fit(*given, pools=["cls"], neighbours=[5, 20, 100, 200])
    took, peak = time.monotonic() - began, memory()["peak"]
    print(f"| kNN, {val:,} films among {train:,}, width 384, four numbers of neighbours, s | {took:.0f} |")
    print(f"| the same, peak MB (of it the features and before {base:.0f}) | {peak:.0f} |")


def intervals(scratch: Path, share: float) -> None:
    """1,000 resamples of a run of 100,000 rows x 25 labels: AUROC alone (report, compare), and all metrics."""
    from finetune.metrics import distribution, evaluate

    y, p, group = predictions(int(100_000 * share), 25)
    began = time.process_time()
    distribution(y, p, group, samples=1000, seed=0, metrics=["auroc"])
    print(f"| AUROC of {len(y):,} rows x 25 labels, 1,000 resamples, processor s | {time.process_time() - began:.1f} |")
    began = time.process_time()
    evaluate(y, p, groups=group)
    print(f"| all metrics of the same (`score`), processor s | {time.process_time() - began:.1f} |")
    print(f"| the same, peak MB | {memory()['peak']:.0f} |")


def threads(scratch: Path, share: float) -> None:
    """Processor seconds of intervals where BLAS may use two threads."""
    code = (
        f"import time; from benchmarks.full_size import predictions; y, p, g = predictions({int(8000 * share)}, 10)\n"
        "import sklearn.linear_model; from finetune.metrics import evaluate\n"
        "began = time.process_time(); evaluate(y, p, groups=g, samples=500)\n"
        "print(time.process_time() - began)"
    )
    took = float(_python(code, OMP_NUM_THREADS="2", OPENBLAS_NUM_THREADS="2").communicate()[0].splitlines()[-1])
    what = f"`evaluate` of {8000 * share:,.0f} rows x 10 labels, 500 resamples, two threads of BLAS, processor s"
    print(f"| {what} | {took:.2f} |")


def predictions(rows: int, labels: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Labels, probabilities (rows, labels), subjects (rows,)."""
    y = (np.random.default_rng(0).random((rows, labels)) < np.linspace(0.03, 0.4, labels)).astype(float)
    noise = np.random.default_rng([seed, 1]).normal(size=y.shape)
    return y, 1 / (1 + np.exp(-(noise + y - 1))), np.random.default_rng(1).integers(0, max(rows * 2 // 3, 1), rows)


def report(scratch: Path, share: float, runs: int = 200) -> None:
    """A report of runs of 100,000 rows x 25 labels, in its own process; then the same again."""
    rows = int(100_000 * share)
    folder = scratch / f"runs_{runs}_of_{rows}"
    write_runs(folder, runs, rows)
    out = scratch / "report.html"
    for what in ("first", "again"):
        code = (
            "import json, time; from benchmarks.full_size import memory; from finetune.report.page import report\n"
            f"began = time.process_time(); report([{str(folder)!r}], {str(out)!r})\n"
            "print(json.dumps(memory() | {'s': time.process_time() - began}))"
        )
        found = json.loads(_python(code).communicate()[0].splitlines()[-1])
        print(f"| `report` of {runs} runs of {rows:,} rows x 25 labels, {what}, processor s | {found['s']:.0f} |")
        print(f"| the same, peak MB; page, MB | {found['peak']:.0f}; {out.stat().st_size / 1e6:.1f} |")


def write_runs(folder: Path, runs: int, rows: int) -> None:
    """Runs of one task as `fuse` leaves them; each differs in its model and its scores."""
    from finetune.metrics import evaluate
    from finetune.results import write_predictions, write_results

    table = None
    for i in range(runs):
        run = folder / f"model_{i:03d}"
        if (run / "config.yaml").is_file():
            continue
        y, p, group = predictions(rows, 25, i)
        names = [f"phenotype_{j}" for j in range(25)]
        if table is None:  # intervals are not what is measured: those of the first stand for all
            table = pd.concat([evaluate(y, p, names=names, groups=group).assign(split=s) for s in ("val", "test")])
        ids = pd.DataFrame({"sample_id": np.arange(rows).astype(str), "subject_id": group, "has_image": True})
        write_predictions(run, "test", ids, pd.DataFrame(y, columns=names), np.log(p / (1 - p)))
        about = {"task": "phenotypes", "model": f"model_{i:03d}", "encoder": None, "seed": 0}
        write_results(run, about | {"allow_leak": False, "warnings": []}, table)
        (run / "config.yaml").write_text(f"model: model_{i:03d}\ntask: phenotypes\n")


def estimate(scratch: Path, share: float) -> None:
    """`pretrain --estimate`: it reads the table of films and the index of the store, and times some steps."""
    folder = hospital(scratch / f"hospital_{share:g}", share)
    given = [
        f"features={folder}",
        f"store={store(folder, share)}",
        "encoder.image_size=32",
        "ehr.groups=[sex,age,ed_triage]",
    ]
    words = [sys.executable, "-P", "-m", "configs", "pretrain", "demo/pretrain_resnet", *given, "--estimate"]
    began = time.monotonic()
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
    print(f"| `pretrain --estimate`, {FILMS * share:,.0f} films, s | {time.monotonic() - began:.0f} |")


PARTS: dict[str, Callable[[Path, float], None]] = {
    "fuse": fuse,
    "control": control,
    "knn": knn,
    "intervals": intervals,
    "threads": threads,
    "estimate": estimate,
    "report": report,
}


def _python(code: str, **environment: str) -> subprocess.Popen[str]:
    own = os.environ | environment
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=own)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("parts", metavar="PART", nargs="*", choices=[*PARTS, []], help=f"of {', '.join(PARTS)}")
    parser.add_argument("--scratch", type=Path, help="folder for the made-up tables, kept for the next time")
    parser.add_argument("--share", type=float, default=1.0, help="of the full counts (default 1)")
    parser.add_argument("--runs", type=int, default=200, help="of the report (default 200)")
    args = parser.parse_args()
    parts = PARTS | {"report": partial(report, runs=args.runs)}
    with tempfile.TemporaryDirectory() as made:
        for name in args.parts or PARTS:
            began = time.monotonic()
            parts[name](args.scratch or Path(made), args.share)
            print(f"({name}: {time.monotonic() - began:.0f} s)", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
