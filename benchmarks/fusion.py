"""Input path of the fusion models: reading from features/ against parsing and discretising a CSV at each access.

./launch.sh python -m benchmarks.fusion FEATURES [--k 20] [--task mortality] [--epochs 1] [--json FILE]

FEATURES is a features/ folder (of the demo, or of the open MIMIC-IV demo); its stays are used k times. Reference: the
method of mimic3-benchmarks and MedFuse, written again from its description: a stay's CSV (one row per hour, 17 columns
of text) is parsed and put into hourly bins by Python loops whenever a sample is read. Their own code was measured
elsewhere at 0.6-1.0 ms for parsing and 2.2 ms (48 h) or 3.6 ms (whole stays) for discretising.
"""

from __future__ import annotations

import argparse
import csv
import json
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from accelerate import Accelerator

from configs import load as load_config
from ehr_features import series
from ehr_features.typed import read_json
from finetune.config import FuseConfig
from finetune.fusion import loop
from finetune.fusion.net import FilmBranch
from finetune.fusion.samples import Samples, batches, load, padding
from finetune.fusion.train import build

CATEGORIES = {"gcs_eye": 4, "gcs_motor": 6, "gcs_verbal": 5, "gcs_total": 15}
FILM_WIDTH = 192


def write_csvs(features: Path, samples: Samples, folder: Path) -> dict[int, Path]:
    """One CSV per stay: hours, then 17 columns, empty if nothing was measured."""
    about = read_json(features / "series.json")
    num = about["num_values"]
    first = {variable: column for column, variable in reversed(list(enumerate(about["observed_of"])))}
    names = [about["columns"][first[variable]] for variable in sorted(first)]
    paths = {}
    for stay, values in series.load(features, sorted(set(samples.table["stay_id"])), normalise=False).items():
        paths[stay] = folder / f"{stay}_timeseries.csv"
        with paths[stay].open("w", newline="") as file:
            out = csv.writer(file)
            out.writerow(["Hours", *names])
            for hour, row in enumerate(values):
                seen = row[num:]
                cells = [f"{row[first[v]]:g}" if seen[v] else "" for v in sorted(first)]
                out.writerow([f"{hour + 0.5:.6f}", *cells])
    return paths


def parse(path: Path) -> tuple[list[str], list[list[str]]]:
    """Header and rows of a stay's CSV, split as text."""
    with path.open() as file:
        header = file.readline().strip().split(",")
        return header, [line.strip().split(",") for line in file]


def discretise(header: list[str], rows: list[list[str]], hours: int) -> np.ndarray:
    """Hourly bins: last value of an hour, one-hot categories, gaps filled by the last value or a constant; masks."""
    channels = header[1:]
    width = [CATEGORIES.get(name, 1) for name in channels]
    begin = np.concatenate([[0], np.cumsum(width)])
    data, mask = np.zeros((hours, begin[-1])), np.zeros((hours, len(channels)))
    original: list[list[str]] = [["" for _ in channels] for _ in range(hours)]

    def put(at: int, channel: int, value: str) -> None:
        size = width[channel]
        if size > 1:
            one_hot = np.zeros(size)
            one_hot[min(max(int(float(value)) - 1, 0), size - 1)] = 1
            for i in range(size):
                data[at, begin[channel] + i] = one_hot[i]
        else:
            data[at, begin[channel]] = float(value)

    for row in rows:
        at = int(float(row[0]) - 1e-6)
        if at >= hours:
            continue
        for channel in range(len(channels)):
            if row[channel + 1] == "":
                continue
            mask[at, channel] = 1
            put(at, channel, row[channel + 1])
            original[at][channel] = row[channel + 1]
    last = [["1"] for _ in channels]
    for at in range(hours):
        for channel in range(len(channels)):
            if mask[at, channel]:
                last[channel].append(original[at][channel])
            else:
                put(at, channel, last[channel][-1])
    return np.hstack([data, mask])


def enlarge(samples: Samples, k: int) -> Samples:
    """The same predictions k times, each with its own copy of the series."""
    hours = len(samples.values)
    return replace(
        samples,
        table=pd.concat([samples.table] * k, ignore_index=True),
        labels=np.tile(samples.labels, (k, 1)),
        values=np.tile(samples.values[:], (k, 1)),
        start=(samples.start + hours * np.arange(k)[:, None]).ravel(),
        length=np.tile(samples.length, k),
        films=np.tile(samples.films, (k, 1)),
        hours=np.tile(samples.hours, (k, 1)),
    )


def epoch_seconds(model: str, samples: Samples, rows: np.ndarray, epochs: int) -> float:
    """Seconds of one training epoch of a model at the published sizes, film features frozen."""
    config = load_config(FuseConfig, Path(__file__).parents[1] / "configs/fuse_mortality.yaml", [f"model={model}"])
    films = FilmBranch(torch.zeros(FILM_WIDTH), torch.ones(FILM_WIDTH))
    net = build(config, samples, None if model.startswith("record") else films)
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    optimizer = torch.optim.AdamW(net.parameters(), lr=config.lr)
    wrapped, optimizer = accelerator.prepare(net, optimizer)
    began = time.perf_counter()
    for epoch in range(epochs):
        loop._epoch(net, wrapped, optimizer, samples, rows, config, accelerator, epoch)
    return (time.perf_counter() - began) / epochs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("features", type=Path)
    parser.add_argument("--k", type=int, default=20)
    parser.add_argument("--task", default="mortality")
    parser.add_argument("--epochs", type=int, default=1, help="of training; 0 measures the input path alone")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    began = time.perf_counter()
    one = load(args.features, args.task)
    loading = time.perf_counter() - began
    samples = enlarge(one, args.k)
    rng = np.random.default_rng(0)
    features = rng.standard_normal((max(len(samples.film_ids), 1), FILM_WIDTH)).astype(np.float32)
    samples = replace(samples, features=features)
    parts = batches(samples.length, 64, rng)
    samples.batch(parts[0])
    ours = min(_pass(samples, parts) for _ in range(3)) / len(samples)
    with tempfile.TemporaryDirectory() as folder:
        paths = write_csvs(args.features, one, Path(folder))
        rows = rng.permutation(len(one))[:200]
        began = time.perf_counter()
        for row in rows:
            discretise(*parse(paths[int(one.table["stay_id"].iloc[row])]), int(max(one.length[row], 1)))
        theirs = (time.perf_counter() - began) / len(rows)
    share = padding(samples.length, parts)
    print(f"{len(one)} samples of {args.task} x {args.k}, {one.length.mean():.0f} hours each; read in {loading:.2f} s")
    print(f"padding {share:.1%} of all steps in batches of 64")
    found: dict[str, Any] = {
        "samples": len(samples),
        "padding": share,
        "ours_ms": ours * 1e3,
        "reference_ms": theirs * 1e3,
    }
    for model in ("record_lstm", "medfuse") if args.epochs else ():
        seconds = epoch_seconds(model, samples, np.arange(len(samples)), args.epochs)
        whole = seconds + (theirs - ours) * len(samples)
        print(f"| epoch of {model}, s | {seconds:.1f} | fed the reference's way {whole:.1f} | {whole / seconds:.1f}x |")
        found[f"{model}_epoch_s"] = seconds
    reference = f"parse and discretise its CSV {theirs * 1e3:.2f}"
    print(f"| input path of a stay, ms | {ours * 1e3:.4f} | {reference} | {theirs / ours:.0f}x |")
    found["ratio"] = theirs / ours
    if args.json:
        args.json.write_text(json.dumps(found, indent=2))


def _pass(samples: Samples, parts: list[np.ndarray]) -> float:
    """Seconds to gather all batches."""
    began = time.perf_counter()
    for rows in parts:
        samples.batch(rows)
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
