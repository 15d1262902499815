"""What the commands of pretrain/ read from their YAML files. Imports no torch, so that `--help` is quick."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from configs import Settings
from ehr_features.config import Storage
from ehr_features.schema import Split

# Collapse, as a run and its report tell it: effective rank of the features, share of the prototypes in use.
RANK_FLOOR, PROTOTYPES_FLOOR = 4.0, 0.1


class ImagesConfig(Settings):
    """Films -> store/: one of `mimic_cxr` and `films`; a reason stands beside each setting."""

    mimic_cxr: str | None = None  # a MIMIC-CXR-JPG (or MIMIC-CXR) folder: its metadata table says which films there are
    films: str | None = (
        None  # instead: a folder of films, or a list of them (.txt; .csv or .parquet with a column path)
    )
    out: str  # the store/ to write
    size: int = Field(256, ge=16, le=4096)  # side of the stored square; films are resized to fit, then padded
    views: Literal["frontal", "all"] = "frontal"  # frontal: AP and PA, by the metadata table
    per_subject_cap: int | None = Field(None, ge=1)  # at most so many films a subject, drawn by `seed`
    encoding: Literal["raw", "jpeg"] = "raw"  # raw reads without a copy; jpeg takes about a tenth of the disk
    dicom: Literal["mimic-jpg", "window"] = "mimic-jpg"  # as MIMIC-CXR-JPG was made, or the file's own grey window
    workers: int | None = Field(None, ge=1, le=256)  # processes that decode; None: one a core
    seed: int = 0  # of per_subject_cap
    storage: Storage = {}  # of URLs: protocol -> options of its file system, e.g. {gs: {requester_pays: my-project}}

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.mimic_cxr is None) == (self.films is None):
            raise ValueError("wanted one of `mimic_cxr` (a MIMIC-CXR-JPG folder) and `films` (a folder or a list)")
        if self.films is not None and self.per_subject_cap is not None:
            raise ValueError("`per_subject_cap` needs subjects: it goes with `mimic_cxr`, not with `films`")
        return self


class EncoderConfig(Settings):
    """Which network."""

    arch: str = "vit_tiny_patch16_224"  # a timm name: vit_*, deit_*, densenet*, resnet*
    image_size: int = Field(default=224, ge=16)  # side of target and random views, and of films at evaluation
    in_chans: Literal[1, 3] = 1  # films are gray: 1; 3 repeats them, for weights that were trained on colour
    model_args: dict[str, Any] = {}  # passed to timm, e.g. {depth: 4, embed_dim: 96, num_heads: 3}
    positions: Literal["timm", "sincos"] = "sincos"  # initial positions of a ViT; trained either way
    pool: str | None = None  # what encoder.json asks for at evaluation; None: cls of a ViT, avg of a map
    init: str | None = None  # weights to start from: encoder/, a .safetensors or a .pth of timm or torchvision
    init_heads: int | None = None  # attention heads of a bare ViT file: its tensors do not tell


class EhrConfig(Settings):
    """What the anchor is told of the record. `groups: []` is vanilla MSN."""

    groups: list[str] = []  # names of ehr_features.static; `text`: the film's note, as a vector
    notes: str | None = None  # with `text`: a folder that python -m ehr_features notes wrote
    text_encoder: str | None = None  # with `text`: a Hugging Face or sentence-transformers folder
    preset: Literal["default", "msn"] = "default"  # columns: ours, or those of the published sets
    inject: Literal["add", "concat"] = "add"  # add: h + W e, W = 0 at the start; concat: g([h; f(e)])
    width: int = Field(default=128, ge=1)  # of f(e) with `concat`
    dropout: float = Field(default=0.0, ge=0, lt=1)  # probability that a group is blanked for a film in an epoch
    use: Literal["condition", "predict"] = "condition"  # control: the record as a target of the anchor's features
    predict_weight: float = Field(default=1.0, ge=0)  # of that target in the loss
    permuted: bool = False  # control: each film gets the record of another

    @model_validator(mode="after")
    def _text(self) -> Self:
        wanted, given = "text" in self.groups, [self.notes is not None, self.text_encoder is not None]
        if wanted and not all(given):
            raise ValueError("the group `text` needs ehr.notes (a folder of notes) and ehr.text_encoder (its reader)")
        if any(given) and not wanted:
            raise ValueError("ehr.notes and ehr.text_encoder go with the group `text`; add it to ehr.groups")
        return self


class ViewsConfig(Settings):
    """How views are cut. Shares are of the film's area."""

    num_random: int = Field(default=1, ge=0)  # masked anchors of image_size
    num_focal: int = Field(default=10, ge=0)  # small unmasked anchors
    focal_size: int = Field(default=96, ge=8)
    target_scale: tuple[float, float] = (0.3, 1.0)
    random_scale: tuple[float, float] = (0.3, 1.0)
    focal_scale: tuple[float, float] = (0.05, 0.3)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)  # range of width / height; 1, 1 keeps the heart's shape
    flip: float = Field(default=0.0, ge=0, le=1)  # the heart is on the left
    brightness: float = Field(default=0.2, ge=0, lt=1)
    contrast: float = Field(default=0.2, ge=0, lt=1)
    gamma: float = Field(default=0.0, ge=0, lt=1)
    normalise: Literal["crop", "film", "dataset"] = "crop"  # crop: exposure differs between films and machines
    mean: float = 0.5  # of pixels in [0, 1], for `dataset`
    std: float = Field(default=0.25, gt=0)

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if self.num_random + self.num_focal == 0:
            raise ValueError("num_random and num_focal are both 0: there is no anchor to train")
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise ValueError(f"ratio must be 0 < low <= high, got {self.ratio[0]}, {self.ratio[1]}")
        for name in ("target_scale", "random_scale", "focal_scale"):
            low, high = getattr(self, name)
            if not 0 < low <= high <= 1:
                raise ValueError(f"{name} must be 0 < low <= high <= 1, got {low}, {high}")
        return self


class MaskConfig(Settings):
    """What anchors do not see."""

    ratio: float = Field(default=0.15, ge=0, lt=1)  # share of patches (ViT) or cells (convolutional) removed
    focal: bool = False  # mask focal views too; the original MSN does not
    cell: int = Field(default=32, ge=4)  # convolutional networks: pixels of a masked cell's side
    fill: Literal["noise", "mean", "film"] = "noise"  # convolutional networks: what stands in a masked cell


class LossConfig(Settings):
    """pretrain/loss.py."""

    # more than the films of a batch are fine; far more than clusters are not
    prototypes: int = Field(default=1024, ge=2, le=1_000_000)
    temperature: float = Field(default=0.1, gt=0)
    target_temperature: float = Field(default=0.25, gt=0, le=1)  # sharpens targets
    sinkhorn_iterations: int = Field(default=3, ge=0)
    me_max_weight: float = Field(default=1.0, ge=0)
    prior: Literal["uniform", "power_law"] = "uniform"


class HeadConfig(Settings):
    """The projection head: three linear layers."""

    hidden: int | None = Field(default=2048, ge=1)  # None: four times the encoder's width
    out: int | None = Field(default=256, ge=1)  # None: the encoder's width
    norm: Literal["batch", "layer"] = "batch"  # layer: for exact accumulation, and batches of 1


class OptimConfig(Settings):
    """AdamW and its schedules."""

    batch_size: int = Field(default=1024, ge=1)  # films an optimizer step, over all processes
    epochs: float = Field(default=100, gt=0)
    steps: int | None = Field(default=None, ge=1)  # instead of epochs
    lr: float = Field(default=1e-3, gt=0)  # at lr_batch films a step; scaled with batch_size
    lr_batch: int | None = 1024  # None: lr is taken as it is
    lr_start: float = Field(default=0.2, ge=0, le=1)  # share of lr at step 0
    lr_end: float = Field(default=1e-3, ge=0, le=1)  # share of lr at the end
    warmup_epochs: float = Field(default=2, ge=0)
    warmup_steps: int | None = Field(default=None, ge=0)  # instead of warmup_epochs
    weight_decay: float = Field(default=0.04, ge=0)
    weight_decay_end: float = Field(default=0.4, ge=0)
    decay_all: bool = False  # also biases and norms (never prototypes)
    betas: tuple[float, float] = (0.9, 0.999)
    clip: float | None = Field(default=3.0, gt=0)  # norm of all gradients but the prototypes'
    ema: float = Field(default=0.996, ge=0, le=1)  # momentum of the target
    ema_end: float = Field(default=1.0, ge=0, le=1)
    stretch: float = Field(default=1.25, ge=1)  # schedules run as if to this many times the end
    by_epoch: bool = False  # schedules change once an epoch
    accumulate: int = Field(default=1, ge=1)  # parts in which a process computes its share of the batch
    accumulate_mode: Literal["exact", "approximate"] = "exact"  # approximate: the loss of each part by itself

    @model_validator(mode="after")
    def _parts(self) -> Self:
        if self.batch_size % self.accumulate:
            raise ValueError(f"batch_size {self.batch_size} is not a multiple of accumulate {self.accumulate}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas must be in [0, 1), got {self.betas[0]}, {self.betas[1]}")
        return self


class FilmsConfig(Settings):
    """Which films, and which of them make a pair."""

    splits: list[Split] = Field(default=["train"], min_length=1)  # fine-tuning checks them
    views: Literal["frontal", "all"] = "frontal"
    per_subject_cap: int | None = Field(default=None, ge=1)  # at most so many films a subject, drawn by seed
    positives: Literal["film", "study", "patient"] = "film"  # the target's film: the same, or another of the ...
    max_days: float | None = Field(default=None, ge=0)  # ... at most so far apart (patient)


PAPER: dict[str, dict[str, Any]] = {
    "encoder": {"positions": "sincos", "model_args": {"num_heads": 6}},
    "ehr": {"inject": "concat", "preset": "msn"},
    "views": {"flip": 0.5, "brightness": 0.0, "contrast": 0.0, "normalise": "dataset", "mean": 0.449, "std": 0.226},
    "mask": {"focal": True},
    "head": {"hidden": None, "out": None},
    "optim": {
        "batch_size": 64,
        "epochs": 100,
        "lr": 1e-4,
        "lr_batch": None,
        "lr_end": 0.0,
        "warmup_epochs": 0,
        "weight_decay": 1e-3,
        "weight_decay_end": 1e-3,
        "decay_all": True,
        "clip": None,
        "ema": 0.996,
        "ema_end": 0.996,
        "stretch": 1.0,
        "by_epoch": True,
    },
}


class PretrainConfig(Settings):
    """features/ + store/ -> runs/X/ with encoder/."""

    features: str  # a features/ folder
    store: str  # a store/ folder
    out: str  # runs/X, the run folder
    preset: Literal["default", "paper"] = "default"  # default: the original MSN's schedules; paper: CXR-EHR-MSN's
    seed: int = 0
    encoder: EncoderConfig = EncoderConfig()
    ehr: EhrConfig = EhrConfig()
    views: ViewsConfig = ViewsConfig()
    mask: MaskConfig = MaskConfig()
    loss: LossConfig = LossConfig()
    head: HeadConfig = HeadConfig()
    optim: OptimConfig = OptimConfig()
    films: FilmsConfig = FilmsConfig()
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"  # of the networks; the loss is always fp32
    compile: bool = False  # torch.compile of the encoders
    checkpointing: bool = False  # recompute activations: less memory, about a third more time
    workers: int = Field(default=0, ge=0, le=256)  # processes that prepare batches, for each training process
    log_every: int = Field(default=1, ge=1)  # steps
    save_every_minutes: float = Field(default=10.0, gt=0)  # between checkpoints; SIGTERM saves at once
    keep: int = Field(default=2, ge=1)  # newest checkpoints that stay
    keep_every_hours: float | None = Field(default=None, gt=0)  # of the older ones, one for each such span stays
    export_every_epochs: float | None = Field(default=None, gt=0)  # encoder/ is also written on the way
    trackers: list[Literal["tensorboard", "wandb"]] = []  # beside metrics.jsonl
    readability: bool = True  # at the end: how linearly readable is each EHR column from the frozen features

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, given: Any) -> Any:
        """The preset's values stand where the YAML and the command line give none."""
        if not isinstance(given, dict) or given.get("preset") != "paper":
            return given
        filled = dict(given)
        for section, values in PAPER.items():
            own = given.get(section)
            if own is None or isinstance(own, dict):
                filled[section] = {**values, **(own or {})}
        return filled

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if self.films.max_days is not None and self.films.positives != "patient":
            raise ValueError("films.max_days goes with films.positives: patient")
        coupled = self.head.norm == "batch" or not self.encoder.arch.startswith(("vit", "deit"))
        if self.optim.accumulate > 1 and self.optim.accumulate_mode == "exact" and coupled:
            raise ValueError(
                "optim.accumulate > 1 with batch norm, which couples films: exact needs head.norm: layer and a ViT; "
                "or say optim.accumulate_mode: approximate"
            )
        return self
