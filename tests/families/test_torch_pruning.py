"""What Torch-Pruning's dependency graph, traced by autograd, removes along with an entry, and what our table does: the
same weights and logits.

Where it can: its graph starts at an `nn.Linear` whose rows are the axis, so families with fused rows or Conv1D are left
to the other tests. The rows of BERT's head transform are a group of their own for it, and one with the residual stream
for a stock class, so `hidden` is compared for heads without one. Heads of BERT: tests/unit/models.
"""

from __future__ import annotations

import copy

import pytest
import torch
import torch_pruning as tp
from families.cases import make_model, token_ids
from torch import nn

from homodistil.models import FAMILIES, family_of
from homodistil.models.axes import AxisTable
from homodistil.models.resize_plan import make_plan, slice_module

GONE = [0, 7, 8, 30]
PLAIN_HEADS = sorted(name for name, family in FAMILIES.items() if not family.architecture.has_head_transform)
CASES = [(name, "layer.1.ffn") for name in sorted(FAMILIES)] + [(name, "hidden") for name in PLAIN_HEADS]
pytestmark = pytest.mark.filterwarnings("ignore:Unwrapped parameters")  # gammas of RMSNorm: it prunes them rightly


def linear_with_rows(model: nn.Module, table: AxisTable, axis: str) -> nn.Linear | None:
    """One of layer 1 whose rows are the entries of `axis` and nothing else."""
    for (name, dim), uses in table.blocks().items():
        module = model.get_submodule(name.rpartition(".")[0])
        if ".1." in name and name.endswith(".weight") and dim == 0 and isinstance(module, nn.Linear):
            if [use.axes for use in uses] == [(axis,)]:
                return module
    return None


@pytest.mark.parametrize(("model_type", "axis"), CASES)
def test_the_same_goes(model_type, axis):
    ours = make_model(model_type, attention="eager")
    ours.config.use_cache = False  # a cache would be traced as well
    theirs, family, ids = copy.deepcopy(ours), family_of(model_type), token_ids()
    table = family.axis_table(ours)
    root = linear_with_rows(theirs, table, axis)
    if root is None:
        pytest.skip(f"no linear has {axis} alone as its rows")
    graph = tp.DependencyGraph().build_dependency(theirs, example_inputs={"input_ids": ids})
    graph.get_pruning_group(root, tp.prune_linear_out_channels, idxs=GONE).prune()
    plan = make_plan(table, {axis: torch.tensor([i for i in range(table.widths[axis]) if i not in GONE])})
    slice_module(ours, plan)
    family.refresh(ours, plan.widths_after)
    expected = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        assert torch.equal(parameter, expected[name]), name
    with torch.no_grad():
        whole, cut = make_model(model_type, attention="eager")(input_ids=ids).logits, ours(input_ids=ids).logits
        assert torch.equal(cut, theirs(input_ids=ids).logits)
    assert (cut - whole).abs().max() > 0.1, "nothing that mattered was removed"
