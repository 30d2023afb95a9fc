"""Row kernel of masked_lm.py: CE, KL and their gradient in two passes over the logits, one program a row.

First pass: running maximum and running sums of both models' softmax, and the KL's mean difference. Second pass: the
gradient, from the logits again and five numbers per row. The passes run in one launch where the factors of the two sums
are known (the linear form, whose second pass then finds its row in the cache), in two where they come with backward:
that is 4 reads and 1 write of a matrix of logits, while holding a gradient for each sum would take 4 reads and 3
writes. Factors are read from device memory: the host never waits for them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from homodistil.kernels.triton_support import mend_interpreter, padded

mend_interpreter()

NUM_NORMALISERS = 5
"""A row: student's largest logit, 1 / its sum of exponentials at temperature 1 and at T, the teacher's two at T."""


def configuration(vocabulary: int) -> tuple[dict[str, int], int]:
    """Constants of the kernel and warps of a program, for V logits a row."""
    return {"V": vocabulary, "BLOCK": min(4096, padded(vocabulary))}, 8 if vocabulary > 1024 else 4


@triton.jit
def row_kernel(
    student_ptr,
    teacher_ptr,
    labels_ptr,
    losses_ptr,
    normalisers_ptr,
    ce_factor_ptr,
    kl_factor_ptr,
    out_ptr,
    num_rows,
    temperature,
    V: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_TEACHER: tl.constexpr,
    SOFTENED: tl.constexpr,
    LOSSES: tl.constexpr,
    GRADIENT: tl.constexpr,
):
    """LOSSES: write losses (2, rows) and normalisers (5, rows). GRADIENT: write out (rows, V), which may be the
    student's logits, from the normalisers just written, or given. SOFTENED: temperature is not 1.
    """
    row = tl.program_id(0)
    start = row.to(tl.int64) * V
    student_ptr += start
    if HAS_TEACHER:
        teacher_ptr += start
    label = tl.load(labels_ptr + row)
    if LOSSES:
        top, total, soft_total, teacher_top, teacher_total, difference = _statistics(
            student_ptr, teacher_ptr, temperature, V, BLOCK, HAS_TEACHER, SOFTENED
        )
        labelled = tl.load(student_ptr + tl.maximum(label, 0)).to(tl.float32)
        tl.store(losses_ptr + row, tl.where(label < 0, 0.0, top - labelled + tl.log(total)))
        if HAS_TEACHER:
            soft_top = top / temperature if SOFTENED else top
            normaliser_difference = (teacher_top - soft_top) + tl.log(teacher_total / soft_total)
            kl = difference / teacher_total - normaliser_difference
            tl.store(losses_ptr + num_rows + row, kl * temperature * temperature if SOFTENED else kl)
        inverse, soft_inverse, teacher_inverse = 1.0 / total, 1.0 / soft_total, 1.0 / teacher_total
        tl.store(normalisers_ptr + row, top)
        tl.store(normalisers_ptr + num_rows + row, inverse)
        tl.store(normalisers_ptr + 2 * num_rows + row, soft_inverse)
        tl.store(normalisers_ptr + 3 * num_rows + row, teacher_top)
        tl.store(normalisers_ptr + 4 * num_rows + row, teacher_inverse)
    else:
        top = tl.load(normalisers_ptr + row)
        inverse = tl.load(normalisers_ptr + num_rows + row)
        soft_inverse = tl.load(normalisers_ptr + 2 * num_rows + row)
        teacher_top = tl.load(normalisers_ptr + 3 * num_rows + row)
        teacher_inverse = tl.load(normalisers_ptr + 4 * num_rows + row)
    if GRADIENT:
        ce_factor = tl.where(label < 0, 0.0, tl.load(ce_factor_ptr).to(tl.float32))
        kl_factor = tl.load(kl_factor_ptr).to(tl.float32) * temperature
        normalisers = (top, inverse, soft_inverse, teacher_top, teacher_inverse)
        inputs = (student_ptr, teacher_ptr, label, temperature)
        _write_row(inputs, normalisers, ce_factor, kl_factor, out_ptr + start, V, BLOCK, HAS_TEACHER, SOFTENED)


@triton.jit
def _statistics(
    student_ptr,
    teacher_ptr,
    temperature,
    V: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_TEACHER: tl.constexpr,
    SOFTENED: tl.constexpr,
):
    """Largest student logit, its sums of exponentials at temperature 1 and T, teacher's largest and sum at T, and the
    teacher's unnormalised mean of (t - s) / T. One maximum across threads a block; sums are added up at the end.
    """
    top = float("-inf")
    teacher_top = float("-inf")
    total = tl.zeros([BLOCK], tl.float32)
    soft_total = tl.zeros([BLOCK], tl.float32)
    teacher_total = tl.zeros([BLOCK], tl.float32)
    difference = tl.zeros([BLOCK], tl.float32)
    for first in range(0, V, BLOCK):
        column = first + tl.arange(0, BLOCK)
        inside = column < V
        s = tl.load(student_ptr + column, mask=inside, other=float("-inf")).to(tl.float32)
        new_top = tl.maximum(top, tl.max(s, 0))
        total = total * tl.exp(top - new_top) + tl.exp(s - new_top)
        if SOFTENED:
            soft_total *= tl.exp((top - new_top) / temperature)
            soft_total += tl.exp((s - new_top) / temperature)
            s = s / temperature
        top = new_top
        if HAS_TEACHER:
            t = tl.load(teacher_ptr + column, mask=inside, other=float("-inf")).to(tl.float32)
            if SOFTENED:
                t = t / temperature
            new_teacher_top = tl.maximum(teacher_top, tl.max(t, 0))
            shrink = tl.exp(teacher_top - new_teacher_top)
            weight = tl.exp(t - new_teacher_top)
            teacher_total = teacher_total * shrink + weight
            difference = difference * shrink + weight * tl.where(inside, t - s, 0.0)
            teacher_top = new_teacher_top
    sum_1 = tl.sum(total, 0)
    sum_t = tl.sum(soft_total, 0) if SOFTENED else sum_1
    return top, sum_1, sum_t, teacher_top, tl.sum(teacher_total, 0), tl.sum(difference, 0)


@triton.jit
def _write_row(
    inputs,
    normalisers,
    ce_factor,
    kl_factor,
    out_ptr,
    V: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_TEACHER: tl.constexpr,
    SOFTENED: tl.constexpr,
):
    student_ptr, teacher_ptr, label, temperature = inputs
    top, inverse, soft_inverse, teacher_top, teacher_inverse = normalisers
    for first in range(0, V, BLOCK):
        column = first + tl.arange(0, BLOCK)
        inside = column < V
        s = tl.load(student_ptr + column, mask=inside, other=float("-inf")).to(tl.float32)
        q = tl.exp(s - top) * inverse
        gradient = ce_factor * (q - tl.where(column == label, 1.0, 0.0))
        if HAS_TEACHER:
            t = tl.load(teacher_ptr + column, mask=inside, other=float("-inf")).to(tl.float32)
            if SOFTENED:
                q = tl.exp((s - top) / temperature) * soft_inverse
                t = t / temperature
            gradient += kl_factor * (q - tl.exp(t - teacher_top) * teacher_inverse)
        tl.store(out_ptr + column, gradient.to(out_ptr.dtype.element_ty), mask=inside)


def losses(student: Tensor, teacher: Tensor | None, labels: Tensor, temperature: float) -> tuple[Tensor, ...]:
    """CE (M,), KL (M,; 0 without a teacher), and normalisers (5, M) for `write_gradient`; all fp32."""
    ce, kl, normalisers = _outputs(student)
    _launch(student, teacher, labels, temperature, (ce, normalisers), factors=None, out=None)
    return ce, kl, normalisers


def write_gradient(
    student: Tensor,
    teacher: Tensor | None,
    labels: Tensor,
    temperature: float,
    factors: tuple[Tensor, Tensor],
    normalisers: Tensor,
    out: Tensor,
) -> None:
    """factors[0] * dCE + factors[1] * dKL into `out` (M, V), which may be `student` itself."""
    _launch(student, teacher, labels, temperature, (None, normalisers), factors, out)
    # A kernel's writes are unseen by autograd: whoever has saved these logits has to hear of them.
    torch.autograd.graph.increment_version(out)


def losses_and_gradient(
    student: Tensor, teacher: Tensor | None, labels: Tensor, temperature: float, factors: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor]:
    """CE and KL (M,; 0 without a teacher); with the factors of their sums the gradient is written over `student`."""
    ce, kl, normalisers = _outputs(student)
    out = None if factors is None else student
    _launch(student, teacher, labels, temperature, (ce, normalisers), factors, out)
    return ce, kl


def _outputs(student: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """CE and KL (views of one allocation, in this order) and normalisers, a number per row each."""
    rows = student.new_zeros(2 + NUM_NORMALISERS, len(student), dtype=torch.float32)
    return rows[0], rows[1], rows[2:]


def _launch(student: Tensor, teacher, labels, temperature: float, per_row, factors, out: Tensor | None) -> None:
    """`per_row`: where losses go (None: they are known) and normalisers go or come from."""
    num_rows, vocabulary = student.shape
    if num_rows == 0:
        return
    constants, num_warps = configuration(vocabulary)
    losses_out, normalisers = per_row
    ce_factor, kl_factor = factors or (None, None)
    row_kernel[(num_rows,)](
        student,
        teacher,
        labels,
        losses_out,
        normalisers,
        ce_factor,
        kl_factor,
        out,
        num_rows,
        float(temperature),
        **constants,
        HAS_TEACHER=teacher is not None,
        SOFTENED=temperature != 1.0,
        LOSSES=losses_out is not None,
        GRADIENT=out is not None,
        num_warps=num_warps,
    )
