"""The student as DeepSpeed trains it: Hugging Face's model, the distillation projections and the objective.

`forward` is the training forward (loss terms); `predict` the inference one. The module knows where each of its
entries came from in the teacher (`kept`), which is what a resize event narrows.

Every computation enters through a call of the module itself, also those outside of training: ZeRO-3 gathers parameters
in hooks on module calls, and fetches them ahead of need only while calls follow the order of the last training step.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from homodistil.config import LossConfig
from homodistil.data.masking import Batch
from homodistil.distill.objective import LossTerms, Objective
from homodistil.distill.teacher import TeacherOutput, head_only_parameters, wanted_rows
from homodistil.models import axes, family_of
from homodistil.models.axes import AxisTable, AxisUse, Keep
from homodistil.models.shapes import full_numel
from homodistil.models.taps import Taps


class Student(nn.Module):
    """Args:
    model: masked LM with tapped attention, a copy of the teacher at first.
    config: weights and options of the terms.
    distil: False trains MLM alone (teacher correction): no projections are made.
    """

    def __init__(self, model: nn.Module, config: LossConfig, distil: bool = True) -> None:
        super().__init__()
        self.model = model
        self.family = family_of(model.config.model_type)
        self.objective = Objective(config)
        self.projections = self._make_projections(config) if distil else nn.ModuleDict()
        self.kept = axes.whole(self.family.axis_table(model).widths)
        self._taps = Taps(model, self.family)
        if not self.objective.needs_logits:
            for parameter in head_only_parameters(model, self.family):
                parameter.requires_grad_(False)

    def _make_projections(self, config: LossConfig) -> nn.ModuleDict:
        """Identity matrices: every distillation term starts at exactly 0, and slicing one makes it a selection."""
        names = ["embedding"] if config.embedding > 0 else []
        if config.hidden > 0:
            names += [f"layer_{i}" for i in range(len(self.family.layers(self.model)))]
        return nn.ModuleDict({name: self._identity(config.projection_learned) for name in names})

    def _identity(self, learned: bool) -> nn.Linear:
        hidden_size = self.model.config.hidden_size
        projection = nn.Linear(hidden_size, hidden_size, bias=False)
        nn.init.eye_(projection.weight)
        return projection.requires_grad_(learned)

    def axis_table(self) -> AxisTable:
        """The family's table under the name `model`, and the student's side of every projection."""
        # torch keeps (out, in): a student-side W reads the shrinking width, a teacher-side W writes it.
        dim = 1 if self.objective.config.projection == "student" else 0
        names = [f"projections.{name}.weight" for name in self.projections]
        extra = [AxisUse(name, dim, ("hidden",), scored=False) for name in names]
        return self.family.axis_table(self.model).prefixed("model").with_uses(extra)

    @property
    def head_maps(self) -> list[Tensor]:
        """Per layer the teacher head of each student head, int64 (N_student,), on the CPU."""
        return [self.kept[f"layer.{i}.heads"] for i in range(len(self.family.layers(self.model)))]

    def forward(
        self,
        batch: Batch,
        teacher: TeacherOutput | None = None,
        objective: Objective | None = None,
        only_logits: bool = False,
    ) -> LossTerms | Tensor:
        """The training forward: loss terms of one micro-batch. `teacher` None: MLM alone.

        Args:
            objective: see `compare`; the trained one by default.
            only_logits: see `predict`.
        """
        objective = objective or self.objective
        tapped = self._taps.run(batch.input_ids, batch.attention_mask)
        if only_logits:
            return self._head(wanted_rows(tapped.last, batch, "masked"))
        logits = None
        if objective.needs_logits:
            logits = self._head(wanted_rows(tapped.last, batch, objective.config.kl_positions))
        return objective(tapped, logits, teacher, batch, self.projections, self.head_maps)

    def compare(self, batch: Batch, teacher: TeacherOutput | None, objective: Objective) -> LossTerms:
        """The terms of `objective`, which may differ from the one that is trained (see evaluation/gap.py)."""
        return self(batch, teacher, objective)

    @torch.no_grad()
    def predict(self, batch: Batch) -> Tensor:
        """Logits (M, V) of the masked rows."""
        return self(batch, only_logits=True)

    def _head(self, rows: Tensor) -> Tensor:
        return self.family.mlm_head(self.model)(rows)

    def after_resize(self, keep: Keep) -> None:
        """Call once parameters have been sliced by `keep`: sizes that modules remember, origins, head maps."""
        before = {axis: index.shape[-1] for axis, index in self.kept.items()}
        widths = axes.widths_after(before, keep)
        self.kept = axes.compose(self.kept, keep, axes.head_axes(before))
        self.family.refresh(self.model, widths)
        self._refresh_projections(widths["hidden"])

    def _refresh_projections(self, hidden_size: int) -> None:
        for projection in self.projections.values():
            if self.objective.config.projection == "student":
                projection.in_features = hidden_size
            else:
                projection.out_features = hidden_size

    @property
    def widths(self) -> dict[str, int]:
        """Axis -> width of today."""
        return {axis: index.shape[-1] for axis, index in self.kept.items()}

    @property
    def softmax_scale(self) -> float:
        """What the softmax multiplies q.k with: the teacher's, whatever the width of the heads now."""
        return self._taps.scale

    def num_parameters(self) -> int:
        """Parameters of the model that is exported (tied ones once, projections left out)."""
        return sum(full_numel(p) for p in self.model.parameters())
