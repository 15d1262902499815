"""Speed of pretraining, each number beside a named reference, all in one run: `python -m benchmarks.pretrain`.

(a) cutting 12 views of a 512-px film: ours, against lightly's MSNTransform on Pillow images of the same film;
(b) a training step of ViT-Tiny/16 (batch 8, 12 views, equal masking, fp32): ours, against the published model's, built
    from torchvision's ViT, lightly's wrapper, head and loss;
(c) the share of this machine's own large-matmul rate that our step reaches;
(e) two processes against one, at equal global batch and equal cores.
(a) to (c) count CPU seconds of one thread, so that other work on the machine matters less; (e) is wall clock.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from pretrain import encoder as encoders
from pretrain.batches import Cutter
from pretrain.msn import MSN, Batch
from pretrain.preprocess import Preprocess
from pretrain.views import Views, film_keys

PAPER = {"temperature": 0.1, "target_temperature": 0.25}
WIDTH, HEADS, DEPTH, PROTOTYPES = 192, 6, 12, 1024


def seconds(*jobs: Callable[[], Any], repeats: int) -> list[float]:
    """Median CPU seconds of each job, run in turns, so that what else the machine does falls on all alike."""
    times = np.zeros((repeats + 1, len(jobs)))  # the first round warms up
    for spent in times:
        for j, job in enumerate(jobs):
            start = time.process_time()
            job()
            spent[j] = time.process_time() - start
    return np.median(times[1:], axis=0).tolist()


def cutter() -> Cutter:
    """The published views: 2 of 224 px and 10 of 96 px, masked alike."""
    scale = {"flip": 0.5}
    return Cutter(
        target=Views(1, 224, (0.3, 1.0), **scale),
        random=Views(1, 224, (0.3, 1.0), **scale),
        focal=Views(10, 96, (0.05, 0.3), **scale),
        preprocess=Preprocess(224, "dataset", 0.449, 0.226),
        patch=16, is_vit=True, mask_ratio=0.15, mask_focal=True, fill="noise", seed=0,
    )  # fmt: skip


def views(repeats: int, batch_size: int = 8) -> tuple[float, float]:
    """(a) seconds a film: ours (in a batch, as in training), lightly's."""
    from lightly.transforms import MSNTransform
    from PIL import Image

    film = np.random.default_rng(0).integers(0, 255, (64, 64), dtype=np.uint8)
    film = np.asarray(Image.fromarray(film).resize((512, 512)))  # smooth, as films are
    cut, keys = cutter(), film_keys([str(i) for i in range(batch_size)])
    films = torch.from_numpy(film.copy()).repeat(batch_size, 1, 1)
    transform = MSNTransform(cj_prob=0, gaussian_blur=0, random_gray_scale=0)
    picture = Image.fromarray(film).convert("RGB")
    epoch = iter(range(10**6))

    def ours() -> None:
        at = next(epoch)
        cut.cut({"films": films, "plans": cut.plan(keys, 512, at), "keys": keys, "epoch": at})

    mine, theirs = seconds(ours, lambda: [transform(picture) for _ in range(batch_size)], repeats=repeats)
    return mine / batch_size, theirs / batch_size


def our_step(batch_size: int, generator: torch.Generator) -> tuple[Callable[[], Tensor], Batch]:
    """One optimizer step of ours on a fixed batch."""
    encoder = encoders.create("vit_tiny_patch16_224", model_args={"num_heads": HEADS})
    msn = MSN(encoder, num_prototypes=PROTOTYPES, hidden=4 * WIDTH, out=WIDTH, loss=PAPER)
    films = torch.randint(0, 256, (batch_size, 256, 256), dtype=torch.uint8, generator=generator)
    cut, keys = cutter(), film_keys([str(i) for i in range(batch_size)])
    batch = cut.cut({"films": films, "plans": cut.plan(keys, 256, 0), "keys": keys, "epoch": 0})
    optimizer = torch.optim.AdamW(msn.groups(decay_all=True), lr=1e-4, fused=True)

    def step() -> Tensor:
        loss = msn(batch)["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        msn.update_target(0.996)
        return loss

    return step, batch


class Published(nn.Module):
    """The published model, from the libraries that it was built of."""

    def __init__(self) -> None:
        from lightly.models.modules import MaskedVisionTransformerTorchvision
        from lightly.models.modules.heads import MSNProjectionHead
        from lightly.models.utils import deactivate_requires_grad
        from torchvision.models import VisionTransformer

        def branch() -> Any:
            vit = VisionTransformer(224, 16, DEPTH, HEADS, WIDTH, 4 * WIDTH)
            return MaskedVisionTransformerTorchvision(vit=vit)

        super().__init__()
        self.target, self.anchor = branch(), branch()
        self.target_head, self.anchor_head = (MSNProjectionHead(WIDTH, 4 * WIDTH, WIDTH) for _ in range(2))
        self.prototypes = nn.Linear(WIDTH, PROTOTYPES, bias=False).weight
        deactivate_requires_grad(self.target)
        deactivate_requires_grad(self.target_head)


def published_step(batch: Batch) -> Callable[[], Tensor]:
    """One optimizer step of the published model on the same views, in three channels."""
    from lightly.loss import MSNLoss
    from lightly.models.utils import random_token_mask, update_momentum

    model, loss_of = Published(), MSNLoss()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    target, random, focal = (x.expand(-1, 3, -1, -1).contiguous() for x in (batch.target, *batch.anchors))

    def embed(x: Tensor) -> Tensor:
        length = (x.shape[-1] // 16) ** 2 + 1
        keep, _ = random_token_mask((len(x), length), mask_ratio=0.15, device=x.device)
        return model.anchor_head(model.anchor(images=x, idx_keep=keep))

    def step() -> Tensor:
        update_momentum(model.anchor, model.target, 0.996)
        update_momentum(model.anchor_head, model.target_head, 0.996)
        with torch.no_grad():
            targets = model.target_head(model.target(images=target))
        anchors = torch.cat([embed(random), embed(focal)])
        loss = loss_of(anchors, targets, model.prototypes)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    return step


def count(step: Callable[[], Tensor]) -> float:
    """Operations of a step: matrix products and attention."""
    with FlopCounterMode(display=False) as counter:
        step()
    return float(counter.get_total_flops())


def worker(batch_size: int, steps: int) -> None:
    """One of the processes of (e): prints films a second."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    encoder = encoders.create("vit_tiny_patch16_224", model_args={"num_heads": HEADS})
    msn = MSN(encoder, num_prototypes=PROTOTYPES, hidden=4 * WIDTH, out=WIDTH, loss=PAPER)
    local = batch_size // accelerator.num_processes
    films = torch.randint(0, 256, (local, 256, 256), dtype=torch.uint8)
    model, optimizer = accelerator.prepare(msn, torch.optim.AdamW(msn.groups(), lr=1e-4, fused=True))
    cut, keys, began = cutter(), film_keys([str(i) for i in range(local)]), 0.0
    for i in range(steps + 2):
        if i == 2:
            accelerator.wait_for_everyone()
            began = time.perf_counter()
        batch = cut.cut({"films": films, "plans": cut.plan(keys, 256, i), "keys": keys, "epoch": i})
        accelerator.backward(model(batch)["loss"])
        optimizer.step()
        optimizer.zero_grad()
        msn.update_target(0.996)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        print(json.dumps(steps * batch_size / (time.perf_counter() - began)))


def films_a_second(processes: int, threads: int, batch_size: int, steps: int) -> float:
    """Start the processes of (e) as launch.sh does."""
    words = ["benchmarks.pretrain", "--worker", str(batch_size), "--steps", str(steps)]
    command = [sys.executable, "-m", "configs.launch", "--processes", str(processes), "--", *words]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    return float(done.stdout.strip().splitlines()[-1])


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7, help="of (a) to (c)")
    parser.add_argument("--batch-size", type=int, default=8, help="of (b), (c)")
    parser.add_argument("--steps", type=int, default=4, help="of (e)")
    parser.add_argument("--skip", nargs="*", default=[], choices=list("abce"))
    parser.add_argument("--worker", type=int, default=None, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker is not None:
        return worker(args.worker, args.steps)
    torch.set_num_threads(1)
    print("| what | ours | reference | ratio |\n|---|---|---|---|", flush=True)
    if "a" not in args.skip:
        ours, theirs = views(args.repeats)
        _row("(a) 12 views of a 512-px film, ms", f"{1e3 * ours:.2f}", f"lightly {1e3 * theirs:.2f}", theirs / ours)
    if not {"b", "c"} <= set(args.skip):
        step, batch = our_step(args.batch_size, torch.Generator().manual_seed(0))
        a = torch.randn(2048, 2048)
        ours, theirs, product = seconds(step, published_step(batch), lambda: a @ a, repeats=args.repeats)
        what = f"(b) step of ViT-Tiny/16, batch {args.batch_size}, s"
        _row(what, f"{ours:.3f}", f"published {theirs:.3f}", theirs / ours)
        rate, most = count(step) / ours, 2 * 2048**3 / product
        _row("(c) GFLOP/s of that step", f"{rate / 1e9:.0f}", f"matmul 2048 {most / 1e9:.0f}", rate / most)
    if "e" not in args.skip:
        one, two = films_a_second(1, 2, 8, args.steps), films_a_second(2, 1, 8, args.steps)
        _row("(e) films/s, 2 cores, batch 8", f"2 processes {two:.2f}", f"1 process {one:.2f}", two / one)


def _row(what: str, ours: str, reference: str, ratio: float) -> None:
    print(f"| {what} | {ours} | {reference} | {ratio:.2f}x |", flush=True)


if __name__ == "__main__":
    main()
