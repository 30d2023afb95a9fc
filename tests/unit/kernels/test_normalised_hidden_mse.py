"""Distance of hidden states whose rows are normalised first, against a float64 reference under autograd."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from unit.kernels.test_attention_map import LargestTensor
from unit.kernels.test_hidden_mse import LARGE, SMALL, TOLERANCE, Products, expect_near, make, selection

from homodistil.kernels import normalised_hidden_mse as kernel
from homodistil.kernels.normalised_hidden_mse import normalised_hidden_mse


def unit(rows: Tensor) -> Tensor:
    return rows / (rows.square().mean(-1, keepdim=True) + kernel.EPS).sqrt()


def reference(student: Tensor, teacher: Tensor, mask: Tensor, weight: Tensor, side: str) -> Tensor:
    """sum over valid tokens of the mean over dims, in float64."""
    student, teacher, weight = student.double(), teacher.double(), weight.double()
    if side == "student":
        student = student @ weight.t()
    else:
        teacher = teacher @ weight.t()
    return ((unit(student) - unit(teacher)).square().mean(-1) * mask).sum()


@pytest.fixture(params=[None, 1, 100], ids=["one chunk", "row by row", "three rows a chunk"])
def chunks(request, monkeypatch) -> None:
    if request.param:
        monkeypatch.setattr(kernel, "CHUNK_ELEMENTS", request.param)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("small", [SMALL, LARGE])
def test_learned_projection(chunks, side, dtype, small):
    student, teacher, mask, _ = make(dtype, small)
    shape = (LARGE, small) if side == "student" else (small, LARGE)
    weight = torch.randn(shape).to(dtype).requires_grad_()
    loss = normalised_hidden_mse(student, teacher, mask, weight, side)
    expected = reference(student, teacher, mask, weight, side)
    assert loss.dtype == torch.promote_types(dtype, torch.float32) and loss.shape == ()
    expect_near(loss, expected, TOLERANCE[dtype])
    gradients, wanted = (torch.autograd.grad(1.7 * value, (student, weight)) for value in (loss, expected))
    for one, other in zip(gradients, wanted, strict=True):
        assert one.dtype == dtype
        expect_near(one, other, TOLERANCE[dtype])
    assert gradients[0][mask == 0].count_nonzero() == 0


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("small", [SMALL, LARGE])
def test_frozen_selection_is_the_projection_it_stands_for(chunks, side, dtype, small):
    student, teacher, mask, kept = make(dtype, small)
    loss = normalised_hidden_mse(student, teacher, mask, None, side, kept)
    expected = reference(student, teacher, mask, selection(kept, side), side)
    expect_near(loss, expected, TOLERANCE[dtype])
    gradient, wanted = (torch.autograd.grad(1.7 * value, student)[0] for value in (loss, expected))
    expect_near(gradient, wanted, TOLERANCE[dtype])
    assert gradient[mask == 0].count_nonzero() == 0


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_gradients_by_differences(side):
    """Of the formula itself, which the reference above shares with nobody: central differences in float64."""
    student, teacher, mask, kept = make(torch.float64)
    weight = (selection(kept, side).double() + 0.1 * torch.randn(selection(kept, side).shape)).requires_grad_()
    assert torch.autograd.gradcheck(lambda s, w: normalised_hidden_mse(s, teacher, mask, w, side), (student, weight))
    assert torch.autograd.gradcheck(lambda s: normalised_hidden_mse(s, teacher, mask, None, side, kept), (student,))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_exactly_zero_where_nothing_differs(side, dtype):
    _, teacher, mask, kept = make(dtype)
    identity = torch.eye(LARGE, dtype=dtype).requires_grad_()
    same = teacher.clone().requires_grad_()
    for loss in (
        normalised_hidden_mse(same, teacher, mask, identity, side),
        normalised_hidden_mse(same, teacher, mask, None, side, torch.arange(LARGE)),
        normalised_hidden_mse(same, teacher, mask, None, None),
    ):
        assert loss == 0
        assert torch.autograd.grad(loss, same)[0].count_nonzero() == 0
    part = teacher[..., kept].clone().requires_grad_()
    assert normalised_hidden_mse(part, teacher, mask, None, "teacher", kept) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_sizes_of_rows_and_huge_dims_do_not_matter(side, dtype):
    """A massive activation in one dim of the teacher, and a student of another scale: at most 4 a row, and finite."""
    student, teacher, mask, kept = make(dtype)
    shape = selection(kept, side).shape
    weight = (0.3 * torch.randn(shape)).to(dtype).requires_grad_()
    before = normalised_hidden_mse(student, teacher, mask, weight, side)
    scaled = normalised_hidden_mse(student * 8, teacher * 0.25, mask, weight, side)  # powers of two: no rounding
    expect_near(scaled, before, 1e-5)  # but for EPS
    teacher[..., 3] *= 1e3
    loss = normalised_hidden_mse(student, teacher, mask, weight, side)
    assert 0 < loss <= 4 * mask.sum()
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(loss, (student, weight)))


def test_rows_of_zeros_stay_zeros():
    student, teacher, mask, _ = make(torch.float32)
    zeros = torch.zeros_like(student).requires_grad_()
    weight = torch.randn(LARGE, SMALL).requires_grad_()
    loss = normalised_hidden_mse(zeros, teacher, mask, weight, "student")
    expect_near(loss, mask.sum(), 1e-6)
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(loss, (zeros, weight)))


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
        loss = normalised_hidden_mse(*filled, mask, weight, side, kept)
        results.append([loss, *torch.autograd.grad(loss, leaves)])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


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
def test_as_many_products_as_without(side, learned, grad, expected):
    """What FLOPs are counted by (distill/losses/projection.py)."""
    student, teacher, mask, kept = make(torch.float32)
    weight = selection(kept, side).clone().requires_grad_(learned)
    with Products() as counted, torch.set_grad_enabled(grad):
        loss = normalised_hidden_mse(student, teacher, mask, weight, side)
        if grad:
            loss.backward()
    assert counted.num == expected
    assert (weight.grad is not None) == (learned and grad)


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_what_is_held_and_made(side, monkeypatch):
    """Until backward the two gradients; on the way no more than a chunk in fp32, whatever the batch."""
    student, teacher, mask, kept = make(torch.bfloat16)
    weight = selection(kept, side).to(torch.bfloat16).requires_grad_()
    monkeypatch.setattr(kernel, "CHUNK_ELEMENTS", 20 * LARGE)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.shape) or x, lambda x: x):
        with LargestTensor(lambda leaf: leaf.dtype == torch.float32) as largest:
            normalised_hidden_mse(student, teacher, mask, weight, side)
    assert saved == [student.flatten(0, 1).shape, weight.shape]
    assert weight.numel() < largest.numel <= 20 * LARGE < min(student.numel(), teacher.numel())


def test_teacher_of_another_dtype_and_autocast():
    student, teacher, mask, _ = make(torch.float32)
    weight = torch.randn(LARGE, SMALL)
    expected = reference(student, teacher.bfloat16(), mask, weight, "student")
    with torch.autocast("cpu", torch.bfloat16):
        loss = normalised_hidden_mse(student, teacher.bfloat16(), mask, weight, "student")
    expect_near(loss, expected, 1e-6)
