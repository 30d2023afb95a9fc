"""The ranks of a job: who we are, and doing a thing once for all."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, distributed

from homodistil.errors import UserError

T = TypeVar("T")


def rank() -> int:
    return distributed.get_rank() if distributed.is_initialized() else 0


def world_size() -> int:
    return distributed.get_world_size() if distributed.is_initialized() else 1


def barrier() -> None:
    if world_size() > 1:
        distributed.barrier()


def on_first_rank(action: Callable[[], T]) -> T:
    """Run `action` on rank 0 and hand its (picklable) result, or its `UserError`, to every rank.

    All ranks call it. Writing and checking files goes through here: ranks that each looked for themselves would see
    what another has just written.
    """
    outcome: list = [None, None]
    if rank() == 0:
        try:
            outcome[0] = action()
        except UserError as error:
            outcome[1] = str(error)
    if world_size() > 1:
        distributed.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise UserError(outcome[1])
    return outcome[0]


def gather(value: T) -> list[T]:
    """Every rank's (picklable) value, by rank, on every rank."""
    if world_size() == 1:
        return [value]
    found: list = [None] * world_size()
    distributed.all_gather_object(found, value)
    return found


def failures(own: str | None) -> list[str]:
    """What went wrong on any rank, as "rank 1: ..."; the same list on every rank. Every rank calls it.

    Args:
        own: what went wrong here, None if nothing did.
    """
    return [f"rank {number}: {text}" for number, text in enumerate(gather(own)) if text is not None]


def mean(values: Tensor) -> Tensor:
    """Mean over ranks of a float tensor, alike on all of them (in place)."""
    return total(values).div_(world_size())


def total(values: Tensor) -> Tensor:
    """Sum over ranks (in place)."""
    if world_size() > 1:
        distributed.all_reduce(values)
    return values


def from_first(values: Tensor) -> Tensor:
    """Rank 0's values on every rank (in place): what was solved from equal sums may still differ in its last bits."""
    if world_size() > 1:
        distributed.broadcast(values, src=0)
    return values


def mean_of(named: dict[str, float | Tensor], device: torch.device) -> dict[str, float]:
    """Mean over ranks of named scalars, one all-reduce for all of them. Every rank passes the same names."""
    values = torch.stack([torch.as_tensor(v, dtype=torch.float64, device=device) for v in named.values()])
    return dict(zip(named, mean(values).tolist(), strict=True))
