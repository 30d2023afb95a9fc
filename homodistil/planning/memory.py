"""Memory of one rank at one width, by part.

Adds to `models/memory.py` what is short-lived or not part of the model: communication buffers, logits, and the process.
"""

from __future__ import annotations

from homodistil.distill.cost import logit_rows
from homodistil.distill.losses.term import BatchSizes
from homodistil.engine.ds_config import zero_section, zero_stage
from homodistil.models.axes import Widths
from homodistil.models.memory import state_bytes
from homodistil.training.micro_batch import MicroBatchPolicy
from homodistil.training.resolve import ResolvedRun

FP32_BYTES = 4
DEFAULT_BUCKET_ELEMENTS = 5e8
"""DeepSpeed's default of reduce_bucket_size."""
PROCESS_BYTES = 1.0e9
"""CUDA context, workspaces of libraries and rounding of the allocator on a GPU (our estimate)."""


def rank_memory(
    resolved: ResolvedRun,
    policy: MicroBatchPolicy,
    engine_config: dict,
    widths: Widths,
    micro_batch_size: int,
    process_bytes: float = PROCESS_BYTES,
) -> dict[str, float]:
    """Part -> bytes per rank at the peak of a step.

    Args:
        policy: `plan.policy_of`.
        engine_config: from `resolve_engine_config`.
        widths: of the student.
        process_bytes: memory of the process itself.
    """
    layout, (trainable, frozen) = policy.layout, policy.parameter_counts(widths)
    split = {stage: 1 / layout.num_ranks if layout.stage >= stage else 1.0 for stage in (1, 2, 3)}
    sequence = policy.sequence_bytes(widths)
    parts = {
        "parameters": layout.dtype.itemsize * (trainable + frozen) * split[3],
        "gradients": layout.accumulation_dtype.itemsize * trainable * split[2],
    }
    parts["optimizer"] = state_bytes(trainable, frozen, layout) - parts["parameters"] - parts["gradients"]
    parts["teacher"] = _teacher_parameters(resolved, layout.num_ranks) * policy.teacher_dtype.itemsize
    data, dtypes = resolved.config.data, (layout.dtype.itemsize, policy.teacher_dtype.itemsize)
    rows = resolved.task.target_rows(data) * micro_batch_size
    sizes = BatchSizes(
        widths,
        resolved.teacher_widths,
        micro_batch_size,
        data.seq_len,
        rows,
        resolved.vocab_size,
        *dtypes,
        resolved.family.architecture,
    )
    entry_bytes = 2 * layout.dtype.itemsize + FP32_BYTES
    parts["logits"] = float(logit_rows(resolved.config.loss, sizes) * resolved.vocab_size * entry_bytes)
    parts["activations"] = max(micro_batch_size * sequence.total - parts["logits"], 0.0)
    parts["buffers"] = buffer_bytes(engine_config, trainable, layout.accumulation_dtype.itemsize)
    parts["process"] = process_bytes
    return parts


def _teacher_parameters(resolved: ResolvedRun, num_ranks: int) -> float:
    """Teacher parameters that a rank holds at once; with `teacher.shard`, its part of the layers and one layer; none
    where its outputs are stored."""
    if resolved.config.teacher.is_stored:
        return 0
    if not resolved.config.teacher.shard:
        return resolved.teacher_parameters
    layers = resolved.teacher_layers
    return resolved.teacher_parameters - sum(layers) + sum(layers) / num_ranks + max(layers)


def buffer_bytes(engine_config: dict, num_trainable: float, element_bytes: int) -> float:
    """Bytes of communication buffers: the flat gradients at stage 0; at other stages a bucket of gradients.

    There are two buckets if communication overlaps; stage 3 also prefetches parameters.
    """
    zero, stage = zero_section(engine_config), zero_stage(engine_config)
    if stage == 0:
        return num_trainable * element_bytes  # of the all-reduce, flattened
    bucket = min(zero.get("reduce_bucket_size", DEFAULT_BUCKET_ELEMENTS), num_trainable)
    buckets = 2 if zero.get("overlap_comm", stage == 3) else 1
    gathered = min(zero.get("stage3_prefetch_bucket_size", 5e7), num_trainable) if stage == 3 else 0
    return (buckets * bucket + gathered) * element_bytes
