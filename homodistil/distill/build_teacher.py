"""A frozen teacher on its device, as `teacher.runtime`, `own_stream` and `shard` want it."""

from __future__ import annotations

import torch
from torch import nn

from homodistil.config.schema import TeacherConfig
from homodistil.distill.runtime import SideStream, build_runtime
from homodistil.distill.teacher import Teacher
from homodistil.distill.teacher_sharding import shard_layers
from homodistil.models import family_of
from homodistil.models.sentence_head import SentenceHead


def build_teacher(
    model: nn.Module,
    config: TeacherConfig,
    device: torch.device,
    dtype: torch.dtype,
    sentence_head: SentenceHead | None = None,
) -> Teacher:
    """`model`, moved to `device` as a whole or (teacher.shard) in this rank's part, in the runtime of `config`."""
    model, family = model.eval().requires_grad_(False), family_of(model.config.model_type)
    if config.shard:
        shard_layers(family.layers(model), dtype)
    model = model.to(device)
    plain = config.runtime == "torch" and not config.own_stream
    runtime = None if plain else build_runtime(model, family, config, device, dtype)
    stream = SideStream(runtime, device) if config.own_stream else None
    return Teacher(model, config.in_lock_step, runtime, stream, sentence_head and sentence_head.to(device))
