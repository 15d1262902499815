"""Image encoders: any timm network of tokens or maps, saved under timm's own keys; ViTs and Evas can drop tokens.

Input: normalised views (B, C, H, W). Output: features (B, D), or tokens (B, N, D) / a map (B, D, h, w).
encoder/ holds encoder.safetensors, which loads strictly into `timm.create_model` without our code, and encoder.json.
Differs from lightly's MaskedVisionTransformerTIMM: nothing is re-initialised, positions stay trainable, dropped tokens
are not computed, and positions for smaller views are interpolated by one cached matrix (timm's bicubic).
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from timm.layers import resample_abs_pos_embed
from timm.models.densenet import DenseNet
from timm.models.eva import Eva
from timm.models.resnet import ResNet
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from configs import UserError
from ehr_features.files import new_folder, write_json, write_seal
from ehr_features.typed import read_json, undamaged
from pretrain.encoder.hub_config import timm_config
from pretrain.encoder.network import drops_tokens, layout, make, sincos, through, through_eva
from pretrain.encoder.preprocess import Preprocess
from pretrain.shapes import EncoderJson

STAGES = "stages"  # a pool of the means of the last stages' maps
LAST = 4  # of them, as DINO evaluates the last four blocks
HUB_WEIGHTS = "model.safetensors"  # the weights' name on hubs; an export has both


class Encoder(nn.Module):
    """A timm network that can leave out tokens.

    Attributes:
        net: the timm model without a classifier; its state_dict is saved.
        meta: the content of encoder.json (arch, model_args, in_chans, width, image_size, pool, preprocess, ...).
        name: the folder it was loaded from, else its architecture.
        width: D.
        preprocess: uint8 films -> input.
    """

    net: Any  # nn.Module's own attribute types would hide timm's

    def __init__(self, net: nn.Module, meta: dict[str, Any], preprocess: Preprocess) -> None:
        super().__init__()
        self.net = net
        self.meta = meta
        self.name = str(meta["arch"])
        self.preprocess = preprocess
        self.layout = layout(net, self.name, meta["in_chans"], meta["image_size"])
        self.width = self.layout.width
        self.is_vit = drops_tokens(net)
        self.is_eva = self.is_vit and isinstance(net, Eva)
        self.exact = True  # see `_as_timm`; a training's moving average goes without
        self._checkpointing = False
        self._resample: dict[tuple[Any, ...], Tensor] = {}

    @property
    def pools(self) -> tuple[str, ...]:
        """Valid values of `pool`; the first is that of timm's own forward."""
        own = getattr(self.net, "global_pool", "avg")
        if self.is_vit:
            if self.net.attn_pool is not None:
                return ("map",)
            if self.net.cls_token is None:
                return ("avg",)
            return ("avg", "cls") if own == "avg" else ("cls", "avg")
        kinds = {"token": "cls", "map": "map", "max": "max"}
        first = kinds.get(own, "avg") if self.layout.form == "tokens" else "avg"
        if self.layout.width != self.layout.channels:  # layers after the pooling
            return (first,)
        if self.layout.form != "tokens":
            return "avg", "max"
        return tuple(dict.fromkeys((first, "avg", *(["cls"] if self.layout.prefix else []))))

    @property
    def heads(self) -> int | None:
        """Attention heads of a ViT."""
        return int(self.net.blocks[0].attn.num_heads) if self.is_vit else None

    def set_norm_eps(self, eps: float) -> None:
        """Set the constant of all layer norms, which timm fixes by family; `meta` records it."""
        for module in self.net.modules():
            if isinstance(module, nn.LayerNorm):
                module.eps = eps
        self.meta["norm_eps"] = eps

    @property
    def checkpointing(self) -> bool:
        """Whether blocks are computed again in the backward pass: less memory, more time."""
        return self._checkpointing

    @checkpointing.setter
    def checkpointing(self, wanted: bool) -> None:
        if wanted == self._checkpointing:
            return
        self._checkpointing = wanted
        try:
            self.net.set_grad_checkpointing(wanted)
        except (AssertionError, AttributeError):
            raise UserError(f"checkpointing: timm's {self.meta['arch']} does not support it; set it to false") from None

    def forward(
        self,
        x: Tensor,
        pool: str | None = None,
        keep: Tensor | None = None,
        *,
        hide: tuple[Tensor, Tensor] | None = None,
        tokens: bool = False,
    ) -> Tensor:
        """(B, C, H, W) -> (B, D).

        Args:
            x: normalised by `preprocess`.
            pool: `cls` or `avg` (mean of patch tokens) of a ViT, `map` of one that learned to pool; `avg` or `max` of a
                map; `stages`; None: encoder.json's.
            keep: (B, n) indices of the patches to compute; a ViT only.
            hide: (B, N) true for patches in whose place a token (D,) stands, and that token; a ViT only.
            tokens: give what `features` does.
        """
        if pool == STAGES and not tokens:
            return self.stages(x)
        if tokens or hide is not None:
            features = self._tokens(x, keep, hide=hide) if self.is_vit else self.features(x, keep)
            return features if tokens else self.pool(features, pool)
        if self.is_vit and (pool or self.meta["pool"]) == "cls" and not self._as_timm(x, keep):
            return self.pool(self._tokens(x, keep, first_only=True), pool)
        return self.pool(self.features(x, keep), pool)

    def stages(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, sum of D): the means of the maps of the last four stages, of a ViT of its last blocks.

        Early stages keep what is small and local, which the last one may have given up for what its method asks for.
        """
        count = len(self.net.blocks) if self.is_vit else len(getattr(self.net, "feature_info", ()))
        try:
            maps = self.net.forward_intermediates(
                x, indices=min(LAST, count), norm=self.is_vit, output_fmt="NCHW", intermediates_only=True
            )
        except (AttributeError, AssertionError, TypeError):
            raise UserError(f"pool `{STAGES}`: timm gives no stages of {self.meta['arch']}") from None
        return torch.cat([one.mean(dim=(2, 3)) for one in maps], dim=1)

    def pool(self, features: Tensor, pool: str | None = None) -> Tensor:
        """Tokens or map -> (B, D)."""
        pool = self._known(pool or self.meta["pool"])
        if not self.is_vit:
            return self._pool_of_timm(features, pool)
        if pool == "map":
            pooled = self.net.attn_pool(features) if self.is_eva else self.net.pool(features)
            return self.net.fc_norm(pooled)
        return self.net.fc_norm(
            features[:, 0] if pool == "cls" else features[:, self.net.num_prefix_tokens :].mean(dim=1)
        )

    def _pool_of_timm(self, features: Tensor, pool: str) -> Tensor:
        """`pool` of a net without token dropping; the first of `pools` is timm's own head, with its layers."""
        if pool == self.pools[0] and not isinstance(self.net, (DenseNet, ResNet)):
            last = self.layout.form == "map, channels last"  # `features` gives all maps channels first
            return self.net.forward_head(features.permute(0, 2, 3, 1) if last else features, pre_logits=True)
        if self.layout.form == "tokens":
            return features[:, 0] if pool == "cls" else features[:, self.layout.prefix :].mean(dim=1)
        return features.mean(dim=(2, 3)) if pool == "avg" else features.amax(dim=(2, 3))

    def _known(self, pool: str) -> str:
        if pool not in self.pools:
            raise UserError(f"pool `{pool}` is not one of {self.meta['arch']}'s: {', '.join(self.pools)}")
        return pool

    def features(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        """(B, C, H, W) -> (B, N, D), class token first, after the last norm; or the last map (B, D, h, w)."""
        if not self.is_vit:
            assert keep is None, "only a ViT can drop tokens; other nets mask their input"
            features = self.net.forward_features(x)
            return features.permute(0, 3, 1, 2) if self.layout.form == "map, channels last" else features
        return self.net.forward_features(x) if self._as_timm(x, keep) else self._tokens(x, keep)

    def _as_timm(self, x: Tensor, keep: Tensor | None) -> bool:
        """Whether timm's own forward computes a ViT: frozen, whole films of its own size. An export then gives the
        same bits; the faster steps of `_tokens` round differently."""
        frozen = self.exact and not (self.training or torch.is_grad_enabled() or self.checkpointing)
        return frozen and keep is None and tuple(x.shape[-2:]) == tuple(self.net.patch_embed.img_size)

    def _tokens(
        self,
        x: Tensor,
        keep: Tensor | None,
        first_only: bool = False,
        hide: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """(B, C, H, W) -> (B, N, D); with `first_only`, (B, 1, D): the class token alone."""
        net = self.net
        tokens = self._embed(x)  # (B, N, D)
        if self.is_eva:
            if hide is not None:
                tokens = torch.where(hide[0][:, :, None], hide[1].to(tokens.dtype), tokens)
            patches = tokens.unflatten(1, (x.shape[-2] // self.patch, -1))  # (B, h, w, D)
            return through_eva(net, patches, keep, checkpointing=self.checkpointing)
        if hide is not None:
            tokens = torch.where(hide[0][:, :, None], hide[1].to(tokens.dtype), tokens)
        prefix, patches = self._positions((x.shape[-2] // self.patch, x.shape[-1] // self.patch))
        tokens = tokens + patches
        if keep is not None:
            tokens = tokens.gather(1, keep[:, :, None].expand(-1, -1, tokens.shape[2]))  # (B, n, D)
        if prefix is not None:
            tokens = torch.cat([prefix.expand(len(x), -1, -1), tokens], dim=1)
        tokens = net.norm_pre(net.pos_drop(tokens))
        return net.norm(through(net.blocks, tokens, first_only=first_only, checkpointing=self.checkpointing))

    @property
    def patch(self) -> int:
        """Pixels of a patch's side, or of a cell of the last map."""
        return self.layout.patch

    def _embed(self, x: Tensor) -> Tensor:
        """The patch embedding as one matrix product: the convolution's kernel and stride are equal."""
        size, side = self.patch, x.shape[-2:]
        if side[0] % size or side[1] % size:
            raise UserError(
                f"a view of {side[0]} x {side[1]} pixels is not whole patches of {size} of {self.meta['arch']}"
            )
        proj = self.net.patch_embed.proj
        x = x.unflatten(3, (-1, size)).unflatten(2, (-1, size))  # (B, C, h, p, w, p)
        x = x.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)  # (B, N, C*p*p)
        return self.net.patch_embed.norm(nn.functional.linear(x, proj.weight.flatten(1), proj.bias))

    def _positions(self, grid: tuple[int, int]) -> tuple[Tensor | None, Tensor | float]:
        """Prefix tokens with their positions (1, P, D), and positions (1, N, D) of a grid's patches."""
        net = self.net
        prefix = [token for token in (net.cls_token, net.reg_token) if token is not None]
        tokens = torch.cat(prefix, dim=1) if prefix else None
        positions = net.pos_embed
        if positions is None:
            return tokens, 0.0
        if not net.no_embed_class and tokens is not None:
            own, positions = positions[:, : tokens.shape[1]], positions[:, tokens.shape[1] :]
            tokens = tokens + own
        native = tuple(net.patch_embed.grid_size)
        if grid == native:
            return tokens, positions
        key = (grid, positions.device)
        if key not in self._resample:  # (n, N): timm's interpolation is linear in the positions
            with torch.inference_mode(False):  # usable for inference and later for training
                unit = torch.eye(native[0] * native[1]).unsqueeze(0)
                self._resample[key] = resample_abs_pos_embed(unit, list(grid), list(native), 0)[0].to(positions.device)
        return tokens, (self._resample[key] @ positions[0].float()).unsqueeze(0)


def create(
    arch: str,
    *,
    in_chans: int = 1,
    image_size: int = 224,
    model_args: dict[str, Any] | None = None,
    preprocess: Preprocess | None = None,
    pool: str | None = None,
    positions: str = "timm",
    norm_eps: float | None = None,
) -> Encoder:
    """A freshly initialised encoder.

    Args:
        arch: a timm name; any network that gives tokens or a map of features.
        image_size: pixels of a side of the largest view; sets the number of positions of a ViT.
        model_args: passed to timm (depth, embed_dim, num_heads, ...).
        positions: `timm`: its own initialisation; `sincos`: sine-cosine, trainable all the same.
        norm_eps: of all layer norms, as the owner of weights has it; None: timm's.
    Raises: UserError: timm has no such model, refuses the arguments, or it gives neither tokens nor a map;
            or it exceeds this machine's memory.
    """
    args = dict(model_args or {})
    net = make(arch, in_chans, image_size, args)
    if isinstance(net, VisionTransformer) and net.pos_embed is not None and positions == "sincos":
        sincos(net)
    meta = {
        "arch": arch,
        "model_args": args,
        "in_chans": in_chans,
        "width": net.num_features,
        "image_size": image_size,
    }
    preprocess = dataclasses.replace(preprocess or Preprocess(image_size), size=image_size, in_chans=in_chans)
    encoder = Encoder(net, meta, preprocess)
    meta["pool"] = encoder._known(pool or encoder.pools[0])
    if norm_eps is not None:
        encoder.set_norm_eps(norm_eps)
    return encoder


def save(folder: str | Path, encoder: Encoder, meta: dict[str, Any] | None = None, card: str | None = None) -> Path:
    """Write encoder/ atomically: weights under timm's keys, encoder.json, timm's config.json, MODEL_CARD.md."""
    folder = Path(folder)
    with new_folder(folder) as part:
        write_files(part, encoder, meta, card)
    return folder


def write_files(folder: Path, encoder: Encoder, meta: dict[str, Any] | None = None, card: str | None = None) -> None:
    """The files of encoder/, in a folder that exists."""
    state = {key: value.detach().cpu().contiguous().clone() for key, value in encoder.net.state_dict().items()}
    data = to_bytes(state, metadata={"format": "pt"})  # safetensors' own writer hides the error of a full disk
    (folder / "encoder.safetensors").write_bytes(data)
    write_json(folder / "encoder.json", {**about(encoder), **(meta or {})})
    write_json(folder / "config.json", timm_config(encoder))
    if card is not None:
        (folder / "MODEL_CARD.md").write_text(card, encoding="utf-8")
    write_seal(folder, "encoder.*")


def about(encoder: Encoder) -> dict[str, Any]:
    """The content of encoder.json."""
    return {**encoder.meta, "preprocess": encoder.preprocess.to_json()}


def load(folder: str | Path) -> Encoder:
    """Load the encoder that `save` wrote, in eval mode, on the CPU.

    Args:
        folder: encoder/, or a run that has one.
    Raises: UserError: no encoder found, damaged, or weights of another architecture than encoder.json names.
    """
    folder = encoder_folder(folder)
    meta = read_meta(folder)
    preprocess = Preprocess.from_json(meta["preprocess"], meta["in_chans"], f"{folder}/encoder.json")
    given = {key: meta[key] for key in ("in_chans", "image_size", "model_args", "pool")}
    try:
        encoder = create(meta["arch"], **given, preprocess=preprocess, norm_eps=meta.get("norm_eps"))
    except UserError as error:
        raise UserError(f"{folder}/encoder.json: {error}") from None
    encoder.meta, encoder.name = meta, str(folder)
    path = folder / "encoder.safetensors"
    if not path.is_file() and (folder / HUB_WEIGHTS).is_file():
        path = folder / HUB_WEIGHTS
    if not path.is_file():
        raise UserError(f"{path}: no such file; the encoder folder is incomplete")
    with undamaged(path, "copy or export it again"):
        state = load_file(path)
    if faults := differences(encoder.net.state_dict(), state):
        made = f"{meta['arch']} {meta['model_args']}"
        raise UserError(f"{path}: these weights do not fit the model in encoder.json, {made}: {faults}")
    encoder.net.load_state_dict(state)
    return encoder.eval()


def encoder_folder(path: str | Path) -> Path:
    """The encoder/ of a run folder, else the path itself."""
    path = Path(path)
    return path / "encoder" if (path / "encoder" / "encoder.json").is_file() else path


def read_meta(folder: str | Path) -> dict[str, Any]:
    """encoder.json, checked. Raises: UserError: absent, damaged, or a required key is missing."""
    path = Path(folder) / "encoder.json"
    if not path.is_file():
        raise UserError(
            f"{folder}: not an encoder folder (no encoder.json); give the encoder/ of a pretraining run, or a "
            "published encoder: a folder with config.json and weights, hf-hub:ORG/NAME, timm:NAME, rad-dino:PATH, "
            "chexfound:PATH"
        )
    meta: dict[str, Any] = read_json(path, EncoderJson)
    return meta


def differences(wanted: dict[str, Tensor], found: dict[str, Tensor]) -> str:
    """Why weights cannot replace others, in a few words; empty if they can.

    Missing, unexpected and differently shaped keys; integers or non-finite values in place of finite floats.
    """
    faults: dict[str, list[str]] = {
        "missing": sorted(wanted.keys() - found.keys()),
        "unexpected": sorted(found.keys() - wanted.keys()),
    }
    for key in sorted(wanted.keys() & found.keys()):
        mine, theirs = wanted[key], found[key]
        if mine.shape != theirs.shape:
            faults.setdefault("of another shape", []).append(f"{key} {(*theirs.shape,)} instead of {(*mine.shape,)}")
        elif mine.is_floating_point() and not theirs.is_floating_point():
            faults.setdefault("of another type", []).append(f"{key} {theirs.dtype} instead of {mine.dtype}")
        elif mine.is_floating_point() and not theirs.float().isfinite().all():
            faults.setdefault("with values that are not finite", []).append(key)
    return "; ".join(f"{len(keys)} {what}, e.g. {', '.join(keys[:3])}" for what, keys in faults.items() if keys)
