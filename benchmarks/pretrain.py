"""Speed of pretraining against references, all in one run: `./launch.sh python -m benchmarks.pretrain`.

(a) cutting 12 views of a 512-px film: ours, against lightly's MSNTransform on Pillow images of the same film;
(b) a training step of ViT-Tiny/16 (batch 8, 12 views, equal masking, fp32): ours, against the published model's, built
    from torchvision's ViT, lightly's wrapper, head and loss;
(c) the share of this machine's rate on large matrix products that our step reaches;
(d) reading films from a store, against opening JPEG files of them;
(e) two processes against one, at equal global batch: of two threads, and twice one on one core.
In (a) to (c) each side runs in its own process, and the sides alternate, so that other load on the machine affects all
equally. (a) to (d) count CPU seconds of one thread, (e) wall-clock time; medians.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from pretrain import encoder as encoders
from pretrain.build import keep_freed_memory
from pretrain.data import Cutter
from pretrain.draws import film_keys
from pretrain.encoder.preprocess import Preprocess
from pretrain.methods import Batch, Setup
from pretrain.methods.msn import MSN
from pretrain.options import LossConfig, ViewsConfig
from pretrain.views import Views

ALL_CORES = os.sched_getaffinity(0)
TURN = 6  # our batches of views per turn, so that a turn lasts about as long as one batch of lightly's
Job = Callable[[], Any]
WIDTH, HEADS, DEPTH, PROTOTYPES = 192, 6, 12, 1024  # of the published model
PAPER = LossConfig(prototypes=PROTOTYPES, temperature=0.1, target_temperature=0.25)


class Published(nn.Module):
    """The published model, built from the same libraries."""

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


def serve(side: str, batch_size: int, line: Any) -> None:
    """The process of one side: run its job on request, answer with the CPU seconds."""
    torch.set_num_threads(1)
    job = SIDES[side](batch_size)
    job()  # warm-up
    line.send(count(job) if side == "our step" else 0.0)
    while line.recv():
        start = time.process_time()
        job()
        line.send(time.process_time() - start)


def seconds(sides: Sequence[str], batch_size: int, repeats: int) -> tuple[list[float], list[float]]:
    """Median CPU seconds of each side, alternating; and what each printed at the start."""
    context = multiprocessing.get_context("spawn")
    lines, workers = [], []
    for side in sides:
        ours, theirs = context.Pipe()
        workers.append(context.Process(target=serve, args=(side, batch_size, theirs), daemon=True))
        lines.append(ours)
        workers[-1].start()
        theirs.close()  # a side that fails then ends the run
    said = [line.recv() for line in lines]
    times = np.zeros((repeats, len(lines)))
    for spent in times:
        for j, line in enumerate(lines):
            line.send(True)
            spent[j] = line.recv()
    for line, worker in zip(lines, workers, strict=True):
        line.send(False)
        worker.join()
    return np.median(times, axis=0).tolist(), said


def cutter() -> Cutter:
    """The published views: 2 of 224 px and 10 of 96 px, masked alike."""
    like = ViewsConfig(flip=0.5, brightness=0, contrast=0)
    return Cutter(
        target=Views(1, 224, (0.3, 1.0), like),
        random=Views(1, 224, (0.3, 1.0), like),
        focal=Views(10, 96, (0.05, 0.3), like),
        preprocess=Preprocess(224, "dataset", 0.449, 0.226),
        patch=16, is_vit=True, mask_ratio=0.15, masked=("random", "focal"), fill="noise", seed=0,
    )  # fmt: skip


def film() -> np.ndarray:
    """A smooth film of 512 x 512 px."""
    from PIL import Image

    small = np.random.default_rng(0).integers(0, 255, (64, 64), dtype=np.uint8)
    return np.array(Image.fromarray(small).resize((512, 512)))


def our_views(batch_size: int) -> Job:
    """The views of `TURN` batches, one after another, as in a training process."""
    keep_freed_memory()
    cut, keys = cutter(), film_keys([str(i) for i in range(batch_size)])
    films, epoch = torch.from_numpy(film()).repeat(batch_size, 1, 1), iter(range(10**6))

    def job() -> None:
        for at in itertools.islice(epoch, TURN):
            cut.cut({"films": films, "plans": cut.plan(keys, 512, at), "keys": keys, "epoch": at})

    return job


def their_views(batch_size: int) -> Job:
    """MSNTransform as in the published code, without colour changes."""
    from lightly.transforms import MSNTransform
    from PIL import Image

    transform = MSNTransform(cj_prob=0, gaussian_blur=0, random_gray_scale=0)
    picture = Image.fromarray(film()).convert("RGB")
    return lambda: [transform(picture) for _ in range(batch_size)]


def fixed_batch(batch_size: int) -> Batch:
    """The same batch for both steps."""
    films = torch.randint(0, 256, (batch_size, 256, 256), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    cut, keys = cutter(), film_keys([str(i) for i in range(batch_size)])
    return cut.cut({"films": films, "plans": cut.plan(keys, 256, 0), "keys": keys, "epoch": 0})


def our_step(batch_size: int) -> Job:
    """One optimizer step of our model."""
    keep_freed_memory()
    encoder = encoders.create("vit_tiny_patch16_224", model_args={"num_heads": HEADS})
    msn = MSN(encoder, Setup(4 * WIDTH, WIDTH, options=PAPER))
    batch = fixed_batch(batch_size)
    optimizer = torch.optim.AdamW(msn.groups(decay_all=True), lr=1e-4, fused=True)

    def step() -> Tensor:
        loss = msn(batch)["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        msn.after_step(0.996)
        return loss

    return step


def large_matmul(batch_size: int) -> Job:
    """2048 x 2048, the machine's best rate."""
    a, out = torch.randn(2048, 2048), torch.empty(2048, 2048)
    return lambda: torch.mm(a, a, out=out)


SIDES: dict[str, Callable[[int], Job]] = {
    "our views": our_views,
    "lightly's views": their_views,
    "our step": our_step,
    "published step": lambda batch_size: published_step(fixed_batch(batch_size)),
    "matmul": large_matmul,
}


def count(step: Job) -> float:
    """Operations of a step: matrix products, including those of fused attention without its recomputation."""
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

    def products(number: int, q: Sequence[int], k: Sequence[int]) -> int:
        return 2 * number * q[0] * q[1] * q[2] * q[3] * k[2]

    def forward_flops(q: Any, k: Any, v: Any, *args: Any, out_shape: Any = None, **more: Any) -> int:
        return products(2, q, k)

    def backward_flops(grad: Any, q: Any, k: Any, *args: Any, out_shape: Any = None, **more: Any) -> int:
        return products(4, q, k)

    own = {attention: forward_flops, backward: backward_flops}
    with FlopCounterMode(display=False, custom_mapping=own) as counter:
        step()
    return float(counter.get_total_flops())


def worker(batch_size: int, steps: int) -> None:
    """One of the processes of (e): prints films per second, and processor seconds of all processes a film."""
    from accelerate import Accelerator

    keep_freed_memory()
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    encoder = encoders.create("vit_tiny_patch16_224", model_args={"num_heads": HEADS})
    msn = MSN(encoder, Setup(4 * WIDTH, WIDTH, options=PAPER))
    local = batch_size // accelerator.num_processes
    films = torch.randint(0, 256, (local, 256, 256), dtype=torch.uint8)
    model, optimizer = accelerator.prepare(msn, torch.optim.AdamW(msn.groups(), lr=1e-4, fused=True))
    cut, keys, spent = cutter(), film_keys([str(i) for i in range(local)]), []
    for i in range(steps + 2):
        began = time.perf_counter(), time.process_time()
        batch = cut.cut({"films": films, "plans": cut.plan(keys, 256, i), "keys": keys, "epoch": i})
        accelerator.backward(model(batch)["loss"])
        optimizer.step()
        optimizer.zero_grad()
        msn.after_step(0.996)
        spent.append([time.perf_counter() - began[0], time.process_time() - began[1]])
    wall, own = np.median(spent[2:], axis=0).tolist()
    processor = float(accelerator.reduce(torch.tensor(own), "sum"))
    if accelerator.is_main_process:
        print(json.dumps([batch_size / wall, processor / batch_size]))


def films_a_second(processes: int, threads: int, batch_size: int, steps: int) -> list[float]:
    """Start the processes of (e) as launch.sh does."""
    words = ["benchmarks.pretrain", "--worker", str(batch_size), "--steps", str(steps)]
    command = [sys.executable, "-m", "configs.launch", "--processes", str(processes), "--", *words]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    cores = sorted(os.sched_getaffinity(0))[: processes * threads]  # a process takes as many threads as it finds cores
    os.sched_setaffinity(0, cores)
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    finally:
        os.sched_setaffinity(0, ALL_CORES)
    return [float(number) for number in json.loads(done.stdout.strip().splitlines()[-1])]


def store_against_files() -> tuple[float, float, float]:
    """(d) milliseconds per film: the store, JPEG files of the same size, JPEG files of the original size."""
    from benchmarks.store import make_films, measure

    with tempfile.TemporaryDirectory() as name, contextlib.redirect_stdout(io.StringIO()):
        found = measure(make_films(Path(name) / "films", 6), Path(name), 512)
    return found["store raw"], found["JPEG files of the same size"], found["JPEG files"]


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=9, help="turns of (a) to (c)")
    parser.add_argument("--batch-size", type=int, default=8, help="of (a) to (c)")
    parser.add_argument("--steps", type=int, default=4, help="of each start of (e)")
    parser.add_argument("--skip", nargs="*", default=[], choices=list("abcde"))
    parser.add_argument("--worker", type=int, default=None, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker is not None:
        return worker(args.worker, args.steps)
    torch.set_num_threads(1)
    print("| what | ours | reference | ratio |\n|---|---|---|---|", flush=True)
    size = args.batch_size
    if "a" not in args.skip:
        (ours, theirs), _ = seconds(["our views", "lightly's views"], size, 4 * args.repeats)
        ours /= TURN
        ms = [f"{1e3 * s / size:.2f}" for s in (ours, theirs)]
        _row("(a) 12 views of a 512-px film, ms", ms[0], f"lightly {ms[1]}", theirs / ours)
    if not {"b", "c"} <= set(args.skip):
        (ours, theirs, product), said = seconds(["our step", "published step", "matmul"], size, args.repeats)
        _row(f"(b) step of ViT-Tiny/16, batch {size}, s", f"{ours:.3f}", f"published {theirs:.3f}", theirs / ours)
        rate, most = said[0] / ours, 2 * 2048**3 / product
        what = "(b) at best: that step wholly at the rate of (c)'s matmul, s"
        _row(what, f"{said[0] / most:.3f}", f"published {theirs:.3f}", theirs * most / said[0])
        _row("(c) GFLOP/s of that step", f"{rate / 1e9:.0f}", f"matmul 2048 {most / 1e9:.0f}", rate / most)
    if "d" not in args.skip:
        ours, same, whole = store_against_files()
        _row("(d) reading a film of 512 px, ms", f"store {ours:.3f}", f"JPEG of 512 px {same:.2f}", same / ours)
        _row("(d) the same", f"store {ours:.3f}", f"JPEG of 2544 x 3056 px {whole:.1f}", whole / ours)
    if "e" not in args.skip:
        for size in (8, 32):
            kinds = ((1, 2), (2, 1), (1, 1))  # processes, threads
            found = [[films_a_second(*kind, size, args.steps) for kind in kinds] for _ in range(3)]
            (threaded, _), (two, spent), (one, least) = np.median(found, axis=0).tolist()
            what, ours = f"(e) films/s, 2 cores, batch {size}", f"2 processes {two:.2f}"
            _row(what, ours, f"1 process of 2 threads {threaded:.2f}", two / threaded)
            _row(what, ours, f"twice 1 process on 1 core {2 * one:.2f}", two / (2 * one))
            what = f"(e) processor s a film, batch {size}"
            _row(what, f"2 processes {spent:.3f}", f"1 process on 1 core {least:.3f}", least / spent)


def _row(what: str, ours: str, reference: str, ratio: float) -> None:
    print(f"| {what} | {ours} | {reference} | {ratio:.2f}x |", flush=True)


if __name__ == "__main__":
    main()
