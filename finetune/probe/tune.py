"""Train through an encoder: `finetune` trains all its weights, `attentive` one query over its frozen tokens.

Input: films, an encoder (random: supervised from scratch). Output: a `Learner`. Lower layers have smaller learning
rates (layer-wise decay); films are rotated, zoomed, shifted and changed in contrast, never flipped. Training stops by
validation AUROC. SIGTERM saves, and the same command resumes to the same weights, because order and augmentation depend
on seed and step alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from timm.optim import param_groups_layer_decay
from torch import Tensor, nn

from configs import UserError
from configs.amounts import check_memory
from configs.signals import held
from finetune.encoders import open_encoder, to_be_tuned
from finetune.fit import Scores, fit
from finetune.labelled import Films
from finetune.metrics import macro_auroc
from finetune.probe.heads import balance
from finetune.probe.methods import Fitted, Learner, Rows, val_labels
from pretrain import encoder as encoders
from pretrain import run
from pretrain.encoder.embed import check_finite
from pretrain.schedule import warmup_cosine
from pretrain.seen import ancestry, write_seen

if TYPE_CHECKING:
    from accelerate import Accelerator

    from finetune.config import ProbeConfig, TuneConfig
    from pretrain.encoder import Encoder
    from pretrain.store import Store


def through_encoder(
    config: ProbeConfig, films: Films, store: Store, folder: Path, log: run.Log, accelerator: Accelerator
) -> Learner:
    """A learner that saves each fit in FOLDER/fits/N, so that the command resumes where it stopped."""
    count = 0

    def learn(train: Rows, val: Rows, seed: int) -> Fitted:
        nonlocal count
        place = folder / "fits" / str(count)
        count += 1
        fit = _Fit(config, films, store, place, log, accelerator, seed)
        chosen = fit.train(train, val)
        return Fitted(fit.predict, chosen, export=None if config.method == "attentive" else fit.export)

    return learn


class _Fit:
    """One training."""

    def __init__(
        self,
        config: ProbeConfig,
        films: Films,
        store: Store,
        folder: Path,
        log: run.Log,
        accelerator: Accelerator,
        seed: int,
    ) -> None:
        self.config, self.films, self.store, self.folder = config, films, store, folder
        self.log, self.accelerator, self.seed = log, accelerator, seed
        self.ids = films.table["dicom_id"].to_numpy(object)
        self.labels = films.trained(np.arange(len(films)), config.uncertain, config.empty)
        opened = open_encoder(config.encoder, seed=seed, weights=config.weights)
        encoder, self.origin = to_be_tuned(opened, store), opened.folder
        attentive = config.method == "attentive"
        net = Tuned(encoder, len(films.names), attentive=attentive, scratch=self.origin is None)
        size, side, chans = config.tune.batch_size, encoder.meta["image_size"], encoder.meta["in_chans"]
        check_memory(
            4 * size * side**2 * chans / accelerator.num_processes,
            f"tune.batch_size {size}: the films of a step, {side} px, {chans} channels",
            "lower it",
        )
        self.net = net.to(accelerator.device)

    def train(self, train: Rows, val: Rows) -> dict[str, Any]:
        """Fit on `train`, keep the epoch with the best AUROC on `val`."""
        tune = self.config.tune
        self.weights = np.ones_like(self.labels)
        if self.config.class_weights == "balanced":  # the head then starts from even odds
            self.weights[train] = balance(self.labels[train])
        else:
            known = ~np.isnan(self.labels[train])
            positive = np.nansum(self.labels[train], axis=0) + 0.5
            with torch.no_grad():
                self.net.head.bias.copy_(torch.from_numpy(np.log(positive / (known.sum(0) - positive + 1))))
        run.share(tune.batch_size, self.accelerator.num_processes, "tune.batch_size")
        per_epoch = max(1, len(train) // tune.batch_size)
        first = self.ids[train[:8]].tolist()  # before any training: do the weights overflow?
        encoders.embed(self.net.encoder, self.store.read(first), names=first, device=self.accelerator.device)
        labels = val_labels(self.films, val, self.labels[train])
        optimizer = torch.optim.AdamW(groups(self.net, tune), lr=tune.lr)
        wrapped, optimizer = self.accelerator.prepare(self.net, optimizer)
        steps = partial(self._steps, wrapped, optimizer, train, per_epoch)

        def validate() -> Scores:
            return Scores(float(macro_auroc(labels, self._logits(val)[:, None])[0]))

        given = {"epochs": tune.epochs, "patience": tune.patience, "per_epoch": per_epoch}
        best, epoch, done = fit(self.net, optimizer, steps, validate, self.log, self.folder, **given)
        return {"epoch": epoch, "steps": done, "val_auroc": best.auroc}

    def export(self, out: Path) -> None:
        """Write OUT/encoder, and the subjects it has seen: those of its pretraining and the train split."""
        write_seen(out, self.films.table.iloc[self.films.rows("train")], self.origin)
        before = {} if self.origin is None else ancestry(self.origin)
        more = before | {"supervised_by": "findings", "tuned_from": self.config.encoder}
        encoders.save(out / "encoder", self.net.encoder, more)

    def _steps(self, wrapped: nn.Module, optimizer: Any, train: Rows, per_epoch: int, step: int) -> Iterator[float]:
        """The loss of each step from `step` to the end of its epoch; a thread reads the films of the next one."""
        size, accelerator = self.config.tune.batch_size, self.accelerator
        order = np.random.default_rng([self.seed, step // per_epoch + 1]).permutation(train)
        order = np.resize(order, per_epoch * size) if len(order) < size else order
        own = [
            order[i * size : (i + 1) * size][accelerator.process_index :: accelerator.num_processes]
            for i in range(step % per_epoch, per_epoch)
        ]
        with ThreadPoolExecutor(1) as reader:
            reads = (reader.submit(self._read, rows) for rows in own)
            with held():  # while the thread starts
                ahead = next(reads)
            for i, rows in enumerate(own):
                films, ahead = ahead.result(), next(reads, ahead)
                yield self._step(wrapped, optimizer, films, rows, step + i, per_epoch)

    def _read(self, rows: Rows) -> Tensor:
        return self.net.encoder.preprocess.squares(self.store.read(self.ids[rows].tolist()))

    def _step(self, wrapped: nn.Module, optimizer: Any, films: Tensor, rows: Rows, step: int, per_epoch: int) -> float:
        tune, accelerator = self.config.tune, self.accelerator
        seed = np.random.SeedSequence([self.seed, step, accelerator.process_index])
        generator = torch.Generator().manual_seed(int(seed.generate_state(1)[0]))
        x = self._input(augment(films.to(accelerator.device), tune, generator))
        target = torch.from_numpy(self.labels[rows]).to(accelerator.device)
        known = ~target.isnan() * torch.from_numpy(self.weights[rows]).to(accelerator.device)
        count = accelerator.reduce(known.sum(), "mean").clamp(min=1 / accelerator.num_processes)
        warmup = round(tune.warmup_epochs * per_epoch)
        start = tune.lr / (warmup + 1)
        rate = warmup_cosine(step, tune.epochs * per_epoch, warmup=warmup, start=start, peak=tune.lr, end=0)
        for group in optimizer.param_groups:
            group["lr"] = rate * group["lr_scale"]
        wrapped.train()
        with accelerator.autocast():
            logits = wrapped(x)
        each = F.binary_cross_entropy_with_logits(logits.float(), target.nan_to_num(), reduction="none")
        loss = (each * known).sum() / count  # its mean over the processes is that of the whole batch
        if not loss.isfinite():
            self._refuse(x, rows, f"the loss is not finite at step {step}")
        optimizer.zero_grad()
        accelerator.backward(loss)
        accelerator.clip_grad_norm_([p for p in self.net.parameters() if p.requires_grad], tune.clip)
        optimizer.step()
        return float(loss.item())

    def _refuse(self, x: Tensor, rows: Rows, what: str) -> NoReturn:
        """Stop and name the encoder and the films. Args: x: the films, as the encoder takes them."""
        ids, name = self.ids[rows].tolist(), self.config.encoder
        with torch.no_grad(), self.accelerator.autocast():
            check_finite(self.net.encoder(x).float(), name, ids)
        raise UserError(
            f"{name}: {what}, whose {len(ids)} films begin with {ids[0]}; lower tune.lr ({self.config.tune.lr}) or "
            f"tune.clip ({self.config.tune.clip})"
        )

    def _input(self, pixels: Tensor) -> Tensor:
        """Preprocess (B, 1, S, S) in [0, 1] for the encoder."""
        preprocess = self.net.encoder.preprocess
        return preprocess.to_input(preprocess.resize(pixels))

    def predict(self, rows: Rows) -> NDArray[np.float64]:
        """Logits (n, L) of any films, in every process."""
        return self._logits(rows).astype(np.float64)

    @torch.no_grad()
    def _logits(self, rows: Rows) -> NDArray[np.float32]:
        accelerator, size = self.accelerator, self.config.tune.batch_size
        self.net.eval()
        each = math.ceil(len(rows) / accelerator.num_processes)
        mine = np.resize(rows, each * accelerator.num_processes)[accelerator.process_index * each :][:each]
        parts = []
        for start in range(0, each, size):
            x = self._input(self._read(mine[start : start + size])[:, None].to(accelerator.device).float() / 255)
            with accelerator.autocast():
                parts.append(self.net(x).float())
            if not parts[-1].isfinite().all():
                self._refuse(x, mine[start : start + size], "logits are not finite in a batch")
        found: Tensor = accelerator.gather(torch.cat(parts))
        return found[: len(rows)].cpu().numpy()


# ---- The trained network: a head on an encoder, its parameter groups, the augmentation.


LAYER_DECAY = 0.75  # of pretrained weights; low layers of random ones have as much to learn as the others


class Tuned(nn.Module):
    """Films -> logits.

    Args:
        attentive: freeze the encoder and weight its tokens by one learned query.
        scratch: random weights: batch norm learns its statistics too.
    """

    def __init__(self, encoder: Encoder, labels: int, *, attentive: bool, scratch: bool) -> None:
        super().__init__()
        self.encoder, self.attentive, self.scratch = encoder, attentive, scratch
        self.head = nn.Linear(encoder.width, labels)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        if attentive:
            encoder.requires_grad_(False)
            self.query = nn.Parameter(torch.zeros(encoder.width))
            self.norm = nn.LayerNorm(encoder.width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W), normalised -> (B, L)."""
        if not self.attentive:
            return self._logits(self.encoder(x))
        with torch.no_grad():
            tokens = self.encoder.features(x)
        tokens = self.norm(tokens if tokens.ndim == 3 else tokens.flatten(2).transpose(1, 2))  # (B, N, D)
        weight = (tokens @ self.query / math.sqrt(len(self.query))).softmax(dim=1)  # (B, N)
        return self._logits((weight[:, :, None] * tokens).sum(1))

    def _logits(self, features: Tensor) -> Tensor:
        """In fp32 under any autocast: bf16 logits have ties."""
        with torch.autocast(features.device.type, enabled=False):
            return self.head(features.float())

    def train(self, mode: bool = True) -> Tuned:
        """Keep a frozen encoder in eval mode, and a pretrained one's batch norm with its statistics."""
        super().train(mode)
        if self.attentive:
            self.encoder.eval()
        elif not self.scratch:
            for module in self.encoder.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
        return self


def groups(net: Tuned, config: TuneConfig) -> list[dict[str, Any]]:
    """Parameter groups with `lr_scale`: 1 for the head, less for lower layers; no decay on biases and norms."""
    own = [(n, p) for n, p in net.named_parameters() if not n.startswith("encoder.")]
    found: list[dict[str, Any]] = []
    if not net.attentive:
        decay = config.layer_decay or (1.0 if net.scratch else LAYER_DECAY)
        found = param_groups_layer_decay(net.encoder.net, config.weight_decay, layer_decay=decay)
    found.append({"params": [p for n, p in own if p.ndim > 1], "weight_decay": config.weight_decay, "lr_scale": 1.0})
    found.append({"params": [p for n, p in own if p.ndim <= 1], "weight_decay": 0.0, "lr_scale": 1.0})
    return found


def augment(films: Tensor, config: TuneConfig, generator: torch.Generator) -> Tensor:
    """Rotate, zoom, shift and change the contrast of uint8 (B, S, S) -> (B, 1, S, S) in [0, 1]; the outside is
    black."""
    pixels, n = films[:, None].float() / 255, len(films)
    draw = (2 * torch.rand(5, n, generator=generator) - 1).to(films.device)
    angle, scale = draw[0] * math.radians(config.rotate), 1 + draw[1] * config.zoom
    cos, sin = angle.cos() * scale, angle.sin() * scale
    theta = torch.stack([cos, -sin, draw[2] * 2 * config.shift, sin, cos, draw[3] * 2 * config.shift], dim=1)
    grid = F.affine_grid(theta.view(n, 2, 3), list(pixels.shape), align_corners=False)
    pixels = F.grid_sample(pixels, grid, align_corners=False)
    middle = pixels.mean(dim=(1, 2, 3), keepdim=True)
    return ((pixels - middle) * (1 + draw[4] * config.contrast).view(-1, 1, 1, 1) + middle).clamp(0, 1)
