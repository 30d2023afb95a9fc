"""Measures real steps at a few widths, with student, teacher and engine of the run and a compressed schedule.

deepspeed --num_accelerators 2 launcher/plan.py --measure --deepspeed ds_configs/zero2.json recipe=quickstart
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from homodistil.engine.build import resolve_engine_config
from homodistil.models.axes import Widths
from homodistil.planning.cluster import Cluster
from homodistil.planning.machine_calibration import Sample
from homodistil.planning.memory import rank_memory
from homodistil.planning.plan import policy_of
from homodistil.planning.step_work import step_work
from homodistil.training.resolve import ResolvedRun
from homodistil.training.trainer import Trainer

_WARM_UP_STEPS = 2
"""Steps at each width that do not count: they fill caches for the new shapes."""


@dataclass(frozen=True)
class MeasuredWidth:
    widths: Widths
    wall_s: float
    """Wall seconds per step, the median."""
    cpu_s: float
    """Processor seconds per step of this rank, the median."""
    peak_bytes: float
    """Peak memory of this rank in bytes, without events."""


def measure_trainer(trainer: Trainer, device: torch.device) -> list[MeasuredWidth]:
    """Train all steps of a run with a compressed schedule, and measure them. Every rank calls it."""
    samples = []
    while not trainer.is_done:
        widths, times = trainer.student.widths, []
        start_peak(device)
        peak = 0.0
        while not trainer.is_done and trainer.student.widths == widths:
            times.append(_timed(trainer, device))
            if trainer.student.widths == widths:
                peak = peak_bytes(device)
        if trainer.student.widths != widths:
            times.pop()  # this step included an event
        wall, cpu = zip(*times[_WARM_UP_STEPS:], strict=True)
        samples.append(MeasuredWidth(widths, statistics.median(wall), statistics.median(cpu), peak))
    return samples


def _timed(trainer: Trainer, device: torch.device) -> tuple[float, float]:
    _wait(device)
    wall, cpu = time.perf_counter(), time.process_time()
    trainer.train_step()
    _wait(device)
    return time.perf_counter() - wall, time.process_time() - cpu


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def start_peak(device: torch.device) -> None:
    """Reset the peak that `peak_bytes` returns."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        Path("/proc/self/clear_refs").write_text("5")


def peak_bytes(device: torch.device) -> float:
    """Peak bytes since `start_peak`: allocated GPU memory, or the resident set of this process on a CPU."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM"))
    return float(line.split()[1]) * 1024


def samples_of(
    resolved: ResolvedRun, raw_engine_config: dict, cluster: Cluster, measured: list[MeasuredWidth]
) -> list[Sample]:
    """Samples for `fit`: the measurements together with the predicted work and memory at the same widths.

    Args:
        resolved: the run that was measured, whose schedule is compressed (config/derive.py).
        raw_engine_config: DeepSpeed's JSON as the user wrote it.
    """
    train = resolved.config.train
    engine_config = resolve_engine_config(raw_engine_config, train, cluster.num_ranks)
    policy, size = policy_of(resolved, engine_config, cluster), train.micro_batch_size
    return [
        Sample(
            work=step_work(resolved, policy, m.widths, size),
            wall_s=m.wall_s,
            cpu_s=m.cpu_s,
            peak_bytes=m.peak_bytes,
            counted_bytes=sum(rank_memory(resolved, policy, engine_config, m.widths, size, 0.0).values()),
        )
        for m in measured
    ]
