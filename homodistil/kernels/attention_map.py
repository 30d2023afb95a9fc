"""Difference of the attention maps of student and teacher, from queries and keys: no (B, N, T, T) tensor is kept.

SDPA continues computing what attention puts out; this operation returns only the loss. Its forward also computes the
gradients of the student's queries and keys (the loss is a scalar: backward merely scales them), so that the maps of a
chunk live for a moment, and the teacher's queries and keys may be freed as soon as it returns.

With S = scale * Q K^T, P = softmax(S) of the student and P' of the teacher, w = 1 for real tokens:
    scores            sum_ij w_i w_j (S - S')^2        dS = 2 w_i w_j (S - S')
    probabilities     sum_ij w_i w_j (P - P')^2        dS = 2 w_i P (D - c),  D = P - P',  c_i = sum_j P D
    probabilities_kl  sum_ij w_i P' (log P' - log P)   dS = w_i (P - P')
    dQ = scale * dS K,   dK = scale * dS^T Q

Shapes: B batch, T tokens, N heads, H dims of a head. Kernels: attention_map_triton.py.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from homodistil.errors import UserError
from homodistil.kernels.attention_map_inputs import MASKED, TARGETS, Gradients, Maps
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
) -> Tensor:
    """Difference of attention maps, mean over N, summed over valid pairs (L_attn). Count: pairs; for KL: tokens.

    `scores` compares before the softmax (TinyBERT's published code), `probabilities` after it, `probabilities_kl` is
    KL(teacher || student) of each query's distribution over keys. fp32 arithmetic between the products; exactly 0 where
    student and teacher are the same. Gradients flow to the student's queries and keys alone.

    Args:
        student_queries, student_keys: (B, N, T, Hs), fp32, bf16 or fp16; strided views are welcome.
        teacher_queries, teacher_keys: (B, Nt, T, Ht), any of these dtypes.
        student_scale, teacher_scale: what the softmax multiplies q.k with.
        attention_mask: (B, T) int64, 1 = token, 0 = padding. A pair is valid when query and key are both tokens.
        heads: (N,) int64 on the same device, the teacher's head of each head of the student; None = the same order.
        target: "scores", "probabilities" or "probabilities_kl".
        implementation: "auto", "torch" or "triton"; auto takes Triton for bf16 and fp16 on a GPU.

    Returns:
        fp32 scalar, a sum.

    Raises:
        UserError: unknown target or implementation, or triton where it cannot run.
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
    )
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
    evaluate = {"scores": _scores, "probabilities": _probabilities, "probabilities_kl": _probabilities_kl}[maps.target]
    total = torch.zeros((), dtype=torch.float32, device=maps.student_queries.device)
    gradients = (maps.gradient_buffer(), maps.gradient_buffer()) if with_gradients else None
    # fp16 cannot hold the gradient of a score near the teacher.
    dtype = gradients[0].dtype if with_gradients else None
    for text in range(len(maps.attention_mask)):
        loss, of_scores = evaluate(*_score_maps(maps, text), with_gradients)
        total += loss
        if with_gradients:
            of_scores = of_scores.mul_(maps.student_scale).to(dtype)
            gradients[0][text] = torch.matmul(of_scores, maps.student_keys[text].to(dtype))
            gradients[1][text] = torch.matmul(of_scores.transpose(-1, -2), maps.student_queries[text].to(dtype))
    return total, gradients


def _score_maps(maps: Maps, text: int) -> tuple[Tensor, Tensor]:
    """S of student and teacher, (N, T, T) fp32. Products of bf16 would round the score, which is most of what there is
    to compare when the student is near the teacher.

    Padded queries are 0 on both sides, so their rows are equal and add nothing to loss or gradient.
    """
    weights = maps.attention_mask[text].float()[:, None]
    teacher_queries, teacher_keys = maps.teacher_queries[text], maps.teacher_keys[text]
    if maps.heads is not None:
        teacher_queries, teacher_keys = (x.index_select(0, maps.heads) for x in (teacher_queries, teacher_keys))
    return (
        _masked_product(maps.student_queries[text], maps.student_keys[text], maps.student_scale, weights, maps.target),
        _masked_product(teacher_queries, teacher_keys, maps.teacher_scale, weights, maps.target),
    )


def _masked_product(queries: Tensor, keys: Tensor, scale: float, weights: Tensor, target: str) -> Tensor:
    """scale * Q K^T, fp32; where the key is padding 0 (scores) or MASKED (before a softmax)."""
    # Scale and mask act on (T, H) here, not on (T, T).
    queries = queries.float() * (weights * scale)
    if target == "scores":
        return torch.matmul(queries, (keys.float() * weights).transpose(-1, -2))
    masked = ((1 - weights) * MASKED).transpose(0, 1)[None]
    return torch.baddbmm(masked, queries, keys.float().transpose(-1, -2))


def _scores(student: Tensor, teacher: Tensor, with_gradients: bool) -> tuple[Tensor, Tensor | None]:
    """The loss of two maps of scores, (N, T, T), and its gradient w.r.t. the student's. The maps are used up."""
    difference = student.sub_(teacher)
    loss = _sum_of_squares(difference)
    return loss, difference.mul_(2) if with_gradients else None


def _probabilities(student: Tensor, teacher: Tensor, with_gradients: bool) -> tuple[Tensor, Tensor | None]:
    student, teacher = student.softmax(-1), teacher.softmax(-1)
    difference = torch.sub(student, teacher, out=teacher)
    loss = _sum_of_squares(difference)
    if not with_gradients:
        return loss, None
    gradient = difference.mul_(student)
    mean = gradient.sum(-1, keepdim=True)
    return loss, gradient.addcmul_(student, mean, value=-1).mul_(2)


def _probabilities_kl(student: Tensor, teacher: Tensor, with_gradients: bool) -> tuple[Tensor, Tensor | None]:
    student, teacher = student.log_softmax(-1), teacher.log_softmax(-1)
    probabilities = teacher.exp()
    divergence = teacher.sub_(student).mul_(probabilities).sum()
    gradient = student.exp_().sub_(probabilities)
    # Sums to 0 but for rounding, which it shares with the logarithms: near the teacher that is the larger part.
    return divergence + gradient.sum(), gradient


def _sum_of_squares(rows: Tensor) -> Tensor:
    """In one pass: a dot product over a million terms loses digits, and squares of their own are a map more."""
    return torch.linalg.vector_norm(rows, dim=-1).square().sum()
