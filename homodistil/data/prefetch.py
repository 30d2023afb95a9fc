"""Batches for the training step: on the device, with counts that are means over the whole step.

While a step runs, a thread prepares the micro-batches of the next step; with a GPU, it copies them from pinned memory
on a side stream. At most one step is prepared ahead.

`Batch.counts`, by which the sums of kernels/ are divided, are replaced by their mean over all micro-batches of the step
on all ranks. Averaging gradients over micro-batches and ranks then gives the gradient of the mean over all masked rows
(tokens, pairs) of the global batch, even if micro-batches have different counts. The counts stay on the device, so that
no step waits for their values.
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
    """The micro-batches of this rank for one step, on the device."""

    batches: list[Batch]
    counts: Tensor
    """(3,) float64, or more where more is counted: mean over `batches` of those of `LossCounts` that are not None."""
    copied: torch.cuda.Event | None
    """Recorded after the copies to the GPU; None on the CPU."""


class BatchPrefetcher:
    """Prepares the micro-batches of one rank, one step ahead.

    Args:
        loader: the micro-batches of this rank on the CPU.
        device: where the batches are copied to.
    """

    def __init__(self, loader: BatchLoader, device: torch.device) -> None:
        self.loader, self.device = loader, device
        self.wait_s = 0.0
        """Total seconds that steps have waited for their data."""
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None
        # Ends with this object or the process. It calls no collectives, whose order the main thread determines.
        self._thread = ThreadPoolExecutor(1, "next step's data")
        self._position: int = -1
        self._ahead: Future[_Share] | None = None

    def micro_batches(self, consumed_samples: int) -> list[Batch]:
        """The micro-batches of this rank for the step that starts at `consumed_samples`. Every rank calls it.

        Raises:
            UserError: the loader could not read this step.
        """
        start_s = time.perf_counter()
        share = self._take(consumed_samples)
        self._prepare(consumed_samples + self.loader.global_batch_size)
        self.wait_s += time.perf_counter() - start_s
        counts = _means(share.counts, share.batches)
        return [batch._replace(counts=counts) for batch in share.batches]

    def set_micro_batch_size(self, micro_batch_size: int) -> None:
        """Set the sequences per micro-batch from the next step on; the step prepared ahead is dropped."""
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
        self.loader.seek(consumed_samples)  # may fork, so not in a thread, and while the thread is idle
        self._ahead = self._thread.submit(self._share_at, consumed_samples)
        self._position = consumed_samples

    def _drop(self) -> None:
        if self._ahead is not None:
            self._ahead.exception()  # waits; an error is ignored, because this step is not used
        self._position, self._ahead = -1, None

    def _share_at(self, consumed_samples: int) -> _Share:
        batches = self.loader.micro_batches(consumed_samples)
        counts = _own_counts(batches)
        if self._copies is None:
            return _Share([batch.to(self.device) for batch in batches], counts.to(self.device), None)
        torch.cuda.set_device(self.device)  # a new thread uses the first GPU, and would pin memory for it
        with torch.cuda.stream(self._copies):
            batches = [batch.pinned().to(self.device) for batch in batches]
            counts = counts.pin_memory().to(self.device, non_blocking=True)
            return _Share(batches, counts, self._copies.record_event())


def _use_on_current_stream(share: _Share) -> None:
    """Make the current stream wait for the copies, and keep their memory until the kernels on it have run."""
    stream = torch.cuda.current_stream(share.counts.device)
    stream.wait_event(share.copied)
    for tensor in (share.counts, *(tensor for batch in share.batches for tensor in batch.tensors)):
        tensor.record_stream(stream)


def mean_counts(batches: list[Batch], device: torch.device) -> LossCounts:
    """Mean counts per micro-batch over `batches` and all ranks, as 0-dim fp32 tensors on `device`.

    Every rank calls it (one small all-reduce). At least one masked row per step is assumed, and one token behind those
    that are left out, to avoid 0 / 0.
    """
    return _means(_own_counts(batches).to(device), batches)


def _own_counts(batches: list[Batch]) -> Tensor:
    """Mean of the counts over `batches`, without those that are None, float64 on the CPU: pairs can exceed 2^24, above
    which fp32 is not exact."""
    counts = [[count for count in batch.counts if count is not None] for batch in batches]
    return torch.tensor(counts, dtype=torch.float64).mean(0)


def _means(local: Tensor, batches: list[Batch]) -> LossCounts:
    counts = ranks.mean(local)
    # Every rank has the same number of micro-batches, so the mean of the losses divided by these means is global.
    least = 1.0 / (len(batches) * ranks.world_size())
    names = [name for name, count in zip(LossCounts._fields, batches[0].counts, strict=True) if count is not None]
    means = dict(zip(names, counts.float().unbind(), strict=True))
    for name in {"target_rows", "tokens_behind", "labelled"} & means.keys():  # there may be none
        means[name] = means[name].clamp(min=least)
    return LossCounts(**means)
