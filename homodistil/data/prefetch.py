"""Batches as the training step wants them: on the device, with counts that are means over the whole step.

While a step runs, a thread prepares the micro-batches of the next one, and on a GPU copies them from pinned memory on
a stream of its own. At most one step is held ahead.

`counts` of a loader's batch are its own. Here they become the mean over all micro-batches of the step on all ranks, so
that averaging gradients over micro-batches and ranks gives the gradient of the mean over all masked rows, tokens or
pairs of the global batch, however they are spread (Batch.counts divides the sums of kernels/). They stay on the
device: no step waits for their values.
"""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import torch
from torch import Tensor

from homodistil.data.batch import Batch, LossCounts
from homodistil.data.loader import BatchLoader
from homodistil.distributed import ranks


class _Share(NamedTuple):
    """This rank's part of a step, on the device."""

    batches: list[Batch]
    counts: Tensor
    """(3,) float64: mean over `batches`."""
    copied: torch.cuda.Event | None
    """Behind the copies; None where there are none."""


class BatchPrefetcher:
    """Micro-batches of one rank for the step that starts at a sample position."""

    def __init__(self, loader: BatchLoader, device: torch.device) -> None:
        self.loader, self.device = loader, device
        self.wait_s = 0.0
        """Seconds that steps have spent on getting their data, all together."""
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None
        # Ends with this object or the process. It calls no collective: their order is the main thread's.
        self._thread = ThreadPoolExecutor(1, "next step's data")
        self._position: int = -1
        self._ahead: Future[_Share] | None = None

    def micro_batches(self, consumed_samples: int) -> list[Batch]:
        """This rank's share of the step. Raises what the loader raises, also for what was read ahead."""
        start_s = time.perf_counter()
        share = self._take(consumed_samples)
        self._prepare(consumed_samples + self.loader.global_batch_size)
        self.wait_s += time.perf_counter() - start_s
        counts = _means(share.counts, len(share.batches))
        return [batch._replace(counts=counts) for batch in share.batches]

    def set_micro_batch_size(self, micro_batch_size: int) -> None:
        """Sequences of a micro-batch from the next step on; what was prepared is of the old size and is dropped."""
        self._drop()
        self.loader.set_micro_batch_size(micro_batch_size)

    def _take(self, consumed_samples: int) -> _Share:
        if consumed_samples != self._position:
            self._drop()
            self._prepare(consumed_samples)
        ahead, self._position, self._ahead = self._ahead, -1, None
        share = ahead.result()
        if share.copied is not None:
            _use_on_current_stream(share)
        return share

    def _prepare(self, consumed_samples: int) -> None:
        self.loader.seek(consumed_samples)  # may fork worker processes: not in a thread, and while it is idle
        self._ahead = self._thread.submit(self._share_at, consumed_samples)
        self._position = consumed_samples

    def _drop(self) -> None:
        if self._ahead is not None:
            self._ahead.exception()  # waits; an error of what nobody asked for is nobody's
        self._position, self._ahead = -1, None

    def _share_at(self, consumed_samples: int) -> _Share:
        batches = self.loader.micro_batches(consumed_samples)
        counts = _own_counts(batches)
        if self._copies is None:
            return _Share([batch.to(self.device) for batch in batches], counts.to(self.device), None)
        torch.cuda.set_device(self.device)  # a thread begins on the first GPU, and would pin memory there
        with torch.cuda.stream(self._copies):
            batches = [batch.pinned().to(self.device) for batch in batches]
            counts = counts.pin_memory().to(self.device, non_blocking=True)
            return _Share(batches, counts, self._copies.record_event())


def _use_on_current_stream(share: _Share) -> None:
    """What follows on this stream finds the copies done; their memory is not given away before it has run."""
    stream = torch.cuda.current_stream(share.counts.device)
    stream.wait_event(share.copied)
    for tensor in (share.counts, *(tensor for batch in share.batches for tensor in batch.tensors)):
        tensor.record_stream(stream)


def mean_counts(batches: list[Batch], device: torch.device) -> LossCounts:
    """Mean counts of a micro-batch of these, over all ranks (one small all-reduce): 0-dim fp32 tensors on `device`.

    At least one masked row: a step without any would otherwise divide 0 by 0.
    """
    return _means(_own_counts(batches).to(device), len(batches))


def _own_counts(batches: list[Batch]) -> Tensor:
    """(3,) on the CPU. float64: pairs of a global batch pass 2^24, where fp32 no longer holds every integer."""
    return torch.tensor([batch.counts for batch in batches], dtype=torch.float64).mean(0)


def _means(local: Tensor, num_batches: int) -> LossCounts:
    counts = ranks.mean(local)
    # Every rank has equally many micro-batches, so the mean of their losses over these means is the global mean.
    counts[0].clamp_(min=1.0 / (num_batches * ranks.world_size()))
    return LossCounts(*counts.float().unbind())
