"""Layers that leave, compensated, in every family: a float64 reference, what is exact, and that it comes out nearer."""

from __future__ import annotations

import copy

import pytest
import torch
from cases import CASES, batch_of, make_model, token_ids
from support.block_reference import BlockReference
from torch import Tensor, nn

from homodistil.models import family_of
from homodistil.models.backbone import run_backbone
from homodistil.models.resize_plan import make_plan
from homodistil.pruning.compensation import Options
from homodistil.pruning.compensation.depth import compensate_layers

BATCHES = [batch_of(token_ids(8, seed)) for seed in range(3)]
COMPENSABLE = [name for name, case in CASES.items() if family_of(name).refit_obstacle(case.make_config()) is None]
PRE_NORM = [name for name in COMPENSABLE if family_of(name).architecture.is_pre_norm]
LAYERS, KEPT = 5, [0, 1, 4]
RIDGE = 0.03


def shallow(model: nn.Module, model_type: str) -> nn.Module:
    """`model` with the layers that stay, as they were."""
    new = copy.deepcopy(model)
    family_of(model_type).keep_layers(new, KEPT)
    return new


def compensated(model: nn.Module, model_type: str, **options) -> nn.Module:
    return compensate_layers(model, family_of(model_type), KEPT, BATCHES, Options(**options)).model


@torch.no_grad()
def hidden_states(model: nn.Module, model_type: str) -> Tensor:
    passes = [run_backbone(model, family_of(model_type), batch.input_ids, None) for batch in BATCHES]
    return torch.cat(passes).flatten(0, 1)


def unlike(model: nn.Module, other: nn.Module, model_type: str) -> float:
    """Squared error of the last hidden states, as a share of their square."""
    before, after = (hidden_states(each, model_type) for each in (model, other))
    return float((before - after).square().sum() / before.square().sum())


@pytest.mark.parametrize("mode", ["refit", "full"])
@pytest.mark.parametrize("model_type", COMPENSABLE)
def test_every_weight_of_the_backbone_as_in_the_reference(model_type, mode):
    family, model = family_of(model_type), make_model(model_type, layers=LAYERS).double()
    untouched = copy.deepcopy(model.state_dict())
    result = compensate_layers(model, family, KEPT, BATCHES, Options(mode=mode, ridge=RIDGE))
    assert all(torch.equal(value, untouched[name]) for name, value in model.state_dict().items())
    assert len(family.layers(result.model)) == result.model.config.num_hidden_layers == len(KEPT)
    plan, ids = make_plan(family.axis_table(model), {}), [batch.input_ids for batch in BATCHES]
    reference = BlockReference(model, shallow(model, model_type), family, plan, ids, RIDGE, KEPT)
    reference.run()
    reference.check_backbone(result.model)


@pytest.mark.parametrize("model_type", COMPENSABLE)
def test_it_comes_nearer_than_layers_that_only_leave(model_type):
    model = make_model(model_type, layers=LAYERS)
    of_plain = unlike(model, shallow(model, model_type), model_type)
    of_norms = unlike(model, compensated(model, model_type, mode="project"), model_type)
    of_all = unlike(model, compensated(model, model_type), model_type)
    assert of_all < 0.8 * of_plain and of_norms < of_plain


@pytest.mark.parametrize("model_type", PRE_NORM)
def test_layers_that_add_nothing_leave_without_a_trace(model_type):
    family, model = family_of(model_type), make_model(model_type, layers=LAYERS)
    with torch.no_grad():
        for i in set(range(LAYERS)) - set(KEPT):
            for block in family.blocks(model, i):
                last = block.output if block.output_norm is None else block.output_norm.module
                for parameter in last.parameters():
                    # Gemma's norms multiply with 1 + weight.
                    offset = 0.0 if block.output_norm is None else block.output_norm.offset
                    parameter.fill_(-offset)
    new = compensated(model, model_type)
    expected = shallow(model, model_type)
    for name, parameter in family.backbone(new).named_parameters():
        # Nothing is missing, so every fit gives what it began with: fp32 activations, whose errors a solve with a
        # ridge of a hundredth may enlarge by as much.
        torch.testing.assert_close(parameter, family.backbone(expected).get_parameter(name), rtol=1e-3, atol=1e-3)
    assert unlike(model, new, model_type) < 1e-8
