"""Triton kernels of the attention-map loss (formulas: attention_map.py). Loss and gradients, no map in memory.

Of a short text one program makes both maps of one head at once (`tile_kernel`). Else `row_kernel` takes a block of
queries: a first pass over the keys for the sums that a softmax and its gradient need, a second for loss and dQ;
`column_kernel` then takes a block of keys and makes dK from these sums. Softmax runs in base 2, which is what the
hardware has; S is scaled by log2(e) for it. Launched by attention_map_triton.py.

BEFORE and AFTER are the kind of mask: query i sees keys i - BEFORE .. i + AFTER, None = no bound. Blocks without a pair
that is seen are not visited: causal, about half of them; with a window, all but a band.
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
def _load_rows(pointer, token_stride, num_dims, rows, num_tokens, DIMS: tl.constexpr):
    """(rows, DIMS), 0 outside."""
    dims = tl.arange(0, DIMS)
    inside = (rows[:, None] < num_tokens) & (dims[None, :] < num_dims)
    return tl.load(pointer + rows[:, None] * token_stride + dims[None, :], mask=inside, other=0.0)


@triton.jit
def _store_rows(pointer, token_stride, num_dims, values, rows, num_tokens, DIMS: tl.constexpr):
    dims = tl.arange(0, DIMS)
    inside = (rows[:, None] < num_tokens) & (dims[None, :] < num_dims)
    tl.store(pointer + rows[:, None] * token_stride + dims[None, :], values, mask=inside)


@triton.jit
def _load_queries(side, start, rows, num_tokens, DIMS: tl.constexpr):
    return _load_rows(side.queries + start, side.token_stride, side.num_dims, rows, num_tokens, DIMS)


@triton.jit
def _load_keys(side, start, rows, num_tokens, DIMS: tl.constexpr):
    return _load_rows(side.keys + start, _key_token_stride(side), side.num_dims, rows, num_tokens, DIMS)


@triton.jit
def _store_queries(side, start, values, rows, num_tokens, DIMS: tl.constexpr):
    _store_rows(side.queries + start, side.token_stride, side.num_dims, values, rows, num_tokens, DIMS)


@triton.jit
def _store_keys(side, start, values, rows, num_tokens, DIMS: tl.constexpr):
    _store_rows(side.keys + start, _key_token_stride(side), side.num_dims, values, rows, num_tokens, DIMS)


@triton.jit
def _key_token_stride(side):
    if side.heads_per_key is None:
        return side.token_stride
    else:
        return side.key_token_stride


@triton.jit
def _head_start(side, text, head):
    return text.to(tl.int64) * side.text_stride + head * side.head_stride


@triton.jit
def _key_start(side, text, head):
    """Of the keys that this head of queries meets."""
    if side.heads_per_key is None:
        return _head_start(side, text, head)
    else:
        key_head = head // side.heads_per_key
        return text.to(tl.int64) * side.key_text_stride + key_head * side.key_head_stride


@triton.jit
def _teacher_head(heads, head):
    # Pruned heads are gone from the student: each survivor is compared with the teacher's head that it came from.
    if heads is not None:
        return tl.load(heads + head)
    else:
        return head


@triton.jit
def _first_of(block, SIZE: tl.constexpr, BACK: tl.constexpr):
    """The first token that is at most BACK tokens before any of a block's; None: 0."""
    if BACK is None:
        return 0
    else:
        return tl.maximum(block * SIZE - BACK, 0)


@triton.jit
def _end_of(block, num_tokens, SIZE: tl.constexpr, AHEAD: tl.constexpr):
    """One past the last token that is at most AHEAD tokens behind any of a block's; None: of the text."""
    if AHEAD is None:
        return num_tokens
    else:
        return tl.minimum((block + 1) * SIZE + AHEAD, num_tokens)


@triton.jit
def _seen(valid_keys, rows, columns, BEFORE: tl.constexpr, AFTER: tl.constexpr):
    """(1 or rows, columns): keys that are tokens and that the query of the row sees."""
    seen = valid_keys[None, :]
    if BEFORE is not None:
        seen = seen & (rows[:, None] - columns[None, :] <= BEFORE)
    if AFTER is not None:
        seen = seen & (columns[None, :] - rows[:, None] <= AFTER)
    return seen


@triton.jit
def _load_valid(attention_mask, text, tokens, num_tokens):
    return tl.load(attention_mask + text * num_tokens + tokens, mask=tokens < num_tokens, other=0) != 0


@triton.jit
def _scores(queries, keys, scale):
    return tl.dot(queries, tl.trans(keys), input_precision="ieee") * scale


@triton.jit
def _masked_scores(queries, keys, scale, seen):
    """In units of log2."""
    return tl.where(seen, _scores(queries, keys, scale * LOG2_E), MASKED)


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
    BEFORE: tl.constexpr,
    AFTER: tl.constexpr,
):
    """One head of one text: loss (1 value), dQ, dK. The student's keys are not shared."""
    text, head = tl.program_id(0) // num_heads, tl.program_id(0) % num_heads
    tokens = tl.arange(0, TOKENS)
    valid = _load_valid(attention_mask, text, tokens, num_tokens)
    seen = _seen(valid, tokens, tokens, BEFORE, AFTER)
    queries = _load_queries(student, _head_start(student, text, head), tokens, num_tokens, STUDENT_DIMS)
    keys = _load_keys(student, _key_start(student, text, head), tokens, num_tokens, STUDENT_DIMS)
    teacher_head = _teacher_head(heads, head)
    teacher_queries = _load_queries(teacher, _head_start(teacher, text, teacher_head), tokens, num_tokens, TEACHER_DIMS)
    teacher_keys = _load_keys(teacher, _key_start(teacher, text, teacher_head), tokens, num_tokens, TEACHER_DIMS)
    if TARGET == "scores":
        difference = _scores(queries, keys, student_scale) - _scores(teacher_queries, teacher_keys, teacher_scale)
        gradient = tl.where(seen, difference, 0.0)
        loss = tl.sum(gradient * gradient, 1)
    else:
        ours = _log_softmax(_masked_scores(queries, keys, student_scale, seen))
        theirs = _log_softmax(_masked_scores(teacher_queries, teacher_keys, teacher_scale, seen))
        p = tl.exp2(ours)
        loss, gradient = _compare(ours, theirs, tl.sum(p * (p - tl.exp2(theirs)), 1), TARGET)
    tl.store(losses + tl.program_id(0), tl.sum(tl.where(valid, loss, 0.0), 0))
    if gradients.queries is not None:
        gradient = (tl.where(valid[:, None], gradient, 0.0) * SHIFT).to(keys.dtype)
        factor = (1.0 if TARGET == "probabilities_kl" else 2.0) * student_scale / SHIFT
        start = _head_start(gradients, text, head)
        of_queries = tl.dot(gradient, keys, input_precision="ieee") * factor
        _store_queries(gradients, start, of_queries, tokens, num_tokens, STUDENT_DIMS)
        of_keys = tl.dot(tl.trans(gradient), queries, input_precision="ieee") * factor
        _store_keys(gradients, start, of_keys, tokens, num_tokens, STUDENT_DIMS)


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
    block,
    student_scale,
    teacher_scale,
    num_tokens,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    STUDENT_DIMS: tl.constexpr,
    TEACHER_DIMS: tl.constexpr,
    BEFORE: tl.constexpr,
    AFTER: tl.constexpr,
):
    """First pass over the keys: of each row both log-sum-exps (log2) and the sum of P * D."""
    rows = block * QUERIES + tl.arange(0, QUERIES)
    our_max = tl.full((queries.shape[0],), MASKED, tl.float32)
    their_max = tl.full((queries.shape[0],), MASKED, tl.float32)
    our_sum = tl.zeros((queries.shape[0],), tl.float32)
    their_sum = tl.zeros((queries.shape[0],), tl.float32)
    squares = tl.zeros((queries.shape[0],), tl.float32)
    products = tl.zeros((queries.shape[0],), tl.float32)
    for first in range(_first_of(block, QUERIES, BEFORE), _end_of(block, num_tokens, QUERIES, AFTER), KEYS):
        tokens = first + tl.arange(0, KEYS)
        seen = _seen(_load_valid(attention_mask, text, tokens, num_tokens), rows, tokens, BEFORE, AFTER)
        keys = _load_keys(student, student_start, tokens, num_tokens, STUDENT_DIMS)
        teacher_keys = _load_keys(teacher, teacher_start, tokens, num_tokens, TEACHER_DIMS)
        our_max, ours, p = _grow(our_max, _masked_scores(queries, keys, student_scale, seen))
        their_max, theirs, q = _grow(their_max, _masked_scores(teacher_queries, teacher_keys, teacher_scale, seen))
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
    BEFORE: tl.constexpr,
    AFTER: tl.constexpr,
):
    """QUERIES rows of one map: loss (1 value), dQ, and of each row the 3 sums that `column_kernel` needs."""
    num_blocks = tl.cdiv(num_tokens, QUERIES)
    map_index, block = tl.program_id(0) // num_blocks, tl.program_id(0) % num_blocks
    text, head = map_index // num_heads, map_index % num_heads
    rows = block * QUERIES + tl.arange(0, QUERIES)
    valid_rows = _load_valid(attention_mask, text, rows, num_tokens)
    student_start, teacher_head = _head_start(student, text, head), _teacher_head(heads, head)
    teacher_start = _head_start(teacher, text, teacher_head)
    queries = _load_queries(student, student_start, rows, num_tokens, STUDENT_DIMS)
    teacher_queries = _load_queries(teacher, teacher_start, rows, num_tokens, TEACHER_DIMS)
    student_start, teacher_start = _key_start(student, text, head), _key_start(teacher, text, teacher_head)
    if TARGET != "scores":
        our_log, their_log, mean = _row_sums(
            student, teacher, student_start, teacher_start, queries, teacher_queries, attention_mask, text, block,
            student_scale, teacher_scale, num_tokens, QUERIES, KEYS, STUDENT_DIMS, TEACHER_DIMS, BEFORE, AFTER,
        )  # fmt: skip
        if gradients.queries is not None:
            sums = row_sums + map_index.to(tl.int64) * 3 * num_tokens + rows
            tl.store(sums, our_log, mask=rows < num_tokens)
            tl.store(sums + num_tokens, their_log, mask=rows < num_tokens)
            tl.store(sums + 2 * num_tokens, mean, mask=rows < num_tokens)
    loss = tl.zeros((QUERIES,), tl.float32)
    of_queries = tl.zeros((QUERIES, STUDENT_DIMS), tl.float32)
    for first in range(_first_of(block, QUERIES, BEFORE), _end_of(block, num_tokens, QUERIES, AFTER), KEYS):
        tokens = first + tl.arange(0, KEYS)
        seen = _seen(_load_valid(attention_mask, text, tokens, num_tokens), rows, tokens, BEFORE, AFTER)
        keys = _load_keys(student, student_start, tokens, num_tokens, STUDENT_DIMS)
        teacher_keys = _load_keys(teacher, teacher_start, tokens, num_tokens, TEACHER_DIMS)
        if TARGET == "scores":
            difference = _scores(queries, keys, student_scale) - _scores(teacher_queries, teacher_keys, teacher_scale)
            gradient = tl.where(seen, difference, 0.0)
            loss += tl.sum(gradient * gradient, 1)
        else:
            ours = _masked_scores(queries, keys, student_scale, seen) - our_log[:, None]
            theirs = _masked_scores(teacher_queries, teacher_keys, teacher_scale, seen) - their_log[:, None]
            block_loss, gradient = _compare(ours, theirs, mean, TARGET)
            loss += block_loss
        if gradients.queries is not None:
            of_queries += tl.dot((gradient * SHIFT).to(keys.dtype), keys, input_precision="ieee")
    tl.store(losses + tl.program_id(0), tl.sum(tl.where(valid_rows, loss, 0.0), 0))
    if gradients.queries is not None:
        factor = (1.0 if TARGET == "probabilities_kl" else 2.0) * student_scale / SHIFT
        of_queries *= tl.where(valid_rows, factor, 0.0)[:, None]
        _store_queries(gradients, _head_start(gradients, text, head), of_queries, rows, num_tokens, STUDENT_DIMS)


@triton.jit
def _add_head(
    of_keys,
    student,
    teacher,
    attention_mask,
    heads,
    row_sums,
    map_index,
    block,
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
    BEFORE: tl.constexpr,
    AFTER: tl.constexpr,
):
    """of_keys and what one head of queries adds to it, before the factor that all have in common."""
    text, head = map_index // num_heads, map_index % num_heads
    columns = block * KEYS + tl.arange(0, KEYS)
    valid = _load_valid(attention_mask, text, columns, num_tokens)
    student_start, teacher_head = _head_start(student, text, head), _teacher_head(heads, head)
    teacher_start = _head_start(teacher, text, teacher_head)
    keys = _load_keys(student, _key_start(student, text, head), columns, num_tokens, STUDENT_DIMS)
    teacher_keys = _load_keys(teacher, _key_start(teacher, text, teacher_head), columns, num_tokens, TEACHER_DIMS)
    # Keys are seen from as far as queries see, the other way round.
    for first in range(_first_of(block, KEYS, AFTER), _end_of(block, num_tokens, KEYS, BEFORE), QUERIES):
        rows = first + tl.arange(0, QUERIES)
        valid_rows = _load_valid(attention_mask, text, rows, num_tokens)
        seen = _seen(valid, rows, columns, BEFORE, AFTER)
        queries = _load_queries(student, student_start, rows, num_tokens, STUDENT_DIMS)
        teacher_queries = _load_queries(teacher, teacher_start, rows, num_tokens, TEACHER_DIMS)
        if TARGET == "scores":
            gradient = _scores(queries, keys, student_scale) - _scores(teacher_queries, teacher_keys, teacher_scale)
        else:
            sums = row_sums + map_index.to(tl.int64) * 3 * num_tokens + rows
            our_log = tl.load(sums, mask=rows < num_tokens, other=0.0)
            their_log = tl.load(sums + num_tokens, mask=rows < num_tokens, other=0.0)
            mean = tl.load(sums + 2 * num_tokens, mask=rows < num_tokens, other=0.0)
            ours = _masked_scores(queries, keys, student_scale, seen) - our_log[:, None]
            theirs = _masked_scores(teacher_queries, teacher_keys, teacher_scale, seen) - their_log[:, None]
            _, gradient = _compare(ours, theirs, mean, TARGET)
        gradient = tl.where(valid_rows[:, None] & seen, gradient, 0.0)
        of_keys += tl.dot(tl.trans((gradient * SHIFT).to(queries.dtype)), queries, input_precision="ieee")
    return of_keys


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
    BEFORE: tl.constexpr,
    AFTER: tl.constexpr,
):
    """KEYS columns of one head of keys: dK, summed over the heads of queries that share it, one after the other."""
    num_blocks = tl.cdiv(num_tokens, KEYS)
    index, block = tl.program_id(0) // num_blocks, tl.program_id(0) % num_blocks
    of_keys = tl.zeros((KEYS, STUDENT_DIMS), tl.float32)
    if student.heads_per_key is None:
        text, head = index // num_heads, index % num_heads
        of_keys = _add_head(
            of_keys, student, teacher, attention_mask, heads, row_sums, index, block, student_scale, teacher_scale,
            num_heads, num_tokens, TARGET, SHIFT, QUERIES, KEYS, STUDENT_DIMS, TEACHER_DIMS, BEFORE, AFTER,
        )  # fmt: skip
    else:
        # Maps that share keys follow each other, as do the heads of queries.
        num_key_heads = num_heads // student.heads_per_key
        text, head = index // num_key_heads, index % num_key_heads * student.heads_per_key
        for other in range(student.heads_per_key):
            of_keys = _add_head(
                of_keys, student, teacher, attention_mask, heads, row_sums, index * student.heads_per_key + other,
                block, student_scale, teacher_scale, num_heads, num_tokens,
                TARGET, SHIFT, QUERIES, KEYS, STUDENT_DIMS, TEACHER_DIMS, BEFORE, AFTER,
            )  # fmt: skip
    columns = block * KEYS + tl.arange(0, KEYS)
    of_keys *= (1.0 if TARGET == "probabilities_kl" else 2.0) * student_scale / SHIFT
    _store_keys(gradients, _key_start(gradients, text, head), of_keys, columns, num_tokens, STUDENT_DIMS)
