"""Rank, world size and collectives on plain data and small tensors; also work without a process group (one rank)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, distributed

from homodistil.distributed import plain_data
from homodistil.errors import UserError

T = TypeVar("T")


def rank() -> int:
    return distributed.get_rank() if distributed.is_initialized() else 0


def world_size() -> int:
    return distributed.get_world_size() if distributed.is_initialized() else 1


def barrier() -> None:
    if world_size() > 1:
        distributed.barrier()


def on_rank_zero(action: Callable[[], T]) -> T:
    """Run `action` on rank 0, and return its result (plain data, see plain_data.py) or raise its `UserError` on all.

    Every rank calls it. Use it to write and check files: if every rank checked for itself, it could see a file that
    another rank has just written.
    """
    result, trouble = outcome(action) if rank() == 0 else (None, None)
    if world_size() > 1:
        result, trouble = plain_data.decode(bytes_from_first(plain_data.encode((result, trouble))))
    if trouble is not None:
        raise UserError(trouble)
    return result


def outcome(action: Callable[[], T]) -> tuple[T | None, str | None]:
    """Run `action`: (its result, None), or (None, the text of its `UserError`)."""
    try:
        return action(), None
    except UserError as error:
        return None, str(error)


def gather(value: T) -> list[T]:
    """The values of all ranks (plain data, see plain_data.py), by rank, on every rank. Every rank calls it."""
    if world_size() == 1:
        return [value]
    data = plain_data.encode(value)
    slots = [torch.empty_like(_slot(data)) for _ in range(world_size())]
    distributed.all_gather(slots, _slot(data))
    lengths = [_length(slot) for slot in slots]
    if max(lengths) > _ROOM_BYTES:  # a second round, padded to the longest value
        padded = _tensor(data.ljust(max(lengths), b"\0"))
        slots = [torch.empty_like(padded) for _ in lengths]
        distributed.all_gather(slots, padded)
        return [plain_data.decode(_bytes(slot)[:length]) for slot, length in zip(slots, lengths, strict=True)]
    return [plain_data.decode(_content(slot)) for slot in slots]


def bytes_from_first(data: bytes) -> bytes:
    """The bytes of rank 0 on every rank, in one broadcast, or two if they are long. Every rank calls it."""
    if world_size() == 1:
        return data
    slot = _slot(data)
    distributed.broadcast(slot, src=0)
    if (length := _length(slot)) <= _ROOM_BYTES:
        return _content(slot)
    whole = _tensor(data if rank() == 0 else bytes(length))
    distributed.broadcast(whole, src=0)
    return _bytes(whole)


# torch's collectives on objects use pickle. Most values are short, so they are sent together with their length.
_LENGTH_BYTES, _SLOT_BYTES = 8, 1024
_ROOM_BYTES = _SLOT_BYTES - _LENGTH_BYTES


def _slot(data: bytes) -> Tensor:
    start = len(data).to_bytes(_LENGTH_BYTES, "little") + data[:_ROOM_BYTES]
    return _tensor(start.ljust(_SLOT_BYTES, b"\0"))


def _length(slot: Tensor) -> int:
    return int.from_bytes(_bytes(slot[:_LENGTH_BYTES]), "little")


def _content(slot: Tensor) -> bytes:
    return _bytes(slot[_LENGTH_BYTES : _LENGTH_BYTES + _length(slot)])


def _tensor(data: bytes) -> Tensor:
    """`data` as (N,) uint8 on a device that the process group can send from."""
    values = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    return values.cuda() if "nccl" in distributed.get_backend() else values


def _bytes(values: Tensor) -> bytes:
    return values.cpu().numpy().tobytes()


def failures(problem: str | None) -> list[str]:
    """The problems of all ranks as "rank 1: ...", the same list on every rank. Every rank calls it.

    Args:
        problem: description of the problem on this rank; None if there is none.
    """
    return [f"rank {number}: {text}" for number, text in enumerate(gather(problem)) if text is not None]


def mean(values: Tensor) -> Tensor:
    """Mean over ranks of a float tensor of any shape (in place), the same on every rank. Every rank calls it."""
    return total(values).div_(world_size())


def total(values: Tensor) -> Tensor:
    """Sum over ranks of a tensor of any shape (in place). Every rank calls it."""
    if world_size() > 1:
        distributed.all_reduce(values)
    return values


def from_first(values: Tensor) -> Tensor:
    """The values of rank 0 on every rank (in place). Every rank calls it.

    Results that ranks compute from the same inputs may still differ in their last bits.
    """
    if world_size() > 1:
        distributed.broadcast(values, src=0)
    return values


def mean_of(named: dict[str, float | Tensor], device: torch.device) -> dict[str, float]:
    """Means over ranks of named scalars, in one all-reduce. Every rank calls it with the same names."""
    values = torch.stack([torch.as_tensor(v, dtype=torch.float64, device=device) for v in named.values()])
    return dict(zip(named, mean(values).tolist(), strict=True))
