"""Difference of the attention maps of student and teacher, from queries and keys: no (B, N, T, T) tensor is kept.

SDPA continues computing what attention puts out; this operation returns only the loss. Its forward also computes the
gradients of the student's queries and keys (the loss is a scalar: backward merely scales them), so that the maps of a
chunk live for a moment, and the teacher's queries and keys may be freed as soon as it returns.

With w_i = 1 for real tokens, m_ij = 1 where query i sees key j (w_j = 1, and j is neither in the future of a causal
model nor outside its window: MaskKind), S = scale * Q K^T, P = softmax(S) over m_ij = 1 and 0 elsewhere, and S', P' of
the teacher:
    scores            sum_ij w_i m_ij (S - S')^2       dS = 2 w_i m_ij (S - S')
    centred_scores    sum_ij w_i m_ij E^2              dS = 2 w_i m_ij E,  E = S - S' - c_i,  c_i = mean of S - S' over
                      the keys that query i sees: a constant for each query, which softmax ignores, is not compared
    probabilities     sum_ij w_i m_ij (P - P')^2       dS = 2 w_i P (D - c),  D = P - P',  c_i = sum_j P D
    probabilities_kl  sum_ij w_i P' (log P' - log P)   dS = w_i (P - P')
    dQ = scale * dS K,   dK = scale * sum of dS^T Q over the heads of queries that share the head of keys
The mask is the same for student and teacher. A pair is valid when w_i m_ij = 1; `num_pairs` counts them.

Shapes: B batch, T tokens, N heads of queries, G heads of keys, H dims of a head. Kernels: attention_map_triton.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from homodistil.errors import UserError
from homodistil.kernels.attention_map_inputs import MASKED, SCORE_TARGETS, TARGETS, Gradients, Maps, MaskKind
from homodistil.kernels.triton_support import use_triton


def attention_map_loss(
    student_queries: Tensor,
    student_keys: Tensor,
    teacher_queries: Tensor,
    teacher_keys: Tensor,
    student_scale: float,
    teacher_scale: float,
    attention_mask: Tensor,
    heads: Tensor | None = None,
    target: str = "scores",
    implementation: str = "auto",
    *,
    causal: bool = False,
    window: int | None = None,
) -> Tensor:
    """Difference of attention maps, mean over N, summed over valid pairs (L_attn). Count: pairs; for KL: tokens.

    `scores` compares before the softmax (TinyBERT's published code), `centred_scores` too, but for the mean of each
    query's row, `probabilities` after it, `probabilities_kl` is KL(teacher || student) of each query's distribution
    over keys. fp32 arithmetic between the products; exactly 0 where student and teacher are the same. Gradients flow to
    the student's queries and keys alone.

    Args:
        student_queries, student_keys: (B, N, T, Hs) and (B, Gs, T, Hs), fp32, bf16 or fp16; strided views are welcome.
            Gs divides N: query head n uses key head n // (N / Gs).
        teacher_queries, teacher_keys: (B, Nt, T, Ht) and (B, Gt, T, Ht), any of these dtypes; Gt divides Nt.
        student_scale, teacher_scale: what the softmax multiplies q.k with.
        attention_mask: (B, T) int64, 1 = token, 0 = padding. A pair is valid when both are tokens and the query sees
            the key.
        heads: (N,) int64 on the same device, the teacher's head of queries of each of the student; None = the same
            order.
        target: "scores", "centred_scores", "probabilities" or "probabilities_kl".
        implementation: "auto", "torch" or "triton"; auto takes Triton for bf16 and fp16 on a GPU.
        causal: query i sees key j only if j <= i, in student and teacher.
        window: and only if |i - j| <= window, or of a causal model i - j < window (see MaskKind); None = no bound.

    Returns:
        fp32 scalar, a sum.

    Raises:
        UserError: unknown target or implementation, or triton where it cannot run; heads of queries that cannot share
            those of keys; a window in which a query does not see itself.
    """
    if target not in TARGETS:
        raise UserError(f"loss.attention_target: {target!r} is unknown; choose one of {', '.join(TARGETS)}")
    maps = Maps(
        student_queries.detach(),
        student_keys.detach(),
        teacher_queries.detach(),
        teacher_keys.detach(),
        student_scale,
        teacher_scale,
        attention_mask,
        heads,
        target,
        MaskKind(causal, window),
    )
    maps.check()
    evaluate = _blockwise
    if use_triton(_without_slow_products(implementation, maps), student_queries.device):
        from homodistil.kernels.attention_map_triton import evaluate
    if torch.is_grad_enabled() and (student_queries.requires_grad or student_keys.requires_grad):
        total = _GradientInForward.apply(student_queries, student_keys, maps, evaluate)
    else:
        total, _ = evaluate(maps, with_gradients=False)
    return total / student_queries.shape[1]


def _without_slow_products(implementation: str, maps: Maps) -> str:
    """Exact fp32 products have no tensor cores: tiles of them spill tens of kilobytes of registers. So torch is
    taken there unless Triton is asked for by name; which is faster on a GPU has not been measured.
    """
    any_fp32 = torch.float32 in (maps.student_queries.dtype, maps.teacher_queries.dtype)
    return "torch" if implementation == "auto" and any_fp32 else implementation


class _GradientInForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, queries: Tensor, keys: Tensor, maps: Maps, evaluate: Callable) -> Tensor:
        total, gradients = evaluate(maps, with_gradients=True)
        ctx.save_for_backward(*gradients)
        ctx.dtype = queries.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream: Tensor) -> tuple[Tensor, Tensor, None, None]:
        queries, keys = (_scaled(gradient, upstream, ctx.dtype) for gradient in ctx.saved_tensors)
        return queries, keys, None, None


def _scaled(gradient: Tensor, upstream: Tensor, dtype: torch.dtype) -> Tensor:
    """gradient * upstream in fp32, then rounded once, in one pass."""
    if gradient.device.type == "cpu":
        return (gradient * upstream).to(dtype)
    # There a scalar of no dimensions would first be rounded to the dtype of `gradient`; one of one dimension is not.
    return torch.mul(gradient, upstream.float().reshape(1), out=torch.empty_like(gradient, dtype=dtype))


def _blockwise(maps: Maps, with_gradients: bool) -> tuple[Tensor, Gradients | None]:
    """Plain torch: the maps of one text at a time, in fp32, small enough to stay in the cache of a CPU.

    On a CPU faster than the same formula left to autograd (LOG.md), which reads and writes a dozen whole maps.
    """
    evaluate = _EVALUATE[maps.target]
    total = torch.zeros((), dtype=torch.float32, device=maps.student_queries.device)
    gradients = maps.gradient_buffers() if with_gradients else None
    hidden = None if maps.target in SCORE_TARGETS else maps.kind.bias(maps.attention_mask.shape[1], total.device)
    for text in range(len(maps.attention_mask)):
        mask = _mask_of(maps, text, hidden)
        loss, of_scores = evaluate(*_score_maps(maps, text, mask), mask, with_gradients)
        total += loss
        if with_gradients:
            _write_gradients(maps, text, of_scores, gradients)
    return total, gradients


def _write_gradients(maps: Maps, text: int, of_scores: Tensor, gradients: Gradients) -> None:
    """dQ and dK of one text from dS, (N, T, T) fp32, which is used up."""
    of_queries, of_keys = gradients
    # fp16 cannot hold the gradient of a score near the teacher.
    dtype = of_queries.dtype
    num_key_heads = maps.student_keys.shape[1]
    # The rows of all heads that share keys, below each other: dK sums over them.
    of_scores = _stacked(of_scores.mul_(maps.student_scale).to(dtype), num_key_heads)
    queries = _stacked(maps.student_queries[text].to(dtype), num_key_heads)
    product = torch.matmul(of_scores, maps.student_keys[text].to(dtype))
    of_queries[text] = product.view(maps.student_queries.shape[1:])
    of_keys[text] = torch.matmul(of_scores.transpose(-1, -2), queries)


def _stacked(heads: Tensor, num_key_heads: int) -> Tensor:
    """(N, T, H) -> (G, N / G * T, H)."""
    return heads if len(heads) == num_key_heads else heads.reshape(num_key_heads, -1, heads.shape[-1])


class _Hidden(NamedTuple):
    """What is hidden in the maps of one text."""

    tokens: Tensor
    """(T, 1) fp32, 1 = token, 0 = padding."""
    kind: MaskKind
    bias: Tensor | None
    """(1, 1 or T, T), MASKED where a key is hidden; None where hidden scores are to be 0."""

    def seen(self) -> Tensor:
        """(1 or T, T) fp32, 1 where the query sees the key, if it is itself a token."""
        keys = self.tokens.transpose(0, 1)
        if self.kind.before is None and self.kind.after is None:
            return keys
        return self.kind.clear_hidden(keys.expand(len(self.tokens), -1).clone())


def _mask_of(maps: Maps, text: int, hidden: Tensor | None) -> _Hidden:
    """`hidden`: (T, T), MASKED where a query does not see a key, padding aside; None: targets before the softmax, or
    every query sees all."""
    tokens = maps.attention_mask[text].float()[:, None]
    if maps.target in SCORE_TARGETS:
        return _Hidden(tokens, maps.kind, None)
    bias = ((1 - tokens) * MASKED).transpose(0, 1)[None]
    return _Hidden(tokens, maps.kind, bias if hidden is None else bias + hidden)


def _score_maps(maps: Maps, text: int, mask: _Hidden) -> tuple[Tensor, Tensor]:
    """S of student and teacher, (N, T, T) fp32. Products of bf16 would round the score, which is most of what there is
    to compare when the student is near the teacher.

    Padded queries are 0 on both sides, so their rows are equal and add nothing to loss or gradient.
    """
    # Both sides take one product a head, of one shape, so that equal models give equal maps to the last bit. Keys that
    # are shared are therefore repeated, of one text: small next to its map.
    return (
        _masked_product(*_student_heads(maps, text), maps.student_scale, mask),
        _masked_product(*_teacher_heads(maps, text), maps.teacher_scale, mask),
    )


def _student_heads(maps: Maps, text: int) -> tuple[Tensor, Tensor]:
    """Queries and keys of one text, (N, T, Hs) each."""
    return maps.student_queries[text], _repeated(maps.student_keys[text], maps.student_group)


def _teacher_heads(maps: Maps, text: int) -> tuple[Tensor, Tensor]:
    """Those that the student's heads are compared with, (N, T, Ht) each."""
    queries, keys = maps.teacher_queries[text], maps.teacher_keys[text]
    if maps.heads is None:
        return queries, _repeated(keys, maps.teacher_group)
    return queries.index_select(0, maps.heads), keys.index_select(0, maps.heads // maps.teacher_group)


def _repeated(keys: Tensor, times: int) -> Tensor:
    return keys if times == 1 else keys.repeat_interleave(times, 0)


def _masked_product(queries: Tensor, keys: Tensor, scale: float, mask: _Hidden) -> Tensor:
    """scale * Q K^T, fp32; where the key is hidden 0 (scores) or MASKED (before a softmax)."""
    # Scale and padding act on (T, H) here, not on (T, T).
    queries = queries.float() * (mask.tokens * scale)
    if mask.bias is None:
        return mask.kind.clear_hidden(torch.matmul(queries, (keys.float() * mask.tokens).transpose(-1, -2)))
    return torch.baddbmm(mask.bias, queries, keys.float().transpose(-1, -2))


_Evaluated = tuple[Tensor, Tensor | None]
"""The loss of two maps of scores, (N, T, T), and its gradient w.r.t. the student's. The maps are used up."""


def _scores(student: Tensor, teacher: Tensor, mask: _Hidden, with_gradients: bool) -> _Evaluated:
    return _squares(student.sub_(teacher), with_gradients)


def _centred_scores(student: Tensor, teacher: Tensor, mask: _Hidden, with_gradients: bool) -> _Evaluated:
    difference, seen = student.sub_(teacher), mask.seen()  # 0 where a key is hidden
    mean = difference.sum(-1, keepdim=True).div_(seen.sum(-1, keepdim=True).clamp_(min=1))
    # To centre is a projection, so the gradient of the squares is what they are of: as without.
    return _squares(difference.sub_(mean).mul_(seen), with_gradients)


def _squares(difference: Tensor, with_gradients: bool) -> _Evaluated:
    loss = _sum_of_squares(difference)
    return loss, difference.mul_(2) if with_gradients else None


def _probabilities(student: Tensor, teacher: Tensor, mask: _Hidden, with_gradients: bool) -> _Evaluated:
    student, teacher = student.softmax(-1), teacher.softmax(-1)
    difference = torch.sub(student, teacher, out=teacher)
    loss = _sum_of_squares(difference)
    if not with_gradients:
        return loss, None
    gradient = difference.mul_(student)
    mean = gradient.sum(-1, keepdim=True)
    return loss, gradient.addcmul_(student, mean, value=-1).mul_(2)


def _probabilities_kl(student: Tensor, teacher: Tensor, mask: _Hidden, with_gradients: bool) -> _Evaluated:
    student, teacher = student.log_softmax(-1), teacher.log_softmax(-1)
    probabilities = teacher.exp()
    divergence = teacher.sub_(student).mul_(probabilities).sum()
    gradient = student.exp_().sub_(probabilities)
    # Sums to 0 but for rounding, which it shares with the logarithms: near the teacher that is the larger part.
    return divergence + gradient.sum(), gradient


_EVALUATE = {
    "scores": _scores,
    "centred_scores": _centred_scores,
    "probabilities": _probabilities,
    "probabilities_kl": _probabilities_kl,
}


def _sum_of_squares(rows: Tensor) -> Tensor:
    """In one pass: a dot product over a million terms loses digits, and squares of their own are a map more."""
    return torch.linalg.vector_norm(rows, dim=-1).square().sum()
