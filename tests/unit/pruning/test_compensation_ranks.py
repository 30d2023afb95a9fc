"""Compensation on several ranks: each with its own batches, the same result on all, and that of one rank with all."""

from __future__ import annotations

import threading
from unittest import mock

import pytest
import torch
from support.small import random_keep, small_batch, small_model
from support.thread_ranks import on_every_rank

from homodistil.distributed import ranks
from homodistil.models.encoders.bert import BERT as bert
from homodistil.pruning.compensation import Options, compensate

BATCHES = [small_batch(seed, lengths) for seed, lengths in enumerate([(16, 11, 5), (13, 9), (16, 16, 3), (4, 16)])]
WIDTHS = {"hidden": 17, "layer.0.ffn": 31, "layer.2.heads": 3, "layer.1.qk_dim": 5, "layer.1.vo_dim": 5}


class Talk:
    """What `homodistil.distributed.ranks` does, for ranks that are threads (each has a group of its own)."""

    def __init__(self) -> None:
        self.own = threading.local()

    def join(self, rank: int, group) -> None:
        self.own.rank, self.own.group = rank, group

    def rank(self) -> int:
        return self.own.rank

    def total(self, values):
        self.own.group.allreduce([values]).wait()
        return values

    def from_first(self, values):
        self.own.group.broadcast(values, 0).wait()
        return values


def event(batches, mode: str):
    model = small_model()
    table = bert.axis_table(model)
    found = compensate(model, bert, table, random_keep(table, WIDTHS), batches, Options(mode=mode), torch.tensor([4]))
    weights = {name: value.detach() for name, value in found.model.named_parameters()}
    return found.plan.hash, weights, found.report["lost"]


@pytest.mark.parametrize("mode", ["refit", "full"])
def test_ranks_agree_to_the_bit_and_with_one_rank_that_has_it_all(mode):
    alone, talk = event(BATCHES, mode), Talk()

    def on_rank(rank: int, group):
        talk.join(rank, group)
        return event(BATCHES[rank::2], mode)

    changes = {"rank": talk.rank, "world_size": lambda: 2, "total": talk.total, "from_first": talk.from_first}
    models = [small_model(), small_model()]  # seeded by the global generator: not to be built by two threads at once
    with mock.patch.multiple(ranks, **changes), mock.patch(f"{__name__}.small_model", models.pop):
        first, second = on_every_rank(2, on_rank)
    assert first[0] == second[0] and first[2] == second[2]
    for name, weight in first[1].items():
        assert torch.equal(weight, second[1][name]), name
        # Sums of fp32 activations in another order, through a dozen solves.
        torch.testing.assert_close(weight, alone[1][name], rtol=1e-4, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
