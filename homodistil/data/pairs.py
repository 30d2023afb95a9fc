"""Pairs of texts as a tokenizer frames them: `[CLS] a [SEP] b [SEP]`, with types of tokens where the model has them.

B blocks, T tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from homodistil.data.batch import Batch
from homodistil.data.masked_lm import Unmasked
from homodistil.errors import UserError

_PROBES = ("a", "b")


@dataclass(frozen=True)
class PairFrame:
    """Token ids around and between the two texts of a block."""

    first: tuple[int, ...]
    between: tuple[int, ...]
    last: tuple[int, ...]
    pad: int
    has_types: bool
    """Whether the tokens behind `between` are of type 1, and all others of type 0; otherwise all are of type 0."""

    def body(self, seq_len: int) -> int:
        """Tokens of both texts in a block of `seq_len`."""
        return seq_len - len(self.first) - len(self.between) - len(self.last)


def pair_frame(tokenizer: PreTrainedTokenizerBase) -> PairFrame:
    """The frame that `tokenizer(a, b)` makes.

    Raises:
        UserError: it puts nothing between the texts, or gives types that no supported model has.
    """
    encoded = tokenizer(*_PROBES, return_token_type_ids=True)
    owners = np.array([-1 if owner is None else owner for owner in encoded.sequence_ids(0)])
    ids, types = np.array(encoded["input_ids"]), np.array(encoded["token_type_ids"])
    (a,), (b,) = ((np.flatnonzero(owners == text)[[0, -1]],) for text in (0, 1))
    first, between, last = ids[: a[0]], ids[a[1] + 1 : b[0]], ids[b[1] + 1 :]
    takes_types = "token_type_ids" in tokenizer.model_input_names and types.any()
    is_second = np.arange(len(ids)) >= b[0]
    if not len(between) or (takes_types and not np.array_equal(types, is_second)):
        raise UserError(
            f"data.pair_columns: the teacher's tokenizer frames a pair as {tokenizer.convert_ids_to_tokens(ids)} with "
            f"types {types.tolist()}; supported are tokens between the texts, and types 1 from the second text on; "
            f"give a teacher with such a tokenizer"
        )
    frame = (tuple(part.tolist()) for part in (first, between, last))
    return PairFrame(*frame, tokenizer.pad_token_id, bool(takes_types))


class Pairs(Unmasked):
    """Batches of blocks that hold one pair each, with the types of their tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, frame: PairFrame, window: int | None = None) -> None:
        super().__init__(tokenizer, 0.0, seed=0, window=window)
        self._frame = frame

    def without_targets(self, blocks: np.ndarray) -> Batch:
        """Batch of `blocks` (B, T) int64."""
        batch = super().without_targets(blocks)
        if not self._frame.has_types:
            return batch
        return batch._replace(token_types=torch.from_numpy(token_types(blocks, self._frame)))


def token_types(blocks: np.ndarray, frame: PairFrame) -> np.ndarray:
    """(B, T) ids -> int64 (B, T): 1 behind what is between the texts, 0 before it and in padding. Texts hold none of
    its tokens: those that are written out in a text are ordinary ones."""
    is_separator = blocks == frame.between[-1]
    num_before = is_separator.cumsum(1) - is_separator
    return ((num_before >= len(frame.between)) & (blocks != frame.pad)).astype(np.int64)
