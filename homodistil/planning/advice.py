"""Advice on the ZeRO stage and the micro-batch size."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

HEADROOM = 0.9
"""Share of the memory of a device that a plan may use: counts are estimates, and allocators fragment."""


@dataclass(frozen=True)
class Advice:
    zero_stage: int | None
    """The lowest stage under which `micro_batch_size` fits; None if no stage fits."""
    micro_batch_size: int
    """The largest size that fits under this stage and divides the sequences per rank and step; 0 if none fits."""
    reason: str


def advise(bytes_at: Callable[[int, int], float], memory_bytes: float, sequences_per_rank: int) -> Advice:
    """Choose the lowest stage under which a useful micro-batch fits, because lower stages communicate less.

    A micro-batch is useful if it has at least 16 sequences, or all sequences of a rank. If no stage allows one, the
    lowest stage under which any micro-batch fits is chosen.

    Args:
        bytes_at: (stage, micro-batch size) -> peak bytes per rank.
        memory_bytes: memory of a device.
        sequences_per_rank: per optimizer step; micro-batch sizes divide it.
    """
    sizes = [size for size in range(sequences_per_rank, 0, -1) if sequences_per_rank % size == 0]
    allowed = HEADROOM * memory_bytes
    largest = {stage: next((s for s in sizes if bytes_at(stage, s) <= allowed), 0) for stage in (0, 1, 2, 3)}
    useful = min(16, sequences_per_rank)
    for stage, size in largest.items():
        if size >= useful or (size and stage == 3):
            return Advice(stage, size, _reason(stage, largest, memory_bytes, bytes_at))
    fits = [stage for stage, size in largest.items() if size]
    if fits:
        return Advice(fits[0], largest[fits[0]], _reason(fits[0], largest, memory_bytes, bytes_at))
    least = bytes_at(3, 1)
    return Advice(
        None,
        0,
        f"one sequence under ZeRO-3 takes {least / 1e9:.1f} GB, the device has {memory_bytes / 1e9:.0f}; take more "
        f"devices, offload the optimizer (ds_configs/zero3_offload.json) or a larger device",
    )


def _reason(stage: int, largest: dict[int, int], memory_bytes: float, bytes_at: Callable[[int, int], float]) -> str:
    used = bytes_at(stage, largest[stage]) / 1e9
    usage = f"{used:.1f} of {memory_bytes / 1e9:.0f} GB with {largest[stage]} sequences"
    if stage == 0:
        return f"{usage}; no higher stage is needed, and each sends more or the same"
    return f"{usage}; below it only {largest[stage - 1] or 'no'} sequences fit"
