"""Compensated cuts against a slow float64 reference, and what they promise: exactness, fixed dims, no surprises."""

from __future__ import annotations

import copy

import pytest
import torch
from support.compensation_reference import (
    Reference,
    context,
    drawn_gradients,
    head_rows,
    last_hidden,
    layer_places,
    logits,
    weights_of,
)
from support.small import random_keep, small_batch, small_model
from torch import Tensor

from homodistil.models.encoders.bert import BERT as bert
from homodistil.models.resize_plan import make_plan, slice_module
from homodistil.pruning.compensation import Options, compensate, rotation_only
from homodistil.pruning.compensation.label_draws import draw_labels, uniform_numbers
from homodistil.pruning.compensation.projection import _mix, residual_projection
from homodistil.pruning.compensation.statistics import collect

HEADS, LAYERS = 3, 2
BATCHES = [small_batch(seed, lengths) for seed, lengths in enumerate([(16, 11, 5), (13, 9), (16, 16, 3, 12)])]
WIDTHS = {"hidden": 10, "layer.0.ffn": 13, "layer.1.ffn": 9, "layer.1.heads": 2}
WIDTHS |= {f"layer.{i}.{axis}": 3 for i in range(LAYERS) for axis in ("qk_dim", "vo_dim")}
HEAD_DIMS = [axis for axis in WIDTHS if axis.endswith("_dim")]


@pytest.fixture
def model():
    return small_model(num_hidden_layers=LAYERS, hidden_size=15, num_attention_heads=HEADS, intermediate_size=22).eval()


def cut(model, widths=WIDTHS, mode="full", batches=BATCHES, fixed=None, **options):
    table = bert.axis_table(model)
    options = Options(mode=mode, **options)
    return compensate(model, bert, table, random_keep(table, widths), batches, options, fixed)


def changed(plan, name: str, tensor: Tensor, dim: int, at: int) -> Tensor:
    """Dim `at` of `tensor` as dim `dim` of the parameter `name` in the plan."""
    if dim in plan.maps.get(name, {}):
        return torch.einsum("...i,ij->...j", tensor.movedim(at, -1), plan.maps[name][dim].double()).movedim(-1, at)
    index = plan.index.get(name, {}).get(dim)
    return tensor if index is None else tensor.index_select(at, index)


def reference_of(model, plan, ridge: float) -> Reference:
    old, new = weights_of(model), {}
    for name, weight in old.items():
        for dim in range(weight.ndim):
            weight = changed(plan, name, weight, dim, dim)
        new[name] = weight.clone()
    heads = [(HEADS, plan.widths_after[f"layer.{i}.heads"]) for i in range(LAYERS)]
    change = lambda name, rows: changed(plan, name, rows, 0, -1)  # noqa: E731
    return Reference(old, new, BATCHES, change, heads, bert.attentions(model)[0].scaling, ridge)


def mean_predictions(reference: Reference, num_batches: int) -> Tensor:
    found = []
    for batch in BATCHES[:num_batches]:
        hidden = last_hidden(reference.old, batch, LAYERS, HEADS, reference.scale)
        rows = head_rows(reference.old, hidden.flatten(0, 1)[batch.target_index])
        found.append(logits(reference.old, rows).softmax(-1))
    return torch.cat(found).mean(0)


@pytest.mark.parametrize("mode", ["refit", "full"])
@pytest.mark.parametrize("ridge", [1e-2, 0.3])
def test_every_weight_as_in_the_reference(model, mode, ridge):
    result = cut(model, mode=mode, ridge=ridge)
    reference = reference_of(model, result.plan, ridge)
    reference.run()
    if mode == "full":
        reference.straight_head(mean_predictions(reference, 2))  # gradients and predictions: first half of 3 batches
    else:
        reference.head()
    found = weights_of(result.model)
    assert found.keys() == reference.new.keys()
    for name, weight in found.items():
        # Activations are fp32 on one side; a dozen solves on top of each other carry its 1e-7 on.
        torch.testing.assert_close(weight, reference.new[name], rtol=1e-4, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("axis", ["ffn", "hidden", "_dim"])
def test_head_follows_the_activation_when_the_stream_is_not_projected(model, axis):
    widths = {name: width for name, width in WIDTHS.items() if name.endswith(axis)}
    straight = axis == "hidden"
    bias = cut(model, widths).model.cls.predictions.transform.dense.bias
    assert (bias.median() > 2).item() is straight  # the offset that keeps an activation in its straight part


def test_rotating_heads_is_exact(model):
    whole = {axis: torch.arange(5).repeat(HEADS, 1) for axis in HEAD_DIMS}
    plan = compensate(model, bert, bert.axis_table(model), whole, BATCHES, Options()).plan
    rotated = copy.deepcopy(model)
    slice_module(rotated, plan)
    for batch in BATCHES:
        found, expected = (
            m(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits.flatten(0, 1)[batch.token_index]
            for m in (rotated, model)
        )
        assert expected.abs().max() > 2
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
        assert not torch.equal(found, expected)


def rows_of(batch_rows: list[Tensor]) -> Tensor:
    return torch.cat([rows[b.attention_mask.bool()] for rows, b in zip(batch_rows, BATCHES, strict=True)])


def test_leading_dims_of_a_head_are_the_best_that_few_dims_can_do(model):
    """Scores of all queries and centred keys, and what heads add to the stream: errors of truncated SVDs."""
    weights, scale = weights_of(model), bert.attentions(model)[0].scaling
    plan = cut(model, {axis: 3 for axis in HEAD_DIMS}).plan
    x = [last_hidden(weights, batch, 0, HEADS, scale) for batch in BATCHES]
    places = [layer_places(weights, 0, part, batch, HEADS, scale) for part, batch in zip(x, BATCHES, strict=True)]
    q, k = (rows_of([found[part] for found in places]) for part in ("query", "key"))
    attended = rows_of([context(weights, 0, part, b, HEADS, scale) for part, b in zip(x, BATCHES, strict=True)])
    output = weights["bert.encoder.layer.0.attention.output.dense.weight"].T
    name = "bert.encoder.layer.0.attention"
    maps = {part: plan.maps[f"{name}.self.{part}.weight"][0] for part in ("query", "key", "value")}
    maps["output"] = plan.maps[f"{name}.output.dense.weight"][1]
    pairs = [(q, k - k.mean(0), maps["query"], maps["key"])]
    pairs += [(attended - attended.mean(0), output.T, maps["value"], maps["output"])]
    for left, right, of_left, of_right in pairs:
        for n in range(HEADS):
            old, new = slice(5 * n, 5 * n + 5), slice(3 * n, 3 * n + 3)
            product = left[:, old] @ right[:, old].T
            error = product - (left[:, old] @ of_left[old, new]) @ (right[:, old] @ of_right[old, new]).T
            least = torch.linalg.svdvals(product)[3:].square().sum().sqrt()
            torch.testing.assert_close(error.norm(), least, rtol=1e-4, atol=0)  # moments are regularised by 1e-6


def test_gradients_are_those_of_the_drawn_labels(model):
    model.requires_grad_(False)
    statistics = collect(model, bert, BATCHES, [], "fisher", seed=4)
    weights, scale = weights_of(model), bert.attentions(model)[0].scaling
    found = []
    for i, batch in enumerate(BATCHES[:2]):
        numbers = uniform_numbers(batch, i * len(batch.input_ids), seed=4)
        hidden = last_hidden(weights, batch, LAYERS, HEADS, scale).flatten(0, 1)[batch.target_index]
        labels = draw_labels(logits(weights, head_rows(weights, hidden)).softmax(-1), numbers)
        found += drawn_gradients(weights, batch, labels, LAYERS, HEADS, scale)
    rows = torch.cat(found)
    torch.testing.assert_close(statistics.gradient, rows.T @ rows / len(rows), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("basis", ["fisher", "pca"])
@pytest.mark.parametrize("fixed", [[], [3, 12]])
@pytest.mark.parametrize("width", [3, 10, 15])
def test_projection_is_orthonormal_and_keeps_fixed_dims(model, basis, fixed, width):
    statistics = collect(model.requires_grad_(False), bert, BATCHES, [], basis, seed=0)
    found = residual_projection(statistics, width, torch.tensor(fixed, dtype=torch.int64), seed=0)
    torch.testing.assert_close(found.T @ found, torch.eye(width).double(), rtol=0, atol=1e-12)
    assert torch.equal(found[fixed, : len(fixed)], torch.eye(len(fixed)).double())
    assert not found[fixed, len(fixed) :].any()


def test_mixing_looks_at_the_subspace_and_not_at_signs():
    basis = torch.linalg.qr(torch.randn(12, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(3))).Q
    turned = basis * torch.tensor([1, -1, 1, 1, -1, 1, -1])
    turned = torch.cat([turned[:, [2, 0, 1, 5, 4, 3]], turned[:, 6:]], 1)
    torch.testing.assert_close(_mix(turned, seed=5), _mix(basis, seed=5), rtol=0, atol=1e-12)
    assert (_mix(basis, seed=6) - _mix(basis, seed=5)).abs().max() > 0.1


def test_projection_keeps_the_principal_directions_and_hides_the_last(model):
    statistics = collect(model.requires_grad_(False), bert, BATCHES, [], "pca", seed=0)
    spread = sum(m.covariance / m.covariance.trace() for m in statistics.residual) / len(statistics.residual)
    spread += statistics.decoder / statistics.decoder.trace()
    principal = torch.linalg.svd(spread).U[:, :6]
    found = residual_projection(statistics, 6, torch.empty(0, dtype=torch.int64), seed=0)
    torch.testing.assert_close(found @ found.T, principal @ principal.T, rtol=0, atol=1e-10)
    mean_direction = found.mean(1) * 6**0.5
    torch.testing.assert_close(mean_direction.abs(), principal[:, 5].abs(), rtol=0, atol=1e-8)


def test_every_use_of_the_stream_is_contracted_and_gammas_with_the_squares(model):
    """A gamma becomes the diagonal of P' diag(gamma) P; all else, also a LayerNorm's beta, is multiplied with P."""
    plan, table = cut(model, {"hidden": 8}).plan, bert.axis_table(model)
    p = plan.maps["bert.embeddings.word_embeddings.weight"][1]
    uses = [use for use in table.uses if use.axes == ("hidden",)]
    assert len(uses) == sum(len(dims) for dims in plan.maps.values())
    gammas = {use.parameter for use in uses if use.parameter.endswith("LayerNorm.weight")}
    assert len(gammas) == 2 * LAYERS + 2
    for use in uses:
        expected = p**2 if use.parameter in gammas else p
        torch.testing.assert_close(plan.maps[use.parameter][use.dim], expected, rtol=0, atol=1e-15)


def test_fixed_dims_come_first_and_stay_coordinates(model):
    plan = cut(model, {"hidden": 8}, fixed=torch.tensor([2, 7])).plan
    matrices = [dims[d] for name, dims in plan.maps.items() for d in dims if "query.weight" in name]
    assert len(matrices) == LAYERS
    for matrix in matrices:
        assert matrix[:, :2].nonzero().tolist() == [[2, 0], [7, 1]]
        assert not matrix[[2, 7], 2:].any()
    assert torch.equal(plan.keep["hidden"], torch.arange(8))


def test_too_many_fixed_dims(model):
    with pytest.raises(ValueError, match="2 residual dims of 15, of which 2 are fixed"):
        cut(model, {"hidden": 2}, fixed=torch.tensor([2, 7]))


@pytest.mark.parametrize("mode", ["refit", "full"])
def test_a_cut_of_nothing_changes_nothing(model, mode):
    before = copy.deepcopy(model.state_dict())
    result = cut(model.train(), {}, mode)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
        assert torch.equal(result.model.state_dict()[name], before[name])
    assert model.training and all(p.requires_grad for p in model.parameters())
    assert make_plan(bert.axis_table(model), {}).hash == result.plan.hash


def test_what_comes_before_the_cut_is_left_alone(model):
    found = dict(cut(model, {"layer.1.ffn": 9}).model.named_parameters())
    for name, value in model.named_parameters():
        same = value.shape == found[name].shape and torch.equal(value, found[name])
        assert same or not name.startswith(("bert.embeddings", "bert.encoder.layer.0."))
    assert not torch.equal(found["cls.predictions.bias"], model.cls.predictions.bias)


def kl(model, other) -> float:
    total = 0.0
    for batch in BATCHES:
        first, second = (
            m(batch.input_ids, batch.attention_mask).logits.flatten(0, 1)[batch.target_index].log_softmax(-1)
            for m in (model, other)
        )
        total += float((first.exp() * (first - second)).sum())
    return total


@torch.no_grad()
def test_each_mode_comes_nearer_than_the_plain_cut(model):
    table = bert.axis_table(model)
    plain, plan = copy.deepcopy(model), make_plan(table, random_keep(table, WIDTHS))
    slice_module(plain, plan)
    bert.refresh(plain, plan.widths_after)
    refit, full = (cut(model, mode=mode) for mode in ("refit", "full"))
    assert kl(model, full.model) < 0.8 * kl(model, refit.model) < 0.8 * kl(model, plain)
    assert 0 < full.report["lost"] < 1 and 0 < refit.report["lost"] < 1


@torch.no_grad()
def test_rotation_only_stays_near_the_model(model):
    rotated = rotation_only(model, bert, bert.axis_table(model), BATCHES, Options()).model
    assert bert.axis_table(rotated).widths == bert.axis_table(model).widths
    assert kl(model, rotated) < 0.5 * kl(model, cut(model, {"hidden": 10}).model)


@pytest.mark.parametrize("mode", ["refit", "full", "learned"])
@pytest.mark.parametrize("case", ["dead neuron", "dead head", "few tokens", "no masked rows"])
def test_degenerate_inputs_stay_finite(model, mode, case):
    batches, layer = BATCHES, bert.modules(model, 0)
    with torch.no_grad():
        if case == "dead neuron":
            layer.ffn_linear.weight[:20] = 0
            layer.ffn_linear.bias[:20] = 0
        elif case == "dead head":
            for linear in (layer.query, layer.key, layer.value):
                linear.weight[:5] = 0
                linear.bias[:5] = 0
        elif case == "few tokens":
            batches = [small_batch(0, (3, 2))]
        else:
            batches = [b._replace(target_index=b.target_index[:0], target_ids=b.target_ids[:0]) for b in BATCHES]
    options = {"mode": "project", "basis": "learned", "basis_steps": 3} if mode == "learned" else {"mode": mode}
    result = cut(model, batches=batches, **options)
    for name, value in result.model.named_parameters():
        assert value.isfinite().all(), name
        assert value.abs().max() < 1e3, name
    assert torch.tensor(result.report["lost"]).isfinite()
