"""Target, random and focal views of films, cut from uint8 tensors.

Input: films (B, S, S) uint8 and a plan of boxes. Output: views (V*B, 1, size, size) in [0, 1], view-major.
Every random number is a hash of (seed, epoch, film, purpose), so a film's views do not depend on batch, workers or
processes, and a checkpoint needs no generator state.
Differs from lightly's MSNTransform: boxes are clipped to the film instead of redrawn up to ten times; no colour jitter;
intensity changes and flips are drawn for each view; a GPU cuts the whole batch as two matrix products.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.draws import uniforms
from pretrain.options import ViewsConfig


@dataclasses.dataclass(frozen=True)
class Views:
    """How one kind of view is drawn.

    Args:
        count: views per film.
        size: pixels of a side.
        scale: range of the share of the film's area.
        like: ratio, flip, brightness, contrast and gamma, which all kinds share.
    """

    count: int
    size: int
    scale: tuple[float, float]
    like: ViewsConfig


@dataclasses.dataclass(frozen=True)
class Plan:
    """Boxes and changes of the views of a batch: all (V, B), float32 (boxes and changes) or bool."""

    size: int
    flips: bool  # whether any view is flipped
    bends: bool  # whether any gamma is not 1
    boxes: Tensor  # (V, B, 4): top, left, height, width, whole pixels
    flip: Tensor
    changes: Tensor | None  # (V, B, 3): brightness added, contrast factor, gamma; None: no change

    def to(self, device: torch.device | str) -> Plan:
        return self._map(lambda x: x.to(device, non_blocking=True))

    def pin_memory(self) -> Plan:
        return self._map(lambda x: x.pin_memory())

    def _map(self, do: Callable[[Tensor], Tensor]) -> Plan:
        changes = None if self.changes is None else do(self.changes)
        return dataclasses.replace(self, boxes=do(self.boxes), flip=do(self.flip), changes=changes)


def draw(views: Views, keys: np.ndarray, side: int, seed: int, epoch: int, purpose: str) -> Plan:
    """Boxes and changes of `views.count` views of each film of side `side`."""
    u = uniforms(keys, 8 * views.count, seed, epoch, purpose).reshape(len(keys), views.count, 8).transpose(1, 0, 2)
    area = views.scale[0] + u[..., 0] * (views.scale[1] - views.scale[0])
    low, high = np.log(views.like.ratio)
    ratio = np.exp(low + u[..., 1] * (high - low))
    width = np.clip(np.rint(np.sqrt(area * ratio) * side), 1, side)
    height = np.clip(np.rint(np.sqrt(area / ratio) * side), 1, side)
    top, left = np.floor(u[..., 2] * (side - height + 1)), np.floor(u[..., 3] * (side - width + 1))
    boxes = torch.from_numpy(np.stack([top, left, height, width], -1)).float()
    most = np.array([views.like.brightness, views.like.contrast, views.like.gamma])
    changes = torch.from_numpy([0, 1, 1] + (2 * u[..., 5:] - 1) * most).float() if most.any() else None
    flip = u[..., 4] < views.like.flip
    return Plan(views.size, bool(flip.any()), views.like.gamma > 0, boxes, torch.from_numpy(flip), changes)


def draw_keep(
    keys: np.ndarray,
    num_views: int,
    num_patches: int,
    mask_ratio: float,
    seed: int,
    epoch: int,
    purpose: str,
    block: bool = False,
) -> Tensor:
    """Indices (V*B, n) of the patches that stay, in order.

    Each patch is as likely as any other to go; with `block` those go that are nearest to a point drawn on the film.
    """
    num_keep = max(1, num_patches - int(num_patches * mask_ratio))
    if block:
        side = math.isqrt(num_patches)
        u = uniforms(keys, num_views * 2, seed, epoch, purpose).reshape(len(keys), num_views, 2, 1)
        place = np.stack(np.divmod(np.arange(num_patches), side)) + 0.5  # (2, N)
        order = -np.square(place - u * side).sum(axis=2)  # (B, V, N): the nearest come last
    else:
        order = uniforms(keys, num_views * num_patches, seed, epoch, purpose).reshape(len(keys), num_views, num_patches)
    keep = np.sort(np.argsort(order, axis=-1)[..., :num_keep], axis=-1)
    return torch.from_numpy(keep.transpose(1, 0, 2).reshape(-1, num_keep).copy())


def cut(films: Tensor, plan: Plan, turned: Tensor | None = None) -> Tensor:
    """Cut and resize (bilinear, antialiased), flip, change intensities.

    Args:
        films: (B, S, S) uint8, on the device of the views.
        turned: the result of `turn` on them, if several plans are cut from the same films on a CPU.
    Returns: (V*B, 1, size, size) float32 in [0, 1], view-major.
    """
    if films.device.type == "cpu":
        views = _cut_one_by_one(turn(films) if turned is None else turned, plan)
    else:
        views = _cut_by_products(films, plan)
    return (views if plan.changes is None else _change(views, plan.changes.flatten(0, 1), plan.bends)).unsqueeze(1)


def _cut_by_products(films: Tensor, plan: Plan) -> Tensor:
    """rows @ film @ columns: resizing is linear and separable."""
    rows = _weights(plan.boxes[..., 0], plan.boxes[..., 2], films.shape[1], plan.size)
    columns = _weights(plan.boxes[..., 1], plan.boxes[..., 3], films.shape[2], plan.size)
    num_views = len(rows)
    stacked = rows.transpose(0, 1).flatten(1, 2)  # (B, V*size, S): reads each film once for all its views
    views = (stacked @ (films.float() / 255)).unflatten(1, (num_views, -1)).transpose(0, 1)  # (V, B, size, S)
    views = (views @ columns.transpose(2, 3)).flatten(0, 1).clamp_(0, 1)
    return torch.where(plan.flip.flatten()[:, None, None], views.flip(2), views) if plan.flips else views


def _weights(start: Tensor, length: Tensor, side: int, size: int) -> Tensor:
    """(V, B) boxes -> (V, B, size, side): a triangle as wide as the reduction, within the box, rows sum to 1."""
    start, length = start[..., None, None], length[..., None, None]
    scale = length / size
    centre = start + (torch.arange(size, device=start.device)[:, None] + 0.5) * scale
    pixel = torch.arange(side, device=start.device) + 0.5
    weights = (pixel - centre).abs_().div_(scale.clamp_min(1)).neg_().add_(1).clamp_min_(0)
    weights *= (pixel > start) & (pixel < start + length)
    return weights.div_(weights.sum(dim=-1, keepdim=True))


def turn(films: Tensor) -> Tensor:
    """Transpose films, (B, S, S) -> (B, S, S'), S' the next multiple of 4: the input of `cut` on a CPU."""
    side = films.shape[1]
    turned = films.new_zeros(len(films), side, -(-side // 4) * 4)
    for film, out in zip(films.unbind(0), turned.unbind(0), strict=True):
        out[:, :side].copy_(film.t())  # in two dimensions, for a blocked copy
    return turned


def _cut_one_by_one(turned: Tensor, plan: Plan) -> Tensor:
    """Resize box by box, which is faster on a CPU than a matrix product over the whole film.

    torch's uint8 kernel works on pixels of four channels and pads one channel to four. Resizing is separable, so four
    neighbouring rows, then four columns, are passed as channels: the same numbers in half the time. Strides are
    explicit, because each tensor call costs as much as a row of pixels.
    """
    size, wide, (number, side, rows) = plan.size, -(-plan.size // 4) * 4, turned.shape
    boxes = plan.boxes.flatten(0, 1).int().tolist()
    views = torch.empty(len(boxes), size, wide, dtype=torch.uint8)
    between = torch.empty(side, wide, dtype=torch.uint8)
    resize = torch.ops.aten._upsample_bilinear2d_aa  # F.interpolate(antialias=True) without its checks
    for i, (top, left, height, width) in enumerate(boxes):
        fours = -(-height // 4)
        start = min(top, rows - 4 * fours)  # the box's rows, rounded out to multiples of four
        at = (i % number * side + left) * rows + start
        box = turned.as_strided((1, 4, width, fours), (side * rows, 1, rows, 4), at)
        across = resize(box, [size, fours], False)  # in memory (size, 4 * fours)
        box = across.as_strided((height, size), (1, 4 * fours), top - start)
        between.as_strided((height, size), (wide, 1)).copy_(box)
        box = between.as_strided((1, 4, height, wide // 4), (height * wide, 1, wide, 4))
        view = views.as_strided((1, 4, size, wide // 4), (size * wide, 1, wide, 4), i * size * wide)
        resize.out(box, [size, wide // 4], False, None, None, out=view)
    views = views[:, :, :size]
    if plan.flips:
        flipped = plan.flip.flatten()
        views[flipped] = views[flipped].flip(2)
    return views.float().div_(255)


def _change(views: Tensor, changes: Tensor, bends: bool) -> Tensor:
    """Contrast around the view's mean, brightness, then gamma; in place."""
    brightness, contrast, gamma = (changes[:, i, None, None] for i in range(3))
    mean = views.mean(dim=(1, 2), keepdim=True)
    views.sub_(mean).mul_(contrast).add_(mean).add_(brightness).clamp_(0, 1)
    return views.pow_(gamma) if bends else views


def draw_noise(keys: np.ndarray, num_views: int, size: int, seed: int, epoch: int, purpose: str) -> Tensor:
    """(V*B, 1, size, size) of N(0, 1), drawn on the CPU, so that it does not depend on the device."""
    seeds = (uniforms(keys, 1, seed, epoch, purpose)[:, 0] * 2**53).astype(np.int64).tolist()
    films = [torch.randn(num_views, 1, size, size, generator=torch.Generator().manual_seed(s)) for s in seeds]
    return torch.stack(films, dim=1).flatten(0, 1)


def mask_cells(views: Tensor, keep: Tensor, cell: int, filler: Tensor) -> Tensor:
    """Mask the input of a network without tokens: fill the cells of `cell` pixels that are not kept.

    Args:
        views: (V*B, C, H, W), normalised, view-major.
        keep: (V*B, n) indices of kept cells, row by row.
        filler: anything that broadcasts to the views: noise, other films, their mean (0).
    Source: cells of 32 px and noise: arXiv:2309.12757; the ratio and the other fills are ours.
    """
    rows, columns = views.shape[2] // cell, views.shape[3] // cell
    kept = torch.zeros(len(views), rows * columns, dtype=torch.bool, device=views.device)
    kept = kept.scatter_(1, keep, True).view(-1, 1, rows, columns)
    kept = kept.repeat_interleave(cell, dim=2).repeat_interleave(cell, dim=3)
    kept = F.pad(kept, (0, views.shape[3] - kept.shape[3], 0, views.shape[2] - kept.shape[2]), value=True)
    return torch.where(kept, views, filler)
