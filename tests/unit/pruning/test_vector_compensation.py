"""Compensation by vectors of texts: gradients against autograd, W against least squares, and whole events."""

from __future__ import annotations

import pytest
import torch
from support.gradient_reference import gradient_moment
from support.small import random_keep, small_batch, small_model
from torch import nn
from torch.nn.functional import normalize

from homodistil.config.schema import LossConfig
from homodistil.distill.losses.pooled import PROJECTION
from homodistil.distill.snapshot import duplicate
from homodistil.distill.student import Student
from homodistil.models.encoders.bert import BERT as bert
from homodistil.models.sentence_head import SentenceHead
from homodistil.models.sentence_modules import SentenceModules
from homodistil.pruning.compensation import Options
from homodistil.pruning.compensation.projection import residual_projection
from homodistil.pruning.compensation.statistics import collect
from homodistil.pruning.compensation.student import propose
from homodistil.pruning.compensation.vectors import (
    MOST_DIRECTIONS,
    directions_per_text,
    drawn_directions,
    fit_projection,
    mean_turn,
    pooled_states,
)
from homodistil.training.shrinkable import PlainStudent

BATCHES = [small_batch(seed, (11, 9, 16)) for seed in range(6)]
NONE = torch.empty(0, dtype=torch.int64)
HEAD = SentenceHead(SentenceModules())


def backbone() -> nn.Module:
    model = small_model()
    bert.drop_head(model)
    return model.requires_grad_(False).eval()


def student_with_vectors() -> Student:
    model = small_model()
    bert.drop_head(model)
    return Student(model, LossConfig().only(pooled_cosine=1.0, hidden=1.0)).eval()


@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
def test_gradients_are_those_of_the_drawn_directions(pooling):
    """E[g g'] over the places of the stream, token by token, with the states as leaves of autograd."""
    model, seed = backbone(), 7
    statistics = collect(model, bert, BATCHES[:2], [], "fisher", seed, pooling)
    moment, vectors, _ = gradient_moment(
        model,
        BATCHES[:2],
        lambda batch: normalize(pooled_states(model, bert, batch, pooling), dim=-1),
        lambda i, batch, _: drawn_directions(batch, 3 * i, seed, 24, MOST_DIRECTIONS),
    )
    torch.testing.assert_close(statistics.gradient, moment, rtol=1e-4, atol=1e-8)
    rows = torch.cat(vectors).double()
    torch.testing.assert_close(statistics.vectors.second, rows.T @ rows / len(rows), rtol=1e-5, atol=1e-7)
    assert collect(model, bert, BATCHES[:1], [], "pca", seed, pooling).gradient is None


def test_directions_do_not_depend_on_micro_batches():
    whole = drawn_directions(BATCHES[0], 5, 3, 24, 2)
    assert whole.shape == (2, 3, 24)
    for b in range(3):
        one = BATCHES[0]._replace(input_ids=BATCHES[0].input_ids[b : b + 1])
        assert torch.equal(drawn_directions(one, 5 + b, 3, 24, 2), whole[:, b : b + 1])
    assert not torch.equal(drawn_directions(BATCHES[0], 5, 4, 24, 2), whole)


def test_many_texts_have_fewer_directions_each():
    numbers = {num_texts: directions_per_text(num_texts) for num_texts in (1, 512, 513, 1024, 2048, 100_000)}
    assert numbers == {1: 4, 512: 4, 513: 3, 1024: 2, 2048: 1, 100_000: 1}


def test_a_direction_that_vectors_do_not_depend_on_goes_first():
    """With the last layer's output alone read by the vectors, what has no gradient and no spread is projected away."""
    statistics = collect(backbone(), bert, BATCHES, [], "fisher", 0, "mean")
    assert statistics.decoder is None and statistics.head_rows is None
    projection = residual_projection(statistics, 17, NONE, seed=0)
    torch.testing.assert_close(projection.T @ projection, torch.eye(17).double(), rtol=0, atol=1e-10)
    lost = torch.eye(24).double() - projection @ projection.T

    def share(matrix: torch.Tensor) -> float:
        return ((lost @ matrix @ lost).trace() / matrix.trace()).item()

    assert share(statistics.gradient) < 7 / 24 and share(statistics.vectors.covariance) < 7 / 24


@pytest.mark.parametrize("ridge", [1e-3, 0.3])
def test_w_is_a_weighted_ridge_regression(ridge):
    old, new = backbone(), backbone()
    with torch.no_grad():
        new.bert.encoder.layer[1].output.dense.weight.mul_(0.5)
    torch.manual_seed(1)
    target, projection = torch.randn(24, 24), nn.Linear(24, 24, bias=False)
    start = projection.weight.detach().double().clone()
    fit_projection(projection, target, (old, new), bert, BATCHES, "mean", ridge)
    x, y = (torch.cat([pooled_states(m, bert, b, "mean") for b in BATCHES]).double() for m in (new, old))
    y = y @ target.double().T
    weights = 1 / y.norm(dim=1)
    gram = (x.T * weights.square()) @ x / weights.square().sum()
    penalty = ridge * gram.diagonal().mean()
    rest = (x.T * weights.square()) @ (y - x @ start.T) / weights.square().sum()
    expected = start + torch.linalg.solve(gram + penalty * torch.eye(24).double(), rest).T
    torch.testing.assert_close(projection.weight.detach().double(), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("mode", ["refit", "full"])
def test_an_event_fits_w_to_the_vectors_of_before(mode):
    student, head = student_with_vectors(), HEAD
    keep = random_keep(student.axis_table(), {"hidden": 17, "layer.0.ffn": 31})
    options = Options(mode=mode, pooling="mean", ridge=1e-3)
    before = [student.embed(batch, head) for batch in BATCHES]
    change = propose(student, keep, BATCHES, options, NONE)
    name = f"projections.{PROJECTION}.weight"
    turns = []
    for weights in (change.weights, {n: w for n, w in change.weights.items() if n != name}):
        after = PlainStudent(duplicate(student))
        after.resize(change.plan)
        after.write(weights)
        pairs = zip(before, (after.student.embed(batch, head) for batch in BATCHES), strict=True)
        turns.append(sum((1 - torch.cosine_similarity(a, b)).sum().item() for a, b in pairs))
    assert change.weights[name].shape == (24, 17) and turns[0] < turns[1]


def test_turning_back_a_rotated_stream():
    model, rotation = backbone(), torch.linalg.qr(torch.randn(24, 24).double()).Q
    total, count = mean_turn((model, model), torch.eye(24).double(), bert, BATCHES, "mean")
    assert count == 18 and abs(total) < 1e-5
    assert mean_turn((model, model), rotation, bert, BATCHES, "mean")[0] > 1
