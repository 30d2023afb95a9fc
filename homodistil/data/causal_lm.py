"""Causal language modelling: every token but a block's first is predicted from those before it.

Blocks are full (data/task.py drops the rest of the text that fills none), so there is no padding.
Shapes: B sequences, T tokens.
"""

from __future__ import annotations

import numpy as np
import torch

from homodistil.data.batch import Batch, LossCounts
from homodistil.kernels.attention_map_inputs import MaskKind, num_pairs


class NextToken:
    """Turns blocks of token ids into batches; nothing is drawn.

    Args:
        window: of the model's layers that have one, to count pairs by.
    """

    def __init__(self, window: int | None = None) -> None:
        self._kind = None if window is None else MaskKind(causal=True, window=window)

    def __call__(self, blocks: np.ndarray, samples: np.ndarray, epochs: np.ndarray) -> Batch:
        """Batch of `blocks` (B, T) int64; the other arguments are of masked language modelling."""
        num_sequences, num_tokens = blocks.shape
        positions = np.arange(blocks.size).reshape(blocks.shape)
        return _batch(blocks, positions[:, :-1].ravel(), num_sequences * (num_tokens - 1), self._kind)

    def without_targets(self, blocks: np.ndarray) -> Batch:
        """A batch with nothing to predict."""
        return _batch(blocks, np.empty(0, dtype=np.int64), 0, self._kind)


def _batch(blocks: np.ndarray, index: np.ndarray, num_targets: int, window: MaskKind | None) -> Batch:
    num_sequences, num_tokens = blocks.shape
    pairs = num_sequences * num_tokens * (num_tokens + 1) // 2  # a token sees itself and those before it
    in_window = None if window is None else float(num_sequences * num_pairs([num_tokens], window))
    counts = LossCounts(float(num_targets), float(blocks.size), float(pairs), in_window)
    targets = blocks.ravel()[index + 1] if len(index) else np.empty(0, dtype=np.int64)
    arrays = (blocks, np.ones_like(blocks), index, targets, np.arange(blocks.size))
    return Batch(*(torch.from_numpy(np.ascontiguousarray(array, dtype=np.int64)) for array in arrays), counts)
