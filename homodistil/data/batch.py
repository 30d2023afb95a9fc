"""One micro-batch as every model and loss term takes it: ids, which rows are predicted, and what losses divide by.

Shapes: B sequences, T tokens, M rows to predict. A task (data/task.py) makes it of blocks of text.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from homodistil.data.rows import Rows


class LossCounts(NamedTuple):
    """What the loss terms divide by: numbers of the batch's own from a loader; from a feed 0-dim fp32 tensors on the
    device, means over all micro-batches of the step (see prefetch.py), which nothing in a step may bring to the host.
    """

    target_rows: float | Tensor
    tokens: float | Tensor
    """Valid (not padding) tokens."""
    pairs: float | Tensor
    """Valid query-key pairs, summed over the batch."""
    window_pairs: float | Tensor | None = None
    """Of these, pairs inside the window of the layers that have one; None: there is no such layer."""
    tokens_behind: float | Tensor | None = None
    """Of the tokens, those behind the first ones of each sequence, which loss.skip_first_tokens leaves out; None: it
    leaves out none."""
    labelled: float | Tensor | None = None
    """Texts that have a label, or tokens; None: labels are not read."""


class Batch(NamedTuple):
    input_ids: Tensor
    """(B, T) int64, masking applied."""
    attention_mask: Tensor
    """(B, T) int64, 1 = token, 0 = padding."""
    target_index: Tensor
    """(M,) int64, flat positions b * T + t of the rows to predict, ascending; of a token classifier those of the tokens
    that have labels."""
    target_ids: Tensor
    """(M,) int64, the tokens that stood there."""
    token_index: Tensor
    """(tokens,) int64, flat positions of the valid tokens, ascending: finding them on the device would wait for it."""
    counts: LossCounts
    token_types: Tensor | None = None
    """(B, T) int64: 0 for tokens of the first text of a pair, 1 for those of the second one; None: all are 0, or the
    model has no types."""
    teacher_outputs: Tensor | None = None
    """(B, D) fp32, the teacher's pooled state of each text, where these come from files (teacher.outputs=stored)."""
    labels: Tensor | None = None
    """(B, W) fp32, the label of each text (data/prepare/labels.py), or (M, 1) of each row of a token classifier, NaN
    where there is none; None: none are read."""

    @property
    def padding_mask(self) -> Tensor | None:
        """`attention_mask`, or None where it masks nothing: models then take their faster ways. Asks no device."""
        return None if self.token_index.numel() == self.input_ids.numel() else self.attention_mask

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All but the counts."""
        return tuple(part for part in self if isinstance(part, Tensor))

    def behind(self, num_first: int) -> tuple[Tensor, float | Tensor]:
        """What hidden states are compared by: `attention_mask` and `counts.tokens` without the first tokens of each
        sequence.

        Args:
            num_first: how many, as `counts` was made with (`with_tokens_behind`).
        """
        if not num_first:
            return self.attention_mask, self.counts.tokens
        return tokens_behind(self.attention_mask, num_first), self.counts.tokens_behind

    def with_outputs(self, outputs: Rows | None, samples: np.ndarray) -> Batch:
        """The batch with `teacher_outputs`: those of the blocks `samples` (B,), where there are any."""
        return self if outputs is None else self._replace(teacher_outputs=torch.from_numpy(outputs[samples]))

    def with_labels(self, labels: Rows | None, samples: np.ndarray, of_tokens: bool = False) -> Batch:
        """The batch with `labels` and their number: those of the blocks `samples` (B,), where there are any. To be
        called on the CPU.

        Args:
            of_tokens: whether a row of `labels` has a number for each of the T tokens.
        """
        if labels is None:
            return self
        rows = torch.from_numpy(labels[samples])
        if of_tokens:
            rows = rows.reshape(-1, 1)[self.target_index]
        count = float((~rows[:, 0].isnan()).sum())
        return self._replace(labels=rows, counts=self.counts._replace(labelled=count))

    def with_tokens_behind(self, num_first: int) -> Batch:
        """The batch with `counts.tokens_behind`, where tokens are left out. To be called on the CPU."""
        if not num_first:
            return self
        count = float(tokens_behind(self.attention_mask, num_first).sum())
        return self._replace(counts=self.counts._replace(tokens_behind=count))

    def pinned(self) -> Batch:
        """A copy in page-locked memory, out of which a GPU copies while the host continues."""
        return self._each(lambda tensor: tensor.pin_memory())

    def to(self, device: torch.device | str) -> Batch:
        """The batch with its tensors on `device`; from pinned memory without waiting for the copies."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def _each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        return Batch(*(change(part) if isinstance(part, Tensor) else part for part in self))


def tokens_behind(attention_mask: Tensor, num_first: int) -> Tensor:
    """`attention_mask` (B, T) without the first `num_first` tokens of each sequence, wherever its padding is."""
    return attention_mask * (attention_mask.cumsum(1) > num_first)
