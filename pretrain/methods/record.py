"""Uses of the record: condition the embeddings on it, predict it from the film, or contrast it with the film.

Missing columns of a record (`known` is false) are neither targets nor pairs. With several processes the losses are
those of the whole batch: their mean over processes equals one process on all films.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from lightly.utils import dist
from torch import Tensor, nn

from pretrain.loss import share_of_batch

if TYPE_CHECKING:
    from pretrain.methods.base import Batch


@dataclasses.dataclass(frozen=True)
class Record:
    """How the static vector (S,) is used.

    Args:
        width: S; 0: no record.
        use: condition, predict or contrast.
        inject: where it conditions: add and concat before the head, predictor after it.
        hidden: width of its embedding.
        binary: for each column, whether it is 0 or 1 (predicted by classification, else by regression); empty: none.
        weight: of the loss of predicting or contrasting.
        temperature: of the contrast.
    """

    width: int = 0
    use: Literal["condition", "predict", "contrast"] = "condition"
    inject: Literal["add", "concat", "predictor"] = "add"
    hidden: int = 128
    binary: Sequence[bool] = ()
    weight: float = 1.0
    temperature: float = 0.1

    @property
    def compared(self) -> bool:
        """Whether it has a loss of its own."""
        return self.width > 0 and self.use != "condition"


NO_RECORD = Record()


class RecordUse(nn.Module):
    """The modules of one use; without a record there are none."""

    def __init__(self, width: int, out: int, record: Record) -> None:
        super().__init__()
        self.about = record
        conditions = record.width > 0 and record.use == "condition"
        self.before_head = self.after_head = self.guess = self.film = self.reader = None
        if conditions and record.inject == "predictor":
            self.after_head = Predictor(out, record.width, max(record.hidden, out))
        elif conditions:
            made = Add(width, record.width) if record.inject == "add" else Concat(width, record.width, record.hidden)
            self.before_head = made
        elif record.width and record.use == "predict":
            self.guess = nn.Linear(width, record.width)
            binary = torch.tensor(list(record.binary) or [False] * record.width)
            self.binary: Tensor
            self.register_buffer("binary", binary, persistent=False)
        elif record.width:
            self.film = nn.Linear(width, record.hidden)
            hidden = 2 * record.hidden
            self.reader = nn.Sequential(nn.Linear(record.width, hidden), nn.GELU(), nn.Linear(hidden, record.hidden))

    def condition(self, features: Tensor, static: Tensor | None) -> Tensor:
        """(V*B, D) and the views' records (V*B, S) -> (V*B, D), before the head."""
        if self.before_head is None or static is None:
            return features
        made: Tensor = self.before_head(features, static)
        return made

    def predictor(self, projected: Tensor, static: Tensor | None) -> Tensor:
        """(V*B, out) and the views' records (V*B, S) -> (V*B, out), after the head."""
        if self.after_head is None or static is None:
            return projected
        made: Tensor = self.after_head(projected, static)
        return made

    def embed(self, views: Tensor, static: Tensor) -> dict[str, Tensor]:
        """Features of views (V, B, D) and their records (V or 1, B, S) -> the inputs of `losses`."""
        if self.guess is not None:
            return {"record_guess": self.guess(views)}
        assert self.film is not None and self.reader is not None
        return {"record_film": self.film(views), "record_read": self.reader(static)}

    def losses(self, seen: dict[str, Tensor], batch: Batch) -> dict[str, tuple[Tensor, float]]:
        """Name -> value and weight."""
        if not self.about.compared or batch.static is None:
            return {}
        views = seen["record_guess" if self.guess is not None else "record_film"]
        static, known = batch.record(len(views) * len(batch.target))
        if self.guess is not None:
            error = prediction_error(views, static.float(), known, self.binary)
            return {"record_error": (error, self.about.weight)}
        subjects = torch.arange(len(batch.target), device=known.device) + dist.rank() * len(batch.target)
        subjects = subjects if batch.subjects is None else batch.subjects
        pairs = (views, seen["record_read"], known.any(dim=2), subjects)
        return {"record_contrast": (contrast(*pairs, temperature=self.about.temperature), self.about.weight)}


def prediction_error(guess: Tensor, static: Tensor, known: Tensor, binary: Tensor) -> Tensor:
    """Squared error of numeric columns and cross-entropy of binary ones, mean over all known values of the batch.

    Args:
        guess: (V, B, S), logits where `binary` (S,).
        static, known: (V or 1, B, S).
    """
    wanted = static.expand_as(guess)
    yes = F.binary_cross_entropy_with_logits(guess, wanted.clamp(0, 1), reduction="none")
    error = torch.where(binary, yes, (guess - wanted).square())
    known = known.expand_as(guess)
    return (error * known).sum() / share_of_batch(known.sum())


def contrast(films: Tensor, records: Tensor, usable: Tensor, subjects: Tensor, *, temperature: float) -> Tensor:
    """InfoNCE in both directions between the views of films and their records, over the films of all processes.

    Args:
        films: (V, B, E); records: (V or 1, B, E).
        usable: (V or 1, B): records with information; the others are neither pairs nor negatives.
        subjects: (B,): film and record of one subject are not negatives of each other.
    """
    films, records = F.normalize(films, dim=-1), F.normalize(records, dim=-1)
    everyone, start, size = [films, records, usable[..., None], subjects[None, :, None]], 0, len(subjects)
    if dist.world_size() > 1:
        kept = [x if x.is_floating_point() else x.long() for x in everyone]
        everyone = [torch.cat(dist.gather(x.transpose(0, 1).contiguous())).transpose(0, 1) for x in kept]
        start = dist.rank() * size
    all_films, all_records, all_usable, all_subjects = everyone
    wanted = torch.arange(size, device=usable.device) + start
    hidden = (subjects[:, None] == all_subjects[0, :, 0]) | ~all_usable[:, None, :, 0].bool()  # (V or 1, B, all B)
    hidden = hidden.scatter(2, wanted.expand(len(hidden), -1)[..., None], False)
    total, usable = films.new_zeros(()), usable.expand(films.shape[:2])
    for mine, others in ((films, all_records.expand_as(all_films)), (records.expand_as(films), all_films)):
        logits = (mine @ others.transpose(1, 2) / temperature).masked_fill(hidden, -math.inf)  # (V, B, all B)
        picked = logits.log_softmax(dim=2).gather(2, wanted.expand(len(logits), -1)[..., None])[..., 0]
        total = total - 0.5 * (picked * usable).sum()
    return total / share_of_batch(usable.sum())


class Add(nn.Module):
    """h + W e with W = 0 at the start: training starts as without a record; a zero record adds nothing."""

    def __init__(self, width: int, record_width: int) -> None:
        super().__init__()
        self.weight = nn.Linear(record_width, width, bias=False)
        nn.init.zeros_(self.weight.weight)

    def forward(self, features: Tensor, static: Tensor) -> Tensor:
        return features + self.weight(static)


class Concat(nn.Module):
    """g([h; f(e)]), both linear, as published."""

    def __init__(self, width: int, record_width: int, hidden: int) -> None:
        super().__init__()
        self.record = nn.Linear(record_width, hidden)
        self.project = nn.Linear(width + hidden, width)

    def forward(self, features: Tensor, static: Tensor) -> Tensor:
        return self.project(torch.cat([features, self.record(static)], dim=1))


class Predictor(nn.Module):
    """z + g([z; e]) with two layers, the last 0 at the start: encoder and head are independent of the record."""

    def __init__(self, out: int, record_width: int, hidden: int) -> None:
        super().__init__()
        self.first = nn.Linear(out + record_width, hidden)
        self.last = nn.Linear(hidden, out)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, projected: Tensor, static: Tensor) -> Tensor:
        return projected + self.last(F.gelu(self.first(torch.cat([projected, static], dim=1))))
