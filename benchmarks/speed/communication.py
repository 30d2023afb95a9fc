"""A model of the communication of a training step: rings in two levels, and what every ZeRO stage sends.

Collectives over p = g x n GPUs (g a machine, n machines), S bytes on every GPU:

    t(reduce-scatter or all-gather) = (g-1) a_in + S (g-1)/g / B_in  +  (n-1) a_out + S/g (n-1)/n / B_out
    t(all-reduce)                   = both of them, one behind the other

B_in: bytes/s a GPU sends inside a machine; B_out: bytes/s of the network a GPU (all g at once); a: seconds of one hop.
The ring's latency grows with p; NCCL's trees, its choice for small messages, grow with log p: this is the pessimist.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Network:
    """Defaults: 8 x A100 on NVSwitch (300 GB/s a direction, 230 reached by NCCL's rings), one 200 Gb/s HDR port a GPU
    (25 GB/s, 92 % reached)."""

    gpus_per_node: int = 8
    inside_bytes_per_s: float = 230e9
    outside_bytes_per_s: float = 23e9
    inside_latency_s: float = 3e-6
    outside_latency_s: float = 8e-6

    def scatter_s(self, num_bytes: float, num_ranks: int) -> float:
        """Reduce-scatter, or all-gather, of `num_bytes` over `num_ranks` GPUs."""
        inside, nodes = min(num_ranks, self.gpus_per_node), math.ceil(num_ranks / self.gpus_per_node)
        seconds = _ring(num_bytes, inside, self.inside_latency_s, self.inside_bytes_per_s)
        return seconds + _ring(num_bytes / inside, nodes, self.outside_latency_s, self.outside_bytes_per_s)

    def all_reduce_s(self, num_bytes: float, num_ranks: int) -> float:
        return 2 * self.scatter_s(num_bytes, num_ranks)


def _ring(num_bytes: float, ranks: int, latency_s: float, bytes_per_s: float) -> float:
    return (ranks - 1) * latency_s + num_bytes * (ranks - 1) / ranks / bytes_per_s


@dataclass(frozen=True)
class Job:
    """What one optimizer step does."""

    parameters: float
    """Of the student, distillation projections included."""
    stage: int
    """Of ZeRO."""
    compute_s: float
    """Seconds of the step's arithmetic on one GPU alone, all micro-batches, without the optimizer."""
    optimizer_s: float = 0.0
    """Seconds of the optimizer for all parameters; stages 1 to 3 spread it over the ranks."""
    micro_batches: int = 1
    gradient_bytes: float = 2.0
    """A parameter's, on the wire."""
    weight_bytes: float = 2.0
    bucket_bytes: float = 1e9
    """DeepSpeed's reduce_bucket_size (500 M elements) in bytes: every bucket pays the latency again."""
    overlap: float = 0.0
    """Share of the gradients' reduction that may hide behind the backward pass (overlap_comm)."""
    backward_share: float = 0.45
    """Of the compute: what there is to hide behind."""
    small_collectives: int = 6
    """Of a few bytes to kilobytes: counts, gradient norm, importance, stop request ... latency alone."""


@dataclass(frozen=True)
class Prediction:
    step_s: float
    reduction_s: float
    """Of gradients, hidden part included."""
    hidden_s: float
    gather_s: float
    """Of weights; counted as not hidden."""
    small_s: float
    compute_s: float
    """The optimizer included."""


def predict(job: Job, network: Network, num_ranks: int) -> Prediction:
    """Seconds of a step of `job` on `num_ranks` GPUs."""
    reduction = _reduction_s(job, network, num_ranks)
    hidden = min(reduction * job.overlap, job.compute_s * job.backward_share)
    gather = _gathers(job) * _in_buckets(network.scatter_s, job.parameters * job.weight_bytes, job, num_ranks)
    small = job.small_collectives * network.all_reduce_s(0, num_ranks)
    compute = job.compute_s + job.optimizer_s / (num_ranks if job.stage else 1)
    step = compute + reduction - hidden + gather + small
    return Prediction(step, reduction, hidden, gather, small, compute)


def _reduction_s(job: Job, network: Network, num_ranks: int) -> float:
    """Stages 0 and 1 reduce once a step, 2 and 3 every micro-batch. DeepSpeed's stages 1 and 2 all-reduce whole buckets
    (use_multi_rank_bucket_allreduce) and keep their part; stage 3 scatters."""
    collective = network.scatter_s if job.stage == 3 else network.all_reduce_s
    times = job.micro_batches if job.stage >= 2 else 1
    return times * _in_buckets(collective, job.parameters * job.gradient_bytes, job, num_ranks)


def _gathers(job: Job) -> int:
    """All-gathers of all weights a step: none, behind the update, or in every forward and backward."""
    return {0: 0, 1: 1, 2: 1, 3: 2 * job.micro_batches}[job.stage]


def _in_buckets(collective, num_bytes: float, job: Job, num_ranks: int) -> float:
    buckets = max(1, math.ceil(num_bytes / job.bucket_bytes))
    return buckets * collective(num_bytes / buckets, num_ranks)


def fit_line(points: list[tuple[float, float]]) -> tuple[float, float]:
    """(seconds at 0 bytes, seconds a byte) of (bytes, seconds), both at least 0: least squares of relative errors."""
    weights = [1 / seconds**2 for _, seconds in points]
    total = sum(weights)
    mean_x = sum(w * x for w, (x, _) in zip(weights, points, strict=True)) / total
    mean_y = sum(w * y for w, (_, y) in zip(weights, points, strict=True)) / total
    squares = sum(w * (x - mean_x) ** 2 for w, (x, _) in zip(weights, points, strict=True))
    slope = sum(w * (x - mean_x) * (y - mean_y) for w, (x, y) in zip(weights, points, strict=True)) / squares
    slope = max(slope, 0.0)
    return max(mean_y - slope * mean_x, 0.0), slope
