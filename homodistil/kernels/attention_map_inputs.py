"""What both forms of the attention-map loss work on: queries and keys of student and teacher, which keys a query sees,
and what is compared.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from homodistil.errors import UserError

TARGETS = ("scores", "centred_scores", "probabilities", "probabilities_kl")
SCORE_TARGETS = ("scores", "centred_scores")
"""Those that compare before the softmax."""

MASKED = -1.0e30
"""Score of a key that its query does not see. Finite: in a row of padding alone the softmax stays a number (its weight
is 0)."""


@dataclass(frozen=True)
class MaskKind:
    """Which keys a query sees by their distance, as transformers/masking_utils.py counts it; padding comes on top.

    Query i sees key j when j <= i if `causal`, and of a `window` w also when
        i - j < w       causal: w keys, itself among them (`sliding_window_overlay`; sliding_window of Mistral, Gemma
                        and Qwen)
        |i - j| <= w    else: 2 w + 1 keys (`sliding_window_bidirectional_overlay`; ModernBERT, whose sliding_window is
                        local_attention // 2)
    A query always sees itself. Positions are those of the row, also where padding stands on the left.

    Raises:
        UserError: a window so small that a query would not see itself.
    """

    causal: bool = False
    window: int | None = None
    """None: no bound."""

    def __post_init__(self) -> None:
        least = 1 if self.causal else 0
        if self.window is not None and self.window < least:
            raise UserError(f"attention window: found {self.window}, allowed {least} or more, or none at all")

    @property
    def before(self) -> int | None:
        """Query i sees no key before i - before; None: all of them."""
        return self.window - 1 if self.causal and self.window is not None else self.window

    @property
    def after(self) -> int | None:
        """Query i sees no key behind i + after; None: all of them."""
        return 0 if self.causal else self.window

    def within(self, num_tokens: int) -> tuple[int | None, int | None]:
        """`before` and `after`, None where they hide nothing in a text of so many tokens."""
        return tuple(None if reach is None or reach >= num_tokens - 1 else reach for reach in (self.before, self.after))

    def clear_hidden(self, maps: Tensor) -> Tensor:
        """Sets to 0, in place, what a query does not see in (..., T, T)."""
        if self.after is not None:
            maps.tril_(self.after)
        if self.before is not None:
            maps.triu_(-self.before)
        return maps

    def bias(self, num_tokens: int, device: torch.device) -> Tensor | None:
        """(T, T) fp32: 0, or MASKED where the query does not see the key. None where it sees all."""
        if self.before is None and self.after is None:
            return None
        seen = self.clear_hidden(torch.ones(num_tokens, num_tokens, device=device))
        return (1 - seen) * MASKED


FULL = MaskKind()
"""Every query sees every key: encoders."""


def num_pairs(lengths: ArrayLike, kind: MaskKind = FULL) -> int:
    """How many pairs of a query and a key that it sees there are in texts of `lengths` tokens, exactly: what the sums
    of `scores` and `probabilities` are divided by. Full: sum of L^2; causal: sum of L (L + 1) / 2.

    Args:
        lengths: any shape, ints: the tokens of each text, which lie side by side.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    total = lengths.sum()
    for reach in (kind.before, kind.after):
        # Of the pairs at distance d, on one side, there are L - d.
        furthest = lengths - 1 if reach is None else np.minimum(lengths - 1, reach)
        total += (furthest * lengths - furthest * (furthest + 1) // 2).sum()
    return int(total)


class Maps(NamedTuple):
    """What both maps are made of. Tensors may be strided views, student and teacher of different float dtypes."""

    student_queries: Tensor
    """(B, N, T, Hs)"""
    student_keys: Tensor
    """(B, Gs, T, Hs): N / Gs heads of queries in a row share one head of keys."""
    teacher_queries: Tensor
    """(B, Nt, T, Ht)"""
    teacher_keys: Tensor
    """(B, Gt, T, Ht)"""
    student_scale: float
    teacher_scale: float
    attention_mask: Tensor
    """(B, T), 1 = token, 0 = padding."""
    heads: Tensor | None
    """(N,) int64: the teacher's head of queries of each of the student; None = the same."""
    target: str
    kind: MaskKind

    @property
    def student_group(self) -> int:
        """Heads of queries that share a head of keys."""
        return self.student_queries.shape[1] // self.student_keys.shape[1]

    @property
    def teacher_group(self) -> int:
        return self.teacher_queries.shape[1] // self.teacher_keys.shape[1]

    def check(self) -> None:
        """Raises `UserError` when heads of keys cannot be shared equally."""
        for queries, keys in ((self.student_queries, self.student_keys), (self.teacher_queries, self.teacher_keys)):
            if queries.shape[1] % keys.shape[1]:
                raise UserError(
                    f"attention: {queries.shape[1]} query heads cannot share {keys.shape[1]} key heads equally"
                )

    def gradient_buffers(self) -> Gradients:
        """Memory for the gradients of the student's queries and keys, laid out like these; like the queries both where
        either has as many heads.
        """
        queries, keys = self.student_queries, self.student_keys
        return _gradient_buffer(queries), _gradient_buffer(queries if self.student_group == 1 else keys)


Gradients = tuple[Tensor, Tensor]
"""Gradients of the sum over heads with respect to the student's queries and keys."""


def _gradient_buffer(tensor: Tensor) -> Tensor:
    """The gradient of a sum over all pairs spans more than fp16 holds at either end: fp32 there."""
    dtype = torch.float32 if tensor.dtype == torch.float16 else tensor.dtype
    # The dims of a head side by side: the kernels count on it.
    layout = torch.preserve_format if tensor.stride(-1) == 1 else torch.contiguous_format
    return torch.empty_like(tensor, dtype=dtype, memory_format=layout)
