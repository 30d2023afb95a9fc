"""Triton kernels of the attention-map loss (formulas: attention_map.py). Loss and gradients, no map in memory.

Of a short text one program makes both maps of one head at once (`tile_kernel`). Else `row_kernel` takes a block of
queries: a first pass over the keys for the sums that a softmax and its gradient need, a second for loss and dQ;
`column_kernel` then takes a block of keys and makes dK from these sums. Softmax runs in base 2, which is what the
hardware has; S is scaled by log2(e) for it. Launched by attention_map_triton.py.
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
    """Two tensors (B, N, T, H) of the same strides; one argument of a kernel."""

    queries: Tensor
    keys: Tensor
    text_stride: int
    head_stride: int
    token_stride: int
    num_dims: int


@triton.jit
def _load_rows(pointer, side, rows, num_tokens, DIMS: tl.constexpr):
    """(rows, DIMS), 0 outside."""
    dims = tl.arange(0, DIMS)
    inside = (rows[:, None] < num_tokens) & (dims[None, :] < side.num_dims)
    return tl.load(pointer + rows[:, None] * side.token_stride + dims[None, :], mask=inside, other=0.0)


@triton.jit
def _store_rows(pointer, side, values, rows, num_tokens, DIMS: tl.constexpr):
    dims = tl.arange(0, DIMS)
    inside = (rows[:, None] < num_tokens) & (dims[None, :] < side.num_dims)
    tl.store(pointer + rows[:, None] * side.token_stride + dims[None, :], values, mask=inside)


@triton.jit
def _head_start(side, text, head):
    return text.to(tl.int64) * side.text_stride + head * side.head_stride


@triton.jit
def _teacher_start(teacher, heads, text, head):
    # Pruned heads are gone from the student: each survivor is compared with the teacher's head that it came from.
    if heads is not None:
        return _head_start(teacher, text, tl.load(heads + head))
    else:
        return _head_start(teacher, text, head)


@triton.jit
def _load_valid(attention_mask, text, tokens, num_tokens):
    return tl.load(attention_mask + text * num_tokens + tokens, mask=tokens < num_tokens, other=0) != 0


@triton.jit
def _scores(queries, keys, scale):
    return tl.dot(queries, tl.trans(keys), input_precision="ieee") * scale


@triton.jit
def _masked_scores(queries, keys, scale, valid_keys):
    """In units of log2."""
    return tl.where(valid_keys[None, :], _scores(queries, keys, scale * LOG2_E), MASKED)


@triton.jit
def _log_softmax(scores):
    """In units of log2, like its input."""
    scores -= tl.max(scores, 1)[:, None]
    return scores - tl.log2(tl.sum(tl.exp2(scores), 1))[:, None]


@triton.jit
def _compare(student, teacher, mean, TARGET: tl.constexpr):
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
def _grow(old_max, scores):
    """(new maximum of each row, factor for sums made with the old one, exp2 of the scores under the new one)."""
    new_max = tl.maximum(old_max, tl.max(scores, 1))
    return new_max, tl.exp2(old_max - new_max), tl.exp2(scores - new_max[:, None])


@triton.jit
def tile_kernel(
    student,
    teacher,
    gradients,
    attention_mask,
    heads,
    losses,
    student_scale,
    teacher_scale,
    num_heads,
    num_tokens,
    TARGET: tl.constexpr,
    SHIFT: tl.constexpr,
    TOKENS: tl.constexpr,
    STUDENT_DIMS: tl.constexpr,
    TEACHER_DIMS: tl.constexpr,
):
    """One head of one text: loss (1 value), dQ, dK."""
    text, head = tl.program_id(0) // num_heads, tl.program_id(0) % num_heads
    tokens = tl.arange(0, TOKENS)
    valid = _load_valid(attention_mask, text, tokens, num_tokens)
    start = _head_start(student, text, head)
    queries = _load_rows(student.queries + start, student, tokens, num_tokens, STUDENT_DIMS)
    keys = _load_rows(student.keys + start, student, tokens, num_tokens, STUDENT_DIMS)
    start = _teacher_start(teacher, heads, text, head)
    teacher_queries = _load_rows(teacher.queries + start, teacher, tokens, num_tokens, TEACHER_DIMS)
    teacher_keys = _load_rows(teacher.keys + start, teacher, tokens, num_tokens, TEACHER_DIMS)
    if TARGET == "scores":
        difference = _scores(queries, keys, student_scale) - _scores(teacher_queries, teacher_keys, teacher_scale)
        gradient = tl.where(valid[None, :], difference, 0.0)
        loss = tl.sum(gradient * gradient, 1)
    else:
        ours = _log_softmax(_masked_scores(queries, keys, student_scale, valid))
        theirs = _log_softmax(_masked_scores(teacher_queries, teacher_keys, teacher_scale, valid))
        p = tl.exp2(ours)
        loss, gradient = _compare(ours, theirs, tl.sum(p * (p - tl.exp2(theirs)), 1), TARGET)
    tl.store(losses + tl.program_id(0), tl.sum(tl.where(valid, loss, 0.0), 0))
    if gradients is not None:
        gradient = (tl.where(valid[:, None], gradient, 0.0) * SHIFT).to(keys.dtype)
        factor = (1.0 if TARGET == "probabilities_kl" else 2.0) * student_scale / SHIFT
        start = _head_start(gradients, text, head)
        of_queries = tl.dot(gradient, keys, input_precision="ieee") * factor
        _store_rows(gradients.queries + start, gradients, of_queries, tokens, num_tokens, STUDENT_DIMS)
        of_keys = tl.dot(tl.trans(gradient), queries, input_precision="ieee") * factor
        _store_rows(gradients.keys + start, gradients, of_keys, tokens, num_tokens, STUDENT_DIMS)


@triton.jit
def _row_sums(
    student,
    teacher,
    student_start,
    teacher_start,
    queries,
    teacher_queries,
    attention_mask,
    text,
    student_scale,
    teacher_scale,
    num_tokens,
    KEYS: tl.constexpr,
    STUDENT_DIMS: tl.constexpr,
    TEACHER_DIMS: tl.constexpr,
):
    """First pass over the keys: of each row both log-sum-exps (log2) and the sum of P * D."""
    our_max = tl.full((queries.shape[0],), MASKED, tl.float32)
    their_max = tl.full((queries.shape[0],), MASKED, tl.float32)
    our_sum = tl.zeros((queries.shape[0],), tl.float32)
    their_sum = tl.zeros((queries.shape[0],), tl.float32)
    squares = tl.zeros((queries.shape[0],), tl.float32)
    products = tl.zeros((queries.shape[0],), tl.float32)
    for first in range(0, num_tokens, KEYS):
        tokens = first + tl.arange(0, KEYS)
        valid = _load_valid(attention_mask, text, tokens, num_tokens)
        keys = _load_rows(student.keys + student_start, student, tokens, num_tokens, STUDENT_DIMS)
        teacher_keys = _load_rows(teacher.keys + teacher_start, teacher, tokens, num_tokens, TEACHER_DIMS)
        our_max, ours, p = _grow(our_max, _masked_scores(queries, keys, student_scale, valid))
        their_max, theirs, q = _grow(their_max, _masked_scores(teacher_queries, teacher_keys, teacher_scale, valid))
        our_sum = our_sum * ours + tl.sum(p, 1)
        their_sum = their_sum * theirs + tl.sum(q, 1)
        squares = squares * (ours * ours) + tl.sum(p * p, 1)
        products = products * (ours * theirs) + tl.sum(p * q, 1)
    # Of the whole row and exact before the second pass: sums of P * D * K and P * K, combined at the end, would cancel
    # to nothing in bf16 where attention is nearly one-hot.
    mean = squares / (our_sum * our_sum) - products / (our_sum * their_sum)
    return our_max + tl.log2(our_sum), their_max + tl.log2(their_sum), mean


@triton.jit
def row_kernel(
    student,
    teacher,
    gradients,
    attention_mask,
    heads,
    losses,
    row_sums,
    student_scale,
    teacher_scale,
    num_heads,
    num_tokens,
    TARGET: tl.constexpr,
    SHIFT: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    STUDENT_DIMS: tl.constexpr,
    TEACHER_DIMS: tl.constexpr,
):
    """QUERIES rows of one map: loss (1 value), dQ, and of each row the 3 sums that `column_kernel` needs."""
    num_blocks = tl.cdiv(num_tokens, QUERIES)
    map_index, block = tl.program_id(0) // num_blocks, tl.program_id(0) % num_blocks
    text, head = map_index // num_heads, map_index % num_heads
    rows = block * QUERIES + tl.arange(0, QUERIES)
    valid_rows = _load_valid(attention_mask, text, rows, num_tokens)
    student_start, teacher_start = _head_start(student, text, head), _teacher_start(teacher, heads, text, head)
    queries = _load_rows(student.queries + student_start, student, rows, num_tokens, STUDENT_DIMS)
    teacher_queries = _load_rows(teacher.queries + teacher_start, teacher, rows, num_tokens, TEACHER_DIMS)
    if TARGET != "scores":
        our_log, their_log, mean = _row_sums(
            student, teacher, student_start, teacher_start, queries, teacher_queries, attention_mask, text,
            student_scale, teacher_scale, num_tokens, KEYS, STUDENT_DIMS, TEACHER_DIMS,
        )  # fmt: skip
        if gradients is not None:
            sums = row_sums + map_index.to(tl.int64) * 3 * num_tokens + rows
            tl.store(sums, our_log, mask=rows < num_tokens)
            tl.store(sums + num_tokens, their_log, mask=rows < num_tokens)
            tl.store(sums + 2 * num_tokens, mean, mask=rows < num_tokens)
    loss = tl.zeros((QUERIES,), tl.float32)
    of_queries = tl.zeros((QUERIES, STUDENT_DIMS), tl.float32)
    for first in range(0, num_tokens, KEYS):
        tokens = first + tl.arange(0, KEYS)
        valid = _load_valid(attention_mask, text, tokens, num_tokens)
        keys = _load_rows(student.keys + student_start, student, tokens, num_tokens, STUDENT_DIMS)
        teacher_keys = _load_rows(teacher.keys + teacher_start, teacher, tokens, num_tokens, TEACHER_DIMS)
        if TARGET == "scores":
            difference = _scores(queries, keys, student_scale) - _scores(teacher_queries, teacher_keys, teacher_scale)
            gradient = tl.where(valid[None, :], difference, 0.0)
            loss += tl.sum(gradient * gradient, 1)
        else:
            ours = _masked_scores(queries, keys, student_scale, valid) - our_log[:, None]
            theirs = _masked_scores(teacher_queries, teacher_keys, teacher_scale, valid) - their_log[:, None]
            block_loss, gradient = _compare(ours, theirs, mean, TARGET)
            loss += block_loss
        if gradients is not None:
            of_queries += tl.dot((gradient * SHIFT).to(keys.dtype), keys, input_precision="ieee")
    tl.store(losses + tl.program_id(0), tl.sum(tl.where(valid_rows, loss, 0.0), 0))
    if gradients is not None:
        factor = (1.0 if TARGET == "probabilities_kl" else 2.0) * student_scale / SHIFT
        of_queries *= tl.where(valid_rows, factor, 0.0)[:, None]
        pointer = gradients.queries + _head_start(gradients, text, head)
        _store_rows(pointer, gradients, of_queries, rows, num_tokens, STUDENT_DIMS)


@triton.jit
def column_kernel(
    student,
    teacher,
    gradients,
    attention_mask,
    heads,
    row_sums,
    student_scale,
    teacher_scale,
    num_heads,
    num_tokens,
    TARGET: tl.constexpr,
    SHIFT: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    STUDENT_DIMS: tl.constexpr,
    TEACHER_DIMS: tl.constexpr,
):
    """KEYS columns of one map: dK."""
    num_blocks = tl.cdiv(num_tokens, KEYS)
    map_index, block = tl.program_id(0) // num_blocks, tl.program_id(0) % num_blocks
    text, head = map_index // num_heads, map_index % num_heads
    columns = block * KEYS + tl.arange(0, KEYS)
    valid = _load_valid(attention_mask, text, columns, num_tokens)
    student_start, teacher_start = _head_start(student, text, head), _teacher_start(teacher, heads, text, head)
    keys = _load_rows(student.keys + student_start, student, columns, num_tokens, STUDENT_DIMS)
    teacher_keys = _load_rows(teacher.keys + teacher_start, teacher, columns, num_tokens, TEACHER_DIMS)
    of_keys = tl.zeros((KEYS, STUDENT_DIMS), tl.float32)
    for first in range(0, num_tokens, QUERIES):
        rows = first + tl.arange(0, QUERIES)
        valid_rows = _load_valid(attention_mask, text, rows, num_tokens)
        queries = _load_rows(student.queries + student_start, student, rows, num_tokens, STUDENT_DIMS)
        teacher_queries = _load_rows(teacher.queries + teacher_start, teacher, rows, num_tokens, TEACHER_DIMS)
        if TARGET == "scores":
            gradient = _scores(queries, keys, student_scale) - _scores(teacher_queries, teacher_keys, teacher_scale)
        else:
            sums = row_sums + map_index.to(tl.int64) * 3 * num_tokens + rows
            our_log = tl.load(sums, mask=rows < num_tokens, other=0.0)
            their_log = tl.load(sums + num_tokens, mask=rows < num_tokens, other=0.0)
            mean = tl.load(sums + 2 * num_tokens, mask=rows < num_tokens, other=0.0)
            ours = _masked_scores(queries, keys, student_scale, valid) - our_log[:, None]
            theirs = _masked_scores(teacher_queries, teacher_keys, teacher_scale, valid) - their_log[:, None]
            _, gradient = _compare(ours, theirs, mean, TARGET)
        gradient = tl.where(valid_rows[:, None] & valid[None, :], gradient, 0.0)
        of_keys += tl.dot(tl.trans((gradient * SHIFT).to(queries.dtype)), queries, input_precision="ieee")
    of_keys *= (1.0 if TARGET == "probabilities_kl" else 2.0) * student_scale / SHIFT
    pointer = gradients.keys + _head_start(gradients, text, head)
    _store_rows(pointer, gradients, of_keys, columns, num_tokens, STUDENT_DIMS)
