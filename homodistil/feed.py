"""Batches as the training step wants them: on the device, with counts that are means over the whole step.

`counts` of a loader's batch are its own. Here they become the mean over all micro-batches of the step on all ranks, so
that averaging gradients over micro-batches and ranks gives the gradient of the mean over all masked rows, tokens or
pairs of the global batch, however they are spread (Batch.counts divides each term's sum, see distill/losses.py).
"""

from __future__ import annotations

import torch

from homodistil import ranks
from homodistil.data.loader import BatchLoader
from homodistil.data.masking import Batch, Counts


class Feed:
    """Micro-batches of one rank for the step that starts at a sample position."""

    def __init__(self, loader: BatchLoader, device: torch.device) -> None:
        self.loader, self.device = loader, device

    def micro_batches(self, consumed_samples: int) -> list[Batch]:
        batches = self.loader.micro_batches(consumed_samples)
        counts = mean_counts(batches, self.device)
        return [batch._replace(counts=counts).to(self.device) for batch in batches]

    def set_micro_batch_size(self, micro_batch_size: int) -> None:
        """Sequences of a micro-batch from the next step on."""
        self.loader.set_micro_batch_size(micro_batch_size)


def mean_counts(batches: list[Batch], device: torch.device) -> Counts:
    """Mean counts of a micro-batch of this step, over all ranks (one small all-reduce).

    At least one masked row: a step without any would otherwise divide 0 by 0.
    """
    own = torch.tensor([batch.counts for batch in batches], dtype=torch.float64, device=device).mean(0)
    masked_rows, tokens, pairs = ranks.mean(own).tolist()
    return Counts(max(masked_rows, 1.0 / (len(batches) * ranks.world_size())), tokens, pairs)
