"""Distance between hidden states whose rows are divided by their root mean square, as RMSNorm does, before they are
compared: neither a token nor a dim of huge activations decides it. A row adds at most 4.

    side "student":  U = H_s W^T,  V = H_t            side "teacher":  U = H_s,  V = H_t W^T
    u = U / r,  v = V / t  with  r = sqrt(mean of U^2 + EPS) of each row,  t of V;    R = u - v
    dU = (2 / D) (R - u mean(R u)) / r                dV = -(2 / D) (R - v mean(R v)) / t

The rows that are compared are the ones that are normalised: on the teacher's side those behind W, so that the distance
is bounded whatever W is. All of it is done in fp32, in chunks of rows, and the gradients are made in forward: what is
held until backward is the gradient of the student's states, and that of W.

Shapes: B batch, T tokens, Ds and Dt hidden sizes of student and teacher, D the size compared.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from homodistil.kernels.hidden_mse import fp32_product, square_sum

EPS = 1e-8
"""Added to the mean square of a row, so that a row of zeros stays one."""
CHUNK_ELEMENTS = 1 << 22
"""Numbers of a chunk, rows x the larger hidden size: 16 MiB in fp32, of which about six exist at a time."""


def normalised_hidden_mse(
    student: Tensor,
    teacher: Tensor,
    attention_mask: Tensor,
    projection: Tensor | None,
    side: str | None,
    kept: Tensor | None = None,
) -> Tensor:
    """Squared difference of normalised rows, mean over D, summed over valid tokens. Count: tokens.

    Args:
        student: (B, T, Ds).
        teacher: (B, T, Dt), any float dtype; no gradient.
        attention_mask: (B, T), 1 = token, 0 = padding, which contributes nothing (it has to be finite).
        projection, side, kept: see `hidden_mse`. Under `kept` on the student's side the student's rows have zeros in
            the other dims, which their mean squares count.

    Returns:
        fp32 0-dim (float64 for float64 students), differentiable in `student` and `projection`.
    """
    grad = torch.is_grad_enabled()
    valid = attention_mask.flatten().to(torch.promote_types(student.dtype, torch.float32))
    teacher = teacher.detach().to(student.dtype).flatten(0, 1)
    weight = None if projection is None else projection.to(student.dtype)
    wants_weight = weight is not None and grad and weight.requires_grad
    inputs = _Inputs(teacher, valid, side, kept, grad and student.requires_grad, wants_weight)
    return _Normalised.apply(student.flatten(0, 1), weight, inputs)


class _Inputs(NamedTuple):
    """What needs no gradient. Not looked into by autograd."""

    teacher: Tensor
    """(B * T, Dt)"""
    valid: Tensor
    """(B * T,), 1 = token, 0 = padding, in the dtype of sums: fp32, float64 for float64."""
    side: str | None
    kept: Tensor | None
    wants_student: bool
    wants_weight: bool

    def of(self, rows: slice) -> _Inputs:
        return self._replace(teacher=self.teacher[rows], valid=self.valid[rows])

    @property
    def on_student(self) -> bool:
        return self.side == "student"


class _Normalised(torch.autograd.Function):
    @staticmethod
    def forward(ctx, student: Tensor, weight: Tensor | None, inputs: _Inputs) -> Tensor:
        # The gradient of a row is divided by its size: fp16 holds it at neither end.
        dtype = torch.float32 if student.dtype == torch.float16 else student.dtype
        gradient = torch.empty_like(student, dtype=dtype) if inputs.wants_student else None
        of_weight = torch.zeros_like(weight, dtype=inputs.valid.dtype) if inputs.wants_weight else None
        size = student.shape[1] if inputs.side == "teacher" else inputs.teacher.shape[1]
        total = inputs.valid.new_zeros(())
        with torch.autocast(student.device.type, enabled=False):
            for rows in _chunks(student, inputs.teacher):
                loss, of_rows, of_chunk = _compare(student[rows], weight, inputs.of(rows))
                total += loss
                if gradient is not None:
                    gradient[rows] = of_rows
                if of_weight is not None:
                    of_weight += of_chunk
        ctx.save_for_backward(gradient, of_weight)
        ctx.factor, ctx.dtype = 2 / size, student.dtype
        return total / size

    @staticmethod
    def backward(ctx, upstream: Tensor) -> tuple[Tensor | None, ...]:
        gradient, of_weight = ctx.saved_tensors
        factor = (upstream * ctx.factor).reshape(1, 1)  # a 0-dim factor would be rounded to the gradient's dtype first
        student = None
        if gradient is not None:
            student = torch.mul(gradient, factor, out=torch.empty_like(gradient, dtype=ctx.dtype))
        return student, None if of_weight is None else of_weight * factor, None


def _chunks(student: Tensor, teacher: Tensor) -> list[slice]:
    num_rows, step = len(student), max(1, CHUNK_ELEMENTS // max(student.shape[1], teacher.shape[1]))
    return [slice(start, min(start + step, num_rows)) for start in range(0, num_rows, step)]


class _Rows(NamedTuple):
    """Rows of one side, behind W where it is on this side, in the dtype of sums."""

    unit: Tensor
    """(rows, D), of mean square 1."""
    scale: Tensor
    """(rows, 1), 1 / r: what they were multiplied with for that."""

    def through(self, residual: Tensor) -> Tensor:
        """Gradient of R^2 / 2 with respect to the rows as they were, but for `scale`."""
        return residual - self.unit * (residual * self.unit).mean(-1, keepdim=True)


def _compare(student: Tensor, weight: Tensor | None, inputs: _Inputs) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Sum of R^2 of a chunk of rows, and the gradients of half of it: of the student's states and of W."""
    ours = _normalised(_student_rows(student, weight, inputs))
    theirs = _normalised(_teacher_rows(weight, inputs))
    residual = (ours.unit - theirs.unit).mul_(inputs.valid[:, None])
    loss = square_sum(residual, inputs.valid)
    if not (inputs.wants_student or inputs.wants_weight):
        return loss, None, None
    # The factor of each row comes behind the product, where the dtype holds it.
    back = ours.through(residual)
    of_rows = _into_states(back, weight, inputs) * ours.scale if inputs.wants_student else None
    if not inputs.wants_weight:
        return loss, of_rows, None
    if inputs.on_student:
        return loss, of_rows, _outer(back, student, ours.scale)
    return loss, of_rows, _outer(theirs.through(residual), inputs.teacher, theirs.scale).neg_()


def _normalised(rows: Tensor) -> _Rows:
    scale = (rows.square().mean(-1, keepdim=True) + EPS).rsqrt()
    return _Rows(rows * scale, scale)


def _student_rows(student: Tensor, weight: Tensor | None, inputs: _Inputs) -> Tensor:
    if not inputs.on_student:
        return student.to(inputs.valid.dtype)
    if weight is not None:
        return fp32_product(student, weight.t())
    if inputs.kept is None:
        return student.to(inputs.valid.dtype)
    whole = inputs.valid.new_zeros(inputs.teacher.shape)
    return whole.index_copy_(1, inputs.kept, student.to(whole.dtype))


def _teacher_rows(weight: Tensor | None, inputs: _Inputs) -> Tensor:
    if inputs.side != "teacher":
        return inputs.teacher.to(inputs.valid.dtype)
    if weight is not None:
        return fp32_product(inputs.teacher, weight.t())
    if inputs.kept is None:
        return inputs.teacher.to(inputs.valid.dtype)
    return inputs.teacher.gather(1, inputs.kept.expand(len(inputs.teacher), -1)).to(inputs.valid.dtype)


def _into_states(back: Tensor, weight: Tensor | None, inputs: _Inputs) -> Tensor:
    """(rows, D) -> (rows, Ds): through W or the selection, where these are on the student's side."""
    if not inputs.on_student:
        return back
    if weight is not None:
        return fp32_product(back.to(weight.dtype), weight)
    return back if inputs.kept is None else back.gather(1, inputs.kept.expand(len(back), -1))


def _outer(back: Tensor, states: Tensor, scale: Tensor) -> Tensor:
    """back^T (states x scale): (D, Ds or Dt)."""
    return fp32_product(back.t().to(states.dtype), (states * scale).to(states.dtype))
