"""How the frozen teacher's backbone runs: as it is, under torch.compile, or under deepspeed.init_inference.

    check_teacher_runtime(config.teacher, device)              # at start, before anything is made
    runtime = build_runtime(model, family, config.teacher, device, dtype)
    tapped = runtime(input_ids, attention_mask)                # never builds a graph

side_stream.py runs any of them beside the student's forward.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from homodistil.config.schema import TeacherConfig
from homodistil.distill.runtime.compiled import CompiledRuntime
from homodistil.distill.runtime.deepspeed_inference import EngineRuntime
from homodistil.distill.runtime.plain import PlainRuntime
from homodistil.distill.runtime.side_stream import Pending, SideStream
from homodistil.distill.torch_compile import require_compiler
from homodistil.errors import UserError
from homodistil.models.activations import Activations
from homodistil.models.family import ModelFamily

__all__ = ["SideStream", "Pending", "Runtime", "build_runtime", "check_teacher_runtime"]


class Runtime(Protocol):
    scale: float
    """What the teacher's softmax multiplies q.k with."""

    def __call__(
        self, input_ids: Tensor, attention_mask: Tensor | None, token_types: Tensor | None = None
    ) -> Activations:
        """All int64, (B, T); mask 1 = token, 0 = padding, None: none; types as in `Batch`. No tensor has a graph."""


def check_teacher_runtime(teacher: TeacherConfig, device: torch.device) -> None:
    """Raises `UserError` for settings of `teacher` that cannot work together or on this device."""
    if teacher.runtime == "compile":
        require_compiler("teacher.runtime", device)
    if teacher.own_stream and device.type != "cuda":
        raise UserError(
            f"teacher.own_stream: true needs an NVIDIA GPU, this run is on {device.type}; set teacher.own_stream=false"
        )
    if teacher.shard and (teacher.runtime != "torch" or teacher.own_stream):
        raise UserError(
            f"teacher.shard: true gathers layers between those of the student, so it needs teacher.runtime=torch and "
            f"teacher.own_stream=false, found {teacher.runtime} and {str(teacher.own_stream).lower()}; set these, or "
            f"teacher.shard=false"
        )


def build_runtime(
    model: nn.Module, family: ModelFamily, config: TeacherConfig, device: torch.device, dtype: torch.dtype
) -> Runtime:
    """The runtime of `config.runtime` around `model`, which is frozen, in evaluation mode and on `device` already.

    It listens to the model through taps of its own: those that were made before see nothing of attention any more.
    """
    if config.runtime == "compile":
        return CompiledRuntime(model, family, device)
    if config.runtime == "deepspeed":
        return EngineRuntime(model, family, dtype)
    return PlainRuntime(model, family)
