"""The config schemas of the commands of pretrain/. Imports no torch, so that `--help` is quick."""

from __future__ import annotations

import difflib
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from configs import Settings
from configs.launch import REFUSED
from configs.loader import Seed, fragment
from configs.plugin import is_file
from ehr_features.config import TEXT_GROUP, Storage
from ehr_features.own_films.config import Columns
from ehr_features.schema import Split
from pretrain.options import (
    METHODS,
    SECTIONS,
    DinoConfig,
    HeadConfig,
    LejepaConfig,
    LossConfig,
    MaeConfig,
    MaskConfig,
    OptimConfig,
    SimclrConfig,
    VicregConfig,
    ViewsConfig,
)

# Thresholds of the collapse warning and the report: effective rank of the features, share of prototypes in use.
RANK_FLOOR, PROTOTYPES_FLOOR = 4.0, 0.1


def _named_once(word: Any) -> Any:
    """Refuse names of a precision from earlier releases and other tools."""
    names = {"fp32": "no", "32": "no", "float32": "no", "bfloat16": "bf16", "bf16-mixed": "bf16"}
    names |= {"16": "fp16", "float16": "fp16", "16-mixed": "fp16"}
    if str(word).lower() in names:
        raise ValueError(f"{word} is called `{names[str(word).lower()]}` here")
    if str(word).lower() == "fp8":
        raise ValueError(REFUSED["FP8"])
    return word


Precision = Annotated[
    Literal["no", "bf16", "fp16", "auto"],
    BeforeValidator(_named_once),
    Field(
        description="Mixed precision of the networks: no is fp32 throughout, bf16, fp16 (GPU only), or auto: bf16 "
        "where the device has instructions for it, else no."
    ),
]
ViewChoice = Annotated[
    Literal["frontal", "all"], Field(description="Which films by view: frontal takes AP and PA, all adds laterals.")
]
ProcessTimeout = Annotated[
    float,
    Field(
        ge=1,
        le=10**6,
        description="With several processes: seconds without a sign of life after which one counts as lost and the run "
        "ends with exit code 75; a collective call may take three times as long.",
    ),
]
Trackers = Annotated[
    list[Literal["tensorboard", "wandb", "mlflow", "csv"]],
    Field(description="Trackers beside metrics.jsonl, in OUT/trackers/NAME (docs/trackers.md)."),
]
Project = Annotated[str, Field(min_length=1, description="The trackers' project or experiment.")]
RunName = Annotated[str | None, Field(description="The run's name in the trackers; null: the name of `out`.")]
PerSubjectCap = Annotated[
    int | None, Field(ge=1, le=10**9, description="Largest number of films of a subject, drawn by `seed`; null: all.")
]


class ImagesConfig(Settings):
    """Films -> store/: one of `mimic_cxr` and `films`."""

    mimic_cxr: str | None = Field(
        default=None, description="Folder of MIMIC-CXR-JPG or MIMIC-CXR; its metadata table lists the films."
    )
    films: str | None = Field(
        default=None, description="Instead: a folder of films, or a list (.txt; .csv or .parquet with a column path)."
    )
    root: str | None = Field(
        default=None, description="With a table in `films`: the folder in which its paths begin; null: the table's."
    )
    path: str | None = Field(
        default=None, description="With a table in `films`: the column of the paths; null: the layout's."
    )
    layout: str | None = Field(
        default=None,
        description="With a table in `films`: csv (any), chexpert, padchest, vindr, rsna, nih, brax, or a YAML file.",
    )
    out: str = Field(description="The store/ folder to write.")
    size: int = Field(
        default=256,
        ge=16,
        le=4096,
        description="Side of the stored square in pixels; films are resized to fit, then padded.",
    )
    views: ViewChoice = "frontal"
    per_subject_cap: PerSubjectCap = None
    encoding: Literal["raw", "jpeg"] = Field(
        default="raw",
        description="raw is read without a copy; jpeg takes about a tenth of the disk and is slower to read.",
    )
    dicom: Literal["mimic-jpg", "window"] = Field(
        default="mimic-jpg",
        description="Gray levels of a DICOM: as MIMIC-CXR-JPG was made, by min-max, inversion and equalisation, or by "
        "the file's own grey window (window).",
    )
    workers: int | None = Field(
        default=None, ge=1, le=256, description="Processes that decode films; null: one a core."
    )
    seed: Seed = Field(default=0, description="Seed of per_subject_cap.")
    storage: Storage = {}

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.mimic_cxr is None) == (self.films is None):
            raise ValueError("wanted one of `mimic_cxr` (a MIMIC-CXR-JPG folder) and `films` (a folder or a list)")
        given = [key for key in ("root", "path", "layout") if getattr(self, key) is not None]
        if given and not str(self.films).removesuffix(".gz").endswith((".csv", ".parquet")):
            raise ValueError(f"`{given[0]}` goes with a table in `films` (.csv, .csv.gz, .parquet)")
        if self.films is not None and self.per_subject_cap is not None:
            raise ValueError("`per_subject_cap` needs subjects: it goes with `mimic_cxr`, not with `films`")
        return self


class EncoderConfig(Settings):
    """Which network."""

    arch: str = Field(
        default="vit_tiny_patch16_224",
        description="Name of a timm network that gives tokens or a map: vit_*, eva02_*, vit_*_dinov3, convnext*, "
        "swin*, efficientnet*, regnet*, densenet*, resnet*, ...",
    )
    image_size: int = Field(
        default=224,
        ge=16,
        le=4096,
        description="Side in pixels of target and random views, and of films at evaluation.",
    )
    in_chans: Literal[1, 3] = Field(
        default=1, description="Input channels: 1 for gray films; 3 repeats them, for weights trained on colour images."
    )
    model_args: dict[str, Any] = Field(
        default={}, description="Arguments passed to timm, e.g. {depth: 4, embed_dim: 96, num_heads: 3}."
    )
    positions: Literal["timm", "sincos"] = Field(
        default="sincos",
        description="Initial positions of a ViT: timm's random ones, or sines and cosines; trained either way.",
    )
    pool: str | None = Field(
        default=None,
        description="Pooling that encoder.json names for evaluation; null: cls of a ViT, avg of a feature map.",
    )
    init: str | None = Field(
        default=None,
        description="Weights to start from: encoder/, a file, a folder with config.json, hf-hub:ORG/NAME, timm:NAME, "
        "rad-dino:PATH, chexfound:PATH or torchxrayvision:PATH; null: random.",
    )
    init_heads: int | None = Field(
        default=None,
        ge=1,
        le=1024,
        description="Attention heads of a bare ViT file in `init`, which its tensors do not tell.",
    )


class EhrConfig(Settings):
    """How the record takes part. `groups: []`: not at all."""

    groups: list[str] = Field(
        default=[],
        description="EHR groups of ehr_features.static (docs/features.md), or with films.table: sex, age, view and any "
        "other column of the table; `text` is the film's note as a vector.",
    )
    notes: str | None = Field(
        default=None, description="With the group `text`: the folder that the command notes wrote."
    )
    text_encoder: str | None = Field(
        default=None, description="With the group `text`: the folder of a Hugging Face or sentence-transformers model."
    )
    preset: Literal["default", "msn"] = Field(
        default="default",
        description="Columns of the groups: ours (default), or those of CXR-EHR-MSN's published sets (msn).",
    )
    inject: Literal["add", "concat", "predictor"] = Field(
        default="add",
        description="How the record conditions: add is h + W e with W = 0 at the start, concat is g([h; f(e)]), both "
        "before the head; predictor is z + g([z; e]) after it, so that encoder and head are not told.",
    )
    width: int = Field(
        default=128,
        ge=1,
        le=65536,
        description="Width of the record's embedding, with inject: concat or predictor, or use: contrast.",
    )
    dropout: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="Probability that a group is blanked for a film in an epoch: zeros, its masks too, and no target.",
    )
    use: Literal["condition", "predict", "contrast"] = Field(
        default="condition",
        description="condition: the record conditions the anchor; predict: its known columns are predicted from the "
        "film; contrast: film and record are told from those of other subjects.",
    )
    predict_weight: float = Field(default=1.0, ge=0, le=1e6, description="Weight of that loss, with use: predict.")
    contrast_weight: float = Field(default=1.0, ge=0, le=1e6, description="Weight of that loss, with use: contrast.")
    contrast_temperature: float = Field(default=0.1, gt=0, le=1e3, description="Temperature of that loss.")
    permuted: bool = Field(default=False, description="Control: each film gets the record of another film.")

    @model_validator(mode="after")
    def _text(self) -> Self:
        wanted, given = TEXT_GROUP in self.groups, [self.notes is not None, self.text_encoder is not None]
        if wanted and not all(given):
            raise ValueError("the group `text` needs ehr.notes (a folder of notes) and ehr.text_encoder (its reader)")
        if any(given) and not wanted:
            raise ValueError("ehr.notes and ehr.text_encoder go with the group `text`; add it to ehr.groups")
        return self


class FilmsConfig(Columns):
    """Which films, and which of them make a pair; or a table of films outside MIMIC (`table`), in place of features."""

    splits: list[Split] = Field(
        default=["train"], min_length=1, description="Splits to train on; fine-tuning refuses to test on what was seen."
    )
    views: ViewChoice = "frontal"
    per_subject_cap: PerSubjectCap = None
    positives: Literal["film", "study", "patient"] = Field(
        default="film",
        description="Film of the target view: the anchor's own, another of the study, or of the patient.",
    )
    max_days: float | None = Field(
        default=None,
        ge=0,
        le=1e6,
        description="Largest gap in days of such a pair, with positives: patient; null: any.",
    )


class PretrainConfig(Settings):
    """features/ + store/ -> runs/X/ with encoder/."""

    features: str | None = Field(
        default=None, description="The features/ folder; null with films.table, a table of films outside MIMIC."
    )
    store: str = Field(description="The store/ folder of packed films.")
    out: str = Field(description="The run folder to write, runs/X.")
    preset: Literal["default", "paper"] = Field(
        default="default",
        description="Values of keys that are not given: the original MSN's schedules (default), or CXR-EHR-MSN's as "
        "published (paper: configs/presets/paper.yaml).",
    )
    method: str = Field(
        default="msn",
        description=f"Self-supervised method: {', '.join(METHODS)}, or a class of your own, FILE.py:Class "
        "(docs/methods.md). Keys that are not given have its published values (configs/presets/METHOD.yaml).",
    )
    method_args: dict[str, Any] = Field(default={}, description="Arguments of a method of your own.")
    seed: Seed = Field(default=0, description="Seed of weights, order, views and masks.")
    encoder: EncoderConfig = EncoderConfig()
    ehr: EhrConfig = EhrConfig()
    views: ViewsConfig = ViewsConfig()
    mask: MaskConfig = MaskConfig()
    loss: LossConfig = LossConfig()
    dino: DinoConfig = DinoConfig()
    mae: MaeConfig = MaeConfig()
    simclr: SimclrConfig = SimclrConfig()
    vicreg: VicregConfig = VicregConfig()
    lejepa: LejepaConfig = LejepaConfig()
    head: HeadConfig = HeadConfig()
    optim: OptimConfig = OptimConfig()
    films: FilmsConfig = FilmsConfig()
    precision: Precision = "no"
    compile: bool = Field(default=False, description="Compile the encoders with torch.compile.")
    checkpointing: bool = Field(
        default=False, description="Recompute activations in the backward pass: less memory, about a third more time."
    )
    workers: int = Field(
        default=0, ge=0, le=256, description="Processes that prepare batches, for each training process."
    )
    log_every: int = Field(default=1, ge=1, le=10**9, description="Steps between lines of metrics.jsonl.")
    save_every_minutes: float = Field(
        default=10.0, gt=0, le=1e6, description="Minutes between checkpoints; SIGTERM saves at once."
    )
    keep: int = Field(default=2, ge=1, le=10**4, description="Newest checkpoints that are kept.")
    keep_every_hours: float | None = Field(
        default=None,
        gt=0,
        le=1e6,
        description="Of older checkpoints one is kept for each span of so many hours; null: none.",
    )
    export_every_epochs: float | None = Field(
        default=None,
        gt=0,
        le=1e6,
        description="Epochs between exports of encoder/ during training; null: at the end only.",
    )
    process_timeout: ProcessTimeout = 600.0
    trackers: Trackers = []
    project: Project = "ehr-msn"
    run_name: RunName = None
    readability: bool = Field(
        default=True,
        description="At the end, measure how linearly readable each EHR column is from the frozen features.",
    )

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, given: Any) -> Any:
        """The values of the preset, or of the method, stand where the YAML and the command line give none."""
        if not isinstance(given, dict):
            return given
        method, paper = given.get("method", "msn"), given.get("preset") == "paper"
        filled = dict(given)
        for preset in (["paper"] if paper else []) + ([method] if method in METHODS and method != "msn" else []):
            for section, values in fragment(preset).items():
                own = filled.get(section)
                if own is None or isinstance(own, dict):
                    filled[section] = {**values, **(own or {})}
        return filled

    @property
    def unused(self) -> list[str]:
        """Sections of other methods that were given all the same."""
        others = sorted({*SECTIONS.values()} - {SECTIONS.get(self.method)})
        return [name for name in others if getattr(self, name) != type(getattr(self, name))()]

    @property
    def source(self) -> dict[str, str]:
        """The films that probe and fuse are to be given: a features/ folder, or the keys of a table."""
        if self.features is not None:
            return {"features": self.features}
        given = self.films.model_dump(mode="json", include=set(Columns.model_fields), exclude_defaults=True)
        return {f"films.{key}": str(value) for key, value in given.items() if isinstance(value, str | int)}

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.features is None) == (self.films.table is None):
            raise ValueError(
                "wanted one of `features` (a features/ folder) and `films.table` (a table of your own films)"
            )
        if self.films.table is not None and self.ehr.preset == "msn":
            raise ValueError("ehr.preset: msn has the published columns of MIMIC; with films.table leave it out")
        return self

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if self.films.max_days is not None and self.films.positives != "patient":
            raise ValueError("films.max_days goes with films.positives: patient")
        if self.method not in METHODS and not is_file(self.method):
            near = difflib.get_close_matches(self.method, METHODS, n=1)
            hint = f"did you mean `{near[0]}`? " if near else ""
            raise ValueError(f"method `{self.method}`: {hint}wanted {', '.join(METHODS)}, or FILE.py:Class")
        if self.head.norm == "layer" and self.method in ("dino", "ibot"):
            raise ValueError(f"head.norm: layer: the head of {self.method} has batch norm or none; set head.norm=none")
        if self.preset == "paper" and self.method not in ("msn", "pmsn"):
            raise ValueError(f"preset: paper is CXR-EHR-MSN, not method {self.method}; leave preset out")
        if self.method_args and self.method in METHODS:
            own = SECTIONS.get(self.method)
            raise ValueError(
                f"method_args is for a method of your own; {self.method} has "
                + (f"the section `{own}`" if own else "none")
            )
        coupled = self.head.norm == "batch" or not self.encoder.arch.startswith(("vit", "deit", "eva"))
        if self.optim.accumulate > 1 and self.optim.accumulate_mode == "exact" and coupled:
            raise ValueError(
                "optim.accumulate > 1 with batch norm, which couples films: exact needs head.norm: layer and a ViT; "
                "or say optim.accumulate_mode: approximate"
            )
        return self
