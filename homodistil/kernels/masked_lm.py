"""Cross-entropy (MLM) and KL to the teacher over the vocabulary, from logits or straight from hidden rows.

`masked_lm_losses` takes logits that exist (the masked rows, about 15 % of the tokens); `linear_masked_lm_losses` makes
both models' logits chunk by chunk and forgets them (every token). Both share row functions whose arithmetic is fp32
whatever the logits' dtype: a bf16 log-softmax near the teacher overstates the KL by more than half.

With s, t the logits of student and teacher, q, p their softmax at temperature T (no gradient for the teacher):

    CE = logsumexp(s) - s[label]            dCE/ds = softmax(s) - onehot(label)
    KL = T^2 * sum_v p (log p - log q)      dKL/ds = T (q - p)

T^2 keeps the size of the gradient independent of the temperature (Hinton et al. 2015, section 2). At T = 1 the
student's softmax serves both. The KL is computed as sum p (t - s)/T - (logsumexp(t/T) - logsumexp(s/T)): differences of
logits instead of logarithms, so that near the teacher no two large numbers cancel.

masked_lm_torch.py and masked_lm_triton.py have the functions of rows, with the same names and arguments.

Shapes: M or R rows, V vocabulary, H hidden sizes.
"""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from homodistil.kernels import masked_lm_torch
from homodistil.kernels.masked_lm_torch import arithmetic
from homodistil.kernels.triton_support import use_triton

_CHUNK_ROWS = {"cpu": 256, "cuda": 2048}
"""Rows whose logits exist at once in the linear form: enough for full speed of the matrix products."""
_FP16_SHIFT = 2.0**10
"""A probability of 1e-6 times a factor of 1 is below fp16's normal range: gradients of logits are kept this larger."""


def masked_lm_losses(
    student_logits: Tensor,
    teacher_logits: Tensor | None,
    labels: Tensor,
    temperature: float = 1.0,
    implementation: str = "auto",
    overwrite: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Sums over rows of CE and of KL(teacher || student). Counts: labelled rows, rows.

    What backward needs is computed again there from the logits themselves, block by block: two more reads cost less
    than writing a gradient for each sum in forward, and nothing of their size is held besides them.

    Args:
        student_logits: (M, V), any float dtype.
        teacher_logits: (M, V), any float dtype; None leaves the KL out.
        labels: (M,) int64; rows with a negative label count for the KL alone.
        temperature: of the KL.
        implementation: see `use_triton`.
        overwrite: backward writes the gradient over `student_logits` instead of into a new tensor. For a caller that
            uses the logits nowhere else, afterwards neither: autograd raises where another operation has saved them and
            runs backward later, but cannot see a plain read. Ignored for a leaf; a second backward raises.

    Returns:
        fp32 0-dim (float64 for float64 logits), both differentiable in `student_logits`; None without a teacher.
    """
    triton = use_triton(implementation, student_logits.device)
    overwrite = overwrite and not student_logits.is_leaf  # a leaf's .grad would become the leaf itself
    ce, kl = _MaskedLM.apply(student_logits, teacher_logits, labels, temperature, triton, overwrite)
    return ce, (None if teacher_logits is None else kl)


class _MaskedLM(torch.autograd.Function):
    @staticmethod
    def forward(ctx, student, teacher, labels, temperature: float, triton: bool, overwrite: bool):
        student = student.contiguous()
        teacher = None if teacher is None else teacher.contiguous()
        ce, kl, normalisers = _rows(triton).losses(student, teacher, labels, temperature)
        ctx.save_for_backward(student, teacher, labels, normalisers)
        ctx.temperature, ctx.triton, ctx.overwrite = temperature, triton, overwrite
        return ce.sum(), kl.sum()

    @staticmethod
    def backward(ctx, ce_factor: Tensor, kl_factor: Tensor):
        student, teacher, labels, normalisers = ctx.saved_tensors
        gradient = student if ctx.overwrite else torch.empty_like(student)
        factors = (ce_factor, kl_factor)
        _rows(ctx.triton).write_gradient(student, teacher, labels, ctx.temperature, factors, normalisers, out=gradient)
        return gradient, None, None, None, None, None


def _rows(triton: bool) -> ModuleType:
    """The functions of rows."""
    if not triton:
        return masked_lm_torch
    from homodistil.kernels import masked_lm_triton

    return masked_lm_triton


def linear_masked_lm_losses(
    student_rows: Tensor,
    student_weight: Tensor,
    student_bias: Tensor | None,
    teacher_rows: Tensor | None,
    teacher_weight: Tensor | None,
    teacher_bias: Tensor | None,
    labels: Tensor,
    ce_factor: Tensor,
    kl_factor: Tensor,
    temperature: float = 1.0,
    chunk_rows: int | None = None,
    implementation: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """CE on labelled rows and KL on all rows, from the rows that enter the decoders. Never more than a chunk of logits.

    Gradients are made in forward, chunk by chunk, with the student's weight gradient summed in fp32; backward scales
    them. Autocast does not reach inside: products run in the dtype of each model's weight, to which its rows are cast.

    Args:
        student_rows: (R, Hs), outputs of the MLM head's transform.
        student_weight: (V, Hs). student_bias: (V,). Of the decoder.
        teacher_rows, teacher_weight, teacher_bias: the same of the teacher, (R, Ht), (V, Ht), (V,); no gradient.
            Without teacher_rows the KL is left out: its sum is 0.
        labels: (R,) int64, negative = no label.
        ce_factor, kl_factor: what the two sums are multiplied with, 0-dim fp32 on the device, not negative.
        temperature: of the KL.
        chunk_rows: rows whose logits exist at once.
        implementation: see `use_triton`.

    Returns:
        ce_factor * ce_sum + kl_factor * kl_sum with a graph; ce_sum; kl_sum. fp32 0-dim.
    """
    student_rows = student_rows.to(student_weight.dtype)
    if teacher_rows is not None:
        teacher_rows = teacher_rows.to(teacher_weight.dtype)
    heads = (student_rows, student_weight, student_bias, teacher_rows, teacher_weight, teacher_bias)
    wanted = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in heads[:3]]
    options = _LinearOptions(
        temperature,
        chunk_rows or _CHUNK_ROWS.get(student_rows.device.type, 1024),
        use_triton(implementation, student_rows.device),
        *wanted,
    )
    return _LinearMaskedLM.apply(*heads, labels, ce_factor, kl_factor, options)


class _LinearOptions(NamedTuple):
    temperature: float
    chunk_rows: int
    triton: bool
    wants_rows: bool
    wants_weight: bool
    wants_bias: bool

    @property
    def wants_gradient(self) -> bool:
        return self.wants_rows or self.wants_weight or self.wants_bias


class _LinearMaskedLM(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *inputs):
        *heads, labels, ce_factor, kl_factor, options = inputs
        with torch.autocast(labels.device.type, enabled=False):
            # The larger factor becomes 1: the factors carry 1 / count, and fp16 would lose most of what they multiply.
            norm = torch.maximum(ce_factor, kl_factor).clamp_min(torch.finfo(torch.float32).tiny)
            factors = (ce_factor / norm, kl_factor / norm)
            sums = _LinearGradients(heads[:3], factors, options)
            ce, kl = sums.run_all(heads[3:], labels)
        ctx.save_for_backward(norm / sums.shift, sums.rows, sums.weight, sums.bias)
        ctx.dtypes = [None if x is None else x.dtype for x in heads[:3]]
        ctx.mark_non_differentiable(ce, kl)
        return ce_factor * ce + kl_factor * kl, ce, kl

    @staticmethod
    def backward(ctx, upstream: Tensor, _ce: None, _kl: None):
        scale, *gradients = ctx.saved_tensors
        scale = scale * upstream
        scaled = [None if g is None else _scaled(g, scale, d) for g, d in zip(gradients, ctx.dtypes, strict=True)]
        return *scaled, *[None] * 7


def _scaled(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """gradient * factor in the dtype of the factor, rounded once (a 0-dim factor would be rounded first)."""
    factor = factor.reshape([1] * gradient.dim())
    return torch.mul(gradient, factor, out=torch.empty_like(gradient, dtype=dtype))


class _LinearGradients:
    """Losses of one pass over the rows, and the gradients wanted by then, `shift` times their size.

    Args:
        head: rows, weight and bias of the student.
        factors: of CE and KL, the larger one is 1.
    """

    def __init__(self, head, factors: tuple[Tensor, Tensor], options: _LinearOptions) -> None:
        self._head, self._factors, self._options = head, factors, options
        rows, weight, bias = head
        dtype = arithmetic(weight.dtype)
        self.shift = _FP16_SHIFT if weight.dtype == torch.float16 else 1.0
        self.rows = torch.empty_like(rows) if options.wants_rows else None
        self.weight = torch.zeros(weight.shape, dtype=dtype, device=weight.device) if options.wants_weight else None
        self.bias = torch.zeros(bias.shape, dtype=dtype, device=bias.device) if options.wants_bias else None

    def run_all(self, teacher_head, labels: Tensor) -> tuple[Tensor, Tensor]:
        """CE and KL, summed."""
        rows, weight, bias = self._head
        teacher_rows, teacher_weight, teacher_bias = teacher_head
        size = self._options.chunk_rows
        totals = [labels.new_zeros(2, dtype=arithmetic(weight.dtype)).unbind()]
        for number, (x, y) in enumerate(zip(rows.split(size), labels.split(size), strict=True)):
            logits, teacher_logits = functional.linear(x, weight, bias), None
            if teacher_rows is not None:
                teacher_x = teacher_rows[number * size : number * size + len(x)]
                teacher_logits = functional.linear(teacher_x, teacher_weight, teacher_bias)
            totals.append(self._losses_and_gradient(logits, teacher_logits, y))
            del teacher_logits  # before the products make their own temporaries
            if self._options.wants_gradient:
                self._add_products(slice(number * size, number * size + len(x)), x, logits)
            del logits  # before the next chunk's are made
        return tuple(torch.stack(sums).sum() for sums in zip(*totals, strict=True))

    def _losses_and_gradient(
        self, logits: Tensor, teacher_logits: Tensor | None, labels: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Sums of CE and KL; the gradient is written over `logits`, which belong to this pass alone."""
        factors = tuple(factor * self.shift for factor in self._factors) if self._options.wants_gradient else None
        rows = _rows(self._options.triton)
        ce, kl = rows.losses_and_gradient(logits, teacher_logits, labels, self._options.temperature, factors)
        return ce.sum(), kl.sum()

    def _add_products(self, chunk: slice, x: Tensor, gradient: Tensor) -> None:
        if self.rows is not None:
            torch.mm(gradient, self._head[1], out=self.rows[chunk])
        if self.weight is not None:
            _add_product(self.weight, gradient.t(), x)
        if self.bias is not None:
            self.bias += gradient.sum(0, dtype=self.bias.dtype)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right, summed in the dtype of `total`."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    elif left.is_cuda:
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
    elif left.dtype == torch.float16:  # a product of shifted gradients may leave fp16's range, and here it is no faster
        total.addmm_(left.to(total.dtype), right.to(total.dtype))
    else:
        total += left @ right  # a CPU has no bf16 product with fp32 output: each chunk's is rounded once
