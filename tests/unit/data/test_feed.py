"""Batches ahead of the step, counts that stay tensors: content as from the loader, errors, changes, ends."""

from __future__ import annotations

import gc
import os
import threading
import time

import pytest
import torch
from test_data_loader import loader, make_rows, same

from homodistil.data.prefetch import BatchPrefetcher, mean_counts
from homodistil.errors import UserError

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return make_rows(tmp_path_factory.mktemp("rows"), 31)


class SlowRows:
    """Rows from a slow disk."""

    SECONDS = 0.2

    def __init__(self, rows):
        self._rows, self.num_reads = rows, 0

    def __len__(self):
        return len(self._rows)

    def __getitem__(self, ids):
        self.num_reads += 1
        time.sleep(self.SECONDS)
        return self._rows[ids]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_step_gets_what_its_position_says_whatever_was_prepared(rows, tokenizer, workers):
    prefetcher, plain = (
        BatchPrefetcher(loader(rows, tokenizer, 2, 1, workers=workers), CPU),
        loader(rows, tokenizer, 2, 1),
    )
    for consumed in (0, 8, 16, 160, 168, 0, 8):  # with jumps
        found, expected = prefetcher.micro_batches(consumed), plain.micro_batches(consumed)
        assert len(found) == len(expected) == 2
        assert all(same(f._replace(counts=None), e._replace(counts=None)) for f, e in zip(found, expected, strict=True))
        for name in ("target_rows", "tokens", "pairs"):
            mean = sum(getattr(batch.counts, name) for batch in expected) / 2
            value = getattr(found[0].counts, name)
            assert value.shape == () and value.dtype == torch.float32 and value == mean
            assert getattr(found[1].counts, name) is value


def test_worker_processes_go_on_from_step_to_step(rows, tokenizer):
    """Started by the main thread, once: a process that a thread has forked does not end cleanly."""
    prefetcher = BatchPrefetcher(loader(rows, tokenizer, workers=1), CPU)
    running = []
    for consumed in (0, 8, 16):
        prefetcher.micro_batches(consumed)
        running.append([process.pid for process in prefetcher.loader._processes])
    assert len(running[0]) == 1 and running == [running[0]] * 3


def test_the_next_step_is_ready_when_this_one_ends(rows, tokenizer):
    slow = SlowRows(rows)
    prefetcher = BatchPrefetcher(loader(slow, tokenizer, micro=8, total=8), CPU)
    prefetcher.micro_batches(0)
    assert prefetcher.wait_s >= slow.SECONDS, "nothing could be ready for the first step"
    for consumed in (8, 16):
        time.sleep(2 * slow.SECONDS)  # the step
        before = prefetcher.wait_s
        prefetcher.micro_batches(consumed)
        assert prefetcher.wait_s - before < slow.SECONDS / 2
    time.sleep(2 * slow.SECONDS)
    assert slow.num_reads == 4, "one step ahead, and no more"


def test_a_change_of_the_micro_batch_drops_what_was_prepared(rows, tokenizer):
    prefetcher = BatchPrefetcher(loader(rows, tokenizer, 2, 1, micro=2, total=16), CPU)
    prefetcher.micro_batches(0)
    prefetcher.set_micro_batch_size(4)
    expected = loader(rows, tokenizer, 2, 1, micro=4, total=16).micro_batches(16)
    found = prefetcher.micro_batches(16)
    assert all(torch.equal(f.input_ids, e.input_ids) for f, e in zip(found, expected, strict=True))


def test_an_error_while_preparing_reaches_the_step_that_needs_it(tmp_path, tokenizer):
    rows = make_rows(tmp_path, 31)
    prefetcher = BatchPrefetcher(loader(rows, tokenizer), CPU)
    prefetcher.micro_batches(0)  # 8 may have been read before the file is cut, 16 is not
    os.truncate(tmp_path / "31.npy", 200)
    with pytest.raises(UserError, match="was cut short while it was being read; run again"):
        for consumed in (8, 16):
            prefetcher.micro_batches(consumed)
    with pytest.raises(UserError, match="was cut short"):  # asked again, it is tried again
        prefetcher.micro_batches(16)


def test_the_thread_ends_with_the_feed(rows, tokenizer):
    before = set(threading.enumerate())
    prefetcher = BatchPrefetcher(loader(rows, tokenizer), CPU)
    prefetcher.micro_batches(0)
    (thread,) = set(threading.enumerate()) - before
    del prefetcher
    gc.collect()  # whatever else a failed test before may hold
    thread.join(timeout=10)
    assert not thread.is_alive()


def test_counts_beyond_the_integers_of_fp32_are_added_exactly(rows, tokenizer):
    """Pairs of a batch of 4096 sequences of 512 tokens; adding in fp32 would lose the 1s."""
    (batch,) = loader(rows, tokenizer, micro=8).micro_batches(0)
    pairs = [float(2**30 + 1), float(2**30 + 255), 3.0]
    counts = mean_counts([batch._replace(counts=batch.counts._replace(pairs=value)) for value in pairs], CPU)
    assert counts.pairs.dtype == torch.float32
    assert counts.pairs == torch.tensor(sum(pairs) / 3, dtype=torch.float64).float()


def test_a_step_without_masked_rows_does_not_divide_by_zero(rows, tokenizer):
    (batch,) = loader(rows, tokenizer, micro=8).micro_batches(0)
    empty = batch._replace(counts=batch.counts._replace(target_rows=0.0))
    assert mean_counts([empty, empty], CPU).target_rows == 0.5


def test_dividing_by_a_tensor_is_bitwise_dividing_by_a_number():
    generator = torch.Generator().manual_seed(0)
    for count in (154.5, 1 / 3, 2.0**30 + 255):
        losses = [torch.randn(1000, generator=generator).requires_grad_() for _ in range(2)]
        losses[1].data = losses[0].data.clone()
        for loss, divisor in zip(losses, (count, torch.tensor(count).float()), strict=True):
            (loss.sum() / divisor).backward()
        assert torch.equal(losses[0].sum() / count, losses[1].sum() / torch.tensor(count).float())
        assert torch.equal(losses[0].grad, losses[1].grad)
