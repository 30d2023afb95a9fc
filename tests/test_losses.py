"""Loss terms against naive loops in float64: values and gradients, padding, odd shapes."""

import math

import pytest
import torch

from homodistil.distill import losses

# fp32 sums of some hundred terms against float64.
FP32 = {"rtol": 2e-5, "atol": 1e-5}
# bf16 inputs are exact copies on both sides; the functions compute in fp32.
TOLERANCE = {torch.float32: FP32, torch.bfloat16: FP32}


def _random(shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _compare(function, reference, inputs, dtype):
    """Value and gradient of `function` on `inputs` (first one differentiable) against `reference` in float64."""
    ours = [inputs[0].clone().requires_grad_(True), *inputs[1:]]
    theirs = [
        inputs[0].double().requires_grad_(True),
        *(x.double() if x.is_floating_point() else x for x in inputs[1:]),
    ]
    value, expected = function(*ours), reference(*theirs)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value.double(), expected, **TOLERANCE[dtype])
    value.backward()
    expected.backward()
    grad_tolerance = FP32 if dtype == torch.float32 else {"rtol": 1e-2, "atol": 1e-3}  # gradient rounded to bf16
    torch.testing.assert_close(ours[0].grad.double(), theirs[0].grad, **grad_tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows, vocab", [(1, 7), (5, 31), (13, 101)])
def test_mlm(rows, vocab, dtype):
    labels = torch.arange(rows) * 3 % vocab

    def reference(logits):
        return sum(torch.logsumexp(row, 0) - row[label] for row, label in zip(logits, labels, strict=True))

    _compare(lambda logits: losses.mlm(logits, labels), reference, [_random((rows, vocab), dtype) * 3], dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_logit_kl(temperature, dtype):
    student, teacher = _random((7, 31), dtype) * 2, _random((7, 31), dtype, seed=1) * 2

    def reference(student, teacher):
        p, q = (teacher / temperature).softmax(-1), (student / temperature).softmax(-1)
        return temperature**2 * (p * (p.log() - q.log())).sum()

    _compare(lambda s, t: losses.logit_kl(s, t, temperature), reference, [student, teacher], dtype)


def test_logit_kl_is_zero_for_the_teacher_itself():
    logits = _random((9, 50))
    assert losses.logit_kl(logits, logits.clone(), 1.0).item() == 0.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hidden_mse_leaves_padding_out(dtype):
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0]])
    student, teacher = _random((3, 5, 7), dtype), _random((3, 5, 7), dtype, seed=1)

    def reference(student, teacher):
        valid = [(b, t) for b in range(3) for t in range(5) if mask[b, t]]
        return sum(((student[b, t] - teacher[b, t]) ** 2).sum() / 7 for b, t in valid)

    _compare(lambda s, t: losses.hidden_mse(s, t, mask), reference, [student, teacher], dtype)


@pytest.mark.parametrize("target", ["scores", "probabilities"])
def test_attention_mse_leaves_padding_out(target):
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
    student, teacher = _random((2, 3, 4, 4)), _random((2, 3, 4, 4), seed=1)

    def row(scores, b, head, q):
        keys = [k for k in range(4) if mask[b, k]]
        values = torch.stack([scores[b, head, q, k] for k in keys])
        return values.softmax(0) if target == "probabilities" else values

    def reference(student, teacher):
        total = 0
        for b in range(2):
            for head in range(3):
                for q in range(4):
                    if mask[b, q]:
                        total = total + ((row(student, b, head, q) - row(teacher, b, head, q)) ** 2).sum() / 3
        return total

    _compare(lambda s, t: losses.attention_mse(s, t, mask, target), reference, [student, teacher], torch.float32)


def test_attention_scores_are_scaled_products():
    queries, keys = _random((2, 3, 5, 7)), _random((2, 3, 5, 7), seed=1)
    scores = losses.attention_scores(queries, keys, 1 / math.sqrt(7))
    expected = sum(queries[1, 2, 4, d] * keys[1, 2, 3, d] for d in range(7)) / math.sqrt(7)
    torch.testing.assert_close(scores[1, 2, 4, 3], expected, **FP32)
