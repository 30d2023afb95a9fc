"""Compares the memory that a rank needs for the first step, at full width, with the free memory of its device."""

from __future__ import annotations

import os

import psutil
import torch

from homodistil.distill.cost import sequence_bytes
from homodistil.engine.ds_config import student_dtype, teacher_dtype
from homodistil.models.attention import keeps_probabilities
from homodistil.models.memory import state_bytes
from homodistil.preflight.findings import Findings
from homodistil.training.micro_batch import state_layout
from homodistil.training.resolve import ResolvedRun


def step_bytes(resolved: ResolvedRun, engine_config: dict, device: torch.device) -> float:
    """Predicted bytes per rank before the first cut: student, engine state, activations, and the teacher where it runs.

    Args:
        resolved: the resolved run. The student counts as a copy of the teacher; projections are not counted.
        engine_config: from `resolve_engine_config`.
    """
    config, widths, num_parameters = resolved.config, resolved.teacher_widths, resolved.teacher_parameters
    num_ranks = int(os.environ.get("WORLD_SIZE", 1))
    student, teacher = student_dtype(engine_config), teacher_dtype(config.teacher.dtype, engine_config, device)
    activations = sequence_bytes(
        widths,
        widths,
        config.loss,
        seq_len=config.data.seq_len,
        target_rows=resolved.task.target_rows(config.data),
        vocab_size=resolved.vocab_size,
        student_bytes=student.itemsize,
        teacher_bytes=teacher.itemsize,
        lock_step=config.teacher.in_lock_step or config.teacher.is_stored,
        keeps_probabilities=keeps_probabilities(device.type, student),
        architecture=resolved.family.architecture,
    ).total
    state = state_bytes(num_parameters, 0, state_layout(engine_config, num_ranks))
    of_teacher = 0 if config.teacher.is_stored else num_parameters * teacher.itemsize
    return state + of_teacher + config.train.micro_batch_size * activations


def free_bytes(device: torch.device) -> tuple[float, str]:
    """(bytes that this rank may use, description). On a CPU, the memory of the host is divided by its ranks."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0], "free on the GPU"
    num_local = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", 1)))
    return psutil.virtual_memory().available / num_local, f"available for each of {num_local} local ranks"


def check_memory(findings: Findings, needed: float, device: torch.device) -> None:
    """Check that `device` has the `needed` bytes free for this rank."""
    free, what = free_bytes(device)
    usage = f"{needed / 1e9:.2f} GB per rank predicted at full width, {free / 1e9:.1f} GB {what}"
    if needed > free:
        fix = "lower train.micro_batch_size, use a higher ZeRO stage (ds_configs/zero3.json), or more memory per rank"
        return findings.refuse("memory", usage, fix)
    findings.note("memory", usage)
