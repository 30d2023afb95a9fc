"""Terms on the logits of tokens against their formulas, one token at a time; measures and costs."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from support.small import small_batch, small_model
from torch import nn
from transformers import BertForTokenClassification
from unit.distill.test_score_losses import CLOSE, LABELS, TERMS, check_term, naive_term, only, stock_logits

from homodistil.config.schema import LossConfig
from homodistil.data.batch import Batch
from homodistil.data.prefetch import mean_counts
from homodistil.distill.layer_map import LayerMap
from homodistil.distill.losses.active import active_terms
from homodistil.distill.losses.term import BatchSizes
from homodistil.distill.student import Student
from homodistil.distill.teacher import Teacher
from homodistil.evaluation.token_scores import evaluate_token_scores, token_scores_of_itself, token_sums
from homodistil.pruning.calibration import drawn_logit_loss
from homodistil.pruning.compensation.label_draws import NUMBERS, label_direction


def token_classifier(seed: int = 0, **changes) -> nn.Module:
    config = small_model(**changes).config
    config.num_labels = LABELS
    torch.manual_seed(seed)
    model = BertForTokenClassification(config).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


def framed(seed: int = 0, lengths: tuple[int, ...] = (7, 11, 4, 2, 5)) -> Batch:
    """Texts of several lengths, of which all but the first and last token count: of the fourth none does."""
    batch = small_batch(seed, lengths)
    places, ends = torch.arange(max(lengths)), torch.tensor(lengths)[:, None] - 1
    index = ((places > 0) & (places < ends)).flatten().nonzero().squeeze(1)
    counts = batch.counts._replace(target_rows=torch.tensor(float(len(index))))
    types = batch.attention_mask * 0
    return batch._replace(target_index=index, target_ids=batch.input_ids.flatten()[index], counts=counts)._replace(
        token_types=types
    )


def pair(loss: LossConfig, lock_step: bool = True) -> tuple[Student, Teacher]:
    """A narrower student of 2 layers with weights of its own, and a teacher of 4."""
    sizes = {"hidden_size": 15, "num_attention_heads": 3, "intermediate_size": 20, "num_hidden_layers": 2}
    student = Student(token_classifier(5, **sizes), loss, layer_map=LayerMap(24, 4, (1, 3), is_origin=False))
    return student, Teacher(token_classifier(num_hidden_layers=4), lock_step)


def naive_rows(model: nn.Module, batch: Batch) -> torch.Tensor:
    """Logits of the tokens that count, text by text and token by token."""
    logits, lengths = stock_logits(model, batch), batch.attention_mask.sum(1).tolist()
    return torch.stack([logits[b, t] for b, length in enumerate(lengths) for t in range(1, length - 1)])


@pytest.mark.parametrize("name", TERMS)
@pytest.mark.parametrize(("temperature", "lock_step"), [(1.0, True), (2.5, False)])
def test_terms_are_their_formulas(name, temperature, lock_step):
    loss = dataclasses.replace(only(**{name: 2.0}), scores_temperature=temperature)
    (student, teacher), batch = pair(loss, lock_step), framed()
    assert len(batch.target_index) == 5 + 9 + 2 + 3
    assert "model.classifier.weight" in check_term((student, teacher), batch, name, temperature, naive_rows)


@pytest.mark.parametrize("name", TERMS)
def test_micro_batches_of_any_sizes_average_to_the_mean_over_tokens(name):
    """Also one without any such token, where the mean over its own would be 0 / 0."""
    student, teacher = pair(only(**{name: 1.0}))
    parts = [framed(1, (9, 3)), framed(2, (2, 2)), framed(3, (5, 4))]
    counts = mean_counts(parts, torch.device("cpu"))
    values = [student(part._replace(counts=counts), teacher(part)).terms[name] for part in parts]
    rows = [
        torch.cat([naive_rows(model, part) for part in (parts[0], parts[2])])
        for model in (student.model, teacher.model)
    ]
    expected = naive_term(name, rows[0], rows[1].detach(), 1.0)
    torch.testing.assert_close(torch.stack(values).mean().double(), expected.detach(), **CLOSE)


@pytest.mark.parametrize("kind", ["categories", "values"])
def test_measures_on_held_out_tokens(kind):
    student, teacher = pair(only(scores_kl=1.0))
    if kind == "values":
        teacher.model.config.problem_type = "regression"
    batches = [framed(1), framed(2, (8, 2, 3))]
    measured = evaluate_token_scores(student, teacher, batches, num_texts=8)
    ours, theirs = (
        torch.cat([naive_rows(model, batch) for batch in batches]).detach() for model in (student.model, teacher.model)
    )
    expected = {"evaluated_texts": 8.0, "evaluated_tokens": 19.0 + 7.0}
    if kind == "categories":
        same = sum(a.argmax() == b.argmax() for a, b in zip(ours, theirs, strict=True)) / len(ours)
        expected |= {"kl_to_teacher": float(naive_term("scores_kl", ours, theirs, 1.0)), "token_agreement": float(same)}
    else:
        expected |= {"score_mse": float(naive_term("scores_mse", ours, theirs, 1.0))}
    assert measured == pytest.approx(expected, rel=1e-4)
    distance, same, count = token_sums(theirs, theirs, kind).tolist()
    assert abs(distance) < 1e-9 and same == count == 26
    assert token_scores_of_itself(kind) == {"score_mse": 0.0} or token_scores_of_itself(kind)["token_agreement"] == 1


def test_importance_of_a_copy_draws_a_label_for_every_token():
    student, batch = Student(token_classifier(), only(scores_kl=1.0)).eval(), framed()
    value = drawn_logit_loss(student, "categories", seed=3)(batch)
    logits = student.scores(batch)
    numbers = torch.rand(len(logits), NUMBERS, generator=torch.Generator().manual_seed(3))
    expected = (logits * label_direction(logits, numbers)).sum() / 19
    torch.testing.assert_close(value.detach(), expected, **CLOSE)


def test_costs():
    widths = {"hidden": 15, "classifier": 13, "layer.0.ffn": 1}, {"hidden": 24, "classifier": 22, "layer.0.ffn": 1}
    one_linear = [{axis: width for axis, width in side.items() if axis != "classifier"} for side in widths]
    usual = {"num_sequences": 6, "seq_len": 13, "target_rows": 66, "vocab_size": 101, "student_bytes": 2}
    for name in TERMS:
        (term,) = active_terms(only(**{name: 1.0}))
        assert term.flops(sizes := BatchSizes(*widths, **usual)) == 3 * 2 * 66 * 15 * 13 + 2 * 66 * 24 * 22
        assert term.saved_bytes(sizes) == 66 * (15 + 2 * 13) * 2
        assert term.flops(sizes := BatchSizes(*one_linear, **usual)) == 0 and term.saved_bytes(sizes) == 66 * 15 * 2


def test_the_term_of_labels_is_that_of_the_stock_class():
    """A mean over the tokens that have a label: -100 for stock classes, NaN here. One text has none."""
    model, batch = token_classifier(), framed()
    labels = torch.randint(LABELS, batch.input_ids.shape, generator=torch.Generator().manual_seed(0))
    is_known = torch.zeros_like(labels, dtype=torch.bool).flatten()
    is_known[batch.target_index[[0, 3, 4, 9, -1]]] = True
    is_known = is_known.reshape(labels.shape)
    rows = labels.float().masked_fill(~is_known, torch.nan).numpy()
    batch = batch.with_labels(rows, np.arange(len(rows)), of_tokens=True)
    assert batch.labels.shape == (len(batch.target_index), 1) and batch.counts.labelled == 5
    student = Student(model, only(labels=1.0))
    outcome = student(batch._replace(counts=mean_counts([batch], torch.device("cpu"))))
    outcome.total.backward()
    ours = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad()
    inputs = {"attention_mask": batch.attention_mask, "token_type_ids": batch.token_types}
    expected = model(batch.input_ids, **inputs, labels=labels.masked_fill(~is_known, -100)).loss
    expected.backward()
    torch.testing.assert_close(outcome.terms["labels"], expected.detach(), **CLOSE)
    largest = max(gradient.abs().max() for gradient in ours.values())
    for name, gradient in ours.items():
        assert (model.get_parameter(name).grad - gradient).abs().max() <= 2e-5 * largest, name
