"""What a run of a study would be, without running it: whether the product accepts it, and how large its student is."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import PretrainedConfig

from experiments.quality.specs import RunSpec
from homodistil.distill.teacher_sharding import num_parameters
from homodistil.errors import UserError
from homodistil.models.axes import first_layers, num_layers
from homodistil.training.resolve import ResolvedRun, resolve_run
from homodistil.training.settle import settle


@dataclass(frozen=True)
class Outlook:
    """Exactly one of the two is there."""

    resolved: ResolvedRun | None = None
    refusal: str = ""
    """Why the product does not run it, in its words."""

    @property
    def parameters(self) -> int | None:
        """Of the student at its final widths."""
        return None if self.resolved is None else student_parameters(self.resolved)


def outlook(spec: RunSpec, teacher: PretrainedConfig) -> Outlook:
    """Reads no weights. `teacher`: configuration of the run's teacher."""
    try:
        config = spec.config()
        settle(config, teacher)
        return Outlook(resolve_run(config, teacher))
    except UserError as error:
        return Outlook(refusal=str(error))


def student_parameters(resolved: ResolvedRun) -> int:
    """Tied ones once; without what the loss terms learn."""
    widths = resolved.target
    if resolved.config.pruning.schedule == "none":  # only layers leave, if any
        widths = first_layers(resolved.initial, num_layers(widths))
    with torch.device("meta"):
        student = resolved.family.student_config(resolved.teacher_config, widths)
        return num_parameters(resolved.family.empty(student, resolved.task.has_lm_head))
