"""In a rank of `scaling.py`: steps of the product at full width, and seconds against bytes of the collectives."""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import torch
import torch.distributed as dist

from benchmarks.harness.product import build_trainer, run_config
from benchmarks.harness.shapes import SHAPES, Plan
from benchmarks.harness.step_parts import profiled_step
from benchmarks.harness.workload import synchronize
from benchmarks.speed.communication import fit_line
from homodistil.engine.build import init_ranks
from homodistil.models.parameter_shape import full_numel

SETTLING_STEPS, PROFILED_STEPS = 2, 3
NO_EVENTS = Plan(interval=1000)
MESSAGE_BYTES = [2**power for power in range(10, 25, 2)]
REPEATS = 7
READY, WAIT_S = "ready", 300


def run_job(args: argparse.Namespace, num_steps: int) -> dict:
    """Everything that is measured of one job."""
    device = init_ranks()
    shape, num_ranks = SHAPES[args.shape], dist.get_world_size()
    config = run_config(shape, NO_EVENTS, args.work, args.quick, num_ranks, args.set)
    trainer = build_trainer(shape, config, args.deepspeed, args.work, device)
    for _ in range(SETTLING_STEPS):
        trainer.train_step()
    if args.side_by_side:
        _wait_for_others(args.work, args.side_by_side)
    step_s = [_step_s(trainer, device) for _ in range(num_steps)]
    profiled = [profiled_step(trainer.train_step, device)[0] for _ in range(PROFILED_STEPS)]
    return {
        "step_s": step_s,
        "optimizer_s": statistics.median(parts["update"] for parts in profiled),
        "tokens": config.train.global_batch_size * config.data.seq_len,
        "micro_batches": config.train.global_batch_size // (config.train.micro_batch_size * num_ranks),
        "parameters": sum(full_numel(p) for p in trainer.student.parameters() if p.requires_grad),
        "weight_bytes": trainer.student.model.dtype.itemsize,
        "stage": trainer.engine.zero_stage,
        "collectives": calibrate(device) if num_ranks > 1 else None,
    }


def _step_s(trainer, device: torch.device) -> float:
    synchronize(device)
    start = time.perf_counter()
    trainer.train_step()
    synchronize(device)
    return time.perf_counter() - start


def _wait_for_others(work: Path, count: int) -> None:
    """All jobs side by side, in folders beside each other, begin to measure at the same time."""
    (work / READY).touch()
    give_up = time.monotonic() + WAIT_S
    while len(list(work.parent.glob(f"*/{READY}"))) < count:
        if time.monotonic() > give_up:
            raise TimeoutError(f"the other jobs have not got ready within {WAIT_S} s")
        time.sleep(0.01)


def calibrate(device: torch.device) -> dict:
    """Seconds of an all-reduce against its bytes, and the line through them."""
    points = [(num_bytes, _all_reduce_s(num_bytes, device)) for num_bytes in MESSAGE_BYTES]
    latency, per_byte = fit_line(points)
    return {"points": points, "latency_s": latency, "seconds_per_byte": per_byte, "backend": dist.get_backend()}


def _all_reduce_s(num_bytes: int, device: torch.device) -> float:
    message, times_s = torch.zeros(num_bytes // 2, dtype=torch.bfloat16, device=device), []
    for _ in range(REPEATS):
        dist.barrier()
        synchronize(device)
        start = time.perf_counter()
        dist.all_reduce(message)
        synchronize(device)
        times_s.append(time.perf_counter() - start)
    return statistics.median(times_s[1:])
