"""Every operation on the GPU in its Triton form against the float64 references of tests/unit/kernels, run there too.

"auto" takes Triton on a GPU (test_step_terms.py asserts it). Shapes are odd, padded, or those of real models.
"""

from __future__ import annotations

import pytest
import torch
import unit.kernels.test_attention_map as attention
import unit.kernels.test_hidden_mse as hidden
import unit.kernels.test_mask_kinds as kinds
import unit.kernels.test_masked_lm as vocabulary
import unit.kernels.test_normalised_hidden_mse as normalised
from torch import Tensor
from unit.kernels.test_masked_lm import expect_near

from homodistil.kernels.attention_map import TARGETS
from homodistil.kernels.hidden_mse import hidden_mse
from homodistil.kernels.masked_lm import linear_masked_lm_losses, masked_lm_losses
from homodistil.kernels.normalised_hidden_mse import normalised_hidden_mse

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}
"""Of a norm. fp32: the hardware's exp2 and log2 are good to 2^-22, of arguments up to about 30. The others: a unit in
the last place for every rounding to the dtype on the way, of which there are two."""
SUM_TOLERANCE = 2e-5
"""Of losses, which are summed in fp32 from fp32 terms whatever the dtype."""

pytestmark = pytest.mark.gpu


def leaf(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor.detach().to(device).requires_grad_()


# -- attention maps

CASES = [
    *attention.CASES,
    attention.Case(2, 64, 32, 64, None),
    attention.Case(3, 128, 64, 64, None),
    attention.Case(2, 128, 28, 64, (0, 2)),
    attention.Case(2, 512, 64, 64, None),
    attention.Case(2, 301, 48, 64, (2, 1)),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_attention_map(device, case, target, dtype):
    made = attention.make(case, dtype)
    inputs = made._replace(
        student=[leaf(x, device) for x in made.student],
        teacher=[x.to(device) for x in made.teacher],
        mask=made.mask.to(device),
        heads=None if made.heads is None else made.heads.to(device),
    )
    expected, expected_gradients = attention.reference(inputs, target)
    loss = inputs.loss(target, "auto")
    assert loss.dtype == torch.float32 and loss.device.type == device.type
    expect_near(loss, expected, SUM_TOLERANCE)
    gradients = torch.autograd.grad(loss, inputs.student)
    for gradient, wanted in zip(gradients, expected_gradients, strict=True):
        assert gradient.dtype == dtype
        expect_near(gradient, wanted, TOLERANCE[dtype])
        padding = (inputs.mask == 0)[:, None, :, None].expand_as(gradient)
        assert not gradient[padding].any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("case", kinds.SHORT + kinds.LONG, ids=str)
def test_attention_map_of_other_masks_and_shared_keys(device, case, target, dtype):
    made = kinds.make(case, dtype)
    inputs = made._replace(
        student=[leaf(x, device) for x in made.student],
        teacher=[x.to(device) for x in made.teacher],
        mask=made.mask.to(device),
        heads=None if made.heads is None else made.heads.to(device),
    )
    expected, expected_gradients = kinds.reference(made, target)
    loss = inputs.loss(target, "auto")
    expect_near(loss.cpu(), expected, SUM_TOLERANCE)
    for gradient, wanted in zip(torch.autograd.grad(loss, inputs.student), expected_gradients, strict=True):
        expect_near(gradient.cpu(), wanted, TOLERANCE[dtype])


@pytest.mark.parametrize("target", TARGETS)
def test_attention_map_of_equal_models_is_exactly_zero(device, target):
    made = attention.near(attention.make(attention.SAME[1], torch.bfloat16), 0.0)
    student, teacher = ([x.detach().to(device) for x in side] for side in (made.student, made.teacher))
    inputs = made._replace(student=student, teacher=teacher, mask=made.mask.to(device))
    assert inputs.loss(target, "auto").item() == 0.0


# -- vocabulary


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(5, 97), (17, 1001), (37, 30522)])
def test_masked_lm(device, shape, dtype, temperature):
    student, teacher, labels = vocabulary.make_logits(*shape, dtype)
    student, teacher, labels = leaf(student, device), teacher.to(device), labels.to(device)
    found = masked_lm_losses(student, teacher, labels, temperature)
    expected = vocabulary.reference(student, teacher, labels, temperature)
    for one, other in zip(found, expected, strict=True):
        expect_near(one, other, SUM_TOLERANCE)
    gradients = [torch.autograd.grad(0.7 * ce + 1.3 * kl, student)[0] for ce, kl in (found, expected)]
    assert gradients[0].dtype == dtype
    expect_near(*gradients, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_masked_lm_near_the_teacher(device, dtype):
    student, teacher, labels = vocabulary.make_logits(17, 1001, dtype, apart=0.02)
    student, teacher, labels = leaf(student, device), teacher.to(device), labels.to(device)
    _, kl = masked_lm_losses(student, teacher, labels)
    expect_near(kl, vocabulary.reference(student, teacher, labels, 1.0)[1], 5e-3)
    _, same = masked_lm_losses(student, student.detach(), labels)
    assert abs(same.item()) < 1e-5


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linear_masked_lm(device, dtype, temperature):
    heads, labels = vocabulary.make_heads(33, dtype, vocabulary=1001)
    heads = [leaf(x, device) for x in heads[:3]] + [x.to(device) for x in heads[3:]]
    labels, factors = labels.to(device), [factor.to(device) for factor in vocabulary.FACTORS]
    total, *sums = linear_masked_lm_losses(*heads, labels, *factors, temperature, 8)
    expected = vocabulary.linear_reference(heads, labels, temperature)
    # Logits are rounded to the dtype before the losses see them.
    for one, other in zip(sums, expected, strict=True):
        expect_near(one, other, TOLERANCE[dtype])
    scale = 2.0**15  # a loss scale of fp16 training
    expected_total = sum(factor.double() * value for factor, value in zip(factors, expected, strict=True))
    found = torch.autograd.grad(total * scale, heads[:3])
    for one, other in zip(found, torch.autograd.grad(expected_total * scale, heads[:3]), strict=True):
        assert one.dtype == dtype
        expect_near(one, other, 2 * TOLERANCE[dtype])


# -- hidden states


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_hidden_mse(device, side, dtype):
    student, teacher, mask, kept = hidden.make(dtype)
    student, teacher, mask = leaf(student, device), teacher.to(device), mask.to(device)
    weight = hidden.selection(kept, side)
    weight = leaf((weight + 0.1 * torch.randn(weight.shape)).to(dtype), device)
    expected = hidden.reference(student, teacher, mask, weight, side)
    found = hidden_mse(student, teacher, mask, weight, side)
    expect_near(found, expected, TOLERANCE[dtype])
    found, expected = (torch.autograd.grad(value, (student, weight)) for value in (found, expected))
    for one, other in zip(found, expected, strict=True):
        expect_near(one, other, TOLERANCE[dtype])


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_hidden_mse_of_a_selection(device, side):
    student, teacher, mask, kept = hidden.make(torch.bfloat16)
    student, teacher, mask = leaf(student, device), teacher.to(device), mask.to(device)
    found = hidden_mse(student, teacher, mask, None, side, kept.to(device))
    selection = hidden.selection(kept, side).to(device)
    expected = hidden.reference(student, teacher, mask, selection, side)
    expect_near(found, expected, TOLERANCE[torch.bfloat16])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("selects", [False, True], ids=["projection", "selection"])
def test_normalised_hidden_mse(device, side, dtype, selects):
    student, teacher, mask, kept = hidden.make(dtype)
    student, teacher, mask = leaf(student, device), teacher.to(device), mask.to(device)
    weight = hidden.selection(kept, side)
    if not selects:
        weight = weight + 0.1 * torch.randn(weight.shape)
    weight = leaf(weight.to(dtype), device)
    leaves = (student,) if selects else (student, weight)
    expected = normalised.reference(student, teacher, mask, weight, side)
    found = normalised_hidden_mse(
        student, teacher, mask, None if selects else weight, side, kept.to(device) if selects else None
    )
    expect_near(found, expected, TOLERANCE[dtype])
    found, expected = (torch.autograd.grad(value, leaves) for value in (found, expected))
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == dtype
        expect_near(one, other, TOLERANCE[dtype])
