"""DINO: the student's view of a film is assigned to the classes of the teacher's other views (arXiv:2104.14294)."""

from __future__ import annotations

from typing import Any

import torch
from lightly.loss import DINOLoss
from lightly.models.modules.heads import DINOProjectionHead
from torch import Tensor, nn

from pretrain.methods.base import Batch, Method, Setup, by_view


class DINO(Method):
    """The student (anchor) sees all views, conditioned on the record; the teacher (target) the large ones."""

    def head(self, width: int, setup: Setup) -> nn.Module:
        """lightly's head, with batch norm only if the network has it too."""
        o = setup.options
        return DINOProjectionHead(
            width, setup.hidden, o.bottleneck, setup.out, batch_norm=setup.norm == "batch",
            freeze_last_layer=0, norm_last_layer=o.norm_last_layer,
        )  # fmt: skip

    def head_copy(self) -> nn.Module:
        made = self.head(self.anchor.width, self.setup)  # weight norm cannot be copied
        made.load_state_dict(self.anchor_head.state_dict())
        return made

    def begin(self, setup: Setup) -> None:
        o = setup.options
        self.teacher_temperature = o.teacher_temperature
        self.class_loss = DINOLoss(
            setup.out, teacher_temp=o.teacher_temperature, student_temp=o.student_temperature,
            center_momentum=centre_momentum(setup), warmup_teacher_temp_epochs=1,
        )  # fmt: skip

    def before_step(self, step: int) -> None:
        """Raise the teacher's temperature linearly during its warm-up."""
        o, epoch = self.setup.options, step / self.setup.steps_per_epoch
        share = min(1.0, epoch / o.warmup_epochs) if o.warmup_epochs else 1.0
        self.teacher_temperature = o.teacher_start + share * (o.teacher_temperature - o.teacher_start)

    def before_update(self, step: int) -> None:
        """Freeze the last layer during the first epochs."""
        if step / self.setup.steps_per_epoch < self.setup.options.freeze_epochs:
            last: Any = self.anchor_head.last_layer
            for parameter in last.parameters():
                parameter.grad = None

    def embed(self, batch: Batch) -> dict[str, Tensor]:
        parts = self.encode([batch.target, *batch.anchors], [None, *batch.keep])
        views = by_view(parts, len(batch.target))
        return {"student": self.project(self.tell(parts, batch), batch), "views": views}

    def observe(self, batch: Batch) -> dict[str, Tensor]:
        features = [self.target(view) for view in self.large_views(batch)]
        return {"teacher": torch.stack([self.target_head(f) for f in features]), "features": features[0][None]}

    def score(self, seen: dict[str, Tensor], batch: Batch) -> dict[str, Tensor]:
        teacher, student = seen["teacher"], seen["student"]
        with torch.no_grad():  # before the centre moves
            centred = (teacher - self.class_loss.center) / self.teacher_temperature
            sure = centred.softmax(dim=2).amax(dim=2).mean()
        loss = self.class_loss(list(teacher), list(student), teacher_temp=self.teacher_temperature)
        return {"loss": loss, "teacher_max": sure}


def centre_momentum(setup: Setup) -> float:
    """Of each update of a centre: a batch in parts updates it as often as it has parts."""
    momentum: float = setup.options.center_momentum ** (1 / setup.parts)
    return momentum
