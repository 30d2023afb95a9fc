"""Moves the partitions of many parameters that are partitioned one by one, as under ZeRO-3.

Each parameter is a separate flat buffer, so the exchange of move.py would need one all-to-all per parameter. Here
survivors that stay on their rank are copied directly into the new partition. Those that change rank are sent for many
parameters together, in rounds that limit the extra memory.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from homodistil.resize.flat import FlatMove
from homodistil.resize.move import CHUNK_NUMEL, compact

EXCHANGE_SHARE = 16
"""A rank sends and receives at most 1/16 of its new partitions per round."""


class Crossing(NamedTuple):
    """Consecutive survivors of one parameter that change rank."""

    move: int
    """Index of the parameter in the list of moves."""
    sender: int
    receiver: int
    first: int
    """Survivor number of the first element (see flat.py)."""
    numel: int


def move_partitions(
    old: Sequence[Tensor],
    new: Sequence[Tensor],
    moves: Sequence[FlatMove],
    rank: int,
    group: dist.ProcessGroup | None,
    device: torch.device,
    least_numel: int = CHUNK_NUMEL,
) -> None:
    """Fill the new partitions of this rank from the old partitions of all ranks. Collective over `group`.

    Args:
        old: old partitions of this rank, flat, one per parameter; overwritten.
        new: new partitions of this rank, flat, one per parameter; filled with zeros, of the dtype of `old`.
        moves: one per parameter, with layouts that contain only this parameter.
        device: device of the collectives; the partitions may be in host memory.
        least_numel: see `exchange_rounds`.
    """
    survivors = []
    for partition, target, move in zip(old, new, moves, strict=True):
        kept = partition[: compact(partition, rank * move.old.partition_numel, move)]
        first, last = max(move.kept[rank], move.due[rank]), min(move.kept[rank + 1], move.due[rank + 1])
        if first < last:  # most survivors stay on their rank and need no buffer
            target[first - move.due[rank] : last - move.due[rank]] = kept[first - move.kept[rank] :][: last - first]
        survivors.append(kept)
    for crossings in exchange_rounds(moves, least_numel):
        _exchange_round(crossings, survivors, new, moves, rank, group, device)


def exchange_rounds(moves: Sequence[FlatMove], least_numel: int = CHUNK_NUMEL) -> Iterator[list[Crossing]]:
    """All survivors that change rank, in rounds of limited size per rank; the same on every rank.

    Args:
        least_numel: the limit of a round is at least this many elements, for small models.
    """
    limit = max(least_numel, sum(move.new.partition_numel for move in moves) // EXCHANGE_SHARE)
    crossings: list[Crossing] = []
    load: Counter[tuple[str, int]] = Counter()
    for crossing in _crossings(moves, limit):
        ends = ("sends", crossing.sender), ("receives", crossing.receiver)
        if any(load[end] + crossing.numel > limit for end in ends):
            yield crossings
            crossings, load = [], Counter()
        crossings.append(crossing)
        load.update(dict.fromkeys(ends, crossing.numel))
    if crossings:
        yield crossings


def _crossings(moves: Sequence[FlatMove], limit: int) -> Iterator[Crossing]:
    """Survivors that change rank, parameter by parameter, in pieces of at most `limit` elements."""
    for i, move in enumerate(moves):
        ranks = range(move.old.num_partitions)
        for sender in ranks:
            for receiver, numel in enumerate(move.send_sizes(sender)):
                if numel == 0 or receiver == sender:
                    continue
                first = max(move.kept[sender], move.due[receiver])
                for start in range(first, first + numel, limit):
                    yield Crossing(i, sender, receiver, start, min(limit, first + numel - start))


def _exchange_round(crossings, survivors, new, moves, rank, group, device) -> None:
    """One all-to-all of `crossings`, packed by the other rank and, within it, in the order of the list."""
    out = sorted((c for c in crossings if c.sender == rank), key=lambda c: c.receiver)
    into = sorted((c for c in crossings if c.receiver == rank), key=lambda c: c.sender)
    fragments = [survivors[c.move][c.first - moves[c.move].kept[rank] :][: c.numel] for c in out]
    outgoing = torch.cat([*fragments, new[0][:0]]).to(device)
    landing = torch.empty(sum(c.numel for c in into), dtype=outgoing.dtype, device=device)
    ranks = range(moves[0].old.num_partitions)
    send_sizes = [sum(c.numel for c in out if c.receiver == other) for other in ranks]
    receive_sizes = [sum(c.numel for c in into if c.sender == other) for other in ranks]
    dist.all_to_all_single(landing, outgoing, receive_sizes, send_sizes, group=group)
    for crossing, fragment in zip(into, landing.split([c.numel for c in into]), strict=True):
        position = crossing.first - moves[crossing.move].due[rank]
        new[crossing.move][position : position + crossing.numel] = fragment
