"""The plan of a run: memory and time of each phase of constant widths, their sums, and advice."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field

import torch

from homodistil.config.schema import TrainConfig
from homodistil.engine.build import resolve_engine_config
from homodistil.engine.ds_config import student_dtype, zero_section, zero_stage
from homodistil.planning.advice import Advice, advise
from homodistil.planning.cluster import POWER_OVERHEAD, Cluster
from homodistil.planning.machine_calibration import Calibration
from homodistil.planning.memory import PROCESS_BYTES, rank_memory
from homodistil.planning.speed import Seconds, step_seconds
from homodistil.planning.step_work import step_work
from homodistil.training.micro_batch import MicroBatchPolicy
from homodistil.training.resolve import ResolvedRun


@dataclass(frozen=True)
class StretchPlan:
    """A phase of constant widths: the steps between two events."""

    hidden_size: int
    parameters: int
    first_step: int
    num_steps: int
    memory: dict[str, float]
    """Part -> bytes per rank (`memory.rank_memory`)."""
    flops: float
    """FLOPs per step over all ranks."""
    step: Seconds
    tokens_per_s: float
    """Tokens per second over all ranks, at the middle of the range of `step`."""

    @property
    def total_bytes(self) -> float:
        return sum(self.memory.values())


@dataclass(frozen=True)
class Plan:
    teacher: str
    cluster: Cluster
    zero_stage: int
    micro_batch_size: int
    global_batch_size: int
    stretches: list[StretchPlan]
    hours: Seconds
    """Range of the training time in hours (not seconds), without start, evaluations, checkpoints and controls."""
    kwh: tuple[float, float]
    usd: tuple[float, float]
    advice: Advice
    basis: str
    """Where the times come from: a calibration or a datasheet."""
    notes: list[str] = field(default_factory=list)

    @property
    def peak_bytes(self) -> float:
        return max(stretch.total_bytes for stretch in self.stretches)

    @property
    def device_hours(self) -> tuple[float, float]:
        return self.hours.low * self.cluster.num_ranks, self.hours.high * self.cluster.num_ranks

    def to_dict(self) -> dict:
        """The plan for JSON; sizes are in bytes, times of steps in seconds, training time in hours."""
        values = asdict(self) | {"peak_bytes": self.peak_bytes, "device_hours": self.device_hours}
        for stretch, original in zip(values["stretches"], self.stretches, strict=True):
            stretch["total_bytes"] = original.total_bytes
        return values


def make_plan(
    resolved: ResolvedRun,
    raw_engine_config: dict,
    cluster: Cluster,
    calibration: Calibration | None = None,
    price: tuple[float, float] | None = None,
    watts: float | None = None,
) -> Plan:
    """Plan a run on `cluster` without reading weights.

    Args:
        raw_engine_config: DeepSpeed's JSON as the user wrote it.
        calibration: measurement of the machine; None: the datasheet is used.
        price: USD per device and hour (low, high); None: the usual range of the device.
        watts: power of one device at full load; None: that of the datasheet.

    Raises:
        UserError: a run would refuse DeepSpeed's JSON, too, or the speed of the machine is not known.
    """
    config = resolved.config
    engine_config = _resolved(raw_engine_config, config.train, cluster)
    policy = policy_of(resolved, engine_config, cluster)
    stretches = [
        _stretch(resolved, policy, engine_config, cluster, calibration, stretch) for stretch in resolved.phases
    ]
    hours = Seconds(*(sum(getattr(s.step, end) * s.num_steps for s in stretches) / 3600 for end in ("low", "high")))
    kw = (watts or cluster.device.watts) * cluster.num_ranks / 1000
    low, high = price or cluster.device.usd_per_h
    return Plan(
        teacher=config.teacher.name,
        cluster=cluster,
        zero_stage=zero_stage(engine_config),
        micro_batch_size=config.train.micro_batch_size,
        global_batch_size=config.train.global_batch_size,
        stretches=stretches,
        hours=hours,
        kwh=(hours.low * kw, hours.high * kw * POWER_OVERHEAD),
        usd=(hours.low * cluster.num_ranks * low, hours.high * cluster.num_ranks * high),
        advice=advise(
            lambda stage, size: _bytes_at_start(resolved, raw_engine_config, cluster, calibration, stage, size),
            cluster.device.memory_bytes,
            config.train.global_batch_size // cluster.num_ranks,
        ),
        basis=_basis(calibration, cluster),
        notes=[note for note in (resolved.note, resolved.vocabulary_note) if note],
    )


def _resolved(raw_engine_config: dict, train: TrainConfig, cluster: Cluster) -> dict:
    """DeepSpeed's JSON as a rank of the cluster would resolve it.

    `resolve_engine_config` refuses fp16 if this machine has no GPU, although the cluster may have GPUs.
    """
    fp16 = {name: raw_engine_config[name] for name in ("fp16",) if name in raw_engine_config and not cluster.is_cpu}
    rest = {name: value for name, value in raw_engine_config.items() if name not in fp16}
    return resolve_engine_config(rest, train, cluster.num_ranks) | fp16


def policy_of(resolved: ResolvedRun, engine_config: dict, cluster: Cluster) -> MicroBatchPolicy:
    """The `MicroBatchPolicy` of a run on this cluster, which counts parameters and bytes at any widths."""
    config, device_type = resolved.config, "cpu" if cluster.is_cpu else "cuda"
    auto = torch.float16 if device_type == "cuda" else student_dtype(engine_config)
    teacher = auto if config.teacher.dtype == "auto" else getattr(torch, config.teacher.dtype)
    return MicroBatchPolicy(config, engine_config, resolved.student, teacher, cluster.num_ranks, device_type)


def _stretch(resolved, policy, engine_config, cluster, calibration, stretch) -> StretchPlan:
    micro_batch_size = policy(stretch.widths)
    work = step_work(resolved, policy, stretch.widths, micro_batch_size)
    seconds = step_seconds(work, cluster, policy.layout.dtype, calibration)
    config = resolved.config
    return StretchPlan(
        hidden_size=stretch.widths["hidden"],
        parameters=policy.parameter_counts(stretch.widths)[0],
        first_step=stretch.first_step,
        num_steps=stretch.num_steps,
        memory=_calibrated(rank_memory(resolved, policy, engine_config, stretch.widths, micro_batch_size), calibration),
        flops=work.flops * cluster.num_ranks,
        step=seconds,
        tokens_per_s=config.train.global_batch_size * config.data.seq_len / seconds.middle,
    )


def _calibrated(memory: dict[str, float], calibration: Calibration | None) -> dict[str, float]:
    return memory | ({"process": calibration.process_bytes} if calibration else {})


def _bytes_at_start(resolved, raw_engine_config, cluster, calibration, stage: int, micro_batch_size: int) -> float:
    """Bytes per rank at the first (largest) widths, for any ZeRO stage and micro-batch size."""
    zero = {**zero_section(raw_engine_config), "stage": stage}
    engine_config = raw_engine_config | {"zero_optimization": zero}
    parts = rank_memory(
        resolved,
        policy_of(resolved, engine_config, cluster),
        engine_config,
        resolved.phases[0].widths,
        micro_batch_size,
        PROCESS_BYTES,
    )
    return sum(_calibrated(parts, calibration).values())


def _basis(calibration: Calibration | None, cluster: Cluster) -> str:
    if calibration is not None:
        return f"calibrated by steps measured on {calibration.machine} (their own error {calibration.error:.0%})"
    return f"estimate from {cluster.device.name}'s datasheet; not measured on GPU"
