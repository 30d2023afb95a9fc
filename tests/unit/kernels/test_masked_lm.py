"""CE and KL over the vocabulary against float64 references, in plain torch and in Triton's interpreter."""

from __future__ import annotations

import contextlib
import itertools

import pytest
import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from homodistil.kernels.masked_lm import linear_masked_lm_losses, masked_lm_losses

# What remains of fp32 arithmetic is the rounding of the gradient to its dtype: a unit in the last place, in norm (half
# a unit in hardware; Triton's interpreter drops the digits of bf16).
GRADIENT_TOLERANCE = {
    torch.float64: 1e-12,
    torch.float32: 5e-6,
    torch.bfloat16: 2.0**-7,
    torch.float16: 2.0**-10,
}
# Logits of the linear form are rounded to the dtype before the losses see them.
LINEAR_TOLERANCE = GRADIENT_TOLERANCE | {torch.bfloat16: 2e-2, torch.float16: 2e-3}
INTERPRETED = pytest.mark.interpreted
FORMS = [pytest.param("torch", id="torch"), pytest.param("triton", id="triton", marks=INTERPRETED)]
SOME = [(torch.float32, 1.0), (torch.bfloat16, 2.0), (torch.float16, 1.0)]
"""The interpreter is slow: each dtype at one temperature, and `make test-full` has the others."""


def with_forms(dtypes: list[torch.dtype]) -> list:
    """(dtype, temperature, form): all in torch, `SOME` in Triton."""
    both = list(itertools.product(dtypes, (1.0, 2.0)))
    in_triton = [pair for pair in both if pair[0] != torch.float64]  # kernels compute in fp32
    marks = {pair: [INTERPRETED] if pair in SOME else [INTERPRETED, pytest.mark.full] for pair in in_triton}
    return [(*pair, "torch") for pair in both] + [pytest.param(*pair, "triton", marks=m) for pair, m in marks.items()]


def reference(student, teacher, labels, temperature):
    """float64 sums, written with log_softmax."""
    student, teacher = student.double(), teacher.double()
    ce = functional.cross_entropy(student, labels, reduction="sum", ignore_index=-100)
    log_q = functional.log_softmax(student / temperature, -1)
    log_p = functional.log_softmax(teacher / temperature, -1)
    return ce, (log_p.exp() * (log_p - log_q)).sum() * temperature**2


def make_logits(num_rows: int, vocabulary: int, dtype: torch.dtype, apart: float = 1.0):
    torch.manual_seed(num_rows + vocabulary)
    student = (torch.randn(num_rows, vocabulary) * 3).to(dtype)
    teacher = (student.float() + apart * torch.randn(num_rows, vocabulary)).to(dtype)
    labels = torch.randint(vocabulary, (num_rows,))
    labels[1::3] = -100
    return student.requires_grad_(), teacher, labels


def expect_near(found, expected, tolerance: float) -> None:
    """Relative distance of the norms' difference; where the reference is zero so must the other be."""
    distance, size = (found.double() - expected.double()).norm(), expected.double().norm()
    assert distance <= tolerance * size, (distance / size).item()


@pytest.mark.parametrize("dtype, temperature, form", with_forms([torch.float32, torch.bfloat16, torch.float16]))
@pytest.mark.parametrize("shape", [(1, 97), (17, 1001), (2, 5000)])
def test_values_and_gradient(shape, dtype, temperature, form):
    student, teacher, labels = make_logits(*shape, dtype)
    found = masked_lm_losses(student, teacher, labels, temperature, form)
    expected = reference(student, teacher, labels, temperature)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == torch.float32 and one.shape == ()
        expect_near(one, other, 1e-6)
    alone = [(0.0, 1.0), (1.0, 0.0)] if dtype == torch.float32 else []
    for factors in [(0.7, 1.3), *alone]:
        gradients = [
            torch.autograd.grad(factors[0] * ce + factors[1] * kl, student, retain_graph=True)[0]
            for ce, kl in (found, expected)
        ]
        assert gradients[0].dtype == dtype
        expect_near(*gradients, GRADIENT_TOLERANCE[dtype])


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_many_blocks_of_rows(temperature):
    """130 rows of a real vocabulary are several blocks, the last one not full."""
    student, teacher, labels = make_logits(130, 30522, torch.float32)
    found = masked_lm_losses(student, teacher, labels, temperature)
    expected = reference(student, teacher, labels, temperature)
    for one, other in zip(found, expected, strict=True):
        expect_near(one, other, 1e-6)
    gradients = [torch.autograd.grad(0.7 * ce + 1.3 * kl, student)[0] for ce, kl in (found, expected)]
    expect_near(*gradients, 3e-6)  # torch's softmax over 30522 terms is this good


def test_float64_is_exact():
    student, teacher, labels = make_logits(5, 97, torch.float64)
    for temperature in (1.0, 2.0):
        assert torch.autograd.gradcheck(lambda s, t=temperature: masked_lm_losses(s, teacher, labels, t), student)


@pytest.mark.parametrize("form", FORMS)
def test_without_teacher_and_without_labels(form):
    student, teacher, labels = make_logits(5, 97, torch.float32)
    ce, kl = masked_lm_losses(student, None, labels, implementation=form)
    expected, _ = reference(student, teacher, labels, 1.0)
    assert kl is None
    expect_near(ce, expected, 1e-6)
    expect_near(torch.autograd.grad(ce, student)[0], torch.autograd.grad(expected, student)[0], 1e-6)
    nothing = torch.full_like(labels, -100)
    ce, kl = masked_lm_losses(student, teacher, nothing, implementation=form)
    assert ce == 0 and kl > 0
    assert torch.autograd.grad(ce, student)[0].count_nonzero() == 0
    empty = masked_lm_losses(student[:0], teacher[:0], labels[:0], implementation=form)
    assert [value.item() for value in empty] == [0, 0]


@pytest.mark.parametrize("dtype, temperature, form", with_forms([torch.float32, torch.bfloat16]))
def test_near_the_teacher(dtype, temperature, form):
    """The KL of near-identical models is 1e-5 of the logits' size: nothing may be lost in differences."""
    student, teacher, labels = make_logits(17, 1001, dtype, apart=0.02)
    _, kl = masked_lm_losses(student, teacher, labels, temperature, form)
    _, expected = reference(student, teacher, labels, temperature)
    expect_near(kl, expected, 2e-3)
    _, same = masked_lm_losses(student, student.detach(), labels, temperature, form)
    assert abs(same.item()) < 1e-6
    gradient = torch.autograd.grad(same, student)[0]
    assert gradient.count_nonzero() == 0


def test_more_accurate_than_the_usual_formula():
    """Several pairs of models near each other, as the error of one sum may happen to be small."""
    errors = {"ours": [], "usual": []}
    for apart in torch.linspace(0.02, 0.2, 6).tolist():
        student, teacher, labels = make_logits(24, 30522, torch.float32, apart)
        _, right = reference(student, teacher, labels, 1.0)
        _, ours = masked_lm_losses(student, teacher, labels)
        log_q, log_p = student.log_softmax(-1), teacher.log_softmax(-1)
        usual = (log_p.exp() * (log_p - log_q)).sum(-1).sum()
        errors["ours"].append(abs(ours - right) / right)
        errors["usual"].append(abs(usual - right) / right)
    assert sum(errors["ours"]) < 0.7 * sum(errors["usual"])


@pytest.mark.parametrize("form", FORMS)
def test_gradient_over_the_logits(form):
    leaf, teacher, labels = make_logits(5, 97, torch.float32)
    (expected,) = torch.autograd.grad(sum(masked_lm_losses(leaf, teacher, labels, 1.0, form)), leaf)
    logits = leaf * 1.0
    total = sum(masked_lm_losses(logits, teacher, labels, 1.0, form, overwrite=True))
    (found,) = torch.autograd.grad(total, leaf, retain_graph=True)
    assert torch.equal(found, expected)
    assert torch.equal(logits, expected), "the logits' memory was not used"
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(total, leaf)
    before = leaf.detach().clone()
    sum(masked_lm_losses(leaf, teacher, labels, 1.0, form, overwrite=True)).backward()
    assert torch.equal(leaf, before) and torch.equal(leaf.grad, expected)


def make_heads(num_rows: int, dtype: torch.dtype, bias: bool = True, vocabulary: int = 97):
    """(rows, weight, bias) of a student with 12 dims and a teacher with 20, and labels."""
    torch.manual_seed(num_rows)
    heads = []
    for hidden in (12, 20):
        rows, weight = torch.randn(num_rows, hidden), torch.randn(vocabulary, hidden)
        heads += [rows.to(dtype), weight.to(dtype), torch.randn(vocabulary).to(dtype) if bias else None]
    labels = torch.randint(vocabulary, (num_rows,))
    labels[torch.rand(num_rows) > 0.2] = -100
    for leaf in filter(torch.is_tensor, heads[:3]):
        leaf.requires_grad_()
    return heads, labels


def linear_reference(heads, labels, temperature):
    logits = [
        functional.linear(*(None if tensor is None else tensor.double() for tensor in head))
        for head in (heads[:3], heads[3:])
    ]
    return reference(*logits, labels, temperature)


FACTORS = torch.tensor(1 / 7e4), torch.tensor(0.5 / 33e4)
"""Means over a large step: products with them would be lost in fp16."""


@pytest.mark.parametrize("dtype, temperature, form", with_forms(list(GRADIENT_TOLERANCE)))
def test_linear_values_and_gradients(dtype, temperature, form):
    heads, labels = make_heads(33, dtype)
    total, *sums = linear_masked_lm_losses(*heads, labels, *FACTORS, temperature, 8, form)
    expected = linear_reference(heads, labels, temperature)
    for one, other in zip(sums, expected, strict=True):
        assert not one.requires_grad
        expect_near(one, other, max(LINEAR_TOLERANCE[dtype] / 10, 1e-6))
    scale = 2.0**15  # a loss scale of fp16 training
    expected_total = sum(factor.double() * value for factor, value in zip(FACTORS, expected, strict=True))
    expect_near(total, expected_total, max(LINEAR_TOLERANCE[dtype] / 10, 1e-6))
    found = torch.autograd.grad(total * scale, heads[:3])
    for one, other in zip(found, torch.autograd.grad(expected_total * scale, heads[:3]), strict=True):
        assert one.dtype == dtype
        expect_near(one, other, max(LINEAR_TOLERANCE[dtype], 1e-8))


def test_linear_gradients_below_the_range_of_fp16():
    """Every q - p is about 1e-6, and the factor takes it to 1e-11; fp16 ends at 6e-8. Reference: from equal logits."""
    torch.manual_seed(0)
    rows, weight = torch.randn(3, 12).half(), (0.05 * torch.randn(30522, 12)).half()
    teacher_rows = (rows + 0.3 * torch.randn(3, 12)).half()
    labels, factors = torch.full((3,), -100), (torch.tensor(1e-6), torch.tensor(1e-5))
    leaves = [rows.requires_grad_(), weight.requires_grad_()]
    total, _, _ = linear_masked_lm_losses(*leaves, None, teacher_rows, weight.detach(), None, labels, *factors)
    scale = 2.0**26  # the results themselves are in range
    found = torch.autograd.grad(total * scale, leaves)
    q, p = (functional.linear(x.detach(), weight.detach()).double().softmax(-1) for x in (rows, teacher_rows))
    difference = (q - p) * factors[1].double() * scale
    expect_near(found[0], difference @ weight.double(), 2e-3)
    expect_near(found[1], difference.t() @ rows.double(), 2e-3)


@pytest.mark.parametrize("num_rows", [0, 1, 17, 130])
def test_linear_chunks_do_not_matter(num_rows):
    heads, labels = make_heads(num_rows, torch.float32, bias=False)
    results = []
    for chunk_rows in (1000, 16):
        total, ce, kl = linear_masked_lm_losses(*heads, labels, *FACTORS, 1.0, chunk_rows)
        results.append([total, ce, kl, *torch.autograd.grad(total, heads[:2])])
    for one, other in zip(*results, strict=True):
        expect_near(one, other, 1e-6)


def test_linear_without_labels():
    heads, labels = make_heads(17, torch.float32)
    total, ce, kl = linear_masked_lm_losses(*heads, torch.full_like(labels, -100), *FACTORS)
    assert ce == 0
    expect_near(total, kl * FACTORS[1], 1e-6)


def test_linear_makes_only_the_gradients_wanted():
    heads, labels = make_heads(17, torch.float32)
    with torch.no_grad():
        total, _, _ = linear_masked_lm_losses(*heads, labels, *FACTORS)
    assert not total.requires_grad
    heads[1].requires_grad_(False)
    heads[2].requires_grad_(False)
    with Largest() as made:
        total, _, _ = linear_masked_lm_losses(*heads, labels, *FACTORS, 1.0, 1)
        (found,) = torch.autograd.grad(total, heads[:1])
    assert made.numel < heads[1].numel(), "a gradient of the weight was made"
    expected = sum(f.double() * v for f, v in zip(FACTORS, linear_reference(heads, labels, 1.0), strict=True))
    expect_near(found, torch.autograd.grad(expected, heads[0])[0], 1e-6)


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation has made (views of what it was given are not made)."""

    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        given = {
            tensor.untyped_storage().data_ptr() for tensor in tree_leaves((args, kwargs)) if torch.is_tensor(tensor)
        }
        for tensor in filter(torch.is_tensor, tree_leaves(result)):
            if tensor.untyped_storage().data_ptr() not in given:
                self.numel = max(self.numel, tensor.numel())
        return result


@pytest.mark.parametrize("context", [contextlib.nullcontext(), torch.autocast("cpu", torch.bfloat16)])
def test_linear_never_holds_more_than_a_chunk(context):
    """Also inside of autocast, which changes nothing."""
    heads, labels = make_heads(300, torch.float32, vocabulary=1001)
    plain_total, _, _ = linear_masked_lm_losses(*heads, labels, *FACTORS)
    with Largest() as made, context:
        total, _, _ = linear_masked_lm_losses(*heads, labels, *FACTORS, 1.0, 25)
        total.backward()
    num_buffers = 4
    assert made.numel <= num_buffers * 25 * 1001
    assert total.dtype == torch.float32
    expect_near(total, plain_total, 1e-6)
