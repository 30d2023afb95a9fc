"""Distance of hidden states through a projection or a selection, against a float64 reference."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from homodistil.kernels.hidden_mse import hidden_mse

# Both the residual and the gradient are rounded to the dtype; sums are fp32.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}
NUM_TOKENS = 13
SMALL, LARGE = 17, 29


def reference(student, teacher, mask, weight, side):
    """sum over valid tokens of the mean over dims, in float64."""
    student, teacher, weight = student.double(), teacher.double(), weight.double()
    residual = student @ weight.t() - teacher if side == "student" else student - teacher @ weight.t()
    return (residual.square().mean(-1) * mask).sum()


def make(dtype: torch.dtype, small: int = SMALL):
    torch.manual_seed(0)
    student = torch.randn(3, NUM_TOKENS, small).to(dtype).requires_grad_()
    teacher = torch.randn(3, NUM_TOKENS, LARGE).to(dtype)
    mask = (torch.arange(NUM_TOKENS) < torch.tensor([13, 4, 1])[:, None]).long()
    kept = torch.randperm(LARGE)[:small].sort().values
    return student, teacher, mask, kept


def selection(kept, side: str):
    """The matrix that `kept` stands for, as the weight of an nn.Linear."""
    rows = torch.eye(LARGE)[kept]
    return rows.t() if side == "student" else rows


def expect_near(found, expected, tolerance: float) -> None:
    distance, size = (found.double() - expected.double()).norm(), expected.double().norm()
    assert distance <= tolerance * size, (distance / size).item()


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("small", [SMALL, LARGE])
def test_learned_projection(side, dtype, small):
    student, teacher, mask, _ = make(dtype, small)
    shape = (LARGE, small) if side == "student" else (small, LARGE)
    weight = torch.randn(shape).to(dtype).requires_grad_()
    found = hidden_mse(student, teacher, mask, weight, side)
    expected = reference(student, teacher, mask, weight, side)
    assert found.dtype == torch.promote_types(dtype, torch.float32) and found.shape == ()
    expect_near(found, expected, TOLERANCE[dtype])
    found, expected = (torch.autograd.grad(1.7 * value, (student, weight)) for value in (found, expected))
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == dtype
        expect_near(one, other, TOLERANCE[dtype])
    assert found[0][mask == 0].count_nonzero() == 0


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("small", [SMALL, LARGE])
def test_frozen_selection_is_the_projection_it_stands_for(side, dtype, small):
    student, teacher, mask, kept = make(dtype, small)
    found = hidden_mse(student, teacher, mask, None, side, kept)
    expected = reference(student, teacher, mask, selection(kept, side), side)
    expect_near(found, expected, TOLERANCE[dtype])
    found, expected = (torch.autograd.grad(1.7 * value, student)[0] for value in (found, expected))
    expect_near(found, expected, TOLERANCE[dtype])
    assert found[mask == 0].count_nonzero() == 0


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_exactly_zero_where_nothing_differs(side, dtype):
    _, teacher, mask, kept = make(dtype)
    identity = torch.eye(LARGE, dtype=dtype).requires_grad_()
    same = teacher.clone().requires_grad_()
    for loss in (
        hidden_mse(same, teacher, mask, identity, side),
        hidden_mse(same, teacher, mask, None, side, torch.arange(LARGE)),
        hidden_mse(same, teacher, mask, None, None),
    ):
        assert loss == 0
        assert torch.autograd.grad(loss, same)[0].count_nonzero() == 0
    part = teacher[..., kept].clone().requires_grad_()
    for loss in (
        hidden_mse(part, teacher, mask, selection(kept, "teacher").to(dtype), "teacher"),
        hidden_mse(part, teacher, mask, None, "teacher", kept),
    ):
        assert loss == 0


@pytest.mark.parametrize("how", ["student", "teacher", "selection", "selection of the student"])
def test_padding_does_not_matter(how):
    student, teacher, mask, kept = make(torch.float32)
    side = "student" if how.endswith("student") else "teacher"
    weight = None if how.startswith("selection") else torch.randn(selection(kept, side).shape).requires_grad_()
    kept = None if weight is not None else kept
    leaves = [leaf for leaf in (student, weight) if leaf is not None]
    results = []
    for filling in (0.0, 1e3):
        filled = [torch.where(mask[..., None] == 1, tensor, filling) for tensor in (student, teacher)]
        loss = hidden_mse(*filled, mask, weight, side, kept)
        results.append([loss, *torch.autograd.grad(loss, leaves)])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


class Products(TorchDispatchMode):
    num = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.num += function._schema.name in ("aten::mm", "aten::addmm")
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("side", "learned", "grad", "expected"),
    [
        ("student", True, True, 3),
        ("student", False, True, 2),
        ("student", True, False, 1),
        ("teacher", True, True, 2),
        ("teacher", False, True, 1),
        ("teacher", True, False, 1),
    ],
)
def test_no_product_that_nobody_needs(side, learned, grad, expected):
    student, teacher, mask, kept = make(torch.float32)
    weight = selection(kept, side).clone().requires_grad_(learned)
    with Products() as counted, torch.set_grad_enabled(grad):
        loss = hidden_mse(student, teacher, mask, weight, side)
        if grad:
            loss.backward()
    assert counted.num == expected
    assert (weight.grad is not None) == (learned and grad)


def test_teacher_of_another_dtype_and_autocast():
    student, teacher, mask, _ = make(torch.float32)
    weight = torch.randn(LARGE, SMALL)
    expected = reference(student, teacher.bfloat16(), mask, weight, "student")
    with torch.autocast("cpu", torch.bfloat16):
        found = hidden_mse(student, teacher.bfloat16(), mask, weight, "student")
    expect_near(found, expected, 1e-6)
