"""The teacher beside the student: the same numbers in lock-step as after a whole pass, and nothing kept for longer."""

import weakref

import pytest
import torch
from support.small import random_keep, small_batch, small_model

from homodistil.config.schema import LossConfig
from homodistil.distill.losses.vocabulary import Vocabulary
from homodistil.distill.student import Student
from homodistil.distill.teacher import Teacher
from homodistil.distill.teacher_outputs import Layerwise, WholePass
from homodistil.kernels.attention_map import TARGETS
from homodistil.models.resize_plan import make_plan, slice_module

NARROW = {"hidden": 19, "layer.0.ffn": 21, "layer.1.heads": 3, "layer.2.qk_dim": 5, "layer.2.vo_dim": 5}


def _student(config):
    student = Student(small_model(seed=1), config)
    plan = make_plan(student.axis_table(), random_keep(student.axis_table(), NARROW))
    slice_module(student, plan)
    student.after_resize(plan.keep)
    return student


@pytest.mark.parametrize("positions", ["masked", "all"])
@pytest.mark.parametrize("target", TARGETS)
def test_lock_step_changes_no_bit(positions, target):
    config, batch = LossConfig(kl=1.0, kl_positions=positions, attention_target=target), small_batch()
    found = []
    for lock_step in (True, False):
        student, teacher = _student(config), Teacher(small_model(), lock_step)
        total, terms = student(batch, teacher(batch))
        total.backward()
        found.append((total, terms, {name: p.grad for name, p in student.named_parameters()}))
    (total, terms, gradients), (expected_total, expected_terms, expected_gradients) = found
    assert torch.equal(total, expected_total) and terms.keys() == expected_terms.keys()
    assert all(torch.equal(terms[name], expected_terms[name]) for name in terms)
    assert all(torch.equal(gradients[name], expected_gradients[name]) for name in gradients)


@pytest.mark.parametrize(("lock_step", "source"), [(True, Layerwise), (False, WholePass)])
def test_a_layer_of_the_teacher_is_gone_when_the_next_is_compared(lock_step, source, monkeypatch):
    """Its queries and keys at once, its output once the next layer has read it."""
    seen, alive = [], []
    take = source.take_layer

    def watched(self, i):
        alive.append([name for name, ref in seen if ref() is not None])
        tap = take(self, i)
        seen.extend(
            (f"{field}.{i}", weakref.ref(tensor)) for field, tensor in tap._asdict().items() if tensor is not None
        )
        return tap

    monkeypatch.setattr(source, "take_layer", watched)
    student, teacher, batch = _student(LossConfig(kl=1.0)), Teacher(small_model(), lock_step), small_batch()
    total = student(batch, teacher(batch)).total
    assert alive == [[], [], []]
    total.backward()


def test_terms_without_a_layer_comparison_still_drive_the_teacher():
    """KL alone needs the teacher's last layer, which in lock-step only the student's own pass brings about."""
    config, batch = LossConfig(kl=1.0, hidden=0.0, attention=0.0, embedding=0.0, mlm=0.0), small_batch()
    student = Student(small_model(seed=1), config)
    values = [student(batch, Teacher(small_model(), lock_step)(batch)).total for lock_step in (True, False)]
    assert torch.equal(*values) and values[0] > 0


@pytest.mark.parametrize("projection", ["student", "teacher"])
def test_a_frozen_projection_is_the_selection_that_it_was_cut_from(projection):
    """Gathered dims against the product with W, sliced as often as the student: the same terms and gradients."""
    batch, found = small_batch(), []
    for learned in (False, True):
        student = _student(LossConfig(projection=projection, projection_learned=learned, mlm=0.0, kl=0.0))
        total, terms = student(batch, Teacher(small_model())(batch))
        total.backward()
        found.append((terms, student.model.bert.embeddings.word_embeddings.weight.grad))
    for name, value in found[0][0].items():
        torch.testing.assert_close(value, found[1][0][name], rtol=1e-5, atol=1e-7)  # fp32, another order of sums
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-4, atol=1e-6)


def test_kl_on_all_tokens_is_taken_on_masked_rows_where_it_has_no_weight():
    assert Vocabulary(LossConfig(kl_positions="all")).positions == "all"
    assert Vocabulary(LossConfig(kl_positions="all", kl=0.0)).positions == "masked"
