"""What one event does to a student that has been trained for some steps, for every family, with the product's defaults:
no term of the loss rises more than tenfold, and neither does the norm of the gradient.

The configurations are those of cases.py. What an event leaves is drawn at random: a selection by importance is kinder.
"""

from __future__ import annotations

import copy

import pytest
import torch
from families.cases import CASES, batch_of, make_model, token_ids
from families.test_conformance import cut_to
from support.small import random_keep

from homodistil.config.schema import LossConfig, RunConfig
from homodistil.distill.losses.settled import settled
from homodistil.distill.student import Student
from homodistil.distill.teacher import Teacher
from homodistil.models import family_of
from homodistil.models.axes import Keep, kind_of
from homodistil.models.resize_plan import make_plan
from homodistil.pruning.compensation import Options
from homodistil.pruning.compensation.student import EventChange, propose
from homodistil.training.event_rise import MOST_RISE
from homodistil.training.settle import settle
from homodistil.training.shrinkable import PlainStudent

BATCHES = [batch_of(token_ids(8, seed)) for seed in range(4)]
HELD_OUT = batch_of(token_ids(8, 99))
STEPS, LR = 12, 2e-3
DIM, FACTOR = 7, 1e3
"""A massive activation: one dim of what the MLP of the first layer puts out, and what it is multiplied with."""


def narrower(student: Student) -> dict[str, int]:
    """Four fifths of every axis; positions that rotate in pairs stay."""
    fixed = ("qk_dim", "vo_dim", "head_norm") if student.family.architecture.has_rotary_positions else ()
    widths = student.axis_table().widths
    return {axis: max(1, 4 * width // 5) for axis, width in widths.items() if kind_of(axis) not in fixed and width > 1}


def trained(student: Student, teacher: Teacher) -> Student:
    """After some steps of plain AdamW."""
    optimizer = torch.optim.AdamW(student.parameters(), lr=LR)
    for step in range(STEPS):
        batch = BATCHES[step % len(BATCHES)]
        optimizer.zero_grad()
        student(batch, teacher(batch)).total.backward()
        optimizer.step()
    return student


def terms_and_norm(student: Student, teacher: Teacher) -> dict[str, float]:
    """Each term of the loss on held-out text, and the norm of the whole gradient."""
    student.zero_grad()
    losses = student(HELD_OUT, teacher(HELD_OUT))
    losses.total.backward()
    gradients = [p.grad for p in student.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    return {name: float(losses.terms[name]) for name in student.objective.weights} | {"gradient norm": float(norm)}


def event(student: Student, compensation: str, keep: Keep | None = None) -> Student:
    """A fifth of every axis goes, or what is not in `keep`, as the product makes an event of it."""
    keep = keep or random_keep(student.axis_table(), narrower(student), seed=9)
    if compensation == "none":
        return PlainStudent(student).after(EventChange(make_plan(student.axis_table(), keep)))
    fixed = torch.empty(0, dtype=torch.int64)
    return PlainStudent(student).after(propose(student, keep, BATCHES, Options(mode=compensation), fixed))


def default_compensation(model_type: str) -> str:
    config = RunConfig()
    settle(config, CASES[model_type].make_config())
    return config.pruning.compensation


@pytest.mark.parametrize("is_default", [False, True], ids=["selection", "default"])
@pytest.mark.parametrize("model_type", sorted(CASES))
def test_no_term_and_no_gradient_rises_more_than_tenfold(model_type, is_default):
    loss = settled(LossConfig(kl=4.0), family_of(model_type).architecture)
    teacher, whole = Teacher(make_model(model_type)), Student(make_model(model_type), loss)
    student = trained(cut_to(model_type, narrower(whole), loss), teacher)
    before = terms_and_norm(student, teacher)
    after = terms_and_norm(event(student, default_compensation(model_type) if is_default else "none"), teacher)
    assert student.widths["hidden"] < 0.7 * whole.widths["hidden"] < whole.widths["hidden"]
    rises = {name: after[name] / before[name] for name in before}
    assert set(rises) == {"mlm", "kl", "hidden", "attention", "embedding", "gradient norm"}
    assert max(rises.values()) <= MOST_RISE, rises


@pytest.mark.parametrize("space", ["raw", "normalised"])
def test_a_massive_activation_that_goes_raises_raw_states_alone(space):
    """What the default prevents: pre-norm streams are compared in normalised form."""
    model = make_model("llama")
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[DIM] *= FACTOR
    loss = settled(LossConfig(kl=4.0, hidden_space=space), family_of("llama").architecture)
    teacher, student = Teacher(copy.deepcopy(model)), trained(Student(model, loss), Teacher(copy.deepcopy(model)))
    before = terms_and_norm(student, teacher)
    rest = torch.tensor([i for i in range(student.widths["hidden"]) if i != DIM])
    after = terms_and_norm(event(student, "none", {"hidden": rest}), teacher)
    assert (after["hidden"] > MOST_RISE * before["hidden"]) == (space == "raw")
