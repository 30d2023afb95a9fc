"""Terms on the logits of labels against their formulas, one text at a time; through student, teacher and a cut."""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Callable, Collection

import pytest
import torch
from support.small import random_keep, small_batch, small_model
from torch import nn
from transformers import BertForSequenceClassification

from homodistil.config.schema import LossConfig
from homodistil.data.batch import Batch
from homodistil.distill.classifier_files import check_labels
from homodistil.distill.layer_map import LayerMap
from homodistil.distill.losses.active import active_terms
from homodistil.distill.losses.scores import label_divergence
from homodistil.distill.losses.term import BatchSizes
from homodistil.distill.student import Student
from homodistil.distill.teacher import Teacher
from homodistil.errors import UserError
from homodistil.evaluation.scores import compared_scores, scores_of_itself
from homodistil.models.classifier import logit_kind
from homodistil.models.resize_plan import make_plan, slice_module

TERMS = ("scores_kl", "scores_mse")
LABELS = 3
CLOSE = {"rtol": 1e-5, "atol": 1e-6}


def only(**weights: float) -> LossConfig:
    return LossConfig().only(**weights)


def classifier(seed: int = 0, num_labels: int = LABELS, **changes) -> nn.Module:
    config = small_model(**changes).config
    config.num_labels = num_labels
    torch.manual_seed(seed)
    model = BertForSequenceClassification(config).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


def pair_batch() -> Batch:
    """Of texts of several lengths, with a second text each."""
    batch = small_batch(lengths=(7, 11, 4, 5))
    types = batch.attention_mask * (torch.arange(batch.input_ids.shape[1]) > 2)
    return batch._replace(token_types=types.long())


def pair(loss: LossConfig, lock_step: bool = True) -> tuple[Student, Teacher]:
    """A narrower student of 2 layers with weights of its own, and a teacher of 4."""
    sizes = {"hidden_size": 15, "num_attention_heads": 3, "intermediate_size": 20, "num_hidden_layers": 2}
    student = Student(classifier(5, **sizes), loss, layer_map=LayerMap(24, 4, (1, 3), is_origin=False))
    return student, Teacher(classifier(num_hidden_layers=4), lock_step)


def stock_logits(model: nn.Module, batch: Batch) -> torch.Tensor:
    model.set_attn_implementation("eager")
    inputs = {"attention_mask": batch.attention_mask, "token_type_ids": batch.token_types}
    return model.double()(batch.input_ids, **inputs).logits


def naive_term(name: str, ours: torch.Tensor, theirs: torch.Tensor, temperature: float) -> torch.Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for a, b in zip(ours, theirs, strict=True):
        if name == "scores_mse":
            total = total + sum((x - y) ** 2 for x, y in zip(a, b, strict=True)) / len(a)
            continue
        p, q = ([torch.exp(x / temperature) for x in side] for side in (b, a))
        p, q = ([x / sum(side) for x in side] for side in (p, q))
        total = total + temperature**2 * sum(x * torch.log(x / y) for x, y in zip(p, q, strict=True))
    return total / len(ours)


def check_term(
    models: tuple[Student, Teacher], batch: Batch, name: str, temperature: float, logits_of: Callable
) -> Collection[str]:
    """A term of weight 2 and its gradients are those of the formula. Returns the parameters that have one.

    Args:
        logits_of: stock model and batch -> the logits that are compared, float64.
    """
    student, teacher = models
    outcome = student(batch, teacher(batch))
    outcome.total.backward()
    gradients = {n: p.grad.double() for n, p in student.named_parameters() if p.grad is not None}
    student.zero_grad()
    ours, theirs = logits_of(student.model, batch), logits_of(teacher.model, batch)
    expected = naive_term(name, ours, theirs.detach(), temperature)
    torch.testing.assert_close(outcome.terms[name].double(), expected.detach(), **CLOSE)
    (2 * expected).backward()
    reference = {n: p.grad for n, p in student.named_parameters() if p.grad is not None}
    assert gradients.keys() == reference.keys()
    largest = max(gradient.abs().max() for gradient in reference.values())
    for parameter, gradient in reference.items():
        assert (gradients[parameter] - gradient).abs().max() <= 2e-5 * largest, parameter
    return gradients.keys()


@pytest.mark.parametrize("name", TERMS)
@pytest.mark.parametrize(("temperature", "lock_step"), [(1.0, True), (2.5, False)])
def test_terms_are_their_formulas(name, temperature, lock_step):
    loss = dataclasses.replace(only(**{name: 2.0}), scores_temperature=temperature)
    (student, teacher), batch = pair(loss, lock_step), pair_batch()
    trained = check_term((student, teacher), batch, name, temperature, stock_logits)
    assert "model.bert.pooler.dense.weight" in trained


@pytest.mark.parametrize("name", TERMS)
def test_a_copy_is_at_distance_0_and_both_may_be_taken(name):
    student, batch = Student(classifier(), only(**dict.fromkeys(TERMS, 1.0))), pair_batch()
    for lock_step in (True, False):
        terms = student(batch, Teacher(classifier(), lock_step)(batch)).terms
        assert set(terms) == set(TERMS) and abs(terms[name]) < 1e-6
    assert student(batch, pair(only(**{name: 1.0}))[1](batch)).terms[name] > 1e-3


def test_a_cut_takes_the_neurons_of_the_head_that_its_own_axis_says():
    student = Student(classifier(), only(scores_kl=1.0))
    before, table = copy.deepcopy(student.model), student.axis_table()
    keep = random_keep(table, {"hidden": 17, "classifier": 9}, seed=3)
    slice_module(student, make_plan(table, keep))
    student.after_resize(keep)
    dense, decoder = student.model.bert.pooler.dense, student.model.classifier
    rows = keep["classifier"]
    assert torch.equal(dense.weight, before.bert.pooler.dense.weight[rows][:, keep["hidden"]])
    assert torch.equal(dense.bias, before.bert.pooler.dense.bias[rows])
    assert torch.equal(decoder.weight, before.classifier.weight[:, rows])
    assert (dense.in_features, dense.out_features, decoder.in_features) == (17, 9, 9)
    assert student.scores(pair_batch()).shape == (4, LABELS)


def test_costs():
    widths = {"hidden": 15, "classifier": 13, "layer.0.ffn": 1}, {"hidden": 24, "classifier": 22, "layer.0.ffn": 1}
    sizes = BatchSizes(*widths, num_sequences=6, seq_len=13, target_rows=0, vocab_size=101, student_bytes=2)
    for name in TERMS:
        (term,) = active_terms(only(**{name: 1.0}))
        assert term.flops(sizes) == 3 * 2 * 6 * 15 * 13 + 2 * 6 * 24 * 22
        assert term.saved_bytes(sizes) == 6 * (15 + 2 * 13) * 2


def test_measures_on_held_out_texts():
    theirs = torch.tensor([[1.0, 2.0, 0.0], [0.0, 3.0, 1.0], [5.0, 0.0, 0.0], [0.0, 0.5, 0.0]])
    ours = theirs.flip(0) * 0.5
    measured = compared_scores(ours, theirs, "categories")
    expected = naive_term("scores_kl", ours.double(), theirs.double(), 1.0)
    assert measured["kl_to_teacher"] == pytest.approx(float(expected)) and measured["label_agreement"] == 0.5
    assert measured["kl_to_teacher"] == pytest.approx(float(label_divergence(ours.double(), theirs.double())))
    scores, estimates = torch.tensor([[0.0], [1.0], [2.0], [9.0]]), torch.tensor([[0.1], [0.4], [0.2], [0.9]])
    measured = compared_scores(estimates, scores, "values")
    assert measured["score_spearman"] == pytest.approx(0.8) and 0.8 < measured["score_pearson"] < 1
    assert measured["score_mse"] == pytest.approx(((scores - estimates) ** 2).mean().item())
    assert compared_scores(torch.ones(3, 1), scores[:3], "values").keys() == {"score_mse"}
    for kind, logits in (("categories", ours), ("values", ours)):
        itself = compared_scores(logits, logits, kind)
        assert itself == pytest.approx(scores_of_itself(kind), abs=1e-9)


@pytest.mark.parametrize(
    ("fields", "kind"),
    [
        ({"num_labels": 3}, "categories"),
        ({"num_labels": 1}, "values"),
        ({"num_labels": 3, "problem_type": "multi_label_classification"}, "values"),
        ({"num_labels": 3, "problem_type": "regression"}, "values"),
        ({"num_labels": 2, "problem_type": "single_label_classification"}, "categories"),
    ],
)
def test_what_logits_are(fields, kind):
    config = small_model().config
    for name, value in fields.items():
        setattr(config, name, value)
    assert logit_kind(config) == kind


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"id2label": {0: "a", 2: "b"}}, "has id2label with the numbers [0, 2], expected 0 .. 1 without gaps"),
        ({"id2label": {}}, "has id2label with the numbers []"),
        ({"label2id": {"a": 1, "b": 0}}, "id2label and label2id that contradict each other at 'a' (number [0] and 1)"),
        ({"label2id": {"a": 0}}, "contradict each other at 'b' (number [1] and None)"),
        ({"id2label": {0: "a", 1: "a"}, "label2id": {"a": 1}}, "contradict each other at 'a' (number [0, 1] and 1)"),
        ({"architectures": ["BertForPreTraining"]}, "has no head of labels that data.task=scores could learn from"),
        ({"architectures": None}, "(found no architectures in its config.json, expected ...ForSequenceClassification"),
    ],
)
def test_labels_that_cannot_be_read(fields, said):
    config = classifier(num_labels=2).config
    usual = {"architectures": ["BertForSequenceClassification"], "id2label": {0: "a", 1: "b"}}
    for name, value in (usual | {"label2id": {"a": 0, "b": 1}}).items():
        setattr(config, name, value)
    check_labels(config, "my-teacher")
    for name, value in fields.items():
        setattr(config, name, value)
    with pytest.raises(UserError, match=re.escape(said)) as caught:
        check_labels(config, "my-teacher")
    assert str(caught.value).startswith("teacher.name: 'my-teacher'") and "\n" not in str(caught.value)
