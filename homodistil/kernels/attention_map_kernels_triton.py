"""Triton kernels of the attention-map loss (formulas: attention_map.py). Loss and gradients, no map in memory.

Of a short text one program makes both maps of one head at once (`tile_kernel`). Else `row_kernel` takes a block of
queries: a first pass over the keys for sums of whole rows (attention_map_first_pass_triton.py), a second for loss and
dQ; `column_kernel` then takes a block of keys and makes dK from these sums. Blocks without a pair that is seen are not
visited: causal, about half of them; with a window, all but a band. Launched by attention_map_triton.py; what the
kernels are made of is in attention_map_blocks_triton.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

from homodistil.kernels.attention_map_blocks_triton import (
    compare_maps,
    end_of_reach,
    first_in_reach,
    head_start,
    key_start,
    load_keys,
    load_queries,
    load_valid,
    log2_scores,
    log2_softmax,
    mean_of_seen,
    score_difference,
    seen_keys,
    store_keys,
    store_queries,
    teachers_head,
)
from homodistil.kernels.attention_map_first_pass_triton import mean_difference, softmax_sums


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
    valid = load_valid(attention_mask, text, tokens, num_tokens)
    seen = seen_keys(valid, tokens, tokens, BEFORE, AFTER)
    queries = load_queries(student, head_start(student, text, head), tokens, num_tokens, STUDENT_DIMS)
    keys = load_keys(student, key_start(student, text, head), tokens, num_tokens, STUDENT_DIMS)
    teacher_head = teachers_head(heads, head)
    teacher_queries = load_queries(teacher, head_start(teacher, text, teacher_head), tokens, num_tokens, TEACHER_DIMS)
    teacher_keys = load_keys(teacher, key_start(teacher, text, teacher_head), tokens, num_tokens, TEACHER_DIMS)
    if TARGET == "scores" or TARGET == "centred_scores":
        difference = score_difference(queries, keys, student_scale, teacher_queries, teacher_keys, teacher_scale)
        gradient = tl.where(seen, difference, 0.0)
        if TARGET == "centred_scores":
            mean = mean_of_seen(tl.sum(gradient, 1), tl.sum(tl.where(seen, 1.0, 0.0), 1))
            gradient = tl.where(seen, difference - mean[:, None], 0.0)
        loss = tl.sum(gradient * gradient, 1)
    else:
        ours = log2_softmax(log2_scores(queries, keys, student_scale, seen))
        theirs = log2_softmax(log2_scores(teacher_queries, teacher_keys, teacher_scale, seen))
        p = tl.exp2(ours)
        loss, gradient = compare_maps(ours, theirs, tl.sum(p * (p - tl.exp2(theirs)), 1), TARGET)
    tl.store(losses + tl.program_id(0), tl.sum(tl.where(valid, loss, 0.0), 0))
    if gradients.queries is not None:
        gradient = (tl.where(valid[:, None], gradient, 0.0) * SHIFT).to(keys.dtype)
        factor = (1.0 if TARGET == "probabilities_kl" else 2.0) * student_scale / SHIFT
        start = head_start(gradients, text, head)
        of_queries = tl.dot(gradient, keys, input_precision="ieee") * factor
        store_queries(gradients, start, of_queries, tokens, num_tokens, STUDENT_DIMS)
        of_keys = tl.dot(tl.trans(gradient), queries, input_precision="ieee") * factor
        store_keys(gradients, start, of_keys, tokens, num_tokens, STUDENT_DIMS)


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
    """QUERIES rows of one map: loss (1 value), dQ, and of each row the sums that `column_kernel` needs, 3 places for
    each row: two log-sum-exps and the sum of P * D, or in its place the mean of S - S'."""
    num_blocks = tl.cdiv(num_tokens, QUERIES)
    map_index, block = tl.program_id(0) // num_blocks, tl.program_id(0) % num_blocks
    text, head = map_index // num_heads, map_index % num_heads
    rows = block * QUERIES + tl.arange(0, QUERIES)
    valid_rows = load_valid(attention_mask, text, rows, num_tokens)
    student_start, teacher_head = head_start(student, text, head), teachers_head(heads, head)
    teacher_start = head_start(teacher, text, teacher_head)
    queries = load_queries(student, student_start, rows, num_tokens, STUDENT_DIMS)
    teacher_queries = load_queries(teacher, teacher_start, rows, num_tokens, TEACHER_DIMS)
    student_start, teacher_start = key_start(student, text, head), key_start(teacher, text, teacher_head)
    sums = row_sums + map_index.to(tl.int64) * 3 * num_tokens + rows
    if TARGET == "centred_scores":
        mean = mean_difference(
            student, teacher, student_start, teacher_start, queries, teacher_queries, attention_mask, text, block,
            student_scale, teacher_scale, num_tokens, QUERIES, KEYS, STUDENT_DIMS, TEACHER_DIMS, BEFORE, AFTER,
        )  # fmt: skip
        if gradients.queries is not None:
            tl.store(sums + 2 * num_tokens, mean, mask=rows < num_tokens)
    elif TARGET != "scores":
        our_log, their_log, mean = softmax_sums(
            student, teacher, student_start, teacher_start, queries, teacher_queries, attention_mask, text, block,
            student_scale, teacher_scale, num_tokens, QUERIES, KEYS, STUDENT_DIMS, TEACHER_DIMS, BEFORE, AFTER,
        )  # fmt: skip
        if gradients.queries is not None:
            tl.store(sums, our_log, mask=rows < num_tokens)
            tl.store(sums + num_tokens, their_log, mask=rows < num_tokens)
            tl.store(sums + 2 * num_tokens, mean, mask=rows < num_tokens)
    loss = tl.zeros((QUERIES,), tl.float32)
    of_queries = tl.zeros((QUERIES, STUDENT_DIMS), tl.float32)
    for first in range(first_in_reach(block, QUERIES, BEFORE), end_of_reach(block, num_tokens, QUERIES, AFTER), KEYS):
        tokens = first + tl.arange(0, KEYS)
        seen = seen_keys(load_valid(attention_mask, text, tokens, num_tokens), rows, tokens, BEFORE, AFTER)
        keys = load_keys(student, student_start, tokens, num_tokens, STUDENT_DIMS)
        teacher_keys = load_keys(teacher, teacher_start, tokens, num_tokens, TEACHER_DIMS)
        if TARGET == "scores" or TARGET == "centred_scores":
            difference = score_difference(queries, keys, student_scale, teacher_queries, teacher_keys, teacher_scale)
            if TARGET == "centred_scores":
                difference -= mean[:, None]
            gradient = tl.where(seen, difference, 0.0)
            loss += tl.sum(gradient * gradient, 1)
        else:
            ours = log2_scores(queries, keys, student_scale, seen) - our_log[:, None]
            theirs = log2_scores(teacher_queries, teacher_keys, teacher_scale, seen) - their_log[:, None]
            block_loss, gradient = compare_maps(ours, theirs, mean, TARGET)
            loss += block_loss
        if gradients.queries is not None:
            of_queries += tl.dot((gradient * SHIFT).to(keys.dtype), keys, input_precision="ieee")
    tl.store(losses + tl.program_id(0), tl.sum(tl.where(valid_rows, loss, 0.0), 0))
    if gradients.queries is not None:
        factor = (1.0 if TARGET == "probabilities_kl" else 2.0) * student_scale / SHIFT
        of_queries *= tl.where(valid_rows, factor, 0.0)[:, None]
        store_queries(gradients, head_start(gradients, text, head), of_queries, rows, num_tokens, STUDENT_DIMS)


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
    valid = load_valid(attention_mask, text, columns, num_tokens)
    student_start, teacher_head = head_start(student, text, head), teachers_head(heads, head)
    teacher_start = head_start(teacher, text, teacher_head)
    keys = load_keys(student, key_start(student, text, head), columns, num_tokens, STUDENT_DIMS)
    teacher_keys = load_keys(teacher, key_start(teacher, text, teacher_head), columns, num_tokens, TEACHER_DIMS)
    # Keys are seen from as far as queries see, the other way round.
    for first in range(first_in_reach(block, KEYS, AFTER), end_of_reach(block, num_tokens, KEYS, BEFORE), QUERIES):
        rows = first + tl.arange(0, QUERIES)
        valid_rows = load_valid(attention_mask, text, rows, num_tokens)
        seen = seen_keys(valid, rows, columns, BEFORE, AFTER)
        queries = load_queries(student, student_start, rows, num_tokens, STUDENT_DIMS)
        teacher_queries = load_queries(teacher, teacher_start, rows, num_tokens, TEACHER_DIMS)
        sums = row_sums + map_index.to(tl.int64) * 3 * num_tokens + rows
        if TARGET == "scores" or TARGET == "centred_scores":
            gradient = score_difference(queries, keys, student_scale, teacher_queries, teacher_keys, teacher_scale)
            if TARGET == "centred_scores":
                gradient -= tl.load(sums + 2 * num_tokens, mask=rows < num_tokens, other=0.0)[:, None]
        else:
            our_log = tl.load(sums, mask=rows < num_tokens, other=0.0)
            their_log = tl.load(sums + num_tokens, mask=rows < num_tokens, other=0.0)
            mean = tl.load(sums + 2 * num_tokens, mask=rows < num_tokens, other=0.0)
            ours = log2_scores(queries, keys, student_scale, seen) - our_log[:, None]
            theirs = log2_scores(teacher_queries, teacher_keys, teacher_scale, seen) - their_log[:, None]
            _, gradient = compare_maps(ours, theirs, mean, TARGET)
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
        for member in range(student.heads_per_key):
            of_keys = _add_head(
                of_keys, student, teacher, attention_mask, heads, row_sums, index * student.heads_per_key + member,
                block, student_scale, teacher_scale, num_heads, num_tokens,
                TARGET, SHIFT, QUERIES, KEYS, STUDENT_DIMS, TEACHER_DIMS, BEFORE, AFTER,
            )  # fmt: skip
    columns = block * KEYS + tl.arange(0, KEYS)
    of_keys *= (1.0 if TARGET == "probabilities_kl" else 2.0) * student_scale / SHIFT
    store_keys(gradients, key_start(gradients, text, head), of_keys, columns, num_tokens, STUDENT_DIMS)
