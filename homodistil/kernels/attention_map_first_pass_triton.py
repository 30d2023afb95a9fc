"""The first pass of `row_kernel` (attention_map_kernels_triton.py) over the keys: sums of whole rows of both maps."""

from __future__ import annotations

import triton
import triton.language as tl

from homodistil.kernels.attention_map_blocks_triton import (
    MASKED,
    end_of_reach,
    first_in_reach,
    grow,
    load_keys,
    load_valid,
    log2_scores,
    mean_of_seen,
    score_difference,
    seen_keys,
)


@triton.jit
def softmax_sums(
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
    """Of each row both log-sum-exps (log2) and the sum of P * D."""
    rows = block * QUERIES + tl.arange(0, QUERIES)
    our_max = tl.full((queries.shape[0],), MASKED, tl.float32)
    their_max = tl.full((queries.shape[0],), MASKED, tl.float32)
    our_sum = tl.zeros((queries.shape[0],), tl.float32)
    their_sum = tl.zeros((queries.shape[0],), tl.float32)
    squares = tl.zeros((queries.shape[0],), tl.float32)
    products = tl.zeros((queries.shape[0],), tl.float32)
    for first in range(first_in_reach(block, QUERIES, BEFORE), end_of_reach(block, num_tokens, QUERIES, AFTER), KEYS):
        tokens = first + tl.arange(0, KEYS)
        seen = seen_keys(load_valid(attention_mask, text, tokens, num_tokens), rows, tokens, BEFORE, AFTER)
        keys = load_keys(student, student_start, tokens, num_tokens, STUDENT_DIMS)
        teacher_keys = load_keys(teacher, teacher_start, tokens, num_tokens, TEACHER_DIMS)
        our_max, ours, p = grow(our_max, log2_scores(queries, keys, student_scale, seen))
        their_max, theirs, q = grow(their_max, log2_scores(teacher_queries, teacher_keys, teacher_scale, seen))
        our_sum = our_sum * ours + tl.sum(p, 1)
        their_sum = their_sum * theirs + tl.sum(q, 1)
        squares = squares * (ours * ours) + tl.sum(p * p, 1)
        products = products * (ours * theirs) + tl.sum(p * q, 1)
    # Of the whole row and exact before the second pass: sums of P * D * K and P * K, combined at the end, would cancel
    # to nothing in bf16 where attention is nearly one-hot.
    mean = squares / (our_sum * our_sum) - products / (our_sum * their_sum)
    return our_max + tl.log2(our_sum), their_max + tl.log2(their_sum), mean


@triton.jit
def mean_difference(
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
    """Of each row the mean of S - S' over the keys that are seen."""
    rows = block * QUERIES + tl.arange(0, QUERIES)
    num_seen = tl.zeros((queries.shape[0],), tl.float32)
    # A loop of its own: beside the products it would take registers that are not there.
    for first in range(first_in_reach(block, QUERIES, BEFORE), end_of_reach(block, num_tokens, QUERIES, AFTER), KEYS):
        tokens = first + tl.arange(0, KEYS)
        seen = seen_keys(load_valid(attention_mask, text, tokens, num_tokens), rows, tokens, BEFORE, AFTER)
        num_seen += tl.sum(tl.where(seen, 1.0, 0.0), 1)
    total = tl.zeros((queries.shape[0],), tl.float32)
    for first in range(first_in_reach(block, QUERIES, BEFORE), end_of_reach(block, num_tokens, QUERIES, AFTER), KEYS):
        tokens = first + tl.arange(0, KEYS)
        seen = seen_keys(load_valid(attention_mask, text, tokens, num_tokens), rows, tokens, BEFORE, AFTER)
        keys = load_keys(student, student_start, tokens, num_tokens, STUDENT_DIMS)
        teacher_keys = load_keys(teacher, teacher_start, tokens, num_tokens, TEACHER_DIMS)
        difference = score_difference(queries, keys, student_scale, teacher_queries, teacher_keys, teacher_scale)
        total += tl.sum(tl.where(seen, difference, 0.0), 1)
    return mean_of_seen(total, num_seen)
