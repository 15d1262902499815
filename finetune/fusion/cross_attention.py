"""Models over the tokens of a film and of its note, either of which may be missing (tasks findings, radiology).

Every model is called as `model(film, has_image, note, lengths)`:

    film       (B, N, D)  token states of a frozen encoder
    has_image  (B,)       bool
    note       (B, W, E)  token states of a frozen text encoder, zero after a note's end
    lengths    (B,)       number of tokens of the note, 0 without a note

Missing inputs and padding are masked; each side begins with a learned token, so that attention always has a key.
`film_tokens` and `note_tokens` have the depth and width of `cross_attention`: comparing the three shows for which
findings the note helps.
"""

from __future__ import annotations

import difflib
from typing import Any

import torch
from torch import Tensor, nn

from configs import UserError
from configs.plugin import is_file, load_class
from finetune.fusion.gbm import RecordGBM
from finetune.fusion.models import MODELS, Head, Output, Sizes, within


class Side(nn.Module):
    """Tokens -> (B, 1 + N, hidden) with a learned first token, and the padding mask (B, 1 + N)."""

    def __init__(self, width: int, hidden: int, places: int = 0) -> None:
        super().__init__()
        self.project = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, hidden))
        self.first = nn.Parameter(0.02 * torch.randn(hidden))
        self.place = nn.Parameter(0.02 * torch.randn(places, hidden)) if places else None  # position in the film

    def forward(self, tokens: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
        tokens = self.project(torch.where(present[..., None], tokens, 0.0))
        tokens = tokens if self.place is None else tokens + self.place
        tokens = torch.cat([self.first.expand(len(tokens), 1, -1), tokens], dim=1)
        return tokens, torch.cat([torch.zeros_like(present[:, :1]), ~present], dim=1)


class CrossAttention(nn.Module):
    """Film tokens attend to the note's and note tokens to the film's, layer by layer; a head on the two means."""

    sees: tuple[str, ...] = ("film", "note")
    reads_tokens = True

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        of = {"film": (sizes.film, sizes.places), "note": (sizes.text, 0)}
        self.sides = nn.ModuleDict({name: Side(of[name][0], sizes.hidden, of[name][1]) for name in self.sees})
        self.layers = nn.ModuleList(
            nn.ModuleDict({name: _layer(sizes, cross=len(self.sees) > 1) for name in self.sees})
            for _ in range(sizes.layers)
        )
        self.norm = nn.LayerNorm(len(self.sees) * sizes.hidden)
        self.drop = nn.Dropout(sizes.dropout)
        self.head = Head(len(self.sees) * sizes.hidden, sizes.labels)

    def forward(self, film: Tensor, has_image: Tensor, note: Tensor, lengths: Tensor) -> Output:
        given = {
            "film": (film, has_image[:, None].expand(film.shape[:2])),
            "note": (note, within(lengths, note.shape[1])),
        }
        states, absent = {}, {}
        for name in self.sees:
            states[name], absent[name] = self.sides[name](*given[name])
        for layer in self.layers:
            states = {name: self._step(layer, name, states, absent) for name in self.sees}
        means = [_mean(states[name], ~absent[name]) for name in self.sees]
        return Output(self.head(self.drop(self.norm(torch.cat(means, dim=1)))))

    def _step(self, layers: Any, name: str, states: dict[str, Tensor], absent: dict[str, Tensor]) -> Tensor:
        """One layer of one side; both sides of a layer read the states before it."""
        layer = layers[name]
        if len(self.sees) == 1:
            out: Tensor = layer(states[name], src_key_padding_mask=absent[name])
            return out
        other = next(n for n in self.sees if n != name)
        out = layer(
            states[name], states[other], tgt_key_padding_mask=absent[name], memory_key_padding_mask=absent[other]
        )
        return out


class FilmTokens(CrossAttention):
    """The film alone: its tokens attend to each other."""

    sees = ("film",)


class NoteTokens(CrossAttention):
    """The note alone: its tokens attend to each other."""

    sees = ("note",)
    uses_film = False


TOKEN_MODELS: dict[str, type[nn.Module]] = {
    "cross_attention": CrossAttention,
    "film_tokens": FilmTokens,
    "note_tokens": NoteTokens,
}
KINDS: dict[str, Any] = {**MODELS, **TOKEN_MODELS, "record_gbm": RecordGBM}  # every model that `fuse` trains


def kind_of(name: str) -> Any:
    """The class of a model: ours by its name, or one of a user's file, `my_model.py:MyModel`.

    Raises: UserError: there is no such model, file or class.
    """
    if name in KINDS:
        return KINDS[name]
    if not is_file(name):
        near = difflib.get_close_matches(name, KINDS, n=1)
        hint = f"did you mean `{near[0]}`? " if near else ""
        raise UserError(f"model={name}: {hint}There are {', '.join(KINDS)}, or a class of your own, FILE.py:Class")
    return load_class(name, nn.Module, "model")


def _layer(sizes: Sizes, cross: bool) -> nn.Module:
    """Self-attention, attention to the other side if there is one, and an MLP; pre-norm."""
    kind = nn.TransformerDecoderLayer if cross else nn.TransformerEncoderLayer
    heads = max(1, sizes.hidden // 32)
    return kind(
        sizes.hidden, heads, 2 * sizes.hidden, sizes.dropout, "gelu", batch_first=True, norm_first=True
    )  # fmt: skip


def _mean(states: Tensor, present: Tensor) -> Tensor:
    """The mean over unmasked tokens: (B, N, H), (B, N) -> (B, H)."""
    return (states * present[..., None]).sum(1) / present.sum(1, keepdim=True)
