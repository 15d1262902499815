"""`fuse`: train a fusion model on features/, films and encoder/; write results.json, predictions and the model.

Input: a FuseConfig. Output: runs/X/ with results.json, predictions/{val,test}.parquet, model.safetensors and, if the
encoder was tuned, encoder/. Validation chooses the epoch and the lr; the test split is read once, at the end.
With `seeds` above 1 each training is written to runs/X/seed_N/, and runs/X/results.json has their means.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from configs import UserError, load
from configs.amounts import check_memory
from configs.loader import Given
from ehr_features.files import new_file, write_json
from ehr_features.schema import HELD_OUT
from ehr_features.typed import read_json, undamaged
from finetune.config import FuseConfig
from finetune.config.shapes import Trial
from finetune.fit import Scores, weights_of
from finetune.fusion import outputs, own_samples
from finetune.fusion.cross_attention import kind_of
from finetune.fusion.film_gain import adds
from finetune.fusion.gbm import RecordGBM
from finetune.fusion.inputs import prepare
from finetune.fusion.loop import predict, train
from finetune.fusion.models import Sizes
from finetune.fusion.net import FilmBranch, Net, load_branch, read_branch
from finetune.fusion.outputs import Predictions
from finetune.fusion.samples import Samples
from finetune.results import TRACKING, headline
from pretrain import encoder as encoders
from pretrain import run
from pretrain.encoder.memory import TRAINED, tried_on_meta, weights_fit

Rows = dict[str, NDArray[np.int64]]


def fuse(config: FuseConfig | Given, args: argparse.Namespace | None = None) -> Path:
    """Train a model on a task and evaluate it.

    Args:
        config: a FuseConfig, its keys in a dict, a YAML file, or the name of a shipped one.
        args: command-line arguments, for the number of processes.
    Returns: the run folder.
    Raises: UserError: unreadable inputs, an encoder that saw val or test subjects, a split without samples; Stopped: on
        SIGTERM; the same command resumes.
    """
    config = load(FuseConfig, config)
    config, unused = read_by_model(config)
    if unused and run.is_main():
        print(f"model={config.model} reads no films; not used: {', '.join(unused)}")
    uneven = DistributedDataParallelKwargs(find_unused_parameters=True)  # a batch may have no film
    run.check_trackers(config.trackers)
    check_size(config)
    accelerator = run.accelerator(
        args, limit=config.process_timeout, mixed_precision=config.precision, kwargs_handlers=[uneven]
    )
    run.share(config.batch_size, accelerator.num_processes, "batch_size")
    samples, films, about = prepare(config, accelerator)
    rows = choose_rows(config, samples)
    check_batch(config, samples, rows, accelerator.num_processes)
    folder = run.open_run(
        config.out, config, sources=_sources(config), may_differ=["workers", "cache", "adds", *TRACKING]
    )
    run.needs(config.features, None if config.freeze else config.store)  # frozen features are kept
    if not run.complete(folder):
        _fuse(config, samples, films, rows, about, accelerator, folder)
    if config.adds:
        adds(config, folder, fuse, args, run.Log(folder, accelerator).say, accelerator.is_main_process)
    return folder


def _fuse(
    config: FuseConfig,
    samples: Samples,
    films: FilmBranch | None,
    rows: Rows,
    about: dict[str, Any],
    accelerator: Accelerator,
    folder: Path,
) -> None:
    """Train with each seed, predict, write."""
    log = run.open_log(folder, config, accelerator)
    outputs.announce(log, config, samples, rows, films, about)
    found: list[dict[str, Predictions]] = []
    several = len(config.every_seed) > 1
    for seed in config.every_seed:
        own = config.model_copy(update={"seed": seed})
        place = folder / f"seed_{seed}" if several else folder
        if kind_of(config.model) is RecordGBM:
            model: Callable[[Samples, NDArray[np.int64]], Predictions] = RecordGBM(samples, rows["train"], seed)
        else:
            net, trials = search(own, samples, films, rows, accelerator, log, place)
            model = partial(_say, net, own, accelerator)
            about["lr"] = [*about.get("lr", []), *trials]
            run.on_main(partial(outputs.save, place, net, samples, own))
        found.append({split: model(samples, rows[split]) for split in HELD_OUT})
        for name, changed in outputs.poorer(samples, films is not None, seed).items() if config.robustness else ():
            found[-1][name] = model(changed, rows["test"])
        if several:
            run.on_main(partial(outputs.write, place, samples, rows, [found[-1]], own, about))
    if accelerator.is_main_process:
        results = outputs.write(folder, samples, rows, found, config, about)
        log.track(headline(results), 0, "results")
        outputs.show(log, results, folder)
    log.close()
    run.finish(folder)


def read_by_model(config: FuseConfig) -> tuple[FuseConfig, list[str]]:
    """Remove settings that only film models use, so that any config of `fuse` works with a record-only model.

    Returns: the config; `key=value` of the removed settings.
    Raises: UserError: no such model, no films for a film model, or a setting that needs a film model.
    """
    if getattr(kind_of(config.model), "uses_film", True):
        if missing := " and ".join(key for key in ("store", "encoder") if getattr(config, key) is None):
            raise UserError(
                f"`{missing}` missing: model={config.model} looks at films; model=record_lstm needs neither"
            )
        return config, []
    for key, off in {"film_weights": None, "control": "none", "adds": False}.items():
        if (value := getattr(config, key)) != off:
            raise UserError(f"`{key}` {value}: model={config.model} looks at no film; choose a model of films")
    alone: dict[str, Any] = {"encoder": None, "weights": None, "freeze": True, "unfreeze_after": None}
    alone |= {"record_weights": None, "freeze_record": False}  # such a model produces these weights
    unused = [f"{key}={getattr(config, key)}" for key, value in alone.items() if getattr(config, key) != value]
    return config.model_copy(update=alone), unused


def choose_rows(config: FuseConfig, samples: Samples) -> Rows:
    """Row numbers of each split; with a model that needs a film, or pairing=paired, only rows with a film."""
    needs = "paired" if getattr(kind_of(config.model), "needs_film", False) else None
    given = {"train": None, "val": config.val_pairing, "test": config.test_pairing}
    rows = {split: samples.rows(split, needs or own or config.pairing) for split, own in given.items()}
    if config.unpaired_share < 1:
        film = samples.has_image[rows["train"]]
        without = rows["train"][~film]
        drawn = np.random.default_rng([config.seed, 0]).permutation(without)[
            : round(config.unpaired_share * len(without))
        ]
        rows["train"] = np.sort(np.concatenate([rows["train"][film], drawn]))
    return rows


def search(
    config: FuseConfig,
    samples: Samples,
    films: FilmBranch | None,
    rows: Rows,
    accelerator: Accelerator,
    log: run.Log,
    folder: Path,
) -> tuple[Net, list[dict[str, Any]]]:
    """Train with each lr of the search. Finished trials are not repeated.

    Returns: the net with the best validation score; and each trial's lr, seed, validation scores, and whether it was
        kept.
    """
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    if not config.lr_draws:
        net = build(config, samples, films)
        own_log = log if folder == log.folder else log.within(folder)
        value = train(net, samples, rows, config, accelerator, own_log, folder)
        return net, [_told(config, value) | {"kept": True}]
    low, high = np.log(config.lr_range)
    lrs = np.exp(np.random.default_rng([config.seed, 1]).uniform(low, high, config.lr_draws)).tolist()
    best: tuple[Scores, Net, int] | None = None
    trials = []
    for i, lr in enumerate(lrs):
        own = config.model_copy(update={"lr": lr})
        net, value = _trial(own, samples, films, rows, accelerator, log, folder / "search" / f"lr_{i}")
        log.say(f"  lr {lr:.2e}: validation AUROC {value.auroc:.3f}, loss {value.loss:.3f}")
        if value.better(best and best[0]):
            best = value, net, i
        trials.append(_told(own, value))
    assert best is not None, "there was a draw"
    return best[1], [trial | {"kept": i == best[2]} for i, trial in enumerate(trials)]


def _trial(
    config: FuseConfig,
    samples: Samples,
    films: FilmBranch | None,
    rows: Rows,
    accelerator: Accelerator,
    log: run.Log,
    folder: Path,
) -> tuple[Net, Scores]:
    """One training of a search, or its saved result."""
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    net, done = build(config, samples, films), folder / "trial.json"
    if done.is_file():
        path, told = folder / "net.safetensors", read_json(done, Trial)
        again = f"remove {folder}, and it is trained again"
        with undamaged(path, again):
            state = load_file(path)
        if faults := encoders.differences(net.state_dict(), state):
            raise UserError(f"{path}: not the weights of this model: {faults}; {again}")
        net.load_state_dict(state)
        return net, Scores(float("nan") if told["val_auroc"] is None else told["val_auroc"], told["val_loss"])
    value = train(net, samples, rows, config, accelerator, log.within(folder), folder)

    def keep() -> None:
        with new_file(folder / "net.safetensors") as part:
            save_file({key: weight.contiguous() for key, weight in weights_of(net).items()}, part)
        write_json(done, _told(config, value))

    run.on_main(keep)
    return net, value


def _told(config: FuseConfig, scores: Scores) -> dict[str, Any]:
    """A training in results.json."""
    auroc = None if np.isnan(scores.auroc) else scores.auroc
    return {"lr": config.lr, "seed": config.seed, "val_auroc": auroc, "val_loss": scores.loss}


def _say(
    net: Net, config: FuseConfig, accelerator: Accelerator, samples: Samples, rows: NDArray[np.int64]
) -> Predictions:
    return predict(net, samples, rows, config, accelerator)


def build(config: FuseConfig, samples: Samples, films: FilmBranch | None) -> Net:
    """A fresh net on a copy of the film branch, with the weights of stage one if the config names them."""
    torch.manual_seed(config.seed)
    given = {key: getattr(config, key) for key in ("hidden", "layers", "joint", "dropout", "missing")}
    sizes = Sizes(
        inputs=samples.num_inputs, film=0 if films is None else films.width, labels=len(samples.names), **given
    )
    sizes = replace(sizes, **_token_sizes(samples))
    if config.film_weights is not None:
        head = read_branch(config.film_weights, "film_only").get("head.weight", torch.zeros(0))
        sizes = replace(sizes, film_labels=len(head))
        if config.model in ("late", "film_only") and len(head) != sizes.labels:
            raise UserError(
                f"film_weights={config.film_weights}: its head has {len(head)} labels, {config.task} {sizes.labels}, "
                f"and model={config.model} predicts by it; train it on {config.task}, or leave film_weights out"
            )
    with weights_fit(_size_keys(config), TRAINED):
        model: Any = kind_of(config.model)(sizes)
    net = Net(copy.deepcopy(films), model)
    if config.record_weights is not None:
        load_branch(model.record, config.record_weights, "record_lstm")
    if config.film_weights is not None:
        load_branch(getattr(model, "film", model), config.film_weights, "film_only")
    if config.freeze_record:
        model.record.requires_grad_(False)
    return net


def check_size(config: FuseConfig) -> None:
    """Refuse, before any work, a model that this machine's memory cannot train even with one input and one label."""
    given = {key: getattr(config, key) for key in ("hidden", "layers", "joint", "dropout", "missing")}
    least = Sizes(inputs=1, film=1, labels=1, **given)
    tried_on_meta(lambda: kind_of(config.model)(least), _size_keys(config), TRAINED)


def check_batch(config: FuseConfig, samples: Samples, rows: Rows, processes: int) -> None:
    """Refuse, before any training, a batch whose hours and states of the LSTM this machine's memory cannot hold."""
    size = min(config.batch_size, max(map(len, rows.values()), default=0))
    hours = int(np.sort(samples.length[rows["train"]])[-size:].sum()) if size else 0  # of the longest, unpadded
    check_memory(
        4 * hours * (samples.num_inputs + 8 * config.hidden * config.layers) / processes,
        f"batch_size {config.batch_size}: a step of {size:,} samples, {hours:,} hours of records",
        "lower it, or hidden, or max_hours",
    )


def _size_keys(config: FuseConfig) -> str:
    return f"model={config.model}, hidden={config.hidden}, layers={config.layers}, joint={config.joint}"


def _token_sizes(samples: Samples) -> dict[str, Any]:
    """Fields of `Sizes` for notes, and for models over tokens the film's width."""
    text = {} if samples.text is None else {"text": samples.text.shape[1]}
    if samples.note_tokens is not None:
        text["text"] = samples.note_tokens.width
    film = samples.film_tokens
    return text if film is None else {**text, "film": film.width, "places": int(film.length[0])}


def _sources(config: FuseConfig) -> list[Path]:
    """Files whose content identifies a run's input."""
    if config.features is None:
        return own_samples.sources(config)
    names: list[Any] = ["provenance.json", *sorted(p.name for p in Path(config.features).glob("samples/*.parquet"))]
    return [Path(config.features) / (name if name == "provenance.json" else f"samples/{name}") for name in names]
