"""What both forms of the attention-map loss work on: queries and keys of student and teacher, and what is compared."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

TARGETS = ("scores", "probabilities", "probabilities_kl")

MASKED = -1.0e30
"""Score of a padded key. Finite: in a row of padding alone the softmax stays a number (its weight is 0)."""


class Maps(NamedTuple):
    """What both maps are made of. Tensors may be strided views, student and teacher of different float dtypes."""

    student_queries: Tensor
    """(B, N, T, Hs)"""
    student_keys: Tensor
    """(B, N, T, Hs)"""
    teacher_queries: Tensor
    """(B, Nt, T, Ht)"""
    teacher_keys: Tensor
    """(B, Nt, T, Ht)"""
    student_scale: float
    teacher_scale: float
    attention_mask: Tensor
    """(B, T), 1 = token, 0 = padding."""
    heads: Tensor | None
    """(N,) int64: the teacher's head of each head of the student; None = the same."""
    target: str

    def gradient_buffer(self) -> Tensor:
        """Memory for the gradient of the student's queries or keys, laid out like the queries.

        That of a sum over all pairs spans more than fp16 holds at either end: fp32 there.
        """
        queries = self.student_queries
        dtype = torch.float32 if queries.dtype == torch.float16 else queries.dtype
        # The dims of a head side by side: the kernels count on it.
        layout = torch.preserve_format if queries.stride(-1) == 1 else torch.contiguous_format
        return torch.empty_like(queries, dtype=dtype, memory_format=layout)


Gradients = tuple[Tensor, Tensor]
"""Gradients of the sum over heads with respect to the student's queries and keys."""
