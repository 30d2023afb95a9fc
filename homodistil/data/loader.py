"""Which samples a step sees: a function of (seed, consumed samples), whatever the number of ranks and micro-batches.

The position in the data is one number, so resuming needs no further state. A batch may span two epochs: the stream of
samples is permutation(epoch 0), permutation(epoch 1), ...
"""

from __future__ import annotations

import atexit
import copy
import multiprocessing
import weakref
from collections.abc import Iterator

import numpy as np
import torch
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from homodistil.config.schema import DataConfig
from homodistil.data.batch import Batch
from homodistil.data.rows import LabelRows, OutputRows, Rows
from homodistil.data.short_steps import numbers_of_parts
from homodistil.data.task import task_of
from homodistil.distributed.graceful_stop import ignore_in_worker
from homodistil.errors import UserError

_ORDER_KEY = 2**64 - 1  # masking uses keys (seed, epoch; sample), and no sample has this number


def sample_order(num_samples: int, seed: int, epoch: int) -> np.ndarray:
    """The permutation of 0 .. num_samples - 1 for `epoch`, (num_samples,) uint32, or int64 if 2^32 do not suffice."""
    generator = np.random.Generator(np.random.Philox(key=np.array([seed << 32 | epoch, _ORDER_KEY], dtype=np.uint64)))
    order = np.arange(num_samples, dtype=np.uint32 if num_samples < 1 << 32 else np.int64)
    generator.shuffle(order)
    return order


class BatchLoader:
    """Micro-batches of one rank.

    Args:
        rows: blocks of the training split.
        tokenizer: of the teacher, for special ids.
        config: `task` with `mask_probability`, and `workers`: processes that prepare the next steps (0 = none).
        seed: of order and masking.
        global_batch_size: samples of an optimizer step over all ranks.
        micro_batch_size: samples of one micro-batch.
        rank, world_size: whose share.
        window: of the model's layers that have one, to count pairs by (`LossCounts`).
        num_first: tokens at the beginning of each sequence that a count leaves out (`LossCounts.tokens_behind`).
        outputs: the teacher's pooled states of `rows`, for batches to bring along.
        labels: of `rows`, likewise.

    Raises:
        UserError: no rows, or a global batch size that is not a multiple of micro-batch size x ranks.
    """

    def __init__(
        self,
        rows: Rows,
        tokenizer: PreTrainedTokenizerBase,
        config: DataConfig,
        seed: int,
        global_batch_size: int,
        micro_batch_size: int,
        rank: int,
        world_size: int,
        window: int | None = None,
        num_first: int = 0,
        outputs: OutputRows | None = None,
        labels: LabelRows | None = None,
    ) -> None:
        if not len(rows):
            raise UserError("data.sources: the training split holds no block of text; add text")
        self._rows, self._seed, self._workers = rows, seed, config.workers
        self._num_first, self._outputs, self._labels = num_first, outputs, labels
        self._task = task_of(config)
        self._to_batch = self._task.batch_maker(tokenizer, config, seed, window)
        self._short_steps = self._task.short_steps(tokenizer, config, seed)
        self.global_batch_size, self._rank, self._world = global_batch_size, rank, world_size
        self._order_epoch, self._order = -1, np.empty(0, dtype=np.uint32)
        self._ahead: list[Iterator[list[Batch]]] = []
        self._processes: list[multiprocessing.Process] = []
        self.set_micro_batch_size(micro_batch_size)

    def set_micro_batch_size(self, micro_batch_size: int) -> None:
        """Set the samples per micro-batch from the next step on. The samples of a step over all ranks stay the same.

        Raises:
            UserError: the global batch size is not a multiple of micro-batch size x ranks.
        """
        if self.global_batch_size % (micro_batch_size * self._world):
            raise UserError(
                f"train.global_batch_size: found {self.global_batch_size}, allowed are multiples of "
                f"{micro_batch_size * self._world} = train.micro_batch_size {micro_batch_size} x {self._world} ranks"
            )
        self._micro = micro_batch_size
        # Steps prepared by workers have the old size; they are dropped, and prepared again from the next position.
        self._stop_workers()

    def seek(self, consumed_samples: int) -> None:
        """Start the worker processes at this position, unless they are there already. Main thread only.

        Does nothing without workers.
        """
        if self._workers and consumed_samples != self._next_position:
            self._start_workers(consumed_samples)
            self._next_position = consumed_samples

    def micro_batches(self, consumed_samples: int) -> list[Batch]:
        """This rank's micro-batches of the optimizer step that starts at `consumed_samples`, on the CPU."""
        if not self._workers:
            return self[consumed_samples]
        self.seek(consumed_samples)
        self._next_position = consumed_samples + self.global_batch_size
        try:
            return next(self._ahead[0])
        except UserError as error:  # from a worker: torch puts a traceback before the message
            raise UserError(str(error).rstrip().rsplit("UserError: ", 1)[-1]) from None

    def __getitem__(self, consumed_samples: int) -> list[Batch]:
        """The same as `micro_batches`, prepared in this process (called in workers, too).

        Micro-batch m of rank r starts at sample consumed_samples + (m * world_size + r) * micro_batch_size.
        """
        starts = range(
            consumed_samples + self._rank * self._micro,
            consumed_samples + self.global_batch_size,
            self._world * self._micro,
        )
        step = consumed_samples // self.global_batch_size
        return [self._batch_at(start, step) for start in starts]

    def _batch_at(self, start: int, step: int) -> Batch:
        positions = np.arange(start, start + self._micro)
        epochs, offsets = np.divmod(positions, len(self._rows))
        samples = np.empty(self._micro, dtype=np.int64)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            samples[here] = self._order_of(int(epoch))[offsets[here]]
        batch = self._to_batch(*self._shortened(self._rows[samples], samples, epochs, step))
        batch = batch.with_outputs(self._outputs, samples)
        batch = batch.with_labels(self._labels, samples, self._task.has_token_labels)
        return batch.with_tokens_behind(self._num_first)

    def _shortened(
        self, blocks: np.ndarray, samples: np.ndarray, epochs: np.ndarray, step: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Arguments of the batch maker: in a short step those of the blocks' parts."""
        parts = self._short_steps.num_parts(step, blocks.shape[1]) if self._short_steps else 1
        if parts == 1:
            return blocks, samples, epochs
        return self._short_steps.split(blocks, parts), numbers_of_parts(samples, parts), epochs.repeat(parts)

    def _order_of(self, epoch: int) -> np.ndarray:
        if epoch != self._order_epoch:  # cached, because shuffling 10^8 samples takes seconds
            self._order_epoch, self._order = epoch, sample_order(len(self._rows), self._seed, epoch)
        return self._order

    def _start_workers(self, consumed_samples: int) -> None:
        self._stop_workers()
        before = multiprocessing.active_children()
        # Of a copy, so that nothing leads from the iterator to this object: where both went in one garbage collection,
        # the iterator's queues would go before it asks its workers to end, and it would wait for them in vain.
        self._ahead = [iter(copy.copy(self)._prefetch(consumed_samples))]
        self._processes = [child for child in multiprocessing.active_children() if child not in before]
        end = weakref.finalize(self, _end, self._ahead, self._processes)
        # Runs before the exit handlers of torch and multiprocessing, which would wait for workers that ignore SIGTERM.
        end.atexit = False
        atexit.register(end)

    def _stop_workers(self) -> None:
        self._next_position = -1
        _end(self._ahead, self._processes)
        self._ahead, self._processes = [], []

    def _prefetch(self, consumed_samples: int) -> DataLoader:
        positions = range(consumed_samples, 1 << 62, self.global_batch_size)
        return DataLoader(
            self,
            sampler=positions,
            batch_size=None,
            num_workers=self._workers,
            collate_fn=_as_it_is,
            worker_init_fn=ignore_in_worker,
            # Not the global one: dropout must not depend on how often loaders are made.
            generator=torch.Generator(),
        )


def _as_it_is(batches: list[Batch]) -> list[Batch]:
    return batches


def _end(ahead: list[Iterator[list[Batch]]], processes: list[multiprocessing.Process]) -> None:
    """End the workers of the iterator in `ahead`, if there is one, which is dropped: torch then asks them to end, and
    waits a few seconds.

    What is left is ended by SIGKILL, for workers ignore SIGTERM (`graceful_stop.ignore_in_worker`); not before, because
    torch reports a failure if a worker in use is killed.
    """
    ahead.clear()
    for process in processes:
        if process.is_alive():
            process.kill()


def fixed_samples(total: int, batch_size: int, rank: int, world_size: int) -> Iterator[np.ndarray]:
    """Numbers of the samples of each batch of `fixed_batches`, int64; none in the last round of some ranks."""
    for start in range(0, total, batch_size * world_size):
        round_ = np.arange(start, min(start + batch_size * world_size, total))
        yield np.array_split(round_, world_size)[rank]


class EvenlySpread:
    """So many rows, spread evenly over `rows`; all of them where there are no more.

    Args:
        rows: blocks of a split, or the teacher's pooled states or labels of them.
    """

    def __init__(self, rows: Rows, count: int) -> None:
        self._rows = rows
        self._chosen = np.arange(min(count, len(rows)), dtype=np.int64) * len(rows) // max(min(count, len(rows)), 1)

    def __len__(self) -> int:
        return len(self._chosen)

    def __getitem__(self, ids: np.ndarray | list[int]) -> np.ndarray:
        return self._rows[self._chosen[np.asarray(ids, dtype=np.int64)]]


def fixed_batches(
    rows: Rows,
    tokenizer: PreTrainedTokenizerBase,
    config: DataConfig,
    seed: int,
    batch_size: int,
    rank: int,
    world_size: int,
    limit: int | None = None,
    window: int | None = None,
    num_first: int = 0,
    outputs: OutputRows | EvenlySpread | None = None,
    labels: LabelRows | EvenlySpread | None = None,
) -> Iterator[Batch]:
    """The batches of this rank for evaluation on `rows`; masks depend only on (seed, sample index).

    Every sample is in exactly one batch of one rank. All ranks get the same number of batches, because a forward pass
    under ZeRO-3 is a collective: a rank without samples in the last round gets one row with nothing to predict.

    Args:
        rows: blocks of the held-out split.
        tokenizer, config, seed, rank, world_size, window, num_first, outputs, labels: see `BatchLoader`.
        batch_size: maximum samples per batch and rank.
        limit: use only the first `limit` samples, over all ranks; None: all.
    """
    task = task_of(config)
    to_batch = task.batch_maker(tokenizer, config, seed, window)
    total = len(rows) if limit is None else min(limit, len(rows))
    for samples in fixed_samples(total, batch_size, rank, world_size):
        if len(samples):
            batch = to_batch(rows[samples], samples, np.zeros_like(samples))
        else:
            samples = np.zeros(1, dtype=np.int64)
            batch = to_batch.without_targets(rows[samples])
        batch = batch.with_outputs(outputs, samples).with_labels(labels, samples, task.has_token_labels)
        yield batch.with_tokens_behind(num_first)
