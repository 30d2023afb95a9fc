"""Order and sharing of samples: the same batches whatever the ranks, every sample once an epoch, resume by position."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from homodistil.config.schema import DataConfig
from homodistil.data.loader import BatchLoader, fixed_batches, sample_order
from homodistil.data.prepare.corpus import Rows
from homodistil.errors import UserError

WIDTH = 9


def make_rows(folder, count: int) -> Rows:
    """Row i holds the token 1000 + i throughout, so that a sample can be recognised."""
    blocks = np.full((count, WIDTH), 102, dtype=np.uint16)
    blocks[:, 0] = 101
    blocks[:, 1:-1] = 1000 + np.arange(count)[:, None]
    np.save(folder / f"{count}.npy", blocks)
    return Rows(folder / f"{count}.npy")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("rows")


def samples_in(batch) -> list[int]:
    restored = batch.input_ids.flatten().clone()
    restored[batch.target_index] = batch.target_ids
    ids = restored.view(batch.input_ids.shape)[:, 1:-1] - 1000
    assert (ids == ids[:, :1]).all()
    return ids[:, 0].tolist()


def loader(rows, tokenizer, world=1, rank=0, micro=2, total=8, seed=3, workers=0):
    return BatchLoader(rows, tokenizer, DataConfig(workers=workers), seed, total, micro, rank, world)


def same(a, b) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.tensors, b.tensors, strict=True)) and a.counts == b.counts


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_share_the_micro_batches_of_a_single_process(folder, tokenizer, world):
    rows = make_rows(folder, 31)
    for consumed in (0, 8, 24, 808):  # 24: the step crosses the end of an epoch
        alone = loader(rows, tokenizer).micro_batches(consumed)
        assert len(alone) == 4
        for rank in range(world):
            share = loader(rows, tokenizer, world, rank).micro_batches(consumed)
            assert len(share) == 4 // world
            for m, batch in enumerate(share):
                assert same(batch, alone[m * world + rank])


@settings(max_examples=30, deadline=None)
@given(
    count=st.integers(1, 40),
    world=st.integers(1, 3),
    micro=st.integers(1, 5),
    parts=st.integers(1, 3),
    seed=st.integers(0, 2**31 - 1),
)
def test_every_sample_once_an_epoch(folder, tokenizer, count, world, micro, parts, seed):
    rows, total = make_rows(folder, count), world * micro * parts
    loaders = [loader(rows, tokenizer, world, rank, micro, total, seed) for rank in range(world)]
    stream = []
    for consumed in range(0, 3 * count + total, total):
        shares = [each.micro_batches(consumed) for each in loaders]
        stream += [i for m in range(parts) for share in shares for i in samples_in(share[m])]
    for epoch in range(3):
        assert sorted(stream[epoch * count : (epoch + 1) * count]) == list(range(count))


def test_order_depends_on_seed_and_epoch(folder):
    orders = {tuple(sample_order(50, seed, epoch)) for seed in (0, 1, 2**31 - 1) for epoch in (0, 1, 2)}
    assert len(orders) == 9
    assert tuple(sample_order(50, 1, 2)) in orders


def test_position_alone_decides(folder, tokenizer):
    """Resuming at a position gives the step that an uninterrupted run would have seen there."""
    rows = make_rows(folder, 31)
    steady, resumed = loader(rows, tokenizer), loader(rows, tokenizer)
    for consumed in range(0, 80, 8):
        last = steady.micro_batches(consumed)
    assert all(map(same, resumed.micro_batches(72), last))
    assert all(map(same, steady.micro_batches(72), last)), "going back is allowed"


def test_masks_change_from_epoch_to_epoch(folder, tokenizer):
    rows = make_rows(folder, 1)
    first, second = (loader(rows, tokenizer, micro=1, total=1).micro_batches(epoch)[0] for epoch in (0, 1))
    assert samples_in(first) == samples_in(second) == [0]
    many = {
        tuple(loader(rows, tokenizer, micro=1, total=1).micro_batches(e)[0].target_index.tolist()) for e in range(9)
    }
    assert len(many) > 1


def test_worker_processes_give_the_same_batches(folder, tokenizer):
    rows = make_rows(folder, 31)
    plain, ahead = loader(rows, tokenizer, 2, 1), loader(rows, tokenizer, 2, 1, workers=2)
    for consumed in (0, 8, 16, 160, 168, 0):  # with jumps
        assert all(map(same, ahead.micro_batches(consumed), plain.micro_batches(consumed)))


def test_uneven_global_batch_is_refused(folder, tokenizer):
    with pytest.raises(UserError, match=r"train.global_batch_size: found 9, allowed are multiples of 4 = .* 2 x 2"):
        loader(make_rows(folder, 31), tokenizer, world=2, total=9)


@pytest.mark.parametrize(
    ("count", "world", "size", "limit"),
    [(31, 1, 8, None), (31, 4, 4, None), (9, 4, 2, None), (31, 3, 4, 17), (31, 2, 4, 1), (3, 1, 8, 99)],
)
def test_fixed_batches(folder, tokenizer, count, world, size, limit):
    rows = make_rows(folder, count)
    expected = list(range(min(count, limit or count)))
    shares = [list(fixed_batches(rows, tokenizer, DataConfig(), 7, size, r, world, limit)) for r in range(world)]
    assert len({len(share) for share in shares}) == 1, "a forward pass may be a collective"
    reference = {}
    for batch in fixed_batches(rows, tokenizer, DataConfig(), 7, 1, 0, 1):
        reference[samples_in(batch)[0]] = batch.input_ids[0].tolist(), batch.target_ids.tolist()
    seen, labels = [], []
    for batch in (batch for share in shares for batch in share):
        assert 1 <= len(batch.input_ids) <= size
        if samples_in(batch) == [0] and 0 in seen:
            assert batch.counts.target_rows == 0, "the filler predicts nothing"
            continue
        seen += samples_in(batch)
        labels += batch.target_ids.tolist()
        assert [row.tolist() for row in batch.input_ids] == [reference[s][0] for s in samples_in(batch)]
    assert sorted(seen) == expected
    assert sorted(labels) == sorted(label for s in expected for label in reference[s][1])


def test_rows_travel_as_a_path(folder):
    import pickle

    rows = make_rows(folder, 40)
    message = pickle.dumps(rows)
    assert len(message) < 300
    np.testing.assert_array_equal(pickle.loads(message)[[3, 1]], rows[np.array([3, 1])])
    assert rows[[0]].dtype == np.int64 and type(rows[[0]]) is np.ndarray
