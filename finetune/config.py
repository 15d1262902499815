"""The configs of `probe` and `fuse`. Imports no torch, so that `--help` and `--print-config` are quick."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from configs import Settings
from configs.commands import command_line
from configs.loader import Beta, Seed
from ehr_features.config import TRAINING, Empty, Uncertain
from ehr_features.own_films.config import TableConfig
from pretrain.config import Precision, Project, RunName, Trackers, ViewChoice

Positive = Annotated[float, Field(gt=0, le=1e6)]
NotNegative = Annotated[float, Field(ge=0, le=1e6)]


WEIGHTS = (".safetensors", ".ckpt", ".pth", ".pt", ".bin", ".tar")  # endings of bare weights files


Pool = Annotated[
    Literal["cls", "avg", "both"], Field(description="Pooling of tokens: class token, mean of patches, or both.")
]
AllowLeak = Annotated[
    bool, Field(description="Go on with an encoder that saw a val or test subject; the report shows it on top.")
]
Cache = Annotated[str | None, Field(description="Folder of films' features; null: cache/ beside `out`.")]
Samples = Annotated[int, Field(ge=0, le=100_000, description="Resamples of subjects for the 95% intervals; 0: none.")]
Mean = Annotated[float, Field(ge=-1e3, le=1e3)]
Deviation = Annotated[float, Field(gt=0, le=1e3)]


Seeds = Annotated[int, Field(ge=1, le=1000)] | Annotated[list[Seed], Field(min_length=1)]


def first_seed(data: Any) -> Any:
    """With a list of seeds, the first of them is `seed`. Raises: ValueError: a seed is listed twice."""
    seeds = data.get("seeds") if isinstance(data, dict) else None
    if not isinstance(seeds, list) or not seeds:
        return data
    if len(set(map(str, seeds))) < len(seeds):
        raise ValueError(f"`seeds` {seeds}: a seed is listed twice; its trainings would be the same")
    return data | {"seed": seeds[0]}


def named_weights(data: Any) -> Any:
    """`weights=hf-hub:ORG/NAME` and other text names the encoder itself."""
    if isinstance(data, dict) and isinstance(data.get("weights"), str):
        return {key: value for key, value in data.items() if key != "weights"} | {"encoder": data["weights"]}
    return data


def seed_list(seed: int, seeds: int | list[int], least: int = 1) -> list[int]:
    """The seeds of `seeds`: those listed; or `seed`, `seed` + 1, ..., of which there are at least `least`."""
    return seeds if isinstance(seeds, list) else list(range(seed, seed + max(seeds, least)))


class TuneConfig(Settings):
    """Training through the encoder: `method: finetune` and `attentive`."""

    lr: Positive = Field(
        default=1e-3,
        le=1e3,
        description="Learning rate of the head; with finetune, block i of n has lr x layer_decay ^ (n - i).",
    )
    layer_decay: float = Field(
        default=0.75, gt=0, le=1, description="Factor of the learning rate from a block to the one below."
    )
    weight_decay: NotNegative = Field(default=0.05, description="Weight decay of AdamW.")
    warmup_epochs: NotNegative = Field(default=1, le=1e6, description="Epochs of linear warm-up.")
    epochs: int = Field(default=30, ge=1, le=10**6, description="Largest number of epochs.")
    patience: int = Field(
        default=5, ge=1, le=10**6, description="Epochs without a better validation AUROC before training stops."
    )
    batch_size: int = Field(default=64, ge=1, le=10**6, description="Films in an optimizer step, over all processes.")
    rotate: NotNegative = Field(default=10, le=360, description="Largest rotation in degrees; films are never flipped.")
    zoom: float = Field(default=0.1, ge=0, lt=1, description="Largest relative change of size.")
    shift: float = Field(default=0.05, ge=0, lt=1, description="Largest shift, as a share of the side.")
    contrast: float = Field(default=0.2, ge=0, lt=1, description="Largest relative change of contrast.")
    clip: Positive = Field(default=1.0, le=1e6, description="Largest norm of the gradient.")


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


class WeightsConfig(Settings):
    """What a bare weights file (`encoder: path.safetensors`) does not say; of published encoders, another size."""

    arch: str | None = Field(
        default=None, description="Name of the timm network of a bare file, e.g. vit_base_patch14_dinov2."
    )
    image_size: int | None = Field(
        default=None,
        ge=16,
        le=4096,
        description="Side of the films in pixels; null: the published encoder's own, else 224.",
    )
    in_chans: Literal[1, 3] = Field(
        default=3, description="Input channels of a bare file; gray films are repeated to 3."
    )
    model_args: dict[str, Any] = Field(default={}, description="Arguments passed to timm, for a bare file.")
    mean: Mean | Annotated[list[Mean], Field(min_length=1, max_length=3)] | None = Field(
        default=None,
        description="Mean of pixels in [0, 1], one number or one per channel; null: the published encoder's own, else "
        "ImageNet's.",
    )
    std: Deviation | Annotated[list[Deviation], Field(min_length=1, max_length=3)] | None = Field(
        default=None, description="Deviation of pixels in [0, 1], as `mean`."
    )

    @model_validator(mode="after")
    def _agree(self) -> WeightsConfig:
        for name in ("mean", "std"):
            values = getattr(self, name)
            if isinstance(values, list) and len(values) not in (1, self.in_chans):
                raise ValueError(
                    f"`{name}` has {len(values)} numbers; wanted one, or one per channel ({self.in_chans})"
                )
        return self


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
    labels: list[str] = Field(default=[], description="Labels to predict; empty: all.")
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
    precision: Precision = Field(
        default="no", description="Mixed precision of finetune and attentive: no (fp32), bf16, fp16."
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
        for axis, choices in self.axes.items():
            for choice, by_step in choices.items():
                if unknown := sorted(set(by_step) - set(self.steps)):
                    raise ValueError(f"axes.{axis}.{choice}: no step `{unknown[0]}`; steps: {', '.join(self.steps)}")
        return self
