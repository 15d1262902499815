"""Every file that a command reads, with what the commands make of it: places for `structure.py` to damage."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from markupsafe import Markup

from configs import load
from ehr_features.audit.claims import check_inputs, check_splits
from ehr_features.audit.notes import features_of
from ehr_features.audit.runs import check_runs
from ehr_features.config import FeaturesConfig
from ehr_features.demo.beside import truth_of
from ehr_features.files import read_table, write_json, write_seal
from ehr_features.films.summary import summary
from ehr_features.own_films.config import TableConfig
from ehr_features.own_films.read import read_films_table
from ehr_features.raw.source import open_source
from ehr_features.series import channels
from ehr_features.typed.seal import SEAL, read_seal
from finetune import demo
from finetune.compare import against, compare_runs
from finetune.embed import content, nearest
from finetune.fusion import samples
from finetune.fusion.net import read_branch
from finetune.guard import check_encoder
from finetune.labelled import read_films
from finetune.names import named
from finetune.probe import transfer
from finetune.records import MappedSeries
from finetune.report.cohort import cohort_section
from finetune.report.grids import grid_figures
from finetune.report.page import report
from finetune.report.results import possible
from finetune.report.training import curves_section
from finetune.results import read_results
from finetune.run_folders import read_runs
from finetune.score import score
from pretrain import encoder as encoders
from pretrain.config import PretrainConfig
from pretrain.data import from_features
from pretrain.export.card import own_results, trained_on
from pretrain.seen import ancestry, read_seen
from pretrain.store import Store
from pretrain.text.notes import read_notes
from tests.hardening import kills

Reader = Callable[[], str]  # a digest of what a command makes of the file


@dataclass(frozen=True)
class Place:
    """A file, and what reads it; `ours`: a command wrote it, so that a change of it is told."""

    name: str
    path: Path
    read: Reader
    ours: bool = True


def sign(*values: Any) -> str:
    """A digest of tables, arrays and plain values."""
    sha = hashlib.sha256()
    for value in values:
        if isinstance(value, pd.DataFrame):
            sha.update(value.to_csv(index=False).encode())
        elif isinstance(value, np.ndarray) and value.dtype != object:
            sha.update(f"{value.shape}".encode() + np.ascontiguousarray(value).tobytes())
        elif isinstance(value, torch.Tensor):
            sha.update(value.numpy().tobytes())
        else:
            sha.update(json.dumps(value, sort_keys=True, default=str).encode())
    return sha.hexdigest()


def make_world(folder: Path) -> Path:
    """A small hospital, its features, notes and store, a pretraining, a probe, a fusion, and a file of embeddings."""
    from tests.forked import begin

    folder.mkdir(parents=True, exist_ok=True)
    for name, command in kills.commands(folder).items():
        if name not in ("report", "grid"):
            process = begin(command.words, folder, folder / "log.txt")
            process.join()
            assert process.exitcode == 0, (folder / "log.txt").read_text()
    return folder


def places(out: Path, world: Path | None = None) -> list[Place]:
    """Files of a copy of the world below `out`; each may be damaged and restored."""
    world = world or make_world(out / "world")
    here = out / "in"
    shutil.rmtree(here, ignore_errors=True)
    for name in ("data", "features", "store", "notes", "runs"):
        ignored = shutil.ignore_patterns("checkpoints", ".*", "cache")
        shutil.copytree(world / name, here / name, ignore=ignored)
    for path in [*here.rglob("*.yaml"), *here.rglob("*.json")]:
        path.write_text(path.read_text().replace(str(world), str(here)))
    for path in here.rglob(SEAL):
        write_seal(path.parent, *read_seal(path.parent))
    made = [*_features(here), *_store(here / "store"), *_encoder(here), *_runs(here), *_notes(here)]
    return [*made, *_alone(here), *_own(here / "own"), *_raw(here)]


def _features(here: Path) -> list[Place]:
    folder = here / "features"

    def films() -> str:
        found = read_films(folder)
        source = from_features(folder, ["age", "sex"], "default")
        stays = read_table(folder, "stays", ["stay_id", "age_years"])
        return sign(found.table[["dicom_id", "subject_id", "split"]], found.labels, source.encoded[0][0], stays)

    def stays() -> str:
        found = samples.load(folder, "mortality", films=2)
        more = samples.load(folder, "phenotypes")
        arrays = [
            found.labels,
            found.values[: len(found.values)],
            found.start,
            found.length,
            found.films,
            found.hours,
            found.views,
        ]
        table = found.table.drop(columns="code_status", errors="ignore")
        return sign(table, found.film_ids, *arrays, more.labels, more.length)

    def said() -> str:
        checks = [check_inputs(folder), check_splits({"stays": read_table(folder, "stays", values=False)})]
        section = cohort_section([_Run(folder)])  # type: ignore[list-item]
        return sign([v.outcome for v in checks], summary(folder), str(section), truth_of(folder))

    def mapped() -> str:
        table = samples.read_samples(folder, "mortality").assign(until=48.0)
        found = MappedSeries.open(folder, table, None, None)
        assert found is not None
        return sign(found.start, found.length, found[0], found.columns)

    def every() -> str:
        return sign(films(), stays(), said(), mapped())

    names = ["images.parquet", "stays.parquet", "stay_films.parquet", "samples/mortality.parquet"]
    names += ["samples/phenotypes.parquet", "series.json", "schema.json", "attrition.json", "provenance.json"]
    return [Place(f"features/{name}", folder / name, every) for name in [*names, "series.safetensors"]]


@dataclass(frozen=True)
class _Run:
    """What the data section of a report asks of a run."""

    features: Path
    notes: None = None


def _store(folder: Path) -> list[Place]:
    def read() -> str:
        store = Store(folder)
        films = sorted(store.index["dicom_id"])
        return sign(films, store.read(films), store.hash, store.square.to_json())

    return [Place(f"store/{name}", folder / name, read) for name in ("store.json", "index.parquet")]


def _encoder(here: Path) -> list[Place]:
    run = here / "runs/pretrain"
    films = Store(here / "store").read(sorted(Store(here / "store").index["dicom_id"])[:2])
    subjects = read_table(here / "features", "images", ["subject_id", "split"])

    def read() -> str:
        made = encoders.load(run)
        meta = made.meta
        seen = check_encoder(run / "encoder", subjects, features=here / "features")
        listed = read_seen(run)
        about = [ancestry(run), trained_on(meta, run), str(own_results(run))]
        return sign(encoders.embed(made, films), seen.films, seen.supervision, listed, about, meta.get("step"))

    names = ("encoder/encoder.json", "encoder/encoder.safetensors", "seen_subjects.parquet")
    return [Place(f"run/{name}", run / name, read) for name in names]


def _runs(here: Path) -> list[Place]:
    runs = [here / "runs" / name for name in ("pretrain", "probe", "fuse")]
    subjects = read_table(here / "features", "images", ["subject_id", "split"]).drop_duplicates()

    def read(run: Path) -> str:
        found = named(read_runs([run]))
        said = [[one.called, one.kind, one.task, one.headline(), str(one.features), str(one.store)] for one in found]
        tables = [one.predictions for one in found if one.predictions is not None]
        rows = [one.by_row.index.tolist() for one in found if one.by_row is not None]
        audit = [[v.claim, v.outcome] for v in check_runs([run], subjects)]
        return sign(said, rows, *tables, *(one.rows for one in found), str(curves_section(found)), audit)

    def evaluated(run: Path) -> str:
        return sign(read(run), compare_runs([run], [run], samples=10), read_results(run)[0])

    def probed(run: Path) -> str:
        head, about = transfer.load(run)
        return sign(evaluated(run), head.weights, about)

    def fused(run: Path) -> str:
        return sign(evaluated(run), sorted(read_branch(run, "medfuse")))

    def page() -> str:
        page = report(runs[1:2], here / "report.html").read_text()
        return sign(page.partition("Nothing in this file is loaded")[0].partition("Made ")[0])

    found = []
    for run, way in zip(runs, (read, probed, fused), strict=True):
        for name in ("config.yaml", "provenance.json", "metrics.jsonl", "results.json", "predictions/test.parquet"):
            if (run / name).is_file():
                found.append(Place(f"run/{name}", run / name, partial(way, run)))
    found += [
        Place(f"run/{name}", runs[1] / name, partial(probed, runs[1])) for name in ("head.json", "head.safetensors")
    ]
    found.append(Place("run/model.safetensors", runs[2] / "model.safetensors", partial(fused, runs[2])))
    return [*found, *(Place(f"run/{name}, report", runs[1] / name, page) for name in ("results.json", "config.yaml"))]


def _notes(here: Path) -> list[Place]:
    folder = here / "notes"
    images = read_table(here / "features", "images", ["dicom_id", "taken_at"])

    def read() -> str:
        found = read_notes(folder, images.set_index("dicom_id")["taken_at"])
        return sign(found.table[["dicom_id", "note"]].sort_values("dicom_id"), str(features_of(folder)))

    return [Place(f"notes/{name}", folder / name, read) for name in ("notes.parquet", "provenance.json")]


def _alone(here: Path) -> list[Place]:
    """Files that one command reads: grid.json, demo.json, truth.json, embeddings, arrays to score."""
    found = []
    grid = here / "grid"
    for name in ("a", "b"):
        shutil.copytree(here / "runs/fuse", grid / name / "fuse")
    axes = {name: {"x": name} for name in "ab"}
    write_json(grid / "grid.json", {"methods": {"a": "a", "b": "b"}, "axes": axes, "steps": ["fuse"]})
    write_seal(grid, "grid.json")

    def table() -> str:
        gains = against(grid, samples=10)
        figures = grid_figures(grid, named(read_runs([grid])), gains)
        return sign(gains, str(Markup("").join(figures)))

    found.append(Place("grid.json", grid / "grid.json", table))
    settings = {"subjects": 10, "seed": 0, "shuffled": False}
    write_json(here / "demo/demo.json", {"settings": settings, "steps": {"data": {"words": "ab", "seconds": 1.5}}})
    # steps that are done: another word in it, and the step is done again
    found.append(Place("demo.json", here / "demo/demo.json", lambda: sign(demo._open(here / "demo", settings)), False))

    def truth() -> str:
        run = next(run for run in read_runs([here / "runs"]) if run.task == "mortality")
        return sign(possible(truth_of(here / "features"), "mortality", "mortality", run))

    found.append(Place("truth.json", here / "data/truth.json", truth))
    films = here / "films.parquet"
    rng = np.random.default_rng(0)
    table_ = pd.DataFrame(rng.normal(size=(12, 4)).astype(np.float32), columns=[f"f{i}" for i in range(4)])
    table_.insert(0, "dicom_id", [f"film{i}" for i in range(12)])
    table_.insert(1, "path", [f"{i}.png" for i in range(12)])
    about: dict[str, Any] = {"encoder": str(here / "runs/pretrain"), "key": "0", "pool": "cls", "left_out": 0}
    about["content"] = content(table_, table_.iloc[:, 2:].to_numpy())
    pq.write_table(pa.Table.from_pandas(table_).replace_schema_metadata({"ehr_msn": json.dumps(about)}), films)
    found.append(Place("embeddings", films, lambda: sign(nearest(str(films), "film3", number=3))))
    for suffix in ("csv", "parquet"):
        row = np.arange(40)
        rows = pd.DataFrame({"dicom_id": [f"film{i}" for i in row], "a": row % 2, "b": row % 3 % 2})
        scores = rows.assign(a=rng.uniform(size=40), b=rng.uniform(size=40))
        for name, frame in (("labels", rows), ("scores", scores)):
            path = here / f"{name}.{suffix}"
            frame.to_csv(path, index=False) if suffix == "csv" else frame.to_parquet(path)
        both = [str(here / f"{name}.{suffix}") for name in ("labels", "scores")]
        found += [
            Place(f"score, {suffix}", Path(one), lambda both=both: sign(score(*both, samples=5)), False) for one in both
        ]
    return found


def _config(schema: Any, path: Path) -> str:
    return sign(str(load(schema, path)))


def _own(folder: Path) -> list[Place]:
    """Files that a user writes: configs, channels, a table of films."""
    folder.mkdir()
    declared = folder / "channels.yaml"
    shutil.copyfile(channels.SHIPPED, declared)
    found = [Place("channels.yaml", declared, lambda: sign(str(channels.read_variables(declared))), False)]
    for name in ("features", "pretrain_vit_small"):
        path = folder / f"{name}.yaml"
        shutil.copyfile(kills.ROOT / f"configs/{name}.yaml", path)
        schema = FeaturesConfig if name == "features" else PretrainConfig
        found.append(Place("config", path, partial(_config, schema, path), False))
    num = 30
    films = pd.DataFrame({"path": [f"{i}.png" for i in range(num)], "patient": [f"P{i // 2}" for i in range(num)]})
    films["age"], films["split"] = 20 + np.arange(num), [("train", "val", "test")[i // 2 % 3] for i in range(num)]
    films["sick"] = np.arange(num) % 2
    for suffix in ("csv", "parquet"):
        path = folder / f"films.{suffix}"
        films.to_csv(path, index=False) if suffix == "csv" else films.to_parquet(path)
        given = {"table": str(path), "columns": ["sick"], "subject": "patient", "age": "age"}
        config = TableConfig.model_validate(given)

        def read(config: TableConfig = config) -> str:
            own = read_films_table(config, labels=True)
            return sign(own.films[["dicom_id", "subject_id", "split"]], own.labels)

        found.append(Place(f"table of films, {suffix}", path, read, False))
    return found


def _raw(here: Path) -> list[Place]:
    """Raw tables as CSV, read as the extraction reads them."""
    roots = {"mimic_iv": str(here / "data/mimic-iv"), "mimic_cxr": str(here / "data/mimic-cxr")}
    roots["mimic_ed"] = str(here / "data/mimic-iv-ed")
    found = []
    for path in sorted((here / "data").rglob("*.csv.gz")):
        name = path.name.removesuffix(".csv.gz")
        known = {"mimic-cxr-2.0.0-metadata": "cxr_metadata", "mimic-cxr-2.0.0-split": "cxr_split"}
        name = known.get(name, "cxr_chexpert" if "chexpert" in name else name)
        frame = pd.read_csv(path, dtype=str, keep_default_na=False)
        if name in ("chartevents", "labevents", "d_icd_diagnoses", "diagnosis") or len(frame) > 5000:
            continue
        plain = path.with_name(path.name.removesuffix(".gz"))
        frame.to_csv(plain, index=False)
        path.unlink()

        def read(name: str = name) -> str:
            source = open_source(FeaturesConfig(**roots, out=here / "new", threads=1))
            table = source.table(name).to_pandas()
            return sign(table.sort_values(list(table.columns), ignore_index=True))

        found.append(Place(f"raw/{name}", plain, read, False))
    return found
