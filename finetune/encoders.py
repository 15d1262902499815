"""Open the encoder that a config names, and compute frozen features of films, cached under the hashes of their inputs.

Input: an encoder's name (encoder/, a run, a published encoder, `random:...`, `pixels`), a store, film ids. Output: the
encoder; (N, D) per pool.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file
from torch import Tensor

from configs import UserError
from configs.amounts import check_memory
from configs.signals import held
from ehr_features.files import digest, new_file
from ehr_features.progress import Bar
from finetune.config import WEIGHTS
from pretrain import encoder as encoders
from pretrain.encoder.embed import check_finite
from pretrain.encoder.hub import card_note
from pretrain.encoder.model import STAGES, encoder_folder
from pretrain.encoder.preprocess import NO_STORE, Preprocess
from pretrain.encoder.sources import Source, find
from pretrain.encoder.transformers_config import IMAGENET
from pretrain.encoder.weights import load_weights
from pretrain.run.cache import complete, header

if TYPE_CHECKING:
    from finetune.config import WeightsConfig
    from pretrain.encoder import Encoder
    from pretrain.store import Store

Features = dict[str, NDArray[np.float32]]  # pool -> (N, D)


@dataclass(frozen=True)
class Frozen:
    """A frozen function from films to features.

    Attributes:
        name: for tables: the folder, `pixels`, `random:...`.
        key: changes with anything that the features depend on.
        encode: uint8 (B, S, S) -> {pool: (B, D)}.
        encoder: None for `pixels`.
        folder: encoder/ or the weights file that the leak check examines; None without pretraining.
        about: parameters, input size, films seen: columns of every row of a comparison.
        said: for the log: how weights were converted, or what an older encoder.json lacks.
        card: what a model card lists of the training films, for the leak check.
        pools: what `encode` computes; (): every pool of the encoder but `stages`.
    """

    name: str
    key: str
    encode: Callable[[NDArray[np.uint8]], Features]
    encoder: Encoder | None = None
    folder: Path | None = None
    about: Mapping[str, Any] = field(default_factory=dict)
    said: str = ""
    card: str = ""
    pools: tuple[str, ...] = ()


def open_encoder(
    spec: str,
    *,
    seed: int = 0,
    pixels: int = 16,
    device: str | torch.device = "cpu",
    weights: WeightsConfig | None = None,
    pools: Sequence[str | None] = (),
) -> Frozen:
    """The encoder that a config names, in eval mode.

    Args:
        spec: an encoder/ folder, a run with one, a weights file, a published encoder (pretrain.encoder.sources),
            `random:ARCH`, `random:FOLDER` (that one, new weights), or `pixels`.
        seed: of random weights.
        pixels: side of the raw-pixel baseline.
        weights: what a bare weights file, or `random:ARCH`, is; of a published encoder, another size or statistics.
        pools: wanted of its features; `stages` is computed only where it is among them.
    Raises: UserError: no such encoder.
    """
    if spec == "pixels":
        return _pixels(pixels, pools)
    rest, said, card, folder = spec.removeprefix("random:"), "", "", None
    if rest != spec:
        encoder = _random(rest, seed, weights)
    elif (weights is None or weights.arch is None) and (source := find(spec)) is not None:
        encoder, said = _published(source, weights)
        folder, card = source.file, source.card
    elif not Path(spec).is_dir() and spec.endswith(WEIGHTS):
        if weights is None or weights.arch is None:
            raise UserError(
                f"{spec}: a bare weights file; say what it is: weights.arch=..., weights.image_size=...; or put its "
                "config.json (timm's or Hugging Face's) beside it"
            )
        folder, encoder, card = Path(spec), _described(weights), card_note(spec, spec)
        said = load_weights(encoder, spec, encoder.heads, "weights")
    else:
        folder, encoder = encoder_folder(spec), encoders.load(spec)
        said = f"{spec}: {NO_STORE}" if encoder.preprocess.store is None else ""
    size, patch = encoder.meta["image_size"], encoder.patch
    if encoder.is_vit and size % patch:
        near = max(1, round(size / patch)) * patch
        raise UserError(f"{spec}: weights.image_size {size} is not whole patches of {patch} px; e.g. {near}")
    encoder.name = spec
    encoder = encoder.to(device).eval()

    @torch.inference_mode()
    def encode(films: NDArray[np.uint8]) -> Features:
        x = encoder.preprocess(films).to(device)
        found = {STAGES: encoder.stages(x)} if stages else {}
        if not only:
            features = encoder.features(x)
            found |= {pool: encoder.pool(features, pool) for pool in encoder.pools if pool != "max"}
        return {pool: value.float().cpu().numpy() for pool, value in found.items()}

    stages, only = STAGES in pools, set(pools) == {STAGES}
    about, computed = _describe(encoder, spec, folder), (STAGES, *(() if only else encoder.pools)) if stages else ()
    return Frozen(spec, str(about["hash"]), encode, encoder, folder, about, said, card, computed)


def _pixels(side: int, pools: Sequence[str | None] = ()) -> Frozen:
    """The baseline without an encoder: the film as `side` x `side` means, the same whichever pool is asked for."""
    name = "avg" if set(pools) != {STAGES} else STAGES

    def shrink(films: NDArray[np.uint8]) -> Features:
        small = torch.nn.functional.adaptive_avg_pool2d(torch.from_numpy(films)[:, None].float() / 255, side)
        return {name: small.flatten(1).numpy()}

    key = f"pixels{side}"
    about = {"hash": key, "parameters": 0, "image_size": side, "films_seen": 0, "weights": "none"}
    return Frozen(f"pixels {side}x{side}", key, shrink, about=about, pools=() if name == "avg" else (name,))


def _random(rest: str, seed: int, weights: WeightsConfig | None) -> Encoder:
    """Random weights of an architecture, as `weights` describes it if given, or of the one in a folder."""
    if weights is not None and weights.arch is not None and rest != weights.arch:
        raise UserError(f"encoder=random:{rest} and weights.arch={weights.arch} differ; give one architecture")
    folder = encoder_folder(rest)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if weights is not None:
            return _described(weights.model_copy(update={"arch": rest}))
        if not folder.is_dir():
            return encoders.create(rest, in_chans=1)
        meta = encoders.read_meta(folder)
        keys = ("in_chans", "image_size", "model_args", "pool")
        preprocess = Preprocess.from_json(meta["preprocess"], meta["in_chans"], f"{folder}/encoder.json")
        return encoders.create(meta["arch"], preprocess=preprocess, **{key: meta[key] for key in keys})


def _described(config: WeightsConfig) -> Encoder:
    """`config.arch` with random weights."""
    assert config.arch is not None
    size = config.image_size or 224
    mean, std = (0.449, 0.226) if config.in_chans == 1 else IMAGENET
    preprocess = Preprocess(size, "dataset", mean, std, config.in_chans)
    return encoders.create(
        config.arch,
        in_chans=config.in_chans,
        image_size=size,
        model_args=dict(config.model_args),
        preprocess=_statistics(preprocess, config),
    )


def _published(source: Source, config: WeightsConfig | None) -> tuple[Encoder, str]:
    """A published encoder, at another film size or with other input statistics if the config has them."""
    if config is None:
        return source.open()
    if config.model_args:
        raise UserError(f"{source.spec}: weights.model_args={config.model_args}: its own config describes the network")
    encoder, said = source.open(config.image_size)
    encoder.preprocess = _statistics(encoder.preprocess, config)
    return encoder, said


def _statistics(preprocess: Preprocess, config: WeightsConfig) -> Preprocess:
    """With the mean and deviation of the config, if it has them."""
    mean, std = (
        tuple(given) if isinstance(given, list) else before if given is None else given
        for given, before in ((config.mean, preprocess.mean), (config.std, preprocess.std))
    )
    return replace(preprocess, mean=mean, std=std)


def _describe(encoder: Encoder, spec: str, folder: Path | None) -> dict[str, Any]:
    """What every row of a comparison carries: parameters, input size, films, time and method of pretraining, `hash`.

    `films_seen` counts films once, `films_trained` at each step.
    """
    step, origin = encoder.meta.get("step"), "random, timm's initialisation"
    if folder is not None:
        origin = spec if step is None or folder.is_file() else f"step {step}"
    state = {name: _hash(value) for name, value in encoder.net.state_dict().items()}
    return {
        "hash": digest([state, encoder.meta["arch"], encoder.meta["model_args"], encoder.preprocess.to_json()]),
        "parameters": sum(p.numel() for p in encoder.net.parameters()),
        "image_size": encoder.meta["image_size"],
        "step": step,
        "arch": encoder.meta["arch"],
        "films_seen": 0 if folder is None else encoder.meta.get("num_films"),  # None: unknown
        "films_trained": 0 if folder is None else encoder.meta.get("films_trained"),
        "processor_seconds": 0 if folder is None else encoder.meta.get("processor_seconds"),
        "weights": origin,
        "method": None if folder is None else encoder.meta.get("method"),
        "record": [] if folder is None else sorted(encoder.meta.get("ehr_groups") or {}),
        "record_use": None if folder is None else (encoder.meta.get("ehr") or {}).get("use"),
        "permuted": None if folder is None else (encoder.meta.get("ehr") or {}).get("permuted"),
    }


def _hash(value: Tensor) -> str:
    """A few hex digits of a tensor's content."""
    return hashlib.sha256(value.detach().cpu().contiguous().numpy().tobytes()).hexdigest()[:16]


def to_be_tuned(frozen: Frozen, store: Store) -> Encoder:
    """The encoder, prepared for training on films of this store: its encoder.json describes the store's
    preprocessing."""
    encoder = frozen.encoder
    assert encoder is not None, "checked by the config"
    if encoder.preprocess.store is None:
        encoder.preprocess = replace(encoder.preprocess, store=store.square)
    return encoder


def store_warnings(frozen: Frozen, store: Store) -> list[str]:
    """Warnings for the results if the encoder was not made for the store's films."""
    if frozen.encoder is None:
        return []
    size, theirs = frozen.encoder.meta["image_size"], frozen.encoder.preprocess.store
    found = []
    if store.size < size:
        found.append(
            f"{store.folder}: its films are {store.size} px and are enlarged to the {size} px of {frozen.name}, which "
            f"adds nothing; pack them with size={size} or more"
        )
    if theirs is not None and theirs != store.square:
        ours, here = theirs.to_json(), store.square.to_json()
        odd = ", ".join(f"{key} {here[key]} there {ours[key]}" for key in ours if ours[key] != here[key])
        found.append(f"{store.folder}: films were packed otherwise than those of {frozen.name}'s pretraining: {odd}")
    return found


# ---- Frozen features of films, kept in files of PART films, each under its encoder, its store and its films


PART = 2048  # films in a file; what a stopped process loses
AHEAD = 4  # batches that threads read while one is encoded


def film_features(
    frozen: Frozen, store: Store, films: Sequence[str], *, cache: Path | None = None, batch_size: int = 128
) -> Features:
    """Features of films, read from `cache` if they were computed before, for these films or among others.

    All processes of a run call it: each encodes a share of the files that are missing. A film in a batch with others
    may differ in its last digits.

    Args:
        films: M dicom_ids, all in the store.
    Returns: pool -> (M, D) float32, rows as `films`.
    """
    wanted, what = sorted(set(films)), f"features of {frozen.name}"
    if frozen.encoder is None:
        side = frozen.about["image_size"]
        said = f"pixels {side}: {len(films):,} films of {side} x {side} numbers"
        check_memory(4 * len(films) * side**2, said, "lower it")
    if cache is None:
        with Bar(what, len(wanted), "films") as bar:
            made = _encoded(frozen, store, wanted, batch_size, bar)
        return _gathered(films, {film: (None, row) for row, film in enumerate(wanted)}, lambda _: made)

    def make(part: list[str], path: Path, bar: Bar) -> None:
        found = _encoded(frozen, store, part, batch_size, bar)
        with new_file(path) as file:
            save_file(found, file, metadata=header(part))

    start = f"films_{digest([frozen.key, store.hash, *frozen.pools])}"
    return _gathered(films, complete(cache, start, wanted, PART, make, what, "films", _finite), load_file)


def _encoded(frozen: Frozen, store: Store, films: Sequence[str], batch_size: int, bar: Bar) -> Features:
    """pool -> (n, D) of these films."""
    out: list[Features] = []
    for batch, pixels in read_ahead(store, films, batch_size):
        out.append(frozen.encode(pixels))
        for value in out[-1].values():
            check_finite(torch.from_numpy(value), frozen.name, batch)
        bar.advance(len(batch))
    return {pool: np.concatenate([part[pool] for part in out]).astype(np.float32) for pool in out[0]}


def read_ahead(
    store: Store, films: Sequence[str], batch_size: int
) -> Iterator[tuple[Sequence[str], NDArray[np.uint8]]]:
    """Batches of films and their pixels (B, S, S); threads read the next ones, without Python's lock."""
    batches = [films[start : start + batch_size] for start in range(0, len(films), batch_size)]
    with ThreadPoolExecutor(AHEAD) as readers:
        with held():  # while the threads start
            coming = deque(readers.submit(store.read, batch) for batch in batches[:AHEAD])
        for number, batch in enumerate(batches):
            pixels = coming.popleft().result()
            coming.extend(readers.submit(store.read, later) for later in batches[number + AHEAD : number + AHEAD + 1])
            yield batch, pixels


def _gathered(films: Sequence[str], places: Mapping[str, tuple[Any, int]], read: Callable[[Any], Features]) -> Features:
    """pool -> (M, D) from (file, row) of each film; each file is read once."""
    rows: dict[Any, list[tuple[int, int]]] = {}
    for i, film in enumerate(films):
        rows.setdefault(places[film][0], []).append((i, places[film][1]))
    out: Features = {}
    for place, pairs in rows.items():
        to, of = np.array(pairs, np.intp).T
        for pool, value in read(place).items():
            if pool not in out:
                out[pool] = np.empty((len(films), value.shape[1]), np.float32)
            out[pool][to] = value[of]
    return out


def _finite(path: Path) -> bool:
    return all(np.isfinite(value).all() for value in load_file(path).values())


def pooled(encoder: Encoder, films: Tensor | NDArray[np.uint8], pool: str | None) -> Tensor:
    """Films uint8 (P, S, S) -> features (P, D), or (P, 2 D) for pool `both`."""
    x = encoder.preprocess(films).to(next(encoder.parameters()).device)
    if pool == STAGES:
        return encoder.stages(x)
    features = encoder.features(x)
    if pool == "both":
        return torch.cat([encoder.pool(features, name) for name in sorted(encoder.pools) if name != "max"], dim=1)
    return encoder.pool(features, pool or ("cls" if "cls" in encoder.pools else "avg"))
