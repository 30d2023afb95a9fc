"""The attention-map loss against a naive float64 reference: values and gradients, in plain torch and in Triton.

The reference builds whole maps and leaves the gradient to autograd; nothing of the operation's formulas is in it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from homodistil.errors import UserError
from homodistil.kernels.attention_map import TARGETS, attention_map_loss

# The loss is summed in fp32 from fp32 products. A gradient is rounded to the dtype of its tensor, and in bf16 / fp16
# the gradient of the scores once before its product with Q or K; Triton's interpreter cuts bf16 off, unrounded.
LOSS_TOLERANCE = 2e-6
NEAR_LOSS_TOLERANCE = 1e-4  # differences of 1 % lose 2 of the 7 digits of fp32, their squares 2 more at worst
GRADIENT_TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 1e-2}
DTYPES = list(GRADIENT_TOLERANCE)


class Case(NamedTuple):
    """A batch, its student and its teacher. The last text is padding alone when there are several."""

    num_texts: int
    num_tokens: int
    student_dims: int
    teacher_dims: int
    heads: tuple[int, ...] | None
    """Of 3 heads of the teacher; None = all."""


CASES = [
    Case(1, 17, 24, 16, None),
    Case(2, 40, 20, 64, (2,)),
    Case(1, 129, 16, 16, (1,)),
    Case(1, 200, 20, 64, (2, 0)),
]


class Inputs(NamedTuple):
    student: list[Tensor]
    """Queries and keys, (B, N, T, Hs), views of (B, T, N, Hs) as Hugging Face makes them."""
    teacher: list[Tensor]
    mask: Tensor
    heads: Tensor | None

    def loss(self, target: str, implementation: str) -> Tensor:
        scales = [tensors[0].shape[-1] ** -0.5 for tensors in (self.student, self.teacher)]
        return attention_map_loss(*self.student, *self.teacher, *scales, self.mask, self.heads, target, implementation)


def make(case: Case, dtype: torch.dtype, teacher_dtype: torch.dtype | None = None) -> Inputs:
    generator = torch.Generator().manual_seed(0)

    def tensor(num_heads: int, dims: int, dtype: torch.dtype) -> Tensor:
        shape = (case.num_texts, case.num_tokens, num_heads, dims)
        return (1.5 * torch.randn(shape, generator=generator)).to(dtype).transpose(1, 2)

    num_heads = 3 if case.heads is None else len(case.heads)
    student = [tensor(num_heads, case.student_dims, dtype).requires_grad_() for _ in range(2)]
    teacher = [tensor(3, case.teacher_dims, teacher_dtype or dtype) for _ in range(2)]
    mask = torch.ones(case.num_texts, case.num_tokens, dtype=torch.int64)
    mask[0, case.num_tokens * 2 // 3 :] = 0
    if case.num_texts > 1:
        mask[-1] = 0
    return Inputs(student, teacher, mask, None if case.heads is None else torch.tensor(case.heads))


def reference(inputs: Inputs, target: str) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Loss and gradients, float64, one text and one head at a time over its real tokens."""
    student = [x.detach().double().requires_grad_() for x in inputs.student]
    num_heads = student[0].shape[1]
    heads = range(num_heads) if inputs.heads is None else inputs.heads.tolist()
    total = sum(x.sum() * 0 for x in student)
    for text, mask in enumerate(inputs.mask.bool()):
        for ours, theirs in enumerate(heads):
            q, k = (x[text, ours, mask] for x in student)
            tq, tk = (x[text, theirs, mask].double() for x in inputs.teacher)
            s, t = q @ k.T / q.shape[-1] ** 0.5, tq @ tk.T / tq.shape[-1] ** 0.5
            if target == "scores":
                total = total + ((s - t) ** 2).sum()
            elif target == "centred_scores":
                centred = [x - x.mean(-1, keepdim=True) for x in (s, t)]  # each side by itself
                total = total + ((centred[0] - centred[1]) ** 2).sum()
            elif target == "probabilities":
                total = total + ((s.softmax(-1) - t.softmax(-1)) ** 2).sum()
            else:
                total = total + (t.softmax(-1) * (t.log_softmax(-1) - s.log_softmax(-1))).sum()
    total = total / num_heads
    return total, torch.autograd.grad(total, student)


def check(
    inputs: Inputs, target: str, implementation: str, upstream: float = 1.0, loss_tolerance: float = LOSS_TOLERANCE
) -> None:
    expected, expected_gradients = reference(inputs, target)
    loss = inputs.loss(target, implementation)
    assert loss.dtype == torch.float32
    assert loss.shape == ()
    torch.testing.assert_close(loss.double(), expected, rtol=loss_tolerance, atol=0)
    gradients = torch.autograd.grad(loss * upstream, inputs.student)
    dtype = inputs.student[0].dtype
    for gradient, wanted in zip(gradients, expected_gradients, strict=True):
        assert gradient.dtype == dtype
        error = (gradient.double() - upstream * wanted).norm() / (upstream * wanted).norm()
        assert error < GRADIENT_TOLERANCE[dtype], f"{error:.1e}"
        padding = (inputs.mask == 0)[:, None, :, None].expand_as(gradient)
        assert not gradient[padding].any()


def near(inputs: Inputs, distance: float) -> Inputs:
    """The same with a teacher that the student almost equals (same heads and dims)."""
    generator = torch.Generator().manual_seed(1)
    teacher = [
        (x.detach().float() * (1 + distance * torch.randn(x.shape, generator=generator))).to(x.dtype)
        for x in inputs.student
    ]
    return inputs._replace(teacher=teacher, heads=None)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_torch(case, dtype, target):
    check(make(case, dtype), target, "torch")


# The interpreter is slow: every case in one dtype, the longest with one head, and `make test-full` has the other dtypes
# of all but the longest.
INTERPRETED = [*zip(CASES[:3], DTYPES, strict=True), (CASES[3]._replace(heads=(2,)), torch.bfloat16)]
INTERPRETED += [
    pytest.param(case, dtype, marks=pytest.mark.full)
    for i, case in enumerate(CASES[:3])
    for dtype in (*DTYPES[:i], *DTYPES[i + 1 :])
]


@pytest.mark.interpreted
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("case, dtype", INTERPRETED, ids=str)
def test_triton(case, dtype, target):
    check(make(case, dtype), target, "triton")


# The last two: a query's gradient of 1e-8 (a loss scale of 1, many tokens) survives the count; and so does 1e4.
EDGES = [
    (torch.bfloat16, torch.float32, 0.3),
    (torch.float32, torch.float16, 1.0),
    (torch.float16, torch.float16, 40.0),
]


@pytest.mark.parametrize("dtype, teacher_dtype, upstream", EDGES, ids=str)
def test_torch_dtypes_may_differ(dtype, teacher_dtype, upstream):
    check(make(CASES[1], dtype, teacher_dtype), "probabilities", "torch", upstream)


@pytest.mark.interpreted
@pytest.mark.parametrize("dtype, teacher_dtype, upstream", EDGES, ids=str)
def test_triton_dtypes_may_differ(dtype, teacher_dtype, upstream):
    check(make(CASES[1], dtype, teacher_dtype), "probabilities", "triton", upstream)


SAME = [Case(1, 40, 20, 20, (0,)), Case(1, 129, 16, 16, (0,))]


def check_equal(case: Case, dtype: torch.dtype, target: str, implementation: str) -> None:
    inputs = make(case, dtype)
    inputs = near(inputs, 0.0)
    assert inputs.loss(target, implementation).item() == 0.0


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", SAME, ids=str)
def test_torch_student_that_equals_its_teacher(case, dtype, target):
    check_equal(case, dtype, target, "torch")


@pytest.mark.interpreted
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("case", SAME, ids=str)
def test_triton_student_that_equals_its_teacher(case, target):
    check_equal(case, torch.bfloat16, target, "triton")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("target", TARGETS)
def test_torch_student_near_its_teacher(dtype, target):
    check(near(make(SAME[1], dtype), 0.01), target, "torch", 100.0, NEAR_LOSS_TOLERANCE)


@pytest.mark.interpreted
@pytest.mark.parametrize("case", SAME, ids=str)
@pytest.mark.parametrize("target", TARGETS)
def test_triton_student_near_its_teacher(case, target):
    check(near(make(case, torch.float16), 0.01), target, "triton", 100.0, NEAR_LOSS_TOLERANCE)


@pytest.mark.interpreted
@pytest.mark.parametrize("case", SAME, ids=str)
def test_triton_fp16_keeps_small_gradients(case):
    """Flat attention near the teacher's: P * D is 1e-7, less than fp16 holds without a shift."""
    inputs = make(case, torch.float16)
    flat = [(0.5 * x.detach()).requires_grad_() for x in inputs.student]
    check(near(inputs._replace(student=flat), 0.005), "probabilities", "triton", 1000.0, loss_tolerance=1e-3)


# A text of 40 tokens is one tile in bf16, and blocks of 32 in fp32, the second one not full.
# `make test` has each target with one of them, the other in `make test-full`.
BOTH_KERNELS = [
    pytest.param(dtype, target, marks=[pytest.mark.full] if (i + j) % 2 else [])
    for i, dtype in enumerate([torch.bfloat16, torch.float32])
    for j, target in enumerate(TARGETS)
]


@pytest.mark.interpreted
@pytest.mark.parametrize("dtype, target", BOTH_KERNELS, ids=str)
def test_triton_takes_any_layout(dtype, target):
    inputs = make(CASES[1], dtype)
    queries, keys = (x.detach() for x in inputs.student)
    apart = queries.transpose(-1, -2).contiguous().transpose(-1, -2).requires_grad_()  # dims of a head not side by side
    student = [apart, keys.contiguous().requires_grad_()]
    teacher = [inputs.teacher[0].contiguous(), inputs.teacher[1]]
    check(inputs._replace(student=student, teacher=teacher), target, "triton")


@pytest.mark.parametrize("case", CASES[:2], ids=str)
def test_a_constant_for_each_query_is_not_compared(case):
    """One vector added to all keys adds a constant to each query's row, which softmax ignores."""
    inputs = near(make(case, torch.float32), 0.0)
    queries, keys = inputs.student
    shifted = inputs._replace(teacher=[queries.detach(), keys.detach() + 3 * torch.randn(keys.shape[-1])])
    of_scores = shifted.loss("scores", "torch")
    # fp32 rounds scores of about 30 in the seventh digit, and the loss is a square of that.
    assert of_scores > 100 and shifted.loss("centred_scores", "torch") < 1e-10 * of_scores
    assert shifted.loss("probabilities_kl", "torch") < 1e-4


class LargestTensor(TorchDispatchMode):
    """Watches every operation inside the forward and notes the largest tensor that one puts out.

    Args:
        counts: whether a tensor is looked at; None: every one.
    """

    def __init__(self, counts: Callable[[Tensor], bool] | None = None) -> None:
        super().__init__()
        self.numel, self._counts = 0, counts or (lambda tensor: True)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and self._counts(leaf):
                self.numel = max(self.numel, leaf.numel())
        return result


@pytest.mark.parametrize("target", TARGETS)
def test_torch_never_holds_the_maps_of_a_batch(target):
    inputs = make(Case(6, 64, 16, 16, None), torch.bfloat16)
    with LargestTensor() as largest:
        torch.autograd.grad(inputs.loss(target, "torch"), inputs.student)
    one_text = 3 * 64 * 64
    assert one_text <= largest.numel <= 6 * 3 * 64 * 16  # a map of one text, or the batch's queries


def saved_and_loss(inputs: Inputs, target: str, implementation: str) -> tuple[list, Tensor]:
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.shape) or x, lambda x: x):
        return saved, inputs.loss(target, implementation)


@pytest.mark.parametrize("target", TARGETS)
def test_torch_keeps_only_two_gradients(target):
    inputs = make(CASES[0], torch.bfloat16)
    saved, _ = saved_and_loss(inputs, target, "torch")
    assert [shape for shape in saved if len(shape) > 0] == [inputs.student[0].shape] * 2


@pytest.mark.parametrize("target", TARGETS)
def test_torch_without_gradient(target):
    inputs = make(CASES[1], torch.float32)
    with torch.no_grad():
        loss = inputs.loss(target, "torch")
    assert not loss.requires_grad
    assert loss.item() == inputs.loss(target, "torch").item()


@pytest.mark.interpreted
@pytest.mark.parametrize("dtype, target", BOTH_KERNELS, ids=str)
def test_triton_without_gradient(dtype, target):
    inputs = make(CASES[1], dtype)
    with torch.no_grad():
        loss = inputs.loss(target, "triton")
    assert not loss.requires_grad
    assert loss.item() == inputs.loss(target, "triton").item()


def test_mistakes_are_named():
    inputs = make(CASES[0], torch.float32)
    with pytest.raises(UserError, match="loss.attention_target: 'score' is unknown"):
        inputs.loss("score", "torch")
    with pytest.raises(UserError, match="loss.kernels: 'fast' is unknown"):
        inputs.loss("scores", "fast")
