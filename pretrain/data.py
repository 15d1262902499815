"""The films that a run trains on, and the batch of each step.

Input: features/ (films, subjects, EHR columns; never a label) and store/. Output: step -> batch, a pure function of the
config, so that a run can resume at any step and does not depend on workers; process r of n gets part r of a batch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from configs import UserError
from configs.signals import held, ignore
from ehr_features import files as lock
from ehr_features import static
from ehr_features.config import TEXT_GROUP
from ehr_features.files import file_digest, read_table
from ehr_features.own_films.config import Columns, TableConfig
from ehr_features.own_films.read import FilmsTable, read_films_table
from ehr_features.own_films.record import check_groups, encode_group, refuse_constant
from ehr_features.schema import FRONTAL
from pretrain.config import FilmsConfig
from pretrain.draws import film_keys, uniforms, within_cap
from pretrain.encoder.preprocess import Preprocess
from pretrain.methods.base import Batch
from pretrain.run import share
from pretrain.text.notes import TextSource, text_columns
from pretrain.views import Plan, Views, cut, draw, draw_keep, draw_noise, mask_cells, turn

if TYPE_CHECKING:
    from pretrain.store import Store


@dataclasses.dataclass
class Films:
    """The films of a run, sorted by dicom_id.

    Attributes:
        table: dicom_id, study_id, subject_id, taken_at, split; N rows.
        static: (N, S) float32; `columns`: their S names; `column_groups`: the group of each.
        known: (N, S), whether the film's record tells the column; None: all.
        available_at: group -> study, admission or discharge.
        text: what the group `text` was read from, for encoder.json; None without it.
        left_out: reason -> number of films.
        source_hash: 16 hex digits of the films and their split, whichever of them are taken.
        said: notes for the log on how a table of films outside MIMIC was read.
    """

    table: pd.DataFrame
    static: np.ndarray
    columns: list[str]
    column_groups: list[str]
    available_at: dict[str, str]
    left_out: dict[str, int]
    text: dict[str, Any] | None = None
    known: np.ndarray | None = None
    source_hash: str = ""
    said: tuple[str, ...] = ()
    keys: np.ndarray = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        self.keys = film_keys(self.table["dicom_id"].tolist())
        self.known = np.ones(self.static.shape, bool) if self.known is None else self.known
        self.subjects = pd.factorize(self.table["subject_id"])[0]

    def __len__(self) -> int:
        return len(self.table)

    def permute_record(self, seed: int) -> None:
        """Give each film the record of another subject's film: a control in which record and film are unrelated."""
        assert self.known is not None
        order = np.argsort(uniforms(self.keys, 1, seed, 0, "permuted record")[:, 0], kind="stable")
        others, who = np.roll(order, 1)[np.argsort(order)], self.subjects
        for row in np.flatnonzero(who[others] == who):  # exchange with the first film where that helps both
            helps = order[(who[others[order]] != who[row]) & (who[others[row]] != who[order])]
            others[[row, *helps[:1]]] = others[[*helps[:1], row]]
        self.static, self.known = self.static[others], self.known[others]

    @property
    def binary(self) -> list[bool]:
        """Of each column of the record, whether it is 0 or 1."""
        return [bool(np.isin(column, (0, 1)).all()) for column in self.static.T]


@dataclasses.dataclass
class Source:
    """All films of a features/ folder or of a table, with the record of each.

    Attributes:
        table: dicom_id, study_id, subject_id, taken_at, split, view; N rows, sorted by dicom_id.
        groups, encoded: the EHR groups, and of each the values (N, S) and their names.
    """

    name: str
    table: pd.DataFrame
    groups: list[str]
    encoded: list[tuple[np.ndarray, list[str]]]
    available_at: dict[str, str]
    hash: str
    left_out: dict[str, int] = dataclasses.field(default_factory=dict)
    said: tuple[str, ...] = ()


def select_films(
    features: str | Path | None,
    store: Store,
    films: FilmsConfig,
    groups: Sequence[str],
    preset: str,
    seed: int,
    text: TextSource | None = None,
) -> Films:
    """The films to train on, with their EHR vectors.

    Args:
        features: a features/ folder; None: `films.table`.
        groups: names of ehr_features.static, or columns of the table, and `text`, which is read from `text`.
    Raises: UserError: no film is left, or an EHR group or column does not exist.
    """
    own = None
    if features is not None:
        source = from_features(features, groups, preset)
    else:
        source, own = from_table(films, groups)
    table, groups, encoded = source.table, source.groups, source.encoded
    keep, left_out = _kept(table, store, films, seed, source.name)
    if own is not None:
        for group, each in zip(groups, encoded, strict=True):
            refuse_constant(own, group, each, keep, source.name)
    about = None
    if text is not None:
        values, names, about = text_columns(text, table, keep)
        groups, encoded = [*groups, TEXT_GROUP], [*encoded, (values, names)]
    array = np.concatenate([e[0] for e in encoded], axis=1) if encoded else np.zeros((len(table), 0), np.float32)
    return Films(
        table=table.loc[keep, ["dicom_id", "study_id", "subject_id", "taken_at", "split"]].reset_index(drop=True),
        static=array[keep],
        columns=[name for e in encoded for name in e[1]],
        column_groups=_repeated(groups, encoded),
        available_at=source.available_at | ({TEXT_GROUP: "study"} if text is not None else {}),
        left_out=source.left_out | left_out,
        text=about,
        known=static.known(array, [name for e in encoded for name in e[1]], _repeated(groups, encoded))[keep],
        source_hash=source.hash,
        said=source.said,
    )


def from_features(features: str | Path, groups: Sequence[str], preset: str) -> Source:
    """The films of a features/ folder."""
    name = f"{features}/images.parquet"
    known = static.resolve(static.without_text(groups), preset)
    keys = ["dicom_id", "study_id", "subject_id", "taken_at", "split", "view"]
    table = read_table(
        features, "images", lambda have: [*keys, *sorted(set(static.reads(known, preset, have)) - set(keys))]
    ).sort_values("dicom_id", ignore_index=True)
    encoded = [_encode(table, group, preset, name) for group in known]
    return Source(name, table, known, encoded, static.available_at(known, preset), file_digest(name))


def from_table(films: FilmsConfig, groups: Sequence[str]) -> tuple[Source, FilmsTable]:
    """The films of a table outside MIMIC; of its labels nothing is read."""
    config = TableConfig.model_validate(films.model_dump(include=set(Columns.model_fields)))
    own, known = read_films_table(config, labels=False).by_id(), static.without_text(groups)
    check_groups(own, known, config.table)
    train = (own.films["split"] == "train").to_numpy()
    if known and not train.any():
        raise UserError(f"{config.table}: no film of split train, on which EHR groups are fitted")
    encoded = [encode_group(own, group, train, config.categories, config.table) for group in known]
    when = {group: "discharge" if group in config.outcomes else "study" for group in known}
    said = (*own.said, *(f"warning: {warning}" for warning in own.warnings))
    return Source(config.table, own.films, list(known), encoded, when, own.digest, own.left_out, said), own


def _repeated(groups: Sequence[str], encoded: Sequence[tuple[np.ndarray, list[str]]]) -> list[str]:
    """The group of each column."""
    return [group for group, e in zip(groups, encoded, strict=True) for _ in e[1]]


def _encode(table: pd.DataFrame, group: str, preset: str, source: str) -> tuple[np.ndarray, list[str]]:
    try:
        return static.encode(table, [group], preset=preset)[:2]
    except UserError:
        raise
    except (ValueError, TypeError):  # their messages would quote a patient's value
        raise UserError(
            f"{source}: a column of EHR group `{group}` holds values of another type; is it ours?"
        ) from None


def _kept(
    table: pd.DataFrame, store: Store, films: FilmsConfig, seed: int, name: str
) -> tuple[np.ndarray, dict[str, int]]:
    """(N,) bool: films to keep; and the number left out for each reason."""
    keep, left_out = np.ones(len(table), bool), {}

    def drop(reason: str, those: pd.Series | np.ndarray) -> None:
        gone = keep & np.asarray(those, bool)
        left_out[reason] = int(gone.sum())
        keep[gone] = False

    drop(f"not of split {', '.join(films.splits)}", ~table["split"].isin(films.splits))
    if films.views == "frontal":
        drop("not a frontal view", ~table["view"].isin(FRONTAL))
    drop("not in the store", ~table["dicom_id"].isin(set(store.index["dicom_id"])))
    if films.per_subject_cap is not None:
        drop("over per_subject_cap", ~within_cap(table, keep, films.per_subject_cap, seed))
    if not keep.any():
        reasons = "; ".join(f"{number} {reason}" for reason, number in left_out.items())
        raise UserError(f"no film to train on: of {len(table)} in {Path(name).name}, {reasons}. Is this their store?")
    return keep, left_out


@dataclasses.dataclass(frozen=True)
class Cutter:
    """From films to the views of a step.

    Args:
        masked: kinds of view that are masked.
        patch: pixels of a patch (ViT) or of a masked cell (convolutional).
        is_vit: patches are dropped inside the network; else cells of the input are filled.
    """

    target: Views
    random: Views
    focal: Views
    preprocess: Preprocess
    patch: int
    is_vit: bool
    mask_ratio: float
    masked: tuple[str, ...]
    fill: str
    seed: int
    block: bool = False

    def plan(self, keys: np.ndarray, side: int, epoch: int) -> dict[str, Any]:
        """Boxes, kept patches and noise of a batch, on the CPU."""
        kinds = {"target": self.target, "random": self.random, "focal": self.focal}
        plans: dict[str, Any] = {k: draw(v, keys, side, self.seed, epoch, k) for k, v in kinds.items() if v.count}
        for kind, views in kinds.items():
            if views.count and kind in self.masked and self.mask_ratio:
                patches = (views.size // self.patch) ** 2
                arguments = (views.count, patches, self.mask_ratio, self.seed, epoch, f"{kind} mask", self.block)
                plans[f"{kind} keep"] = draw_keep(keys, *arguments)
                if not self.is_vit and self.fill == "noise":
                    plans[f"{kind} noise"] = draw_noise(
                        keys, views.count, views.size, self.seed, epoch, f"{kind} noise"
                    )
        return plans

    def cut(self, raw: dict[str, Any]) -> Batch:
        """Cut the batch on the device that holds the films."""
        films, device = raw["films"], raw["films"].device
        plans: dict[str, Any] = {k: p.to(device) for k, p in raw["plans"].items()}
        turned = turn(films) if device.type == "cpu" else None
        target = (
            self._views(raw["target films"], plans["target"])
            if "target films" in raw
            else self._views(films, plans["target"], turned)
        )
        anchors: list[Tensor] = []
        keeps: list[Tensor | None] = []
        for kind in ("random", "focal"):
            if kind not in plans:
                continue
            views, keep = self._views(films, plans[kind], turned), plans.get(f"{kind} keep")
            if keep is not None and not self.is_vit:
                views = mask_cells(views, keep, self.patch, self._filler(views, plans.get(f"{kind} noise"), len(films)))
                keep = None
            anchors.append(views)
            keeps.append(keep)
        told = {name: raw.get(name) for name in ("static", "known", "subjects", "target_static", "target_known")}
        return Batch(target, anchors, keeps, target_keep=plans.get("target keep"), **told)

    def _filler(self, views: Tensor, noise: Tensor | None, number: int) -> Tensor:
        """Content of masked cells: noise, the next film of this process's batch, or the mean (0)."""
        if noise is not None:
            return noise
        return (
            views.unflatten(0, (-1, number)).roll(1, dims=1).flatten(0, 1)
            if self.fill == "film"
            else views.new_zeros(1)
        )

    def _views(self, films: Tensor, plan: Plan, turned: Tensor | None = None) -> Tensor:
        mean = std = None
        if self.preprocess.normalise == "film":
            std, mean = torch.std_mean(films.float() / 255, dim=(1, 2), correction=0)
            mean, std = (x.repeat(len(plan.boxes)) for x in (mean, std))
        return self.preprocess.to_input(cut(films, plan, turned), mean, std)


class Steps(Dataset[Any]):
    """Item i is the input of step i on this process: films (or their views), plans, EHR vectors."""

    def __init__(
        self,
        films: Films,
        store: Store,
        cutter: Cutter,
        *,
        batch_size: int,
        rank: int = 0,
        world: int = 1,
        partners: Partners | None = None,
        dropout: float = 0.0,
        cut_here: bool = True,
    ) -> None:
        if batch_size > len(films):
            raise UserError(f"optim.batch_size {batch_size} is more than the {len(films)} films to train on; lower it")
        local = share(batch_size, world, "optim.batch_size")
        self.films, self.store, self.cutter, self.partners = films, store, cutter, partners
        self.batch_size, self.dropout, self.cut_here = batch_size, dropout, cut_here
        self.part = slice(rank * local, (rank + 1) * local)
        self.steps_per_epoch = len(films) // batch_size
        self.dicom_ids = films.table["dicom_id"].to_numpy(object)
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0, int))

    def rows(self, step: int) -> np.ndarray:
        """The films of a step on this process, as rows of `films`."""
        epoch, place = divmod(step, self.steps_per_epoch)
        if self._order[0] != epoch:
            shuffled = np.argsort(uniforms(self.films.keys, 1, self.cutter.seed, epoch, "order")[:, 0], kind="stable")
            self._order = (epoch, shuffled)
        return self._order[1][place * self.batch_size : (place + 1) * self.batch_size][self.part]

    def __getitem__(self, step: int) -> dict[str, Any] | Batch:
        epoch, rows = step // self.steps_per_epoch, self.rows(step)
        keys = self.films.keys[rows]
        raw: dict[str, Any] = {"films": self._read(rows), "keys": keys, "epoch": epoch}
        whose = {"": rows}
        if self.partners is not None:
            whose["target_"] = self.partners(rows, uniforms(keys, 1, self.cutter.seed, epoch, "partner")[:, 0])
            raw["target films"] = self._read(whose["target_"])
        raw["plans"] = self.cutter.plan(keys, raw["films"].shape[-1], epoch)
        if self.films.static.shape[1]:
            for view, of in whose.items():
                static, known = self._record(of, keys, epoch)
                raw |= {f"{view}static": torch.from_numpy(static), f"{view}known": torch.from_numpy(known)}
            raw["subjects"] = torch.from_numpy(self.films.subjects[rows])
        return self.cutter.cut(raw) if self.cut_here else raw

    def _read(self, rows: np.ndarray) -> Tensor:
        return torch.from_numpy(self.store.read(self.dicom_ids[rows].tolist()))

    def _record(self, rows: np.ndarray, keys: np.ndarray, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """(B, S) of the record, and whether it is known; both without the groups that are blanked in this epoch."""
        assert self.films.known is not None
        record, known = self.films.static[rows], self.films.known[rows]
        if not self.dropout:
            return record, known
        codes, names = pd.factorize(np.array(self.films.column_groups, dtype=object))
        u = uniforms(keys, len(names), self.cutter.seed, epoch, "record dropout")
        kept = (u >= self.dropout)[:, codes]
        return record * kept.astype(np.float32), known & kept


# ---- Batches in order: workers read films; a GPU cuts the views of one batch while the next one is read.


def batches(steps: Steps, start: int, end: int, workers: int, device: torch.device) -> Generator[Batch, None, None]:
    """The batches of steps `start` to `end` - 1."""
    options: dict[str, Any] = {"persistent_workers": True, "prefetch_factor": 2, "worker_init_fn": begin_worker}
    loader = DataLoader(
        steps,
        batch_size=None,
        sampler=range(start, end),
        num_workers=workers,
        pin_memory=device.type == "cuda",  # allows asynchronous copies
        collate_fn=_as_it_is,
        **(options if workers else {}),
    )
    with held():  # hold signals while the workers start
        items = iter(loader)
    for item in own_errors(items):
        yield item if isinstance(item, Batch) else steps.cutter.cut(to_device(item, device))


def own_errors(items: Iterator[Any]) -> Iterator[Any]:
    """The items of a loader. A UserError of a worker keeps its sentence, without the traceback that torch writes
    around it. The workers end with the last item or the first error: they ignore SIGTERM, so that a command that left
    them to the end of its process would wait for them for ever."""
    try:
        yield from items
    except UserError as error:
        raise UserError(str(error).rpartition("UserError: ")[2].strip()) from None
    finally:
        getattr(items, "_shutdown_workers", lambda: None)()


def to_device(raw: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Copy tensors to the device, asynchronously."""
    return {key: x.to(device, non_blocking=True) if isinstance(x, Tensor) else x for key, x in raw.items()}


def _as_it_is(item: Any) -> Any:
    return item


def begin_worker(_: int) -> None:
    """Ignore signals, which only the main process handles by saving; close the inherited lock of the folder."""
    ignore()
    lock.forget()


# ---- Pairs of an anchor film and another target film: `films.positives: study | patient`.


class Partners:
    """For each film, another of the same study, or of the same subject within some days; else the film itself.

    Both are of the same split, even if the subject's films are in several.
    """

    def __init__(self, table: pd.DataFrame, by: str, max_days: float | None) -> None:
        columns = ["split", "subject_id", *(["study_id"] if by == "study" else [])]
        codes = table.groupby(columns, sort=False, dropna=False).ngroup().to_numpy()
        self.order = np.argsort(codes, kind="stable")
        self.start = np.searchsorted(codes[self.order], codes, "left")
        self.end = np.searchsorted(codes[self.order], codes, "right")
        taken = pd.to_datetime(table["taken_at"])
        self.days = ((taken - taken.min()) / pd.Timedelta(days=1)).to_numpy(np.float64)
        self.max_days = max_days

    def __call__(self, rows: np.ndarray, u: np.ndarray) -> np.ndarray:
        """rows (B,) -> partners (B,), drawn by u (B,) in [0, 1)."""
        return np.array([self._one(int(row), x) for row, x in zip(rows, u, strict=True)])

    def count(self) -> int:
        """Number of films that have another."""
        return sum(len(self._others(row)) > 0 for row in range(len(self.order)))

    def _others(self, row: int) -> np.ndarray:
        others = self.order[self.start[row] : self.end[row]]
        others = others[others != row]
        if self.max_days is not None:
            others = others[np.abs(self.days[others] - self.days[row]) <= self.max_days]
        return others

    def _one(self, row: int, u: float) -> int:
        others = self._others(row)
        return int(others[int(u * len(others))]) if len(others) else row
