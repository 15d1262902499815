"""iBOT: DINO, and masked patches are assigned to the teacher's classes of these patches (arXiv:2111.07832).

Differs from the original: every large view has a fixed share of masked patches (mask.ratio), in one block; published:
the share is random, and half of the views have none.
"""

from __future__ import annotations

import torch
from lightly.loss import IBOTPatchLoss
from torch import Tensor, nn

from pretrain.methods.base import Batch, Setup, by_view
from pretrain.methods.dino import DINO, centre_momentum


class IBOT(DINO):
    """One head gives the classes of films and of patches."""

    needs_vit = True
    masked = ("target", "random")

    def begin(self, setup: Setup) -> None:
        super().begin(setup)
        o = setup.options
        self.mask_token = nn.Parameter(torch.zeros(self.anchor.width))
        self.patch_loss = IBOTPatchLoss(
            setup.out, teacher_temp=o.teacher_temperature, student_temp=o.student_temperature,
            center_momentum=centre_momentum(setup),
        )  # fmt: skip

    def embed(self, batch: Batch) -> dict[str, Tensor]:
        classes, patches = [], []
        for view, keep in self._views(batch):
            hide = None if keep is None else (self._hidden(keep), self.mask_token)
            tokens = self.anchor(view, hide=hide, tokens=True)
            classes.append(self.anchor.pool(tokens))
            if hide is not None:
                patches.append(self._of_patches(self.anchor_head, tokens, hide[0], len(batch.target)))
        student = self.project(self.tell(classes, batch), batch)
        return {"student": student, "patches": torch.cat(patches), "views": by_view(classes, len(batch.target))}

    def observe(self, batch: Batch) -> dict[str, Tensor]:
        films, classes, patches, features = len(batch.target), [], [], []
        for view, keep in self._views(batch):
            if keep is None:
                continue
            tokens = self.target(view, tokens=True)
            features.append(self.target.pool(tokens))
            classes.append(self.target_head(features[-1]).unflatten(0, (-1, films)))
            patches.append(self._of_patches(self.target_head, tokens, self._hidden(keep), films))
        return {"teacher": torch.cat(classes), "wanted": torch.cat(patches), "features": features[0][:films][None]}

    def score(self, seen: dict[str, Tensor], batch: Batch) -> dict[str, Tensor]:
        out = super().score(seen, batch)
        wanted, patches = (seen[name].flatten(0, 1) for name in ("wanted", "patches"))  # (V*B, n, K)
        mask = torch.ones(*patches.shape[:2], 1, dtype=torch.bool, device=patches.device)
        flat = (wanted.flatten(0, 1), patches.flatten(0, 1), mask)
        of_patches = self.patch_loss(*flat, teacher_temp=self.teacher_temperature)
        of_films = out["loss"]
        parts = {"class_loss": of_films.detach(), "patch_loss": of_patches.detach()}
        return out | parts | {"loss": of_films + self.setup.options.patch_weight * of_patches}

    def _views(self, batch: Batch) -> list[tuple[Tensor, Tensor | None]]:
        """Groups of views (V*B, C, H, W) with the patches to keep; the large ones are masked, and come first."""
        return list(zip([batch.target, *batch.anchors], [batch.target_keep, *batch.keep], strict=True))

    def _hidden(self, keep: Tensor) -> Tensor:
        """(V*B, N), true where a patch of a large view is masked; the same number in each."""
        patches = (self.anchor.meta["image_size"] // self.anchor.patch) ** 2
        return torch.ones(len(keep), patches, dtype=torch.bool, device=keep.device).scatter_(1, keep, False)

    def _of_patches(self, head: nn.Module, tokens: Tensor, mask: Tensor, films: int) -> Tensor:
        """Classes (V, B, n, K) of the masked patches of (V*B, N, D)."""
        picked: Tensor = head(tokens[:, -mask.shape[1] :][mask])
        return picked.unflatten(0, (len(tokens) // films, films, -1))
