"""Monitor a pretraining: numbers for metrics.jsonl, and warnings.

Collapse shows in the effective rank of the features and in the prototypes in use, not in the mean-entropy term.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Mapping
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from configs import UserError
from ehr_features.files import write_json
from pretrain import run
from pretrain.config import PROTOTYPES_FLOOR, RANK_FLOOR, PretrainConfig
from pretrain.data import Cutter, Films, Steps
from pretrain.methods import Method
from pretrain.schedule import Schedule
from pretrain.text.notes import summary

RANK_WINDOW = 512  # films over which the effective rank is measured
PATIENCE = 200  # steps before a collapse can be distinguished from the start of training


class Watch:
    """Collects the numbers of a run, warns of collapse, stops on non-finite losses."""

    def __init__(
        self, config: PretrainConfig, steps: Steps, log: run.Log, accelerator: Any, num_prototypes: int
    ) -> None:
        self.log, self.steps, self.accelerator = log, steps, accelerator
        self.batch_size = config.optim.batch_size
        self.num_prototypes = num_prototypes
        films = max(RANK_WINDOW, 2 * self.num_prototypes)
        self.none = torch.zeros(0, dtype=torch.long, device=accelerator.device)
        self.recent: deque[tuple[Tensor, Tensor]] = deque(maxlen=math.ceil(films / self.batch_size))
        self.pending: list[tuple[int, dict[str, Tensor], float]] = []  # steps since the last report
        self.last_finite = -1
        self.warned: set[str] = set()
        self.note, self._since = "", time.monotonic()

    def see(self, out: dict[str, Tensor], step: int, waited: float, rates: dict[str, Any]) -> None:
        """Keep a step's numbers on the device."""
        self.recent.append((out["features"], out.get("hits", self.none)))
        scalars = {key: value.detach() for key, value in out.items() if value.ndim == 0}
        self.pending.append((step, scalars, waited))
        self.rates = rates

    def report(self, done: int) -> None:
        """Write the mean of the steps since the last report. Raises: UserError: a loss was not finite."""
        scalars = self._reduced()
        features = torch.cat([f for f, _ in self.recent])
        if self.accelerator.num_processes > 1:
            features = self.accelerator.gather(features)
        seconds, waited = time.monotonic() - self._since, sum(w for _, _, w in self.pending)
        values = {f"train/{key}": value.mean().item() for key, value in scalars.items()}
        values |= {f"train/{key}": float(value) for key, value in self.rates.items()}
        if self.num_prototypes:
            hits = self.accelerator.reduce(torch.stack([h for _, h in self.recent]).sum(dim=0), "sum")
            values["train/prototypes_used"] = int((hits > 0).sum())
        values["train/effective_rank"] = float(effective_rank(features))
        values["train/films_per_second"] = len(self.pending) * self.batch_size / seconds
        values["train/wait_share"] = waited / seconds
        values["train/epoch"] = done / self.steps.steps_per_epoch
        self.log.log(values, done)
        speed = f"{values['train/films_per_second']:.0f} films/s"
        # a narrow terminal cuts the note's end
        self.note = f"loss {values['train/loss']:.3f}, rank {values['train/effective_rank']:.1f}, {speed}"
        self._warn(done, values)
        self.pending, self._since = [], time.monotonic()

    def _reduced(self) -> dict[str, Tensor]:
        """The pending steps' numbers (n,), as means over processes. Raises: UserError: a loss was not finite."""
        self._finite_losses()
        scalars = {key: torch.stack([s[key] for _, s, _ in self.pending]) for key in self.pending[0][1]}
        if self.accelerator.num_processes > 1:
            scalars = {key: self.accelerator.reduce(value, "mean") for key, value in scalars.items()}
        return scalars

    def check(self, method: Method, done: int) -> None:
        """Check before weights overwrite good ones. Raises: UserError: a loss or a weight is not finite."""
        self._finite_losses()
        numbers = [value for value in method.state_dict().values() if value.is_floating_point()]
        if not torch.stack([value.isfinite().all() for value in numbers]).all():
            self._stop(done - 1, "the update of the weights")  # its loss was finite, so they were finite before it

    def _finite_losses(self) -> None:
        if not self.pending:
            return
        losses = torch.stack([scalars["loss"] for _, scalars, _ in self.pending]).tolist()
        for (step, _, _), loss in zip(self.pending, losses, strict=True):
            if not math.isfinite(loss):
                self._stop(step)
            self.last_finite = step

    def state(self) -> dict[str, Any]:
        """State for a checkpoint, so that a resumed run writes the same lines as an unbroken one."""
        features = torch.stack([f for f, _ in self.recent], dim=1)  # (b, steps, D): films first, for gathering
        hits = torch.stack([h for _, h in self.recent]).int()
        if self.accelerator.num_processes > 1:
            features, hits = self.accelerator.gather(features), self.accelerator.reduce(hits, "sum")
        state: dict[str, Any] = {"recent": [features, hits], "pending": []}
        if self.pending:
            scalars = self._reduced()
            rows = ({key: value[i].item() for key, value in scalars.items()} for i in range(len(self.pending)))
            state["pending"] = [[step, row, wait] for (step, _, wait), row in zip(self.pending, rows, strict=True)]
        return state

    def restore(self, state: Mapping[str, Any]) -> None:
        """Restore the result of `state`."""
        device = self.accelerator.device
        self.pending = [
            (step, {key: torch.tensor(value, device=device) for key, value in row.items()}, waited)
            for step, row, waited in state.get("pending", [])
        ]
        if "recent" in state:
            features, hits = (x.to(device) for x in state["recent"])
            rank, world = self.accelerator.process_index, self.accelerator.num_processes
            mine = features.chunk(world)[rank].unbind(1)
            self.recent.extend(zip(mine, (hits if rank == 0 else torch.zeros_like(hits)).long(), strict=True))

    def _warn(self, done: int, values: dict[str, float]) -> None:
        """Warn once for each sign of collapse."""
        rank, floor = values["train/effective_rank"], PROTOTYPES_FLOOR * self.num_prototypes
        used = values.get("train/prototypes_used", floor)
        signs = {
            f"effective rank of the features {rank:.1f}, under {RANK_FLOOR:g}": rank < RANK_FLOOR,
            f"prototypes in use {used} of {self.num_prototypes}, under {floor:.0f}": used < floor,
        }
        for text, low in signs.items():
            if low and done >= PATIENCE and text[:9] not in self.warned:
                self.warned.add(text[:9])
                own = "loss.target_temperature: 0.1, fewer prototypes, " if self.num_prototypes else ""
                self.log.say(
                    f"warning: step {done}: {text}: the features may be collapsing. What has helped: "
                    f"views.normalise: crop, {own}a lower lr"
                )

    def _stop(self, step: int, what: str = "the loss") -> NoReturn:
        path = self.log.folder / f"bad_batch_{step}_rank{self.accelerator.process_index}.json"
        rows = self.steps.rows(step)
        write_json(path, {"step": step, "dicom_ids": self.steps.dicom_ids[rows].tolist()})
        before = min(self.last_finite, step - 1)
        last = f"step {before} was the last finite one" if before >= 0 else "no step was finite"
        raise UserError(
            f"{what} is not finite at step {step} ({last}); its films, the first {self.steps.dicom_ids[rows[0]]}, are "
            f"listed in {path}. The last checkpoint is from before it: lower optim.lr or use precision: bf16, then "
            "choose another out=..."
        )


# ---- Log header: what is about to run, on which films.


def introduce(
    log: run.Log, config: PretrainConfig, steps: Steps, method: Method, plan: Schedule, accelerator: Any
) -> None:
    """Write the header of log.txt."""
    films, o = steps.films, config.optim
    for line in films.said:
        log.say(line)
    left_out = "; ".join(f"{n} {reason}" for reason, n in films.left_out.items() if n)
    number = sum(p.numel() for p in method.anchor.parameters()) / 1e6
    log.say(
        f"films: {len(films)} of {films.table['subject_id'].nunique()} subjects"
        + (f" (left out: {left_out})" if left_out else "")
        + f"\nmethod: {config.method}; encoder: {config.encoder.arch}, {number:.1f} M weights, "
        + f"{config.encoder.image_size} px; "
        + _record(config, films)
        + f"\ntraining: {plan.total} steps of {o.batch_size} films ({plan.total / plan.steps_per_epoch:.1f} epochs) on "
        + f"{accelerator.num_processes} x {accelerator.device.type}; precision {accelerator.mixed_precision}; "
        + f"preset {config.preset}"
    )
    if config.unused:
        log.say(f"note: the sections {', '.join(config.unused)} do nothing with method {config.method}")
    if steps.partners is not None:
        paired, by = steps.partners.count(), config.films.positives
        log.say(f"pairs: {paired} of {len(films)} films have another of their {by}; the others are their own target")
    if o.accumulate > 1 and o.accumulate_mode == "approximate":
        log.say(
            f"note: the loss is computed on each of {o.accumulate} parts separately, an approximation: Sinkhorn, "
            "the mean entropy and batch norm see only a part of the batch"
        )
    has_norm = any(isinstance(module, torch.nn.modules.batchnorm._BatchNorm) for module in method.modules())
    if accelerator.num_processes > 1 and accelerator.device.type == "cpu" and has_norm:
        log.say("note: on CPUs batch norm uses the films of its own process only (torch synchronises it on GPUs)")
    for name, cells in unmasked(config, steps.cutter).items():
        least = math.ceil(100 / cells) / 100
        log.say(
            f"warning: mask.ratio {config.mask.ratio} of the {cells} patches of {name} masks none; {least} masks one"
        )
    groups = np.array(films.column_groups, dtype=object)
    if same := [g for g in films.available_at if (films.static[:, groups == g] == films.static[0, groups == g]).all()]:
        log.say(f"warning: EHR group {', '.join(same)} is equal for all films: it gives the anchor no information")


@torch.no_grad()
def effective_rank(features: Tensor) -> Tensor:
    """exp(entropy of the normalised singular values) of centred features (N, D): how many directions are in use.

    Source: Roy and Vetterli 2007; as a sign of collapse: RankMe, arXiv:2210.02885.
    """
    centred = features.double() - features.double().mean(dim=0)
    gram = centred @ centred.T if len(features) < features.shape[1] else centred.T @ centred
    values = torch.linalg.eigvalsh(gram).clamp_min(0).sqrt()
    share = values / values.sum().clamp_min(1e-12)
    return torch.special.entr(share).sum().exp()


def unmasked(config: PretrainConfig, cutter: Cutter) -> dict[str, int]:
    """Masked views with so few patches that the ratio masks none of them: name -> number of patches."""
    large = [cutter.random] if "random" in cutter.masked else [cutter.target] if "target" in cutter.masked else []
    views = [("encoder.image_size", v) for v in large]
    views += [("views.focal_size", cutter.focal)] if "focal" in cutter.masked else []
    cells = {name: (v.size // cutter.patch) ** 2 for name, v in views if v.count and config.mask.ratio}
    return {name: number for name, number in cells.items() if int(number * config.mask.ratio) == 0}


def _record(config: PretrainConfig, films: Films) -> str:
    ehr = config.ehr
    if not ehr.groups:
        return "no record"
    permuted = ", permuted between films (control)" if ehr.permuted else ""
    text = "" if films.text is None else f"\n{summary(films.text)}"
    how = f", {ehr.inject}" if ehr.use == "condition" else ""
    return f"{ehr.use} on {', '.join(ehr.groups)}: {len(films.columns)} columns{how}{permuted}{text}"
