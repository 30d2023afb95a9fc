"""Compensation on several ranks: each with its own batches, the same result on all, and that of one rank with all."""

from __future__ import annotations

import threading
from unittest import mock

import pytest
import torch
from support.small import random_keep, small_batch, small_model
from support.thread_ranks import on_every_rank
from torch import Tensor

from homodistil.distributed import ranks
from homodistil.models.encoders.bert import BERT as bert
from homodistil.pruning.compensation import Options, compensate
from homodistil.pruning.compensation.learned_basis import train_basis

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


def event(batches, **options):
    model = small_model()
    table, options = bert.axis_table(model), Options(**options)
    found = compensate(model, bert, table, random_keep(table, WIDTHS), batches, options, torch.tensor([4]))
    weights = {name: value.detach() for name, value in found.model.named_parameters()}
    return found.plan.hash, weights, found.report["lost"]


def on_two_ranks(action):
    """What `action(rank)` returns on each."""
    talk = Talk()

    def on_rank(rank: int, group):
        talk.join(rank, group)
        return action(rank)

    changes = {"rank": talk.rank, "world_size": lambda: 2, "total": talk.total, "from_first": talk.from_first}
    models = [small_model(), small_model()]  # seeded by the global generator: not to be built by two threads at once
    with mock.patch.multiple(ranks, **changes), mock.patch(f"{__name__}.small_model", models.pop):
        return on_every_rank(2, on_rank)


def shared_event(**options):
    return on_two_ranks(lambda rank: event(BATCHES[rank::2], **options))


@pytest.mark.parametrize("options", [{"mode": "refit"}, {"mode": "project"}, {"mode": "full"}, {"ridge": None}])
def test_ranks_agree_to_the_bit_and_with_one_rank_that_has_it_all(options):
    alone, (first, second) = event(BATCHES, **options), shared_event(**options)
    assert first[0] == second[0] and first[2] == second[2]
    for name, weight in first[1].items():
        assert torch.equal(weight, second[1][name]), name
        # Sums of fp32 activations in another order, through a dozen solves.
        torch.testing.assert_close(weight, alone[1][name], rtol=1e-4, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("mode", ["project", "full"])
def test_ranks_agree_to_the_bit_on_a_trained_basis(mode):
    first, second = shared_event(mode=mode, basis="learned", basis_steps=5)
    assert first[0] == second[0] and first[2] == second[2]
    assert all(torch.equal(weight, second[1][name]) for name, weight in first[1].items())
    assert first[0] != shared_event(mode=mode)[0][0]


class Reconstruction:
    """A distance that is easy to share out, in the place of a network's: what P and back again loses of some rows."""

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows

    def of(self, number: int, projection: Tensor) -> tuple[Tensor, int]:
        error = self.rows - self.rows @ projection @ projection.T
        return error.square().sum(), len(self.rows)


def test_ranks_with_unequal_shares_train_a_basis_as_one_rank_with_all_rows():
    generator = torch.Generator().manual_seed(3)
    rows = torch.randn(23, 9, generator=generator, dtype=torch.float64) * torch.arange(1, 10)
    start, fixed = torch.eye(9, 3, dtype=torch.float64), torch.tensor([0])

    def trained(part: Tensor) -> Tensor:
        return train_basis(Reconstruction(part), start, fixed, 20, 0.05)

    alone, (first, second) = trained(rows), on_two_ranks(lambda rank: trained(rows[:17] if rank == 0 else rows[17:]))
    assert torch.equal(first, second) and (alone - start).abs().max() > 0.1
    torch.testing.assert_close(first, alone, rtol=0, atol=1e-12)
