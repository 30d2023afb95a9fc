"""The mover for parameters that are partitioned one by one (ZeRO-3) against numpy; the exchange is real gloo."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from support.thread_ranks import on_every_rank
from test_resize_move import Case, cases
from torch import Tensor

from homodistil.resize.flat import FlatMove, Layout
from homodistil.resize.move import CHUNK_NUMEL
from homodistil.resize.move_partitions import EXCHANGE_SHARE, exchange_rounds, move_partitions

CPU = torch.device("cpu")


def shares(arrays: list[np.ndarray], num_ranks: int, filler: float) -> list[list[Tensor]]:
    """Rank -> its share of every array: rounded up, the last ones padded or nothing but padding."""
    cut = []
    for array in arrays:
        padding = np.full(-array.size % num_ranks, filler)
        cut.append(np.split(np.concatenate([array.flatten(), padding]), num_ranks))
    return [[torch.tensor(parts[rank], dtype=torch.float32) for parts in cut] for rank in range(num_ranks)]


def moves_of(case: Case) -> list[FlatMove]:
    layouts = [Layout.packed([shape], case.num_ranks, case.num_ranks) for shape in case.shapes]
    return [FlatMove.plan(layout, [index], case.num_ranks) for layout, index in zip(layouts, case.index(), strict=True)]


@settings(max_examples=250)
@given(cases(), st.sampled_from([1, 3, 40, CHUNK_NUMEL]))
def test_shares_of_the_sliced_parameters(case: Case, limit: int):
    old = shares(case.arrays(), case.num_ranks, math.nan)  # whatever stands in the padding must not survive
    expected = shares(case.survivors(), case.num_ranks, 0.0)
    moves = moves_of(case)

    def move_own(rank: int, group: dist.ProcessGroup) -> list[Tensor]:
        new = [torch.zeros(move.new.partition_numel) for move in moves]
        move_partitions(old[rank], new, moves, rank, group, CPU, limit)
        return new

    found = on_every_rank(case.num_ranks, move_own)
    assert all(map(torch.equal, sum(found, []), sum(expected, [])))


@settings(max_examples=100)
@given(cases(), st.sampled_from([1, 3, 40]))
def test_rounds_are_small_and_carry_everything_that_changes_rank(case: Case, least: int):
    moves = moves_of(case)
    rounds = list(exchange_rounds(moves, least))
    limit = max(least, sum(move.new.partition_numel for move in moves) // EXCHANGE_SHARE)
    for crossings in rounds:
        for rank in range(case.num_ranks):
            assert sum(c.numel for c in crossings if c.sender == rank) <= limit
            assert sum(c.numel for c in crossings if c.receiver == rank) <= limit
    assert all(rounds), "a round without content is a collective for nothing"
    assert sum(c.numel for crossings in rounds for c in crossings) == sum(move.crossing_numel() for move in moves)


def test_many_parameters_take_few_rounds():
    """A model of 200 parameters: what crosses fits one round, so one collective does for all of them."""
    shapes = [(50, 40), (50,)] * 100
    layouts = [Layout.packed([shape], 4, 4) for shape in shapes]
    moves = [FlatMove.plan(layout, [{0: torch.arange(25, 50)}], 4) for layout in layouts]
    assert sum(move.crossing_numel() for move in moves) > 0
    assert len(list(exchange_rounds(moves))) == 1
