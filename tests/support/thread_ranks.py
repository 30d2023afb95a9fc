"""Ranks as threads of one process that talk over real gloo: an exchange takes milliseconds instead of a start-up."""

from __future__ import annotations

import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")
TIMEOUT = timedelta(seconds=10)
"""How long the others wait for a rank that has failed."""
CPU = torch.device("cpu")


def on_every_rank(num_ranks: int, action: Callable[[int, dist.ProcessGroup], T]) -> list[T]:
    """`action(rank, group)` on every rank at the same time; their results, by rank. Raises what the first one raised.

    `group` stands for a process group that must be passed on explicitly: there is no default one.
    """
    groups = _groups(num_ranks)
    try:
        with ThreadPoolExecutor(num_ranks) as threads:
            return list(threads.map(action, range(num_ranks), groups))
    except BaseException:
        _groups.cache_clear()  # a rank that failed has left the others in the middle of an exchange
        raise


@functools.cache
def _groups(num_ranks: int) -> list[dist.ProcessGroup]:
    store = dist.HashStore()

    def connect(rank: int) -> dist.ProcessGroup:
        group = dist.ProcessGroup(store, rank, num_ranks)
        gloo = dist.ProcessGroupGloo(store, rank, num_ranks, TIMEOUT)
        group._register_backend(CPU, dist.ProcessGroup.BackendType.GLOO, gloo)
        group._set_default_backend(dist.ProcessGroup.BackendType.GLOO)
        return group

    with ThreadPoolExecutor(num_ranks) as threads:
        return list(threads.map(connect, range(num_ranks)))
