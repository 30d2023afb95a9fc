"""Compensation by logits of labels: gradients against autograd, the head against least squares, importance, options."""

from __future__ import annotations

import pytest
import torch
from support.gradient_reference import gradient_moment
from support.small import random_keep, small_batch
from torch import nn
from unit.distill.test_score_losses import classifier
from unit.distill.test_token_scores import framed, token_classifier

from homodistil.config.schema import LossConfig
from homodistil.data.batch import Batch
from homodistil.distill.snapshot import duplicate
from homodistil.distill.student import Student
from homodistil.models.backbone import run_backbone
from homodistil.models.encoders.bert import BERT as bert
from homodistil.models.resize_plan import make_plan, slice_module
from homodistil.pruning.calibration import drawn_logit_loss
from homodistil.pruning.compensation import Options
from homodistil.pruning.compensation.labels import drawn_logit_directions, refit_labels
from homodistil.pruning.compensation.refit import Refit
from homodistil.pruning.compensation.statistics import collect
from homodistil.pruning.compensation.student import propose
from homodistil.pruning.compensation.vectors import MOST_DIRECTIONS
from homodistil.training.shrinkable import PlainStudent

BATCHES = [small_batch(seed, (11, 9, 16)) for seed in range(8)]
NONE = torch.empty(0, dtype=torch.int64)


def frozen() -> nn.Module:
    return classifier().requires_grad_(False)


def logits_of(model: nn.Module, batch) -> torch.Tensor:
    hidden = run_backbone(model, bert, batch.input_ids, batch.padding_mask)
    return bert.classifier(model).logits(hidden, batch)


@pytest.mark.parametrize("kind", ["categories", "values"])
def test_gradients_are_those_of_the_drawn_directions(kind):
    """E[g g'] over the places of the stream, token by token, with the states as leaves of autograd."""
    model, seed = frozen(), 7
    statistics = collect(model, bert, BATCHES[:2], [], "fisher", seed, logits=kind)
    moment, _, states = gradient_moment(
        model,
        BATCHES[:2],
        lambda batch: logits_of(model, batch),
        lambda i, batch, logits: drawn_logit_directions(batch, 3 * i, seed, kind, logits, MOST_DIRECTIONS),
    )
    torch.testing.assert_close(statistics.gradient, moment, rtol=1e-4, atol=1e-8)
    rows = torch.cat([state[:, 0] for state in states]).double()
    torch.testing.assert_close(statistics.vectors.second, rows.T @ rows / len(rows), rtol=1e-5, atol=1e-7)
    assert collect(model, bert, BATCHES[:1], [], "pca", seed, logits=kind).gradient is None


@pytest.mark.parametrize("kind", ["categories", "values"])
def test_gradients_of_tokens_are_those_of_one_direction_each(kind):
    """Of the tokens that count, padding and frame left out; and the same ones in other micro-batches."""
    model, seed, batches = token_classifier().requires_grad_(False), 7, [framed(1), framed(2)]
    statistics = collect(model, bert, batches, [], "fisher", seed, logits=kind)

    def directions_of(i: int, batch: Batch, logits: torch.Tensor) -> torch.Tensor:
        return drawn_logit_directions(batch, 5 * i, seed, kind, logits, None)

    moment, outputs, states = gradient_moment(model, batches, lambda b: logits_of(model, b), directions_of)
    torch.testing.assert_close(statistics.gradient, moment, rtol=1e-4, atol=1e-8)
    rows = torch.cat([state.flatten(0, 1)[b.target_index] for state, b in zip(states, batches, strict=True)]).double()
    torch.testing.assert_close(statistics.vectors.second, rows.T @ rows / len(rows), rtol=1e-5, atol=1e-7)
    assert len(rows) == sum(map(len, outputs)) == 2 * 19
    first, alone = batches[0], small_of(batches[0], text=1)
    drawn, of_one = (
        directions_of(0, first, outputs[0]),
        drawn_logit_directions(alone, 1, seed, kind, outputs[0][5:14], None),
    )
    assert drawn.shape == (1, 19, 3) and torch.equal(of_one, drawn[:, 5:14])


def small_of(batch: Batch, text: int) -> Batch:
    """Of that text alone, with its places of before."""
    first, last = (number * batch.input_ids.shape[1] for number in (text, text + 1))
    index = batch.target_index[(batch.target_index >= first) & (batch.target_index < last)] - first
    return batch._replace(input_ids=batch.input_ids[text : text + 1], target_index=index)


def test_directions_have_the_fisher_information_of_their_kind():
    """Second moments over many draws; and the same ones in other micro-batches."""
    batch, logits = BATCHES[0], torch.tensor([[0.0, 1.0, -1.0], [2.0, 0.0, 0.0], [0.3, 0.2, 0.1]])
    shares = logits.softmax(-1)
    expected = {
        "categories": torch.diag_embed(shares) - shares[:, :, None] * shares[:, None],
        "values": torch.eye(3).expand(3, 3, 3),
    }
    for kind, information in expected.items():
        drawn = torch.cat([drawn_logit_directions(batch, 0, seed, kind, logits, 4) for seed in range(1500)])
        second = torch.einsum("sbi,sbj->bij", drawn, drawn) / len(drawn)
        torch.testing.assert_close(second, information.float(), rtol=0, atol=0.06)
        one = batch._replace(input_ids=batch.input_ids[1:2])
        alone = drawn_logit_directions(one, 1, 3, kind, logits[1:2], 2)
        assert torch.equal(alone, drawn_logit_directions(batch, 0, 3, kind, logits, 2)[:, 1:2])


@pytest.mark.parametrize("ridge", [1e-3, 0.3])
def test_the_head_is_two_ridge_regressions(ridge):
    """The first linear to what the neurons that stay put out, the second to the logits; drawn to what the cut left."""
    old = frozen()
    table = bert.axis_table(old)
    new, plan = (
        classifier().requires_grad_(False),
        make_plan(table, random_keep(table, {"hidden": 17, "classifier": 9})),
    )
    slice_module(new, plan)
    bert.refresh(new, plan.widths_after)
    refit = Refit(old, new, bert, plan, BATCHES, ridge)
    refit.run()
    rows = [torch.cat([getattr(s, side).hidden[:, 0] for s in refit.streams]).double() for side in ("old", "new")]
    dense, kept = old.bert.pooler.dense.double(), plan.keep["classifier"]
    put_out = dense(rows[0])
    wanted = old.classifier.double()(put_out.tanh())
    first = ridge_regression(new.bert.pooler.dense, rows[1], put_out[:, kept], ridge)
    second = ridge_regression(new.classifier, (rows[1] @ first[0].T + first[1]).tanh(), wanted, ridge)
    old.float()
    refit_labels(refit)
    for linear, expected in ((new.bert.pooler.dense, first), (new.classifier, second)):
        for parameter, value in zip((linear.weight, linear.bias), expected, strict=True):
            torch.testing.assert_close(parameter.double(), value, rtol=1e-3, atol=1e-3)


def test_the_head_of_tokens_is_one_ridge_regression():
    old, batches = token_classifier().requires_grad_(False), [framed(seed, (11, 9, 16)) for seed in range(4)]
    table = bert.axis_table(old)
    new, plan = token_classifier().requires_grad_(False), make_plan(table, random_keep(table, {"hidden": 17}))
    slice_module(new, plan)
    bert.refresh(new, plan.widths_after)
    refit = Refit(old, new, bert, plan, batches, 1e-3)
    refit.run()
    after, before = (
        torch.cat([s.target_rows(getattr(s, side).hidden) for s in refit.streams]).double() for side in ("new", "old")
    )
    wanted = before @ old.classifier.weight.double().T + old.classifier.bias.double()
    expected = ridge_regression(new.classifier, after, wanted, 1e-3)
    refit_labels(refit)
    for parameter, value in zip((new.classifier.weight, new.classifier.bias), expected, strict=True):
        torch.testing.assert_close(parameter.double(), value, rtol=1e-3, atol=1e-3)


def ridge_regression(linear: nn.Linear, x: torch.Tensor, y: torch.Tensor, ridge: float) -> tuple:
    """(weight, bias), float64, drawn to the present weight."""
    start, x0, y0 = linear.weight.double(), x - x.mean(0), y - y.mean(0)
    gram = x0.T @ x0 / len(x)
    regular = gram + ridge * gram.diagonal().mean() * torch.eye(len(gram)).double()
    weight = start + torch.linalg.solve(regular, x0.T @ (y0 - x0 @ start.T) / len(x)).T
    return weight, y.mean(0) - weight @ x.mean(0)


@pytest.mark.parametrize("mode", ["refit", "full", "project"])
def test_an_event_of_the_whole_student_is_nearer_in_logits(mode):
    student = Student(classifier(), LossConfig().only(scores_mse=1.0, hidden=1.0)).eval()
    keep = random_keep(student.axis_table(), {"hidden": 17, "classifier": 15})
    change = propose(student, keep, BATCHES, Options(mode=mode, logits="values", ridge=1e-3), NONE)
    before, errors = [student.scores(batch) for batch in BATCHES], []
    for weights in (
        change.weights,
        {n: w for n, w in change.weights.items() if "pooler" not in n and "classif" not in n},
    ):
        after = PlainStudent(duplicate(student))
        after.resize(change.plan)
        after.write(weights)
        scores = [after.student.scores(batch) for batch in BATCHES]
        errors.append(sum((a - b).square().sum().item() for a, b in zip(before, scores, strict=True)))
    assert errors[0] < 0.5 * errors[1]
    assert change.weights["model.bert.pooler.dense.weight"].shape == (15, 17)


def test_importance_of_a_copy_sees_the_curvature_of_the_divergence():
    """One bias, of which the KL is known by finite differences: half its second derivative is half the information."""
    student, batch = Student(classifier(), LossConfig().only(scores_kl=1.0)).eval(), BATCHES[0]
    bias = student.model.bert.encoder.layer[1].intermediate.dense.bias
    loss, squares, num_draws = drawn_logit_loss(student, "categories", seed=3), torch.zeros_like(bias), 1500
    for _ in range(num_draws):
        (gradient,) = torch.autograd.grad(loss(batch), bias)
        squares += (gradient * len(batch.input_ids)).square() / num_draws
    before = student.scores(batch).double().log_softmax(-1)
    for j in (0, 7, 21):
        with torch.no_grad():
            bias[j] += 1e-2
            after = student.scores(batch).double().log_softmax(-1)
            bias[j] -= 1e-2
        divergence = (before.exp() * (before - after)).sum()
        assert squares[j].item() == pytest.approx(2 * divergence.item() / 1e-4, rel=0.2)
