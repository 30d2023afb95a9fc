"""In a rank of `scaling.py`: steps of the product at full width, and seconds against bytes of the collectives."""

from __future__ import annotations

import argparse
import os
import socket
import statistics
import time
from pathlib import Path

import torch
import torch.distributed as dist
from communication import fit_line
from launch import RESULT_FILE
from product import build_trainer, run_config
from shapes import SHAPES, Plan
from step_parts import PartClock, measured, summed
from workload import synchronize

from homodistil.engine.build import init_ranks
from homodistil.models.parameter_shape import full_numel

SETTLING_STEPS = 2
NO_EVENTS = Plan(interval=1000)
MESSAGE_BYTES = [2**power for power in range(10, 25, 2)]
REPEATS = 7


def run_job(args: argparse.Namespace, num_steps: int) -> dict:
    """Everything that is measured of one job."""
    world, work = int(os.environ["WORLD_SIZE"]), Path(args.work)
    local_rank = int(os.environ["LOCAL_RANK"])
    apart = args.job == "side by side"
    if apart:
        work = _live_alone(work, local_rank)
    device = init_ranks()
    shape, num_ranks = SHAPES[args.shape], dist.get_world_size()
    config = run_config(shape, NO_EVENTS, work, args.quick, num_ranks, args.set)
    trainer = build_trainer(shape, config, args.deepspeed, work, device)
    for _ in range(SETTLING_STEPS):
        trainer.train_step()
    if apart:
        _wait_for_others(work.parent, local_rank, world)
    clock, steps = PartClock(device), []
    with measured(trainer, clock):
        for _ in range(num_steps):
            with clock.step():
                trainer.train_step()
            steps.append(clock.take())
    return {
        "step_s": [sum(step.values()) for step in steps],
        "optimizer_s": summed(steps)["optimizer"] / num_steps,
        "backward_share": summed(steps)["backward"] / sum(summed(steps).values()),
        "tokens": config.train.global_batch_size * config.data.seq_len,
        "micro_batches": config.train.global_batch_size // (config.train.micro_batch_size * num_ranks),
        "parameters": sum(full_numel(p) for p in trainer.student.parameters() if p.requires_grad),
        "weight_bytes": trainer.student.model.dtype.itemsize,
        "stage": trainer.engine.zero_stage,
        "collectives": calibrate(device) if num_ranks > 1 else None,
    }


def _live_alone(work: Path, local_rank: int) -> Path:
    """This process becomes a job of one rank, with a folder of its own. Its number here still chooses its GPU."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1", "MASTER_PORT": str(port)}
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "False"  # torchrun's store is for all of its ranks together
    if local_rank:
        os.environ[RESULT_FILE] += f".{local_rank}"  # what counts is the first one's
    own = work / str(local_rank)
    own.mkdir()
    return own


def _wait_for_others(folder: Path, local_rank: int, world: int) -> None:
    """All jobs side by side begin to measure at the same time."""
    (folder / f"ready.{local_rank}").touch()
    while not all((folder / f"ready.{other}").exists() for other in range(world)):
        time.sleep(0.01)


def calibrate(device: torch.device) -> dict:
    """Seconds of an all-reduce against its bytes, and the line through them."""
    points = [(num_bytes, _all_reduce_s(num_bytes, device)) for num_bytes in MESSAGE_BYTES]
    latency, per_byte = fit_line(points)
    return {"points": points, "latency_s": latency, "seconds_per_byte": per_byte, "backend": dist.get_backend()}


def _all_reduce_s(num_bytes: int, device: torch.device) -> float:
    message, found = torch.zeros(num_bytes // 2, dtype=torch.bfloat16, device=device), []
    for _ in range(REPEATS):
        dist.barrier()
        synchronize(device)
        start = time.perf_counter()
        dist.all_reduce(message)
        synchronize(device)
        found.append(time.perf_counter() - start)
    return statistics.median(found[1:])
