"""ICU fusion models: logits from a record (hourly series) and the films taken before the prediction. One class each.

Every model is called as `model(series, lengths, film, has_image, hours)` and returns an `Output`:

    series     (B, T, F)  normalised, zero after a stay's end
    lengths    (B,)       hours of the series without padding, >= 1
    film       (B, D)     the encoder's features of the last film, zero if there is none
    has_image  (B,)       bool
    hours      (B,)       hours between the film and the prediction, 0 without a film

A model with `many_films` gets the last K films, oldest first, padded on the right: (B, K, D), (B, K), (B, K).

Outputs do not depend on values after a stay's end, in place of a missing film, or in other rows.

Differs from MedFuse (arXiv:2207.07027): means over time exclude the padding (published: they depend on the other rows
of a batch); a batch of one works; DAFT and MMTM accept stays without a film (scale 1, shift 0; gate 1); each branch has
its own head, for an additional loss (`part_weight`) that trains both.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional


@dataclass(frozen=True)
class Sizes:
    """Sizes of a model; the defaults are the published ones."""

    inputs: int  # F, columns of the series
    film: int  # D, width of a film's features
    labels: int  # L, logits
    hidden: int = 256  # width of the record's LSTM, and of a projected film
    layers: int = 2
    joint: int = 512  # width of MedFuse's second LSTM
    dropout: float = 0.3
    missing: Literal["zero", "learnable"] = "learnable"  # concat's token for an absent film
    film_labels: int | None = None  # the film branch's own head, if it was trained on other labels
    text: int = 0  # width of a note's vector, or of its token states; 0: no notes
    places: int = 0  # tokens of a film, of the models over tokens


class Output(NamedTuple):
    """logits (B, L); parts: the logits of each branch; weights of record, film (, note), if the model has them."""

    logits: Tensor
    parts: dict[str, Tensor] = {}
    weights: Tensor | None = None


class Note(NamedTuple):
    """The film's note as one more token: text (B, D), zero without a note; has_text, has_record (B,) bool."""

    text: Tensor
    has_text: Tensor
    has_record: Tensor


class Head(nn.Linear):
    """A linear layer in fp32 under any autocast: bf16 logits (8 bits of mantissa) have ties."""

    def forward(self, input: Tensor) -> Tensor:
        with torch.autocast(input.device.type, enabled=False):
            return super().forward(input.float())


class LSTM(nn.LSTM):
    """In fp32 on a CPU under any autocast: many processors have no LSTM in bf16."""

    def forward(self, input: Any, hx: Any = None) -> Any:
        with torch.autocast("cpu", enabled=False) if input.device.type == "cpu" else nullcontext():
            return super().forward(input.float() if input.device.type == "cpu" else input, hx)


class RecordLSTM(nn.Module):
    """LSTMs over the hourly series; the last hour's state, dropout, a linear head. 874,777 weights for 76 -> 25."""

    uses_film = False

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        widths = [sizes.inputs, *[sizes.hidden] * sizes.layers]
        self.layers = nn.ModuleList(LSTM(a, b, batch_first=True) for a, b in pairwise(widths))
        self.drop = nn.Dropout(sizes.dropout)
        self.head = Head(sizes.hidden, sizes.labels)
        for name, weight in self.layers.named_parameters():
            {"weight_ih": nn.init.xavier_uniform_, "weight_hh": nn.init.orthogonal_}.get(
                name.split(".")[1][:9], nn.init.zeros_
            )(weight)

    def begin(self, series: Tensor) -> Tensor:
        """The first layer's states: (B, T, F) -> (B, T, hidden)."""
        states: Tensor = self.layers[0](series)[0]
        return states

    def finish(self, states: Tensor, lengths: Tensor) -> Tensor:
        """The other layers, and their state at the last hour: (B, T, hidden) -> (B, hidden)."""
        for layer in self.layers[1:]:
            states, _ = layer(states)
        return self.drop(last_hour(states, lengths))

    def encode(self, series: Tensor, lengths: Tensor) -> Tensor:
        """(B, T, F) -> (B, hidden)"""
        return self.finish(self.begin(series), lengths)

    def forward(self, series: Tensor, lengths: Tensor, film: Tensor, has_image: Tensor, hours: Tensor) -> Output:
        return Output(self.head(self.encode(series, lengths)))


class RecordTransformer(nn.Module):
    """A pre-norm transformer over the hours; mean over the hours of the stay."""

    uses_film = False

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        width = sizes.hidden
        self.embed = nn.Linear(sizes.inputs, width)
        layer = nn.TransformerEncoderLayer(
            width, max(1, width // 32), 2 * width, sizes.dropout, "gelu", batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, sizes.layers, nn.LayerNorm(width), enable_nested_tensor=False)
        self.drop = nn.Dropout(sizes.dropout)
        self.head = Head(width, sizes.labels)

    def forward(self, series: Tensor, lengths: Tensor, film: Tensor, has_image: Tensor, hours: Tensor) -> Output:
        tokens = self.embed(series)  # (B, T, F) -> (B, T, hidden)
        tokens = tokens + wave(torch.arange(tokens.shape[1], device=tokens.device), tokens.shape[2])
        padding = ~within(lengths, tokens.shape[1])
        return Output(self.head(self.drop(mean_hours(self.layers(tokens, src_key_padding_mask=padding), lengths))))


class FilmOnly(nn.Module):
    """A linear head on the film's features."""

    needs_film = True

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.drop = nn.Dropout(sizes.dropout)
        self.head = Head(sizes.film, sizes.film_labels or sizes.labels)

    def forward(self, series: Tensor, lengths: Tensor, film: Tensor, has_image: Tensor, hours: Tensor) -> Output:
        return Output(self.head(self.drop(film)))


class Fusion(nn.Module):
    """The two branches with their own heads, and the film projected to the record's width."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.record = RecordLSTM(sizes)
        self.film = FilmOnly(sizes)
        self.project = nn.Linear(sizes.film, sizes.hidden)
        self.same_labels = sizes.film_labels in (None, sizes.labels)
        if sizes.text:
            self.note = nn.Sequential(nn.Dropout(sizes.dropout), nn.Linear(sizes.text, sizes.hidden))

    def tokens(self, record: Tensor, film: Tensor, has_image: Tensor, note: Note | None) -> tuple[Tensor, Tensor]:
        """Record, film and, if used, note: (B, n, hidden), zero if missing; and their presence (B, n)."""
        tokens, present = [record, self.project(film)], [torch.ones_like(has_image), has_image]
        if note is not None:
            tokens, present = [*tokens, self.note(note.text)], [note.has_record, has_image, note.has_text]
        there = torch.stack(present, dim=1)
        return torch.stack(tokens, dim=1) * there[..., None], there

    def parts(self, record: Tensor, film: Tensor) -> dict[str, Tensor]:
        """The logits of each branch alone: record (B, hidden) and film (B, D) -> (B, L) each."""
        parts = {"record": self.record.head(record)}
        if self.same_labels:
            parts["film"] = self.film.head(self.film.drop(film))
        return parts


class MedFuse(Fusion):
    """An LSTM over the tokens [record, film, note], skipping missing ones."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__(sizes)
        self.fuse = LSTM(sizes.hidden, sizes.joint, batch_first=True)
        self.head = Head(sizes.joint, sizes.labels)

    def forward(
        self, series: Tensor, lengths: Tensor, film: Tensor, has_image: Tensor, hours: Tensor, note: Note | None = None
    ) -> Output:
        record = self.record.encode(series, lengths)
        tokens, present = self.tokens(record, film, has_image, note)
        order = (~present).long().argsort(dim=1, stable=True)  # move present tokens to the left, in the same order
        states, _ = self.fuse(tokens.gather(1, order[..., None].expand_as(tokens)))
        count = present.sum(1).clamp(min=1)  # if all are missing: one token of zeros
        return Output(self.head(last_hour(states, count)), self.parts(record, film))


class MedFuseTime(Fusion):
    """An LSTM over [record, films in time order]; a film's token contains its age and its change to the film before."""

    many_films = True

    def __init__(self, sizes: Sizes) -> None:
        super().__init__(sizes)
        self.project = nn.Linear(2 * sizes.film + 1, sizes.hidden)
        self.fuse = LSTM(sizes.hidden, sizes.joint, batch_first=True)
        self.head = Head(sizes.joint, sizes.labels)

    def forward(self, series: Tensor, lengths: Tensor, film: Tensor, has_image: Tensor, hours: Tensor) -> Output:
        record = self.record.encode(series, lengths)
        change = torch.cat([torch.zeros_like(film[:, :1]), film[:, 1:] - film[:, :-1]], dim=1)  # films are left-aligned
        age = torch.log1p(hours.clamp(min=0))[..., None] / 4
        films = self.project(torch.cat([film, change, age], dim=2))  # (B, K, 2 D + 1) -> (B, K, hidden)
        states, _ = self.fuse(torch.cat([record[:, None], films], dim=1))
        count = has_image.sum(1)
        return Output(self.head(last_hour(states, 1 + count)), self.parts(record, last_hour(film, count.clamp(min=1))))


class Concat(Fusion):
    """A linear head on [record, projected film], with zeros or a learned token in place of a missing film."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__(sizes)
        self.token = nn.Parameter(torch.zeros(sizes.hidden), requires_grad=sizes.missing == "learnable")
        self.head = Head(2 * sizes.hidden, sizes.labels)

    def forward(self, series: Tensor, lengths: Tensor, film: Tensor, has_image: Tensor, hours: Tensor) -> Output:
        record = self.record.encode(series, lengths)
        token = torch.where(has_image[:, None], self.project(film), self.token)
        return Output(self.head(torch.cat([record, token], dim=1)), self.parts(record, film))


class Attention(Fusion):
    """Weights record, film and note for each stay by learned scores; missing ones have weight 0.

    All are normalised to one scale first: an LSTM state is within 1, a projected film is not; one head reads the mean.
    """

    def __init__(self, sizes: Sizes) -> None:
        super().__init__(sizes)
        self.norms = nn.ModuleList(nn.LayerNorm(sizes.hidden) for _ in range(2 + (sizes.text > 0)))
        self.score = nn.Sequential(nn.Linear(sizes.hidden, sizes.hidden), nn.Tanh(), nn.Linear(sizes.hidden, 1))
        self.head = Head(sizes.hidden, sizes.labels)

    def forward(
        self, series: Tensor, lengths: Tensor, film: Tensor, has_image: Tensor, hours: Tensor, note: Note | None = None
    ) -> Output:
        record = self.record.encode(series, lengths)
        given, present = self.tokens(record, film, has_image, note)
        tokens = torch.stack([norm(token) for norm, token in zip(self.norms, given.unbind(1), strict=True)], dim=1)
        weights = self.score(tokens)[..., 0].masked_fill(~present, -1e9).softmax(dim=1) * present
        fused = (weights[..., None] * tokens).sum(1)
        return Output(self.head(fused), self.parts(record, film), weights)


class Late(Fusion):
    """Two branches trained separately; their logits are averaged with a weight chosen on validation."""

    share: Tensor

    def __init__(self, sizes: Sizes) -> None:
        super().__init__(sizes)
        assert self.same_labels, "both branches predict the same labels"
        del self.project
        self.register_buffer("share", torch.tensor(0.5))  # weight of the film

    def forward(self, series: Tensor, lengths: Tensor, film: Tensor, has_image: Tensor, hours: Tensor) -> Output:
        parts = self.parts(self.record.encode(series, lengths), film)
        share = self.share * has_image[:, None]
        logits = torch.lerp(parts["record"], parts["film"], share.expand_as(parts["film"]))  # both fp32, from `Head`
        return Output(logits.detach(), parts)


class DAFT(Fusion):
    """Film and record together scale and shift the record's states; the film acts only through the record.

    Source: the direction is MedFuse's; the DAFT paper (arXiv:2107.09311) modulates the image by the table.
    """

    def __init__(self, sizes: Sizes) -> None:
        super().__init__(sizes)
        del self.project
        bottleneck = max(1, (sizes.film + sizes.hidden) // 7)
        self.squeeze = nn.Linear(sizes.film + sizes.hidden, bottleneck, bias=False)
        self.scale = nn.Linear(bottleneck, sizes.hidden, bias=False)
        self.shift = nn.Linear(bottleneck, sizes.hidden, bias=False)

    def forward(self, series: Tensor, lengths: Tensor, film: Tensor, has_image: Tensor, hours: Tensor) -> Output:
        states = self.record.begin(series)
        joint = functional.relu(self.squeeze(torch.cat([film, mean_hours(states, lengths)], dim=1)))
        scale, shift = (has_image[:, None] * way(joint) for way in (self.scale, self.shift))  # (B, hidden)
        record = self.record.finish(states * (1 + scale)[:, None] + shift[:, None], lengths)
        parts = self.parts(record, film)
        return Output(parts.pop("record"), parts)


class MMTM(Fusion):
    """Film and record gate each other's channels after their last common layer; a head on both.

    The film's side is the mean over its last map or patch tokens: gating channels and averaging positions commute, so
    the map itself is not needed. Source: arXiv:1911.08670.
    """

    pool = "avg"

    def __init__(self, sizes: Sizes, ratio: int = 4) -> None:
        super().__init__(sizes)
        squeezed = 2 * (sizes.film + sizes.hidden) // ratio
        self.squeeze = nn.Linear(sizes.film + sizes.hidden, squeezed)
        self.gate_record = nn.Linear(squeezed, sizes.hidden)
        self.gate_film = nn.Linear(squeezed, sizes.film)
        self.head = Head(2 * sizes.hidden, sizes.labels)

    def forward(self, series: Tensor, lengths: Tensor, film: Tensor, has_image: Tensor, hours: Tensor) -> Output:
        states = self.record.begin(series)
        joint = functional.relu(self.squeeze(torch.cat([film, mean_hours(states, lengths)], dim=1)))
        gate = torch.where(has_image[:, None], 2 * self.gate_record(joint).sigmoid(), 1.0)
        record = self.record.finish(states * gate[:, None], lengths)
        film = film * 2 * self.gate_film(joint).sigmoid()
        token = self.project(film) * has_image[:, None]
        return Output(self.head(torch.cat([record, token], dim=1)), self.parts(record, film))


MODELS: dict[str, type[nn.Module]] = {
    "record_lstm": RecordLSTM,
    "record_transformer": RecordTransformer,
    "film_only": FilmOnly,
    "medfuse": MedFuse,
    "medfuse_time": MedFuseTime,
    "concat": Concat,
    "attention": Attention,
    "late": Late,
    "daft": DAFT,
    "mmtm": MMTM,
}


def last_hour(states: Tensor, lengths: Tensor) -> Tensor:
    """The state at the last unpadded step: (B, T, H), (B,) >= 1 -> (B, H)."""
    return states[torch.arange(len(states), device=states.device), lengths - 1]


def within(lengths: Tensor, steps: int) -> Tensor:
    """True for unpadded steps: (B,) -> (B, T)."""
    return torch.arange(steps, device=lengths.device) < lengths[:, None]


def mean_hours(states: Tensor, lengths: Tensor) -> Tensor:
    """The mean over unpadded steps: (B, T, H) -> (B, H)."""
    return (states * within(lengths, states.shape[1])[..., None]).sum(1) / lengths[:, None]


def wave(steps: Tensor, width: int) -> Tensor:
    """Sines and cosines of the hour: (T,) -> (T, width)."""
    rates = torch.exp(torch.arange(0, width, 2, device=steps.device) * (-math.log(1e4) / width))
    angles = steps[:, None] * rates
    return torch.stack([angles.sin(), angles.cos()], dim=2).flatten(1)[:, :width]
