"""What a run will make, in four lines: target, parameters, losses, schedule. Known before anything is paid for."""

from __future__ import annotations

import torch

from homodistil.config.schema import RunConfig
from homodistil.distill.teacher_sharding import num_parameters
from homodistil.models.axes import Widths, layer_widths
from homodistil.pruning.schedule_protocol import Schedule
from homodistil.training.resolve import ResolvedRun


def run_summary(resolved: ResolvedRun) -> dict[str, str]:
    """Subject -> what is known of it: student, parameters, losses, pruning."""
    config, family, target = resolved.config, resolved.family, resolved.target
    if config.pruning.schedule == "none":
        target = resolved.initial
    layers = len(resolved.layer_map.layers)
    with torch.device("meta"):
        student = family.empty_model(family.student_config(resolved.teacher_config, target))
    start = "fresh weights" if config.student.init == "random" else f"from a copy of {config.teacher.name}"
    before, after = resolved.teacher_parameters, num_parameters(student)
    width = layer_widths(target, 0)
    depth = f"{layers} layer{'s' if layers > 1 else ''}"
    return {
        "student": f"{depth}, hidden {target['hidden']}, ffn {width.intermediate_size}, "
        f"{width.num_heads} heads of {width.qk_dim}; {start}",
        "parameters": f"{before:,} (teacher) -> {after:,} ({after / before:.0%})",
        "losses": ", ".join(f"{name} x {weight:g}" for name, weight in config.loss.weights.items()),
        "pruning": _pruning(config, resolved.make_schedule(), resolved.initial, target),
    }


def _pruning(config: RunConfig, schedule: Schedule, initial: Widths, target: Widths) -> str:
    pruning, steps = config.pruning, config.train.steps
    if all(initial[axis] == width for axis, width in target.items()):
        return f"nothing is cut in {steps} steps"
    return f"{pruning.schedule}, {schedule.describe()} (of {steps}); compensation {pruning.compensation}"
