"""What every change of a live engine begins with: no gradients wait, all ranks mean the same; and what it costs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist

from homodistil.resize.adapters.adapter import Adapter


@dataclass(frozen=True)
class ResizeCost:
    milliseconds: float
    """Wall time on this rank, with the accelerator synchronised before and after."""
    bytes_moved: int
    """Bytes moved between ranks, summed over all ranks (0 at stage 0); the gathering for maps is not counted."""


def check_boundary(adapter: Adapter) -> None:
    """Raise RuntimeError if accumulated gradients have not been applied yet."""
    engine = adapter.engine
    if engine.micro_steps % engine.gradient_accumulation_steps() or adapter.has_pending_gradients():
        raise RuntimeError("resize: gradients wait for a step; resize only right after engine.step() at a boundary")


def check_agreement(plan_hash: str, device: torch.device) -> None:
    """Raise RuntimeError if ranks have different plans, judged by 63 bits of their sha256 (hex)."""
    mine = torch.tensor([int(plan_hash[:16], 16) >> 1], device=device)
    hashes = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(hashes, mine)
    differing = [rank for rank, other in enumerate(hashes) if int(other) != int(hashes[0])]
    if differing:
        raise RuntimeError(
            f"resize: ranks {differing} hold another plan than rank 0; the event must be the same on all ranks"
        )


def synchronize(device: torch.device) -> None:
    """Wait for all kernels, including those of DeepSpeed's reduction stream; does nothing on the CPU."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
