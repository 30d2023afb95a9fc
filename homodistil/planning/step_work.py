"""The work of one rank in one optimizer step, as numbers in which the time of the step is about linear."""

from __future__ import annotations

from dataclasses import astuple, dataclass, fields

from homodistil.distill.cost import step_flops
from homodistil.models.axes import Widths, num_layers
from homodistil.models.flops import StepFlops
from homodistil.training.micro_batch import MicroBatchPolicy
from homodistil.training.resolve import ResolvedRun

_ADAM_BYTES = 28  # per fp32 element: reads master weight, gradient and two moments, writes all except the gradient


@dataclass(frozen=True)
class StepWork:
    """Work of one rank in one optimizer step."""

    flops: float
    """FLOPs of the matrix products of teacher, student and losses."""
    activation_bytes: float
    """Activations of the forward passes, over which all operations pass that are not matrix products."""
    optimizer_bytes: float
    """Bytes that AdamW reads and writes."""
    communicated_bytes: float
    """Bytes sent by this rank."""
    layers: float
    """Layers executed, over all micro-batches: stands for the launch time of kernels."""
    gathers: float
    """Parameters gathered by ZeRO-3 (forward and backward) and by `teacher.shard`, over all micro-batches."""
    steps: float = 1.0
    """Stands for the fixed cost of a step."""


NAMES = tuple(f.name for f in fields(StepWork))


def as_row(work: StepWork) -> tuple[float, ...]:
    return astuple(work)


def run_flops(resolved: ResolvedRun, widths: Widths, num_sequences: int) -> StepFlops:
    """Of one optimizer step of a run on so many sequences, at the given widths of the student."""
    config = resolved.config
    return step_flops(
        widths,
        resolved.teacher_widths,
        config.loss,
        num_sequences=num_sequences,
        seq_len=config.data.seq_len,
        target_rows=num_sequences * resolved.task.target_rows(config.data),
        vocab_size=resolved.vocab_size,
        architecture=resolved.family.architecture,
        runs_teacher=not config.teacher.is_stored,
    )


def step_work(resolved: ResolvedRun, policy: MicroBatchPolicy, widths: Widths, micro_batch_size: int) -> StepWork:
    """Work of one rank at the given widths of the student; communication as in ZeRO (Rajbhandari et al. 2020, section
    7)."""
    config, layout = resolved.config, policy.layout
    num_ranks, sequences = layout.num_ranks, config.train.global_batch_size
    num_micro_batches = sequences // (num_ranks * micro_batch_size)
    flops = run_flops(resolved, widths, sequences)
    trainable, _ = policy.parameter_counts(widths)
    saved_bytes, layers = policy.sequence_bytes(widths).total, 3 * num_layers(widths)
    if not config.teacher.is_stored:
        saved_bytes += policy.sequence_bytes(resolved.teacher_widths).student / 3
        layers += num_layers(resolved.teacher_widths)
    shares = 1 if layout.stage == 0 else num_ranks
    gathers = 2.0 * sum(1 for _ in resolved.student.parameters()) if layout.stage == 3 else 0.0
    sent = _sent_bytes(trainable, layout, num_micro_batches)
    if config.teacher.shard:
        gathers += resolved.teacher_tensors
        part = (num_ranks - 1) / num_ranks * sum(resolved.teacher_layers)
        sent += part * policy.teacher_dtype.itemsize * num_micro_batches
    return StepWork(
        flops=flops.total / num_ranks,
        activation_bytes=saved_bytes * sequences / num_ranks,
        optimizer_bytes=_ADAM_BYTES * trainable / shares,
        communicated_bytes=sent,
        layers=num_micro_batches * layers,
        gathers=gathers * num_micro_batches,
    )


def _sent_bytes(trainable: float, layout, num_micro_batches: int) -> float:
    """Bytes that a rank sends per step.

    Each of N ranks sends (N - 1) / N of a tensor in a reduce-scatter or all-gather, and twice that in an all-reduce.
    Stages 0 and 1 reduce once per step, stages 2 and 3 after every micro-batch. Stage 3 also gathers the weights twice
    per micro-batch.
    """
    part = (layout.num_ranks - 1) / layout.num_ranks * trainable
    gradients, weights = layout.accumulation_dtype.itemsize, layout.dtype.itemsize
    if layout.stage == 0:
        return 2 * part * gradients
    if layout.stage == 1:
        return part * (gradients + weights)
    if layout.stage == 2:
        return part * (gradients * num_micro_batches + weights)
    return part * num_micro_batches * (gradients + 2 * weights)
