"""Moves the partitions of many parameters at once, each partitioned on its own: what ZeRO-3 needs of the mover.

Every parameter is a flat buffer of its own, so move.py's exchange would be an all-to-all a parameter. Here survivors
that stay on their rank are copied straight into the new partition, and those that change rank travel for many
parameters together, in rounds that bound the extra memory.
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
"""A rank sends, and receives, at most 1/16 of its new partitions in one round."""


class Crossing(NamedTuple):
    """Consecutive survivors of one parameter that change rank."""

    move: int
    """Which parameter, by its place in the list of moves."""
    sender: int
    receiver: int
    first: int
    """Survivor number of the first of them."""
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
    """Fill `new` from `old`, this rank's partitions of parameters that lie in a buffer each. Collective over `group`.

    Args:
        old: flat, one per parameter; overwritten.
        new: flat, one per parameter, zero; of the dtype of `old`.
        moves: one per parameter, of layouts that hold this parameter alone.
        device: where ranks can exchange (the tensors themselves may lie in host memory).
        least_numel: see `exchange_rounds`.
    """
    survivors = []
    for partition, target, move in zip(old, new, moves, strict=True):
        kept = partition[: compact(partition, rank * move.old.partition_numel, move)]
        first, last = max(move.kept[rank], move.due[rank]), min(move.kept[rank + 1], move.due[rank + 1])
        if first < last:  # most survivors stay on their rank: past any buffer
            target[first - move.due[rank] : last - move.due[rank]] = kept[first - move.kept[rank] :][: last - first]
        survivors.append(kept)
    for crossings in exchange_rounds(moves, least_numel):
        _exchange_round(crossings, survivors, new, moves, rank, group, device)


def exchange_rounds(moves: Sequence[FlatMove], least_numel: int = CHUNK_NUMEL) -> Iterator[list[Crossing]]:
    """Everything that changes rank, the same list on every rank, in rounds that are small for each rank.

    Args:
        least_numel: elements that a round may always hold, however small the model.
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
    """What changes rank, parameter by parameter, none longer than `limit`."""
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
    """One all-to-all of the listed crossings, packed by the rank at the other end, in the order of the list."""
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
