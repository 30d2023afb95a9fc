"""Checks of a run's settings that need no teacher and no data, for its start and for the check before it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from homodistil.config.schema import RunConfig
from homodistil.distill.losses.active import active_terms
from homodistil.distill.runtime import check_teacher_runtime
from homodistil.distill.student_compile import check_student_compile
from homodistil.engine.ds_config import teacher_dtype, zero_stage
from homodistil.engine.optimizer import check_implementation
from homodistil.metrics.trackers.registry import require_installed
from homodistil.training.final_formats import check_formats


def settings_checks(
    config: RunConfig, engine_config: dict | None, device: torch.device
) -> Iterator[Callable[[], object]]:
    """The checks, each of which raises `UserError` or does nothing.

    Args:
        engine_config: from `resolve_engine_config`; None, if DeepSpeed's JSON cannot be used, so that what depends on
            it is left out.
    """
    yield lambda: teacher_dtype(config.teacher.dtype, engine_config or {}, device)
    yield lambda: check_implementation(config.optimizer.implementation)
    yield lambda: require_installed(config.run.trackers)
    yield lambda: check_formats(config.run)
    yield lambda: check_teacher_runtime(config.teacher, device)
    if engine_config is not None:
        yield lambda: check_student_compile(config.student, zero_stage(engine_config), device)
    yield lambda: active_terms(config.loss)  # imports loss.plugins on this rank
