"""The term against ground-truth labels, and its gradients, against formulas of one text at a time."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn
from unit.distill.test_score_losses import CLOSE, LABELS, classifier, only, pair_batch, stock_logits

from homodistil.data.batch import Batch
from homodistil.data.prefetch import mean_counts
from homodistil.distill.layer_map import LayerMap
from homodistil.distill.losses.active import active_terms
from homodistil.distill.losses.labels import label_loss
from homodistil.distill.losses.term import BatchSizes
from homodistil.distill.student import Student
from homodistil.distill.teacher import Teacher
from homodistil.models.classifier import problem_type

NONE = math.nan
KINDS = {
    "single_label_classification": [[2], [NONE], [0], [1], [NONE], [2]],
    "regression": [[0.5, -1, 3], [NONE] * 3, [2, 2, 2], [1, 0, -7], [0.25, 4, 1], [NONE] * 3],
    "multi_label_classification": [[1, 0, 1], [0, 0, 0], [NONE] * 3, [1, 1, 1], [NONE] * 3, [0, 0.5, 1]],
}


def naive(logits: torch.Tensor, labels: list[list[float]], kind: str) -> torch.Tensor:
    """The mean over texts that have a label, as HF's classes take it over the others."""
    losses = []
    for scores, label in zip(logits, labels, strict=True):
        if math.isnan(label[0]):
            continue
        if kind == "single_label_classification":
            losses.append(-torch.log(torch.exp(scores[int(label[0])]) / sum(torch.exp(score) for score in scores)))
        elif kind == "regression":
            losses.append(sum((a - b) ** 2 for a, b in zip(scores, label, strict=True)) / len(label))
        else:
            probabilities = [1 / (1 + torch.exp(-score)) for score in scores]
            terms = (b * torch.log(p) + (1 - b) * torch.log(1 - p) for p, b in zip(probabilities, label, strict=True))
            losses.append(-sum(terms) / len(label))
    return sum(losses) / len(losses)


def labelled(batch: Batch, labels: list[list[float]]) -> Batch:
    rows = np.array(labels, dtype=np.float32)
    return batch.with_labels(rows, np.arange(len(rows)))


@pytest.mark.parametrize("kind", KINDS)
def test_micro_batches_of_any_size_and_number_of_labels_make_the_mean_over_the_step(kind):
    """Of four micro-batches of different sizes, one without any label; divided by the mean number, and averaged."""
    labels = KINDS[kind]
    logits = torch.randn(len(labels), LABELS, generator=torch.Generator().manual_seed(1)).requires_grad_()
    parts = [[0, 3], [1], [2], [4, 5]]
    rows = [i for part in parts for i in part]
    num = [sum(not math.isnan(labels[i][0]) for i in part) for part in parts]
    means = torch.tensor(num).float().mean()
    total = sum(label_loss(logits[p], torch.tensor([labels[i] for i in p]).float(), kind) / means for p in parts) / len(
        parts
    )
    expected = naive(logits.double()[rows], [labels[i] for i in rows], kind)
    torch.testing.assert_close(total.double(), expected, **CLOSE)
    ours, theirs = (torch.autograd.grad(value, logits)[0] for value in (total, expected.float()))
    torch.testing.assert_close(ours, theirs, **CLOSE)
    assert ours.isfinite().all() and 0 in num


@pytest.mark.parametrize("kind", KINDS)
def test_the_term_is_its_formula_through_the_student(kind):
    """And is learned beside the teacher's, which it asks for nothing, and without a teacher."""
    sizes = {"hidden_size": 15, "num_attention_heads": 3, "intermediate_size": 20, "num_hidden_layers": 2}
    layer_map = LayerMap(24, 4, (1, 3), is_origin=False)
    model = classifier(5, **sizes, problem_type=kind)
    assert problem_type(model.config) == kind
    labels = KINDS[kind][:4]
    batch = labelled(pair_batch(), labels)
    batch = batch._replace(counts=mean_counts([batch], torch.device("cpu")))
    assert batch.counts.labelled == 3 and any(tensor is batch.labels for tensor in batch.tensors)
    student = Student(model, only(labels=2.0), layer_map=layer_map)
    assert not student.objective.needs_teacher and student.objective.num_readers("last") == 0
    outcome = student(batch)
    outcome.total.backward()
    gradients = {name: p.grad.double() for name, p in student.named_parameters() if p.grad is not None}
    student.zero_grad()
    both = Student(model, only(labels=2.0, scores_mse=1.0), layer_map=layer_map)
    terms = both(batch, Teacher(classifier(num_hidden_layers=4))(batch)).terms
    expected = naive(stock_logits(model, batch), labels, kind)
    for value in (outcome.terms["labels"], terms["labels"]):
        torch.testing.assert_close(value.double(), expected.detach(), **CLOSE)
    (2 * expected).backward()
    reference = {name: p.grad for name, p in student.named_parameters() if p.grad is not None}
    assert gradients.keys() == reference.keys() and "model.bert.pooler.dense.weight" in gradients
    largest = max(gradient.abs().max() for gradient in reference.values())
    for name, gradient in reference.items():
        assert (gradients[name] - gradient).abs().max() <= 2e-5 * largest, name


def test_a_step_without_labels_changes_nothing():
    student, batch = Student(classifier(), only(labels=1.0)), labelled(pair_batch(), [[NONE]] * 4)
    outcome = student(batch._replace(counts=mean_counts([batch], torch.device("cpu"))))
    outcome.total.backward()
    assert outcome.total == 0 and all(not p.grad.any() for p in student.parameters() if p.grad is not None)


@pytest.mark.parametrize(
    ("fields", "kind"),
    [
        ({"num_labels": 3}, "single_label_classification"),
        ({"num_labels": 1}, "regression"),
        ({"num_labels": 1, "problem_type": "multi_label_classification"}, "multi_label_classification"),
        ({"num_labels": 3, "problem_type": "regression"}, "regression"),
    ],
)
def test_the_loss_is_that_of_the_stock_class(fields, kind):
    """Which transformers computes for the same labels."""
    model: nn.Module = classifier(**fields)
    assert problem_type(model.config) == kind
    batch, num_labels = pair_batch(), fields["num_labels"]
    labels = torch.tensor([[0.0], [2.0], [1.0], [1.0]]) if kind == "single_label_classification" else None
    if labels is None:
        labels = torch.rand(4, num_labels, generator=torch.Generator().manual_seed(2)).round()
    given = labels[:, 0].long() if kind == "single_label_classification" else labels.squeeze(1)
    if kind == "multi_label_classification":
        given = labels
    inputs = {"attention_mask": batch.attention_mask, "token_type_ids": batch.token_types}
    stock = model(batch.input_ids, **inputs, labels=given)
    torch.testing.assert_close(label_loss(stock.logits, labels, kind) / 4, stock.loss, **CLOSE)


def test_costs():
    widths = {"hidden": 15, "classifier": 13, "layer.0.ffn": 1}, {"hidden": 24, "classifier": 22, "layer.0.ffn": 1}
    sizes = BatchSizes(*widths, num_sequences=6, seq_len=13, target_rows=0, vocab_size=101, student_bytes=2)
    (term,) = active_terms(only(labels=1.0))
    assert term.flops(sizes) == 3 * 2 * 6 * 15 * 13 and term.saved_bytes(sizes) == 6 * (15 + 2 * 13) * 2
