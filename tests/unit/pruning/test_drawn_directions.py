"""Importance of a copy without a head: gradients of every distance are 0, those of drawn directions are not."""

import pytest
import torch
from support.small import small_batch, small_model
from torch.nn.functional import normalize

from homodistil.config.schema import LossConfig
from homodistil.distill.student import Student
from homodistil.distill.teacher import Teacher
from homodistil.models import family_of
from homodistil.pruning.calibration import drawn_direction_loss, drawn_vector_loss
from homodistil.pruning.compensation.vectors import pooled_states


def headless() -> torch.nn.Module:
    model = small_model()
    family_of("bert").drop_head(model)
    return model


def test_a_copy_has_no_gradient_of_its_distances():
    student, batch = Student(headless(), LossConfig(mlm=0.0, kl=0.0)), small_batch()
    student(batch, Teacher(headless())(batch)).total.backward()
    assert all(p.grad is None or not p.grad.any() for p in student.model.parameters())


def test_drawn_directions_see_the_curvature_of_the_distance():
    """One bias, of which the squared distance of the last hidden states is known by finite differences."""
    student, batch = Student(headless(), LossConfig(mlm=0.0, kl=0.0)).eval(), small_batch()
    bias = student.model.bert.encoder.layer[1].intermediate.dense.bias
    loss, squares = drawn_direction_loss(student, seed=3), torch.zeros_like(bias)
    num_draws = 400
    for _ in range(num_draws):
        (gradient,) = torch.autograd.grad(loss(batch), bias)
        squares += (gradient * batch.counts.tokens).square() / num_draws
    for j in (0, 7, 21):
        # The mean of a chi-squared of one degree: a relative error of sqrt(2 / draws), here 7 %; three of these.
        assert squares[j].item() == pytest.approx(_curvature(student, batch, bias, j), rel=0.21)


def test_drawn_vectors_see_the_curvature_of_the_cosine():
    """The squared change of the normalised vectors of texts, which for small changes is twice 1 - cosine."""
    student, batch = Student(headless(), LossConfig(mlm=0.0, kl=0.0)).eval(), small_batch()
    bias = student.model.bert.encoder.layer[1].intermediate.dense.bias
    loss, squares, num_draws = drawn_vector_loss(student, "mean", seed=3), torch.zeros_like(bias), 400
    for _ in range(num_draws):
        (gradient,) = torch.autograd.grad(loss(batch), bias)
        squares += (gradient * len(batch.input_ids)).square() / num_draws

    def unit() -> torch.Tensor:
        with torch.no_grad():
            return normalize(pooled_states(student.model, student.family, batch, "mean"), dim=-1).double()

    for j in (0, 7, 21):
        ends = []
        for step in (1e-3, -2e-3):  # to either side
            with torch.no_grad():
                bias[j] += step
            ends.append(unit())
        with torch.no_grad():
            bias[j] += 1e-3
        curvature = ((ends[0] - ends[1]) / 2e-3).square().sum().item()
        assert squares[j].item() == pytest.approx(curvature, rel=0.21)


def _curvature(student: Student, batch, bias: torch.nn.Parameter, j: int, step: float = 1e-3) -> float:
    """Sum over tokens of the squared change of the last hidden states by a unit of `bias[j]`."""
    ends = []
    for sign in (1, -1):
        with torch.no_grad():
            bias[j] += sign * step
            last = student.model.bert(batch.input_ids, attention_mask=batch.attention_mask).last_hidden_state
            bias[j] -= sign * step
        ends.append(last.double() * batch.attention_mask[..., None])
    return ((ends[0] - ends[1]) / (2 * step)).square().sum().item()
