"""Distance between hidden states through the projection W, with the subtraction folded into the matrix product.

    side "student":  R = H_s W^T - H_t      dH_s = (2 / D) R W      dW = (2 / D) R^T H_s
    side "teacher":  R = H_s - H_t W^T      dH_s = (2 / D) R        dW = -(2 / D) R^T H_t

One addmm with the other side as its addend makes R; the gradients are made in forward, and R, or what it becomes, is
all that is held: neither the hidden states nor the teacher's. Plain torch on every device: the products and two passes
over R are all there is to do. Gradients that nobody needs are not computed.

While W is a frozen selection of dims there is no product at all: the surviving dims are gathered.

Shapes: B batch, T tokens, Ds and Dt hidden sizes of student and teacher, D the size compared.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


def hidden_mse(
    student: Tensor,
    teacher: Tensor,
    attention_mask: Tensor,
    projection: Tensor | None,
    side: str | None,
    kept: Tensor | None = None,
) -> Tensor:
    """Squared difference, mean over D, summed over valid tokens (HomoDistil's L_hidden and L_emb). Count: tokens.

    Args:
        student: (B, T, Ds).
        teacher: (B, T, Dt), any float dtype; no gradient.
        attention_mask: (B, T), 1 = token, 0 = padding, which contributes nothing (it has to be finite).
        projection: weight of an nn.Linear (out, in): (Dt, Ds) or (Ds, Dt) by `side`; None: Ds = Dt, or `kept`.
        side: of W. "student": MSE(H_s W^T, H_t), D = Dt (TinyBERT's). "teacher": MSE(H_s, H_t W^T), D = Ds (the
            paper's).
        kept: (Ds,) int64, ascending, without repeats: the teacher's dim of each student dim, in place of a projection
            that is this selection and frozen. On the student's side the teacher's other dims are compared with 0.

    Returns:
        fp32 0-dim (float64 for float64 students), differentiable in `student` and `projection`.
    """
    teacher = teacher.detach().to(student.dtype)
    grad = torch.is_grad_enabled()
    valid = attention_mask.flatten().to(torch.promote_types(student.dtype, torch.float32))
    inputs = _Inputs(teacher.flatten(0, 1), valid, side, grad and student.requires_grad)
    rows = student.flatten(0, 1)
    if kept is not None:
        return _selected(rows, inputs, kept)
    if projection is None:
        return _Difference.apply(rows, inputs, rows.shape[1])
    return _Projected.apply(rows, projection.to(rows.dtype), inputs, grad and projection.requires_grad)


class _Inputs(NamedTuple):
    """What needs no gradient. Not looked into by autograd."""

    teacher: Tensor
    """(B * T, Dt)"""
    valid: Tensor
    """(B * T,), 1 = token, 0 = padding, in the dtype of sums: fp32, float64 for float64."""
    side: str | None
    wants_student: bool


def _selected(student: Tensor, inputs: _Inputs, kept: Tensor) -> Tensor:
    """Distance under a frozen selection."""
    teacher, size = inputs.teacher, inputs.teacher.shape[1]
    if len(kept) == size:
        return _Difference.apply(student, inputs, size)
    # gather: several times faster than index_select along the last dim of bf16 on a CPU
    gathered = inputs._replace(teacher=teacher.gather(1, kept.expand(len(teacher), -1)))
    if inputs.side == "teacher":
        return _Difference.apply(student, gathered, len(kept))
    dropped = torch.ones(size, dtype=teacher.dtype, device=teacher.device).index_fill_(0, kept, 0)
    return _Difference.apply(student, gathered, size) + square_sum(teacher * dropped, inputs.valid) / size


class _Difference(torch.autograd.Function):
    """sum (student - teacher)^2 / size over valid rows."""

    @staticmethod
    def forward(ctx, student: Tensor, inputs: _Inputs, size: int) -> Tensor:
        residual = student - inputs.teacher
        if inputs.wants_student:
            ctx.save_for_backward(residual, inputs.valid)
            ctx.factor = 2 / size
        return square_sum(residual, inputs.valid) / size

    @staticmethod
    def backward(ctx, upstream: Tensor) -> tuple[Tensor | None, ...]:
        residual, valid = ctx.saved_tensors
        return _scaled(residual, valid[:, None] * (upstream * ctx.factor)), None, None


class _Projected(torch.autograd.Function):
    @staticmethod
    def forward(ctx, student: Tensor, weight: Tensor, inputs: _Inputs, wants_weight: bool) -> Tensor:
        on_student = inputs.side == "student"
        addend, factor = (inputs.teacher, student) if on_student else (student, inputs.teacher)
        with torch.autocast(student.device.type, enabled=False):
            signs = {"beta": -1} if on_student else {"alpha": -1}
            residual = torch.addmm(addend, factor, weight.t(), **signs)
            residual *= inputs.valid[:, None].to(residual.dtype)
            loss = square_sum(residual, inputs.valid) / residual.shape[1]
            weight_gradient = fp32_product(residual.t(), factor) if wants_weight else None
            gradient = None
            if inputs.wants_student:
                gradient = residual @ weight if on_student else residual
        ctx.save_for_backward(gradient, weight_gradient)
        ctx.factor, ctx.weight_sign = 2 / residual.shape[1], 1 if on_student else -1
        return loss

    @staticmethod
    def backward(ctx, upstream: Tensor) -> tuple[Tensor | None, ...]:
        gradient, weight_gradient = ctx.saved_tensors
        factor = (upstream * ctx.factor).reshape(1, 1)
        student = None if gradient is None else _scaled(gradient, factor)
        weight = None if weight_gradient is None else weight_gradient * (factor * ctx.weight_sign)
        return student, weight, None, None


def square_sum(rows: Tensor, valid: Tensor) -> Tensor:
    """Squares summed over valid rows, in the dtype of `valid`, without a copy of `rows` in it."""
    return (torch.linalg.vector_norm(rows, dim=-1, dtype=valid.dtype).square() * valid).sum()


def fp32_product(left: Tensor, right: Tensor) -> Tensor:
    """left @ right in fp32 at least: a sum over all tokens may leave fp16's range."""
    if left.dtype in (torch.float32, torch.float64):
        return left @ right
    if left.is_cuda:
        return torch.mm(left, right, out_dtype=torch.float32)
    if left.dtype == torch.float16:
        return left.float() @ right.float()
    return (left @ right).float()  # a CPU has no bf16 product with fp32 output


def _scaled(gradient: Tensor, factor: Tensor) -> Tensor:
    """gradient * factor in the factor's dtype, rounded once. A 0-dim factor would be rounded first: it has two dims."""
    return torch.mul(gradient, factor, out=torch.empty_like(gradient))
