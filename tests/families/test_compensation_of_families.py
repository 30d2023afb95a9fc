"""Compensated cuts of every family's blocks: a float64 reference, what is exact, and that a cut comes out nearer.

BERT's head and its statistics are held to a reference of their own in tests/unit/pruning/test_compensation.py.
"""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from cases import CASES, batch_of, make_model, token_ids
from support.block_reference import BlockReference
from support.small import random_keep
from torch import Tensor, nn

from homodistil.models import family_of
from homodistil.models.axes import kind_of
from homodistil.models.backbone import run_backbone
from homodistil.models.resize_plan import make_plan, slice_module
from homodistil.pruning.compensation import Options, compensate
from homodistil.pruning.compensation.folding import fold_gains
from homodistil.pruning.compensation.statistics import collect
from homodistil.pruning.compensation.uneven_gains import uneven_dims

BATCHES = [batch_of(token_ids(8, seed)) for seed in range(3)]
COMPENSABLE = [name for name, case in CASES.items() if family_of(name).refit_obstacle(case.make_config()) is None]
UNTIED = [name for name in COMPENSABLE if family_of(name).rotation_is_exact(make_model(name))]
RIDGE = 0.03


def widths_of(model: nn.Module, model_type: str, *kinds: str) -> dict[str, int]:
    """About two thirds of each axis of these kinds."""
    widths = family_of(model_type).axis_table(model).widths
    return {axis: max(1, 2 * width // 3) for axis, width in widths.items() if kind_of(axis) in kinds and width > 1}


@torch.no_grad()
def logits(model: nn.Module, model_type: str) -> Tensor:
    family = family_of(model_type)
    rows = [run_backbone(model, family, batch.input_ids, None).flatten(0, 1) for batch in BATCHES]
    return family.lm_head(model)(torch.cat(rows))


def distance(model: nn.Module, other: nn.Module, model_type: str) -> float:
    """KL(model || other), nats."""
    log_p, log_q = (logits(each, model_type).log_softmax(-1) for each in (model, other))
    return float((log_p.exp() * (log_p - log_q)).sum(-1).mean())


def cut(model: nn.Module, model_type: str, widths: dict[str, int], **options):
    family = family_of(model_type)
    table = family.axis_table(model)
    return compensate(model, family, table, random_keep(table, widths), BATCHES, Options(**options))


def sliced(model: nn.Module, model_type: str, plan) -> nn.Module:
    new = copy.deepcopy(model)
    slice_module(new, plan)
    family_of(model_type).refresh(new, plan.widths_after)
    return new


@pytest.mark.parametrize("mode", ["refit", "full"])
@pytest.mark.parametrize("model_type", COMPENSABLE)
def test_every_weight_of_the_backbone_as_in_the_reference(model_type, mode):
    family, model = family_of(model_type), make_model(model_type).double()
    kinds = ["hidden", "ffn", "heads", "kv_heads", "heads_in_group"]
    result = cut(model, model_type, widths_of(model, model_type, *kinds), mode=mode, ridge=RIDGE)
    old = copy.deepcopy(model)
    if mode == "full":
        fold_gains(old, family)
    reference = BlockReference(
        old, sliced(old, model_type, result.plan), family, result.plan, [batch.input_ids for batch in BATCHES], RIDGE
    )
    reference.run()
    reference.check_backbone(result.model)


@pytest.mark.parametrize("model_type", COMPENSABLE)
def test_each_mode_comes_nearer_than_the_plain_cut(model_type):
    model = make_model(model_type)
    widths = widths_of(model, model_type, "hidden", "ffn")
    keep = random_keep(family_of(model_type).axis_table(model), widths)
    plain = sliced(model, model_type, make_plan(family_of(model_type).axis_table(model), keep))
    of_plain = distance(model, plain, model_type)
    for options in ({"mode": "refit"}, {"mode": "full"}, {"mode": "full", "basis": "pca"}):
        assert distance(model, cut(model, model_type, widths, **options).model, model_type) < 0.8 * of_plain


@pytest.mark.parametrize("model_type", COMPENSABLE)
def test_folding_gains_changes_nothing(model_type):
    model = make_model(model_type).double()
    folded = copy.deepcopy(model)
    fold_gains(folded, family_of(model_type))
    scale = logits(model, model_type).abs().max()
    # The library's RMSNorm computes in fp32 whatever it is given.
    torch.testing.assert_close(logits(folded, model_type), logits(model, model_type), rtol=0, atol=1e-5 * float(scale))
    changed = [name for name, p in folded.named_parameters() if not torch.equal(p, model.get_parameter(name))]
    assert bool(changed) == family_of(model_type).architecture.is_pre_norm


@pytest.mark.parametrize("model_type", UNTIED)
def test_rotating_a_stream_whose_gains_can_be_folded_is_exact(model_type):
    """The final gain of a tied decoder cannot: here it is the same for all dims."""
    family, model = family_of(model_type), make_model(model_type)
    with torch.no_grad():
        for norm in (family.norm(family.final_norm(model)), family.embedding_norm(model)):
            if norm is not None:
                norm.write(torch.full_like(norm.gain, 1.5), torch.zeros_like(norm.gain))
    table = family.axis_table(model)
    keep = {"hidden": torch.arange(table.widths["hidden"])}
    rotated = compensate(model, family, table, keep, BATCHES, Options()).model
    hidden = [run_backbone(each, family, BATCHES[0].input_ids, None) for each in (model, rotated)]
    lengths = [rows.norm(dim=-1) for rows in hidden]  # that of all rows may change, by a gain that has been folded
    torch.testing.assert_close(lengths[1] / lengths[1].mean(), lengths[0] / lengths[0].mean(), rtol=1e-4, atol=1e-4)
    assert (hidden[0] - hidden[1]).abs().max() > 0.1
    if family.head_parts(model) is None:  # an activation does not commute with a rotation
        assert distance(model, rotated, model_type) < 1e-6


def test_dims_with_another_gain_stay_coordinates():
    model_type, family = "llama", family_of("llama")
    model = make_model(model_type)
    with torch.no_grad():
        model.model.norm.weight.copy_(torch.full((36,), 2.0).index_fill(0, torch.tensor([3, 30]), -1.0))
    statistics = collect(model.requires_grad_(False), family, BATCHES, [], "pca", seed=0)
    uneven = functools.partial(uneven_dims, family.norm(model.model.norm), statistics.residual[-1])
    assert uneven(most=18).tolist() == [3, 30] and len(uneven(most=1)) == 1
    with torch.no_grad():
        model.model.norm.weight.fill_(2.0)
    assert not len(uneven(most=18))


def test_dims_that_are_wanted_come_before_those_of_the_gain():
    """At the next event the caller counts on them being the first."""
    family, model = family_of("llama"), make_model("llama")
    with torch.no_grad():
        model.model.norm.weight.copy_(torch.full((36,), 2.0).index_fill(0, torch.tensor([3, 30]), -1.0))
    table, keep = family.axis_table(model), {"hidden": torch.arange(20)}
    plan = compensate(model, family, table, keep, BATCHES, Options(), torch.tensor([25, 30])).plan
    projection = plan.maps["model.embed_tokens.weight"][1]
    assert projection[:, :3].argmax(0).tolist() == [25, 30, 3] and (projection[:, :3].sum(0) == 1).all()


def test_a_stream_narrower_than_its_uneven_dims_is_cut_all_the_same():
    """All gains differ, and of 36 dims two are left: at most one of them is fixed."""
    model = make_model("llama")
    result = cut(model, "llama", {"hidden": 2})
    assert result.plan.widths_after["hidden"] == 2
    assert torch.isfinite(logits(result.model, "llama")).all()


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gemma"])
def test_a_tied_decoder_with_another_sign_in_two_dims_is_rotated_exactly(model_type):
    """As in SmolLM2, whose final norm has gains of -1 and 3. Without fixing such dims a cut of nothing costs nats."""
    family, model = family_of(model_type), make_model(model_type)
    final = family.norm(family.final_norm(model))
    with torch.no_grad():
        final.write(torch.full_like(final.gain, 2.0).index_fill(0, torch.tensor([1, 7]), -1.5))
    table = family.axis_table(model)
    keep = {"hidden": torch.arange(table.widths["hidden"])}
    assert distance(model, compensate(model, family, table, keep, BATCHES, Options()).model, model_type) < 1e-6
