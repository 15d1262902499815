"""The film encoder of a fusion model, frozen or tuned, and the scale of its features.

Input: batches of `Samples.batch`. Output: the `Output` of the model. Missing films are not encoded.
"""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from configs import UserError
from ehr_features.typed import undamaged
from finetune.encoders import pooled
from finetune.fusion.models import Note, Output
from finetune.fusion.samples import CONTEXT
from pretrain import encoder as encoders

if TYPE_CHECKING:
    from pretrain.encoder import Encoder


class FilmBranch(nn.Module):
    """The inputs that a model gets from films: scaled features, logits of findings, view and age.

    Args:
        encoder: the encoder to tune; None if batches contain the features of a frozen one.
        origin: the folder of its weights; None for random weights.
        pool: of the encoder; `both` concatenates its two.
        mean, deviation: (D,) of the train films' features.
        findings: a fitted head for the findings; None leaves its logits out.
        keep: include the features themselves.
        context: include the film's view and age.
        fixed_norm: batch norm keeps its statistics (a batch may have one film); False for random weights.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(
        self,
        mean: Tensor,
        deviation: Tensor,
        *,
        encoder: Encoder | None = None,
        origin: Path | None = None,
        pool: str | None = None,
        findings: nn.Linear | None = None,
        keep: bool = True,
        context: bool = True,
        fixed_norm: bool = True,
    ) -> None:
        super().__init__()
        self.fixed_norm, self.origin = fixed_norm, origin
        self.encoder, self.pool, self.findings, self.keep, self.context = encoder, pool, findings, keep, context
        self.register_buffer("mean", mean)
        self.register_buffer("deviation", deviation)
        self.width = len(mean) * keep + (0 if findings is None else findings.out_features) + CONTEXT * context

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """A batch of `Samples` -> (B, K, width), zero for missing films."""
        present = batch["has_image"]  # (B, K)
        if "images" in batch:
            assert self.encoder is not None, "a batch of films needs an encoder"
            film = torch.zeros(*present.shape, len(self.mean), device=present.device)
            if len(batch["images"]):
                film[present] = pooled(self.encoder, batch["images"], self.pool).float()
        else:
            film = batch.get("film", torch.zeros(*present.shape, len(self.mean), device=present.device))
        film, logits = film.split([len(self.mean), film.shape[2] - len(self.mean)], dim=2)
        film = (film - self.mean) / self.deviation
        given = [film] if self.keep else []
        if self.findings is not None:  # for a frozen encoder, the features include the logits
            given += [logits if logits.shape[2] else self.findings(film)]
        given += [batch["context"]] if self.context else []
        return torch.where(present[..., None], torch.cat(given, dim=2), 0.0)

    def train(self, mode: bool = True) -> FilmBranch:
        """Keep batch norm in eval mode if its statistics are fixed."""
        super().train(mode)
        for module in self.encoder.modules() if self.encoder is not None and self.fixed_norm else ():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        return self


class Net(nn.Module):
    """A film branch (None for a record-only model) and a model of fusion.MODELS, or a class of the user's.

    Evaluation computes the model in fp32 under any autocast, because logits in bf16 tie; the encoder stays under it.
    """

    def __init__(self, films: FilmBranch | None, model: nn.Module) -> None:
        super().__init__()
        self.films, self.model = films, model

    def forward(self, batch: dict[str, Tensor]) -> Output:
        film = self.films(batch) if self.films is not None else batch["context"]
        with nullcontext() if self.training else torch.autocast(film.device.type, enabled=False):
            output = self._output(batch, film)
        return output._replace(logits=output.logits.float())

    def _output(self, batch: dict[str, Tensor], film: Tensor) -> Output:
        present, hours = batch["has_image"], batch["hours"]
        if getattr(self.model, "reads_tokens", False):
            note = (batch[key] for key in ("note_tokens", "note_lengths"))
            output: Output = self.model(batch["film_tokens"], present[:, 0], *note)
            return output
        more = {"note": Note(batch["text"], batch["has_text"], batch["has_record"])} if "text" in batch else {}
        if not getattr(self.model, "many_films", False):
            film, present, hours = film[:, 0], present[:, 0], hours[:, 0]
        output = self.model(batch["series"], batch["lengths"], film, present, hours, **more)
        return output


def load_branch(branch: nn.Module, folder: str | Path, model: str) -> None:
    """Load the weights of a finished single-branch run into that branch; every name and shape must match.

    Args:
        folder: a run of `fuse model=MODEL`.
    Raises: UserError: no such run, or weights of another shape.
    """
    state = read_branch(folder, model)
    if faults := encoders.differences(branch.state_dict(), state):
        raise UserError(f"{folder}: these are not the weights of this model's {model} branch: {faults}")
    branch.load_state_dict(state)


def read_branch(folder: str | Path, model: str) -> dict[str, Tensor]:
    """The weights of a finished single-branch run. Raises: UserError: no such run."""
    path = Path(folder) / "model.safetensors"
    if not path.is_file():
        raise UserError(f"{path}: no such file; give the folder of a finished `fuse model={model}` run")
    with undamaged(path, "train it again"):
        state = load_file(path)
    return {k.removeprefix("model."): v for k, v in state.items() if k.startswith("model.")}
