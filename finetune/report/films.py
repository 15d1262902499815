"""The report's encoder section: a map of films by their features, nearest films, attention maps.

Input: runs with encoder/, a store and a features folder. Output: figures. The map shows points alone; films appear
only where they were asked for, since MIMIC must not leave.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from markupsafe import Markup
from numpy.typing import NDArray
from PIL import Image
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE

from configs import UserError
from ehr_features.files import read_table
from ehr_features.schema import FINDINGS
from finetune.labelled import age_bands
from finetune.report.figures import legend, scatter
from finetune.report.html import figure, join, number, render, section, table
from finetune.run_folders import Run
from pretrain import encoder as encoders
from pretrain.store import Store

FILMS = 500  # on the map
NEIGHBOURS = 10
ENCODERS = 2
SHOWN = 6
ASKED = "asked for"


@dataclass(frozen=True)
class Sample:
    """Films of a store with their table rows and features."""

    run: Run
    encoder: encoders.Encoder
    table: pd.DataFrame  # (N,) rows of images.parquet
    films: NDArray[np.uint8]  # (N, H, W)
    features: NDArray[np.float32]  # (N, D), unit length


def films_section(runs: Sequence[Run], *, with_films: bool) -> Markup:
    """Map, and where asked for nearest films and attention, of the first pretrained encoders."""
    able = [run for run in runs if run.kind == "pretraining" and run.encoder and run.store and run.features][:ENCODERS]
    parts: list[Markup | None] = []
    for run in able:
        try:
            sample = draw(run)
        except UserError as error:  # moved or replaced weights must not stop the rest of the page
            parts.append(render("paragraph", "muted", f"{run.called} cannot be shown: {error}"))
            continue
        if len(sample.table) > 3 * NEIGHBOURS:
            parts.append(map_figure(sample))
        if with_films and len(sample.table) > SHOWN:
            parts += [nearest_figure(sample), attention_figure(sample)]
    lead = "Films of the test split through the frozen encoder."
    return section("encoder", "What the encoder sees", parts, lead=lead)


def draw(run: Run, seed: int = 0) -> Sample:
    """Up to FILMS films of the test split, in the store, with their features."""
    assert run.store is not None and run.features is not None
    store, images = Store(run.store), read_table(run.features, "images")
    images = images[(images["split"] == "test") & images["dicom_id"].isin(store.index["dicom_id"])]
    if images.empty:
        raise UserError(f"{run.store} holds no film of the test split of {run.features}")
    images = images.sample(min(FILMS, len(images)), random_state=seed).sort_values("dicom_id").reset_index(drop=True)
    encoder = encoders.load(run.folder / "encoder")
    films = store.read(images["dicom_id"].tolist())
    device = "cuda" if torch.cuda.is_available() else "cpu"
    features = encoders.embed(encoder, films, device=device).numpy()
    features = features - features.mean(axis=0)  # what all films share tells no two apart
    length = np.linalg.norm(features, axis=1, keepdims=True)
    return Sample(run, encoder.cpu(), images, films, (features / np.maximum(length, 1e-12)).astype(np.float32))


def groupings(images: pd.DataFrame) -> dict[str, dict[str, NDArray[np.bool_]]]:
    """What the map is coloured by: the commonest finding, sex, age, view; rows of each group."""
    found: dict[str, pd.Series] = {}
    counts = {f: int((images[f] == 1).sum()) for f in FINDINGS if f in images and f != "No Finding"}
    if counts and max(counts.values()):
        finding = max(counts, key=lambda f: min(counts[f], len(images) - counts[f]))
        found[finding] = (images[finding] == 1).map({True: "present", False: "absent"})
    if "sex" in images:
        found["sex"] = images["sex"].map({"F": "women", "M": "men"})
    if "age_years" in images:
        found["age"] = age_bands(images["age_years"])
    if "view" in images:
        found["view"] = images["view"]
    groups = {}
    for name, values in found.items():
        kept = values.value_counts().index[:4]
        order = [v for v in values.cat.categories if v in kept] if hasattr(values, "cat") else sorted(kept, key=str)
        rows = {str(v): (values == v).to_numpy(bool) for v in order}
        groups[name] = {v: mask for v, mask in rows.items() if mask.any()}
    return groups


def map_figure(sample: Sample) -> Markup:
    """t-SNE of the features, coloured four ways; how alike a film's neighbours are, in numbers."""
    n = len(sample.table)
    parts = PCA(min(50, n, sample.features.shape[1]), random_state=0).fit_transform(sample.features)
    points = TSNE(perplexity=min(30, n / 4), init="pca", random_state=0).fit_transform(parts)
    near = np.argsort(-(sample.features @ sample.features.T) + 2 * np.eye(n), axis=1)[:, :NEIGHBOURS]  # not itself
    panels, rows = [], []
    for name, groups in groupings(sample.table).items():
        drawn = scatter(points[:, 0], points[:, 1], list(groups.items()), name)
        panels.append(render("div", "", join([drawn, legend(list(enumerate(groups)))])))
        for group, mask in groups.items():
            same = float(mask[near[mask]].mean())
            rows.append([name, group, int(mask.sum()), number(same), number(float(mask.mean()))])
    caption = (
        f"{n} test films; films that the encoder takes for alike lie together (t-SNE: distances between clusters mean "
        "nothing). A colour that gathers is something that the encoder sees; the table says how much of it there is."
    )
    columns = ["by", "group", "films", f"share of {NEIGHBOURS} nearest in the group", "share by chance"]
    drawing = render("div", "panels two-columns maps", join(panels))
    return figure(
        f"map-{sample.run.name}", f"Map of films: {sample.run.called}", drawing, caption, table(columns, rows)
    )


def nearest_figure(sample: Sample) -> Markup:
    """Some films, each with its nearest of other people."""
    alike = sample.features @ sample.features.T
    people = sample.table["subject_id"].to_numpy()
    alike[people[:, None] == people[None, :]] = -np.inf
    queries = np.linspace(0, len(people) - 1, 4).astype(int)
    rows, cells = [], []
    for query in queries:
        order = np.argsort(-alike[query])[:5]
        shown = [_film(sample, int(query), ASKED)]
        shown += [_film(sample, int(i), f"cosine {alike[query, i]:.2f}") for i in order]
        rows.append(render("div", "films", join(shown)))
        cells += [
            [_findings(sample, int(query)), rank + 1, number(float(alike[query, i])), _findings(sample, int(i))]
            for rank, i in enumerate(order)
        ]
    caption = (
        "Left, a film; then the nearest films of other people. Look for what they share: the finding, or the machine?"
    )
    numbers = table(["film", "rank", "cosine", "findings of the nearest"], cells)
    return figure(f"nearest-{sample.run.name}", f"Nearest films: {sample.run.called}", join(rows), caption, numbers)


def attention_figure(sample: Sample) -> Markup:
    """Where the encoder looks, over a few films."""
    chosen = np.linspace(0, len(sample.table) - 1, SHOWN).astype(int)
    x = sample.encoder.preprocess(sample.films[chosen])
    vit = sample.encoder.is_vit
    if not vit and sample.encoder.layout.form == "tokens":
        return Markup("")
    maps = rollout(sample.encoder, x) if vit else grad_cam(sample.encoder, x)
    shown, cells = [], []
    for i, heat in zip(chosen, maps, strict=True):
        share = float(np.sort(heat.ravel())[::-1][: max(1, heat.size // 10)].sum() / max(heat.sum(), 1e-12))
        shown.append(_film(sample, int(i), _findings(sample, int(i)), heat))
        cells.append([_findings(sample, int(i)), number(share)])
    how = (
        "Attention rollout: how much each patch reaches the class token"
        if vit
        else "Grad-CAM of the feature's own length"
    )
    caption = f"{how}; brighter is more. It shows where the encoder takes its features from, not why it is right."
    numbers = table(["film", "share held by the top tenth of the area (0.1 if even)"], cells)
    drawing = render("div", "films", join(shown))
    return figure(f"attention-{sample.run.name}", f"Where it looks: {sample.run.called}", drawing, caption, numbers)


@torch.no_grad()
def rollout(encoder: encoders.Encoder, x: torch.Tensor) -> NDArray[np.float32]:
    """Attention of the class token to each patch through all layers, (B, C, H, W) -> (B, h, w).

    Source: Abnar and Zuidema, arXiv:2005.00928: mean over heads, half of it the residual, multiplied through.
    """
    seen: list[torch.Tensor] = []
    handles, fused = [], []
    for block in encoder.net.blocks:
        fused.append(block.attn.fused_attn)
        block.attn.fused_attn = False  # the fused kernel does not hand out its weights
        handles.append(block.attn.attn_drop.register_forward_pre_hook(lambda _, args: seen.append(args[0].mean(dim=1))))
    try:
        encoder.features(x)
    finally:
        for block, handle, was in zip(encoder.net.blocks, handles, fused, strict=True):
            handle.remove()
            block.attn.fused_attn = was
    total = torch.eye(seen[0].shape[-1]).expand_as(seen[0])
    for attention in seen:
        mixed = 0.5 * attention + 0.5 * torch.eye(attention.shape[-1])
        total = mixed @ total
    patches = total[:, 0, encoder.net.num_prefix_tokens :]  # (B, N)
    side = round(patches.shape[1] ** 0.5)
    return patches.reshape(len(x), side, side).numpy()


def grad_cam(encoder: encoders.Encoder, x: torch.Tensor) -> NDArray[np.float32]:
    """Grad-CAM of half the squared length of the pooled features, (B, C, H, W) -> (B, h, w).

    Source: Selvaraju et al., arXiv:1610.02391; no label is used, as the encoder has none.
    """
    maps = encoder.features(x).detach().requires_grad_()  # (B, D, h, w)
    (encoder.pool(maps, "avg").square().sum() / 2).backward()
    assert maps.grad is not None
    weights = maps.grad.mean(dim=(2, 3), keepdim=True)
    return (weights * maps).sum(dim=1).clamp_min(0).detach().numpy()


def _findings(sample: Sample, i: int) -> str:
    row = sample.table.iloc[i]
    found = [f for f in FINDINGS if f in row and row[f] == 1]
    return ", ".join(found) or "no finding named"


def _film(sample: Sample, i: int, says: str, heat: NDArray[np.float32] | None = None) -> Markup:
    """A film of the store as a small picture, with a map over it where there is one."""
    film = Image.fromarray(sample.films[i]).resize((192, 192), Image.Resampling.BICUBIC)
    if heat is not None:
        scaled = (heat - heat.min()) / max(float(np.ptp(heat)), 1e-12)
        smooth = Image.fromarray((255 * scaled).astype(np.uint8)).resize((192, 192), Image.Resampling.BICUBIC)
        film = Image.composite(
            Image.new("RGB", film.size, (255, 150, 30)), film.convert("RGB"), smooth.point(lambda v: v * 0.6)
        )
    buffer = io.BytesIO()
    film.save(buffer, "JPEG", quality=85)
    source = "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
    return render("film", source, says, says == ASKED)
