"""The ranks of a job: who we are, and doing a thing once for all."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, distributed

from homodistil.errors import UserError
from homodistil.wire import decode, encode

T = TypeVar("T")


def rank() -> int:
    return distributed.get_rank() if distributed.is_initialized() else 0


def world_size() -> int:
    return distributed.get_world_size() if distributed.is_initialized() else 1


def barrier() -> None:
    if world_size() > 1:
        distributed.barrier()


def on_first_rank(action: Callable[[], T]) -> T:
    """Run `action` on rank 0 and hand its result (wire.py says what travels), or its `UserError`, to every rank.

    All ranks call it. Writing and checking files goes through here: ranks that each looked for themselves would see
    what another has just written.
    """
    result, mistake = outcome(action) if rank() == 0 else (None, None)
    if world_size() > 1:
        result, mistake = _broadcast((result, mistake))
    if mistake is not None:
        raise UserError(mistake)
    return result


def outcome(action: Callable[[], T]) -> tuple[T | None, str | None]:
    """(what `action` returns, None), or (None, the text of its `UserError`)."""
    try:
        return action(), None
    except UserError as error:
        return None, str(error)


def gather(value: T) -> list[T]:
    """Every rank's value (wire.py says what travels), by rank, on every rank."""
    if world_size() == 1:
        return [value]
    mine = _bytes(encode(value))
    sizes = [torch.zeros(1, dtype=torch.int64, device=mine.device) for _ in range(world_size())]
    distributed.all_gather(sizes, torch.tensor([len(mine)], device=mine.device))
    # Collectives want one size: each message stands at the start of a row as long as the longest.
    rows = [mine.new_zeros(int(max(sizes))) for _ in sizes]
    row = mine.new_zeros(len(rows[0]))
    row[: len(mine)] = mine
    distributed.all_gather(rows, row)
    return [_message(row[: int(size)]) for row, size in zip(rows, sizes, strict=True)]


def _broadcast(value: T) -> T:
    """Rank 0's value on every rank."""
    mine = _bytes(encode(value) if rank() == 0 else b"")
    size = torch.tensor([len(mine)], device=mine.device)
    distributed.broadcast(size, src=0)
    content = mine if rank() == 0 else mine.new_zeros(int(size))
    distributed.broadcast(content, src=0)
    return _message(content)


def _bytes(text: bytes) -> Tensor:
    """(n,) uint8, where the process group's collectives can reach it."""
    device = "cuda" if distributed.get_backend() == distributed.Backend.NCCL else "cpu"
    return torch.from_numpy(np.frombuffer(text, dtype=np.uint8).copy()).to(device)


def _message(content: Tensor):
    return decode(content.cpu().numpy().tobytes())


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
