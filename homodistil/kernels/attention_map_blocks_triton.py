"""What the Triton kernels of the attention-map loss are made of: rows in and out, the mask, maps and their comparison.

BEFORE and AFTER are the kind of mask: query i sees keys i - BEFORE .. i + AFTER, None = no bound. Softmax runs in
base 2, which is what the hardware has; S is scaled by log2(e) for it. The kernels: attention_map_kernels_triton.py.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from homodistil.kernels import attention_map_inputs
from homodistil.kernels.triton_support import mend_interpreter

mend_interpreter()

MASKED = tl.constexpr(attention_map_inputs.MASKED)
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


class Side(NamedTuple):
    """Queries (B, N, T, H) and keys (B, G, T, H); one argument of a kernel. A kernel asks single fields for None: to
    compare the whole with it fails where a stride is 1, which Triton compiles in.
    """

    queries: Tensor | None = None
    """None: gradients that nobody wants."""
    keys: Tensor | None = None
    text_stride: int | None = None
    head_stride: int | None = None
    token_stride: int | None = None
    num_dims: int | None = None
    heads_per_key: int | None = None
    """N / G; None where that is 1 and keys have the strides of queries."""
    key_text_stride: int | None = None
    key_head_stride: int | None = None
    key_token_stride: int | None = None


@triton.jit
def load_rows(pointer, token_stride, num_dims, rows, num_tokens, DIMS: tl.constexpr):
    """(rows, DIMS), 0 outside."""
    dims = tl.arange(0, DIMS)
    inside = (rows[:, None] < num_tokens) & (dims[None, :] < num_dims)
    return tl.load(pointer + rows[:, None] * token_stride + dims[None, :], mask=inside, other=0.0)


@triton.jit
def store_rows(pointer, token_stride, num_dims, values, rows, num_tokens, DIMS: tl.constexpr):
    dims = tl.arange(0, DIMS)
    inside = (rows[:, None] < num_tokens) & (dims[None, :] < num_dims)
    tl.store(pointer + rows[:, None] * token_stride + dims[None, :], values, mask=inside)


@triton.jit
def load_queries(side, start, rows, num_tokens, DIMS: tl.constexpr):
    return load_rows(side.queries + start, side.token_stride, side.num_dims, rows, num_tokens, DIMS)


@triton.jit
def load_keys(side, start, rows, num_tokens, DIMS: tl.constexpr):
    return load_rows(side.keys + start, key_token_stride(side), side.num_dims, rows, num_tokens, DIMS)


@triton.jit
def store_queries(side, start, values, rows, num_tokens, DIMS: tl.constexpr):
    store_rows(side.queries + start, side.token_stride, side.num_dims, values, rows, num_tokens, DIMS)


@triton.jit
def store_keys(side, start, values, rows, num_tokens, DIMS: tl.constexpr):
    store_rows(side.keys + start, key_token_stride(side), side.num_dims, values, rows, num_tokens, DIMS)


@triton.jit
def key_token_stride(side):
    if side.heads_per_key is None:
        return side.token_stride
    else:
        return side.key_token_stride


@triton.jit
def head_start(side, text, head):
    return text.to(tl.int64) * side.text_stride + head * side.head_stride


@triton.jit
def key_start(side, text, head):
    """Of the keys that this head of queries meets."""
    if side.heads_per_key is None:
        return head_start(side, text, head)
    else:
        key_head = head // side.heads_per_key
        return text.to(tl.int64) * side.key_text_stride + key_head * side.key_head_stride


@triton.jit
def teachers_head(heads, head):
    # Pruned heads are gone from the student: each survivor is compared with the teacher's head that it came from.
    if heads is not None:
        return tl.load(heads + head)
    else:
        return head


@triton.jit
def first_in_reach(block, SIZE: tl.constexpr, BACK: tl.constexpr):
    """The first token that is at most BACK tokens before any of a block's; None: 0."""
    if BACK is None:
        return 0
    else:
        return tl.maximum(block * SIZE - BACK, 0)


@triton.jit
def end_of_reach(block, num_tokens, SIZE: tl.constexpr, AHEAD: tl.constexpr):
    """One past the last token that is at most AHEAD tokens behind any of a block's; None: of the text."""
    if AHEAD is None:
        return num_tokens
    else:
        return tl.minimum((block + 1) * SIZE + AHEAD, num_tokens)


@triton.jit
def seen_keys(valid_keys, rows, columns, BEFORE: tl.constexpr, AFTER: tl.constexpr):
    """(1 or rows, columns): keys that are tokens and that the query of the row sees."""
    seen = valid_keys[None, :]
    if BEFORE is not None:
        seen = seen & (rows[:, None] - columns[None, :] <= BEFORE)
    if AFTER is not None:
        seen = seen & (columns[None, :] - rows[:, None] <= AFTER)
    return seen


@triton.jit
def load_valid(attention_mask, text, tokens, num_tokens):
    return tl.load(attention_mask + text * num_tokens + tokens, mask=tokens < num_tokens, other=0) != 0


@triton.jit
def plain_scores(queries, keys, scale):
    return tl.dot(queries, tl.trans(keys), input_precision="ieee") * scale


@triton.jit
def score_difference(queries, keys, scale, teacher_queries, teacher_keys, teacher_scale):
    return plain_scores(queries, keys, scale) - plain_scores(teacher_queries, teacher_keys, teacher_scale)


@triton.jit
def mean_of_seen(total, num_seen):
    """Per row; 0 where a query of padding sees nothing."""
    return total / tl.maximum(num_seen, 1.0)


@triton.jit
def log2_scores(queries, keys, scale, seen):
    """In units of log2."""
    return tl.where(seen, plain_scores(queries, keys, scale * LOG2_E), MASKED)


@triton.jit
def log2_softmax(scores):
    """In units of log2, like its input."""
    scores -= tl.max(scores, 1)[:, None]
    return scores - tl.log2(tl.sum(tl.exp2(scores), 1))[:, None]


@triton.jit
def compare_maps(student, teacher, mean, TARGET: tl.constexpr):
    """Per row the loss, and the gradient of the student's scores (half of it for MSE) before the row's weight.

    student, teacher: log2 of probabilities. mean: per row the sum of P * D, for MSE.
    """
    p = tl.exp2(student)
    q = tl.exp2(teacher)
    if TARGET == "probabilities":
        difference = p - q
        return tl.sum(difference * difference, 1), p * (difference - mean[:, None])
    else:
        # p - q sums to 0 but for rounding, which it shares with the logarithms: most of the loss near the teacher.
        return tl.sum(q * (teacher - student) * LN_2 + (p - q), 1), p - q


@triton.jit
def grow(old_max, scores):
    """(new maximum of each row, factor for sums made with the old one, exp2 of the scores under the new one)."""
    new_max = tl.maximum(old_max, tl.max(scores, 1))
    return new_max, tl.exp2(old_max - new_max), tl.exp2(scores - new_max[:, None])
