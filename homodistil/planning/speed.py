"""How long a step's work takes: from a measurement of this machine, or as a range from a datasheet."""

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
"""How often what is no matrix product goes over the activations, about."""
_S_PER_LAYER = (2.0e-4, 1.0e-4)
"""Starting some thirty kernels, forward and backward, where they are too small to hide it."""


@dataclass(frozen=True)
class Seconds:
    """Time of one step: the fast and the slow end of what is to be expected."""

    low: float
    high: float

    @property
    def middle(self) -> float:
        return (self.low * self.high) ** 0.5


def step_seconds(
    work: StepWork, cluster: Cluster, dtype: torch.dtype, calibration: Calibration | None = None
) -> Seconds:
    """Raises `UserError`: a CPU without a calibration, a GPU without this number format."""
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
    """Field of `StepWork` -> seconds a unit that would be plausible, for `calibration.fit`.

    Args:
        peak_flops: of a rank, as `flops.peak_flops` finds it.
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
    """`end`: 0 the slow one, where nothing overlaps; 1 the fast one, where what is sent hides behind computing."""
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
