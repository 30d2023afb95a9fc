"""The trained basis of the residual stream in every family: its objective against plain runs; that it comes nearer."""

from __future__ import annotations

import copy

import pytest
import torch
from cases import CASES, batch_of, make_model, token_ids
from support.block_reference import BlockReference
from support.small import random_keep
from torch import Tensor, nn

from homodistil.models import family_of
from homodistil.models.axes import kind_of
from homodistil.models.backbone import run_backbone
from homodistil.pruning.compensation import Options, basis_distance, compensate
from homodistil.pruning.compensation.axis_maps import norm_parameters
from homodistil.pruning.compensation.basis_distance import BasisDistance
from homodistil.pruning.compensation.event_plan import Network, plan_event
from homodistil.pruning.compensation.folding import fold_gains
from homodistil.pruning.compensation.learned_basis import train_basis
from homodistil.pruning.compensation.refit import Refit

BATCHES = [batch_of(token_ids(8, seed)) for seed in range(3)]
COMPENSABLE = [name for name, case in CASES.items() if family_of(name).refit_obstacle(case.make_config()) is None]
KINDS = ["hidden", "ffn", "heads", "kv_heads", "heads_in_group"]
NONE = torch.empty(0, dtype=torch.int64)
RIDGE = 0.03


def without_head(model: nn.Module, model_type: str) -> nn.Module:
    family_of(model_type).drop_head(model)
    return model


class Start:
    """A folded model in fp64, and its event with the projection in closed form."""

    def __init__(self, model: nn.Module, model_type: str, fixed: Tensor = NONE) -> None:
        self.family, self.model = family_of(model_type), model.double().requires_grad_(False)
        fold_gains(self.model, self.family)
        self.table = self.family.axis_table(self.model)
        widths = {axis: 2 * w // 3 for axis, w in self.table.widths.items() if kind_of(axis) in KINDS and w > 1}
        basis = "fisher" if self.family.has_head(self.model) else "pca"
        network = Network(self.model, self.family, self.table, None)
        keep = random_keep(self.table, widths)
        self.plan, statistics = plan_event(network, keep, ["hidden"], BATCHES, Options(basis=basis), fixed)
        self.new, self.gram = network.cut(self.plan), statistics.decoder
        use = next(u for u in self.table.uses if u.axes == ("hidden",) and self._is_matrix(u.parameter))
        self.projection = self.plan.maps[use.parameter][use.dim]
        is_unit = ((self.projection == 1).sum(0) == 1) & ((self.projection != 0).sum(0) == 1)
        self.fixed = self.projection[:, is_unit].argmax(0)
        self.distance = self.distance_now()

    def distance_now(self) -> BasisDistance:
        """With the norms that `new` has now."""
        return BasisDistance(self.model, self.new, self.family, self.table, self.plan, BATCHES, self.gram)

    def _is_matrix(self, name: str) -> bool:
        return self.model.get_parameter(name).ndim == 2

    def hidden(self, model: nn.Module, number: int) -> Tensor:
        return run_backbone(model, self.family, BATCHES[number].input_ids, None).flatten(0, 1)


@pytest.mark.parametrize("model_type", COMPENSABLE)
def test_weights_are_those_that_the_plan_leaves(model_type):
    start = Start(make_model(model_type), model_type)
    with torch.no_grad():  # norms are those of `new`, whatever they are
        for name in norm_parameters(start.new):
            start.new.get_parameter(name).add_(0.5)
    weights = start.distance_now().weights(start.projection)
    expected = dict(start.new.named_parameters())
    assert weights.keys() == expected.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(weight, expected[name], rtol=0, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("model_type", COMPENSABLE)
def test_with_a_head_it_is_the_kl_at_the_rows_to_predict(model_type):
    start = Start(make_model(model_type), model_type)
    rows = [start.hidden(model, 1)[BATCHES[1].target_index] for model in (start.model, start.new)]
    expected = start.family.lm_head(start.model)(rows[0])
    if start.family.head_parts(start.model) is None:
        predicted = start.family.lm_head(start.new)(rows[1])
    else:
        predicted = best_logits(start, start.family.lm_transform(start.model)(rows[1] @ start.projection.T))
    log_p, log_q = (logits - logits.logsumexp(-1, keepdim=True) for logits in (expected, predicted))
    total, number = start.distance.of(1, start.projection)
    torch.testing.assert_close(total, (log_p.exp() * (log_p - log_q)).sum(), rtol=1e-4, atol=1e-6)
    assert number == len(BATCHES[1].target_index) and total > 0.1


def test_rows_are_thinned_out_where_their_logits_would_fill_the_memory(monkeypatch):
    monkeypatch.setattr(basis_distance, "_LOGITS_AT_ONCE", 97 * 20 + 5)  # 20 rows of the vocabulary, of 45
    start = Start(make_model("llama"), "llama")
    total, number = start.distance.of(0, start.projection)
    rows = [start.hidden(model, 0)[BATCHES[0].target_index[[*range(0, 45, 3)]]] for model in (start.model, start.new)]
    log_p, log_q = (model.lm_head(x).log_softmax(-1) for model, x in zip((start.model, start.new), rows, strict=True))
    assert number == 15
    torch.testing.assert_close(total, (log_p.exp() * (log_p - log_q)).sum(), rtol=1e-4, atol=1e-6)


def best_logits(start: Start, entering: Tensor) -> Tensor:
    """Logits of the rows in the span of P that are nearest to `entering` by the gram matrix, by least squares."""
    values, vectors = torch.linalg.eigh(start.gram)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    coordinates = torch.linalg.lstsq(root @ start.projection, root @ entering.T).solution
    return start.family.decoder(start.model)((start.projection @ coordinates).T)


@pytest.mark.parametrize("model_type", ["bert", "modernbert"])
def test_without_a_head_it_is_the_error_of_the_hidden_states(model_type):
    start = Start(without_head(make_model(model_type), model_type), model_type)
    total, number = start.distance.of(5, start.projection)  # of three: the last one
    old, new = (start.hidden(model, 2) for model in (start.model, start.new))
    parts = [(o - start.projection @ n).square().sum() / o.square().sum() for o, n in zip(old, new, strict=True)]
    torch.testing.assert_close(total, torch.stack(parts).sum(), rtol=1e-8, atol=0)
    assert number == BATCHES[2].input_ids.numel()


@pytest.mark.parametrize("case", ["bert", "llama", "gpt2", "bert without head"])
def test_gradients_as_by_finite_differences(case):
    model_type = case.split()[0]
    model = make_model(model_type)
    start = Start(without_head(model, model_type) if "without" in case else model, model_type)
    generator = torch.Generator().manual_seed(2)
    direction = torch.randn(start.projection.shape, generator=generator, dtype=torch.float64)
    leaf = start.projection.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(start.distance.of(0, leaf)[0], leaf)
    step = 1e-4 if model_type != "llama" else 3e-4  # the library's RMSNorm computes in fp32
    above, below = (start.distance.of(0, start.projection + sign * step * direction)[0] for sign in (1, -1))
    difference = (above - below) / (2 * step)
    assert difference.abs() > 0.1
    torch.testing.assert_close((gradient * direction).sum(), difference, rtol=2e-3, atol=0)


@pytest.mark.parametrize("fixed", [NONE, torch.tensor([3, 12])])
@pytest.mark.parametrize("case", ["bert", "llama", "bert without head"])
def test_training_comes_nearer_on_orthonormal_columns_and_leaves_fixed_dims(case, fixed):
    """Measured with the norms that fit the start: what training gains is of the basis alone."""
    model_type = case.split()[0]
    model = make_model(model_type)
    start = Start(without_head(model, model_type) if "without" in case else model, model_type, fixed)
    Refit(start.model, start.new, start.family, start.plan, BATCHES, 1e-2, fits_linears=False).run()
    distance = start.distance_now()
    trained = train_basis(distance, start.projection, start.fixed, steps=30, rate=0.05)
    identity = torch.eye(trained.shape[1], dtype=torch.float64)
    torch.testing.assert_close(trained.T @ trained, identity, rtol=0, atol=1e-10)
    number = len(start.fixed)
    assert torch.equal(trained[start.fixed, :number], identity[:number, :number])
    assert not trained[start.fixed, number:].any() and (trained[:, :number].sum(0) == 1).all()
    before, after = (mean_distance(distance, projection) for projection in (start.projection, trained))
    assert after < 0.95 * before


def mean_distance(distance: BasisDistance, projection: Tensor) -> float:
    parts = [distance.of(number, projection) for number in range(len(BATCHES))]
    return float(sum(total for total, _ in parts)) / sum(number for _, number in parts)


@pytest.mark.parametrize("model_type", COMPENSABLE)
def test_project_leaves_linears_as_projected_and_fits_norms(model_type):
    model = make_model(model_type).double()
    family, table = family_of(model_type), family_of(model_type).axis_table(model)
    widths = {axis: 2 * w // 3 for axis, w in table.widths.items() if kind_of(axis) in KINDS and w > 1}
    options = Options(mode="project", ridge=RIDGE)
    result = compensate(model, family, table, random_keep(table, widths), BATCHES, options)
    old = copy.deepcopy(model).requires_grad_(False)
    fold_gains(old, family)
    cut = Network(old, family, table, None).cut(result.plan)
    reference = NormsOnly(old, copy.deepcopy(cut), family, result.plan, [b.input_ids for b in BATCHES], RIDGE)
    reference.run()
    of_norms = norm_parameters(cut)
    for name, parameter in family.backbone(result.model).named_parameters(prefix=family.backbone_name):
        if name not in of_norms:
            assert torch.equal(parameter, cut.get_parameter(name)), name
        expected = reference.new.get_parameter(name)
        torch.testing.assert_close(parameter, expected, rtol=1e-4, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


class NormsOnly(BlockReference):
    def _linear(self, *_args) -> None:
        pass


@pytest.mark.parametrize("mode", ["project", "full"])
@pytest.mark.parametrize("model_type", COMPENSABLE)
def test_an_event_with_a_trained_basis(model_type, mode):
    """Its plan has the trained projection at every use, and its weights are finite."""
    model = make_model(model_type)
    family, table = family_of(model_type), family_of(model_type).axis_table(model)
    keep, weights = random_keep(table, {"hidden": 17}), copy.deepcopy(model.state_dict())
    both = [
        compensate(model, family, table, keep, BATCHES, Options(mode=mode, basis=basis, basis_steps=3))
        for basis in ("learned", "fisher")
    ]
    assert both[0].plan.hash != both[1].plan.hash
    projections = [m if m.shape[1] == 17 else None for dims in both[0].plan.maps.values() for m in dims.values()]
    assert len({m.square().sum(0).sum().item() for m in projections if m is not None}) <= 2  # P, and P squared
    assert all(value.isfinite().all() for value in both[0].model.state_dict().values())
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
