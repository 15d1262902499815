"""The config of `probe`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from configs import Settings
from configs.commands import command_line
from configs.loader import Seed
from ehr_features.config import TRAINING, Empty, Uncertain
from ehr_features.own_films.config import TableConfig
from finetune.config.shared import (
    AllowLeak,
    Cache,
    NotNegative,
    Pool,
    Positive,
    Samples,
    Seeds,
    TuneConfig,
    WeightsConfig,
    first_seed,
    named_weights,
    seed_list,
)
from pretrain.config import Precision, ProcessTimeout, Project, RunName, Trackers, ViewChoice


class ShiftConfig(Settings):
    """Train on some groups, test on others."""

    field: str = Field(
        default="", description="Subgroup column: view, year_group, sex, ...; --shift FIELD gives it too."
    )
    source: list[str] = Field(
        default=[],
        description="Groups to train on; empty: view AP, the first half of year_group, else the largest group.",
    )
    target: list[str] = Field(default=[], description="Groups to test on; empty: the other groups.")


class ProbeConfig(Settings):
    """features/ or a table of films, and an encoder -> results of a linear evaluation or of full fine-tuning."""

    renamed = {"missing": "empty"}

    features: str | None = Field(default=None, description="A features/ folder: the films' labels and splits.")
    films: TableConfig | None = Field(
        default=None, description="Instead of features: a table of films, in a published layout or any."
    )
    store: str | None = Field(
        default=None, description="The store/ folder of packed films; null with `films`: packed once beside `out`."
    )
    encoder: str = Field(
        description="encoder/, a run, a weights file, a folder with config.json, `hf-hub:ORG/NAME`, `timm:NAME`, "
        "`rad-dino:PATH`, `chexfound:PATH`, `torchxrayvision:PATH`, `pixels`, `random:ARCH`, `random:FOLDER`, or "
        "`metadata`."
    )
    weights: WeightsConfig | None = Field(default=None, description="What `encoder` does not say itself.")
    out: str = Field(description="The run folder to write.")
    trackers: Trackers = []
    project: Project = "ehr-msn"
    run_name: RunName = None
    seed: Seed = Field(default=0, description="Seed of the batches' order, of the heads and of the intervals.")
    method: Literal["linear", "logistic", "knn", "boosting", "attentive", "finetune", "transfer"] = Field(
        default="linear",
        description="Linear heads by gradient steps (linear) or by a solver (logistic), neighbours (knn), trees "
        "(boosting), attention over frozen tokens (attentive), all weights (finetune), or a finished head (transfer).",
    )
    head: str | None = Field(
        default=None, description="With method: transfer, the finished linear or logistic probe whose head is scored."
    )
    labels: Annotated[list[str], Field(min_length=1)] | None = Field(
        default=None, description="Labels to predict; null: all."
    )
    views: ViewChoice = "frontal"
    unit: Literal["study", "film"] = Field(
        default="study", description="What is scored: a film, or a study by the mean of its films' probabilities."
    )
    uncertain: Uncertain = Field(
        default=TRAINING.uncertain,
        description="What -1 becomes in training: ignore leaves it out, zeros and ones make it 0 or 1.",
    )
    empty: Empty | None = Field(
        default=None,
        description="What an empty label becomes in training; null: as in evaluation (MIMIC: zeros, csv: ignore).",
    )
    fraction: Annotated[float, Field(gt=0, le=1)] | list[Annotated[float, Field(gt=0, le=1)]] = Field(
        default=1.0, description="Share of the train subjects to train on, or a list of shares."
    )
    repeats: int = Field(
        default=3, ge=1, le=1000, description="Draws of each fraction below 1, with seed, seed + 1, ..."
    )
    seeds: Seeds = Field(
        default=1,
        description="Number of fits, with seed, seed + 1, ...; or their seeds, such as [0, 1, 5], of which the first "
        "replaces `seed`. results.json holds their means.",
    )
    folds: int = Field(
        default=0,
        ge=0,
        le=1000,
        description="3 or more: stratified folds by subject; each subject is scored once (0: none).",
    )
    class_weights: Literal["none", "balanced"] = Field(
        default="none", description="balanced: both classes of a label weigh alike in the loss."
    )
    groups: list[str] = Field(
        default=["sex", "age", "view", "position", "icu"],
        description="EHR groups that `encoder: metadata` reads; with films, any column of the table too.",
    )
    pools: list[Pool] = Field(
        default=["cls", "avg", "both"], min_length=1, description="Poolings to try, of those that the encoder has."
    )
    lrs: list[Positive] = Field(
        default=[3e-4, 1e-3, 3e-3, 1e-2],
        min_length=1,
        description="Learning rates of linear heads; validation chooses.",
    )
    weight_decays: list[NotNegative] = Field(
        default=[0.0, 1e-2, 1e-1, 1.0], min_length=1, description="Weight decays of linear heads; validation chooses."
    )
    epochs: int = Field(default=100, ge=1, le=10**6, description="Largest number of epochs of linear heads.")
    patience: int = Field(
        default=10, ge=1, le=10**6, description="Epochs without a better validation AUROC of any head before they stop."
    )
    batch_size: int = Field(default=256, ge=1, le=10**7, description="Films in a step of the linear heads.")
    pixels: int = Field(default=16, ge=2, le=512, description="Side of the image of the baseline `encoder: pixels`.")
    strengths: list[Positive] = Field(
        default=[1e-4, 1e-3, 1e-2, 1e-1, 1.0], min_length=1, description="Values of C that method: logistic tries."
    )
    neighbours: list[Annotated[int, Field(ge=1, le=10**6)]] = Field(
        default=[5, 10, 20, 50], min_length=1, description="Numbers of neighbours that method: knn tries."
    )
    tune: TuneConfig = TuneConfig.model_validate({})
    process_timeout: ProcessTimeout = 600.0
    precision: Precision = Field(
        default="no",
        description="Mixed precision of finetune and attentive: no (fp32), bf16, fp16, or auto (as in `pretrain`).",
    )
    subgroups: list[str] = Field(
        default=[], description="Also score by group: sex, age, race, view, support_devices, care_unit, year_group."
    )
    shift: ShiftConfig | None = Field(default=None, description="Also train on some groups and test on others.")
    radiologists: str | None = Field(
        default=None, description="mimic-cxr-2.1.0-test-set-labeled.csv: a second test set, labelled by radiologists."
    )
    samples: Samples = 1000
    allow_leak: AllowLeak = False
    other_people: bool = Field(
        default=False, description="Equal subject_ids of another data set in the pretraining are different people."
    )
    cache: Cache = None

    _first_seed = model_validator(mode="before")(first_seed)
    _named_weights = model_validator(mode="before")(named_weights)

    @property
    def every_seed(self) -> list[int]:
        return seed_list(self.seed, self.seeds)

    @property
    def fractions(self) -> list[float]:
        """From the smallest."""
        return sorted(set(self.fraction if isinstance(self.fraction, list) else [self.fraction]))

    @model_validator(mode="after")
    def _agree(self) -> ProbeConfig:
        metadata = self.encoder == "metadata"
        if (self.features is None) == (self.films is None):
            raise ValueError("wanted one of `features` (a features/ folder) and `films.table` (a table of films)")
        if self.features is not None and self.store is None and not metadata:
            raise ValueError(
                f"`store` is missing: the packed films; write them with {command_line('images', 'images')}"
            )
        if metadata and self.method in ("attentive", "finetune", "transfer"):
            raise ValueError(f"`method` {self.method} needs films; metadata goes with logistic, boosting, linear, knn")
        if self.encoder == "pixels" and self.method in ("attentive", "finetune"):
            raise ValueError(f"`method` {self.method} needs an encoder; random:ARCH is training from scratch")
        if (self.method == "transfer") != (self.head is not None):
            raise ValueError("`head` (a finished probe) and method=transfer go together")
        if self.weights is not None and self.encoder in ("metadata", "pixels"):
            raise ValueError(f"`weights` describes an encoder's weights; `encoder` is {self.encoder}")
        if self.folds in (1, 2):
            raise ValueError(f"`folds` {self.folds}: one fold tests, one chooses and the others train; take 3 or more")
        if self.folds and (self.shift is not None or self.radiologists is not None or self.method == "transfer"):
            raise ValueError(
                "`folds` splits the films anew; shift, radiologists and method=transfer need their own split"
            )
        if self.class_weights != "none" and self.method in ("knn", "transfer"):
            raise ValueError(f"`class_weights` {self.class_weights}: method={self.method} has no loss to weigh")
        return self
