"""The configs of `probe` and `fuse`. Imports no torch, so that `--help` and `--print-config` are quick."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from configs import Settings

Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]


WEIGHTS = (".safetensors", ".pth", ".pt", ".bin", ".tar")  # endings of bare weights files


class TableConfig(Settings):
    """Labelled films that are not in a features/ folder."""

    layout: Literal["nih", "chexpert", "csv"]  # Data_Entry_2017.csv; train.csv of CheXpert; any table
    table: str  # official lists and splits are looked for beside it
    images: str  # the folder of the films
    size: int = Field(256, ge=16)  # side of the packed films, where `store` is not given
    names: Literal["own", "chexpert"] = "own"  # nih: its own labels, or those that CheXpert has too, under its names
    path: str = "path"  # layout csv: which columns hold what
    columns: list[str] = []  # labels: 1, 0, -1 (uncertain) or empty
    subject: str | None = None  # none: each film is a subject of its own
    study: str | None = None
    split: str | None = None  # train, val, test; none: by hash of the subject
    view: str | None = None  # none: all are frontal
    sex: str | None = None
    age: str | None = None

    @model_validator(mode="after")
    def _labels(self) -> TableConfig:
        if self.layout == "csv" and not self.columns:
            raise ValueError("layout csv needs `columns`: the names of the label columns")
        return self


class TuneConfig(Settings):
    """Training through the encoder: `method: finetune` and `attentive`."""

    lr: Positive = 1e-3  # of the head; `finetune`: of block i of n, lr x layer_decay ^ (n - i)
    layer_decay: float = Field(0.75, gt=0, le=1)
    weight_decay: NotNegative = 0.05
    warmup_epochs: NotNegative = 1
    epochs: int = Field(30, ge=1)
    patience: int = Field(5, ge=1)  # epochs without a better validation AUROC
    batch_size: int = Field(64, ge=1)  # films a step, over all processes
    rotate: NotNegative = 10  # degrees; films are never flipped: the heart is on the left
    zoom: float = Field(0.1, ge=0, lt=1)
    shift: float = Field(0.05, ge=0, lt=1)  # share of the side
    contrast: float = Field(0.2, ge=0, lt=1)
    clip: Positive = 1.0


class ShiftConfig(Settings):
    """Train on some groups, test on others."""

    field: str = ""  # view, year_group, sex, ...: a subgroup field; --shift FIELD gives it too
    source: list[str] = []  # none: view AP; year_group: the first half; else the largest group
    target: list[str] = []  # none: view PA; year_group: the other half; else the other groups


class WeightsConfig(Settings):
    """What a bare weights file (`encoder: path.safetensors`) does not say."""

    arch: str  # a timm name, patch 14 too: vit_base_patch14_dinov2
    image_size: int = Field(224, ge=16)
    in_chans: Literal[1, 3] = 3
    model_args: dict[str, Any] = {}
    mean: float = 0.449  # of pixels in [0, 1]: ImageNet's, as one number
    std: float = Field(0.226, gt=0)


class ProbeConfig(Settings):
    """What `probe` needs. The shipped configs/probe_linear.yaml gives a reason beside each key."""

    features: str | None = None  # a features/ folder: the films' labels and splits
    films: TableConfig | None = None  # instead: NIH, CheXpert, any CSV
    store: str | None = None  # a store/ of packed films; packed beside `out` if none and `films` is given
    encoder: str  # encoder/ or a run; `pixels`; `random:ARCH` or `random:FOLDER`; `metadata`; a weights file
    weights: WeightsConfig | None = None  # with a weights file
    out: str
    seed: int = 0
    method: Literal["linear", "logistic", "knn", "boosting", "attentive", "finetune", "transfer"] = "linear"
    head: str | None = None  # `transfer`: the finished linear or logistic probe whose head is scored here, untouched
    labels: list[str] = []  # all if empty
    views: Literal["frontal", "all"] = "frontal"
    unit: Literal["study", "film"] = "study"  # what is scored: a study is the mean of its films' probabilities
    uncertain: Literal["ignore", "zeros", "ones"] = "ignore"  # -1 in training; evaluation always ignores it
    missing: Literal["zeros", "ignore"] | None = None  # empty in training; none: as in evaluation (MIMIC: zeros)
    fraction: Annotated[float, Field(gt=0, le=1)] | list[Annotated[float, Field(gt=0, le=1)]] = 1.0  # train subjects
    repeats: int = Field(3, ge=1)  # draws of each fraction below 1, of seed, seed + 1, ...: means, with an interval
    groups: list[str] = ["sex", "age", "view", "position", "icu"]  # `metadata`: the record's columns, without the film
    pools: list[Literal["cls", "avg", "both"]] = Field(["cls", "avg", "both"], min_length=1)  # those the encoder has
    lrs: list[Positive] = Field([3e-4, 1e-3, 3e-3, 1e-2], min_length=1)
    weight_decays: list[NotNegative] = Field([0.0, 1e-2, 1e-1, 1.0], min_length=1)
    epochs: int = Field(100, ge=1)
    patience: int = Field(10, ge=1)  # epochs without a better validation AUROC of any head
    batch_size: int = Field(256, ge=1)
    pixels: int = Field(16, ge=2)  # side of the raw-pixel baseline
    strengths: list[Positive] = Field([1e-4, 1e-3, 1e-2, 1e-1, 1.0], min_length=1)  # of `method: logistic`, C
    neighbours: list[Annotated[int, Field(ge=1)]] = Field([5, 10, 20, 50], min_length=1)  # of `method: knn`
    tune: TuneConfig = TuneConfig.model_validate({})
    subgroups: list[str] = []  # sex, age, race, view, support_devices, care_unit, year_group
    shift: ShiftConfig | None = None
    radiologists: str | None = None  # mimic-cxr-2.1.0-test-set-labeled.csv: a second test set
    samples: int = Field(1000, ge=0)  # resamples of the intervals
    allow_leak: bool = False  # go on with an encoder that saw a val or test subject; shown on top of the report
    other_people: bool = False  # equal subject_ids of another data set in pretraining are different people
    cache: str | None = None  # where features of films are kept; `cache/` beside `out` if none

    @property
    def fractions(self) -> list[float]:
        """From the smallest."""
        return sorted(set(self.fraction if isinstance(self.fraction, list) else [self.fraction]))

    @model_validator(mode="after")
    def _agree(self) -> ProbeConfig:
        metadata = self.encoder == "metadata"
        if (self.features is None) == (self.films is None):
            raise ValueError("wanted one of `features` (a features/ folder) and `films` (NIH, CheXpert, any CSV)")
        if self.features is not None and self.store is None and not metadata:
            raise ValueError("`store` is missing: the packed films; write them with ./launch.sh images CONFIG")
        if metadata and self.method in ("attentive", "finetune", "transfer"):
            raise ValueError(f"`method` {self.method} needs films; metadata goes with logistic, boosting, linear, knn")
        if self.encoder == "pixels" and self.method in ("attentive", "finetune"):
            raise ValueError(f"`method` {self.method} needs an encoder; random:ARCH is training from scratch")
        if (self.method == "transfer") != (self.head is not None):
            raise ValueError("`head` (a finished probe) and method=transfer go together")
        if self.weights is not None and not self.encoder.endswith(WEIGHTS):
            raise ValueError(f"`weights` describes a weights file ({', '.join(WEIGHTS)}); `encoder` names none")
        return self


class FuseConfig(Settings):
    """What `fuse` needs. The shipped configs/fuse_mortality.yaml gives a reason beside each key."""

    features: str  # a features/ folder: series, samples, films of stays
    store: str | None = None  # a store/ of packed films; a model of the record alone needs none
    encoder: str | None = None  # an encoder/ folder or a run's; `random:...`, `pixels`; none for the record alone
    weights: WeightsConfig | None = None  # what `encoder: path.safetensors` is
    out: str
    seed: int = 0
    task: str = "mortality"  # a table of features/samples/
    model: str = "medfuse"  # a name of fusion.MODELS
    pairing: Literal["paired", "partial"] = "partial"  # samples with a film, or all
    val_pairing: Literal["paired", "partial"] | None = None  # where validation differs from `pairing`
    test_pairing: Literal["paired", "partial"] | None = None  # where the test split does
    freeze: bool = True  # film features computed once; false tunes the encoder too
    pool: Literal["cls", "avg", "both"] | None = None  # of the encoder; its own if none
    unpaired_share: float = Field(1.0, ge=0, le=1)  # of the train stays without a film, drawn once by seed
    epoch_samples: int | None = Field(None, ge=1)  # train rows of an epoch, drawn anew each time; all if none
    film: Literal["features", "findings", "both"] = "both"  # findings: logits of a head fitted on all train films
    films: int = Field(5, ge=1)  # of medfuse_time: the most films that it looks at, the last before the prediction
    context: bool = True  # give the film's view and age beside its features
    control: Literal["none", "context", "another"] = "none"  # no pixels; or another subject's film of the same view
    standardise: bool = True  # film features by the mean and deviation of the train films
    notes: str | None = (
        None  # a folder of notes: the film's note is one more token (medfuse, attention), or token states
    )
    text_encoder: str | None = None  # with notes: a Hugging Face or sentence-transformers folder
    text: Literal["features", "findings", "both"] = "both"  # of a note's token: its vector, logits of findings, both
    hidden: int = Field(256, ge=1)  # width of the record's LSTM and of a projected film
    layers: int = Field(2, ge=1)
    joint: int = Field(512, ge=1)  # width of MedFuse's LSTM over the tokens
    dropout: float = Field(0.3, ge=0, lt=1)
    missing: Literal["zero", "learnable"] = "learnable"  # concat's token for an absent film
    part_weight: float = Field(0.5, ge=0)  # of the loss of each branch by itself
    record_weights: str | None = None  # stage one: a finished record_lstm run whose weights the record branch takes
    film_weights: str | None = None  # stage one: a finished film_only run whose head the film branch takes
    freeze_record: bool = False  # keep the record branch as it is (with freeze: the published `early`)
    unfreeze_after: int | None = Field(None, ge=1)  # with freeze false: epochs on frozen features before tuning begins
    max_hours: int | None = Field(None, ge=1)  # read the last so many hours before the prediction; all if none
    lr: float = Field(1e-3, gt=0)
    lr_draws: int = Field(0, ge=0)  # search: so many lr drawn log-uniformly from lr_range; validation chooses
    lr_range: tuple[float, float] = (1e-5, 1e-3)
    encoder_lr: float = Field(1e-5, gt=0)
    seeds: int = Field(1, ge=1)  # trainings, of seed, seed + 1, ...; results.json holds their means
    weight_decay: float = Field(0.01, ge=0)
    betas: tuple[float, float] = (0.9, 0.999)
    clip: float | None = Field(1.0, gt=0)  # largest norm of the gradient
    batch_size: int = Field(64, ge=1)
    epochs: int = Field(50, ge=1)
    patience: int = Field(10, ge=1)  # epochs without a better validation AUROC
    plateau: int | None = Field(None, ge=1)  # halve lr after so many epochs without a lower validation loss
    checkpoint_every: int = Field(5, ge=0)  # epochs; 0: only when stopped
    adds: bool = False  # also train the controls without the picture, and say what the film adds
    robustness: bool = False  # also rate the test split without films, and without the last hours of the series
    samples: int = Field(1000, ge=0)  # resamples of the intervals
    workers: int = Field(0, ge=0)  # processes that read films ahead when the encoder is tuned
    precision: Literal["no", "bf16", "fp16"] = "no"
    allow_leak: bool = False  # go on with an encoder that saw a val or test subject; shown on top of the report
    cache: str | None = None  # where features of films are kept; `cache/` beside `out` if none

    @model_validator(mode="after")
    def _agree(self) -> FuseConfig:
        film = not self.model.startswith(("record_", "note_"))
        if film and (self.store is None or self.encoder is None):
            missing = " and ".join(key for key in ("store", "encoder") if getattr(self, key) is None)
            raise ValueError(f"`{missing}` missing: model={self.model} looks at films; model=record_lstm needs neither")
        if self.lr_range[0] > self.lr_range[1] or self.lr_range[0] <= 0:
            raise ValueError("`lr_range` is [lowest, highest], both above 0")
        if self.unfreeze_after is not None and self.freeze:
            raise ValueError("`unfreeze_after` needs freeze=false: it says when tuning begins")
        if self.freeze_record and self.record_weights is None:
            raise ValueError("`freeze_record` needs `record_weights`: a record branch that never learned says nothing")
        if self.record_weights is not None and self.model in ("film_only", "record_transformer", "record_gbm"):
            raise ValueError(f"`record_weights` {self.record_weights}: model={self.model} has no LSTM to take them")
        if self.freeze_record and self.model == "record_lstm":
            raise ValueError("`freeze_record` with model=record_lstm leaves nothing to train")
        if self.film_weights is not None and not film:
            raise ValueError(f"`film_weights` {self.film_weights}: model={self.model} has no film branch")
        if self.control != "none" and not (film and self.freeze):
            raise ValueError("`control` needs a model with a film and freeze=true")
        if self.adds and (not film or self.model == "film_only" or not self.freeze or self.control != "none"):
            raise ValueError("`adds` needs a model of record and film, freeze=true and control=none")
        if not film and not self.freeze:
            raise ValueError(f"`freeze` false: model={self.model} has no film encoder to tune")
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
    """What a grid is. `axes`: axis -> choice -> step -> its `key=value` words."""

    out: str  # the folder of all its runs
    steps: Annotated[dict[str, Words], Field(min_length=1)]  # step -> [pretrain | probe | fuse, CONFIG, key=value ...]
    axes: Annotated[dict[str, dict[str, dict[str, Words]]], Field(min_length=1)]

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
