"""Terms on vectors of texts against their formulas, one text at a time; through student, teacher and a cut."""

from __future__ import annotations

import copy
import dataclasses
import math

import pytest
import torch
from support.small import small_batch, small_model
from support.tiny_modernbert import SIZES
from torch import nn
from transformers import ModernBertConfig, ModernBertForMaskedLM, ModernBertModel

from homodistil.config.schema import LossConfig
from homodistil.distill.layer_map import LayerMap
from homodistil.distill.losses.active import active_terms
from homodistil.distill.losses.pooled import PROJECTION, cosine_distance, similarity_divergence
from homodistil.distill.losses.term import BatchSizes
from homodistil.distill.student import Student
from homodistil.distill.teacher import Teacher
from homodistil.models.activations import ATTENTION
from homodistil.models.encoders.modernbert import MODERNBERT
from homodistil.models.resize_plan import make_plan, slice_module
from homodistil.models.sentence_head import SentenceHead
from homodistil.models.sentence_modules import Dense, SentenceModules

TERMS = ("pooled_cosine", "pooled_mse", "pooled_similarity")
CLOSE = {"rtol": 1e-5, "atol": 1e-6}


def only(**weights: float) -> LossConfig:
    return LossConfig().only(**weights)


def headless(**changes) -> nn.Module:
    """A small BERT as its family leaves it where there is no language-modelling head."""
    from homodistil.models.encoders.bert import BERT

    model = small_model(**changes)
    BERT.drop_head(model)
    return model


def sentence_head(pooling: str = "mean", has_dense: bool = False, normalises: bool = True) -> SentenceHead:
    torch.manual_seed(3)
    dense = (Dense("2_Dense", 24, 7, True, "Tanh"),) if has_dense else ()
    weights = [{"linear.weight": torch.randn(7, 24), "linear.bias": torch.randn(7)}] if has_dense else []
    return SentenceHead(SentenceModules(pooling, normalises, dense), weights)


def pair(loss: LossConfig, head: SentenceHead, lock_step: bool = True, hidden: int = 15) -> tuple[Student, Teacher]:
    """A narrower student of 2 layers with weights of its own, and a teacher of 4."""
    model = headless(seed=5, hidden_size=hidden, num_attention_heads=3, intermediate_size=20, num_hidden_layers=2)
    torch.manual_seed(1)
    student = Student(model, loss, layer_map=LayerMap(24, 4, (1, 3), is_origin=False))
    return student, Teacher(headless(num_hidden_layers=4), lock_step, sentence_head=head)


# -- references: loops over texts


def naive_pooled(states, mask, pooling: str):
    rows = [states[b, : int(mask[b].sum())] for b in range(len(mask))]
    return [{"mean": row.sum(0) / len(row), "cls": row[0], "last": row[-1]}[pooling] for row in rows]


def naive_dense(vector, head: SentenceHead):
    for layer in head.dense:
        vector = torch.tanh(layer.linear.weight.double() @ vector + layer.linear.bias.double())
    return vector


def naive_term(name: str, ours: list, theirs: list, temperature: float, normalises: bool):
    def cosine(a, b):
        return (a * b).sum() / (a.square().sum().sqrt() * b.square().sum().sqrt())

    if name == "pooled_cosine":
        return sum(1 - cosine(a, b) for a, b in zip(ours, theirs, strict=True)) / len(ours)
    if name == "pooled_mse":
        unit = [[v / v.square().sum().sqrt() if normalises else v for v in side] for side in (ours, theirs)]
        return sum((a - b).square().sum() / len(a) for a, b in zip(*unit, strict=True)) / len(ours)
    total = 0.0
    for i in range(len(ours)):
        others = [j for j in range(len(ours)) if j != i]
        logs = []
        for side in (theirs, ours):
            exps = [torch.exp(cosine(side[i], side[j]) / temperature) for j in others]
            logs.append([torch.log(e / sum(exps)) for e in exps])
        total = total + sum(torch.exp(t) * (t - s) for t, s in zip(*logs, strict=True))
    return total / len(ours)


def last_states(model, batch):
    model.set_attn_implementation("eager")
    return model.double().bert(batch.input_ids, attention_mask=batch.attention_mask).last_hidden_state


@pytest.mark.parametrize("name", TERMS)
@pytest.mark.parametrize(
    ("pooling", "has_dense", "lock_step"), [("mean", False, True), ("cls", True, False), ("last", True, True)]
)
def test_terms_are_their_formulas(name, pooling, has_dense, lock_step):
    head, batch = sentence_head(pooling, has_dense, normalises=not has_dense), small_batch(lengths=(7, 11, 4, 1))
    loss = dataclasses.replace(only(**{name: 2.0}), similarity_temperature=0.3)
    student, teacher = pair(loss, head, lock_step)
    assert (PROJECTION in student.projections) == (name != "pooled_similarity")
    outcome = student(batch, teacher(batch))
    outcome.total.backward()
    found = {n: p.grad.double() for n, p in student.named_parameters() if p.grad is not None}
    student.zero_grad()
    ours, theirs = (
        naive_pooled(last_states(m.model, batch), batch.attention_mask, pooling) for m in (student, teacher)
    )
    if PROJECTION in student.projections:
        weight = student.projections.double()[PROJECTION].weight
        ours = [naive_dense(weight @ vector, head) for vector in ours]
    theirs = [naive_dense(vector.detach(), head) for vector in theirs]
    expected = naive_term(name, ours, theirs, 0.3, normalises=not has_dense)
    torch.testing.assert_close(outcome.terms[name].double(), expected.detach(), **CLOSE)
    (2 * expected).backward()
    reference = {n: p.grad for n, p in student.named_parameters() if p.grad is not None}
    assert found.keys() == reference.keys()
    largest = max(gradient.abs().max() for gradient in reference.values())
    for parameter, gradient in reference.items():
        assert (found[parameter] - gradient).abs().max() <= 2e-5 * largest, parameter


def test_padding_changes_nothing_and_copies_are_at_distance_0():
    loss = only(**dict.fromkeys(TERMS, 1.0))
    for pooling in ("mean", "cls", "last"):
        head, batch = sentence_head(pooling, has_dense=True), small_batch()
        student, teacher = Student(headless(), loss), Teacher(headless(), sentence_head=head)
        assert all(abs(value) < 1e-6 for value in student(batch, teacher(batch)).terms.values())
        wider = nn.functional.pad(batch.input_ids, (0, 3)), nn.functional.pad(batch.attention_mask, (0, 3))
        rows = wider[1].flatten().nonzero().squeeze(1)
        padded = batch._replace(input_ids=wider[0], attention_mask=wider[1], token_index=rows)
        torch.testing.assert_close(teacher.embed(padded), teacher.embed(batch), **CLOSE)
        torch.testing.assert_close(student.embed(padded, head), teacher.embed(batch), **CLOSE)


@pytest.mark.parametrize("num_texts", [1, 2, 5])
def test_similarities_of_few_texts(num_texts):
    torch.manual_seed(0)
    ours = torch.randn(num_texts, 3, dtype=torch.float64, requires_grad=True)
    theirs = torch.randn(num_texts, 5, dtype=torch.float64)
    value = similarity_divergence(ours, theirs, 0.1)
    if num_texts < 3:  # one other text has all of the probability
        assert value.abs() < 1e-12
    value.backward()
    assert ours.grad.isfinite().all()
    assert cosine_distance(ours, 2 * ours).abs() < 1e-12


def test_w_follows_a_selection_and_a_projection():
    """A cut that keeps dims keeps their columns; one that projects the stream by P makes W P of W."""
    from homodistil.pruning.compensation.student import _projection_maps

    loss, head = only(pooled_cosine=1.0, hidden=1.0), sentence_head()
    student = Student(headless(), loss)
    with torch.no_grad():
        student.projections[PROJECTION].weight.normal_()
    weight = student.projections[PROJECTION].weight.detach().clone()
    keep = {"hidden": torch.tensor([0, 2, 3, 7, 11, 12, 13, 20])}
    plan = make_plan(student.axis_table(), keep)
    cut = Student(headless(), loss)
    cut.load_state_dict(student.state_dict())
    slice_module(cut, plan)
    cut.after_resize(plan.keep)
    assert torch.equal(cut.projections[PROJECTION].weight, weight[:, keep["hidden"]])
    assert cut.embed(small_batch(), head).shape == (3, 24)

    projection = torch.linalg.qr(torch.randn(24, 8)).Q
    table = student.family.axis_table(student.model)
    maps = {u.parameter: {u.dim: projection} for u in table.uses if u.axes == ("hidden",)}
    of_model = make_plan(table, {"hidden": torch.arange(8)}, maps)
    maps = {f"model.{name}": dims for name, dims in of_model.maps.items()} | _projection_maps(student, of_model)
    plan = make_plan(student.axis_table(), {"hidden": torch.arange(8)}, maps)
    slice_module(student, plan)
    student.after_resize(plan.keep)
    torch.testing.assert_close(student.projections[PROJECTION].weight.detach(), weight @ projection, **CLOSE)
    torch.testing.assert_close(student.projections["layer_0"].weight.detach(), projection, **CLOSE)


def test_costs():
    widths = {"hidden": 15, "layer.0.ffn": 1}, {"hidden": 24, "layer.0.ffn": 1}
    sizes = BatchSizes(*widths, num_sequences=6, seq_len=13, target_rows=0, vocab_size=101)
    together = {name: 1.0 for name in TERMS}
    product, square = 3 * 2 * 6 * 15 * 24, 2 * 6 * 6
    for weights, flops in (
        ({"pooled_cosine": 1.0}, product),
        ({"pooled_similarity": 1.0}, square * (3 * 15 + 24)),
        (together, product + square * 4 * 24),
    ):
        (term,) = active_terms(only(**weights))
        assert term.flops(sizes) == flops and term.saved_bytes(sizes) == 6 * (15 + 4 * 24) * 4
    assert math.isclose(sum(term.weights.values()), 3)


def test_final_norms_are_part_of_what_is_pooled():
    """A pre-norm encoder's last hidden states are those behind its final norm, in lock-step as well."""
    torch.manual_seed(0)
    sizes = SIZES | {"hidden_size": 24, "num_attention_heads": 4, "attn_implementation": ATTENTION}
    tokens = dict.fromkeys(("pad_token_id", "bos_token_id", "cls_token_id"), 0) | {"eos_token_id": 1, "sep_token_id": 1}
    model, batch = ModernBertModel(ModernBertConfig(**sizes, vocab_size=101, **tokens)).eval(), small_batch()
    torch.nn.init.normal_(model.final_norm.weight, mean=1.0, std=0.3)
    with_head = ModernBertForMaskedLM(model.config).eval()
    with_head.model.load_state_dict(model.state_dict())
    MODERNBERT.drop_head(with_head)
    student = Student(with_head, only(pooled_cosine=1.0))
    vectors = Teacher(with_head, sentence_head=sentence_head()).embed(batch)
    for lock_step in (True, False):
        outcome = student(batch, Teacher(copy.deepcopy(with_head), lock_step, sentence_head=sentence_head())(batch))
        assert abs(outcome.total) < 1e-6
    states = model(batch.input_ids, attention_mask=batch.attention_mask).last_hidden_state
    expected = torch.stack(naive_pooled(states, batch.attention_mask, "mean"))
    torch.testing.assert_close(vectors, expected, **CLOSE)
