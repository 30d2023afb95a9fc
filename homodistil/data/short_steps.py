"""Steps whose blocks are split into shorter ones: a model comes near its teacher only at lengths that it has seen.

Devlin et al. (2019) cut a tenth of their sequences short for this reason (their code's `short_seq_prob`). Here nothing
is padded: a block of T tokens becomes n blocks of T / n tokens, so that a step has as many tokens as any other. Which
steps these are depends on (seed, step) alone, whatever the number of ranks and micro-batches.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

PARTS = (2, 4, 8)
"""Numbers of parts that a block is split into; each is drawn as often as the others."""
SHORTEST_BLOCK = 16
"""Tokens of the shortest block that can be split."""
_MIN_TOKENS = SHORTEST_BLOCK // PARTS[0]
"""Least number of tokens of a part, its frame included; shorter blocks are split into fewer parts."""
_STEP_KEY = 2**64 - 2  # masking uses keys (seed, epoch; sample), the order 2^64 - 1, and no sample has these numbers
_PART_SHIFT = 48
"""Part i of sample s draws its masks as sample s + i 2^48; no data set has so many samples."""


class Ends(NamedTuple):
    """Token ids that frame a block."""

    first: int
    last: int
    pad: int


class ShortSteps:
    """Draws the steps whose blocks are split, and splits blocks.

    Args:
        share: short steps as a fraction of all steps, in [0, 1).
        ends: token ids that frame the blocks.
        seed: of the draw.
    """

    def __init__(self, share: float, ends: Ends, seed: int) -> None:
        self._share, self._ends, self._seed = share, ends, seed

    def num_parts(self, step: int, seq_len: int) -> int:
        """How many parts each block of this step becomes; 1: it stays whole."""
        key = np.array([self._seed << 32 | step & 0xFFFFFFFF, _STEP_KEY], dtype=np.uint64)
        is_short, which = np.random.Generator(np.random.Philox(key=key)).random(2)
        allowed = [parts for parts in PARTS if seq_len // parts >= _MIN_TOKENS]
        return allowed[int(which * len(allowed))] if allowed and is_short < self._share else 1

    def split(self, blocks: np.ndarray, num_parts: int) -> np.ndarray:
        """Blocks (B, T) -> (B num_parts, T // num_parts): the text of each in turn, each part framed as a block.

        Every further part needs a frame, so the last tokens of a full block, 2 num_parts or a few more, are left out.
        """
        width = blocks.shape[1] // num_parts
        body = blocks[:, 1:-1][:, : num_parts * (width - 2)].reshape(len(blocks) * num_parts, width - 2)
        parts = np.full((len(body), width), self._ends.last, dtype=blocks.dtype)
        parts[:, 0], parts[:, 1:-1] = self._ends.first, body
        parts[body[:, -1] == self._ends.pad, -1] = self._ends.pad  # the text has ended before, with its own last token
        return parts


def numbers_of_parts(samples: np.ndarray, num_parts: int) -> np.ndarray:
    """Sample numbers (B,) of blocks -> those of their parts (B num_parts,), all different."""
    return (samples[:, None] + (np.arange(num_parts, dtype=np.int64) << _PART_SHIFT)).ravel()
