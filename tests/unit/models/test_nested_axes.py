"""Dimensions that run over several axes: grouped query heads, and fused weights made of blocks."""

from __future__ import annotations

import itertools

import pytest
import torch
from support.small import random_keep

from homodistil.models import axes
from homodistil.models.axes import AxisTable, AxisUse
from homodistil.models.resize_plan import make_plan, select
from homodistil.models.score_layout import ScoreLayout

GROUPS, IN_GROUP, QK, VO, FFN, HIDDEN = 3, 2, 5, 4, 7, 6
WIDTHS = {
    "hidden": HIDDEN,
    "layer.0.ffn": FFN,
    "layer.0.kv_heads": GROUPS,
    "layer.0.heads_in_group": IN_GROUP,
    "layer.0.qk_dim": QK,
    "layer.0.vo_dim": VO,
}
QUERY = ("layer.0.kv_heads", "layer.0.heads_in_group", "layer.0.qk_dim")
KEY, VALUE = ("layer.0.kv_heads", "layer.0.qk_dim"), ("layer.0.kv_heads", "layer.0.vo_dim")
CONTEXT = ("layer.0.kv_heads", "layer.0.heads_in_group", "layer.0.vo_dim")
TABLE = AxisTable(
    WIDTHS,
    (
        AxisUse("qkv", 0, QUERY, block=0),
        AxisUse("qkv", 0, KEY, block=1),
        AxisUse("qkv", 0, VALUE, block=2),
        AxisUse("qkv", 1, ("hidden",)),
        AxisUse("o", 0, ("hidden",)),
        AxisUse("o", 1, CONTEXT),
        AxisUse("gate_up", 0, ("layer.0.ffn",), block=0),
        AxisUse("gate_up", 0, ("layer.0.ffn",), block=1),
        AxisUse("gate_up", 1, ("hidden",)),
    ),
)
CUTS = [
    {"layer.0.kv_heads": 2},
    {"layer.0.heads_in_group": 1},
    {"layer.0.qk_dim": 3},
    {"layer.0.vo_dim": 1, "layer.0.kv_heads": 1},
    {"layer.0.kv_heads": 2, "layer.0.heads_in_group": 1, "layer.0.qk_dim": 2, "layer.0.vo_dim": 3, "layer.0.ffn": 4},
    {"hidden": 5, "layer.0.ffn": 1},
]


def _survives(axis: str, point: dict[str, int], keep) -> bool:
    """Whether the entry of `axis` at a point of the grid stays, said without any index arithmetic."""
    if axis not in keep:
        return True
    around = axes.outer_axis(axis, WIDTHS)
    row = keep[axis] if around is None else keep[axis][point[around]]
    return point[axis] in row.tolist()


def _expected(parameter: str, dim: int, keep) -> list[int]:
    kept, position = [], 0
    for use in TABLE.uses:
        if (use.parameter, use.dim) != (parameter, dim):
            continue
        for point in itertools.product(*(range(WIDTHS[axis]) for axis in use.axes)):
            named = dict(zip(use.axes, point, strict=True))
            if all(_survives(axis, named, keep) for axis in use.axes):
                kept.append(position)
            position += 1
    return kept


@pytest.mark.parametrize("widths", CUTS, ids=str)
def test_an_event_keeps_what_survives_along_every_axis(widths):
    keep = random_keep(TABLE, widths, seed=3)
    plan = make_plan(TABLE, keep)
    for (name, dim), size in TABLE.dim_sizes().items():
        index = plan.index.get(name, {}).get(dim, torch.arange(size))
        assert index.tolist() == _expected(name, dim, keep), (name, dim)
    assert plan.widths_after == WIDTHS | widths


def test_two_events_are_one_event():
    """Narrowing twice by `compose` names the same elements of the whole tensor as the plans did one after another."""
    sizes = TABLE.dim_sizes()
    weight = torch.arange(sizes["qkv", 0] * HIDDEN).view(-1, HIDDEN)
    kept, table, tensor = axes.whole(WIDTHS), TABLE, weight
    for seed, widths in enumerate(({"layer.0.kv_heads": 2, "layer.0.qk_dim": 4}, {"layer.0.heads_in_group": 1})):
        keep = random_keep(table, widths, seed)
        tensor = select(tensor, make_plan(table, keep).index["qkv"])
        kept = axes.compose(kept, keep, axes.outer_axes(table.widths))
        table = table.with_widths(axes.widths_after(table.widths, keep))
    at_once = make_plan(TABLE, axes.expand_to_teacher(kept, WIDTHS))
    assert torch.equal(select(weight, at_once.index["qkv"]), tensor)


@pytest.mark.parametrize("per_tensor", [False, True])
def test_scores_of_an_entry_are_all_elements_that_go_with_it(per_tensor):
    sizes = TABLE.dim_sizes()
    layout = ScoreLayout(TABLE)
    values = {key: torch.rand(size, generator=torch.Generator().manual_seed(size)) for key, size in sizes.items()}
    shares = {key: value / value.sum() for key, value in values.items()}  # all dims of a parameter have one total
    sums = torch.cat([7 * shares[key] for keys in layout.dims_over.values() for key in keys])
    values = shares if per_tensor else {key: 7 * share for key, share in shares.items()}
    scores = layout.per_axis(sums, per_tensor)
    for axis, score in scores.items():
        expected = torch.zeros_like(score)
        for (name, dim), blocks in TABLE.blocks().items():
            points = [
                dict(zip(use.axes, point, strict=True))
                for use in blocks
                for point in itertools.product(*(range(WIDTHS[a]) for a in use.axes))
            ]
            for value, point in zip(values[name, dim], points, strict=True):
                around = axes.outer_axis(axis, WIDTHS)
                if axis in point:
                    expected[(point[axis],) if around is None else (point[around], point[axis])] += value
        torch.testing.assert_close(score, expected)


def test_head_origins_name_the_teachers_query_heads():
    keep = random_keep(TABLE, {"layer.0.kv_heads": 2, "layer.0.heads_in_group": 1}, seed=1)
    kept = axes.compose(axes.whole(WIDTHS), keep, axes.outer_axes(WIDTHS))
    expected = [g * IN_GROUP + r for g in keep["layer.0.kv_heads"].tolist() for r in keep["layer.0.heads_in_group"][g]]
    assert axes.head_origins(kept, WIDTHS, 0).tolist() == [int(head) for head in expected]


@pytest.mark.parametrize(
    ("uses", "message"),
    [
        ((AxisUse("w", 0, ("layer.0.qk_dim", "layer.0.kv_heads")),), "does not stand behind layer.0.kv_heads"),
        ((AxisUse("w", 0, ("hidden",)), AxisUse("w", 0, ("layer.0.ffn",))), "two uses"),
        ((AxisUse("w", 0, ("hidden",), block=1),), r"blocks \[1\], expected 0 .. 0"),
    ],
    ids=["inner axis first", "two uses of one block", "missing block"],
)
def test_a_wrong_table_is_refused(uses, message):
    with pytest.raises(ValueError, match=message):
        make_plan(AxisTable(WIDTHS, uses), {})
