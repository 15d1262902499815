"""The configs of `fuse` and `grid`."""

from __future__ import annotations

import math
from typing import Any, Literal

from pydantic import Field, model_validator

from configs import Settings
from configs.loader import Beta, Seed
from ehr_features.own_films.config import TableConfig
from finetune.config.shared import (
    AllowLeak,
    Cache,
    Pool,
    Positive,
    Samples,
    Seeds,
    WeightsConfig,
    first_seed,
    named_weights,
    seed_list,
)
from pretrain.config import Precision, ProcessTimeout, Project, RunName, Trackers


class FuseConfig(Settings):
    """features/ or a table of films, store/ and an encoder -> a model of the record and the film, evaluated."""

    features: str | None = Field(default=None, description="The features/ folder: series, samples, films of stays.")
    films: TableConfig | None = Field(
        default=None, description="Instead of features: a table of films and labels; the record is its columns."
    )
    groups: list[str] = Field(
        default=[], description="With films: the columns that are the record, e.g. [age, sex, ward]; none: film_only."
    )
    store: str | None = Field(
        default=None, description="The store/ folder of packed films; a model of the record needs none."
    )
    encoder: str | None = Field(
        default=None,
        description="encoder/, a run, a weights file, a published encoder as in `probe`, `random:...` or `pixels`; "
        "null for the record alone.",
    )
    weights: WeightsConfig | None = Field(default=None, description="What `encoder` does not say itself.")
    out: str = Field(description="The run folder to write.")
    trackers: Trackers = []
    project: Project = "ehr-msn"
    run_name: RunName = None
    seed: Seed = Field(default=0, description="Seed of weights, order, draws and intervals.")
    task: str = Field(
        default="mortality", description="Table of features/samples/ to predict; with films: their labels (`labels`)."
    )
    model: str = Field(
        default="medfuse",
        description="Model, one of finetune/fusion/models.py, e.g. record_lstm or film_only; or FILE.py:Class.",
    )
    pairing: Literal["paired", "partial"] = Field(
        default="partial", description="Samples: those with a film (paired), or all (partial)."
    )
    val_pairing: Literal["paired", "partial"] | None = Field(
        default=None, description="The same for the validation split; null: as `pairing`."
    )
    test_pairing: Literal["paired", "partial"] | None = Field(
        default=None, description="The same for the test split; null: as `pairing`."
    )
    freeze: bool = Field(
        default=True, description="Compute film features once; false tunes the encoder with encoder_lr."
    )
    pool: Pool | None = Field(default=None, description="Pooling of the encoder; null: its own.")
    unpaired_share: float = Field(
        default=1.0,
        ge=0,
        le=1,
        description="Share of the train stays without a film that is used, drawn once by `seed`.",
    )
    epoch_samples: int | None = Field(
        default=None, ge=1, le=10**9, description="Train samples of an epoch, drawn anew each time; null: all."
    )
    film: Literal["features", "findings", "both"] = Field(
        default="both",
        description="Input of a film: the encoder's features, logits of findings by heads fitted on all train "
        "films, or both.",
    )
    num_films: int = Field(
        default=5,
        ge=1,
        le=1000,
        description="Largest number of films that medfuse_time reads, the last before prediction.",
    )
    context: bool = Field(default=True, description="Give the film's view and age in hours beside its features.")
    control: Literal["none", "context", "another"] = Field(
        default="none",
        description="Control: no pixels (context), or another subject's film of the same view (another).",
    )
    standardise: bool = Field(default=True, description="Scale film features by mean and deviation of the train films.")
    notes: str | None = Field(
        default=None, description="Folder of notes; the film's note is one more token, or token states."
    )
    text_encoder: str | None = Field(
        default=None, description="With notes: the folder of a Hugging Face or sentence-transformers model."
    )
    text: Literal["features", "findings", "both"] = Field(
        default="both", description="Input of a note: its vector, logits of findings, or both."
    )
    hidden: int = Field(default=256, ge=1, le=16384, description="Width of the record's LSTM and of a projected film.")
    layers: int = Field(default=2, ge=1, le=100, description="Layers of the record's LSTM.")
    joint: int = Field(default=512, ge=1, le=16384, description="Width of MedFuse's LSTM over the tokens.")
    dropout: float = Field(default=0.3, ge=0, lt=1, description="Dropout probability.")
    missing: Literal["zero", "learnable"] = Field(
        default="learnable", description="Token of model concat in the place of an absent film: zeros, or learned."
    )
    part_weight: float = Field(
        default=0.5, ge=0, le=1e6, description="Weight in the loss of each branch's own prediction."
    )
    record_weights: str | None = Field(
        default=None,
        description="A finished record_lstm run whose weights the record branch takes; unused by record-only models.",
    )
    film_weights: str | None = Field(
        default=None, description="A finished film_only run whose head the film branch takes."
    )
    freeze_record: bool = Field(
        default=False, description="Keep the record branch as it is; with `freeze`, the published early fusion."
    )
    unfreeze_after: int | None = Field(
        default=None,
        ge=1,
        le=10**6,
        description="With freeze: false, epochs on frozen features before tuning begins; null: none.",
    )
    max_hours: int | None = Field(
        default=None, ge=1, le=10**5, description="Read the last so many hours before prediction; null: all."
    )
    lr: float = Field(default=3e-4, gt=0, le=1e3, description="Learning rate of all but the encoder.")
    lr_draws: int = Field(
        default=0,
        ge=0,
        le=1000,
        description="Learning rates drawn log-uniformly from lr_range, of which validation chooses; 0: `lr`.",
    )
    lr_range: tuple[Positive, Positive] = Field(
        default=(1e-5, 1e-3), description="Lowest and highest learning rate of that search."
    )
    encoder_lr: float = Field(
        default=1e-5, gt=0, le=1e3, description="Learning rate of the encoder, with freeze: false."
    )
    seeds: Seeds = Field(
        default=1,
        description="Number of trainings, with seed, seed + 1, ...; or their seeds, such as [0, 1, 5], of which the "
        "first replaces `seed`. results.json holds their means.",
    )
    weight_decay: float = Field(default=0.01, ge=0, le=1e3, description="Weight decay of AdamW.")
    betas: tuple[Beta, Beta] = Field(default=(0.9, 0.999), description="Both betas of AdamW.")
    clip: float | None = Field(
        default=1.0, gt=0, le=1e6, description="Largest norm of the gradient; null: no clipping."
    )
    batch_size: int = Field(default=64, ge=1, le=10**6, description="Samples in an optimizer step, over all processes.")
    epochs: int = Field(default=50, ge=1, le=10**6, description="Largest number of epochs.")
    patience: int = Field(
        default=10, ge=1, le=10**6, description="Epochs without a better validation AUROC before training stops."
    )
    plateau: int | None = Field(
        default=None,
        ge=1,
        le=10**6,
        description="Halve lr after so many epochs without a lower validation loss; null: never.",
    )
    checkpoint_every: int = Field(
        default=5, ge=0, le=10**6, description="Epochs between checkpoints; 0: only when stopped."
    )
    adds: bool = Field(
        default=False, description="Also train the controls without the picture, and report what the film adds."
    )
    robustness: bool = Field(
        default=False, description="Also score the test split without films, and without the last hours of the series."
    )
    samples: Samples = 1000
    workers: int = Field(
        default=0, ge=0, le=256, description="Processes that read films ahead when the encoder is tuned."
    )
    process_timeout: ProcessTimeout = 600.0
    precision: Precision = "no"
    allow_leak: AllowLeak = False
    cache: Cache = None

    _first_seed = model_validator(mode="before")(first_seed)
    _named_weights = model_validator(mode="before")(named_weights)

    @property
    def every_seed(self) -> list[int]:
        return seed_list(self.seed, self.seeds)

    @model_validator(mode="before")
    @classmethod
    def _of_a_table(cls, given: Any) -> Any:
        """With a table of films there is one task, its labels, and a film is its features."""
        if not isinstance(given, dict) or given.get("films") is None:
            return given
        if isinstance(given["films"], int):
            raise ValueError(f"`films` {given['films']}: the number of films is now called `num_films`")
        return {"task": "labels", "film": "features", **given}

    @model_validator(mode="after")
    def _source(self) -> FuseConfig:
        if (self.features is None) == (self.films is None):
            raise ValueError("wanted one of `features` (a features/ folder) and `films.table` (a table of films)")
        if self.films is None:
            if self.groups:
                raise ValueError("`groups` goes with films.table; with features the record is the hourly series")
            return self
        hourly = {"max_hours": None, "robustness": False, "notes": None}
        if wrong := [key for key, off in hourly.items() if getattr(self, key) != off]:
            raise ValueError(f"`{wrong[0]}` reads hourly series or notes, which a table of films has not; leave it out")
        if self.task != "labels":
            raise ValueError(f"`task` {self.task}: with films.table the task is `labels`, the table's; leave it out")
        if self.film != "features":
            raise ValueError(
                f"`film` {self.film}: logits of findings are of MIMIC's films; leave it out with films.table"
            )
        return self

    @model_validator(mode="after")
    def _agree(self) -> FuseConfig:
        if self.lr_range[0] > self.lr_range[1] or self.lr_range[0] <= 0:
            raise ValueError("`lr_range` is [lowest, highest], both above 0")
        if self.unfreeze_after is not None and self.freeze:
            raise ValueError("`unfreeze_after` needs freeze=false: it is the epoch at which fine-tuning begins")
        if self.freeze_record and self.record_weights is None:
            raise ValueError(
                "freeze_record=true needs record_weights=RUN (a finished record_lstm run); otherwise the record branch "
                "keeps random weights"
            )
        if self.record_weights is not None and self.model == "film_only":
            raise ValueError(f"`record_weights` {self.record_weights}: model={self.model} has no LSTM to take them")
        if self.control != "none" and not self.freeze:
            raise ValueError("`control` needs freeze=true")
        if self.adds and (self.model == "film_only" or not self.freeze or self.control != "none"):
            raise ValueError("`adds` needs a model of record and film, freeze=true and control=none")
        self._text()
        return self

    def _text(self) -> None:
        """Notes and an encoder for them go together, with the models that read them."""
        if (self.notes is None) != (self.text_encoder is None):
            raise ValueError("`notes` (a folder of notes) and `text_encoder` (what reads them) go together")
        tokens = self.model in ("cross_attention", "film_tokens", "note_tokens")
        if self.notes is None and self.model in ("cross_attention", "note_tokens"):
            raise ValueError(f"`notes` missing: model={self.model} reads the films' notes")
        if self.notes is not None and not (self.model in ("medfuse", "attention") or tokens):
            raise ValueError(f"`notes`: model={self.model} reads none; take medfuse, attention or cross_attention")
        if tokens and self.task not in ("findings", "radiology"):
            raise ValueError(f"`task` {self.task}: model={self.model} is for findings or radiology")
        if tokens and not self.freeze:
            raise ValueError(f"`freeze` false: model={self.model} reads token states of a frozen encoder")


Words = list[str]
MOST_COMBINATIONS = 10_000
GRID_COMMANDS = ("pretrain", "probe", "fuse")


class GridConfig(Settings):
    """Every combination of some choices, each taken through pretrain, probe or fuse."""

    out: str = Field(description="The folder of all runs of the grid.")
    steps: dict[str, Words] = Field(
        min_length=1, description="Step -> its command: [pretrain | probe | fuse, CONFIG, key=value ...]."
    )
    axes: dict[str, dict[str, dict[str, Words]]] = Field(
        min_length=1, description="Axis -> choice -> step -> the `key=value` words that the choice adds."
    )

    @model_validator(mode="after")
    def _agree(self) -> GridConfig:
        for step, words in self.steps.items():
            if len(words) < 2 or words[0] not in GRID_COMMANDS:
                raise ValueError(
                    f"steps.{step}: wanted [{' | '.join(GRID_COMMANDS)}, CONFIG, key=value ...], got {words}"
                )
        if (number := math.prod(len(choices) for choices in self.axes.values())) > MOST_COMBINATIONS:
            raise ValueError(f"`axes` are {number:,} combinations; wanted {MOST_COMBINATIONS:,} or fewer")
        for axis, choices in self.axes.items():
            for choice, by_step in choices.items():
                if unknown := sorted(set(by_step) - set(self.steps)):
                    raise ValueError(f"axes.{axis}.{choice}: no step `{unknown[0]}`; steps: {', '.join(self.steps)}")
        return self
