"""Predicts the time of a step from its work: with a calibration of the machine, or as a range from a datasheet."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from homodistil.errors import UserError
from homodistil.planning.cluster import Cluster
from homodistil.planning.machine_calibration import Calibration
from homodistil.planning.step_work import StepWork

# Share of the datasheet's FLOP/s that training of BERT-sized models reaches; nothing here was measured on a GPU.
EFFICIENCY = (0.15, 0.45)
_BANDWIDTH_SHARE = (0.5, 0.85)
_LINK_SHARE = (0.4, 0.8)
_PASSES = 10
"""Approximate number of passes over the activations of all operations that are not matrix products."""
_S_PER_LAYER = (2.0e-4, 1.0e-4)
"""Launch time of about thirty kernels (forward and backward) that are too small to hide it."""


@dataclass(frozen=True)
class Seconds:
    """Expected time of one step, as a range in seconds."""

    low: float
    high: float

    @property
    def middle(self) -> float:
        """Geometric mean of both ends."""
        return (self.low * self.high) ** 0.5


def step_seconds(
    work: StepWork, cluster: Cluster, dtype: torch.dtype, calibration: Calibration | None = None
) -> Seconds:
    """Expected time of a step with this work.

    Args:
        work: of one rank.
        dtype: of the student.
        calibration: measurement of the machine; None: the datasheet of the device is used.

    Raises:
        UserError: the device is a CPU without a calibration, or its datasheet lacks this number format.
    """
    if calibration is not None:
        seconds = calibration.wall_s(work)
        return Seconds(seconds * (1 - calibration.error), seconds * (1 + calibration.error))
    if cluster.is_cpu:
        raise UserError(
            "--device: found cpu, whose speed only a measurement tells; run the same command with --measure first"
        )
    slow, fast = (_on_gpu(work, cluster, dtype, end) for end in (0, 1))
    return Seconds(fast, slow)


def expected_seconds(cluster: Cluster, peak_flops: float) -> dict[str, float]:
    """Field of `StepWork` -> plausible seconds per unit, for `machine_calibration.fit`.

    Args:
        peak_flops: FLOP/s per rank, from `device_peak.peak_flops`.
    """
    bandwidth = cluster.device.memory_bytes_per_s
    return {
        "flops": 1 / (0.5 * peak_flops),
        "activation_bytes": _PASSES / bandwidth,
        "optimizer_bytes": 1 / bandwidth,
        "communicated_bytes": 1 / cluster.device.link_bytes_per_s,
        "layers": _S_PER_LAYER[0],
        "gathers": 1e-4,
        "steps": 2e-3,
    }


def _on_gpu(work: StepWork, cluster: Cluster, dtype: torch.dtype, end: int) -> float:
    """Seconds at one end of the range: 0 is the slow end without overlap, 1 the fast end with full overlap of
    communication and computation."""
    number_format = {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(dtype, "fp32")
    peak = cluster.device.peak_flops(number_format)
    if peak is None:
        raise UserError(f"--device: no datasheet number of {cluster.device.name} in {number_format}; use bf16 or fp32")
    bandwidth = cluster.device.memory_bytes_per_s * _BANDWIDTH_SHARE[end]
    computing = max(work.flops / (peak * EFFICIENCY[end]), work.layers * _S_PER_LAYER[end])
    moving = (_PASSES * work.activation_bytes + work.optimizer_bytes) / bandwidth
    link = cluster.link_bytes_per_s * _LINK_SHARE[end]
    sending = work.communicated_bytes / link if cluster.num_ranks > 1 else 0.0
    return max(computing + moving, sending) if end else computing + moving + sending
