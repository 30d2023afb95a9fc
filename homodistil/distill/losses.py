"""The loss terms as pure functions: tensors in, one fp32 sum out. No config, no state, no model.

Every function returns a SUM; its docstring names the count that turns it into a mean. The caller divides by the count
over all micro-batches and ranks, so a loss does not depend on sharding, accumulation or packing.

Shapes: B batch, T tokens, D hidden, N heads, H dims of a head, M rows to predict, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def mlm(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of masked language modelling. Count: M.

    Args:
        logits: (M, V), any float dtype; the softmax runs in fp32.
        labels: (M,), int64.
    """
    return functional.cross_entropy(logits.float(), labels, reduction="sum")


def logit_kl(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """T^2 * KL(teacher || student), both softened by `temperature`. Count: rows.

    T^2 keeps the size of the gradient independent of the temperature (Hinton et al. 2015, section 2).
    fp32: a bf16 log-softmax near the teacher overstates the KL by more than half. No gradient for the teacher.

    Args:
        student_logits, teacher_logits: (rows, V).
    """
    return _LogitKL.apply(student_logits, teacher_logits, temperature)


class _LogitKL(torch.autograd.Function):
    """The gradient is T * (q - p): saved as two matrices where autograd would save and revisit a dozen of (rows, V)."""

    @staticmethod
    def forward(ctx, student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
        log_q, log_p = (_log_softmax(logits, temperature) for logits in (student_logits, teacher_logits))
        p = log_p.exp()
        kl = log_p.sub_(log_q).mul_(p).sum(-1).sum()  # one torch.dot over millions of terms loses digits
        ctx.save_for_backward(log_q, p)
        ctx.temperature, ctx.dtype = temperature, student_logits.dtype
        return kl * temperature**2

    @staticmethod
    def backward(ctx, upstream: Tensor) -> tuple[Tensor, None, None]:
        log_q, p = ctx.saved_tensors
        gradient = log_q.exp().sub_(p).mul_(upstream * ctx.temperature)
        return gradient.to(ctx.dtype), None, None


def _log_softmax(logits: Tensor, temperature: float) -> Tensor:
    softened = logits if temperature == 1.0 else logits.float() / temperature
    return functional.log_softmax(softened, dim=-1, dtype=torch.float32)


def hidden_mse(student: Tensor, teacher: Tensor, attention_mask: Tensor) -> Tensor:
    """Squared difference, mean over D, summed over valid tokens (HomoDistil's L_hidden and L_emb). Count: tokens.

    Args:
        student, teacher: (B, T, D), already projected to the same D.
        attention_mask: (B, T), 1 = token, 0 = padding.
    """
    squared = (student.float() - teacher.float()).square().mean(-1)
    return (squared * attention_mask).sum()


def attention_scores(queries: Tensor, keys: Tensor, scale: float) -> Tensor:
    """Pre-softmax scores scale * q.k, (B, N, T, T), from queries and keys (B, N, T, H)."""
    return torch.matmul(queries, keys.transpose(-1, -2)) * scale


def attention_mse(student_scores: Tensor, teacher_scores: Tensor, attention_mask: Tensor, target: str) -> Tensor:
    """Squared difference of attention matrices, mean over N, summed over valid pairs (L_attn). Count: pairs.

    `scores` compares before the softmax, padding left out on both sides (TinyBERT's published code); `probabilities`
    after it. Attention over real text is nearly one-hot or flat, so the second is small: weight it accordingly.

    Args:
        student_scores, teacher_scores: (B, N, T, T), rows = queries.
        attention_mask: (B, T), 1 = token, 0 = padding. A pair is valid when query and key are both tokens.
        target: "scores" or "probabilities".
    """
    valid = attention_mask.bool()
    student, teacher = student_scores.float(), teacher_scores.float()
    if target == "probabilities":
        padding = ~valid[:, None, None, :]
        lowest = torch.finfo(torch.float32).min
        student = student.masked_fill(padding, lowest).softmax(-1)
        teacher = teacher.masked_fill(padding, lowest).softmax(-1)
    pairs = valid[:, :, None] & valid[:, None, :]
    return ((student - teacher).square().mean(1) * pairs).sum()
