"""Open encoders that others published: a folder or a hub's repository with its config, or a layout known by name.

Input: a specification, `hf-hub:ORG/NAME[@REVISION]`, `timm:NAME`, `rad-dino[:PATH]`, `chexfound:PATH`,
`torchxrayvision:PATH`, or a folder with config.json (timm's, or Hugging Face's of a ViT, ViTMSN, DINOv2 or DINOv3) and
its weights. Output: an Encoder in eval mode with the owner's input statistics, or an encoder of a config that starts
from these weights. What a model card lists is given to the check of seen subjects.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from configs import UserError
from pretrain.encoder import model as own
from pretrain.encoder.hub import RAD_DINO, WEIGHTS, card_note, fetch, read_config
from pretrain.encoder.model import Encoder, create, encoder_folder
from pretrain.encoder.preprocess import Preprocess
from pretrain.encoder.transformers_config import IMAGENET, READERS, mlp_ratio, statistics
from pretrain.encoder.weights import copy_state, load_weights, read_tensors, state_for

NAMED = ("hf-hub", "timm", "rad-dino", "chexfound", "torchxrayvision")


@dataclass(frozen=True)
class Source:
    """Published weights, and how their owner builds the network.

    Args:
        spec: as the user named it. file: the weights. layout: for the log.
        arch, args: for timm; mean, std: of pixels in [0, 1], per channel.
        pool: the owner's pooled feature; None: timm's own.
        norm_eps: of all layer norms; None: timm's.
        antialias: how positions are resampled to other film sizes.
        card: what is known of the training films, a part of a sentence; empty if nothing.
    """

    spec: str
    file: Path
    layout: str
    arch: str
    args: dict[str, Any] = field(default_factory=dict)
    in_chans: int = 3
    image_size: int = 224
    mean: tuple[float, ...] = IMAGENET[0]
    std: tuple[float, ...] = IMAGENET[1]
    pool: str | None = None
    norm_eps: float | None = None
    antialias: bool = True
    card: str = ""

    def open(self, image_size: int | None = None) -> tuple[Encoder, str]:
        """The encoder in eval mode, and what was loaded."""
        size = image_size or self.image_size
        preprocess = Preprocess(size, "dataset", self.mean, self.std, self.in_chans)
        with torch.random.fork_rng(devices=[]):
            encoder = create(
                self.arch,
                in_chans=self.in_chans,
                image_size=size,
                model_args=dict(self.args),
                preprocess=preprocess,
                pool=self.pool,
                norm_eps=self.norm_eps,
            )
        encoder.name = self.spec
        return encoder.eval(), self.fill(encoder)

    def fill(self, encoder: Encoder) -> str:
        """Copy the weights into an encoder of the same network; what was done, for the log. Raises: UserError."""
        state, left_out, _ = state_for(encoder.net, read_tensors(self.file), self.file)
        source = f"{self.spec} ({self.layout}, {self.file.name})"
        return copy_state(
            encoder, state, str(self.file), source, left_out=left_out, section="weights", antialias=self.antialias
        )


def load(spec: str | Path) -> Encoder:
    """Load an encoder in eval mode, on the CPU: encoder/, a run that has one, or a published one (`find`).

    Raises: UserError: no encoder found, damaged, or of an architecture that is not read.
    """
    source = find(spec)
    return own.load(spec) if source is None else source.open()[0]


def start_from(encoder: Encoder, spec: str, heads: int | None = None) -> str:
    """Fill a config's encoder with the weights named by `encoder.init`; what was done, for the log.

    Raises: UserError: no such weights, or of another network.
    """
    source = find(spec)
    if source is None:
        return load_weights(encoder, spec, heads)
    with torch.random.fork_rng(devices=[]):
        size = encoder.meta["image_size"]
        theirs = create(source.arch, in_chans=source.in_chans, image_size=size, model_args=dict(source.args))
    if faults := _other_network(encoder, theirs):
        raise UserError(
            f"encoder.init={spec}: another network ({faults}); set encoder.arch={source.arch}"
            + (f" 'encoder.model_args={json.dumps(source.args)}'" if source.args else "")
        )
    if source.norm_eps is not None:
        encoder.set_norm_eps(source.norm_eps)
    said = source.fill(encoder)
    mean, std = (", ".join(f"{x:g}" for x in dict.fromkeys(values)) for values in (source.mean, source.std))
    return f"{said}; its own input statistics are mean {mean}, std {std}; here views.normalise applies"


def _other_network(mine: Encoder, theirs: Encoder) -> str:
    """Differences of two networks that tensors' shapes may not show; empty if there are none."""
    found = []
    for what, of in (
        ("family", lambda e: type(e.net).__name__),
        ("attention heads", lambda e: e.heads),
        ("layers", lambda e: [type(m).__name__ for m in e.net.modules()]),
        ("rotary positions", lambda e: _plain_values(getattr(e.net, "rope", None))),
    ):
        a, b = of(mine), of(theirs)
        if a != b:
            found.append(what if isinstance(a, (list, dict)) else f"{what} {b} there, {a} in this config")
    return "; ".join(found)


def _plain_values(module: nn.Module | None) -> dict[str, Any]:
    """Numbers and words among a module's attributes, apart from sizes that follow the film's."""
    if module is None:
        return {}
    return {
        key: value
        for key, value in vars(module).items()
        if isinstance(value, (int, float, str, bool)) and key not in ("training",) and "shape" not in key
    }


# ---- Which encoder a specification names.


def find(spec: str | Path) -> Source | None:
    """The published encoder that `spec` names; None for encoder/, a run, or a bare file.

    Raises: UserError: it is not here and cannot be fetched, or it is of a layout that is not read.
    """
    text = str(spec)
    scheme, colon, rest = text.partition(":")
    if text == "rad-dino":
        scheme, colon, rest = "hf-hub", ":", RAD_DINO
    if scheme not in NAMED or not colon or Path(text).exists():
        return _in_folder(text, Path(text))
    if not rest:
        raise UserError(f"{text}: no name follows; e.g. hf-hub:ORG/NAME, timm:NAME, rad-dino:PATH, chexfound:PATH")
    if scheme == "hf-hub":
        return _described(text, fetch(text, rest))
    if scheme == "timm":
        return _of_timm(text, rest)
    if not Path(rest).exists():
        raise UserError(f"{text}: {rest} does not exist; give the path of the published file or its folder")
    if scheme == "chexfound":
        return _chexfound(text, Path(rest))
    if scheme == "torchxrayvision":
        return _torchxrayvision(text, Path(rest))
    return _rad_dino(text, Path(rest))


def _in_folder(spec: str, path: Path) -> Source | None:
    """A folder with config.json, or a weights file beside one."""
    folder = path if path.is_dir() else path.parent
    ours = encoder_folder(folder)
    if any((ours / name).is_file() for name in ("encoder.json", "encoder.safetensors")):  # the second: a broken one
        return None
    if not (folder / "config.json").is_file():
        return None
    if path.is_dir():
        return _described(spec, folder)
    return _described(spec, folder, path) if path.is_file() else None


def _described(spec: str, folder: Path, file: Path | None = None) -> Source:
    """A folder with config.json of timm or of Hugging Face. Raises: UserError: damaged, or not of these."""
    config = read_config(folder / "config.json")
    file = file or _weights(folder)
    if isinstance(config.get("architecture"), str):
        source = _timm_config(spec, file, config)
    elif config.get("model_type") in READERS:
        source = _hugging_face(spec, file, config, folder)
    else:
        raise UserError(
            f"{folder}/config.json: model_type {config.get('model_type')!r} is not read; wanted one of "
            f"{', '.join(READERS)}, or timm's config.json with `architecture`"
        )
    return dataclasses.replace(source, card=card_note(folder, spec))


def _weights(folder: Path) -> Path:
    for name in WEIGHTS:
        if (folder / name).is_file():
            return folder / name
    raise UserError(f"{folder}: config.json has no weights beside it; wanted {' or '.join(WEIGHTS)}")


# ---- timm's layout.


def _timm_config(spec: str, file: Path, config: dict[str, Any]) -> Source:
    """As timm's `local-dir:` and `hf-hub:` read it."""
    nested = config.get("pretrained_cfg")
    cfg: dict[str, Any] = nested if isinstance(nested, dict) else config
    args = dict(config.get("model_args") or {})
    for fixed in ("num_classes", "in_chans", "pretrained"):
        args.pop(fixed, None)
    return _from_cfg(spec, file, config["architecture"], args, cfg)


def _from_cfg(spec: str, file: Path, arch: str, args: dict[str, Any], cfg: dict[str, Any]) -> Source:
    """A network by timm's pretrained_cfg: input size, channels, mean and deviation."""
    try:
        in_chans, height, width = (int(n) for n in cfg.get("input_size") or (3, 224, 224))
        mean, std = (tuple(float(x) for x in cfg.get(key) or IMAGENET[i]) for i, key in enumerate(("mean", "std")))
    except (TypeError, ValueError):
        raise UserError(
            f"{spec}: input_size, mean or std in its config is not numbers; copy config.json again"
        ) from None
    if in_chans not in (1, 3) or height != width:
        raise UserError(f"{spec}: input of {in_chans} x {height} x {width}; wanted square films of 1 or 3 channels")
    if args.get("img_size") is not None:
        size = args.pop("img_size")
        height = size[0] if isinstance(size, (list, tuple)) else int(size)
    return Source(spec, file, "timm", arch, args, in_chans, height, mean, std)


def _of_timm(spec: str, name: str) -> Source:
    """A pretrained model of timm's own list."""
    try:
        cfg = timm.get_pretrained_cfg(name)
    except (RuntimeError, KeyError, ValueError):
        cfg = None
    if cfg is None or not timm.is_model(name):
        raise UserError(f"{spec}: timm lists no such model; `timm.list_pretrained('*{name[:12]}*')` prints its names")
    if not cfg.hf_hub_id:
        where = cfg.url or "no address"
        raise UserError(
            f"{spec}: timm names no hub repository for it ({where}); give that file: encoder=FILE weights.arch"
        )
    repo = cfg.hf_hub_id + name if cfg.hf_hub_id.endswith("/") else cfg.hf_hub_id
    wanted = (cfg.hf_hub_filename,) if cfg.hf_hub_filename else WEIGHTS
    folder = fetch(spec, repo, wanted, config=False)
    file = next(folder / one for one in wanted if (folder / one).is_file())
    source = _from_cfg(spec, file, name, {}, cfg.to_dict())
    return dataclasses.replace(source, card=card_note(folder, spec))


def _hugging_face(spec: str, file: Path, config: dict[str, Any], folder: Path) -> Source:
    """A network of transformers by its config.json, with the input statistics of preprocessor_config.json."""
    kind = config["model_type"]
    where = f"{folder}/config.json"
    config = READERS[kind].default | config
    args = {
        "patch_size": config["patch_size"],
        "embed_dim": config["hidden_size"],
        "depth": config["num_hidden_layers"],
        "num_heads": config["num_attention_heads"],
    }
    size = config["image_size"]
    for key, value in {**args, "image_size": size, "num_channels": config["num_channels"]}.items():
        if not isinstance(value, int) or value < 1:
            raise UserError(f"{where}: {key} is {value!r}; wanted a number, for square films and patches")
    arch, more = READERS[kind].arch(config, where)
    mean, std = statistics(folder, config["num_channels"], READERS[kind].mean, READERS[kind].std)
    return Source(
        spec,
        file,
        f"Hugging Face's {kind}",
        arch,
        args | more,
        config["num_channels"],
        size,
        mean,
        std,
        pool="cls",
        norm_eps=config["layer_norm_eps"],
        antialias=False,
    )


# ---- Layouts known by name.


def _rad_dino(spec: str, path: Path) -> Source:
    """RAD-DINO's repository as a folder, or its model.safetensors beside config.json."""
    source = _in_folder(spec, path)
    if source is None:
        raise UserError(
            f"{spec}: wanted the folder of {RAD_DINO} with config.json, preprocessor_config.json and model.safetensors"
        )
    if not (source.file.parent / "preprocessor_config.json").is_file():
        raise UserError(f"{spec}: preprocessor_config.json is missing; it holds the mean and deviation of the input")
    return source


def _chexfound(spec: str, path: Path) -> Source:
    """teacher_checkpoint.pth: DINOv2's code, ViT-L with patches of 16, gated blocks and 4 registers, films of 512 px.

    Sizes are read from the tensors, with 64 channels per head.
    """
    file = path / "teacher_checkpoint.pth" if path.is_dir() else path
    tensors = read_tensors(file)
    found = {key.rpartition("backbone.")[2]: value for key, value in tensors.items()}
    try:
        width, patch = found["patch_embed.proj.weight"].shape[0], found["patch_embed.proj.weight"].shape[-1]
        side = round((found["pos_embed"].shape[1] - 1) ** 0.5)
        hidden = next(value.shape[0] for key, value in found.items() if key.endswith("mlp.w12.weight"))
    except (KeyError, StopIteration, IndexError):
        raise UserError(
            f"{file}: not CheXFound's layout (wanted backbone.patch_embed, pos_embed and gated blocks mlp.w12 under "
            "`teacher`); for other DINOv2 checkpoints give encoder=FILE weights.arch=NAME"
        ) from None
    args = {
        "patch_size": patch,
        "embed_dim": width,
        "depth": sum(key.endswith("norm1.weight") for key in found),
        "num_heads": max(1, width // 64),
        "mlp_ratio": mlp_ratio(hidden, width),
        "reg_tokens": found["register_tokens"].shape[1] if "register_tokens" in found else 0,
    }
    return Source(
        spec,
        file,
        "CheXFound",
        "vit_giant_patch14_reg4_dinov2",
        args,
        image_size=side * patch,
        pool="cls",
        norm_eps=1e-6,
        card=card_note(file.parent, spec),
    )


def _torchxrayvision(spec: str, path: Path) -> Source:
    """A DenseNet-121 (224 px) or ResNet (512 px) of torchxrayvision: one channel, pixels in [-1024, 1024]."""
    if path.is_dir():
        raise UserError(f"{spec}: wanted a weights file of torchxrayvision, got a folder")
    tensors = read_tensors(path)
    size, layout = 512, "resnet50"
    if any(key.endswith("features.conv0.weight") for key in tensors):
        size, layout = 224, "densenet121"
    elif any("layer3.22." in key for key in tensors):
        layout = "resnet101"
    return Source(
        spec,
        path,
        "torchxrayvision",
        layout,
        in_chans=1,
        image_size=size,
        mean=(0.5,),
        std=(1 / 2048,),
        card=card_note(path, spec),
    )
